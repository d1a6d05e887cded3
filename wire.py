"""What travels between server and sites: frozen messages, and their form as Flower records.

Reading refuses what is not exactly a message: a missing or foreign key, a wrong type.
"""

import hashlib
import json
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

STATISTICS = "query.statistics"
"""The action in which a site answers the one round of statistics."""

ADVERTISE = "query.advertise"
"""The action in which a site makes its keys for the rounds of an epoch of secure sums."""

DEAL = "query.deal"
"""The action in which it deals the others shares of them."""

CONFIRM = "query.confirm"
"""The action in which it signs whose vectors are in a round's sum."""

UNMASK = "query.unmask"
"""The action in which it helps to unmask that sum."""

END = "query.end"
"""The action in which it erases what is left of the last epoch's keys."""


READY = "query.ready"
"""The action in which a site says whether it would take part in a run; it touches no record.

It is asked with a `Task` of no round, no evaluation and no arrays, and answers with an empty
`Step`.
"""


def site_name(number: int) -> str:
    """What a simulated site is called, by its number; ascending as the numbers."""
    return f"site-{number:03d}"


NO_LEDGER = (0, "")
"""Count and head hash of a ledger that is not known."""


class WireError(FedveilError):
    """A message that is not one of ours."""


class Refusal(Enum):
    """Why a site takes no part: by configuration and budget, never by what its records say."""

    CONFIGURATION = "the configuration is not acceptable to the site"
    ROSTER = "fewer sites or colluders than its policy asks"
    MECHANISM = "its policy does not allow the mechanism"
    UNIT = "its policy does not allow the privacy unit"
    FAMILY = "its policy does not allow the family"
    ENCRYPTION = "its policy does not allow the encryption"
    PARAMETERS = "the model has more parameters than its policy allows"
    PRICE = "the run costs more than its policy allows"
    COORDINATOR = "the run is not signed by the coordinator that its policy names"
    APPROVAL = "its owner has not approved the run yet"
    PAUSED = "its owner has paused it"
    CONFORMANCE = "its self-test of the mechanism fails"
    PROTOCOL = "the secure sum's protocol does not allow it"
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
        clipping_norm: The bound of a site's update, where that changes from round to round.
        aggregator: The X25519 key that replies are sealed for; empty where they are not.
        coordinator: The Ed25519 key of who asks, and
        signature: its signature on the run (`run_statement`).
        opening: The secure sum's `Opening`, as bytes; empty without one.
        deals: Its `Deals` for this site, until it has taken them.
        digest: SHA-256 of all that is the same for every site; made when it is read.
        statistics: The same as `round`, of the round of statistics: 1, or 0 for none.
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
    clipping_norm: float = 0.0
    aggregator: bytes = b""
    coordinator: bytes = b""
    signature: bytes = b""
    opening: bytes = b""
    deals: bytes = b""
    digest: bytes = b""
    statistics: int = 0


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
        upload: Instead of arrays and sums: the `Upload` of a secure sum or a `SealedReply`.
        statistics: As in the task.
    """

    run_id: str
    round: int
    evaluation: int
    arrays: Mapping[str, np.ndarray]
    sums: Mapping[str, np.ndarray]
    ledger: tuple[int, str]
    upload: bytes = b""
    statistics: int = 0


@dataclass(frozen=True)
class Step:
    """A message of the secure sum's protocol, either way.

    Attributes:
        run_id: Of which run.
        body: The message, as bytes.
    """

    run_id: str
    body: bytes


@dataclass(frozen=True)
class Refused:
    """A site's refusal of one round."""

    run_id: str
    round: int
    evaluation: int
    code: Refusal
    statistics: int = 0


def pack(message: Task | Update | Refused | Step) -> RecordDict:
    """A message as Flower records."""
    if isinstance(message, Step):
        facts = ConfigRecord({"run-id": message.run_id})
        return RecordDict({"facts": facts, "step": _raw(message.body)})
    about: dict[str, str | int] = {
        "run-id": message.run_id, "round": message.round, "evaluation": message.evaluation,
        "statistics": message.statistics,
    }  # fmt: skip
    if isinstance(message, Refused):
        return RecordDict({"facts": ConfigRecord({**about, "refused": message.code.name})})
    own: dict[str, str | int | float | bytes] = {**about}
    own |= {"ledger-count": message.ledger[0], "ledger-hash": message.ledger[1]}
    if isinstance(message, Task):
        own |= {name: getattr(message, name) for name in _TASK_FACTS}
    content = RecordDict({"facts": ConfigRecord({**own})})
    for part in _TASK_ARRAYS if isinstance(message, Task) else _UPDATE_ARRAYS:
        arrays = getattr(message, part)
        content[part] = _encode(arrays)
    if isinstance(message, Update):
        content["upload"] = _raw(message.upload)
    return content


def pack_for(
    packed: RecordDict, ledger: tuple[int, str], opening: bytes = b"", deals: bytes = b""
) -> RecordDict:
    """A packed task for one site: what is its own, and the same arrays, not copied."""
    own: dict[str, int | str | bytes] = {
        "ledger-count": ledger[0],
        "ledger-hash": ledger[1],
        "opening": opening,
        "deals": deals,
    }
    facts = ConfigRecord({**packed.config_records["facts"], **own})
    return RecordDict({**packed, "facts": facts})


def task_digest(packed: RecordDict) -> bytes:
    """SHA-256 of a packed task, but for what is each site's own: the model in a signed context.

    Raises:
        WireError: It is no packed task.
    """
    facts, state = _facts(packed, _TASK_ARRAYS), hashlib.sha256(b"fedveil task 1")
    shared = sorted(facts.keys() - {*_LEDGER, "opening", "deals"})
    parts: list[bytes] = []
    for name in shared:
        value = facts[name]
        kind = type(value).__name__
        plain = value if isinstance(value, bytes) else str(value).encode()
        parts += [name.encode(), kind.encode(), plain]
    for part in _TASK_ARRAYS:
        record = packed[part]
        held = [array.data for array in record.values()] if isinstance(record, ArrayRecord) else []
        parts += [part.encode(), *held]
    for piece in parts:
        state.update(len(piece).to_bytes(8, "big"))
        state.update(piece)
    return state.digest()


def run_statement(run_id: str, config: str, schema: str, aggregator: bytes) -> bytes:
    """What a coordinator signs of a run, 32 bytes: what it is, and whom replies are sealed for."""
    state = hashlib.sha256(b"fedveil run 1")
    for piece in (run_id.encode(), config.encode(), schema.encode(), aggregator):
        state.update(len(piece).to_bytes(8, "big"))
        state.update(piece)
    return state.digest()


def to_bytes(update: Update) -> bytes:
    """An update as bytes, to be sealed."""
    facts = canonical_facts(update)
    pieces = [facts, *(_tensors(getattr(update, part)) for part in _UPDATE_ARRAYS)]
    return b"".join(len(piece).to_bytes(8, "big") + piece for piece in pieces)


def canonical_facts(update: Update) -> bytes:
    """Who an update is of and from which ledger, as JSON."""
    facts = [update.run_id, update.round, update.evaluation, update.statistics, *update.ledger]
    return json.dumps(facts).encode()


def from_bytes(data: bytes) -> Update:
    """Reads what `to_bytes` made.

    Raises:
        WireError: It is none.
    """
    pieces, rest = [], memoryview(data)
    for _ in range(1 + len(_UPDATE_ARRAYS)):
        length = int.from_bytes(rest[:8], "big")
        if len(rest) < 8 + length:
            raise WireError("sealed reply: is cut off")
        pieces.append(bytes(rest[8 : 8 + length]))
        rest = rest[8 + length :]
    if rest:
        raise WireError("sealed reply: has more than an update")
    try:
        run_id, *numbers, count, head = json.loads(pieces[0])
        named = dict(zip(_NUMBERS, (run_id, *numbers), strict=True))
        about = ConfigRecord({**named, "ledger-count": count, "ledger-hash": head})
    except (ValueError, TypeError, RecursionError):
        raise WireError("sealed reply: expected an update") from None
    arrays, sums = (
        _decoded(piece, part) if piece else {}
        for piece, part in zip(pieces[1:], _UPDATE_ARRAYS, strict=True)
    )
    return Update(
        _field(about, "run-id", str),
        _field(about, "round", int),
        _field(about, "evaluation", int),
        arrays,
        sums,
        _head(about),
        statistics=_field(about, "statistics", int),
    )


def read_task(content: RecordDict) -> Task:
    """Reads a request.

    Raises:
        WireError: It is none.
    """
    facts = _facts(content, _TASK_ARRAYS)
    _only(facts, {*_NUMBERS, *_LEDGER, *_TASK_FACTS})
    return Task(
        _field(facts, "run-id", str),
        _field(facts, "round", int),
        _field(facts, "evaluation", int),
        _field(facts, "config", str),
        _field(facts, "schema", str),
        _arrays(content, "arrays"),
        _arrays(content, "released"),
        _arrays(content, "exam"),
        _head(facts),
        _field(facts, "clipping_norm", float),
        _field(facts, "aggregator", bytes),
        _field(facts, "coordinator", bytes),
        _field(facts, "signature", bytes),
        _field(facts, "opening", bytes),
        _field(facts, "deals", bytes),
        task_digest(content),
        _field(facts, "statistics", int),
    )


def read_step(content: RecordDict) -> Step:
    """Reads a message of the secure sum's protocol.

    Raises:
        WireError: It is none.
    """
    facts = _facts(content, ("step",))
    _only(facts, {"run-id"})
    return Step(_field(facts, "run-id", str), _read_raw(content, "step"))


def read_answer(message: Message) -> Step | Refused:
    """Reads a site's answer to one.

    Raises:
        WireError: It is an error or no answer of ours.
    """
    if message.has_error():
        raise WireError(f"Flower error {message.error.code}")
    if "step" in message.content:
        return read_step(message.content)
    found = read_reply(message)
    if isinstance(found, Update):
        raise WireError("message: expected a step of the secure sum")
    return found


def read_reply(message: Message) -> Update | Refused:
    """Reads a site's reply.

    Raises:
        WireError: It is an error or no reply of ours.
    """
    if message.has_error():
        raise WireError(f"Flower error {message.error.code}")
    content = message.content
    refused = "facts" in content and "refused" in content["facts"]
    facts = _facts(content, () if refused else (*_UPDATE_ARRAYS, "upload"))
    about = _field(facts, "run-id", str), _field(facts, "round", int)
    evaluation, statistics = _field(facts, "evaluation", int), _field(facts, "statistics", int)
    if refused:
        _only(facts, {*_NUMBERS, "refused"})
        code = _field(facts, "refused", str)
        if code not in Refusal.__members__:
            raise WireError("refusal: unknown code")
        return Refused(*about, evaluation, Refusal[code], statistics)
    _only(facts, {*_NUMBERS, *_LEDGER})
    arrays, sums = (_arrays(content, part) for part in _UPDATE_ARRAYS)
    upload = _read_raw(content, "upload")
    return Update(*about, evaluation, arrays, sums, _head(facts), upload, statistics)


_FORMAT = "safetensors"
_MOST_HEADER = 2**20  # bytes; some ten thousand arrays
_EXPECTED = "float32 or float64"  # of models; of sums, whose rounding is a sensitivity
_TASK_ARRAYS = ("arrays", "released", "exam")
_UPDATE_ARRAYS = ("arrays", "sums")
_NUMBERS = ("run-id", "round", "evaluation", "statistics")
_LEDGER = ("ledger-count", "ledger-hash")
_TASK_BYTES = ("aggregator", "coordinator", "signature", "opening", "deals")
_TASK_FACTS = ("config", "schema", "clipping_norm", *_TASK_BYTES)
_BYTES = "bytes"
FieldT = TypeVar("FieldT", str, int, float, bytes)


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
    data = _tensors(arrays)
    return ArrayRecord({_FORMAT: Array("uint8", (len(data),), _FORMAT, data)})


def _raw(data: bytes) -> ArrayRecord:
    """Bytes as an array, which Flower carries in pieces, however many they are."""
    if not data:
        return ArrayRecord()
    return ArrayRecord({_BYTES: Array("uint8", (len(data),), _BYTES, data)})


def _read_raw(content: RecordDict, part: str) -> bytes:
    record = content[part]
    if not isinstance(record, ArrayRecord):
        raise WireError(f"{part}: expected bytes")
    if not record:
        return b""
    whole = record.get(_BYTES)
    if len(record) != 1 or whole is None or (whole.dtype, whole.stype) != ("uint8", _BYTES):
        raise WireError(f"{part}: expected bytes")
    if type(whole.data) is not bytes or tuple(whole.shape) != (len(whole.data),):
        raise WireError(f"{part}: expected as many bytes as the shape asks for")
    return whole.data


def _tensors(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Arrays as safetensors; no bytes for none."""
    if not arrays:
        return b""
    plain = {}
    for name, array in arrays.items():
        if not _may_travel(array.dtype):
            raise WireError(f"arrays: expected {_EXPECTED}, got {array.dtype.name}")
        plain[name] = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
    return save(plain)


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
    return _decoded(whole.data, part)


def _decoded(data: bytes, part: str) -> dict[str, np.ndarray]:
    # A header says what arrays there are; a large one would become many times its size in objects.
    if int.from_bytes(data[:8], "little") > _MOST_HEADER:
        raise WireError(f"{part}: expected one {_FORMAT} of {_EXPECTED}")
    try:
        arrays = dict(sorted(load(data).items()))  # which come in an order of chance
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
