"""`fedveil ledger show|verify|end`: what people see of ledgers, and what programs do."""

import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import fedveil
from fedveil.config import ConfigError, RunConfig
from fedveil.ledgers import find, known_heads, parse_head
from fedveil.privacy.accounting import Releases
from fedveil.privacy.books import Charge, Head, Order, canonical, sealed
from fedveil.privacy.ledger import Ledger
from fedveil.privacy.limits import Lifetime
from fedveil.privacy.plan import Part, Side

MakeConfig = Callable[..., RunConfig]


Call = Callable[..., Any]


@pytest.fixture(name="call")
def _call(call: Call) -> Call:
    """Calls `fedveil ledger`."""
    return partial(call, "ledger")


def part(side: Side, count: int, noise: float) -> Part:
    """Releases over all records of a side."""
    name = "rounds" if side == "training" else "evaluations"
    return Part(name, side, Releases(noise, 1.0, 1), count)  # type: ignore[arg-type]


def made(path: Path, *, simulated: bool = False) -> Path:
    """A ledger of seven entries: one run of two accounts, closed, and one that goes on."""
    Ledger.create(path, path.stem, simulated=simulated)
    with closing(Ledger.open(path)) as ledger:
        for run_id, epsilon in (("run-1", 0.125), ("run-2", 0.25)):
            charges = (
                Charge("training", epsilon, 1e-6, (part("training", 4, 100.0),)),
                Charge("holdout", 0.0625, 1e-6, (part("holdout", 2, 100.0),)),
            )
            order = Order(run_id, "t", "heart", "record", charges)
            ledger.reserve(order, Lifetime(1.5, 1e-5))
        ledger.commit("run-1", [("rounds", 1), ("evaluations", 1)])
        ledger.commit("run-2", [("rounds", 1)])
        ledger.end("run-1")
    return path


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site's ledger."""
    return made(tmp_path / "st-mary.sqlite")


def entries(path: Path) -> list[Any]:
    """All entries, without any code of ours."""
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT * FROM entries ORDER BY sequence").fetchall()


def head(path: Path) -> Head:
    """What a server would know of it."""
    return Head(entries(path)[-1][0], entries(path)[-1][4])


def changed(path: Path, statements: str) -> None:
    """What somebody does to the file."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(statements)


def put_back(path: Path, count: int) -> None:
    """Makes it the sound ledger that it was some entries ago."""
    last = len(entries(path)) - count
    changed(
        path,
        f"DELETE FROM entries WHERE sequence > {last}; UPDATE sqlite_sequence SET seq = {last};",  # noqa: S608
    )


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run without a mechanism; tests work on copies."""
    raw = {
        "federation": {"sites": 2, "rounds": 2},
        "data": {"source": "sklearn:digits"},
        "model": {"family": "vae", "width": 4, "latent": 2, "hidden": 8},
        "privacy": {"mechanism": "none", "statistics_share": 0.0},
        "evaluation": {"samples": 500},
    }
    folder = tmp_path_factory.mktemp("bare") / "run"
    fedveil.simulate(RunConfig.model_validate(raw), out=folder)
    return folder


@pytest.fixture
def run(bare: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    return Path(shutil.copytree(bare, tmp_path / "run"))


def told(result: tuple[object, str, str], code: int = 1) -> str:
    """The one line of an error, and nothing else anywhere."""
    found_code, out, err = result
    assert (found_code, out) == (code, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line


class TestShow:
    def test_a_table(self, call: Call, site: Path) -> None:
        result = call("show", site)
        assert (result.code, result.err) == (0, "")
        first, _, holdout, training = result.out.splitlines()
        assert first == f"{site}: st-mary"
        assert " ".join(holdout.split()) == (
            "heart/record/holdout epsilon 0.125 of 1.5, delta 2e-06 of 1e-05, by addition; "
            "2 runs, 1 of 4 releases made"
        )
        assert " ".join(training.split()) == (
            "heart/record/training epsilon 0.375 of 1.5, delta 2e-06 of 1e-05, by addition; "
            "2 runs, 2 of 8 releases made"
        )

    def test_its_head_is_what_verify_takes(self, call: Call, site: Path) -> None:
        """As the error of `--head` promises."""
        known = head(site)
        assert f"{known.number}:{known.hash}" in call("show", site).out

    def test_json(self, call: Call, site: Path) -> None:
        result = call("show", site, "--json")
        assert (result.code, result.err, len(result.out.splitlines())) == (0, "", 1)
        known = head(site)
        shared = {"delta": [2e-6, 1e-5], "composition": "addition", "runs": 2}
        assert json.loads(result.out) == {
            "ledgers": [
                {
                    "file": str(site),
                    "site": "st-mary",
                    "simulated": False,
                    "entries": 7,
                    "head": known.hash,
                    "accounts": [
                        {
                            "account": "heart/record/holdout",
                            "epsilon": [0.125, 1.5],
                            "made": 1,
                            "reserved": 4,
                            **shared,
                        },
                        {
                            "account": "heart/record/training",
                            "epsilon": [0.375, 1.5],
                            "made": 2,
                            "reserved": 8,
                            **shared,
                        },
                    ],
                }
            ]
        }

    def test_a_folder_of_ledgers(self, call: Call, site: Path, tmp_path: Path) -> None:
        made(tmp_path / "anna.sqlite", simulated=True)
        (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
        lines = call("show", tmp_path).out.splitlines()
        assert [line.split(":")[0] for line in lines if not line.startswith(" ")] == [
            str(tmp_path / "anna.sqlite"),
            str(site),
        ]
        assert "anna, SIMULATED" in lines[0]
        assert "SIMULATED" not in call("show", site).out
        found = json.loads(call("show", ".", "--json").out)["ledgers"]
        assert [ledger["site"] for ledger in found] == ["anna", "st-mary"]

    def test_a_runs_own(self, call: Call, run: Path) -> None:
        found = json.loads(call("show", run, "--json").out)["ledgers"]
        assert [Path(ledger["file"]).name for ledger in found] == [
            "site-001.sqlite",
            "site-002.sqlite",
        ]
        for ledger in found:
            assert ledger["simulated"]
            assert [account["account"] for account in ledger["accounts"]] == [
                "fedveil/record/holdout",
                "fedveil/record/training",
            ]
            assert [(a["made"], a["reserved"]) for a in ledger["accounts"]] == [(2, 2), (2, 2)]
            assert [a["epsilon"] for a in ledger["accounts"]] == [[None, None]] * 2

    def test_an_account_without_noise_says_so_in_capitals(self, call: Call, run: Path) -> None:
        assert call("show", run).out.count("NOT PRIVATE") >= 2

    def test_a_new_ledger_has_no_account(self, call: Call, tmp_path: Path) -> None:
        Ledger.create(tmp_path / "new.sqlite", "new")
        assert json.loads(call("show", "new.sqlite", "--json").out)["ledgers"][0]["accounts"] == []
        assert "epsilon" not in call("show", "new.sqlite").out

    def test_what_is_open_elsewhere_is_shown(self, call: Call, site: Path) -> None:
        with closing(Ledger.open(site)) as ledger:
            ledger.commit("run-2", [("rounds", 2)])
            assert json.loads(call("show", site, "--json").out)["ledgers"][0]["entries"] == 8

    def test_a_damaged_one_shows_no_number(self, call: Call, site: Path, tmp_path: Path) -> None:
        made(tmp_path / "anna.sqlite")
        changed(site, "UPDATE entries SET body = replace(body, '0.25', '0.05')")
        line = told(call("show", tmp_path))
        assert f"{site}: entry 3: its hash does not fit" in line
        assert line in told(call("show", tmp_path, "--json"))

    def test_a_path_without_a_ledger(self, call: Call, tmp_path: Path) -> None:
        line = told(call("show", tmp_path), code=2)
        assert line == (
            f"error: {tmp_path}: holds no ledger; name a ledger or a simulated run's folder"
        )
        assert "gone.sqlite: is missing; put the ledger back" in told(call("show", "gone.sqlite"))
        (tmp_path / "table.csv").write_text("a,b\n" * 99, encoding="utf-8")
        assert "table.csv: file is not a database" in told(call("show", "table.csv"))


class TestVerify:
    def test_a_table(self, call: Call, site: Path) -> None:
        result = call("verify", site)
        assert (result.code, result.err) == (0, "")
        (line,) = result.out.splitlines()
        assert line.startswith(f"{site}: whole, 7 entries, 4 prices recomputed; ")
        assert "held against no known head" in line

    def test_json(self, call: Call, site: Path) -> None:
        result = call("verify", site, "--json")
        assert (result.code, result.err, len(result.out.splitlines())) == (0, "", 1)
        found = json.loads(result.out)
        (ledger,) = found["ledgers"]
        prices = ledger.pop("prices")
        assert found["whole"] is True
        assert ledger == {
            "file": str(site), "entries": 7, "head": head(site).hash, "held_against": None,
        }  # fmt: skip
        assert [(p["run_id"], p["side"], p["stated"]) for p in prices] == [
            ("run-1", "training", 0.125),
            ("run-1", "holdout", 0.0625),
            ("run-2", "training", 0.25),
            ("run-2", "holdout", 0.0625),
        ]
        assert all(0 < price["recomputed"] < price["stated"] for price in prices)

    def test_a_head_that_is_known_elsewhere(self, call: Call, site: Path) -> None:
        known = head(site)
        arguments = ("verify", site, "--head", f"{known.number}:{known.hash}")
        assert "holds entry 7 as known elsewhere" in call(*arguments).out
        assert json.loads(call(*arguments, "--json").out)["ledgers"][0]["held_against"] == [*known]
        # It still does when more was committed; and no longer when an old copy was put back.
        with closing(Ledger.open(site)) as ledger:
            ledger.commit("run-2", [("rounds", 2)])
        assert call(*arguments).code == 0
        put_back(site, 2)
        assert call("verify", site).code == 0
        line = told(call(*arguments))
        assert "has 6 entries, 7 are known elsewhere; an older copy was put in its place" in line
        assert str(site) in line

    def test_a_head_of_another_ledger(self, call: Call, site: Path) -> None:
        line = told(call("verify", site, "--head", f"7:{'0' * 64}"))
        assert "entry 7 is another than is known elsewhere" in line
        assert str(site) in line

    @pytest.mark.parametrize(
        "text",
        ["", "7", "7:", ":", f":{'0' * 64}", "7:abc", f"-7:{'0' * 64}", f"x:{'0' * 64}",
         f"7:{'0' * 65}", f"7:{'x' * 64}"],
    )  # fmt: skip
    def test_a_head_that_is_none(self, call: Call, site: Path, text: str) -> None:
        line = told(call("verify", site, f"--head={text}"), code=2)
        assert line == (
            f"error: --head {text}: must be COUNT:HASH, as `fedveil ledger show` prints them"
        )

    @pytest.mark.parametrize("count", ["9" * 30, "9" * 5000])
    def test_a_count_beyond_all_ledgers(self, call: Call, site: Path, count: str) -> None:
        result = call("verify", site, "--head", f"{count}:{'0' * 64}")
        assert result.code in {1, 2}
        assert not any(name in result.err for name in ("OverflowError", "ValueError"))
        assert len(result.err.splitlines()) == 1

    def test_a_runs_durable_ledgers(self, call: Call, run: Path, tmp_path: Path) -> None:
        """They stand where `data.ledger` says, and the run knows their heads too."""
        durable = tmp_path / "durable"
        (run / "ledger").rename(durable)
        config = (run / "config.toml").read_text(encoding="utf-8")
        # Only a run with a mechanism has a budget to keep.
        text = config.replace("[data]\n", f'[data]\nledger = "{durable}"\n')
        text = text.replace('mechanism = "none"', 'mechanism = "central"')
        text = text.replace(
            "[policy]\n", "[policy]\nepsilon_lifetime = 9.0\ndelta_lifetime = 0.5\n"
        )
        (run / "config.toml").write_text(text, encoding="utf-8")
        lines = call("verify", run).out.splitlines()
        assert [line.split(":")[0] for line in lines] == [
            str(durable / f"site-00{number}.sqlite") for number in (1, 2)
        ]
        assert all("as known elsewhere" in line for line in lines)
        put_back(durable / "site-001.sqlite", 1)
        assert "known elsewhere" in told(call("verify", run))

    def test_a_head_is_of_one_ledger(self, call: Call, site: Path, tmp_path: Path) -> None:
        made(tmp_path / "anna.sqlite")
        known = head(site)
        line = told(call("verify", tmp_path, "--head", f"7:{known.hash}"), code=2)
        assert "is of one ledger; name one" in line

    def test_a_run_holds_its_ledgers_against_what_it_saw_last(self, call: Call, run: Path) -> None:
        result = call("verify", run)
        assert (result.code, result.err) == (0, "")
        for line, number in zip(result.out.splitlines(), (1, 2), strict=True):
            file = run / "ledger" / f"site-{number:03d}.sqlite"
            assert line.startswith(f"{file}: whole, {head(file).number} entries, 2 prices")
            assert line.endswith(f"; holds entry {head(file).number} as known elsewhere")
        found = json.loads(call("verify", run, "--json").out)["ledgers"]
        assert [ledger["held_against"][1] for ledger in found] == [
            ledger["head"] for ledger in found
        ]

    def test_a_copy_that_was_put_back_is_noticed_by_the_run_and_by_nobody_else(
        self, call: Call, run: Path
    ) -> None:
        file = run / "ledger" / "site-002.sqlite"
        count = head(file).number
        put_back(file, 1)
        assert call("verify", file).code == 0
        line = told(call("verify", run))
        assert f"has {count - 1} entries, {count} are known elsewhere" in line
        assert str(file) in line

    def test_so_is_a_ledger_that_is_gone(self, call: Call, run: Path) -> None:
        (run / "ledger" / "site-002.sqlite").unlink()
        assert "site-002" in told(call("verify", run))

    def test_and_one_that_is_new(self, call: Call, run: Path) -> None:
        file = run / "ledger" / "site-002.sqlite"
        file.unlink()
        Ledger.create(file, "site-002", simulated=True)
        line = told(call("verify", run))
        assert "has 1 entries" in line
        assert str(file) in line

    def test_a_price_that_is_too_small(self, call: Call, site: Path) -> None:
        """In a chain that was made anew, and is whole."""
        rewritten, known = [], Head(0, "")
        for _, time, kind, text, _ in entries(site):
            entry = sealed(known, time, kind, json.loads(text.replace("0.125", "0.0125")))
            rewritten.append((canonical(entry.body), entry.hash, entry.sequence))
            known = Head(entry.sequence, entry.hash)
        with closing(sqlite3.connect(site)) as connection:
            connection.executemany(
                "UPDATE entries SET body = ?, hash = ? WHERE sequence = ?", rewritten
            )
            connection.commit()
        assert call("show", site).code == 0
        line = told(call("verify", site, "--json"))
        assert f"{site}: run run-1, training: epsilon 0.0125 is stated, its releases cost" in line

    def test_what_was_edited(self, call: Call, site: Path) -> None:
        changed(site, "DELETE FROM entries WHERE sequence = 7")
        assert f"{site}: holds 6 entries, 7 were given out" in told(call("verify", site))

    def test_a_damaged_run_says_so_before_it_says_that_all_is_well(
        self, call: Call, run: Path
    ) -> None:
        for file in (run / "checkpoint").glob("*.safetensors"):
            file.write_bytes(b"")
        assert "checkpoint" in told(call("verify", run))


class TestEnd:
    def test_nothing_more_may_come_of_a_run(self, call: Call, site: Path) -> None:
        result = call("end", site, "run-2")
        assert result == (0, f"{site}: run run-2 is closed\n", "")
        assert json.loads(entries(site)[-1][3]) == {"run_id": "run-2"}
        with closing(Ledger.open(site)) as ledger:
            assert ledger.read().runs["run-2"].closed
        assert call("verify", site).code == 0

    def test_an_account_in_renyi_dp_gets_back_what_was_not_drawn(
        self, call: Call, tmp_path: Path
    ) -> None:
        path = tmp_path / "rdp.sqlite"
        Ledger.create(path, "st-mary")
        charge = Charge("training", 3.0, 1e-6, (part("training", 50, 20.0),))
        with closing(Ledger.open(path)) as ledger:
            order = Order("run-1", "t", "heart", "record", (charge,))
            ledger.reserve(order, Lifetime(3.0, 1e-5, "rdp"))
            ledger.commit("run-1", [("rounds", 1)])

        def spent() -> float:
            (account,) = json.loads(call("show", path, "--json").out)["ledgers"][0]["accounts"]
            assert account["composition"] == "rdp"
            assert account["epsilon"][1] == 3.0
            value: float = account["epsilon"][0]
            return value

        before = spent()
        assert call("end", path, "run-1").code == 0
        assert 0 < spent() < before / 2

    def test_a_run_that_is_not_there(self, call: Call, site: Path) -> None:
        assert "run run-3: has reserved nothing" in told(call("end", site, "run-3"))
        assert head(site).number == 7

    def test_a_ledger_that_is_not_there(self, call: Call, tmp_path: Path) -> None:
        assert "gone.sqlite: is missing" in told(call("end", "gone.sqlite", "run-1"))
        assert list(tmp_path.iterdir()) == []

    def test_a_damaged_ledger_is_not_written(self, call: Call, site: Path) -> None:
        changed(site, "UPDATE entries SET body = '{}' WHERE sequence = 4")
        before = entries(site)
        assert "entry 4: its hash does not fit" in told(call("end", site, "run-2"))
        assert entries(site) == before


class TestParts:
    def test_a_file_is_itself_even_where_there_is_none(self, tmp_path: Path) -> None:
        assert find(tmp_path / "gone.sqlite") == [tmp_path / "gone.sqlite"]

    def test_a_draft_is_no_ledger(self, site: Path, tmp_path: Path) -> None:
        (tmp_path / ".anna.sqlite.partial").write_bytes(b"half")
        assert find(tmp_path) == [site]

    def test_a_folder_without_one(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="holds no ledger"):
            find(tmp_path)

    def test_what_a_run_knows(self, run: Path, site: Path) -> None:
        assert known_heads(run) == {
            f"site-{number:03d}": head(run / "ledger" / f"site-{number:03d}.sqlite")
            for number in (1, 2)
        }
        assert known_heads(site) == known_heads(site.parent / "gone") == {}

    def test_a_head_as_text(self, site: Path) -> None:
        known = head(site)
        assert parse_head(f"{known.number}:{known.hash}", [site]) == known
