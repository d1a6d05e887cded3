"""Messages survive the wire exactly, and what is not exactly a message is refused."""

import io
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

identifiers = st.text(max_size=20)
rounds = st.integers(-(2**62), 2**62)
arrays: st.SearchStrategy[dict[str, np.ndarray]] = st.dictionaries(
    st.text(min_size=1, max_size=10),
    hnp.arrays(
        np.float32,
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
BAD_ARRAYS = {
    "nothing": Array("float32", (1, 2), "float32", b""),
    "half the data": Array("float32", (1, 2), "float32", RAW[:4]),
    "more than the data": Array("float32", (1, 2), "float32", RAW + b"x"),
    "a huge shape": Array("float32", (10**15, 10**15), "float32", RAW),
    "a negative shape": Array("float32", (-1, -2), "float32", RAW),
    "a truth for a size": Array("float32", (True, 2), "float32", RAW),
    "another type": Array("float64", (1,), "float32", RAW),
    "numpy's own format": Array(WEIGHTS),
    "an archive": Array("float32", (1, 2), "numpy.ndarray", npz(w=WEIGHTS)),
    "a pickle": Array("float32", (1, 2), "pickle", pickle.dumps([1, 2])),
    "a planted name": Array(PLANTED, (1, 2), "float32", RAW),
}


def with_array(content: RecordDict, array: Array) -> RecordDict:
    """A message whose one array is this one."""
    content["arrays"] = ArrayRecord({"w": array})
    return content


class TestBadArrays:
    @pytest.mark.parametrize("kind", BAD_ARRAYS)
    def test_the_server_refuses_them(self, kind: str) -> None:
        with pytest.raises(WireError, match=r"^arrays: expected") as caught:
            read_reply(reply(with_array(pack(UPDATE), BAD_ARRAYS[kind])))
        assert PLANTED not in str(caught.value)

    @pytest.mark.parametrize("kind", BAD_ARRAYS)
    def test_a_site_refuses_them_too(self, kind: str) -> None:
        with pytest.raises(WireError, match=r"^arrays: expected"):
            read_task(with_array(pack(TASK), BAD_ARRAYS[kind]))

    @given(st.binary(max_size=40), st.lists(st.integers(-3, 9), max_size=3))
    def test_any_bytes_and_shape_give_an_array_or_our_error(
        self, data: bytes, shape: list[int]
    ) -> None:
        content = with_array(pack(UPDATE), Array("float32", tuple(shape), "float32", data))
        try:
            got = read_reply(reply(content))
        except WireError:
            return
        assert isinstance(got, Update)
        assert got.arrays["w"].shape == tuple(shape)
        assert got.arrays["w"].tobytes() == data

    @pytest.mark.parametrize("kind", [np.float64, np.int32, np.float16, ">f4", object])
    def test_only_float32_is_sent(self, kind: str) -> None:
        with pytest.raises(WireError, match="expected float32"):
            pack(Update("run", 1, {"w": np.zeros(3).astype(kind)}))

    def test_pickled_arrays_are_never_unpickled(self, tmp_path: Path) -> None:
        trace = tmp_path / "unpickled"

        class Bomb:
            def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
                return os.mkdir, (str(trace),)

        bombs = np.empty(1, dtype=object)
        bombs[0] = Bomb()
        for data in (npy(bombs), pickle.dumps(Bomb()), npz(w=bombs)):
            for stype in ("numpy.ndarray", "float32"):
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
            with_array(pack(UPDATE), Array("float32", (1, 2), "float32", PLANTED.encode())),
            with_array(pack(UPDATE), Array(PLANTED, (1, 2), PLANTED, RAW)),
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
