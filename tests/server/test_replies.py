"""Which replies count: a site's only one, of this round, of the expected form, from its ledger."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from fedveil.flower import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    RecordDict,
    set_identity,
)
from fedveil.server.aggregation import summed
from fedveil.server.replies import Replies, usable_replies
from fedveil.wire import NO_LEDGER, TRAIN, Refusal, Refused, Task, Update, pack

PLANTED = "PATIENT-4711"
SHAPES = {"w": (2, 2), "b": (3,)}
KNOWN = (7, "0" * 64)
GROWN = (9, "a" * 64)
TASK = Task("run", 4, 2, "{}", "{}", {}, {}, {}, KNOWN)


@pytest.fixture(autouse=True, scope="module")
def _identity() -> None:
    set_identity(1, 0)


def reply(node: int, content: RecordDict | Error) -> Message:
    """What the server gets when a site answers so."""
    request = Message(RecordDict(), node, TRAIN)
    if isinstance(content, Error):
        return Message(content, reply_to=request)
    return Message(content, reply_to=request)


def like(kind: str) -> dict[str, np.ndarray]:
    """What is expected of a reply: sums are float64, models float32."""
    return {name: np.zeros(shape, dtype=kind) for name, shape in SHAPES.items()}


def fine(kind: str, **changes: object) -> dict[str, np.ndarray]:
    """Arrays as they are expected, but for some."""
    arrays = {"w": np.ones((2, 2), dtype=kind), "b": np.full(3, 2, dtype=kind)}
    return arrays | {name: np.array(value, dtype=kind) for name, value in changes.items()}


GOOD = fine("float64")
LIKE = like("float64")
SUMS = {"holdout/count": np.array([40.0]), "holdout/loss": np.array([-3.5])}
LIKE_SUMS = {name: np.zeros(1) for name in SUMS}


def update(
    arrays: Mapping[str, Any],
    run_id: str = "run",
    number: int = 4,
    evaluation: int = 2,
    sums: Mapping[str, Any] = SUMS,
    ledger: tuple[int, str] = GROWN,
) -> RecordDict:
    """An update of round 4, evaluation 2."""
    return pack(Update(run_id, number, evaluation, arrays, sums, ledger))


def with_bytes(kind: str, data: bytes, encoding: str = "safetensors") -> RecordDict:
    """An update whose arrays are these bytes."""
    content = update(fine(kind))
    array = Array("uint8", (len(data),), encoding, data)
    content["arrays"] = ArrayRecord({"safetensors": array})
    return content


def with_facts(kind: str, **values: Any) -> RecordDict:  # noqa: ANN401
    """A good update with other facts."""
    content = update(fine(kind))
    changed = {name.replace("_", "-"): value for name, value in values.items()}
    content["facts"] = ConfigRecord({**content.config_records["facts"], **changed})
    return content


def without(kind: str, part: str) -> RecordDict:
    """A good update that lacks one record."""
    content = update(fine(kind))
    del content[part]
    return content


def bad_replies(kind: str) -> dict[str, tuple[RecordDict | Error, str]]:
    """Replies that are not to be used where arrays of this type are expected, and why."""
    good, whole = fine(kind), save(fine(kind))
    other = {"float32": "float64", "float64": "float32"}[kind]
    types = "arrays: expected one safetensors of float32 or float64"
    expected = f"b: expected (3,) {kind}, got "
    another, ledger = "another run, round or evaluation", "ledger: expected a count and a SHA-256"
    return {
        "wrong run": (update(good, run_id="other"), another),
        "wrong round": (update(good, number=3), another),
        "wrong evaluation": (update(good, evaluation=1), another),
        "no evaluation": (update(good, evaluation=0, sums={}), another),
        "wrong shape": (update(fine(kind, b=np.zeros(4))), f"{expected}(4,)"),
        "transposed": (update(fine(kind, b=np.zeros((3, 1)))), f"{expected}(3, 1)"),
        "the other type": (update(fine(other)), f"{kind}, got (2, 2) of another type"),
        "one of the other type": (
            update(good | {"b": fine(other)["b"]}),
            f"{expected}(3,) of another type",
        ),
        "numpy's encoding": (with_bytes(kind, whole, "numpy.ndarray"), types),
        "too few bytes": (with_bytes(kind, whole[:-1]), types),
        "too many bytes": (with_bytes(kind, whole + b"x"), types),
        "integers": (with_bytes(kind, save({"w": np.zeros(3, dtype=np.int32)})), types),
        "half precision": (with_bytes(kind, save({"w": np.zeros(3, dtype=np.float16)})), types),
        "NaN": (update(fine(kind, b=[0, np.nan, 0])), "finite"),
        "infinity": (update(fine(kind, b=[0, np.inf, 0])), "finite"),
        "extra key": (update(good | {PLANTED: good["b"]}), "2 names"),
        "missing key": (update({"w": good["w"]}), "2 names"),
        "other key": (update({"w": good["w"], PLANTED: good["b"]}), "2 names"),
        "no arrays": (update({}), "2 names"),
        "no sums": (update(good, sums={}), "2 names"),
        "a missing sum": (update(good, sums={"holdout/count": np.zeros(1)}), "2 names"),
        "an extra sum": (update(good, sums=SUMS | {PLANTED: np.zeros(1)}), "2 names"),
        "a longer sum": (
            update(good, sums=SUMS | {"holdout/loss": np.zeros(2)}),
            "holdout/loss: expected (1,) float64, got (2,)",
        ),
        "a rounded sum": (
            update(good, sums=SUMS | {"holdout/loss": np.zeros(1, dtype=np.float32)}),
            "holdout/loss: expected (1,) float64, got (1,) of another type",
        ),
        "an infinite sum": (
            update(good, sums=SUMS | {"holdout/count": np.array([np.inf])}),
            "holdout/count: expected finite numbers",
        ),
        "no record of sums": (without(kind, "sums"), "expected the records facts, arrays, sums"),
        "an old ledger": (update(good, ledger=(6, "a" * 64)), "its ledger has not grown"),
        "the ledger as it was": (update(good, ledger=KNOWN), "its ledger has not grown"),
        "another ledger of that length": (update(good, ledger=(7, "b" * 64)), "has not grown"),
        "no ledger": (update(good, ledger=NO_LEDGER), "its ledger has not grown"),
        "a ledger of less than nothing": (with_facts(kind, ledger_count=-1), ledger),
        "a text for its hash": (with_facts(kind, ledger_hash=PLANTED), ledger),
        "a hash with a line end": (with_facts(kind, ledger_hash="a" * 64 + "\n"), ledger),
        "a text for its count": (with_facts(kind, ledger_count=PLANTED), "ledger-count"),
        "refused": (pack(Refused("run", 4, 2, Refusal.BUDGET)), Refusal.BUDGET.value),
        "refused for its ledger": (pack(Refused("run", 4, 2, Refusal.LEDGER)), "cannot be used"),
        "failed": (
            pack(Refused("run", 4, 2, Refusal.FAILED)),
            "refused: the site fails even without records",
        ),
        "refused another round": (pack(Refused("run", 3, 2, Refusal.BUDGET)), another),
        "refused another evaluation": (pack(Refused("run", 4, 1, Refusal.BUDGET)), another),
        "Flower error": (Error(2, PLANTED), "Flower error 2"),
        "no message of ours": (RecordDict({PLANTED: ConfigRecord({PLANTED: PLANTED})}), "facts"),
        "a task": (pack(Task("run", 4, 2, PLANTED, "{}", good, {}, {}, GROWN)), "records"),
        "a loss": (with_facts(kind, loss=0.5), "keys"),
        "text for a round": (with_facts(kind, round=PLANTED), "round"),
        "unreadable": (with_bytes(kind, PLANTED.encode() + b"!"), types),
        "an archive": (with_bytes(kind, b"PK\x05\x06" + bytes(18)), types),
        "half an archive": (with_bytes(kind, b"PK\x03\x04" + PLANTED.encode() * 2), types),
    }


BAD = {kind: bad_replies(kind) for kind in ("float64", "float32")}


def sorted_out(
    messages: list[Message], nodes: tuple[int, ...], like: Mapping[str, np.ndarray] = LIKE
) -> Replies:
    """What becomes of replies to round 4 and evaluation 2, asked of these nodes."""
    return usable_replies(
        messages, {n: n for n in nodes}, dict.fromkeys(nodes, TASK), like, LIKE_SUMS
    )


@pytest.mark.parametrize("expected", BAD)
@pytest.mark.parametrize("kind", BAD["float64"])
def test_a_bad_reply_is_dropped_with_a_reason(kind: str, expected: str) -> None:
    content, reason = BAD[expected][kind]
    good = update(fine(expected))
    messages = [reply(3, good), reply(2, content), reply(1, good)]
    found = sorted_out(messages, (1, 2, 3), like(expected))
    assert list(found.usable) == [1, 3]
    assert found.dropped.keys() == {2}
    assert reason in found.dropped[2]
    assert PLANTED not in found.dropped[2]


@pytest.mark.parametrize("expected", ["float64", "float32"])
def test_good_ones_are_in_site_order(expected: str) -> None:
    messages = [reply(n, update(fine(expected, b=[n] * 3))) for n in (3, 1, 2)]
    found = sorted_out(messages, (1, 2, 3), like(expected))
    assert list(found.usable) == [1, 2, 3]
    parts = list(found.usable.values())
    assert [int(part.arrays["b"][0]) for part in parts] == [1, 2, 3]
    assert {a.dtype.name for part in parts for a in part.arrays.values()} == {expected}
    assert found.dropped == {}


def test_a_good_one_is_passed_on_whole() -> None:
    found = sorted_out([reply(1, update(GOOD))], (1,)).usable[1]
    assert (found.run_id, found.round, found.evaluation, found.ledger) == ("run", 4, 2, GROWN)
    assert {name: a.tolist() for name, a in found.arrays.items()} == {
        name: a.tolist() for name, a in GOOD.items()
    }
    assert {name: a.tolist() for name, a in found.sums.items()} == {
        "holdout/count": [40.0], "holdout/loss": [-3.5],
    }  # fmt: skip


def test_an_evaluation_alone_has_sums_only() -> None:
    task = Task("run", 0, 3, "{}", "{}", {}, {}, {}, KNOWN)
    alone, both = update({}, number=0, evaluation=3), update(GOOD, number=0, evaluation=3)
    found = usable_replies(
        [reply(1, alone), reply(2, both)], {1: 1, 2: 2}, {1: task, 2: task}, {}, LIKE_SUMS
    )
    assert list(found.usable) == [1]
    assert "expected the 0 names" in found.dropped[2]


def test_each_ledger_is_held_against_its_own_site() -> None:
    """One entry more is enough; what another site's ledger counts is no matter."""
    tasks = {
        node: Task("run", 4, 2, "{}", "{}", {}, {}, {}, (count, "0" * 64))
        for node, count in ((1, 7), (2, 8), (3, 100))
    }
    messages = [reply(n, update(GOOD, ledger=(8, "a" * 64))) for n in (1, 2, 3)]
    found = usable_replies(messages, {n: n for n in tasks}, tasks, LIKE, LIKE_SUMS)
    assert list(found.usable) == [1]
    assert found.dropped == dict.fromkeys((2, 3), "its ledger has not grown")


def test_any_ledger_will_do_where_none_is_known() -> None:
    task = Task("run", 4, 2, "{}", "{}", {}, {}, {}, NO_LEDGER)
    message = reply(1, update(GOOD, ledger=(1, "a" * 64)))
    assert list(usable_replies([message], {1: 1}, {1: task}, LIKE, LIKE_SUMS).usable) == [1]


@pytest.mark.parametrize("times", [2, 3, 4])
def test_neither_of_two_replies_is_used(times: int) -> None:
    messages = [reply(1, update(GOOD))] + [reply(2, update(GOOD))] * times
    found = sorted_out(messages, (1, 2))
    assert list(found.usable) == [1]
    assert found.dropped == {2: "replied twice"}


@pytest.mark.parametrize("first_is_good", [True, False])
def test_nor_where_one_of_them_is_bad(first_is_good: bool) -> None:
    pair = [reply(2, update(GOOD)), reply(2, update(GOOD, number=3))]
    messages = pair if first_is_good else pair[::-1]
    found = sorted_out(messages, (1, 2))
    assert found.usable == {}
    assert found.dropped == {1: "no reply", 2: "replied twice"}


def test_unknown_nodes_are_ignored() -> None:
    found = sorted_out([reply(9, update(GOOD)), reply(1, update(GOOD))], (1,))
    assert list(found.usable) == [1]
    assert found.dropped == {}


def test_silence() -> None:
    found = sorted_out([], (2, 1))
    assert found == Replies({}, {1: "no reply", 2: "no reply"})
    assert list(found.dropped) == [1, 2]


def test_the_order_of_replies_does_not_matter() -> None:
    """Floating-point sums depend on their order: it is the sites', whoever was first."""
    rng = np.random.default_rng(1)
    nodes = (1, 2, 3, 4)

    def awkward(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        return {
            name: rng.normal(size=shape) * 10.0 ** rng.integers(-8, 8)
            for name, shape in shapes.items()
        }

    messages = [
        reply(node, update(awkward(SHAPES), sums=awkward(dict.fromkeys(SUMS, (1,)))))
        for node in nodes
    ]
    found = set()
    for order in itertools.permutations(messages):
        parts = sorted_out(list(order), nodes).usable.values()
        totals = [summed(p.arrays for p in parts), summed(p.sums for p in parts)]
        found.add(b"".join(total[name].tobytes() for total in totals for name in sorted(total)))
    assert len(found) == 1
