"""A real site from its kit: what it opens with, and all that keeps it from starting."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fedveil.client.deployed import exposed, open_deployed, read_own, refresh_identities
from fedveil.client.site import Site
from fedveil.config import ConfigError, FedveilError, RunConfig
from fedveil.data_prep.schema import Schema, parse_schema
from fedveil.deployment.roster import sign_roster
from fedveil.privacy.books import EMPTY, Head
from fedveil.privacy.ledger import Ledger
from fedveil.privacy.limits import DamagedError, TermsError, UnavailableError
from fedveil.privacy.noise import Coins
from fedveil.privacy.plan import plan
from fedveil.privacy.secagg.errors import SwappedIdentityError, UnknownSiteError
from fedveil.privacy.secagg.keys import Identity
from fedveil.privacy.secagg.terms import Numbers

MakeConfig = Callable[..., RunConfig]
Kit = Any  # `conftest.SiteKit`; test modules cannot import it
AGE = {"name": "age", "kind": "integer", "bounds": [0, 100]}
SEX = {"name": "sex", "kind": "categorical", "categories": ["0", "1"]}


def schema(**options: Any) -> Schema:  # noqa: ANN401
    return parse_schema({"column": [AGE, SEX], **options}, "s.toml")


@pytest.fixture
def opened(site_kit: Kit) -> Iterator[Callable[[], Site]]:
    """Opens the site, as often as it is asked to."""
    made: list[Site] = []

    def make() -> Site:
        made.append(open_deployed(site_kit.kit, Coins(bytes(range(32)))))
        return made[-1]

    yield make
    for site in made:
        site.close()


Opened = Callable[[], Site]


def refusal(opened: Opened, kind: type[FedveilError] = ConfigError) -> str:
    with pytest.raises(kind) as caught:
        opened()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def config(make_config: MakeConfig) -> RunConfig:
    return make_config(privacy={"epsilon": 1.0, "sampling_rate": 1.0}).resolved()


def debit(site: Site, config: RunConfig, run: str = "run-a", of: Schema | None = None) -> Head:
    """The first round of a run."""
    return site.debit(run, "t" * 64, [("rounds", 1)], EMPTY, config, of or schema(), plan(config))


class TestASite:
    def test_is_what_its_kit_says(self, site_kit: Kit, opened: Opened) -> None:
        site = opened()
        assert site.name == "st-mary"
        assert site.secure.keys.identity.public == site_kit.identity.public
        assert set(site.secure.keys.pinned) == {"a-site", "b-site", "st-mary"}
        assert site.secure.keys.durable
        assert site.secure.keys.folder == site_kit.folder / "state" / "secagg"
        assert (site.policy.min_sites, site.policy.mechanisms) == (3, ("distributed", "site"))
        assert list(site_kit.folder.glob("state/*.sqlite")) == [
            site_kit.folder / "state" / "ledger.sqlite"
        ]
        ledger = Ledger.open(site_kit.folder / "state" / "ledger.sqlite", read_only=True)
        assert ledger.read().opened == {"site": "st-mary", "simulated": False, "format": 1}
        ledger.close()
        assert exposed(read_own(site_kit.kit)) == []

    def test_knows_its_kits_coordinator_unless_it_names_another(self, site_kit: Kit) -> None:
        own = read_own(site_kit.kit)
        assert own.file.policy.coordinator == site_kit.coordinator.public.hex()
        site_kit.site_toml(f'coordinator = "{"ab" * 32}"')
        assert read_own(site_kit.kit).file.policy.coordinator == "ab" * 32

    def test_reads_its_records_by_its_own_names(
        self, site_kit: Kit, opened: Opened, config: RunConfig
    ) -> None:
        site_kit.write("records.csv", "alter,sex\n" + "30,1\n" * 20)
        site_kit.site_toml(section='[map]\nage = "alter"')
        records = opened().records(config, schema())
        assert sum(len(side.batch.y) for side in (records.training, records.holdout)) == 20
        assert (site_kit.folder / "state" / "records" / "cleaning.json").exists()

    def test_a_ledger_of_its_own_place(self, site_kit: Kit, opened: Opened) -> None:
        toml = (site_kit.folder / "site.toml").read_text(encoding="utf-8")
        text = toml.replace("[policy]", 'ledger = "books/ledger.sqlite"\n[policy]')
        site_kit.write("site.toml", text)
        opened()
        assert (site_kit.folder / "books" / "ledger.sqlite").exists()
        assert (site_kit.folder / "books").stat().st_mode & 0o777 == 0o700

    def test_takes_up_its_ledger_where_it_was(
        self, site_kit: Kit, opened: Opened, config: RunConfig
    ) -> None:
        first = opened()
        head = debit(first, config)
        first.close()
        with pytest.raises(FedveilError, match="release 1 asked"):
            debit(opened(), config)
        number, _, digest = (
            (site_kit.folder / "keys" / "ledger.head").read_text(encoding="utf-8").partition(":")
        )
        assert (int(number), digest.strip()) == head

    def test_reads_its_records_anew_for_each_run(
        self, site_kit: Kit, opened: Opened, config: RunConfig
    ) -> None:
        def count() -> int:
            records = site.records(config, schema())
            return sum(len(side.batch.y) for side in (records.training, records.holdout))

        site = opened()
        site_kit.write("records.csv", "age,sex\n" + "30,1\n" * 20)
        debit(site, config)
        assert count() == 20
        site_kit.write("records.csv", "age,sex\n" + "30,1\n" * 12)  # some were withdrawn
        assert count() == 20  # a run has the records that it began with
        debit(site, config, "run-b")
        assert count() == 12


class TestItsFile:
    @pytest.mark.parametrize(
        ("policy", "section", "said"),
        [
            ("min_site = 3", "", 'policy.min_site: unknown key; did you mean "min_sites"?'),
            ('approval = "maual"', "", 'did you mean "manual"?'),
            ('encryption = ["secag"]', "", 'did you mean "secagg"?'),
            ("", "[mapp]\na = 'b'", 'mapp: unknown key; did you mean "map"?'),
            ("", "[map]\nage = 3", "map.age = 3: must be a valid string"),
            ("epsilon_per_run = 0", "", "policy.epsilon_per_run = 0: must be > 0"),
        ],
    )
    def test_a_typo_is_one_line_and_opens_nothing(
        self, site_kit: Kit, opened: Opened, policy: str, section: str, said: str
    ) -> None:
        site_kit.site_toml(policy, section)
        line = refusal(opened)
        assert line.startswith(f"{site_kit.folder / 'site.toml'}: ")
        assert said in line
        assert not (site_kit.folder / "state").exists()

    def test_missing(self, site_kit: Kit, opened: Opened) -> None:
        (site_kit.folder / "site.toml").unlink()
        assert "cannot be read" in refusal(opened)

    @pytest.mark.parametrize(
        ("old", "new", "said"),
        [
            ('"st-mary"', '"st-john"', 'site.name = "st-john": the kit is of st-mary; use that'),
            ("[policy]", 'keys = "mine"\n[policy]', "a deployed site's keys are in"),
        ],
    )
    def test_of_another_site_or_place(
        self, site_kit: Kit, opened: Opened, old: str, new: str, said: str
    ) -> None:
        text = (site_kit.folder / "site.toml").read_text(encoding="utf-8").replace(old, new)
        site_kit.write("site.toml", text)
        assert said in refusal(opened)


class TestALostLedger:
    """A new one in its place would forget what is spent."""

    @pytest.mark.parametrize("used", [False, True])
    @pytest.mark.parametrize("lost", ["state/ledger.sqlite", "state"])
    def test_keeps_the_site_shut(
        self, site_kit: Kit, opened: Opened, config: RunConfig, lost: str, used: bool
    ) -> None:
        site = opened()
        if used:
            debit(site, config)
        site.close()
        gone = site_kit.folder / lost
        if gone.is_dir():
            shutil.rmtree(gone)
        else:
            for path in gone.parent.glob("ledger.sqlite*"):
                path.unlink()
        for _ in range(2):
            line = refusal(opened, UnavailableError)
            assert line.endswith(
                "is missing; put the ledger back, for a new one would forget what is spent"
            )
        assert not (site_kit.folder / "state" / "ledger.sqlite").exists()

    def test_so_does_one_that_is_older_than_it_was(
        self, site_kit: Kit, opened: Opened, config: RunConfig, tmp_path: Path
    ) -> None:
        opened().close()
        path, kept = site_kit.folder / "state" / "ledger.sqlite", tmp_path / "kept.sqlite"
        shutil.copy(path, kept)
        site = opened()
        debit(site, config)
        site.close()  # it is not opened in between: the debit itself is noted
        for left in path.parent.glob("ledger.sqlite*"):
            left.unlink()
        shutil.copy(kept, path)
        path.chmod(0o600)
        assert "an older copy was put in its place" in refusal(opened, DamagedError)

    def test_so_does_another(self, site_kit: Kit, opened: Opened) -> None:
        opened().close()
        path = site_kit.folder / "state" / "ledger.sqlite"
        path.unlink()
        for left in path.parent.glob("ledger.sqlite-*"):
            left.unlink()
        Ledger.create(path, "st-mary")
        assert "is another than is known elsewhere" in refusal(opened, DamagedError)

    @pytest.mark.parametrize(("name", "simulated"), [("st-mary", True), ("a-site", False)])
    def test_so_does_one_that_is_not_its_own(
        self, site_kit: Kit, opened: Opened, name: str, simulated: bool
    ) -> None:
        state = site_kit.folder / "state"
        state.mkdir(mode=0o700)
        Ledger.create(state / "ledger.sqlite", name, simulated=simulated)
        assert "put st-mary's own there" in refusal(opened, DamagedError)

    @pytest.mark.parametrize("content", ["", "1", "1:zz", "x:" + "a" * 64, "1:" + "A" * 64])
    def test_what_it_knows_of_it_must_be_whole(
        self, site_kit: Kit, opened: Opened, content: str
    ) -> None:
        opened().close()
        site_kit.write("keys/ledger.head", content)
        assert "holds no COUNT:HASH" in refusal(opened, UnavailableError)


class TestPermissions:
    @pytest.mark.parametrize("mode", [0o604, 0o640, 0o620, 0o602, 0o610, 0o666])
    @pytest.mark.parametrize(
        "name",
        [
            "keys/identity.key", "keys/vault.key", "keys/split.key", "keys/ledger.head",
            "state/ledger.sqlite",
        ],
    )  # fmt: skip
    def test_a_secret_that_others_reach_keeps_it_shut(
        self, site_kit: Kit, opened: Opened, name: str, mode: int
    ) -> None:
        opened().close()
        path = site_kit.folder / name
        path.chmod(mode)
        line = refusal(opened)
        assert line.startswith(f"{path}: is open to others than its owner (mode {mode:04o}); ")
        assert line.endswith(f"chmod 600 {path}")
        path.chmod(0o600)
        opened()

    @pytest.mark.parametrize("mode", [0o755, 0o710, 0o701, 0o770])
    @pytest.mark.parametrize("name", ["keys", "state"])
    def test_so_does_such_a_folder(
        self, site_kit: Kit, opened: Opened, name: str, mode: int
    ) -> None:
        opened().close()
        path = site_kit.folder / name
        path.chmod(mode)
        assert refusal(opened).endswith(f"chmod 700 {path}")
        path.chmod(0o700)
        opened()

    def test_all_are_told_of(self, site_kit: Kit, opened: Opened) -> None:
        for name in ("keys/identity.key", "keys/vault.key", "keys"):
            (site_kit.folder / name).chmod(0o755)
        assert len(exposed(read_own(site_kit.kit))) == 3
        assert refusal(opened).endswith(" (and 2 more)")


class TestKeysAndRoster:
    @pytest.mark.parametrize("name", ["identity.key", "vault.key", "split.key"])
    def test_a_key_that_is_missing_is_never_made(
        self, site_kit: Kit, opened: Opened, name: str
    ) -> None:
        path = site_kit.folder / "keys" / name
        path.unlink()
        assert refusal(opened).startswith(f"{path}: is missing; put it back, or make ")
        assert not path.exists()

    @pytest.mark.parametrize("name", ["identity.key", "vault.key", "split.key"])
    @pytest.mark.parametrize("content", ["", "zz", "ab" * 31, "ab" * 33])
    def test_one_that_is_none(self, site_kit: Kit, opened: Opened, name: str, content: str) -> None:
        site_kit.write(f"keys/{name}", content)
        assert "holds no key; put a whole copy back" in refusal(opened, UnavailableError)

    def test_a_roster_without_it_or_with_another_identity(
        self, site_kit: Kit, opened: Opened
    ) -> None:
        site_kit.roster(st_mary=bytes(range(1, 33)))
        line = refusal(opened)
        assert "version 2 has another identity of st-mary than keys/identity.key" in line
        site_kit.members = tuple(one for one in site_kit.members if one.name != "st-mary")
        site_kit.roster()
        assert "version 3 has no site st-mary" in refusal(opened)

    def test_a_roster_that_somebody_else_signed(self, site_kit: Kit, opened: Opened) -> None:
        forged = sign_roster(site_kit.roster(), ec.generate_private_key(ec.SECP256R1()))
        (site_kit.folder / "roster.json").write_bytes(forged)
        assert "is not signed by the federation's authority" in refusal(opened)

    def test_the_newest_of_both_counts(self, site_kit: Kit, opened: Opened) -> None:
        """Of the answer and of what the server handed on since."""
        newer = Identity(b"n" * 32).public
        site_kit.roster(a_site=newer)
        assert opened().secure.keys.pinned["a-site"] == newer
        (site_kit.folder / "roster.json").unlink()
        assert opened().secure.keys.pinned["a-site"] != newer

    def test_none_at_all(self, site_kit: Kit, opened: Opened) -> None:
        for name in ("roster.json", "answer.json"):
            (site_kit.folder / name).unlink()
        assert "roster.json: is missing" in refusal(opened)

    def test_a_newer_one_is_taken_while_it_is_open(self, site_kit: Kit, opened: Opened) -> None:
        site, newer = opened(), Identity(b"n" * 32).public
        refresh_identities(site, site_kit.roster(b_site=newer))
        assert site.secure.keys.pinned["b-site"] == newer
        assert site.secure.keys.identity.public == site_kit.identity.public

    def test_but_none_that_it_is_not_in(self, site_kit: Kit, opened: Opened) -> None:
        site = opened()
        known = site.secure.keys.pinned
        with pytest.raises(ConfigError, match="has another identity of st-mary"):
            refresh_identities(site, site_kit.roster(st_mary=bytes(range(1, 33))))
        site_kit.members = site_kit.members[:-1]
        with pytest.raises(ConfigError, match="has no site st-mary"):
            refresh_identities(site, site_kit.roster())
        assert site.secure.keys.pinned == known

    def test_what_it_says_of_a_secure_sum_beforehand(self, opened: Opened) -> None:
        secure = opened().secure
        secure.check(Numbers(3, 3, 3, 1))
        with pytest.raises(UnknownSiteError, match="3 sites are known here"):
            secure.check(Numbers(4, 3, 3, 1))
        pinned = dict(secure.keys.pinned)
        secure.pin({**pinned, "st-mary": pinned["a-site"]})
        with pytest.raises(SwappedIdentityError):
            secure.check(Numbers(3, 3, 3, 1))


class TestTheSideOfARecord:
    """Which of its own columns a record is known by may not change, or it changes sides unpaid."""

    @pytest.mark.parametrize(
        ("person", "first", "then", "same"),
        [
            (None, "", 'age = "alter"', False),
            (None, 'age = "alter"', 'age = "jahre"', False),
            (None, 'age = "alter"', 'age = "alter"', True),
            (None, "", 'age = "age"', True),
            ("patient", 'patient = "pid"', 'patient = "fall"', False),
            ("patient", "", 'age = "alter"', True),
        ],
    )
    def test_by_the_map(
        self,
        site_kit: Kit,
        opened: Opened,
        config: RunConfig,
        person: str | None,
        first: str,
        then: str,
        same: bool,
    ) -> None:
        declared = schema(person=person)
        site_kit.site_toml(section=f"[map]\n{first}")
        site = opened()
        debit(site, config, of=declared)
        site.close()
        site_kit.site_toml(section=f"[map]\n{then}")
        with (
            nullcontext() if same else pytest.raises(TermsError, match="a record may never change")
        ):
            debit(opened(), config, "run-b", declared)


def test_a_kit_that_is_another_partys(site_kit: Kit) -> None:
    text = (site_kit.folder / "kit.toml").read_text(encoding="utf-8")
    site_kit.write("kit.toml", text.replace('"site"', '"operator"'))
    with pytest.raises(ConfigError, match="is the kit of operator st-mary; give one of a site"):
        _ = site_kit.kit


@pytest.mark.parametrize("content", ["{", "[]", "{}", json.dumps({"certificate": "x"})])
def test_an_answer_that_is_none(site_kit: Kit, opened: Opened, content: str) -> None:
    site_kit.write("answer.json", content)
    assert "is no answer of an authority" in refusal(opened)
