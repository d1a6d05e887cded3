"""What travels between server and sites: frozen messages, and their form as Flower records.

Reading refuses what is not exactly a message: a missing or foreign key, a wrong type.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

import numpy as np

from .config import FedveilError
from .flower import Array, ArrayRecord, ConfigRecord, Message, RecordDict

TRAIN = "train.step"
"""The action in which a site computes its part of a round."""


class WireError(FedveilError):
    """A message that is not one of ours."""


class Refusal(Enum):
    """Why a site takes no part: by configuration and budget, never by what its records say."""

    CONFIGURATION = "the configuration is not acceptable to the site"
    BUDGET = "all releases of the run have been made"
    FAILED = "the site fails even without records; its own log says why"


@dataclass(frozen=True)
class Task:
    """The server's request for one round.

    Attributes:
        run_id: Which run.
        round: From 1.
        config: The resolved configuration, as JSON; the site prices it by itself.
        schema: The schema, as JSON.
        arrays: The model.
    """

    run_id: str
    round: int
    config: str
    schema: str
    arrays: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Update:
    """A site's part of one round: a gradient sum, or a model after local steps."""

    run_id: str
    round: int
    arrays: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Refused:
    """A site's refusal of one round."""

    run_id: str
    round: int
    code: Refusal


def pack(message: Task | Update | Refused) -> RecordDict:
    """A message as Flower records."""
    facts: dict[str, str | int] = {"run-id": message.run_id, "round": message.round}
    if isinstance(message, Refused):
        return RecordDict({"facts": ConfigRecord({**facts, "refused": message.code.name})})
    if isinstance(message, Task):
        facts |= {"config": message.config, "schema": message.schema}
    arrays = {name: _encode(array) for name, array in message.arrays.items()}
    return RecordDict({"facts": ConfigRecord({**facts}), "arrays": ArrayRecord(arrays)})


def read_task(content: RecordDict) -> Task:
    """Reads a request.

    Raises:
        WireError: It is none.
    """
    facts, arrays = _facts(content), _arrays(content)
    _only(facts, {"run-id", "round", "config", "schema"})
    return Task(
        _field(facts, "run-id", str),
        _field(facts, "round", int),
        _field(facts, "config", str),
        _field(facts, "schema", str),
        arrays,
    )


def read_reply(message: Message) -> Update | Refused:
    """Reads a site's reply.

    Raises:
        WireError: It is an error or no reply of ours.
    """
    if message.has_error():
        raise WireError(f"Flower error {message.error.code}")
    facts = _facts(message.content)
    run_id, number = _field(facts, "run-id", str), _field(facts, "round", int)
    if "refused" in facts:
        _only(facts, {"run-id", "round", "refused"})
        if "arrays" in message.content:
            raise WireError("refusal: expected no arrays")
        code = _field(facts, "refused", str)
        if code not in Refusal.__members__:
            raise WireError("refusal: unknown code")
        return Refused(run_id, number, Refusal[code])
    _only(facts, {"run-id", "round"})
    return Update(run_id, number, _arrays(message.content))


_ENCODING = "little-endian"
_TYPES = {"float32": "<f4", "float64": "<f8"}  # of models; of sums, whose rounding is a sensitivity
_EXPECTED = " or ".join(_TYPES)
FieldT = TypeVar("FieldT", str, int)


def _facts(content: RecordDict) -> ConfigRecord:
    record = content.get("facts")
    if not isinstance(record, ConfigRecord) or content.keys() - {"facts", "arrays"}:
        raise WireError("message: expected the records facts and arrays")
    return record


def _arrays(content: RecordDict) -> dict[str, np.ndarray]:
    record = content.get("arrays")
    if not isinstance(record, ArrayRecord):
        raise WireError("arrays: missing")
    return {name: _decode(array) for name, array in record.items()}


def _encode(array: np.ndarray) -> Array:
    """Little-endian bytes, in C order: numpy's own format can hold archives and pickles."""
    name = array.dtype.name
    if name not in _TYPES:
        raise WireError(f"arrays: expected {_EXPECTED}, got {name}")
    return Array(name, array.shape, _ENCODING, array.astype(_TYPES[name]).tobytes())


def _decode(array: Array) -> np.ndarray:
    shape = tuple(array.shape)
    if array.dtype not in _TYPES or array.stype != _ENCODING:
        raise WireError(f"arrays: expected {_EXPECTED}")
    dtype = np.dtype(_TYPES[array.dtype])
    if not all(type(size) is int and size >= 0 for size in shape):
        raise WireError("arrays: expected a shape of whole numbers")
    if type(array.data) is not bytes or len(array.data) != dtype.itemsize * math.prod(shape):
        raise WireError("arrays: expected as many bytes as the shape asks for")
    return np.frombuffer(array.data, dtype=dtype).reshape(shape)


def _field(facts: ConfigRecord, name: str, kind: type[FieldT]) -> FieldT:
    value = facts.get(name)
    if type(value) is not kind:
        raise WireError(f"{name}: expected {kind.__name__}, got {type(value).__name__}")
    return value


def _only(facts: ConfigRecord, names: set[str]) -> None:
    if len(facts.keys() - names):
        raise WireError(f"message: expected the keys {', '.join(sorted(names))} only")
