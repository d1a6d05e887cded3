"""A site: its records, read and cleaned once per run, and its secrets."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import RunConfig
from ..data_prep import Encoded, modality
from ..data_prep.clean import DataError
from ..data_prep.partition import keyed_split
from ..data_prep.schema import Schema
from ..models import Batch
from ..privacy.noise import Coins

log = logging.getLogger(__name__)


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
        self.name, self.coins = name, coins
        self._read, self._split_key, self._folder = read, split_key, folder
        self._records: Records | None = None

    def records(self, config: RunConfig, schema: Schema) -> Records:
        """The site's records, read on the first call.

        A site whose data fail altogether takes part with no records, for whether they failed is
        itself private: it sends zeros, or noise. The cause is in its own log.
        """
        if self._records is None:
            kind = modality(schema)
            try:
                cleaned, report = kind.clean(self._read(), schema, config.clean)
            except DataError as error:
                log.error("%s: no usable records: %s", self.name, error)
                self._records = _empty(schema)
                return self._records
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


def _empty(schema: Schema) -> Records:
    shape = (
        (0, schema.width)
        if schema.modality == "table"
        else (0, schema.channels, schema.height, schema.width)
    )
    nothing = Batch(torch.zeros(shape), torch.zeros(0, dtype=torch.int64))
    return Records(nothing, nothing, nothing)
