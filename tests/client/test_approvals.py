"""Held runs, approvals bound to terms, and a pause: what is kept, and what approves nothing."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.client import approvals
from fedveil.client.approvals import (
    ApprovalError,
    Held,
    Owner,
    PausedError,
    approve,
    find,
    held,
    hold,
    is_approved,
    is_paused,
    pause,
    pending,
    resume,
)
from fedveil.config import ConfigError, FedveilError, RunConfig
from fedveil.privacy.policy import Asked
from fedveil.privacy.secagg.terms import Numbers

MakeConfig = Callable[..., RunConfig]
TERMS, OTHERS = "a" * 64, "b" * 64
ASKED = Asked(
    "distributed", "record", "vae", "secagg", Numbers(5, 4, 4, 1), 2.00001, 1.01e-5, 1234, b"c" * 32
)
LEFT = {"training": (7.9999, 9e-5), "holdout": (None, None)}


@pytest.fixture
def config(make_config: MakeConfig) -> RunConfig:
    return make_config(federation={"sites": 5, "rounds": 7, "name": "heart"})


@pytest.fixture
def run(config: RunConfig) -> Held:
    return held("run-a", TERMS, ASKED, config, LEFT)


def line(call: Callable[[], object], kind: type[FedveilError] = ConfigError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestWhatIsAsked:
    def test_in_numbers(self, run: Held) -> None:
        assert run.asks == {
            "name": "heart", "family": "vae", "parameters": 1234, "rounds": 7, "statistics": False,
            "sites": 5,
            "unit": "record", "mechanism": "distributed", "encryption": "secagg",
            "epsilon": 2.00001, "delta": 1.01e-5, "n_min": 4, "t_collude": 1,
            "coordinator": (b"c" * 32).hex(),
        }  # fmt: skip
        assert run.left == LEFT

    def test_in_words_that_promise_no_more_than_holds(self, run: Held) -> None:
        what, price, summed, signed, *left = run.words
        assert what == (
            '"heart" makes a vae at 5 sites: 7 rounds of training a model of 1234 parameters.'
        )
        assert price.startswith("It costs at most epsilon 2.001 and delta 1.1e-05 for each record")
        assert summed.startswith("Nobody sees less than a sum over 4 sites, if at most 1 of them")
        assert signed == f"The run is signed by {(b'c' * 32).hex()}."
        assert left == [
            "Before it, training records have epsilon 7.999 and delta 9e-05 left.",
            "Before it, holdout records have no limit of epsilon left.",
        ]

    def test_without_noise_or_secure_sum_or_signature_it_is_said(self, config: RunConfig) -> None:
        bare = replace(ASKED, epsilon=None, numbers=None, coordinator=None)
        words = " ".join(held("run-a", TERMS, bare, config, LEFT).words)
        assert "NOTHING HIDES YOUR RECORDS" in words
        assert "The server sees your site's own contribution" in words
        assert "signed by nobody" in words


class TestApproval:
    def test_a_held_run_is_not_approved(self, tmp_path: Path, run: Held) -> None:
        assert pending(tmp_path) == []
        hold(tmp_path, run)
        assert pending(tmp_path) == [run]
        assert not is_approved(tmp_path, "run-a", TERMS)
        path = tmp_path / "approvals" / "run-a.json"
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700

    def test_approved_it_stays_so_by_whom_and_when(self, tmp_path: Path, run: Held) -> None:
        hold(tmp_path, run)
        found = approve(tmp_path, "run-a", "dr jones")
        assert (found.approved_by, bool(found.approved_at)) == ("dr jones", True)
        assert is_approved(tmp_path, "run-a", TERMS)
        assert pending(tmp_path) == []
        hold(tmp_path, run)  # asked once more, which changes nothing
        assert approve(tmp_path, "run-a", "somebody else") == found == find(tmp_path, "run-a")

    def test_of_these_terms_only(self, tmp_path: Path, run: Held) -> None:
        """The same name with other terms is held anew."""
        hold(tmp_path, run)
        approve(tmp_path, "run-a", "dr jones")
        assert not is_approved(tmp_path, "run-a", OTHERS)
        other = replace(run, terms=OTHERS)
        hold(tmp_path, other)
        assert pending(tmp_path) == [other]
        assert not is_approved(tmp_path, "run-a", OTHERS)
        assert not is_approved(tmp_path, "run-a", TERMS)

    def test_of_this_run_only(self, tmp_path: Path, run: Held) -> None:
        hold(tmp_path, run)
        approve(tmp_path, "run-a", "dr jones")
        assert not is_approved(tmp_path, "run-b", TERMS)

    def test_of_what_was_looked_at(self, tmp_path: Path, run: Held) -> None:
        hold(tmp_path, replace(run, terms=OTHERS))
        said = line(lambda: approve(tmp_path, "run-a", "dr jones", TERMS))
        assert said == "run-a: was asked for anew on other terms; look at it again"
        assert not is_approved(tmp_path, "run-a", OTHERS)

    def test_an_unknown_run(self, tmp_path: Path, run: Held) -> None:
        said = line(lambda: approve(tmp_path, "run-b", "dr jones"))
        assert said == "run-b: no such run waits for approval; these do: none"
        hold(tmp_path, run)
        assert line(lambda: approve(tmp_path, "run-b", "dr jones")).endswith("these do: run-a")
        assert not is_approved(tmp_path, "run-b", TERMS)

    @pytest.mark.parametrize("name", ["", "..", "../run", "a/b", "a\nb", ".a", "a" * 65, "é"])
    def test_a_name_that_is_no_run_s(self, tmp_path: Path, run: Held, name: str) -> None:
        for call in (
            lambda: approve(tmp_path, name, "dr jones"),
            lambda: hold(tmp_path, replace(run, run_id=name)),
            lambda: is_approved(tmp_path, name, TERMS),
        ):
            assert "expected a name of plain characters" in line(call)
        assert list(tmp_path.iterdir()) == []

    def test_by_nobody(self, tmp_path: Path, run: Held) -> None:
        hold(tmp_path, run)
        assert line(lambda: approve(tmp_path, "run-a", " ")).startswith("by: is empty")
        assert not is_approved(tmp_path, "run-a", TERMS)

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda _: "",
            lambda _: "[]",
            lambda _: "{",
            lambda raw: raw | {"run_id": "run-b"},
            lambda raw: raw | {"terms": 3},
            lambda raw: raw | {"approved_by": True},
            lambda raw: raw | {"more": 1},
            lambda raw: raw | {"words": [3]},
            lambda raw: raw | {"left": [1]},
            lambda raw: raw | {"left": {"training": 3}},
            lambda raw: raw | {"asks": None},
            lambda raw: {key: value for key, value in raw.items() if key != "terms"},
        ],
    )
    def test_a_file_that_cannot_be_read_approves_nothing(
        self, tmp_path: Path, run: Held, spoil: Callable[[dict[str, Any]], Any]
    ) -> None:
        hold(tmp_path, run)
        approve(tmp_path, "run-a", "dr jones")
        path = tmp_path / "approvals" / "run-a.json"
        spoilt = spoil(json.loads(path.read_text(encoding="utf-8")))
        path.write_text(spoilt if isinstance(spoilt, str) else json.dumps(spoilt), encoding="utf-8")
        assert not is_approved(tmp_path, "run-a", TERMS)
        assert pending(tmp_path) == []
        hold(tmp_path, run)  # and is asked about anew
        assert pending(tmp_path) == [run]

    @given(st.binary(max_size=200))
    def test_nor_do_any_bytes(self, tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
        state = tmp_path_factory.mktemp("state")
        (state / "approvals").mkdir()
        (state / "approvals" / "run-a.json").write_bytes(data)
        assert not is_approved(state, "run-a", TERMS)
        assert pending(state) == []

    def test_only_so_many_wait(
        self, tmp_path: Path, run: Held, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(approvals, "_MOST_HELD", 2)
        for name in ("run-a", "run-b"):
            hold(tmp_path, replace(run, run_id=name))
        third = replace(run, run_id="run-c")
        said = line(lambda: hold(tmp_path, third), ApprovalError)
        assert "2 runs wait for approval already" in said
        assert find(tmp_path, "run-c") is None
        approve(tmp_path, "run-a", "dr jones")
        hold(tmp_path, third)
        assert [one.run_id for one in pending(tmp_path)] == ["run-b", "run-c"]

    def test_where_nothing_can_be_written(self, tmp_path: Path, run: Held) -> None:
        (tmp_path / "approvals").write_text("", encoding="utf-8")
        assert "cannot be" in line(lambda: hold(tmp_path, run), FedveilError)


class TestAPause:
    def test_lasts_until_it_is_taken_back(self, tmp_path: Path) -> None:
        state = tmp_path / "state"
        assert not is_paused(state)
        for _ in range(2):
            pause(state)
            assert is_paused(state)
            with pytest.raises(PausedError, match="the site is paused"):
                Owner(state, manual=False).check_pause()
        for _ in range(2):
            resume(state)
            assert not is_paused(state)
        Owner(state, manual=False).check_pause()

    def test_is_whatever_bears_its_name(self, tmp_path: Path) -> None:
        """A link that leads nowhere too: in doubt the site is paused."""
        (tmp_path / "paused").symlink_to(tmp_path / "nowhere")
        assert is_paused(tmp_path)

    def test_where_it_cannot_be_told_there_is_one(self, tmp_path: Path) -> None:
        state = tmp_path / "state"
        state.write_text("", encoding="utf-8")  # a file: what is in it cannot be looked up
        assert is_paused(state)


def test_without_a_manual_policy_nobody_is_asked(tmp_path: Path) -> None:
    assert Owner(tmp_path, manual=False).allows("run-a", TERMS)
    assert not Owner(tmp_path, manual=True).allows("run-a", TERMS)
