"""A site's half over Flower: where its keys are, what it answers, and what it refuses first."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedveil.client.secure import (
    STEPS,
    Keys,
    Opened,
    SecureSite,
    check_name,
    open_round,
    upload,
)
from fedveil.config import RunConfig
from fedveil.privacy import vector
from fedveil.privacy.noise import Coins
from fedveil.privacy.plan import Plan, plan
from fedveil.privacy.secagg.aggregator import Aggregator
from fedveil.privacy.secagg.encoding import decode, encode, limit
from fedveil.privacy.secagg.errors import (
    BelowFloorError,
    DifferentContextError,
    DifferentModelError,
    DifferentSetupError,
    LostStateError,
    MalformedMessageError,
    NotKeptError,
    StaleEpochError,
    StateInUseError,
    SwappedIdentityError,
    UnknownSiteError,
)
from fedveil.privacy.secagg.keys import Identity
from fedveil.privacy.secagg.messages import Advertisement, Confirmation, Deal, Unmasking
from fedveil.privacy.secagg.terms import Block, Floor, Member, Numbers, Opening, Setup
from fedveil.wire import ADVERTISE, CONFIRM, DEAL, NO_LEDGER, UNMASK, Step, Task

MakeConfig = Callable[..., RunConfig]
RUN = "run-a"
DIGEST = bytes(range(32))
NAMES = ("a", "b", "c")
IDENTITIES = {name: Identity(name.encode() * 32) for name in NAMES}
PINNED = {name: identity.public for name, identity in IDENTITIES.items()}
NUMBERS = Numbers(3, 3, 3, 1)
SETUP = Setup(RUN, 0, tuple(Member(n, PINNED[n]) for n in NAMES), NUMBERS, 4)
SIZES = vector.Sizes(50, 1.0, (20, 2.0), (2, 1.4), 1797)
HEAD = bytes(32)


class Sites:
    """Three sites and an aggregator, which speak through bytes only."""

    def __init__(self, folder: Path, *, hold: bool = True) -> None:
        self.folder, self._hold = folder, hold
        self.sites = {name: self.open(name) for name in NAMES}
        self.aggregator = Aggregator(SETUP)
        self.deals: Mapping[int, Any] = {}

    def open(self, name: str, floor: Floor = Floor(), **changes: Any) -> SecureSite:  # noqa: ANN401, B008
        """A site on its files."""
        keys = Keys(IDENTITIES[name], PINNED, self.folder / name, name.encode() * 32)
        return SecureSite(name, replace(keys, **changes), floor, hold=self._hold)

    def restart(self, name: str) -> None:
        self.sites[name].close()
        self.sites[name] = self.open(name)

    def answer(self, name: str, action: str, message: Any, run: str = RUN) -> bytes:  # noqa: ANN401
        return self.sites[name].answer(action, Step(run, encode(message))).body

    def set_up(self) -> None:
        for name in NAMES:
            body = self.answer(name, ADVERTISE, SETUP)
            self.aggregator.add_advertisement(decode(Advertisement, body))
        roster = self.aggregator.close_advertisements()
        for name in NAMES:
            self.aggregator.add_deal(decode(Deal, self.answer(name, DEAL, roster)))
        self.deals = self.aggregator.close_deals()

    def begin(self, name: str, task: Task, blocks: tuple[vector.Placed, ...], plan: Plan) -> Opened:
        with self.sites[name].party(RUN) as party:
            return open_round(party, task, blocks, plan)

    def close(self) -> None:
        for site in self.sites.values():
            site.close()


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[Sites]:
    made = Sites(tmp_path)
    yield made
    made.close()


@pytest.fixture
def priced(make_config: MakeConfig) -> Plan:
    privacy = {"mechanism": "distributed", "epsilon": 4.0, "sampling_rate": 1.0}
    found = plan(make_config(federation={"sites": 3, "rounds": 4}, privacy=privacy).resolved())
    assert found.numbers == NUMBERS
    return found


@pytest.fixture
def blocks(priced: Plan) -> tuple[vector.Placed, ...]:
    asked = vector.releases(SIZES, priced, at_sites=False, training=True, evaluating=True)
    return vector.placed(asked, priced)


def task_of(opening: Opening, deals: bytes = b"", **changes: Any) -> Task:  # noqa: ANN401
    """What is looked at of a task before a round."""
    task = Task(
        RUN, 1, 0, "", "", {}, {}, {}, NO_LEDGER, 1.0, b"", b"", b"",
        encode(opening), deals, DIGEST,
    )  # fmt: skip
    return replace(task, **changes)


def opening_of(sites: Sites, blocks: tuple[vector.Placed, ...], **changes: Any) -> Opening:  # noqa: ANN401
    found = sites.aggregator.open_round(DIGEST, tuple(one.block for one in blocks))
    return replace(found, **changes)


def parts_of(blocks: tuple[vector.Placed, ...]) -> dict[str, dict[str, np.ndarray]]:
    return {one.block.name: {"w": np.zeros(one.block.length)} for one in blocks}


class TestWhereItsStateIs:
    def test_steps_of_the_protocol_are_answered(self, sites: Sites) -> None:
        assert set(STEPS) == {ADVERTISE, DEAL, CONFIRM, UNMASK}
        sites.set_up()
        assert set(sites.deals) == {0, 1, 2}
        assert sorted(p.name for p in sites.folder.joinpath("a").iterdir()) == [
            "run-a.state", "run-a.state.lock",
        ]  # fmt: skip

    @pytest.mark.parametrize("hold", [True, False])
    def test_it_lasts(self, tmp_path: Path, hold: bool) -> None:
        sites = Sites(tmp_path, hold=hold)
        first = sites.answer("a", ADVERTISE, SETUP)
        sites.restart("a")
        assert sites.answer("a", ADVERTISE, SETUP) == first
        sites.close()

    def test_what_is_forgotten_is_gone_and_nothing_of_it_comes_back(self, sites: Sites) -> None:
        sites.set_up()
        site, first = sites.sites["a"], sites.answer("a", ADVERTISE, SETUP)
        site.answer(ADVERTISE, Step("run-b", encode(replace(SETUP, run="run-b"))))
        site.forget()
        assert list(sites.folder.joinpath("a").iterdir()) == []
        again = sites.answer("a", ADVERTISE, SETUP)
        keys = {decode(Advertisement, body).masks for body in (first, again)}
        assert len(keys) == 2  # the same keys could serve a second vector

    def test_keys_are_not_in_the_clear(self, sites: Sites) -> None:
        sites.set_up()
        state = (sites.folder / "a" / "run-a.state").read_bytes()
        for public in sites.aggregator._roster.advertisements[0].masks:
            assert public not in state
        assert state.startswith(b"FVST")
        assert (sites.folder / "a" / "run-a.state").stat().st_mode & 0o777 == 0o600

    def test_while_it_holds_a_run_no_other_process_does(self, sites: Sites) -> None:
        sites.answer("a", ADVERTISE, SETUP)
        other = sites.open("a")
        with pytest.raises(StateInUseError, match="another process holds it"):
            other.answer(ADVERTISE, Step(RUN, encode(SETUP)))
        sites.sites["a"].close()
        other.answer(ADVERTISE, Step(RUN, encode(SETUP)))
        other.close()

    def test_where_others_answer_too_it_lets_go(self, tmp_path: Path) -> None:
        sites = Sites(tmp_path, hold=False)
        first = sites.answer("a", ADVERTISE, SETUP)
        assert sites.open("a").answer(ADVERTISE, Step(RUN, encode(SETUP))).body == first

    def test_one_step_at_a_time(self, sites: Sites) -> None:
        """A message that is sent again waits for the first one's answer, and gets the same."""
        with ThreadPoolExecutor(1) as pool:
            with sites.sites["a"].party(RUN) as party:
                again = pool.submit(sites.answer, "a", ADVERTISE, SETUP)
                assert not wait([again], timeout=0.05).done
                first = encode(party.advertise(SETUP))
            assert again.result(timeout=30) == first

    def test_an_error_leaves_it_open_for_the_next_step(self, sites: Sites) -> None:
        wrong = replace(SETUP, run="run-b")
        with pytest.raises(DifferentSetupError):
            sites.answer("a", ADVERTISE, wrong)
        sites.answer("a", ADVERTISE, SETUP)

    def test_one_run_at_a_time_each_with_its_own_keys(self, sites: Sites) -> None:
        other = replace(SETUP, run="run-b")
        one = sites.answer("a", ADVERTISE, SETUP)
        two = sites.answer("a", ADVERTISE, other, "run-b")
        keys = [set(decode(Advertisement, body).masks) for body in (one, two)]
        assert not keys[0] & keys[1]
        assert sites.answer("a", ADVERTISE, SETUP) == one

    def test_who_is_revoked_is_out_of_a_run_that_is_open(self, sites: Sites) -> None:
        sites.set_up()
        site = sites.sites["a"]
        site.pin(PINNED | {"d": bytes(32)})
        assert site._open  # who joins disturbs nobody
        site.pin(PINNED | {"c": bytes(32)})
        with pytest.raises(SwappedIdentityError):
            sites.answer("a", ADVERTISE, replace(SETUP, epoch=1))
        site.pin({name: key for name, key in PINNED.items() if name != "c"})
        with pytest.raises(UnknownSiteError):
            sites.answer("a", ADVERTISE, replace(SETUP, epoch=1))

    @pytest.mark.parametrize("run", ["", "../b", "a/b", "a\nb", "a" * 65, ".hidden/../x", "é"])
    def test_a_run_s_name_is_no_path(self, sites: Sites, run: str) -> None:
        with pytest.raises(MalformedMessageError, match="expected a name of plain characters"):
            check_name(run)
        with pytest.raises(MalformedMessageError):
            sites.answer("a", ADVERTISE, SETUP, run)
        assert not sites.folder.joinpath("a").exists() or not list(
            sites.folder.joinpath("a").iterdir()
        )

    def test_another_s_file_is_refused(self, sites: Sites) -> None:
        sites.answer("a", ADVERTISE, SETUP)
        sites.close()
        (sites.folder / "b").mkdir(exist_ok=True)
        (sites.folder / "a" / "run-a.state").rename(sites.folder / "b" / "run-a.state")
        with pytest.raises(LostStateError):
            sites.answer("b", ADVERTISE, SETUP)
        with pytest.raises(LostStateError):  # and the lock is not left behind
            sites.answer("b", ADVERTISE, SETUP)

    def test_an_identity_that_is_not_the_pinned_one(self, sites: Sites) -> None:
        stranger = sites.open("a", identity=Identity(b"x" * 32))
        with pytest.raises(SwappedIdentityError):
            stranger.answer(ADVERTISE, Step(RUN, encode(SETUP)))

    def test_the_owner_s_floor(self, sites: Sites) -> None:
        careful = sites.open("a", Floor(sites=5, uploaders=3, t_collude=1))
        with pytest.raises(BelowFloorError, match="n = 3: expected at least 5"):
            careful.answer(ADVERTISE, Step(RUN, encode(SETUP)))

    def test_its_secrets_are_not_shown(self) -> None:
        keys = Keys(IDENTITIES["a"], PINNED, Path("a"), b"SECRETSECRETSECRETSECRETSECRET!!")
        assert "SECRET" not in repr(keys)


class TestWhatItReads:
    @pytest.mark.parametrize("action", STEPS)
    @pytest.mark.parametrize("body", [b"", b"PATIENT-4711", bytes(3000)])
    def test_garbage_is_refused_and_changes_nothing(
        self, sites: Sites, action: str, body: bytes
    ) -> None:
        first = sites.answer("a", ADVERTISE, SETUP)
        with pytest.raises(MalformedMessageError):
            sites.sites["a"].answer(action, Step(RUN, body))
        assert sites.answer("a", ADVERTISE, SETUP) == first

    @pytest.mark.parametrize("action", STEPS)
    def test_more_than_a_message_can_have_is_not_read(self, action: str) -> None:
        kind, _ = STEPS[action]
        long = bytes(limit(kind) + 1)
        with pytest.raises(MalformedMessageError, match=f"{kind.__name__}: {len(long)} bytes"):
            decode(kind, long)

    @pytest.mark.parametrize("action", [DEAL, CONFIRM, UNMASK])
    def test_another_step_s_message(self, sites: Sites, action: str) -> None:
        sites.answer("a", ADVERTISE, SETUP)
        with pytest.raises(MalformedMessageError):
            sites.answer("a", action, SETUP)

    def test_an_epoch_that_is_over(self, sites: Sites) -> None:
        sites.answer("a", ADVERTISE, replace(SETUP, epoch=3))
        with pytest.raises(StaleEpochError):
            sites.answer("a", ADVERTISE, SETUP)


class TestARound:
    def test_is_the_sum(
        self, sites: Sites, priced: Plan, blocks: tuple[vector.Placed, ...]
    ) -> None:
        """Through bytes only, with one site that restarts in between."""
        sites.set_up()
        opening = opening_of(sites, blocks)
        made = {}
        for place, name in enumerate(NAMES):
            task = task_of(opening, encode(sites.deals[place]))
            opened = sites.begin(name, task, blocks, priced)
            assert opened.sent is None
            sent = upload(opened, parts_of(blocks), priced, Coins(bytes([place]) * 32), 1, HEAD)
            made[name] = vector.words(parts_of(blocks), blocks, NUMBERS, Coins(bytes([place]) * 32))
            assert not np.array_equal(sent.vector, made[name])
            # Asked for again: the very bytes, and nothing is made anew.
            again = sites.begin(name, task, blocks, priced).sent
            assert again is not None
            assert encode(again) == encode(sent)
            sites.aggregator.add_upload(sent)
        sites.restart("b")
        for place, uploaders in sites.aggregator.close_uploads().items():
            body = sites.answer(NAMES[place], CONFIRM, uploaders)
            sites.restart(NAMES[place])
            assert sites.answer(NAMES[place], CONFIRM, uploaders) == body
            sites.aggregator.add_confirmation(decode(Confirmation, body))
        confirmed = sites.aggregator.close_confirmations()
        for name in NAMES:
            body = sites.answer(name, UNMASK, confirmed)
            sites.restart(name)
            assert sites.answer(name, UNMASK, confirmed) == body
            sites.aggregator.add_unmasking(decode(Unmasking, body))
        assert np.array_equal(sites.aggregator.total(), sum(made.values()))

    def test_a_vector_is_sent_once(
        self, sites: Sites, priced: Plan, blocks: tuple[vector.Placed, ...]
    ) -> None:
        """It is in memory only: a site that restarts does not make another for the same round."""
        sites.set_up()
        task = task_of(opening_of(sites, blocks), encode(sites.deals[0]))
        opened = sites.begin("a", task, blocks, priced)
        upload(opened, parts_of(blocks), priced, Coins(bytes(32)), 1, HEAD)
        sites.restart("a")
        with pytest.raises(NotKeptError):
            sites.begin("a", task, blocks, priced)

    @pytest.mark.parametrize("field", ["sigma", "scale", "sensitivity", "sampling_rate"])
    @pytest.mark.parametrize("which", [0, 1])
    @pytest.mark.parametrize("factor", [0.5, 1 - 1e-15, 1.5])
    def test_blocks_are_the_site_s_own(
        self,
        sites: Sites,
        priced: Plan,
        blocks: tuple[vector.Placed, ...],
        field: str,
        which: int,
        factor: float,
    ) -> None:
        """Less noise in any of them is refused, and so is anything else than the plan's."""
        if field == "sampling_rate" and factor > 1:
            factor = 0.999
        sites.set_up()
        opening = opening_of(sites, blocks)
        changed: list[Block] = [*opening.blocks]
        value = getattr(changed[which], field) * factor
        changed[which] = replace(changed[which], **{field: value})
        other = replace(opening, blocks=tuple(changed))
        deals = encode(sites.deals[0])
        with pytest.raises(DifferentContextError, match="as priced"):
            sites.begin("a", task_of(other, deals), blocks, priced)
        # It has not begun anything: the right one is answered.
        sites.begin("a", task_of(opening, deals), blocks, priced)

    def test_a_block_more_or_less(
        self, sites: Sites, priced: Plan, blocks: tuple[vector.Placed, ...]
    ) -> None:
        sites.set_up()
        opening = opening_of(sites, blocks)
        more = (*opening.blocks, Block("more", 1, 1.0, 1.0, 0.0, 1.0))
        for wrong in (opening.blocks[:1], opening.blocks[::-1], more):
            task = task_of(replace(opening, blocks=wrong), encode(sites.deals[0]))
            with pytest.raises(DifferentContextError, match="as priced"):
                sites.begin("a", task, blocks, priced)

    @pytest.mark.parametrize("numbers", [Numbers(4, 3, 3, 1), Numbers(3, 2, 3, 0), None])
    def test_numbers_are_the_plan_s(
        self,
        sites: Sites,
        priced: Plan,
        blocks: tuple[vector.Placed, ...],
        numbers: Numbers | None,
    ) -> None:
        """The epoch was set up with others than the run is priced for."""
        sites.set_up()
        task = task_of(opening_of(sites, blocks), encode(sites.deals[0]))
        with pytest.raises(DifferentSetupError, match="as priced"):
            sites.begin("a", task, blocks, replace(priced, numbers=numbers))

    def test_the_task_is_everybody_s(
        self, sites: Sites, priced: Plan, blocks: tuple[vector.Placed, ...]
    ) -> None:
        sites.set_up()
        task = task_of(opening_of(sites, blocks), encode(sites.deals[0]), digest=bytes(32))
        with pytest.raises(DifferentModelError):
            sites.begin("a", task, blocks, priced)

    def test_without_an_epoch(
        self, sites: Sites, priced: Plan, blocks: tuple[vector.Placed, ...]
    ) -> None:
        opening = Opening(bytes(32), (0, 1, 2), 0, DIGEST, tuple(one.block for one in blocks))
        with pytest.raises(DifferentSetupError, match="has None"):
            sites.begin("a", task_of(opening), blocks, priced)

    def test_no_vector_without_a_secure_sum(
        self, sites: Sites, priced: Plan, blocks: tuple[vector.Placed, ...]
    ) -> None:
        sites.set_up()
        task = task_of(opening_of(sites, blocks), encode(sites.deals[0]))
        opened = sites.begin("a", task, blocks, priced)
        with pytest.raises(DifferentSetupError, match="expected one"):
            upload(opened, {}, replace(priced, numbers=None), Coins(bytes(32)), 1, HEAD)
