"""A finished run: what it promised, what happened, and samples of its model."""

import json
import secrets
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import ConfigError, FedveilError, RunConfig, read_toml, validated
from .data_prep import Encoded, modality
from .data_prep.schema import ImageSchema, Schema, schema_from_json
from .server.store import Event, RunFolder

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    from torch import nn

    from .data_prep.queries import Noisy
    from .models import Batch


class Run:
    """A finished run.

    Attributes:
        path: Its folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._folder = RunFolder(path)

    @cached_property
    def config(self) -> RunConfig:
        """The resolved configuration: to override it, give the derived options anew too."""
        return validated(RunConfig, read_toml(self.path / "config.toml"))

    @cached_property
    def schema(self) -> Schema:
        """What a record is."""
        return schema_from_json(json.dumps(self._folder.read_json("schema.json")))

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """What `metrics.json` holds."""
        return self._folder.read_json("metrics.json")

    @property
    def finished(self) -> bool:
        """Whether all of it ran."""
        return (self.path / "metrics.json").exists()

    @property
    def privacy(self) -> dict[str, Any]:
        """What was promised and spent, against whom, by which accountant."""
        found: dict[str, Any] = self.metrics["privacy"]
        return found

    @cached_property
    def statistics(self) -> "Noisy":
        """What the round of statistics released, by query, each with the noise in it.

        Raises:
            FedveilError: The run has made none, or its file is damaged.
        """
        from .privacy.plan import plan
        from .server.statistics import kept

        begun = (event for event in self.events() if event["event"] in {"run", "resumed"})
        run_id = next((str(event["run_id"]) for event in begun), "")
        return kept(self._folder, run_id, self.config, self.schema, plan(self.config))

    def events(self) -> Iterator[Event]:
        """The lines of `events.jsonl`."""
        return self._folder.events()

    def provenance(self) -> dict[str, Any]:
        """What every synthetic file carries: it is synthetic, of which run, at what cost."""
        kept = ("unit", "mechanism", "against", "epsilon", "delta", "not_claimed")
        return {
            "synthetic": True,
            "generator": f"fedveil {self.metrics['family']}",
            "run_id": self.metrics["run_id"],
            **{key: self.privacy[key] for key in kept},
        }

    def sample(
        self, n: int, seed: int | None = None, labels: Sequence[int] | None = None
    ) -> "pl.DataFrame | np.ndarray | list[str]":
        """Draws synthetic records: post-processing, free of any privacy cost.

        Args:
            n: How many.
            seed: For equal draws; fresh ones without.
            labels: [n] class indices; drawn from the model where they are not given.

        Returns:
            A polars frame; an array [n, height, width] or [n, height, width, 3] of uint8; a list
            of texts.

        Raises:
            FedveilError: n is below 1, a label is out of range or the model cannot be read.
        """
        records = self.sample_records(n, seed, labels)
        found: pl.DataFrame | np.ndarray | list[str] = (
            records.arrays() if isinstance(self.schema, ImageSchema) else records
        )
        return found

    def sample_records(
        self, n: int, seed: int | None = None, labels: Sequence[int] | None = None
    ) -> Any:  # noqa: ANN401
        """As `sample`, but images come as `Images`, with their labels."""
        batch = self._draw(n, seed, labels)
        encoded = Encoded(batch.x.numpy(), batch.y.numpy())
        return modality(self.schema).decode(encoded, self.schema)

    def histograms(self, n: int, seed: int | None = None) -> "np.ndarray":
        """One-way histograms of n synthetic records, as `models.histograms` joins them."""
        from .models.histograms import one_way

        return one_way(self._draw(n, seed), self.schema)

    def report(self, out: Path | str | None = None) -> Path:
        """Writes the HTML report, of a run that failed or was cut off too.

        Args:
            out: Where to; `report.html` in the run folder by default.

        Returns:
            Where it is.

        Raises:
            ConfigError: The folder holds no run, or the report cannot be written.
            FedveilError: It holds damaged files.
        """
        from .reports import write_report

        return write_report(self, Path(out) if out is not None else None)

    def _draw(
        self, n: int, seed: int | None = None, labels: Sequence[int] | None = None
    ) -> "Batch":
        import torch

        from .models import family

        if n < 1:
            raise ConfigError(f"n = {n}: must be at least 1")
        if seed is not None and not 0 <= seed < 2**63:
            raise ConfigError(f"seed = {seed}: must be 0 to 2^63 - 1")
        wanted = None if labels is None else torch.tensor(self._checked(n, labels))
        generator = torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)
        return family(self.config.model.family).sample(self._module, n, generator, wanted)

    def evaluate(self, data: Path | str) -> dict[str, Any]:
        """Exact figures of the run's model for records of one's own: NOT PRIVATE.

        They are the figures of `metrics.json` without noise, for the model that is released; where
        the run hides persons, each person counts once.

        Args:
            data: A file or folder of the run's modality; it is cleaned by the run's rules.

        Returns:
            `private` (False), `records` (how many were used) and `figures` by name.

        Raises:
            FedveilError: The data or the model cannot be used.
        """
        import torch

        from .client.site import Side
        from .data_prep.clean import refuse_unusable
        from .data_prep.partition import persons
        from .models import Batch, family, metrics
        from .server.evaluation import questions

        kind = modality(self.schema)
        cleaned, report = kind.clean(
            kind.read(str(data), self.schema), self.schema, self.config.clean
        )
        refuse_unusable(report)
        encoded = kind.encode(cleaned, self.schema)
        records = Batch(torch.from_numpy(encoded.x), torch.from_numpy(encoded.y))
        exam = questions(self._arrays, self.config, self.schema)
        made = family(self.config.model.family)
        whose = torch.from_numpy(persons(kind.identities(cleaned, self.schema)))
        weights = Side(records, whose).weights(self.config.unit)
        sums = metrics.answers(made, self._module, exam, records, self.schema, weights)
        figures = metrics.figures(sums, exam, self.schema, made.score_bounds(self._module))
        return {"private": False, "records": len(records.y), "figures": figures}

    @cached_property
    def _arrays(self) -> "dict[str, np.ndarray]":
        from .models.state import read_file

        arrays, facts = read_file(self.path / "model.safetensors")
        if facts.get("run_id") != self.metrics["run_id"]:
            raise FedveilError(f"{self.path}: model.safetensors is of another run")
        return arrays

    @cached_property
    def _module(self) -> "nn.Module":
        from .models import family
        from .models.state import load_arrays

        module = family(self.config.model.family).build(self.config.model, self.schema)
        load_arrays(module, self._arrays)
        return module

    def _checked(self, n: int, labels: Sequence[int]) -> list[int]:
        classes = len(self.schema.classes)
        if len(labels) != n or not all(0 <= label < max(classes, 1) for label in labels):
            raise ConfigError(f"labels: must be {n} class indices from 0 to {max(classes, 1) - 1}")
        return list(labels)
