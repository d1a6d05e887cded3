"""What every engine is given: a run that its folder describes."""

import secrets
from dataclasses import dataclass
from pathlib import Path

from ...config import RunConfig
from ...data_prep.schema import Schema, schema_to_json
from ..store import Checkpoint, RunFolder


@dataclass(frozen=True)
class Begun:
    """A run whose folder says what it is.

    Attributes:
        config: The resolved configuration.
        schema: What a record is.
        folder: The run folder, locked.
        run_id: Sixteen hexadecimal digits.
        point: Where it goes on from; `None` for a new one.
    """

    config: RunConfig
    schema: Schema
    folder: Path
    run_id: str
    point: Checkpoint | None

    @property
    def values(self) -> dict[str, str]:
        """The run configuration of the apps, as Flower hands it on."""
        return {
            "config": self.config.model_dump_json(by_alias=True),
            "schema": schema_to_json(self.schema),
            "run-id": self.run_id,
            "folder": str(self.folder.resolve()),
        }


def begin(config: RunConfig, schema: Schema, folder: Path) -> Begun:
    """Describes a new run in its folder, or finds the one that is there.

    Raises:
        FedveilError: What is there is damaged.
    """
    store = RunFolder(folder)
    point, _ = store.load_checkpoint()
    # Flower keeps run numbers in signed 64 bits.
    run_id = point.run_id if point else f"{secrets.randbits(62):016x}"
    if point is None:
        store.describe(config, schema)
    return Begun(config, schema, folder, run_id, point)
