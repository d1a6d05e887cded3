"""Messages survive the wire exactly, and what is not exactly a message is refused."""

import io
import math
import os
import pickle
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

PLANTED = "PATIENT-4711"
WEIGHTS = np.array([[1.5, -2.0]], dtype=np.float32)
TASK = Task("run", 3, "{}", "{}", {"w": WEIGHTS})
UPDATE = Update("run", 3, {"w": WEIGHTS})
LITTLE = "little-endian"

identifiers = st.text(max_size=20)
rounds = st.integers(-(2**62), 2**62)
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
    """Facts by name, where an underscore stands for the dash."""
    return ConfigRecord({key.replace("_", "-"): value for key, value in values.items()})  # type: ignore[misc]


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

    @pytest.mark.parametrize("kind", [np.float32, np.float64])
    def test_a_single_number_keeps_its_shape(self, kind: type[np.floating]) -> None:
        got = read_task(pack(Task("run", 1, "", "", {"w": np.array(2.5, dtype=kind)})))
        assert_same(got.arrays, {"w": np.array(2.5, dtype=kind)})

    @pytest.mark.parametrize("kind", [np.float32, np.float64])
    def test_arrays_that_are_views(self, kind: type[np.floating]) -> None:
        columns = np.arange(6, dtype=kind).reshape(2, 3).T[::2]
        got = read_task(pack(Task("run", 1, "", "", {"w": columns})))
        assert got.arrays["w"].dtype == kind
        assert np.array_equal(got.arrays["w"], columns)

    def test_a_sum_keeps_all_its_bits(self) -> None:
        """The rounding of a sum to float32 would be a sensitivity that nobody accounted for."""
        precise = np.array([1 + 2.0**-52, 1e300, 2.0**-1074, 0.1])
        got = read_reply(reply(pack(Update("run", 1, {"w": precise}))))
        assert isinstance(got, Update)
        assert_same(got.arrays, {"w": precise})

    def test_both_types_in_one_message(self) -> None:
        both: dict[str, np.ndarray] = {"w": WEIGHTS, "v": WEIGHTS.astype(np.float64)}
        assert_same(read_task(pack(Task("run", 1, "", "", both))).arrays, both)

    @pytest.mark.parametrize(
        ("kind", "name", "raw"),
        [
            ("<f4", "float32", "<f4"),
            ("<f8", "float64", "<f8"),
            (">f4", "float32", "<f4"),
            (">f8", "float64", "<f8"),
        ],
    )
    def test_the_bytes_on_the_wire(self, kind: str, name: str, raw: str) -> None:
        """Little-endian bytes, whatever order the array was in."""
        numbers = np.array([[1.5, -2.0, 0.1]]).astype(kind)
        content = pack(Update("run", 1, {"w": numbers}))
        sent = content.array_records["arrays"]["w"]
        assert (sent.dtype, tuple(sent.shape), sent.stype) == (name, (1, 3), LITTLE)
        assert sent.data == numbers.astype(raw).tobytes()
        got = read_reply(reply(content))
        assert isinstance(got, Update)
        assert got.arrays["w"].dtype == np.dtype(raw)
        assert np.array_equal(got.arrays["w"], numbers)

    def test_a_refusal_travels_as_a_name_only(self) -> None:
        content = pack(Refused("run", 1, Refusal.BUDGET))
        assert list(content) == ["facts"]
        assert content["facts"]["refused"] == "BUDGET"


TASK_FACTS: dict[str, object] = {"run_id": "run", "round": 3, "config": "{}", "schema": "{}"}
REPLY_FACTS: dict[str, object] = {"run_id": "run", "round": 3}
ARRAYS = pack(UPDATE)["arrays"]


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

    @pytest.mark.parametrize("key", ["config", "loss", "num-examples", PLANTED])
    def test_foreign_fact(self, key: str) -> None:
        content = RecordDict(
            {"facts": ConfigRecord({"run-id": "run", "round": 3, key: "1"}), "arrays": ARRAYS}
        )
        with pytest.raises(WireError):
            read_reply(reply(content))

    def test_update_without_arrays(self) -> None:
        with pytest.raises(WireError, match="arrays"):
            read_reply(reply(RecordDict({"facts": facts(**REPLY_FACTS)})))

    @pytest.mark.parametrize("code", ["", "budget", "OTHER", PLANTED])
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
        with pytest.raises(WireError, match=r"^Flower error 5$"):
            read_reply(message)


RAW = WEIGHTS.astype("<f4").tobytes()
LONG = WEIGHTS.astype("<f8").tobytes()
TYPE = r"^arrays: expected float32 or float64$"
SHAPE = r"^arrays: expected a shape of whole numbers$"
BYTES = r"^arrays: expected as many bytes as the shape asks for$"
BAD_ARRAYS = {
    "nothing": (Array("float32", (1, 2), LITTLE, b""), BYTES),
    "half the data": (Array("float32", (1, 2), LITTLE, RAW[:4]), BYTES),
    "more than the data": (Array("float32", (1, 2), LITTLE, RAW + b"x"), BYTES),
    "float32 called float64": (Array("float64", (1, 2), LITTLE, RAW), BYTES),
    "float64 called float32": (Array("float32", (1, 2), LITTLE, LONG), BYTES),
    "half of float64": (Array("float64", (1, 2), LITTLE, LONG[:8]), BYTES),
    "a huge shape": (Array("float32", (10**15, 10**15), LITTLE, RAW), BYTES),
    "a shape of another size": (Array("float64", (3,), LITTLE, LONG), BYTES),
    "a negative shape": (Array("float32", (-1, -2), LITTLE, RAW), SHAPE),
    "a truth for a size": (Array("float32", (True, 2), LITTLE, RAW), SHAPE),
    "integers": (Array("int32", (1, 2), LITTLE, RAW), TYPE),
    "half precision": (Array("float16", (2, 2), LITTLE, RAW), TYPE),
    "big-endian by type": (Array(">f4", (1, 2), LITTLE, RAW), TYPE),
    "little-endian by type": (Array("<f4", (1, 2), LITTLE, RAW), TYPE),
    "objects": (Array("object", (1,), LITTLE, RAW), TYPE),
    "named fields": (Array("[('a', '<f4')]", (1, 2), LITTLE, RAW), TYPE),
    "big-endian": (Array("float32", (1, 2), "big-endian", RAW), TYPE),
    "the encoding of before": (Array("float32", (1, 2), "float32", RAW), TYPE),
    "no encoding": (Array("float32", (1, 2), "", RAW), TYPE),
    "numpy's own format": (Array(WEIGHTS), TYPE),
    "numpy's own format, float64": (Array(WEIGHTS.astype(np.float64)), TYPE),
    "an archive": (Array("float32", (1, 2), "numpy.ndarray", npz(w=WEIGHTS)), TYPE),
    "an archive for raw bytes": (Array("float32", (1, 2), LITTLE, npz(w=WEIGHTS)), BYTES),
    "a pickle": (Array("float32", (1, 2), "pickle", pickle.dumps([1, 2])), TYPE),
    "a planted type": (Array(PLANTED, (1, 2), LITTLE, RAW), TYPE),
    "a planted encoding": (Array("float64", (1, 2), PLANTED, LONG), TYPE),
}


def with_array(content: RecordDict, array: Array) -> RecordDict:
    """A message whose one array is this one."""
    content["arrays"] = ArrayRecord({"w": array})
    return content


class TestBadArrays:
    @pytest.mark.parametrize("kind", BAD_ARRAYS)
    def test_the_server_refuses_them(self, kind: str) -> None:
        array, said = BAD_ARRAYS[kind]
        with pytest.raises(WireError, match=said) as caught:
            read_reply(reply(with_array(pack(UPDATE), array)))
        assert PLANTED not in str(caught.value)

    @pytest.mark.parametrize("kind", BAD_ARRAYS)
    def test_a_site_refuses_them_too(self, kind: str) -> None:
        array, said = BAD_ARRAYS[kind]
        with pytest.raises(WireError, match=said):
            read_task(with_array(pack(TASK), array))

    @given(
        st.sampled_from(["float32", "float64"]),
        st.binary(max_size=40),
        st.lists(st.integers(-3, 9), max_size=3),
    )
    def test_any_bytes_and_shape_give_an_array_or_our_error(
        self, kind: str, data: bytes, shape: list[int]
    ) -> None:
        content = with_array(pack(UPDATE), Array(kind, tuple(shape), LITTLE, data))
        fits = min(shape, default=0) >= 0 and len(data) == np.dtype(kind).itemsize * math.prod(
            shape
        )
        if not fits:
            with pytest.raises(WireError, match=r"^arrays: expected"):
                read_reply(reply(content))
            return
        got = read_reply(reply(content))
        assert isinstance(got, Update)
        assert got.arrays["w"].dtype == kind
        assert got.arrays["w"].shape == tuple(shape)
        assert got.arrays["w"].tobytes() == data

    @pytest.mark.parametrize(
        "kind", [np.int32, np.int64, np.float16, np.longdouble, np.complex64, bool, "V4", object]
    )
    def test_only_float32_and_float64_are_sent(self, kind: str) -> None:
        with pytest.raises(WireError, match=r"^arrays: expected float32 or float64, got "):
            pack(Update("run", 1, {"w": np.zeros(3).astype(kind)}))

    def test_pickled_arrays_are_never_unpickled(self, tmp_path: Path) -> None:
        trace = tmp_path / "unpickled"

        class Bomb:
            def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
                return os.mkdir, (str(trace),)

        bombs = np.empty(1, dtype=object)
        bombs[0] = Bomb()
        for data in (npy(bombs), pickle.dumps(Bomb()), npz(w=bombs)):
            for stype in ("numpy.ndarray", LITTLE):
                array = Array("float32", (1, 2), stype, data)
                with pytest.raises(WireError):
                    read_reply(reply(with_array(pack(UPDATE), array)))
                assert not trace.exists()
        pickle.loads(pickle.dumps(Bomb()))  # noqa: S301  the bomb works
        assert trace.exists()


class TestNothingTheSiteWroteIsPassedOn:
    @pytest.mark.parametrize(
        "content",
        [
            RecordDict({"facts": facts(run_id=[PLANTED], round=3), "arrays": ARRAYS}),
            RecordDict({"facts": facts(run_id="run", round=PLANTED), "arrays": ARRAYS}),
            RecordDict({"facts": facts(**REPLY_FACTS, refused=PLANTED)}),
            RecordDict({"facts": ConfigRecord({"run-id": "run", "round": 3, PLANTED: PLANTED})}),
            RecordDict({"facts": facts(**REPLY_FACTS), PLANTED: ARRAYS}),
            RecordDict({PLANTED: ARRAYS}),
            with_array(pack(UPDATE), Array("float32", (1, 2), LITTLE, PLANTED.encode())),
            with_array(pack(UPDATE), Array(PLANTED, (1, 2), PLANTED, RAW)),
            with_array(pack(UPDATE), Array(PLANTED, (1, 2), LITTLE, RAW)),
            with_array(pack(UPDATE), Array("float64", (1, 2), PLANTED, LONG)),
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
