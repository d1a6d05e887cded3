"""A site: its records, read and cleaned once per run, and its secrets."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import RunConfig
from ..data_prep import Encoded, modality
from ..data_prep.partition import keyed_split
from ..data_prep.schema import Schema
from ..models import Batch
from ..privacy.noise import Coins


@dataclass(frozen=True)
class Records:
    """A site's cleaned, encoded records by side of the keyed split."""

    training: Batch
    holdout: Batch
    audit: Batch


class Site:
    """One site in one run.

    Attributes:
        name: What its own log and folder call it.
        coins: Its secret coins.
        failed: Whether it ever took part without its records because they made it fail.
    """

    def __init__(
        self,
        name: str,
        read: Callable[[], Any],
        split_key: bytes,
        coins: Coins,
        folder: Path | None = None,
    ) -> None:
        """A site that reads its raw records by `read` and keeps its report in `folder`."""
        self.name, self.coins, self.failed = name, coins, False
        self._read, self._split_key, self._folder = read, split_key, folder
        self._records: Records | None = None

    def records(self, config: RunConfig, schema: Schema) -> Records:
        """The site's records, read on the first call.

        Raises:
            DataError: They cannot be read at all.
        """
        if self._records is None:
            kind = modality(schema)
            cleaned, report = kind.clean(self._read(), schema, config.clean)
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
                text = json.dumps(report.as_dict(), indent=2)
                (self._folder / "cleaning.json").write_text(text, encoding="utf-8")
            encoded = kind.encode(cleaned, schema)
            sides = keyed_split(
                kind.identities(cleaned, schema),
                self._split_key,
                config.data.holdout,
                config.data.audit,
            )
            self._records = Records(
                training=_batch(encoded.take(sides.training)),
                holdout=_batch(encoded.take(sides.holdout)),
                audit=_batch(encoded.take(sides.audit)),
            )
        return self._records


def _batch(encoded: Encoded) -> Batch:
    return Batch(torch.from_numpy(encoded.x), torch.from_numpy(encoded.y))


def no_records(schema: Schema) -> Batch:
    """Zero records of a schema: what a site takes part with when it has none."""
    return Batch(torch.zeros(0, *schema.shape), torch.zeros(0, dtype=torch.int64))
