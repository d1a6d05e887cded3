"""Messages survive the wire exactly, and what is not exactly a message is refused."""

import io
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

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
    TRAIN,
    Refusal,
    Refused,
    Task,
    Update,
    WireError,
    pack,
    read_reply,
    read_task,
)

SECRET = "PATIENT-4711"
WEIGHTS = np.array([[1.5, -2.0]], dtype=np.float32)
TASK = Task("run", 3, "{}", "{}", {"w": WEIGHTS})
UPDATE = Update("run", 3, {"w": WEIGHTS})

identifiers = st.text(max_size=20)
rounds = st.integers(-(2**62), 2**62)
arrays = st.dictionaries(
    st.text(min_size=1, max_size=10),
    hnp.arrays(
        st.sampled_from([np.dtype(np.float32), np.dtype(np.int64), np.dtype(np.float64)]),
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
    """Facts by name, where an underscore stands for the dash."""
    return ConfigRecord({key.replace("_", "-"): value for key, value in values.items()})  # type: ignore[misc]


def with_bytes(data: bytes, stype: str = "numpy.ndarray") -> RecordDict:
    """An update whose one array is these bytes."""
    content = pack(UPDATE)
    content["arrays"] = ArrayRecord({"w": Array("float32", (1, 2), stype, data)})
    return content


def npy(array: np.ndarray) -> bytes:
    """An array as numpy stores it."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npy_header(header: str) -> bytes:
    """A file with a header of one's own and no data."""
    padded = header.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded.encode()


def npz(**named: np.ndarray) -> bytes:
    """A zip archive of arrays."""
    buffer = io.BytesIO()
    np.savez(buffer, **named)  # type: ignore[arg-type]
    return buffer.getvalue()


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
    @given(identifiers, rounds, identifiers, identifiers, arrays)
    def test_task(
        self, run_id: str, number: int, config: str, schema: str, named: dict[str, np.ndarray]
    ) -> None:
        got = read_task(pack(Task(run_id, number, config, schema, named)))
        assert (got.run_id, got.round, got.config, got.schema) == (run_id, number, config, schema)
        assert_same(got.arrays, named)

    @given(identifiers, rounds, arrays)
    def test_update(self, run_id: str, number: int, named: dict[str, np.ndarray]) -> None:
        got = read_reply(reply(pack(Update(run_id, number, named))))
        assert isinstance(got, Update)
        assert (got.run_id, got.round) == (run_id, number)
        assert_same(got.arrays, named)

    @given(identifiers, rounds, st.sampled_from(Refusal))
    def test_refusal(self, run_id: str, number: int, code: Refusal) -> None:
        refused = Refused(run_id, number, code)
        assert read_reply(reply(pack(refused))) == refused

    def test_a_single_number_keeps_its_shape(self) -> None:
        got = read_task(pack(Task("run", 1, "", "", {"w": np.array(2.5, dtype=np.float32)})))
        assert got.arrays["w"].shape == ()

    def test_arrays_that_are_views(self) -> None:
        columns = np.arange(6, dtype=np.float32).reshape(2, 3).T[::2]
        got = read_task(pack(Task("run", 1, "", "", {"w": columns})))
        assert np.array_equal(got.arrays["w"], columns)

    def test_a_refusal_travels_as_a_name_only(self) -> None:
        content = pack(Refused("run", 1, Refusal.BUDGET))
        assert list(content) == ["facts"]
        assert content["facts"]["refused"] == "BUDGET"


TASK_FACTS: dict[str, object] = {"run_id": "run", "round": 3, "config": "{}", "schema": "{}"}
REPLY_FACTS: dict[str, object] = {"run_id": "run", "round": 3}
ARRAYS = ArrayRecord({"w": Array(WEIGHTS)})


def without(values: dict[str, object], name: str) -> dict[str, object]:
    """All values but one."""
    return {key: value for key, value in values.items() if key != name}


class TestMalformedTask:
    @pytest.mark.parametrize("name", sorted(TASK_FACTS))
    def test_missing_fact(self, name: str) -> None:
        content = RecordDict({"facts": facts(**without(TASK_FACTS, name)), "arrays": ARRAYS})
        with pytest.raises(WireError, match=name.replace("_", "-")):
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
            ("config", 1),
            ("config", ["{}"]),
            ("schema", b"{}"),
            ("schema", False),
        ],
    )
    def test_wrong_type(self, name: str, value: object) -> None:
        content = RecordDict({"facts": facts(**{**TASK_FACTS, name: value}), "arrays": ARRAYS})
        with pytest.raises(WireError, match=name.replace("_", "-")):
            read_task(content)

    def test_foreign_fact(self) -> None:
        content = RecordDict({"facts": facts(**TASK_FACTS, more=1), "arrays": ARRAYS})
        with pytest.raises(WireError, match="keys"):
            read_task(content)

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda c: c.pop("facts"),
            lambda c: c.pop("arrays"),
            lambda c: c.update(facts=ARRAYS),
            lambda c: c.update(arrays=facts(w=1)),
            lambda c: c.update(more=facts(w=1)),
            lambda c: c.clear(),
        ],
        ids=["no facts", "no arrays", "facts are arrays", "arrays are facts", "foreign", "empty"],
    )
    def test_wrong_records(self, spoil: Callable[[RecordDict], object]) -> None:
        content = pack(TASK)
        spoil(content)
        with pytest.raises(WireError):
            read_task(content)

    def test_a_reply_is_no_task(self) -> None:
        with pytest.raises(WireError):
            read_task(pack(UPDATE))
        with pytest.raises(WireError):
            read_task(pack(Refused("run", 1, Refusal.FAILED)))


class TestMalformedReply:
    @pytest.mark.parametrize("name", sorted(REPLY_FACTS))
    def test_missing_fact(self, name: str) -> None:
        content = RecordDict({"facts": facts(**without(REPLY_FACTS, name)), "arrays": ARRAYS})
        with pytest.raises(WireError, match=name.replace("_", "-")):
            read_reply(reply(content))

    @pytest.mark.parametrize(
        ("name", "value"),
        [("run_id", 3), ("round", "3"), ("round", 2.5), ("round", True), ("refused", 1)],
    )
    def test_wrong_type(self, name: str, value: object) -> None:
        content = RecordDict({"facts": facts(**{**REPLY_FACTS, name: value}), "arrays": ARRAYS})
        with pytest.raises(WireError):
            read_reply(reply(content))

    @pytest.mark.parametrize("key", ["config", "loss", "num-examples", SECRET])
    def test_foreign_fact(self, key: str) -> None:
        content = RecordDict(
            {"facts": ConfigRecord({"run-id": "run", "round": 3, key: "1"}), "arrays": ARRAYS}
        )
        with pytest.raises(WireError):
            read_reply(reply(content))

    def test_update_without_arrays(self) -> None:
        with pytest.raises(WireError, match="arrays"):
            read_reply(reply(RecordDict({"facts": facts(**REPLY_FACTS)})))

    @pytest.mark.parametrize("code", ["", "budget", "OTHER", SECRET])
    def test_unknown_refusal(self, code: str) -> None:
        content = RecordDict({"facts": facts(**REPLY_FACTS, refused=code)})
        with pytest.raises(WireError, match="unknown code"):
            read_reply(reply(content))

    def test_a_refusal_with_arrays_is_no_message_of_ours(self) -> None:
        content = pack(Refused("run", 3, Refusal.BUDGET))
        content["arrays"] = ARRAYS
        with pytest.raises(WireError):
            read_reply(reply(content))

    def test_a_refusal_with_another_fact(self) -> None:
        content = RecordDict({"facts": facts(**REPLY_FACTS, refused="BUDGET", why="records")})
        with pytest.raises(WireError, match="keys"):
            read_reply(reply(content))

    def test_foreign_record(self) -> None:
        content = pack(UPDATE)
        content["metrics"] = facts(loss=0.5)
        with pytest.raises(WireError):
            read_reply(reply(content))

    def test_flower_error(self) -> None:
        message = Message(Error(5, "gone"), reply_to=Message(RecordDict(), 5, TRAIN))
        with pytest.raises(WireError, match="^Flower error 5$"):
            read_reply(message)


WHOLE = npy(WEIGHTS)
BAD_BYTES = {
    "nothing": b"",
    "garbage": b"garbage",
    "magic only": WHOLE[:6],
    "half a header": WHOLE[:40],
    "half the data": WHOLE[:-4],
    "no data": WHOLE[:-8],
    "objects": pickle.dumps([1, 2, 3]),
    "an archive": npz(w=WEIGHTS),
    "an empty archive": b"PK\x05\x06" + bytes(18),
    "half an archive": npz(w=WEIGHTS)[:100],
    "a huge shape": npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (10**15,), }".replace("10**15", str(10**15))),  # noqa: E501
    "a negative shape": npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }"),
    "an open header": npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (3,"),
    "a header that is no dictionary": npy_header("[1, 2]"),
    "a type that is none": npy_header("{'descr': 'zz', 'fortran_order': False, 'shape': (1,), }"),
    "a version that is none": b"\x93NUMPY\x09\x00" + WHOLE[8:],
}  # fmt: skip


class TestBadArrays:
    @pytest.mark.parametrize("kind", BAD_BYTES)
    def test_bytes_that_are_no_array(self, kind: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(WireError):
                read_reply(reply(with_bytes(BAD_BYTES[kind])))

    @pytest.mark.parametrize("kind", BAD_BYTES)
    def test_a_site_refuses_them_too(self, kind: str) -> None:
        content = pack(TASK)
        content["arrays"] = with_bytes(BAD_BYTES[kind])["arrays"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(WireError):
                read_task(content)

    def test_another_serialisation(self) -> None:
        with pytest.raises(WireError):
            read_reply(reply(with_bytes(WHOLE, stype="pickle")))

    @given(st.integers(0, len(WHOLE) - 1), st.binary(min_size=1, max_size=4))
    def test_any_spoilt_bytes_give_arrays_or_our_error(self, start: int, patch: bytes) -> None:
        spoilt = WHOLE[:start] + patch + WHOLE[start + len(patch) :]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                got = read_reply(reply(with_bytes(spoilt)))
            except WireError:
                return
        assert isinstance(got, Update)
        assert type(got.arrays["w"]) is np.ndarray

    def test_pickled_arrays_are_never_unpickled(self, tmp_path: Path) -> None:
        trace = tmp_path / "unpickled"

        class Bomb:
            def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
                return os.mkdir, (str(trace),)

        bombs = np.empty(1, dtype=object)
        bombs[0] = Bomb()
        for data in (npy(bombs), pickle.dumps(Bomb()), npz(w=bombs)):
            with pytest.raises(WireError):
                read_reply(reply(with_bytes(data)))
            assert not trace.exists()
        pickle.loads(pickle.dumps(Bomb()))  # noqa: S301  the bomb works
        assert trace.exists()


class TestNothingTheSiteWroteIsPassedOn:
    @pytest.mark.parametrize(
        "content",
        [
            RecordDict({"facts": facts(run_id=[SECRET], round=3), "arrays": ARRAYS}),
            RecordDict({"facts": facts(run_id="run", round=SECRET), "arrays": ARRAYS}),
            RecordDict({"facts": facts(**REPLY_FACTS, refused=SECRET)}),
            RecordDict({"facts": ConfigRecord({"run-id": "run", "round": 3, SECRET: SECRET})}),
            RecordDict({"facts": facts(**REPLY_FACTS), SECRET: ARRAYS}),
            RecordDict({SECRET: ARRAYS}),
            with_bytes(SECRET.encode()),
            with_bytes(npy_header(f"{{'descr': '{SECRET}', 'fortran_order': False}}")),
            with_bytes(WHOLE, stype=SECRET),
        ],
    )
    def test_errors_are_our_own_words(self, content: RecordDict) -> None:
        with pytest.raises(WireError) as caught:
            read_reply(reply(content))
        assert SECRET not in str(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__ or caught.value.__context__ is None

    def test_nor_what_an_exception_said(self) -> None:
        message = Message(Error(2, SECRET), reply_to=Message(RecordDict(), 5, TRAIN))
        with pytest.raises(WireError) as caught:
            read_reply(message)
        assert SECRET not in str(caught.value)

    def test_a_wire_error_is_ours(self) -> None:
        assert issubclass(WireError, FedveilError)
