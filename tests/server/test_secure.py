"""Secure rounds against sites that die, come back, lie or are lied to: sums stay exact."""

import math
from collections.abc import Callable
from dataclasses import replace
from threading import Event
from typing import Any

import numpy as np
import pytest
from scipy.stats import chi2

from fedveil.client import app as client
from fedveil.client.work import parts_of
from fedveil.flower import ArrayRecord, ConfigRecord, Error, Message, RecordDict
from fedveil.privacy import discrete
from fedveil.privacy.secagg.encoding import decode, encode
from fedveil.privacy.secagg.messages import Deals, Upload, digest_of_vector
from fedveil.privacy.secagg.terms import Block, Numbers, Opening, Setup
from fedveil.server.replies import RunError
from fedveil.server.simulation.recorder import Crossing
from fedveil.wire import (
    ADVERTISE,
    CONFIRM,
    DEAL,
    EVALUATE,
    TRAIN,
    UNMASK,
    Refusal,
    Step,
    Update,
    pack,
    read_reply,
    read_step,
    read_task,
    site_name,
)

# Of an order that Opacus does not use; `privacy.accounting` ignores it, pytest forgets that.
pytestmark = pytest.mark.filterwarnings("ignore:Optimal order is the:UserWarning")

World = Any
OpenWorld = Callable[..., World]
Change = Callable[[World, Crossing], RecordDict | None]
PHASES = (ADVERTISE, DEAL, TRAIN, CONFIRM, UNMASK)
IN_THE_SUM = {CONFIRM, UNMASK}
PROTOCOL = f"refused: {Refusal.PROTOCOL.value}"
PLANTED = "PATIENT-4711"
LIAR = 3
OTHERS = (1, 2, 4)
ALL = (1, 2, 3, 4)
ALARM = 1e-7


def raw(content: RecordDict | None) -> tuple[Any, ...]:
    """All that a message says, to be compared."""
    if content is None:
        return ("error",)
    found: list[tuple[str, str, Any]] = []
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            found += [(name, key, (a.dtype, a.stype, tuple(a.shape), a.data))
                      for key, a in record.items()]  # fmt: skip
        else:
            found += [(name, key, value) for key, value in record.items()]
    return tuple(sorted(found, key=lambda one: one[:2]))


def in_place_of(message: Message, content: RecordDict) -> Message:
    """The same message with another content."""
    message.content = content
    return message


def once(action: str, *, down: bool, site: int = LIAR) -> Callable[[Crossing], bool]:
    """Whether a message is the first of its kind."""
    seen: list[Crossing] = []

    def first(crossing: Crossing) -> bool:
        if (crossing.action, crossing.down, crossing.site) != (action, down, site) or seen:
            return False
        seen.append(crossing)
        return True

    return first


def check_noise(world: World, sites: tuple[int, ...]) -> None:
    """The noise in the sum, block by block: of each uploader its share, and as much as is priced.

    Each residual is a sum of so many normals of variance sigma_i^2, rounded: its sum of squares is
    chi-squared. The interval is left by chance with `ALARM`; the coins are fixed.
    """
    residual = (world.sums[-1].total - world.plain_sum(sites, noised=False)).view(np.int32)
    asked = world.crossed(sites[0], TRAIN, down=True)[-1].content
    opening = decode(Opening, read_task(asked).opening)
    honest, start = world.plan.numbers.n_min - world.plan.numbers.t_collude, 0
    for block in opening.blocks:
        part = residual[start : start + block.length].astype(np.float64)
        start += block.length
        assert block.sigma > 0
        total = float(np.square(part / block.sigma).sum())
        low, high = chi2.ppf([ALARM / 2, 1 - ALARM / 2], block.length)
        assert low <= total / len(sites) <= high, block.name
        # Without the colluder's own there is as much as the plan was priced for: more than what
        # only honest - 1 sites would give.
        assert len(sites) - world.plan.numbers.t_collude >= honest == world.plan.honest
    assert start == len(residual)


class TestASiteThatDies:
    """Site 3, in each phase, before or after it has done what it was asked to."""

    @pytest.mark.parametrize("down", [True, False])
    @pytest.mark.parametrize("action", PHASES)
    def test_for_good(self, open_world: OpenWorld, action: str, down: bool) -> None:
        world = open_world()
        world.lose(LIAR, action=action, down=down)
        found = world.ask(1)
        inside = ALL if action in IN_THE_SUM else OTHERS
        world.check_sum(*inside)
        check_noise(world, inside)
        assert found.sites == inside
        assert found.noises == len(inside) / 2
        assert dict(found.dropped) == ({} if action in IN_THE_SUM else {LIAR: "no reply"})
        assert set(found.ledgers) == set(inside)
        # The others go on, without it.
        again = world.ask(2, ledgers=found.ledgers)
        world.check_sum(*OTHERS)
        check_noise(world, OTHERS)
        why = "is no member of this epoch" if action in {ADVERTISE, DEAL} else "no reply"
        assert dict(again.dropped) == {LIAR: why}

    @pytest.mark.parametrize("down", [True, False])
    @pytest.mark.parametrize("action", PHASES)
    def test_and_is_started_again(self, open_world: OpenWorld, action: str, down: bool) -> None:
        """Before: the message finds the new process. After: its reply is lost with the old one."""
        world = open_world()
        first = once(action, down=down)

        def alter(crossing: Crossing) -> Message | None:
            if first(crossing):
                world.start(LIAR)
                return crossing.message if down else None
            return crossing.message

        world.alter = alter
        found = world.ask(1)
        # A vector is never written down: who has sent one before it restarted sends no other.
        lost = action == TRAIN and not down
        inside = OTHERS if lost else ALL
        world.check_sum(*inside)
        check_noise(world, inside)
        assert dict(found.dropped) == ({LIAR: PROTOCOL} if lost else {})
        assert len(world.made[LIAR]) == 1
        assert world.entries(LIAR) == {"rounds": 1}
        world.ask(2, ledgers=found.ledgers)
        world.check_sum(*ALL)
        check_noise(world, ALL)
        assert world.entries(LIAR) == {"rounds": 2}

    @pytest.mark.parametrize("action", [TRAIN, CONFIRM, UNMASK])
    def test_and_is_back_in_the_next_round(self, open_world: OpenWorld, action: str) -> None:
        world = open_world()
        world.lose(LIAR, action=action, down=True)
        found = world.ask(1)
        world.alter = lambda crossing: crossing.message
        world.start(LIAR)
        found = world.ask(2, ledgers=found.ledgers)
        world.check_sum(*ALL)
        assert not found.dropped

    def test_and_has_lost_its_state(self, open_world: OpenWorld) -> None:
        """No keys, no part: until the next epoch, whose keys are new."""
        world = open_world(secagg={"epoch_rounds": 2})
        ledgers = dict(world.ask(1).ledgers)
        [state] = world.folder.glob("sites/site-003/secagg/*.state")
        world.sites[LIAR].close()
        state.unlink()
        world.start(LIAR)
        found = world.ask(2, ledgers=ledgers)
        world.check_sum(*OTHERS)
        assert dict(found.dropped) == {LIAR: PROTOCOL}
        assert world.entries(LIAR) == {"rounds": 1}
        ledgers |= found.ledgers
        assert not world.ask(3, ledgers=ledgers).dropped
        world.check_sum(*ALL)

    def test_and_has_an_older_ledger(self, open_world: OpenWorld) -> None:
        """Put back from a backup: it would spend twice, and it is dropped."""
        world = open_world()
        file = world.folder / "ledger" / "site-003.sqlite"
        world.sites[LIAR].close()
        before = file.read_bytes()
        world.start(LIAR)
        found = world.ask(1)
        world.sites[LIAR].close()
        file.write_bytes(before)
        for left in ("-wal", "-shm"):
            file.with_name(f"{file.name}{left}").unlink(missing_ok=True)
        world.start(LIAR)
        found = world.ask(2, ledgers=found.ledgers)
        world.check_sum(*OTHERS)
        assert dict(found.dropped) == {LIAR: f"refused: {Refusal.LEDGER.value}"}

    def test_others_in_two_phases(self, open_world: OpenWorld) -> None:
        world = open_world(federation={"sites": 7}, secagg={"n_min": 5})
        dead = {DEAL: 1, TRAIN: 2}
        gone: set[int] = set()

        def alter(crossing: Crossing) -> Message | None:
            if crossing.down and dead.get(crossing.action) == crossing.site:
                gone.add(crossing.site)
            return None if crossing.site in gone else crossing.message

        world.alter = alter
        # t = floor((7 + 1) / 2) + 1 = 5.
        world.ask(1)
        world.check_sum(3, 4, 5, 6, 7)
        check_noise(world, (3, 4, 5, 6, 7))


@pytest.mark.parametrize("action", PHASES)
def test_too_few_remain(open_world: OpenWorld, action: str) -> None:
    world = open_world()
    world.lose(2, LIAR, action=action, down=True)
    with pytest.raises(RunError) as caught:
        world.ask(1)
    what = {
        ADVERTISE: "roster: 2 sites, expected at least n_min = 3; begin a new epoch with more",
        DEAL: "members: 2 sites, expected at least n_min = 3; begin a new epoch with more",
        TRAIN: "uploaders: 2 sites, expected at least n_min = 3; begin a new epoch with more",
        UNMASK: "unmasking: 2 sites, expected at least t = 3",
    }
    line = str(caught.value)
    assert line.startswith(f"round 1: secure sum: {what.get(action, 'confirmations: ')}")
    assert line.endswith("(site 2: no reply; site 3: no reply)")
    spent = {} if action in {ADVERTISE, DEAL} else {"rounds": 1}
    assert [world.entries(site) for site in (1, 4)] == [spent, spent]
    # They are back: a new epoch, a new number, and no vector is used again.
    world.alter = lambda crossing: crossing.message
    before = {site: len(made) for site, made in world.made.items()}
    world.ask(2)
    world.check_sum(*ALL)
    assert {site: len(made) for site, made in world.made.items()} == {
        site: before.get(site, 0) + 1 for site in ALL
    }
    setups = [
        decode(Setup, read_step(one.content).body) for one in world.crossed(1, ADVERTISE, down=True)
    ]
    assert [one.epoch for one in setups] == [0, 1]


class TestALostReply:
    @pytest.mark.parametrize("action", PHASES)
    def test_is_sent_again_to_the_byte(self, open_world: OpenWorld, action: str) -> None:
        world = open_world()
        first = once(action, down=False)
        world.alter = lambda crossing: None if first(crossing) else crossing.message
        found = world.ask(1)
        world.check_sum(*ALL)
        assert not found.dropped
        asked, replies = (world.crossed(LIAR, action, down=down) for down in (True, False))
        assert len(asked) == len(replies) == 2
        assert raw(asked[0].content) == raw(asked[1].content)
        assert raw(replies[0].content) == raw(replies[1].content)
        assert world.entries(LIAR) == {"rounds": 1}
        assert len(world.made[LIAR]) == 1
        assert len(world.crossed(1, action, down=True)) == 1

    @pytest.mark.parametrize("action", PHASES)
    def test_of_a_relay_that_fails(self, open_world: OpenWorld, action: str) -> None:
        """An error in place of a reply: the site is asked again."""
        world = open_world()
        first = once(action, down=False)

        def alter(crossing: Crossing) -> Message:
            if not first(crossing):
                return crossing.message
            return Message(
                Error(5, PLANTED), reply_to=world.crossed(LIAR, action, down=True)[0].message
            )

        world.alter = alter
        assert not world.ask(1).dropped
        world.check_sum(*ALL)

    def test_of_a_site_that_is_still_at_work(
        self, open_world: OpenWorld, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Asked again at half the deadline, it answers with what it was making, debited once."""
        world, asked, again = open_world(secagg={"deadline": 4.0}), 0, Event()

        def alter(crossing: Crossing) -> Message:
            nonlocal asked
            if (crossing.site, crossing.action, crossing.down) == (LIAR, TRAIN, True):
                asked += 1
                if asked == 2:
                    again.set()
            return crossing.message

        def slowly(*arguments: Any) -> Any:  # noqa: ANN401
            if arguments[4].name == site_name(LIAR):
                assert again.wait(30)
            return parts_of(*arguments)

        world.alter = alter
        monkeypatch.setattr(client, "parts_of", slowly)
        assert not world.ask(1).dropped
        world.check_sum(*ALL)
        assert world.entries(LIAR) == {"rounds": 1}

    def test_twice_is_a_site_that_is_gone(self, open_world: OpenWorld) -> None:
        world = open_world()

        def alter(crossing: Crossing) -> Message:
            if (crossing.site, crossing.action, crossing.down) != (LIAR, TRAIN, False):
                return crossing.message
            asked = world.crossed(LIAR, TRAIN, down=True)[-1].message
            return Message(Error(5, PLANTED), reply_to=asked)

        world.alter = alter
        assert dict(world.ask(1).dropped) == {LIAR: "Flower error 5"}
        world.check_sum(*OTHERS)
        assert len(world.crossed(LIAR, TRAIN, down=True)) == 2


# What a site may send in place of what it should.


def _stolen(world: World, crossing: Crossing) -> RecordDict | None:
    """The message of site 2 from the node of site 3."""
    return world.crossed(2, crossing.action, down=False)[-1].content  # type: ignore[no-any-return]


def _body(crossing: Crossing) -> tuple[str, bytes]:
    content: Any = crossing.content
    name = "upload" if crossing.action == TRAIN else "step"
    return name, content[name]["bytes"].data


def _with_body(crossing: Crossing, body: bytes) -> RecordDict:
    """The same message about other bytes."""
    assert crossing.content is not None
    name, _ = _body(crossing)
    other = pack(Step("", body))["step"]
    return RecordDict({**crossing.content, name: other})


def _garbage(world: World, crossing: Crossing) -> RecordDict:
    return _with_body(crossing, PLANTED.encode() * 9)


def _nothing(world: World, crossing: Crossing) -> RecordDict:
    return _with_body(crossing, b"")


def _cut(world: World, crossing: Crossing) -> RecordDict:
    return _with_body(crossing, _body(crossing)[1][:-1])


def _longer(world: World, crossing: Crossing) -> RecordDict:
    return _with_body(crossing, _body(crossing)[1] + PLANTED.encode())


def _flipped(world: World, crossing: Crossing) -> RecordDict:
    body = bytearray(_body(crossing)[1])
    body[-1] ^= 1  # of a signature, or of a sealed share
    return _with_body(crossing, bytes(body))


def _empty(world: World, crossing: Crossing) -> RecordDict:
    return RecordDict()


def _planted(world: World, crossing: Crossing) -> RecordDict:
    assert crossing.content is not None
    return RecordDict({**crossing.content, PLANTED: ConfigRecord({PLANTED: PLANTED})})


def _said(world: World, crossing: Crossing) -> RecordDict:
    content: Any = crossing.content
    facts = ConfigRecord({**content["facts"], "note": PLANTED})
    return RecordDict({**content, "facts": facts})


def _of_another_kind(world: World, crossing: Crossing) -> RecordDict:
    """A step's answer to a task, a task's answer to a step."""
    if crossing.action == TRAIN:
        return pack(Step("", _body(crossing)[1]))
    return pack(Update("", 1, 0, {}, {}, (0, "")))


def _refusing(world: World, crossing: Crossing) -> RecordDict:
    about: Any = {"run-id": "", "round": 0, "evaluation": 0, "refused": PLANTED}
    return RecordDict({"facts": ConfigRecord(about)})


LIES: tuple[Change, ...] = (
    _stolen, _garbage, _nothing, _cut, _longer, _flipped, _empty, _planted, _said,
    _of_another_kind, _refusing,
)  # fmt: skip


@pytest.mark.parametrize("action", PHASES)
def test_a_site_that_lies_is_dropped(open_world: OpenWorld, action: str) -> None:
    """Whatever it sends: the round is the others', and nothing that it wrote is passed on.

    It is no worse off for it in the round after.
    """
    epoch = 1 if action in {ADVERTISE, DEAL} else 64
    world = open_world(federation={"rounds": len(LIES)}, secagg={"epoch_rounds": epoch})
    ledgers: dict[int, tuple[int, str]] = {}
    for number, lie in enumerate(LIES, start=1):
        first = once(action, down=False)

        def alter(
            crossing: Crossing, first: Callable[[Crossing], bool] = first, lie: Change = lie
        ) -> Message:
            if not first(crossing):
                return crossing.message
            content = lie(world, crossing)
            assert content is not None
            return in_place_of(crossing.message, content)

        world.alter = alter
        found = world.ask(number, ledgers=ledgers)
        ledgers |= found.ledgers
        name = lie.__name__
        # Its signed upload comes before it lies about U.
        world.check_sum(*(ALL if action in IN_THE_SUM else OTHERS))
        assert set(found.dropped) == (set() if action in IN_THE_SUM else {LIAR}), name
        assert PLANTED not in str(found.dropped), name
        assert "\\n" not in str(found.dropped), name
        # A bad reply is not asked for again.
        assert len(world.crossed(LIAR, action, down=True)) == number, name


class TestWhatIsSaidOfALiar:
    def reason(self, world: World, action: str, change: Change) -> str:
        first = once(action, down=False)

        def alter(crossing: Crossing) -> Message:
            if not first(crossing):
                return crossing.message
            content = change(world, crossing)
            assert content is not None
            return in_place_of(crossing.message, content)

        world.alter = alter
        found = world.ask(1)
        world.check_sum(*OTHERS)
        return str(found.dropped[LIAR])

    def test_another_s_upload(self, open_world: OpenWorld) -> None:
        line = self.reason(open_world(), TRAIN, _stolen)
        assert line == "message: is of site 1, expected 2"  # places on the roster, from 0

    @pytest.mark.parametrize("action", [ADVERTISE, DEAL])
    def test_another_s_keys(self, open_world: OpenWorld, action: str) -> None:
        assert self.reason(open_world(), action, _stolen) == "message: is of site 1, expected 2"

    def test_more_bytes_than_a_message_can_have(self, open_world: OpenWorld) -> None:
        def change(world: World, crossing: Crossing) -> RecordDict:
            return _with_body(crossing, bytes(2**24))

        line = self.reason(open_world(), ADVERTISE, change)
        assert line.startswith("Advertisement: 16777216 bytes, expected at most ")

    def test_another_number_of_parameters(self, open_world: OpenWorld) -> None:
        """Signed as it must be: nothing else is wrong with it."""

        def change(world: World, crossing: Crossing) -> RecordDict:
            sent = decode(Upload, _body(crossing)[1])
            words = np.append(sent.vector, np.zeros(1, dtype="<u4"))
            return _with_body(crossing, encode(_signed(world, sent, words)))

        world = open_world()
        line = self.reason(world, TRAIN, change)
        words = len(world.sums[-1].total)
        assert line == f"vector: of {words + 1} words, expected {words}"

    def test_another_vector_than_it_signed(self, open_world: OpenWorld) -> None:
        def change(world: World, crossing: Crossing) -> RecordDict:
            sent = decode(Upload, _body(crossing)[1])
            words = sent.vector.copy()
            words[0] += 1
            return _with_body(crossing, encode(replace(sent, vector=words)))

        line = self.reason(open_world(), TRAIN, change)
        assert line.startswith("upload of site-003: its vector or shares are not the ones")

    def test_a_ledger_that_does_not_grow(self, open_world: OpenWorld) -> None:
        world = open_world()
        before = world.ask(1)

        def change(world: World, crossing: Crossing) -> RecordDict:
            sent = decode(Upload, _body(crossing)[1])
            count, head = before.ledgers[LIAR]
            uploaded = replace(sent.uploaded, ledger_count=count, ledger_head=bytes.fromhex(head))
            sent = replace(sent, uploaded=uploaded)
            return _with_body(crossing, encode(_signed(world, sent, sent.vector)))

        first = once(TRAIN, down=False)
        world.alter = lambda crossing: (
            in_place_of(crossing.message, change(world, crossing))
            if first(crossing)
            else crossing.message
        )
        found = world.ask(2)
        world.check_sum(*OTHERS)
        assert "ledger" in found.dropped[LIAR]

    def test_the_upload_of_the_round_before(self, open_world: OpenWorld) -> None:
        world = open_world()
        world.ask(1)
        stale = world.crossed(LIAR, TRAIN, down=False)[0].content
        first = once(TRAIN, down=False)
        world.alter = lambda crossing: (
            in_place_of(crossing.message, stale) if first(crossing) else crossing.message
        )
        found = world.ask(2)
        world.check_sum(*OTHERS)
        assert found.dropped[LIAR].startswith("upload of site-003: in context ")

    def test_arrays_beside_the_masked_vector(self, open_world: OpenWorld) -> None:
        """A site that says more than it may is broken: its reply is not used, nor looked at."""

        def change(world: World, crossing: Crossing) -> RecordDict:
            reply = read_reply(crossing.message)
            assert isinstance(reply, Update)
            return pack(replace(reply, sums={"loss": np.ones(1)}))

        line = self.reason(open_world(), TRAIN, change)
        assert line == "reply: has arrays, expected a masked vector only"


def _signed(world: World, sent: Upload, words: np.ndarray) -> Upload:
    """An upload of other words, which the site itself signs."""
    about = replace(sent.uploaded, vector=digest_of_vector(sent.uploaded.context, words))
    identity = world.sites[LIAR].secure.keys.identity
    return replace(
        sent, vector=words, uploaded=replace(about, signature=identity.sign(about.statement()))
    )


class TestASiteThatIsLiedTo:
    """The server, or who is between, sends site 3 something else: it refuses and debits nothing."""

    def refused(self, world: World, change: Callable[[Any], Any], number: int = 1) -> str:
        first = once(TRAIN, down=True)

        def alter(crossing: Crossing) -> Message:
            if not first(crossing):
                return crossing.message
            task = change(read_task(crossing.content))  # type: ignore[arg-type]
            return in_place_of(crossing.message, pack(task))

        world.alter = alter
        before = world.entries(LIAR)
        found = world.ask(number)
        world.check_sum(*OTHERS)
        assert world.entries(LIAR) == before
        assert LIAR not in world.made or len(world.made[LIAR]) == number - 1
        return str(found.dropped[LIAR])

    def test_another_model(self, open_world: OpenWorld) -> None:
        def change(task: Any) -> Any:  # noqa: ANN401
            name = min(task.arrays)
            return replace(task, arrays={**task.arrays, name: task.arrays[name] + np.float32(1)})

        assert self.refused(open_world(), change) == PROTOCOL

    def test_another_clipping_norm(self, open_world: OpenWorld) -> None:
        line = self.refused(open_world(), lambda task: replace(task, clipping_norm=2.0))
        assert line == f"refused: {Refusal.CONFIGURATION.value}"

    @pytest.mark.parametrize("norm", [0.0, -1.0, math.inf, math.nan, 1e-300, 1e300, 0.5])
    def test_a_clipping_norm_that_adapts(self, open_world: OpenWorld, norm: float) -> None:
        """The server says which one; to one site it says another, or none that there can be."""
        world = open_world(privacy={"mechanism": "site", "epsilon": 8.0, "clipping": "adaptive"})
        line = self.refused(world, lambda task: replace(task, clipping_norm=norm))
        assert line.startswith("refused: ")

    @pytest.mark.parametrize(
        ("field", "factor"), [("sigma", 0.5), ("sigma", 0.0), ("scale", 2.0), ("sensitivity", 0.5)]
    )
    def test_less_noise_than_the_plan_s(
        self, open_world: OpenWorld, field: str, factor: float
    ) -> None:
        def change(task: Any) -> Any:  # noqa: ANN401
            opening = decode(Opening, task.opening)
            blocks = tuple(_scaled(block, field, factor) for block in opening.blocks)
            return replace(task, opening=encode(replace(opening, blocks=blocks)))

        assert self.refused(open_world(), change) == PROTOCOL

    def test_no_opening(self, open_world: OpenWorld) -> None:
        assert self.refused(open_world(), lambda task: replace(task, opening=b"")) == PROTOCOL

    def test_no_deals(self, open_world: OpenWorld) -> None:
        assert self.refused(open_world(), lambda task: replace(task, deals=b"")) == PROTOCOL

    def test_another_s_deals(self, open_world: OpenWorld) -> None:
        world = open_world()

        def change(task: Any) -> Any:  # noqa: ANN401
            other = read_task(world.crossed(2, TRAIN, down=True)[0].content).deals
            assert other != task.deals
            return replace(task, deals=other)

        assert self.refused(world, change) == PROTOCOL

    def test_the_deals_of_an_epoch_before(self, open_world: OpenWorld) -> None:
        world = open_world(secagg={"epoch_rounds": 1})
        world.ask(1)
        old = read_task(world.crossed(LIAR, TRAIN, down=True)[0].content).deals
        assert decode(Deals, old).dealt
        assert self.refused(world, lambda task: replace(task, deals=old), 2) == PROTOCOL

    def test_the_opening_of_the_round_before(self, open_world: OpenWorld) -> None:
        world = open_world()
        world.ask(1)
        old = read_task(world.crossed(LIAR, TRAIN, down=True)[0].content)
        line = self.refused(world, lambda task: replace(task, opening=old.opening), 2)
        assert line == PROTOCOL


def _scaled(block: Block, field: str, factor: float) -> Block:
    return replace(block, **{field: getattr(block, field) * factor})


class TestAServerThatLiesToAll:
    """No honest site takes part, and none debits: there is no round."""

    def test_less_noise(self, open_world: OpenWorld) -> None:
        world = open_world()
        collect = world.channel.secure.collect

        def less(digest: bytes, blocks: tuple[Block, ...], *others: Any) -> Any:  # noqa: ANN401
            return collect(digest, tuple(_scaled(b, "sigma", 0.5) for b in blocks), *others)

        world.channel.secure.collect = less
        self.all_refuse(world)

    @pytest.mark.parametrize("numbers", [Numbers(4, 4, 4, 2), Numbers(4, 3, 4, 1)])
    def test_other_numbers(self, open_world: OpenWorld, numbers: Numbers) -> None:
        """Each site is told which ones the run has: others, even safer ones, are not those."""
        world = open_world()
        secure = world.channel.secure
        secure.federation = replace(secure.federation, numbers=numbers)
        self.all_refuse(world)

    def test_other_options_than_are_signed(self, open_world: OpenWorld) -> None:
        world = open_world()
        task = world.task(1)
        changed = task.config.replace('"epsilon":4.0', '"epsilon":5.0')
        assert changed != task.config
        with pytest.raises(RunError, match=Refusal.COORDINATOR.value):
            world.channel.ask(replace(task, config=changed), {})

    def all_refuse(self, world: World) -> None:
        with pytest.raises(RunError, match="uploaders: 0 sites") as caught:
            world.ask(1)
        assert str(caught.value).count(PROTOCOL) == 4
        assert not world.made
        assert [world.entries(site) for site in ALL] == [{}] * 4


class TestEpochs:
    def test_each_has_so_many_rounds(self, open_world: OpenWorld) -> None:
        """Five rounds of two an epoch: three epochs; who was away in one is back in the next."""
        world = open_world(secagg={"epoch_rounds": 2})
        ledgers: dict[int, tuple[int, str]] = {}
        for number in range(1, 6):
            if number == 3:
                world.lose(LIAR, action=ADVERTISE, down=True)
            if number == 4:  # the site is there, but it is no member of this epoch
                world.alter = lambda crossing: crossing.message
            found = world.ask(number, ledgers=ledgers)
            ledgers |= found.ledgers
            world.check_sum(*(OTHERS if number in {3, 4} else ALL))
            assert found.dropped.get(LIAR) == {
                3: "no reply", 4: "is no member of this epoch",
            }.get(number)  # fmt: skip
        setups = world.crossed(1, ADVERTISE, down=True)
        epochs = [decode(Setup, read_step(one.content).body) for one in setups]
        assert [(one.epoch, one.rounds) for one in epochs] == [(0, 2), (1, 2), (2, 2)]
        openings = [
            decode(Opening, read_task(one.content).opening).round
            for one in world.crossed(1, TRAIN, down=True)
        ]
        assert openings == [0, 1, 0, 1, 0]
        assert world.entries(1) == {"rounds": 5}
        assert world.entries(LIAR) == {"rounds": 3}

    def test_an_evaluation_alone_has_a_sum_of_its_own(self, open_world: OpenWorld) -> None:
        world = open_world()
        world.ask(1, 1)
        world.ask(0, 2)
        world.check_sum(*ALL)
        assert [one.action for one in world.grid.crossings if one.action == EVALUATE]
        assert world.entries(1) == {"rounds": 1, "evaluations": 2}


def test_the_noise_test_finds_a_site_without(
    open_world: OpenWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mutation: one site leaves one block as it is."""
    world = open_world()
    add = discrete.add_noise
    left: list[int] = []

    def none_once(words: np.ndarray, stretch: int, coins: Any) -> None:  # noqa: ANN401
        if coins is world.sites[LIAR].coins and not left:
            left.append(len(words))
            return
        add(words, stretch, coins)

    monkeypatch.setattr(discrete, "add_noise", none_once)
    world.ask(1)
    world.check_sum(*ALL)
    with pytest.raises(AssertionError, match="update"):
        check_noise(world, ALL)


def test_the_noise_test_finds_half_of_it(
    open_world: OpenWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = open_world()
    add = discrete.add_noise
    monkeypatch.setattr(
        discrete, "add_noise", lambda words, k, coins: add(words, max(0, k - 1) // 2, coins)
    )
    world.ask(1)
    with pytest.raises(AssertionError, match="update"):
        check_noise(world, ALL)
