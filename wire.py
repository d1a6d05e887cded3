"""What travels between server and sites: frozen messages, and their form as Flower records.

Reading refuses what is not exactly a message: a missing or foreign key, a wrong type.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from .config import FedveilError
from .flower import Array, ArrayRecord, ConfigRecord, Message, RecordDict

TRAIN = "train.step"
"""The action in which a site computes its part of a round, and evaluates if it is asked to."""

EVALUATE = "evaluate.model"
"""The action in which a site evaluates only: the model after the last round."""


NO_LEDGER = (0, "")
"""Count and head hash of a ledger that is not known."""


class WireError(FedveilError):
    """A message that is not one of ours."""


class Refusal(Enum):
    """Why a site takes no part: by configuration and budget, never by what its records say."""

    CONFIGURATION = "the configuration is not acceptable to the site"
    BUDGET = "its budget has no such release left"
    LEDGER = "its ledger cannot be used"
    FAILED = "the site fails even without records; its own log says why"


@dataclass(frozen=True)
class Task:
    """The server's request for one round.

    Attributes:
        run_id: Which run.
        round: From 1: a release of the plan's, asked for once. 0 for an evaluation alone.
        evaluation: The same of evaluations; 0 for none.
        config: The resolved configuration, as JSON; the site prices it by itself.
        schema: The schema, as JSON.
        arrays: The model to train; empty for an evaluation alone.
        released: The model to evaluate, and
        exam: the questions; both empty without an evaluation.
        ledger: Count and head hash of the site's ledger, as the server saw them last.
    """

    run_id: str
    round: int
    evaluation: int
    config: str
    schema: str
    arrays: Mapping[str, np.ndarray]
    released: Mapping[str, np.ndarray]
    exam: Mapping[str, np.ndarray]
    ledger: tuple[int, str]


@dataclass(frozen=True)
class Update:
    """A site's part of one round.

    Attributes:
        run_id: As in the task.
        round: As in the task.
        evaluation: As in the task.
        arrays: A gradient sum, or a model after local steps; empty for an evaluation alone.
        sums: What was asked of the records, added up; empty without an evaluation.
        ledger: Count and head hash of the site's ledger, this round's commits included.
    """

    run_id: str
    round: int
    evaluation: int
    arrays: Mapping[str, np.ndarray]
    sums: Mapping[str, np.ndarray]
    ledger: tuple[int, str]


@dataclass(frozen=True)
class Refused:
    """A site's refusal of one round."""

    run_id: str
    round: int
    evaluation: int
    code: Refusal


def pack(message: Task | Update | Refused) -> RecordDict:
    """A message as Flower records."""
    facts: dict[str, str | int] = {
        "run-id": message.run_id, "round": message.round, "evaluation": message.evaluation,
    }  # fmt: skip
    if isinstance(message, Refused):
        return RecordDict({"facts": ConfigRecord({**facts, "refused": message.code.name})})
    facts |= {"ledger-count": message.ledger[0], "ledger-hash": message.ledger[1]}
    if isinstance(message, Task):
        facts |= {"config": message.config, "schema": message.schema}
    content = RecordDict({"facts": ConfigRecord({**facts})})
    for part in _TASK_ARRAYS if isinstance(message, Task) else _UPDATE_ARRAYS:
        arrays = getattr(message, part)
        content[part] = _encode(arrays)
    return content


def pack_for(packed: RecordDict, ledger: tuple[int, str]) -> RecordDict:
    """A packed task for another site: its own ledger head, and the same arrays, not copied."""
    head = ConfigRecord({"ledger-count": ledger[0], "ledger-hash": ledger[1]})
    facts = ConfigRecord({**packed.config_records["facts"], **head})
    return RecordDict({**packed, "facts": facts})


def read_task(content: RecordDict) -> Task:
    """Reads a request.

    Raises:
        WireError: It is none.
    """
    facts = _facts(content, _TASK_ARRAYS)
    _only(facts, {*_NUMBERS, *_LEDGER, "config", "schema"})
    return Task(
        _field(facts, "run-id", str),
        _field(facts, "round", int),
        _field(facts, "evaluation", int),
        _field(facts, "config", str),
        _field(facts, "schema", str),
        **{part: _arrays(content, part) for part in _TASK_ARRAYS},
        ledger=_head(facts),
    )


def read_reply(message: Message) -> Update | Refused:
    """Reads a site's reply.

    Raises:
        WireError: It is an error or no reply of ours.
    """
    if message.has_error():
        raise WireError(f"Flower error {message.error.code}")
    content = message.content
    refused = "facts" in content and "refused" in content["facts"]
    facts = _facts(content, () if refused else _UPDATE_ARRAYS)
    about = _field(facts, "run-id", str), _field(facts, "round", int)
    evaluation = _field(facts, "evaluation", int)
    if refused:
        _only(facts, {*_NUMBERS, "refused"})
        code = _field(facts, "refused", str)
        if code not in Refusal.__members__:
            raise WireError("refusal: unknown code")
        return Refused(*about, evaluation, Refusal[code])
    _only(facts, {*_NUMBERS, *_LEDGER})
    arrays, sums = (_arrays(content, part) for part in _UPDATE_ARRAYS)
    return Update(*about, evaluation, arrays, sums, _head(facts))


_FORMAT = "safetensors"
_MOST_HEADER = 2**20  # bytes; some ten thousand arrays
_EXPECTED = "float32 or float64"  # of models; of sums, whose rounding is a sensitivity
_TASK_ARRAYS = ("arrays", "released", "exam")
_UPDATE_ARRAYS = ("arrays", "sums")
_NUMBERS = ("run-id", "round", "evaluation")
_LEDGER = ("ledger-count", "ledger-hash")
FieldT = TypeVar("FieldT", str, int)


def _facts(content: RecordDict, arrays: tuple[str, ...]) -> ConfigRecord:
    record = content.get("facts")
    if not isinstance(record, ConfigRecord) or content.keys() != {"facts", *arrays}:
        raise WireError(f"message: expected the records {', '.join(('facts', *arrays))}")
    return record


def _arrays(content: RecordDict, part: str) -> dict[str, np.ndarray]:
    record = content[part]
    if not isinstance(record, ArrayRecord):
        raise WireError(f"{part}: expected arrays")
    return _decode(record, part)


def _head(facts: ConfigRecord) -> tuple[int, str]:
    count, digest = _field(facts, "ledger-count", int), _field(facts, "ledger-hash", str)
    # It is kept and printed: no other text of a sender's may get there.
    if (count, digest) != NO_LEDGER and not (count > 0 and re.fullmatch("[0-9a-f]{64}", digest)):
        raise WireError("ledger: expected a count and a SHA-256")
    return count, digest


def _encode(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    """All of a part as one safetensors: numpy's own format can hold archives and pickles.

    One of Flower's arrays instead of one a parameter: it copies, hashes and stores each by itself.
    """
    if not arrays:
        return ArrayRecord()
    plain = {}
    for name, array in arrays.items():
        if not _may_travel(array.dtype):
            raise WireError(f"arrays: expected {_EXPECTED}, got {array.dtype.name}")
        plain[name] = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
    data = save(plain)
    return ArrayRecord({_FORMAT: Array("uint8", (len(data),), _FORMAT, data)})


def _may_travel(dtype: np.dtype) -> bool:
    # Not by its name, which takes numpy a microsecond to put together.
    return dtype.kind == "f" and dtype.itemsize in {4, 8}


def _decode(record: ArrayRecord, part: str) -> dict[str, np.ndarray]:
    if not record:
        return {}
    whole = record.get(_FORMAT)
    if len(record) != 1 or whole is None or (whole.dtype, whole.stype) != ("uint8", _FORMAT):
        raise WireError(f"{part}: expected one {_FORMAT} of {_EXPECTED}")
    if type(whole.data) is not bytes or tuple(whole.shape) != (len(whole.data),):
        raise WireError(f"{part}: expected as many bytes as the shape asks for")
    # A header says what arrays there are; a large one would become many times its size in objects.
    if int.from_bytes(whole.data[:8], "little") > _MOST_HEADER:
        raise WireError(f"{part}: expected one {_FORMAT} of {_EXPECTED}")
    try:
        arrays = dict(sorted(load(whole.data).items()))  # which come in an order of chance
    except (SafetensorError, LookupError, ValueError, TypeError, OverflowError, AttributeError):
        raise WireError(f"{part}: expected one {_FORMAT} of {_EXPECTED}") from None
    if not all(_may_travel(array.dtype) for array in arrays.values()):
        raise WireError(f"{part}: expected one {_FORMAT} of {_EXPECTED}")
    return arrays


def _field(facts: ConfigRecord, name: str, kind: type[FieldT]) -> FieldT:
    value = facts.get(name)
    if type(value) is not kind:
        raise WireError(f"{name}: expected {kind.__name__}, got {type(value).__name__}")
    return value


def _only(facts: ConfigRecord, names: set[str]) -> None:
    if len(facts.keys() - names):
        raise WireError(f"message: expected the keys {', '.join(sorted(names))} only")
