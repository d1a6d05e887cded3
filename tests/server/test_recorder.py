"""What crosses the grid in a secure run: all of it is parsed, and none of it tells of records."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
from scipy.stats import chi2

from fedveil.client import app as client_app_module
from fedveil.data_prep.images import Images
from fedveil.flower import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from fedveil.models.state import Arrays
from fedveil.privacy.books import Head
from fedveil.privacy.secagg.encoding import decode, encode
from fedveil.privacy.secagg.keys import is_signed, public_of
from fedveil.privacy.secagg.messages import (
    Advertisement,
    Confirmation,
    Confirmations,
    Deal,
    Deals,
    Roster,
    Unmasking,
    Upload,
    Uploaders,
    digest_of_seed,
    digest_of_shares,
    digest_of_vector,
    statement_on_uploaders,
)
from fedveil.privacy.secagg.sealed import SealedReply
from fedveil.privacy.secagg.shamir import combine
from fedveil.privacy.secagg.terms import Opening, Setup
from fedveil.server.simulation.local import local_grid
from fedveil.server.simulation.recorder import Crossing, RecordingGrid
from fedveil.wire import (
    ADVERTISE,
    CONFIRM,
    DEAL,
    EVALUATE,
    STATISTICS,
    TRAIN,
    UNMASK,
    Task,
    Update,
    pack,
    read_reply,
    read_step,
    read_task,
    to_bytes,
)

# Of an order that Opacus does not use; `privacy.accounting` ignores it, pytest forgets that.
pytestmark = pytest.mark.filterwarnings("ignore:Optimal order is the:UserWarning")

World = Any
OpenWorld = Callable[..., World]
ALL = (1, 2, 3, 4)
ALARM = 1e-7
TASKS = (STATISTICS, TRAIN, EVALUATE)  # in the order in which a run asks
STEPS: dict[str, tuple[type, type]] = {
    ADVERTISE: (Setup, Advertisement),
    DEAL: (Roster, Deal),
    CONFIRM: (Uploaders, Confirmation),
    UNMASK: (Confirmations, Unmasking),
}

SHARE = {"destination", "source", "kind", "nonce", "box"}
UPLOADED = {
    "site", "context", "vector", "seed", "channel", "shares", "ledger_count", "ledger_head",
    "signature",
}  # fmt: skip
MAY_CROSS: dict[type, set[str]] = {
    Advertisement: {"site", "setup", "channel", "masks", "signature"},
    Deal: {"site", "channel", *(f"shares.{one}" for one in SHARE), "signature"},
    Upload: {
        "vector",
        *(f"uploaded.{one}" for one in UPLOADED),
        *(f"shares.{one}" for one in SHARE),
    },
    Confirmation: {"site", "context", "signature"},
    Unmasking: {
        "site", "context", "seeds.owner", "seeds.value", "masks.owner", "masks.value", "signature",
    },
}  # fmt: skip
"""Every field that a site may send in a secure run; each is looked at in `Reader`."""
FACTS = {"run-id", "round", "evaluation", "statistics", "ledger-count", "ledger-hash"}


def leaves(value: Any, path: str = "") -> Iterator[str]:  # noqa: ANN401
    """The paths of all fields in a message, those of items without their number."""
    if is_dataclass(value):
        for field in fields(value):
            yield from leaves(getattr(value, field.name), f"{path}.{field.name}".lstrip("."))
    elif isinstance(value, tuple) and value and is_dataclass(value[0]):
        for item in value:
            yield from leaves(item, path)
    elif not (isinstance(value, tuple) and not value):
        yield path


class Reader:
    """Reads all that crossed in a secure run, and refuses what it does not know.

    Attributes:
        words: The masked vectors.
        keys: All public keys, nonces, boxes and revealed shares: all that is random.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.words: list[np.ndarray] = []
        self.keys: list[bytes] = []
        self.setup: Setup | None = None
        self.opening: Opening | None = None
        self.sent: dict[tuple[type, int], Any] = {}

    def read(self) -> None:
        for crossing in self.world.grid.crossings:
            assert crossing.content is not None
            if crossing.down:
                self._asked(crossing)
            else:
                self._answered(crossing)
        assert len(set(self.keys)) == len(self.keys)  # none is used twice

    # What sites are asked.

    def _asked(self, crossing: Crossing) -> None:
        assert crossing.content is not None
        if crossing.action in TASKS:
            self._task(crossing.site, read_task(crossing.content))
            return
        step = read_step(crossing.content)
        assert step.run_id == self.world.channel.run_id
        body: Any = decode(STEPS[crossing.action][0], step.body)
        assert encode(body) == step.body
        if isinstance(body, Setup):
            self.setup = body
            assert body == replace(body, run=step.run_id, numbers=self.world.plan.numbers)
            pinned = dict(self.world.channel.identities)
            assert {one.name: one.identity for one in body.roster} == pinned
        elif isinstance(body, Roster):
            assert list(body.advertisements) == self._of_all(Advertisement)
        elif isinstance(body, Uploaders):
            sent = self._of_all(Upload)
            assert list(body.uploaded) == [one.uploaded for one in sent]
            assert body.shares == self._shares_for(crossing.site, sent)
            assert (body.round, body.context, body.dropped) == (*self._round(), ())
        else:
            assert isinstance(body, Confirmations)
            assert list(body.confirmations) == self._of_all(Confirmation)
            assert (body.round, body.context) == self._round()

    def _task(self, site: int, task: Task) -> None:
        """Public all of it: configuration, released models, synthetic questions."""
        asked = self.world.task(task.round, task.evaluation)
        for name in ("run_id", "config", "schema", "coordinator", "signature", "clipping_norm"):
            assert getattr(task, name) == getattr(asked, name)
        for name in ("arrays", "released", "exam"):
            found, expected = getattr(task, name), getattr(asked, name)
            assert found.keys() == expected.keys()
            assert all(np.array_equal(found[key], expected[key]) for key in found)
        self.world.sites[site]._budget.ledger.check_head(Head(*task.ledger))
        self.opening = decode(Opening, task.opening)
        assert encode(self.opening) == task.opening
        if task.deals:
            deals, sent = decode(Deals, task.deals), self._of_all(Deal)
            assert encode(deals) == task.deals
            assert list(deals.dealt) == [one.dealt() for one in sent]
            assert deals.shares == self._shares_for(site, sent)

    def _of_all(self, kind: type) -> list[Any]:
        return [self.sent[kind, site] for site in ALL]

    @staticmethod
    def _shares_for(site: int, sent: list[Any]) -> tuple[Any, ...]:
        return tuple(s for one in sent for s in one.shares if s.destination == site - 1)

    def _round(self) -> tuple[int, bytes]:
        assert self.opening is not None
        return self.opening.round, self.opening.context

    # What they answer.

    def _answered(self, crossing: Crossing) -> None:
        content, site = crossing.content, crossing.site
        assert content is not None
        if crossing.action in TASKS:
            assert set(content) == {"facts", "arrays", "sums", "upload"}
            assert set(content["facts"]) == FACTS
            reply = read_reply(crossing.message)
            assert isinstance(reply, Update)
            assert not reply.arrays
            assert not reply.sums
            asked = read_task(self.world.crossed(site, crossing.action, down=True)[-1].content)
            assert reply.run_id == asked.run_id
            numbers = reply.round, reply.evaluation, reply.statistics
            assert numbers in self.world.asked
            kind: type = Upload
            bytes_ = reply.upload
        else:
            assert set(content) == {"facts", "step"}
            assert set(content["facts"]) == {"run-id"}
            step = read_step(content)
            assert step.run_id == self.world.channel.run_id
            kind, bytes_ = STEPS[crossing.action][1], step.body
        body: Any = decode(kind, bytes_)
        assert encode(body) == bytes_  # there is nothing behind, or in between
        assert set(leaves(body)) <= MAY_CROSS[kind], kind.__name__
        self.sent[kind, site] = body
        checks: dict[type, Callable[[int, Any], None]] = {
            Advertisement: self._advertisement,
            Deal: self._deal,
            Upload: self._upload,
            Confirmation: self._confirmation,
            Unmasking: self._unmasking,
        }
        checks[kind](site, body)
        if kind is Upload:
            assert isinstance(reply, Update)
            signed = body.uploaded
            assert reply.ledger == (signed.ledger_count, signed.ledger_head.hex())

    def _signed(self, site: int, body: Any, statement: bytes) -> None:  # noqa: ANN401
        assert body.site == site - 1
        identity = self.world.channel.identities[f"site-{site:03d}"]
        assert is_signed(identity, statement, body.signature)

    def _advertisement(self, site: int, body: Advertisement) -> None:
        assert self.setup is not None
        assert body.setup == self.setup.digest
        assert len(body.masks) == self.setup.rounds
        self._signed(site, body, body.statement())
        self.keys += [body.channel, *body.masks]

    def _deal(self, site: int, body: Deal) -> None:
        roster = Roster(tuple(self._of_all(Advertisement)))
        self._signed(site, body, body.dealt().statement(roster.digest))
        assert self.setup is not None
        self._sealed(site, body, 1, 32 * self.setup.rounds + 16)

    def _sealed(self, site: int, body: Deal | Upload, kind: int, length: int) -> None:
        """Shares are ciphertext, one for each other site and as long as it has to be."""
        others = [other - 1 for other in ALL if other != site]
        routes = [(one.kind, one.source, one.destination) for one in body.shares]
        assert routes == [(kind, site - 1, other) for other in others]
        assert {len(one.box) for one in body.shares} == {length}
        channel = body.channel if isinstance(body, Deal) else body.uploaded.channel
        self.keys += [channel, *(one.nonce + one.box for one in body.shares)]

    def _upload(self, site: int, body: Upload) -> None:
        signed = body.uploaded
        assert self.opening is not None
        assert signed.context == self.opening.context
        assert signed.vector == digest_of_vector(signed.context, body.vector)
        assert signed.shares == digest_of_shares(body.shares)
        self._signed(site, signed, signed.statement())
        ledger = self.world.sites[site]._budget.ledger
        ledger.check_head(Head(signed.ledger_count, signed.ledger_head.hex()))
        self._sealed(site, body, 2, 32 + 16)
        assert len(body.vector) == self.opening.length
        self.words.append(body.vector)
        self.keys.append(signed.seed)

    def _confirmation(self, site: int, body: Confirmation) -> None:
        assert self.opening is not None
        assert body.context == self.opening.context
        statement = statement_on_uploaders(body.context, tuple(n - 1 for n in ALL))
        self._signed(site, body, statement)

    def _unmasking(self, site: int, body: Unmasking) -> None:
        """Shares of self-mask seeds, which are random, and right: they open what was signed."""
        assert self.opening is not None
        assert body.context == self.opening.context
        assert not body.masks
        self._signed(site, body, body.statement())
        assert [one.owner for one in body.seeds] == [0, 1, 2, 3]
        self.keys += [one.value for one in body.seeds]
        if site < ALL[-1]:
            return
        given = {n - 1: self.sent[Unmasking, n].seeds for n in ALL[:3]}
        for owner in range(4):
            seed = combine({place: seeds[owner].value for place, seeds in given.items()})
            uploaded = self.sent[Upload, owner + 1].uploaded
            assert digest_of_seed(body.context, owner, seed) == uploaded.seed


def chi_squared(counts: np.ndarray) -> None:
    """Counts of equally likely bins; by chance it fails once in 1 / `ALARM`."""
    expected = counts.sum() / len(counts)
    assert expected > 20
    total = float(np.square(counts - expected).sum() / expected)
    low, high = chi2.ppf([ALARM / 2, 1 - ALARM / 2], len(counts) - 1)
    assert low < total < high, "the words are not uniform"


def check_uniform(words: list[np.ndarray]) -> None:
    """Masked words: their bytes and their high bits, of all and of each long vector by itself."""
    long = [part for part in words if len(part) > 1500]
    for part in (np.concatenate(words), *long):
        chi_squared(np.bincount(part.view(np.uint8), minlength=256))
        chi_squared(np.bincount(part >> 26, minlength=64))


def rounds_of(world: World) -> World:
    """All that a run asks: statistics, if it has any; a round, one with an evaluation, the last."""
    world.asked = {(1, 0, 0), (2, 1, 0), (0, 2, 0)}
    ledgers: Mapping[int, tuple[int, str]] = {}
    if world.plan.statistics:
        world.asked.add((0, 0, 1))
        ledgers = world.ask(0, statistics=1).ledgers
    ledgers = world.ask(1, ledgers=ledgers).ledgers
    ledgers = world.ask(2, 1, ledgers=ledgers).ledgers
    world.ask(0, 2, ledgers=ledgers)
    return world


def check_all(world: World) -> None:
    """Nothing but what may cross has crossed."""
    reader = Reader(world)
    reader.read()
    assert len(reader.words) == len(world.asked) * len(ALL)
    check_uniform(reader.words)


PLANS: dict[str, dict[str, Any]] = {
    "distributed": {"privacy": {"mechanism": "distributed"}},
    "statistics": {"privacy": {"mechanism": "distributed", "statistics_share": 0.3}},
    "figures": {
        "privacy": {"mechanism": "distributed", "epsilon": 20.0},
        "evaluation": {"training_share": 0.2},
    },
    "site": {"privacy": {"mechanism": "site", "epsilon": 8.0}},
    "adaptive": {"privacy": {"mechanism": "site", "epsilon": 8.0, "clipping": "adaptive"}},
    "none": {"privacy": {"mechanism": "none"}},
    "local": {"privacy": {"mechanism": "local", "epsilon": 20.0}},
    "central": {"privacy": {"mechanism": "central", "epsilon": 8.0}},
}


def options_of(name: str) -> dict[str, Any]:
    options = {key: dict(value) for key, value in PLANS[name].items()}
    if name == "none":
        options["privacy"]["epsilon"] = 4.0
    return options | {"aggregation": {"encryption": "secagg"}}


def black(raw: Images) -> Images:
    """The same number of records, all of them zero."""
    return replace(raw, pixels=np.zeros_like(raw.pixels))


def negative(raw: Images) -> Images:
    """Other records, and other labels."""
    return replace(raw, pixels=255 - raw.pixels, labels=raw.labels[::-1].copy())


@pytest.mark.parametrize("name", PLANS)
def test_nothing_but_what_may_cross_has_crossed(open_world: OpenWorld, name: str) -> None:
    check_all(rounds_of(open_world(fixed=True, **options_of(name))))


def test_of_zeros_without_noise_the_words_are_uniform(open_world: OpenWorld) -> None:
    """Under `none` the blocks have no noise: the masks alone hide them."""
    world = rounds_of(open_world(fixed=True, change=black, **options_of("none")))
    check_all(world)
    opening = decode(Opening, read_task(world.crossed(1, TRAIN, down=True)[0].content).opening)
    assert {block.sigma for block in opening.blocks} == {0.0}
    clear = world.made[1][-1].clear
    assert (clear == 0).mean() > 0.5  # and yet


# What may be another with other records: the masked words, their hash, and signatures on it.
MAY_DIFFER = {"vector", "uploaded.vector", "uploaded.signature"}


@pytest.mark.parametrize("name", ["distributed", "statistics", "site", "none"])
def test_with_other_records_nothing_else_differs(open_world: OpenWorld, name: str) -> None:
    """Equal coins everywhere: messages are equal to the byte, but for the words and their hash."""
    options = options_of(name)
    one = rounds_of(open_world("one", fixed=True, **options))
    other = rounds_of(open_world("other", fixed=True, change=negative, **options))
    found: set[str] = set()
    for left, right in zip(up_of(one), up_of(other), strict=True):
        assert (left.site, left.action) == (right.site, right.action)
        found |= set(differences(left, right))
    assert found == MAY_DIFFER
    # Under equal masks the words differ as the plain vectors do, and by nothing else.
    for site in ALL:
        for number, made in enumerate(one.made[site]):
            plain = made.noised - other.made[site][number].noised
            masked = uploads(one, site)[number].vector - uploads(other, site)[number].vector
            assert np.array_equal(plain, masked)
            assert plain.any()


def test_with_equal_records_nothing_differs(open_world: OpenWorld) -> None:
    """The control of the test above: chance is fixed in all of it."""
    worlds = [rounds_of(open_world(name, fixed=True)) for name in ("one", "other")]
    for left, right in zip(*map(up_of, worlds), strict=True):
        assert not set(differences(left, right))


def test_records_that_cannot_be_read_change_nothing_else(open_world: OpenWorld) -> None:
    def unreadable() -> Any:  # noqa: ANN401
        raise ValueError("PATIENT-4711")

    one, other = (open_world(name, fixed=True) for name in ("one", "other"))
    other.sites[2]._read = unreadable
    found: set[str] = set()
    for left, right in zip(up_of(rounds_of(one)), up_of(rounds_of(other)), strict=True):
        found |= set(differences(left, right))
    assert found == MAY_DIFFER


def up_of(world: World) -> list[Crossing]:
    """What the sites sent, in an order of its own."""
    up = [crossing for crossing in world.grid.crossings if not crossing.down]
    return sorted(up, key=lambda one: (one.site,))


def uploads(world: World, site: int) -> list[Upload]:
    return [
        decode(Upload, read_reply(one.message).upload)  # type: ignore[union-attr]
        for action in TASKS
        for one in world.crossed(site, action, down=False)
    ]


def differences(left: Crossing, right: Crossing) -> Iterator[str]:
    """The paths of what differs; of what is no field of a body, the record's name."""
    assert left.content is not None
    assert right.content is not None
    for name in left.content.keys() | right.content.keys():
        if name in {"upload", "step"}:
            kind = Upload if name == "upload" else STEPS[left.action][1]
            contents: list[Any] = [left.content, right.content]
            bodies: list[Any] = [decode(kind, one[name]["bytes"].data) for one in contents]
            yield from differing(*bodies)
        elif repr(left.content[name]) != repr(right.content[name]):
            yield name


def differing(left: Any, right: Any, path: str = "") -> Iterator[str]:  # noqa: ANN401
    if is_dataclass(left):
        for field in fields(left):
            name = f"{path}.{field.name}".lstrip(".")
            yield from differing(getattr(left, field.name), getattr(right, field.name), name)
    elif isinstance(left, tuple) and left and is_dataclass(left[0]):
        for one, other in zip(left, right, strict=True):
            yield from differing(one, other, path)
    elif not np.array_equal(left, right):
        yield path


class TestMutations:
    """A client that is broken on purpose is found."""

    def test_a_loss_in_the_reply(
        self, open_world: OpenWorld, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.spoil(monkeypatch, lambda sent: replace(sent, sums={"loss": np.array([0.25])}))
        world = open_world(fixed=True)
        with pytest.raises(Exception, match="has arrays, expected a masked vector only"):
            world.ask(1)
        with pytest.raises(AssertionError, match="sums"):
            self.read(world)

    def test_a_count_of_records_among_the_facts(
        self, open_world: OpenWorld, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = pack

        def packed(message: Any) -> RecordDict:  # noqa: ANN401
            content = made(message)
            content.config_records["facts"]["records"] = 17
            return content

        monkeypatch.setattr(client_app_module, "pack", packed)
        world = open_world(fixed=True)
        with pytest.raises(Exception, match="expected the keys"):
            world.ask(1)
        with pytest.raises(AssertionError):
            self.read(world)

    def test_a_count_behind_the_body(
        self, open_world: OpenWorld, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.spoil(monkeypatch, lambda sent: replace(sent, upload=sent.upload + b"17"))
        world = open_world(fixed=True)
        with pytest.raises(Exception, match="uploaders: 0 sites"):
            world.ask(1)
        with pytest.raises(Exception, match="Upload"):
            self.read(world)

    def test_a_loss_in_the_round_s_number(
        self, open_world: OpenWorld, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.spoil(monkeypatch, lambda sent: replace(sent, evaluation=4711))
        world = open_world(fixed=True)
        world.ask(1)
        with pytest.raises(AssertionError):
            self.read(world)

    def test_a_loss_in_the_statistics_number(
        self, open_world: OpenWorld, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.spoil(monkeypatch, lambda sent: replace(sent, statistics=4711))
        world = open_world(fixed=True)
        world.ask(1)
        with pytest.raises(AssertionError):
            self.read(world)

    def test_another_ledger_in_the_open_than_is_signed(
        self, open_world: OpenWorld, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.spoil(monkeypatch, lambda sent: replace(sent, ledger=(4711, "ab" * 32)))
        world = open_world(fixed=True)
        world.ask(1)
        with pytest.raises(AssertionError):
            self.read(world)

    @pytest.mark.parametrize("name", ["distributed", "none"])
    def test_a_vector_without_masks(
        self, open_world: OpenWorld, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        """Signed and sealed as ever; only the masks are left out, of all sites or of one."""
        from fedveil.privacy.secagg import site as party

        monkeypatch.setattr(party, "add_masks", lambda *_: None)
        world = open_world(fixed=True, **options_of(name))
        world.ask(1)
        reader = self.read(world)
        with pytest.raises(AssertionError, match="not uniform"):
            check_uniform(reader.words)
        with pytest.raises(AssertionError, match="not uniform"):
            check_uniform(reader.words[:1])

    def test_a_field_that_nobody_knows(self) -> None:
        assert not {"losses"} <= MAY_CROSS[Upload]
        for kind, known in MAY_CROSS.items():
            direct = {field.name for field in fields(kind)}
            assert direct == {path.partition(".")[0] for path in known}

    @staticmethod
    def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[Update], Update]) -> None:
        made = client_app_module._uploaded
        monkeypatch.setattr(
            client_app_module, "_uploaded", lambda task, sent: change(made(task, sent))
        )

    @staticmethod
    def read(world: World) -> Reader:
        world.asked = {(1, 0, 0)}
        reader = Reader(world)
        reader.read()
        return reader


class TestSealed:
    """A relay, which is what the recorder is, holds neither the aggregator's key nor a site's."""

    OPTIONS: ClassVar[dict[str, Any]] = {
        "privacy": {"mechanism": "central", "epsilon": 8.0},
        "aggregation": {"encryption": "sealed"},
    }

    @pytest.fixture
    def world(self, open_world: OpenWorld) -> World:
        return open_world(fixed=True, **self.OPTIONS)

    def test_a_relay_learns_no_array(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        plain: list[Update] = []
        made = to_bytes

        def noted(update: Update) -> bytes:
            plain.append(update)
            return made(update)

        monkeypatch.setattr(client_app_module, "to_bytes", noted)
        world.ask(1, 1)
        assert len(plain) == 4
        boxes = []
        for crossing in up_of(world):
            reply = read_reply(crossing.message)
            assert isinstance(reply, Update)
            assert not reply.arrays
            assert not reply.sums
            assert set(crossing.content["facts"]) == FACTS  # type: ignore[index]
            sealed = decode(SealedReply, reply.upload)
            assert encode(sealed) == reply.upload
            assert sealed.site == f"site-{crossing.site:03d}"
            boxes.append(np.frombuffer(sealed.box, dtype=np.uint8))
            every = b"".join(
                array.data
                for record in crossing.content.values()  # type: ignore[union-attr]
                if isinstance(record, ArrayRecord)
                for array in record.values()
            )
            for update in plain:
                for array in (*update.arrays.values(), *update.sums.values()):
                    if array.size >= 2 and array.any():
                        assert array.tobytes()[:16] not in every
        assert len({len(box) for box in boxes}) == 1
        chi_squared(np.bincount(np.concatenate(boxes), minlength=256))

    def test_the_server_opens_what_the_sites_sent(self, open_world: OpenWorld) -> None:
        sealed = open_world("sealed", fixed=True, **self.OPTIONS).ask(1, 1)
        options = self.OPTIONS | {"aggregation": {"encryption": "none"}}
        plain = open_world("plain", fixed=True, **options).ask(1, 1)
        assert sealed.sites == plain.sites == ALL
        for one, other in zip(sealed.parts, plain.parts, strict=True):
            assert_equal(one.arrays, other.arrays)
            assert_equal(one.sums, other.sums)

    def swapped(self, world: World, content: Callable[[], RecordDict], number: int) -> str:
        def alter(crossing: Crossing) -> Message:
            if not crossing.down and crossing.site == 3:
                crossing.message.content = content()
            return crossing.message

        world.alter = alter
        found = world.ask(number)
        assert found.sites == (1, 2, 4)
        return str(found.dropped[3])

    def test_one_of_another_site_is_dropped(self, world: World) -> None:
        line = self.swapped(world, lambda: world.crossed(2, TRAIN, down=False)[-1].content, 1)
        assert line == "reply: is another site's"

    def test_one_that_another_site_signed_is_dropped(self, world: World) -> None:
        def forged() -> RecordDict:
            reply = read_reply(world.crossed(2, TRAIN, down=False)[-1].message)
            assert isinstance(reply, Update)
            sealed = decode(SealedReply, reply.upload)
            return pack(replace(reply, upload=encode(replace(sealed, site="site-003"))))

        line = self.swapped(world, forged, 1)
        assert line.startswith("reply of site-003: its signature does not hold")

    def test_one_of_another_round_is_dropped(self, world: World) -> None:
        world.ask(1)
        before = world.crossed(3, TRAIN, down=False)[0]

        def stale() -> RecordDict:
            reply = read_reply(before.message)
            assert isinstance(reply, Update)
            return pack(replace(reply, round=2))

        line = self.swapped(world, stale, 2)
        assert line.startswith("reply of site-003: in context ")

    def test_one_that_was_altered_is_dropped(self, world: World) -> None:
        def altered() -> RecordDict:
            reply = read_reply(world.crossed(3, TRAIN, down=False)[-1].message)
            assert isinstance(reply, Update)
            sealed = decode(SealedReply, reply.upload)
            box = bytearray(sealed.box)
            box[-1] ^= 1
            return pack(replace(reply, upload=encode(replace(sealed, box=bytes(box)))))

        line = self.swapped(world, altered, 1)
        assert line.startswith("reply of site-003: its signature does not hold")

    def test_one_with_arrays_beside_is_dropped(self, world: World) -> None:
        def more() -> RecordDict:
            reply = read_reply(world.crossed(3, TRAIN, down=False)[-1].message)
            assert isinstance(reply, Update)
            return pack(replace(reply, sums={"loss": np.ones(1)}))

        line = self.swapped(world, more, 1)
        assert line == "reply: has arrays, expected a sealed reply only"

    @pytest.mark.parametrize("upload", [b"", b"PATIENT-4711", bytes(4000)])
    def test_garbage_is_dropped(self, world: World, upload: bytes) -> None:
        def garbage() -> RecordDict:
            reply = read_reply(world.crossed(3, TRAIN, down=False)[-1].message)
            assert isinstance(reply, Update)
            return pack(replace(reply, upload=upload))

        assert "PATIENT" not in self.swapped(world, garbage, 1)

    def test_the_aggregator_s_key_is_signed(self, world: World) -> None:
        """A relay that puts its own in its place is refused: it would open every reply."""

        def alter(crossing: Crossing) -> Message:
            if crossing.down:
                task = read_task(crossing.message.content)
                crossing.message.content = pack(replace(task, aggregator=public_of(bytes(32))))
            return crossing.message

        world.alter = alter
        with pytest.raises(Exception, match="the run is not signed by the coordinator"):
            world.ask(1)


def assert_equal(left: Arrays, right: Arrays) -> None:
    assert left.keys() == right.keys()
    assert all(np.array_equal(left[name], right[name]) for name in left)


class TestTheGrid:
    def grid(self) -> Any:  # noqa: ANN401
        from fedveil.flower import ClientApp

        app = ClientApp()

        @app.train("step")
        def step(message: Message, context: Context) -> Message:
            if context.node_id == 2:
                raise ValueError("PATIENT-4711")
            message.content.config_records["facts"]["seen"] = context.node_id
            return Message(message.content, reply_to=message)

        return local_grid(app, [1, 2, 3], 7)

    def messages(self) -> list[Message]:
        content = RecordDict({"facts": ConfigRecord({"round": 1})})
        return [Message(content, node, "train.step", group_id="1") for node in (1, 2, 3)]

    def test_all_is_passed_on_and_kept(self) -> None:
        with self.grid() as inner:
            grid = RecordingGrid(inner)
            replies = {
                reply.metadata.src_node_id: reply
                for reply in grid.send_and_receive(self.messages())
            }
            assert list(grid.get_node_ids()) == [1, 2, 3]
            assert grid.run is inner.run
        assert replies[2].has_error()
        assert replies[1].content["facts"]["seen"] == 1
        assert [(one.down, one.site, one.action) for one in grid.crossings] == [
            *((True, node, "train.step") for node in (1, 2, 3)),
            *((False, node, "train.step") for node in (1, 2, 3)),
        ]
        kept = [one.content for one in grid.crossings]
        assert [c if c is None else dict(c["facts"]) for c in kept] == [
            {"round": 1}, {"round": 1}, {"round": 1},
            {"round": 1, "seen": 1}, None, {"round": 1, "seen": 3},
        ]  # fmt: skip

    def test_what_is_kept_is_nobody_else_s(self) -> None:
        with self.grid() as inner:
            grid = RecordingGrid(inner)
            sent = self.messages()
            [first, *_] = grid.send_and_receive(sent)
        for message in (sent[0], first):
            message.content.config_records["facts"]["spoilt"] = 1
        assert all(
            "spoilt" not in dict(one.content["facts"]) for one in grid.crossings if one.content
        )

    def test_what_is_pushed_and_pulled_is_kept_too(self) -> None:
        with self.grid() as inner:
            grid = RecordingGrid(inner)
            ids = list(grid.push_messages(self.messages()))
            replies: list[Message] = []
            while len(replies) < 3:
                replies += grid.pull_messages(ids)
        assert len(ids) == 3
        assert sorted((one.down, one.site) for one in grid.crossings) == [
            (down, node) for down in (False, True) for node in (1, 2, 3)
        ]

    def test_a_message_may_be_lost_or_altered_either_way(self) -> None:
        def alter(crossing: Crossing) -> Message | None:
            if crossing.down and crossing.site == 1:
                return None
            if not crossing.down and crossing.site == 3:
                return Message(Error(5, ""), reply_to=sent[2])
            return crossing.message

        with self.grid() as inner:
            grid = RecordingGrid(inner, alter)
            sent = self.messages()
            replies = list(grid.send_and_receive(sent))
        assert [one.error.code for one in replies] == [2, 5]
        # It was kept as it was sent.
        assert [one.site for one in grid.crossings if one.down] == [1, 2, 3]
        assert grid.crossings[-1].content is not None
