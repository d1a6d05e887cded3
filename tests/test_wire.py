"""Messages survive the wire exactly, and what is not exactly a message is refused."""

import io
import json
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save

from fedveil.config import FedveilError
from fedveil.flower import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    RecordDict,
    set_identity,
)
from fedveil.wire import (
    NO_LEDGER,
    TRAIN,
    Refusal,
    Refused,
    Step,
    Task,
    Update,
    WireError,
    from_bytes,
    pack,
    pack_for,
    read_answer,
    read_reply,
    read_step,
    read_task,
    run_statement,
    task_digest,
    to_bytes,
)

PLANTED = "PATIENT-4711"
WEIGHTS = np.array([[1.5, -2.0]], dtype=np.float32)
HEAD = (7, "0123456789abcdef" * 4)
SUMS = np.array([0.1, 3.0])
TASK = Task(
    run_id="run",
    round=3,
    evaluation=2,
    config="{}",
    schema="{}",
    arrays={"w": WEIGHTS},
    released={"w": 2 * WEIGHTS},
    exam={"e": SUMS},
    ledger=HEAD,
)
UPDATE = Update("run", 3, 2, {"w": WEIGHTS}, {"s": SUMS}, HEAD)
DASHED = {"run_id", "ledger_count", "ledger_hash"}
RECORDS = r"^message: expected the records facts, arrays, sums, upload$"
# What is the same for every site of a round, and what is one site's own.
SHARED: dict[str, Any] = {
    "clipping_norm": 0.75,
    "aggregator": b"a" * 32,
    "coordinator": b"c" * 32,
    "signature": b"s" * 64,
}
OWN: dict[str, Any] = {"opening": b"opening", "deals": b"deals \0"}

identifiers = st.text(max_size=20)
rounds = st.integers(-(2**62), 2**62)
heads = st.just(NO_LEDGER) | st.tuples(
    st.integers(1, 2**62), st.text("0123456789abcdef", min_size=64, max_size=64)
)
arrays: st.SearchStrategy[dict[str, np.ndarray]] = st.dictionaries(
    st.text(min_size=1, max_size=10),
    hnp.arrays(
        st.sampled_from([np.float32, np.float64]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
    ),
    max_size=3,
)


@pytest.fixture(autouse=True, scope="module")
def _identity() -> None:
    set_identity(1, 7)


def reply(content: RecordDict, node: int = 5) -> Message:
    """What the server gets when a site answers with this content."""
    return Message(content, reply_to=Message(RecordDict(), node, TRAIN))


def facts(**values: object) -> ConfigRecord:
    """Facts by name, where an underscore stands for the dash, if there is one."""
    return ConfigRecord({dashed(key): value for key, value in values.items()})  # type: ignore[misc]


def dashed(name: str) -> str:
    """A fact's name as it travels."""
    return name.replace("_", "-") if name in DASHED else name


def npy(array: np.ndarray) -> bytes:
    """An array as numpy stores it."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz(**named: np.ndarray) -> bytes:
    """A zip archive of arrays."""
    buffer = io.BytesIO()
    np.savez(buffer, **named)  # type: ignore[arg-type]
    return buffer.getvalue()


TASK_PARTS = ("arrays", "released", "exam")
UPDATE_PARTS = ("arrays", "sums")
MessageT = TypeVar("MessageT", Task, Update)


def with_part(message: MessageT, part: str, named: dict[str, np.ndarray]) -> MessageT:
    """A message with other arrays in one of its parts."""
    change: dict[str, Any] = {part: named}
    return replace(message, **change)


def assert_same(got: object, expected: object) -> None:
    """The same keys, in whatever order, and bitwise the same arrays."""
    assert isinstance(got, dict)
    assert isinstance(expected, dict)
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == array.dtype, name
        assert got[name].shape == array.shape, name
        assert got[name].tobytes() == array.tobytes(), name


class TestRoundTrip:
    @given(identifiers, rounds, rounds, identifiers, identifiers, arrays, arrays, arrays, heads)
    def test_task(
        self,
        run_id: str,
        number: int,
        evaluation: int,
        config: str,
        schema: str,
        model: dict[str, np.ndarray],
        released: dict[str, np.ndarray],
        exam: dict[str, np.ndarray],
        head: tuple[int, str],
    ) -> None:
        task = Task(run_id, number, evaluation, config, schema, model, released, exam, head)
        got = read_task(pack(task))
        assert (got.run_id, got.round, got.evaluation) == (run_id, number, evaluation)
        assert (got.config, got.schema, got.ledger) == (config, schema, head)
        assert_same(got.arrays, model)
        assert_same(got.released, released)
        assert_same(got.exam, exam)

    @given(identifiers, rounds, rounds, arrays, arrays, heads)
    def test_update(
        self,
        run_id: str,
        number: int,
        evaluation: int,
        named: dict[str, np.ndarray],
        sums: dict[str, np.ndarray],
        head: tuple[int, str],
    ) -> None:
        got = read_reply(reply(pack(Update(run_id, number, evaluation, named, sums, head))))
        assert isinstance(got, Update)
        assert (got.run_id, got.round, got.evaluation) == (run_id, number, evaluation)
        assert got.ledger == head
        assert_same(got.arrays, named)
        assert_same(got.sums, sums)

    @given(identifiers, rounds, rounds, st.sampled_from(Refusal))
    def test_refusal(self, run_id: str, number: int, evaluation: int, code: Refusal) -> None:
        refused = Refused(run_id, number, evaluation, code)
        assert read_reply(reply(pack(refused))) == refused

    @pytest.mark.parametrize("kind", [np.float32, np.float64])
    @pytest.mark.parametrize("part", TASK_PARTS)
    def test_a_single_number_keeps_its_shape(self, part: str, kind: type[np.floating]) -> None:
        sent: dict[str, np.ndarray] = {"w": np.array(2.5, dtype=kind)}
        got = read_task(pack(with_part(TASK, part, sent)))
        assert_same(getattr(got, part), sent)

    @pytest.mark.parametrize("kind", [np.float32, np.float64])
    @pytest.mark.parametrize("part", TASK_PARTS)
    def test_arrays_that_are_views(self, part: str, kind: type[np.floating]) -> None:
        columns = np.arange(6, dtype=kind).reshape(2, 3).T[::2]
        got = getattr(read_task(pack(with_part(TASK, part, {"w": columns}))), part)
        assert got["w"].dtype == kind
        assert np.array_equal(got["w"], columns)

    @pytest.mark.parametrize("part", UPDATE_PARTS)
    def test_a_sum_keeps_all_its_bits(self, part: str) -> None:
        """The rounding of a sum to float32 would be a sensitivity that nobody accounted for."""
        precise = {"w": np.array([1 + 2.0**-52, 1e300, 2.0**-1074, 0.1])}
        got = read_reply(reply(pack(with_part(UPDATE, part, precise))))
        assert_same(getattr(got, part), precise)

    def test_both_types_in_one_message(self) -> None:
        both: dict[str, np.ndarray] = {"w": WEIGHTS, "v": WEIGHTS.astype(np.float64)}
        assert_same(read_task(pack(replace(TASK, arrays=both))).arrays, both)

    def test_a_task_without_a_part_of_it_has_no_arrays_there(self) -> None:
        got = read_task(pack(replace(TASK, released={}, exam={}, evaluation=0)))
        assert (got.released, got.exam) == ({}, {})
        assert_same(got.arrays, TASK.arrays)

    @pytest.mark.parametrize(
        ("kind", "name", "raw"),
        [
            (">f4", "F32", "<f4"),
            ("<f4", "F32", "<f4"),
            (">f8", "F64", "<f8"),
            ("<f8", "F64", "<f8"),
        ],
    )
    def test_the_bytes_on_the_wire(self, kind: str, name: str, raw: str) -> None:
        """Little-endian bytes behind their description, whatever order the array was in."""
        numbers = np.array([[1.5, -2.0, 0.1]]).astype(kind)
        content = pack(replace(UPDATE, arrays={"w": numbers}))
        sent = content.array_records["arrays"]["safetensors"]
        size = int.from_bytes(sent.data[:8], "little")
        assert (sent.dtype, tuple(sent.shape), sent.stype) == (
            "uint8", (len(sent.data),), "safetensors",
        )  # fmt: skip
        assert json.loads(sent.data[8 : 8 + size]) == {
            "w": {"dtype": name, "shape": [1, 3], "data_offsets": [0, numbers.nbytes]}
        }
        assert sent.data[8 + size :] == numbers.astype(raw).tobytes()
        got = read_reply(reply(content))
        assert isinstance(got, Update)
        assert got.arrays["w"].dtype == np.dtype(raw)
        assert np.array_equal(got.arrays["w"], numbers)

    def test_equal_arrays_are_equal_bytes(self) -> None:
        """Whatever order they were put together in: Flower stores equal content once."""
        turned = replace(UPDATE, arrays={"v": WEIGHTS, "w": SUMS})
        again = replace(UPDATE, arrays={"w": SUMS, "v": WEIGHTS})
        sent = [pack(u).array_records["arrays"]["safetensors"].data for u in (turned, again)]
        assert sent[0] == sent[1]

    def test_a_task_for_another_site_differs_by_its_ledger_only(self) -> None:
        packed, other = pack(TASK), (8, "f" * 64)
        got = read_task(pack_for(packed, other))
        assert got.ledger == other
        assert read_task(packed).ledger == HEAD
        assert got.digest == task_digest(packed)
        assert replace(got, ledger=HEAD, arrays={}, released={}, exam={}) == replace(
            TASK, arrays={}, released={}, exam={}, digest=got.digest
        )
        for part in TASK_PARTS:
            assert_same(getattr(got, part), getattr(TASK, part))

    def test_all_that_a_secure_round_adds(self) -> None:
        got = read_task(pack(replace(TASK, **SHARED, **OWN)))
        for name, value in (SHARED | OWN).items():
            assert getattr(got, name) == value, name

    @pytest.mark.parametrize("upload", [b"", b"\0", b"masked" * 1000])
    def test_an_upload_instead_of_arrays(self, upload: bytes) -> None:
        got = read_reply(reply(pack(replace(UPDATE, arrays={}, sums={}, upload=upload))))
        assert got == replace(UPDATE, arrays={}, sums={}, upload=upload)

    @pytest.mark.parametrize("body", [b"", b"\0" * 9, b"words"])
    def test_a_step_either_way(self, body: bytes) -> None:
        assert read_step(pack(Step("run", body))) == Step("run", body)
        assert read_answer(reply(pack(Step("run", body)))) == Step("run", body)

    def test_a_refusal_of_a_step(self) -> None:
        refused = Refused("run", 0, 0, Refusal.PROTOCOL)
        assert read_answer(reply(pack(refused))) == refused

    def test_a_refusal_travels_as_a_name_only(self) -> None:
        content = pack(Refused("run", 1, 2, Refusal.BUDGET))
        assert list(content) == ["facts"]
        assert dict(content["facts"]) == {
            "run-id": "run", "round": 1, "evaluation": 2, "statistics": 0, "refused": "BUDGET",
        }  # fmt: skip

    def test_what_travels_is_these_records_and_no_other(self) -> None:
        assert set(pack(TASK)) == {"facts", "arrays", "released", "exam"}
        assert set(pack(UPDATE)) == {"facts", "arrays", "sums", "upload"}
        numbers = {"run-id", "round", "evaluation", "statistics", "ledger-count", "ledger-hash"}
        own = {"clipping_norm", "aggregator", "coordinator", "signature", "opening", "deals"}
        assert set(pack(TASK)["facts"]) == numbers | own | {"config", "schema"}
        assert set(pack(UPDATE)["facts"]) == numbers


LEDGER_FACTS: dict[str, object] = {"ledger_count": HEAD[0], "ledger_hash": HEAD[1]}
NUMBERS: dict[str, object] = {"run_id": "run", "round": 3, "evaluation": 2, "statistics": 0}
TASK_FACTS: dict[str, object] = {
    **NUMBERS, **LEDGER_FACTS, **SHARED, **OWN, "config": "{}", "schema": "{}",
}  # fmt: skip
REPLY_FACTS: dict[str, object] = {**NUMBERS, **LEDGER_FACTS}
ARRAYS = pack(UPDATE)["arrays"]


def with_facts(message: Task | Update, record: ConfigRecord) -> RecordDict:
    """A message that states these facts instead of its own."""
    content = pack(message)
    content["facts"] = record
    return content


def without(values: dict[str, object], name: str) -> dict[str, object]:
    """All values but one."""
    return {key: value for key, value in values.items() if key != name}


class TestDigest:
    """What every site's signature is over: equal for all of a round, and of everything in it."""

    def test_is_the_same_for_every_site(self) -> None:
        packed = pack(replace(TASK, **SHARED))
        mine, other = (
            read_task(pack_for(packed, (number, "f" * 64), bytes([number]), b"deals"))
            for number in (1, 2)
        )
        assert mine.digest == other.digest == task_digest(packed)
        assert (mine.opening, other.opening) == (b"\1", b"\2")
        assert (mine.deals, mine.ledger) == (b"deals", (1, "f" * 64))
        assert len(mine.digest) == 32

    @pytest.mark.parametrize(
        "change",
        [
            {"run_id": "other"},
            {"round": 4},
            {"evaluation": 1},
            {"config": "{ }"},
            {"schema": "{ }"},
            {"arrays": {"w": -WEIGHTS}},
            {"arrays": {}},
            {"released": {"w": WEIGHTS}},
            {"exam": {}},
            {"arrays": TASK.released, "released": TASK.arrays},
            {"clipping_norm": 0.7500000000000001},
            {"aggregator": b"b" * 32},
            {"coordinator": b"d" * 32},
            {"signature": b"t" * 64},
            {"aggregator": SHARED["coordinator"], "coordinator": SHARED["aggregator"]},
        ],
        ids=" and ".join,
    )
    def test_is_of_all_that_is_asked(self, change: dict[str, Any]) -> None:
        asked = replace(TASK, **SHARED)
        assert task_digest(pack(asked)) != task_digest(pack(replace(asked, **change)))

    def test_of_no_task_there_is_none(self) -> None:
        for message in (UPDATE, Refused("run", 1, 0, Refusal.FAILED), Step("run", b"")):
            with pytest.raises(WireError):
                task_digest(pack(message))


class TestStatement:
    def test_is_of_each_of_its_parts_and_of_where_they_end(self) -> None:
        texts = [
            ("run", "config", "schema", b"key"),
            ("run2", "config", "schema", b"key"),
            ("run", "2config", "schema", b"key"),
            ("run", "config2", "schema", b"key"),
            ("run", "config", "2schema", b"key"),
            ("run", "config", "schema", b"kez"),
            ("run", "config", "schemak", b"ey"),
        ]
        found = [run_statement(*text) for text in texts]
        assert len(set(found)) == len(texts)
        assert {len(statement) for statement in found} == {32}


class TestAsBytes:
    """What is sealed: the same update, to the bit."""

    @given(identifiers, rounds, rounds, arrays, arrays, heads)
    def test_round_trip(
        self,
        run_id: str,
        number: int,
        evaluation: int,
        named: dict[str, np.ndarray],
        sums: dict[str, np.ndarray],
        head: tuple[int, str],
    ) -> None:
        sent = Update(run_id, number, evaluation, named, sums, head)
        got = from_bytes(to_bytes(sent))
        assert replace(got, arrays={}, sums={}) == replace(sent, arrays={}, sums={})
        assert_same(got.arrays, named)
        assert_same(got.sums, sums)

    @pytest.mark.parametrize("size", range(0, len(to_bytes(UPDATE)), 7))
    def test_what_is_cut_off_is_refused(self, size: int) -> None:
        with pytest.raises(WireError):
            from_bytes(to_bytes(UPDATE)[:size])

    def test_so_is_what_has_more(self) -> None:
        with pytest.raises(WireError, match=r"^sealed reply: has more than an update$"):
            from_bytes(to_bytes(UPDATE) + b"\0")

    @pytest.mark.parametrize(
        "about",
        [
            b"",
            b"{}",
            b"null",
            b"[1]",
            b"\xff",
            b'["run", 3, 2, 7]',
            b'["run", 3, 2, 7, "' + PLANTED.encode() + b'"]',
            b'["run", "3", 2, 0, ""]',
            b'["run", 3, null, 0, ""]',
            b'["run", 3, {"a": 1}, 0, ""]',
            b"[" * 100_000,
            b"1" * 10_000,
        ],
        ids=lambda about: about[:20].decode(errors="replace"),
    )
    def test_so_are_facts_that_are_none(self, about: bytes) -> None:
        empty = bytes(8)
        with pytest.raises(WireError) as caught:
            from_bytes(len(about).to_bytes(8, "big") + about + 2 * empty)
        assert PLANTED not in str(caught.value)

    @given(st.binary(max_size=200))
    def test_any_bytes_give_an_update_or_our_error(self, data: bytes) -> None:
        with suppress(WireError):
            from_bytes(data)


class TestMalformedStep:
    @pytest.mark.parametrize(
        "message",
        [TASK, UPDATE, Refused("run", 1, 0, Refusal.FAILED)],
        ids=["task", "update", "no"],
    )
    def test_another_message_is_none(self, message: Task | Update | Refused) -> None:
        with pytest.raises(WireError, match=r"^message: expected the records facts, step$"):
            read_step(pack(message))

    def test_an_update_is_no_answer_to_one(self) -> None:
        with pytest.raises(WireError, match="expected a step"):
            read_answer(reply(pack(UPDATE)))

    def test_nor_is_an_error(self) -> None:
        message = Message(Error(5, PLANTED), reply_to=Message(RecordDict(), 5, TRAIN))
        with pytest.raises(WireError, match=r"^Flower error 5$"):
            read_answer(message)

    def test_a_foreign_fact(self) -> None:
        content = pack(Step("run", b"body"))
        content["facts"] = facts(run_id="run", loss=0.5)
        with pytest.raises(WireError, match="keys"):
            read_step(content)

    @pytest.mark.parametrize(
        "record",
        [
            facts(w=1),
            ArrayRecord({"bytes": Array("uint8", (3,), "bytes", b"four")}),
            ArrayRecord({"bytes": Array("float32", (4,), "bytes", b"four")}),
            ArrayRecord({"bytes": Array("uint8", (4,), "safetensors", b"four")}),
            ArrayRecord({PLANTED: Array("uint8", (4,), "bytes", b"four")}),
            ArrayRecord({n: Array("uint8", (4,), "bytes", b"four") for n in ("bytes", PLANTED)}),
        ],
        ids=["facts", "another size", "another type", "another encoding", "another name", "two"],
    )
    @pytest.mark.parametrize("part", ["step", "upload"])
    def test_bytes_that_are_none(self, part: str, record: ConfigRecord | ArrayRecord) -> None:
        content = pack(Step("run", b"four") if part == "step" else UPDATE)
        content[part] = record
        with pytest.raises(WireError, match=f"^{part}: expected ") as caught:
            read_step(content) if part == "step" else read_reply(reply(content))
        assert PLANTED not in str(caught.value)


class TestMalformedTask:
    @pytest.mark.parametrize("name", sorted(TASK_FACTS))
    def test_missing_fact(self, name: str) -> None:
        content = with_facts(TASK, facts(**without(TASK_FACTS, name)))
        with pytest.raises(WireError, match=f"^{dashed(name)}: expected"):
            read_task(content)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("run_id", 3),
            ("run_id", b"run"),
            ("round", "3"),
            ("round", 3.0),
            ("round", True),
            ("round", [3]),
            ("evaluation", "2"),
            ("evaluation", 2.0),
            ("evaluation", True),
            ("config", 1),
            ("config", ["{}"]),
            ("schema", b"{}"),
            ("schema", False),
            ("ledger_count", "7"),
            ("ledger_count", 7.0),
            ("ledger_count", True),
            ("ledger_hash", 7),
            ("ledger_hash", HEAD[1].encode()),
            ("ledger_hash", [HEAD[1]]),
            ("clipping_norm", 1),
            ("clipping_norm", "1.0"),
            ("aggregator", "key"),
            ("coordinator", [1]),
            ("signature", 1.0),
            ("opening", "opening"),
            ("deals", True),
        ],
    )
    def test_wrong_type(self, name: str, value: object) -> None:
        content = with_facts(TASK, facts(**{**TASK_FACTS, name: value}))
        with pytest.raises(WireError, match=f"^{dashed(name)}: expected"):
            read_task(content)

    @pytest.mark.parametrize("key", ["more", "refused", "epsilon", "noise-multiplier"])
    def test_foreign_fact(self, key: str) -> None:
        record = facts(**TASK_FACTS)
        record[key] = "BUDGET"
        with pytest.raises(WireError, match="keys"):
            read_task(with_facts(TASK, record))

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda c: c.pop("facts"),
            lambda c: c.pop("arrays"),
            lambda c: c.pop("released"),
            lambda c: c.pop("exam"),
            lambda c: c.update(facts=ARRAYS),
            lambda c: c.update(arrays=facts(w=1)),
            lambda c: c.update(released=facts(w=1)),
            lambda c: c.update(exam=facts(w=1)),
            lambda c: c.update(more=facts(w=1)),
            lambda c: c.update(sums=ARRAYS),
            lambda c: c.clear(),
        ],
        ids=[
            "no facts", "no arrays", "no released", "no exam", "facts are arrays",
            "arrays are facts", "released is facts", "exam is facts", "foreign", "sums", "empty",
        ],
    )  # fmt: skip
    def test_wrong_records(self, spoil: Callable[[RecordDict], object]) -> None:
        content = pack(TASK)
        spoil(content)
        with pytest.raises(WireError):
            read_task(content)

    def test_a_reply_is_no_task(self) -> None:
        with pytest.raises(WireError):
            read_task(pack(UPDATE))
        with pytest.raises(WireError):
            read_task(pack(Refused("run", 1, 0, Refusal.FAILED)))


class TestMalformedReply:
    @pytest.mark.parametrize("name", sorted(REPLY_FACTS))
    def test_missing_fact(self, name: str) -> None:
        content = with_facts(UPDATE, facts(**without(REPLY_FACTS, name)))
        with pytest.raises(WireError, match=f"^{dashed(name)}: expected"):
            read_reply(reply(content))

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("run_id", 3),
            ("round", "3"),
            ("round", 2.5),
            ("round", True),
            ("evaluation", "2"),
            ("evaluation", False),
            ("ledger_count", 7.0),
            ("ledger_count", True),
            ("ledger_hash", 7),
            ("ledger_hash", HEAD[1].encode()),
        ],
    )
    def test_wrong_type(self, name: str, value: object) -> None:
        content = with_facts(UPDATE, facts(**{**REPLY_FACTS, name: value}))
        with pytest.raises(WireError, match=f"^{dashed(name)}: expected"):
            read_reply(reply(content))

    @pytest.mark.parametrize("value", [1, b"BUDGET", True, ["BUDGET"]])
    def test_a_refusal_of_wrong_type(self, value: object) -> None:
        with pytest.raises(WireError, match=r"^refused: expected str"):
            read_reply(reply(RecordDict({"facts": facts(**NUMBERS, refused=value)})))

    @pytest.mark.parametrize("key", ["config", "schema", "loss", "num-examples", PLANTED])
    def test_foreign_fact(self, key: str) -> None:
        record = facts(**REPLY_FACTS)
        record[key] = "1"
        with pytest.raises(WireError, match="keys") as caught:
            read_reply(reply(with_facts(UPDATE, record)))
        assert PLANTED not in str(caught.value)

    @pytest.mark.parametrize("part", UPDATE_PARTS)
    def test_update_without_arrays_or_sums(self, part: str) -> None:
        content = pack(UPDATE)
        del content[part]
        with pytest.raises(WireError, match=RECORDS):
            read_reply(reply(content))

    @pytest.mark.parametrize("part", UPDATE_PARTS)
    def test_facts_for_arrays_or_sums(self, part: str) -> None:
        content = pack(UPDATE)
        content[part] = facts(w=1)
        with pytest.raises(WireError, match=f"^{part}: expected arrays$"):
            read_reply(reply(content))

    def test_a_task_is_no_reply(self) -> None:
        with pytest.raises(WireError, match=r"^message: expected the records"):
            read_reply(reply(pack(TASK)))

    @pytest.mark.parametrize("code", ["", "budget", "OTHER", PLANTED])
    def test_unknown_refusal(self, code: str) -> None:
        content = RecordDict({"facts": facts(**NUMBERS, refused=code)})
        with pytest.raises(WireError, match="unknown code"):
            read_reply(reply(content))

    @pytest.mark.parametrize("part", [*UPDATE_PARTS, "metrics"])
    def test_a_refusal_with_arrays_is_no_message_of_ours(self, part: str) -> None:
        content = pack(Refused("run", 3, 2, Refusal.BUDGET))
        content[part] = ARRAYS
        with pytest.raises(WireError, match=r"^message: expected the records facts$"):
            read_reply(reply(content))

    @pytest.mark.parametrize("name", sorted(NUMBERS))
    def test_a_refusal_without_a_number(self, name: str) -> None:
        content = RecordDict({"facts": facts(**without(NUMBERS, name), refused="BUDGET")})
        with pytest.raises(WireError, match=f"^{dashed(name)}: expected"):
            read_reply(reply(content))

    @pytest.mark.parametrize("more", [{"why": "records"}, LEDGER_FACTS])
    def test_a_refusal_with_another_fact(self, more: dict[str, object]) -> None:
        content = RecordDict({"facts": facts(**NUMBERS, refused="BUDGET", **more)})
        with pytest.raises(WireError, match="keys"):
            read_reply(reply(content))

    def test_foreign_record(self) -> None:
        content = pack(UPDATE)
        content["metrics"] = facts(loss=0.5)
        with pytest.raises(WireError):
            read_reply(reply(content))

    def test_flower_error(self) -> None:
        message = Message(Error(5, "gone"), reply_to=Message(RecordDict(), 5, TRAIN))
        with pytest.raises(WireError, match=r"^Flower error 5$"):
            read_reply(message)


BAD_HEADS: dict[str, tuple[int, str]] = {
    "no hash": (7, ""),
    "no count": (0, HEAD[1]),
    "a count below zero": (-1, HEAD[1]),
    "capitals": (7, HEAD[1].upper()),
    "too short": (7, HEAD[1][:-1]),
    "too long": (7, HEAD[1] + "0"),
    "a line more": (7, HEAD[1] + "\n"),
    "a line before": (7, "\n" + HEAD[1]),
    "no hexadecimal": (7, "g" * 64),
    "other digits": (7, "\u0661" * 64),
    "a planted text": (7, PLANTED),
    "a planted text of the right length": (7, PLANTED.ljust(64, "0")),
}


class TestLedger:
    """What a site says of its ledger is kept and printed: a count and a SHA-256, no other text."""

    @pytest.mark.parametrize("kind", BAD_HEADS)
    def test_what_is_no_head_is_refused_by_the_server(self, kind: str) -> None:
        content = pack(replace(UPDATE, ledger=BAD_HEADS[kind]))
        with pytest.raises(WireError, match=r"^ledger: expected a count and a SHA-256$"):
            read_reply(reply(content))

    @pytest.mark.parametrize("kind", BAD_HEADS)
    def test_and_by_a_site(self, kind: str) -> None:
        with pytest.raises(WireError, match=r"^ledger: expected a count and a SHA-256$"):
            read_task(pack(replace(TASK, ledger=BAD_HEADS[kind])))

    def test_no_known_ledger_is_a_head(self) -> None:
        assert read_task(pack(replace(TASK, ledger=NO_LEDGER))).ledger == NO_LEDGER


def header(text: str, body: bytes = b"") -> bytes:
    """A safetensors with any header at all."""
    return len(text.encode()).to_bytes(8, "little") + text.encode() + body


def one(kind: str, shape: str, offsets: str, body: bytes, name: str = "w") -> bytes:
    """A safetensors of one array, as it describes itself."""
    described = f'"dtype":"{kind}","shape":{shape},"data_offsets":{offsets}'
    return header(f'{{"{name}":{{{described}}}}}', body)


def blob(data: bytes, kind: str = "uint8", shape: tuple[int, ...] | None = None) -> Array:
    """The one array of a part."""
    return Array(kind, (len(data),) if shape is None else shape, "safetensors", data)


RAW = WEIGHTS.astype("<f4").tobytes()
GOOD = save({"w": WEIGHTS})
TWICE = '"w":{"dtype":"F32","shape":[2],"data_offsets":[%d,%d]}'
LONG = "[0,9223372036854775807]"
NONE = r": expected one safetensors of float32 or float64$"
BYTES = r": expected as many bytes as the shape asks for$"
BAD_ARRAYS = {
    "nothing": (blob(b""), NONE),
    "a header that is cut off": (blob(GOOD[:20]), NONE),
    "half the data": (blob(GOOD[:-4]), NONE),
    "more than the data": (blob(GOOD + b"x"), NONE),
    "a huge header": (blob((2**62).to_bytes(8, "little") + GOOD[8:]), NONE),
    "a header beyond all use": (blob(header("{" + " " * 2**20 + "}")), NONE),
    "no JSON": (blob(header("{", RAW)), NONE),
    "a list": (blob(header("[]")), NONE),
    "float32 called float64": (blob(one("F64", "[1,2]", "[0,8]", RAW)), NONE),
    "a huge shape": (blob(one("F32", f"[{10**15},{10**15}]", "[0,8]", RAW)), NONE),
    "a shape of another size": (blob(one("F32", "[3]", "[0,8]", RAW)), NONE),
    "a negative shape": (blob(one("F32", "[-1,-2]", "[0,8]", RAW)), NONE),
    "a truth for a size": (blob(one("F32", "[true,2]", "[0,8]", RAW)), NONE),
    "offsets beyond the data": (blob(one("F32", "[1,2]", "[8,16]", RAW)), NONE),
    "offsets beyond all bounds": (blob(one("F32", "[1,2]", LONG, RAW)), NONE),
    "one name twice": (blob(header(f"{{{TWICE % (0, 8)},{TWICE % (8, 16)}}}", 2 * RAW)), NONE),
    "integers": (blob(save({"w": np.zeros(2, dtype=np.int32)})), NONE),
    "half precision": (blob(save({"w": np.zeros(2, dtype=np.float16)})), NONE),
    "brain floats": (blob(one("BF16", "[4]", "[0,8]", RAW)), NONE),
    "eighths": (blob(one("F8_E4M3", "[8]", "[0,8]", RAW)), NONE),
    "truths": (blob(save({"w": np.zeros(2, dtype=bool)})), NONE),
    "complex numbers": (blob(one("C64", "[1]", "[0,8]", RAW)), NONE),
    "an unknown type": (blob(one(PLANTED, "[1,2]", "[0,8]", RAW)), NONE),
    "numpy's own format": (Array(WEIGHTS), NONE),
    "an archive": (blob(npz(w=WEIGHTS)), NONE),
    "a numpy file": (blob(npy(WEIGHTS)), NONE),
    "a pickle": (blob(pickle.dumps([1, 2])), NONE),
    "another type of bytes": (blob(GOOD, kind="float32"), NONE),
    "another number of bytes": (blob(GOOD, shape=(len(GOOD) - 1,)), BYTES),
    "two dimensions": (blob(GOOD, shape=(1, len(GOOD))), BYTES),
    "a truth for the shape": (blob(GOOD, shape=(True,)), BYTES),
    "the encoding of before": (Array("float32", (1, 2), "little-endian", RAW), NONE),
    "no encoding": (Array("uint8", (len(GOOD),), "", GOOD), NONE),
    "a planted type": (Array(PLANTED, (len(GOOD),), "safetensors", GOOD), NONE),
    "a planted encoding": (Array("uint8", (len(GOOD),), PLANTED, GOOD), NONE),
}


def with_array(content: RecordDict, array: Array, part: str = "arrays") -> RecordDict:
    """A message that has this in place of a part's arrays."""
    content[part] = ArrayRecord({"safetensors": array})
    return content


class TestBadArrays:
    @pytest.mark.parametrize("part", UPDATE_PARTS)
    @pytest.mark.parametrize("kind", BAD_ARRAYS)
    def test_the_server_refuses_them(self, kind: str, part: str) -> None:
        array, said = BAD_ARRAYS[kind]
        with pytest.raises(WireError, match=f"^{part}{said}") as caught:
            read_reply(reply(with_array(pack(UPDATE), array, part)))
        assert PLANTED not in str(caught.value)

    @pytest.mark.parametrize("part", TASK_PARTS)
    @pytest.mark.parametrize("kind", BAD_ARRAYS)
    def test_a_site_refuses_them_too(self, kind: str, part: str) -> None:
        array, said = BAD_ARRAYS[kind]
        with pytest.raises(WireError, match=f"^{part}{said}"):
            read_task(with_array(pack(TASK), array, part))

    @pytest.mark.parametrize("part", UPDATE_PARTS)
    def test_one_of_another_name_or_two_are_refused(self, part: str) -> None:
        for record in (
            ArrayRecord({"w": blob(GOOD)}),
            ArrayRecord({"safetensors": blob(GOOD), PLANTED: blob(GOOD)}),
        ):
            content = pack(UPDATE)
            content[part] = record
            with pytest.raises(WireError, match=f"^{part}{NONE}"):
                read_reply(reply(content))

    @given(st.binary(max_size=200))
    def test_any_bytes_give_arrays_or_our_error(self, data: bytes) -> None:
        self.read(data)

    @given(st.data())
    def test_so_do_good_ones_with_some_bytes_changed(self, data: st.DataObject) -> None:
        changed = bytearray(GOOD)
        for _ in range(data.draw(st.integers(1, 4))):
            changed[data.draw(st.integers(0, len(GOOD) - 1))] = data.draw(st.integers(0, 255))
        self.read(bytes(changed))

    @staticmethod
    def read(data: bytes) -> None:
        """Whatever is not our error is arrays of our types, no larger than what came."""
        with suppress(WireError):
            got = read_reply(reply(with_array(pack(UPDATE), blob(data))))
            assert isinstance(got, Update)
            assert {array.dtype.name for array in got.arrays.values()} <= {"float32", "float64"}
            assert sum(array.nbytes for array in got.arrays.values()) <= len(data)

    def test_arrays_come_in_the_order_of_their_names(self) -> None:
        """Noise is drawn in that order; with the same coins it must be the same."""
        many = {f"{n * 37 % 101:03d}": np.full(1, n, dtype=np.float64) for n in range(101)}
        got = read_reply(reply(pack(replace(UPDATE, arrays=many))))
        assert isinstance(got, Update)
        assert list(got.arrays) == sorted(many)

    @pytest.mark.parametrize(
        "kind", [np.int32, np.int64, np.float16, np.longdouble, np.complex64, bool, "V4", object]
    )
    def test_only_float32_and_float64_are_sent(self, kind: str) -> None:
        with pytest.raises(WireError, match=r"^arrays: expected float32 or float64, got "):
            pack(replace(UPDATE, sums={"w": np.zeros(3).astype(kind)}))

    def test_pickled_arrays_are_never_unpickled(self, tmp_path: Path) -> None:
        trace = tmp_path / "unpickled"

        class Bomb:
            def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
                return os.mkdir, (str(trace),)

        bombs = np.empty(1, dtype=object)
        bombs[0] = Bomb()
        for data in (npy(bombs), pickle.dumps(Bomb()), npz(w=bombs)):
            for stype in ("numpy.ndarray", "safetensors"):
                array = Array("uint8", (len(data),), stype, data)
                with pytest.raises(WireError):
                    read_reply(reply(with_array(pack(UPDATE), array)))
                assert not trace.exists()
        pickle.loads(pickle.dumps(Bomb()))  # noqa: S301  the bomb works
        assert trace.exists()


class TestNothingTheSiteWroteIsPassedOn:
    @pytest.mark.parametrize(
        "content",
        [
            with_facts(UPDATE, facts(**{**REPLY_FACTS, "run_id": [PLANTED]})),
            with_facts(UPDATE, facts(**{**REPLY_FACTS, "round": PLANTED})),
            with_facts(UPDATE, facts(**{**REPLY_FACTS, "evaluation": PLANTED})),
            with_facts(UPDATE, facts(**{**REPLY_FACTS, "ledger_count": PLANTED})),
            with_facts(UPDATE, facts(**{**REPLY_FACTS, "ledger_hash": PLANTED})),
            with_facts(UPDATE, facts(**REPLY_FACTS, **{PLANTED: PLANTED})),
            RecordDict({"facts": facts(**NUMBERS, refused=PLANTED)}),
            RecordDict({"facts": facts(**NUMBERS, refused="BUDGET", **{PLANTED: PLANTED})}),
            RecordDict({"facts": facts(**REPLY_FACTS), PLANTED: ARRAYS}),
            RecordDict({PLANTED: ARRAYS}),
            with_array(pack(UPDATE), blob(PLANTED.encode())),
            with_array(pack(UPDATE), blob(header(PLANTED))),
            with_array(pack(UPDATE), blob(one(PLANTED, "[1,2]", "[0,8]", RAW, PLANTED))),
            with_array(pack(UPDATE), blob(one("F32", "[3]", "[0,8]", RAW, PLANTED))),
            with_array(pack(UPDATE), blob(one("F16", "[4]", "[0,8]", RAW, PLANTED))),
            with_array(pack(UPDATE), Array(PLANTED, (1, 2), PLANTED, RAW)),
            with_array(pack(UPDATE), blob(GOOD, kind=PLANTED), "sums"),
        ],
    )
    def test_errors_are_our_own_words(self, content: RecordDict) -> None:
        with pytest.raises(WireError) as caught:
            read_reply(reply(content))
        assert PLANTED not in str(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__ or caught.value.__context__ is None

    def test_nor_what_an_exception_said(self) -> None:
        message = Message(Error(2, PLANTED), reply_to=Message(RecordDict(), 5, TRAIN))
        with pytest.raises(WireError) as caught:
            read_reply(message)
        assert PLANTED not in str(caught.value)

    def test_a_wire_error_is_ours(self) -> None:
        assert issubclass(WireError, FedveilError)
