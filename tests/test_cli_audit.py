"""`fedveil audit`: one line for each fault, plain facts otherwise."""

import gc
import json
import shutil
import sqlite3
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedveil
from fedveil.client.self_test import Tested as Found
from fedveil.config import RunConfig
from fedveil.privacy.audit import conformance
from fedveil.privacy.conformance.claim import Check
from fedveil.privacy.conformance.verdict import Verdict
from fedveil.privacy.noise import Coins
from fedveil.privacy.secagg.simulator import Simulator
from fedveil.privacy.secagg.terms import Numbers

Call = Callable[..., Any]
MakeConfig = Callable[..., RunConfig]
FAST = {"epsilon": 2.0, "sampling_rate": 1.0}  # priced in a moment


@pytest.fixture
def kept(tmp_path: Path) -> tuple[Path, Path]:
    """A transcript of two rounds, and the identities to hold it against."""
    session = Simulator(Numbers(3, 3, 3, 1), rounds=2, entropy=np.random.default_rng(0).bytes)
    session.set_up()
    for _ in range(2):
        session.round({site: np.zeros(4, dtype=np.uint32) for site in range(3)})
    transcript, pins = tmp_path / "run.transcript", tmp_path / "pins.toml"
    transcript.write_bytes(session.transcript)
    lines = [f'{name} = "{key.hex()}"' for name, key in session.pinned.items()]
    pins.write_text("\n".join(["[identities]", *lines]), encoding="utf-8")
    return transcript, pins


def test_what_it_says(call: Call, kept: tuple[Path, Path]) -> None:
    transcript, pins = kept
    result = call("audit", "transcript", transcript, "--identities", pins)
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0] == f"{transcript}: every signature holds; run simulated"
    assert lines[1].endswith("safe against the server with up to 1 of them")
    assert lines[2].startswith("  epoch 0 round 0: 3 uploaded, 3 confirmed; sum ")
    assert lines[2].endswith(", says the server")
    assert lines[4].startswith("  site-000: its ledger has 2 entries, head ")


def test_json(call: Call, kept: tuple[Path, Path]) -> None:
    transcript, pins = kept
    result = call("audit", "transcript", transcript, "--identities", pins, "--json")
    found = json.loads(result.out)
    assert found["valid"] is True
    assert found["epochs"] == [
        {"epoch": 0, "rounds": 2, "n": 3, "t": 3, "n_min": 3, "t_collude": 1}
    ]
    assert [one["uploaders"] for one in found["rounds"]] == [
        ["site-000", "site-001", "site-002"]
    ] * 2
    assert found["ledgers"]["site-002"][0] == 2


@pytest.mark.parametrize("place", [100, 2000, -1])
def test_a_tampered_one(call: Call, kept: tuple[Path, Path], place: int) -> None:
    transcript, pins = kept
    content = bytearray(transcript.read_bytes())
    content[place] ^= 1
    transcript.write_bytes(content)
    if place == -1:  # the server's own word on the sum, which the sum itself must match
        content[-33] ^= 1
        transcript.write_bytes(content)
    result = call("audit", "transcript", transcript, "--identities", pins)
    assert result.code == 1
    assert result.out == ""
    assert result.err.startswith(f"error: {transcript}: transcript")
    assert result.err.count("\n") == 1


@pytest.mark.parametrize("missing", [0, 1])
def test_a_missing_file(call: Call, kept: tuple[Path, Path], missing: int) -> None:
    kept[missing].unlink()
    result = call("audit", "transcript", kept[0], "--identities", kept[1])
    assert result.code == 2
    assert "cannot be read (No such file or directory)" in result.err


def test_an_empty_one_is_refused(call: Call, kept: tuple[Path, Path]) -> None:
    kept[0].write_bytes(b"")
    result = call("audit", "transcript", kept[0], "--identities", kept[1], "--json")
    assert result.code == 1
    assert "is empty" in result.err


def strict(text: str) -> Any:  # noqa: ANN401
    """One JSON object, without the constants that are no JSON."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="session")
def secure_run(tmp_path_factory: pytest.TempPathFactory) -> fedveil.Run:
    """A finished run with shared noise, two rounds long."""
    raw: dict[str, Any] = {
        "federation": {"sites": 3, "rounds": 2},
        "data": {"source": "sklearn:digits"},
        "model": {"family": "vae", "width": 4, "latent": 2, "hidden": 8},
        "privacy": {**FAST, "mechanism": "distributed", "statistics_share": 0.0},
        "policy": {"self_test": False},
    }
    out = tmp_path_factory.mktemp("runs") / "secure"
    with warnings.catch_warnings():
        # The server leaves its transcript to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        run = fedveil.simulate(RunConfig.model_validate(raw), out=out)
        gc.collect()
    return run


@pytest.fixture
def copied(finished_run: fedveil.Run, tmp_path: Path) -> Path:
    """A run's folder of the test's own."""
    return Path(shutil.copytree(finished_run.path, tmp_path / "run"))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-test is not what is tested: it passes, and one of its bounds is infinite."""
    check = Check("clipping bound", 1.0, -float("inf"), 1.5, True, "late", 0.5, float("inf"))
    verdict = Verdict("consistent", 5e-4, (check,))
    tested = Found(verdict, verdict)
    monkeypatch.setattr(conformance, "self_test", lambda *_, **__: tested)


def edit_begin(path: Path, **privacy: object) -> None:
    """Says of a run that it was priced otherwise."""
    events = path / "events.jsonl"
    first, *rest = events.read_text(encoding="utf-8").splitlines()
    begun = json.loads(first)
    begun["privacy"] |= privacy
    events.write_text("\n".join([json.dumps(begun), *rest, ""]), encoding="utf-8")


def gone(run: Path) -> None:
    (run / "transcript.bin").unlink()


class TestRun:
    def test_what_it_says(self, call: Call, finished_run: fedveil.Run) -> None:
        result = call("audit", "run", finished_run.path)
        assert (result.code, result.err) == (0, "")
        first, *checks, last = result.out.splitlines()
        assert last == f"{finished_run.path}: no transcript: this run made no secure sums"
        assert first == (
            f"{finished_run.path}: conformance consistent (false alarms at most 0.001)"
        )
        assert all(line.startswith("  ok  ") for line in checks)
        assert checks[-1] == (
            "  ok       ledger of site-003: 2 rounds committed, in 2 of the run's, 2 asked for"
        )
        names = {line[11:47].strip() for line in checks}
        assert {"noise", "slot mean, little noise", "rate, little noise"} <= names
        assert "inf" not in result.out
        assert "no ledger here" not in result.out

    def test_a_secure_one_s_transcript_too(self, call: Call, secure_run: fedveil.Run) -> None:
        result = call("audit", "run", secure_run.path, "--json")
        assert (result.code, result.err) == (0, "")
        found = strict(result.out)
        assert found["run_id"] == secure_run.metrics["run_id"]
        part = found["conformance"]
        assert (part["verdict"], part["failed"]) == ("consistent", [])
        assert part["false_alarm_rate"] == pytest.approx(1e-3)
        assert {"share", "accounted noise", "correlation of shares"} <= {
            check["name"] for check in part["checks"]
        }
        assert [one["site"] for one in part["ledgers"]] == ["site-001", "site-002", "site-003"]
        assert {(one["made"], one["took_part"], one["holds"]) for one in part["ledgers"]} == {
            (2, 2, True)
        }
        assert found["transcript"] == {"verdict": "consistent", "failed": [], "sums": 3}

    def faulty(
        self, call: Call, run: fedveil.Run, tmp_path: Path, change: Callable[[Path], object]
    ) -> str:
        copy = tmp_path / "copy"
        shutil.copytree(run.path, copy)
        change(copy)
        result = call("audit", "run", copy, "--only", "transcript")
        assert (result.code, result.err) == (1, "")
        first, fault = result.out.splitlines()
        assert first.startswith(f"{copy}: transcript violated")
        assert fault.startswith("  VIOLATED transcript.bin: ")
        return str(fault.removeprefix("  VIOLATED transcript.bin: "))

    def test_a_transcript_that_is_gone(
        self, call: Call, secure_run: fedveil.Run, tmp_path: Path
    ) -> None:
        found = self.faulty(call, secure_run, tmp_path, gone)
        assert found == "cannot be read (No such file or directory)"

    def test_a_transcript_that_is_altered(
        self, call: Call, secure_run: fedveil.Run, tmp_path: Path
    ) -> None:
        def alter(copy: Path) -> None:
            content = bytearray((copy / "transcript.bin").read_bytes())
            content[-40] ^= 1
            (copy / "transcript.bin").write_bytes(content[:-1])

        assert "expected" in self.faulty(call, secure_run, tmp_path, alter)

    def test_a_transcript_of_another_run(
        self, call: Call, secure_run: fedveil.Run, tmp_path: Path
    ) -> None:
        def rename(copy: Path) -> None:
            metrics = json.loads((copy / "metrics.json").read_text(encoding="utf-8"))
            metrics["run_id"] = "0" * 16
            (copy / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")

        found = self.faulty(call, secure_run, tmp_path, rename)
        assert found == f"is of run {secure_run.metrics['run_id']}, not of {'0' * 16}"

    def test_a_ledger_that_the_sites_did_not_sign(
        self, call: Call, secure_run: fedveil.Run, tmp_path: Path
    ) -> None:
        def grow(copy: Path) -> None:
            metrics = json.loads((copy / "metrics.json").read_text(encoding="utf-8"))
            metrics["ledgers"]["2"]["count"] += 1
            (copy / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")

        found = self.faulty(call, secure_run, tmp_path, grow)
        assert found.startswith("site-002 signed entry ")

    @pytest.mark.usefixtures("passes")
    def test_only_a_part(self, call: Call, secure_run: fedveil.Run) -> None:
        found = {
            only: strict(call("audit", "run", secure_run.path, "--only", only, "--json").out)
            for only in ("conformance", "transcript")
        }
        assert set(found["conformance"]) == {"run_id", "conformance"}
        assert set(found["transcript"]) == {"run_id", "transcript"}
        assert found["conformance"]["conformance"]["checks"][0]["low"] is None

    def test_no_part_of_that_name(self, call: Call, finished_run: fedveil.Run) -> None:
        result = call("audit", "run", finished_run.path, "--only", "conformity")
        assert (result.code, result.out) == (2, "")
        assert result.err == ("error: --only conformity: must be conformance or transcript\n")

    @pytest.mark.parametrize("name", ["empty", "missing"])
    def test_no_run(self, call: Call, tmp_path: Path, name: str) -> None:
        (tmp_path / "empty").mkdir()
        result = call("audit", "run", tmp_path / name)
        assert (result.code, result.out) == (2, "")
        assert result.err == f"error: {tmp_path / name}: holds no run; check the path\n"

    def test_without_a_mechanism(self, call: Call, make_config: MakeConfig, tmp_path: Path) -> None:
        run = fedveil.simulate(make_config(privacy={"mechanism": "none"}), out=tmp_path / "none")
        result = call("audit", "run", run.path, "--json")
        assert (result.code, result.out) == (1, "")
        assert result.err == (
            'error: privacy.mechanism = "none": adds no noise that could be tested\n'
        )

    def test_code_that_is_not_as_priced(
        self, call: Call, finished_run: fedveil.Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = Coins.gaussian
        monkeypatch.setattr(Coins, "gaussian", lambda *asked: 0.9 * real(*asked))
        result = call("audit", "run", finished_run.path)
        assert result.code == 1
        assert ": conformance violated (" in result.out
        assert any(line.startswith("  VIOLATED noise ") for line in result.out.splitlines())

    @pytest.mark.usefixtures("passes")
    def test_a_ledger_that_was_tampered_with(self, call: Call, copied: Path) -> None:
        ledger = copied / "ledger" / "site-002.sqlite"
        with closing(sqlite3.connect(ledger)) as opened, opened:
            for (name,) in opened.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'"):
                opened.execute(f'DROP TRIGGER "{name}"')
            opened.execute("DELETE FROM entries WHERE sequence = 3")
        result = call("audit", "run", copied)
        assert (result.code, result.out) == (1, "")
        assert result.err.startswith(f"error: {ledger}: ")
        assert result.err.count("\n") == 1

    @pytest.mark.usefixtures("passes")
    @pytest.mark.parametrize("gone", [1, 3])
    def test_a_ledger_that_is_gone(self, call: Call, copied: Path, gone: int) -> None:
        (copied / "ledger" / f"site-00{gone}.sqlite").unlink()
        result = call("audit", "run", copied, "--json")
        assert result.code == 1
        part = strict(result.out)["conformance"]
        assert (part["verdict"], part["failed"]) == ("violated", [f"ledger of site-00{gone}"])

    @pytest.mark.usefixtures("passes")
    def test_all_of_them(self, call: Call, copied: Path) -> None:
        shutil.rmtree(copied / "ledger")
        result = call("audit", "run", copied)
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith(f"error: {copied}: holds no ledger")

    @pytest.mark.usefixtures("passes")
    def test_a_ledger_of_another_run(
        self, call: Call, copied: Path, secure_run: fedveil.Run
    ) -> None:
        """It has no commit of this one."""
        shutil.copy(secure_run.path / "ledger" / "site-001.sqlite", copied / "ledger")
        result = call("audit", "run", copied)
        assert result.code == 1
        assert (
            "  VIOLATED ledger of site-001: 0 rounds committed, in 2 of the run's, 2 asked for"
            in result.out.splitlines()
        )

    @pytest.mark.usefixtures("passes")
    def test_a_deployed_run_s_ledgers_stay_where_they_are(self, call: Call, copied: Path) -> None:
        shutil.rmtree(copied / "ledger")
        shutil.rmtree(copied / "sites")
        result = call("audit", "run", copied)
        assert result.code == 0
        assert "no ledger here: what the sites committed was not looked at" in result.out

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("noise_multiplier", 0.25),
            ("epsilon", 0.5),
            ("sampling_rate", 0.01),
            ("rounds", 1),
            ("unit", "person"),
        ],
    )
    def test_a_run_that_was_priced_otherwise(
        self, call: Call, copied: Path, name: str, value: object
    ) -> None:
        edit_begin(copied, **{name: value})
        result = call("audit", "run", copied)
        assert (result.code, result.out) == (1, "")
        assert result.err.startswith(
            f"error: events.jsonl: privacy.{name} = {value}: this code prices the run at "
        )
        assert result.err.endswith("audit it with the versions in environment.json\n")
