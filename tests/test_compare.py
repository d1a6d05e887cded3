"""Runs side by side: what differs, who is better beyond chance, and what cannot be compared."""

import copy
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import fedveil
from fedveil.compare import compare, read_run
from fedveil.config import ConfigError, FedveilError

CONFIG: dict[str, Any] = {
    "federation": {"name": "trial", "sites": 3, "rounds": 10},
    "data": {"source": "/data/here/my.csv", "records": 4000, "holdout": 0.1},
    "clean": {"type_error": "missing"},
    "model": {"family": "vae", "beta": 1.0, "hidden": 8},
    "privacy": {"mechanism": "central", "epsilon": 3.0},
    "evaluation": {"samples": 5000},
}
PRIVACY = {
    "mechanism": "central", "unit": "record", "against": "everyone but the server",
    "target_epsilon": 3.0, "epsilon": 2.5, "delta": 1e-5, "rounds": 10,
}  # fmt: skip
METRICS: dict[str, Any] = {
    "family": "vae", "rounds": 10, "steps": 10, "sites": 3, "privacy": PRIVACY, "quality": {},
    "seconds": {"total": 20.0},
}  # fmt: skip
SCHEMA = {"modality": "table", "columns": ["age"]}

Make = Callable[..., Path]


Call = Callable[..., Any]


@pytest.fixture(name="call")
def _call(call: Call, monkeypatch: pytest.MonkeyPatch) -> Call:
    """On a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    return call


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes a run's folder: options and metrics that win, or events of one that has not ended."""

    def build(
        name: str,
        options: dict[str, Any] | None = None,
        *,
        events: list[dict[str, Any]] | None = None,
        schema: dict[str, Any] = SCHEMA,
        **metrics: object,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        config = copy.deepcopy(CONFIG)
        for key, value in (options or {}).items():
            section, _, last = key.partition(".")
            config[section][last] = value
        (folder / "config.toml").write_text(tomli_w.dumps(config))
        (folder / "schema.json").write_text(json.dumps(schema))
        if events is None:
            values = {"run_id": name.replace("/", "-"), **METRICS, **metrics}
            (folder / "metrics.json").write_text(json.dumps(values))
        else:
            lines = "".join(json.dumps(event) + "\n" for event in events)
            (folder / "events.jsonl").write_text(lines)
        return folder

    return build


def value(found: float, noise: float = 0.01, floor: float | None = None) -> dict[str, float]:
    """A figure as a run writes it."""
    return {"value": found, "noise": noise} | ({} if floor is None else {"floor": floor})


def rounds(*numbers: int) -> list[dict[str, Any]]:
    """The events of a run so far."""
    begun = {"event": "run", "run_id": "x", "privacy": PRIVACY, "sites": 3}
    each = {"event": "round", "seconds": {"sites": 1.5, "store": 0.5}}
    return [begun, *({**each, "round": number} for number in numbers)]


class TestDifferences:
    def test_only_what_differs(self, make: Make) -> None:
        found = compare([make("a"), make("b", {"privacy.epsilon": 8.0, "model.beta": 2.0})])
        assert found.config == {"model.beta": (1.0, 2.0), "privacy.epsilon": (3.0, 8.0)}
        assert found.same_schema
        assert found.versions == {}

    def test_an_option_that_one_has_not(self, make: Make) -> None:
        found = compare([make("a"), make("b", {"data.x": 1})])
        assert found.config == {"data.x": (None, 1)}

    def test_versions(self, make: Make) -> None:
        paths = [make("a"), make("b")]
        for path, torch in zip(paths, ("2.13.0", "2.13.1"), strict=True):
            text = json.dumps({"python": "3.11.7", "packages": {"torch": torch}})
            (path / "environment.json").write_text(text)
        assert compare(paths).versions == {"packages.torch": ("2.13.0", "2.13.1")}

    def test_when_they_were_begun_is_their_own_note_and_no_version(self, make: Make) -> None:
        paths = [make("a"), make("b"), make("old")]
        for path, day in zip(paths[:2], ("03", "04"), strict=True):
            text = json.dumps({"python": "3.11.7", "begun": f"2026-01-{day}T05:06:07+02:00"})
            (path / "environment.json").write_text(text)
        (paths[2] / "environment.json").write_text('{"python": "3.11.7"}')
        found = [read_run(path) for path in paths]
        assert compare(paths).versions == {}
        assert [f"{facts.begun:%d %H:%M}" for facts in found[:2]] == ["03 03:06", "04 03:06"]
        written = (paths[2] / "config.toml").stat().st_mtime
        assert found[2].begun.timestamp() == pytest.approx(written)

    def test_epsilons_add_up(self, make: Make) -> None:
        """2.5 each."""
        assert compare([make("a"), make("b"), make("c")]).epsilon == 7.5

    def test_no_sum_with_a_run_that_is_not_private(self, make: Make) -> None:
        nothing = PRIVACY | {"mechanism": "none", "epsilon": None, "target_epsilon": None}
        assert compare([make("a"), make("b", privacy=nothing)]).epsilon is None

    def test_no_sum_over_other_data(self, make: Make) -> None:
        assert compare([make("a"), make("b", {"data.source": "other.csv"})]).epsilon is None


class TestObstacles:
    @pytest.mark.parametrize(
        ("key", "other"),
        [
            ("data.source", "other.csv"),
            ("data.records", 5000),
            ("clean.type_error", "drop"),
            ("evaluation.samples", 100),
        ],
    )
    def test_other_data_or_other_questions(self, key: str, other: object, make: Make) -> None:
        quality = {"tstr_accuracy_mlp": value(0.9)}
        worse = {"tstr_accuracy_mlp": value(0.1)}
        found = compare([make("a", quality=quality), make("b", {key: other}, quality=worse)])
        assert found.obstacles == (f"{key} differs",)
        assert found.best == {}

    def test_another_schema(self, make: Make) -> None:
        quality = {"tstr_accuracy_mlp": value(0.9)}
        paths = [make("a", quality=quality), make("b", schema={"modality": "x"}, quality=quality)]
        found = compare(paths)
        assert (found.obstacles, found.same_schema) == (("their schemas differ",), False)

    def test_too_few_have_figures(self, make: Make) -> None:
        quality = {"tstr_accuracy_mlp": value(0.9)}
        found = compare([make("a", quality=quality), make("b")])
        assert found.obstacles == ("fewer than two are finished and have figures",)

    def test_a_run_midway_is_not_judged(self, make: Make) -> None:
        quality = {"tstr_accuracy_mlp": value(0.1)}
        midway = [*rounds(1), {"event": "evaluated", "quality": {"tstr_accuracy_mlp": value(0.9)}}]
        found = compare(
            [make("a", quality=quality), make("b", quality=quality), make("c", events=midway)]
        )
        assert found.obstacles == ()
        assert found.best == {}


def best(make: Make, name: str, *figures: dict[str, float], **options: object) -> int | None:
    """Which of two runs or more is marked."""
    paths = [make(f"r{i}", {}, quality={name: f}, **options) for i, f in enumerate(figures)]
    return compare(paths).best.get(name)


class TestBest:
    @pytest.mark.parametrize(
        ("name", "first", "second", "marked"),
        [
            ("tstr_accuracy_mlp", value(0.80), value(0.90), 1),
            ("tstr_accuracy_mlp", value(0.846), value(0.90), None),
            ("tstr_accuracy_mlp", value(0.843), value(0.90), 1),
            ("tstr_auroc_logistic", value(0.9, 0.1), value(0.8, 0.1), None),
            ("tstr_auroc_logistic", value(0.9), value(0.8), 0),
            ("loss", value(5.0, 0.1), value(5.5, 0.1), 0),
            ("loss", value(5.0, 0.1), value(5.28, 0.1), None),
            ("loss", value(5.0, 0.1), value(5.29, 0.1), 0),
            ("loss", value(5.0, 0.0), value(9.0, 0.0), None),
            ("one_way_tv", value(0.1, 0.0, 0.05), value(0.2, 0.0, 0.05), 0),
            ("one_way_tv", value(0.1, 0.0, 0.05), value(0.17, 0.0, 0.05), None),
            ("one_way_tv", value(0.1, 0.0, 0.05), value(0.2, 0.0, 0.12), None),
            ("new_figure", value(0.1), value(0.9), None),
            ("tstr_accuracy_mlp", value(1.4, 0.01), value(-0.1, 0.01), 0),
        ],
    )
    def test_beyond_chance_only(
        self,
        name: str,
        first: dict[str, float],
        second: dict[str, float],
        marked: int | None,
        make: Make,
    ) -> None:
        """By hand: 400 records are held out, two standard deviations are chance.

        An accuracy of 0.9 counts as (360 + 2)/404 = 0.896, its variance as 0.01^2 + 0.0932/400 =
        3.33e-4; one of 0.843 as 4.37e-4; together 2 sqrt(7.70e-4) = 0.0555.
        A loss: 2 sqrt(2) 0.1 = 0.283. A total variation: 2 sqrt(2) 0.5/20 = 0.0707.
        """
        assert best(make, name, first, second) == marked

    def test_better_than_every_other(self, make: Make) -> None:
        name = "tstr_accuracy_mlp"
        assert best(make, name, value(0.5), value(0.9), value(0.88)) is None

    def test_best_of_three(self, make: Make) -> None:
        assert best(make, "tstr_accuracy_mlp", value(0.5), value(0.6), value(0.9)) == 2

    @pytest.mark.parametrize(
        ("key", "other"), [("model.beta", 2.0), ("model.family", "gan"), ("model.hidden", 16)]
    )
    def test_losses_of_another_kind(self, key: str, other: object, make: Make) -> None:
        """A wider network's loss is on the same scale, another beta's is not."""
        quality = [{"loss": value(found), "one_way_tv": value(found / 10)} for found in (1.0, 9.0)]
        found = compare(
            [make("a", quality=quality[0]), make("b", {key: other}, quality=quality[1])]
        )
        assert found.best == ({"one_way_tv": 0} | ({"loss": 0} if key == "model.hidden" else {}))


class TestUnfinished:
    def test_by_its_events(self, make: Make) -> None:
        facts = read_run(make("a", events=rounds(1, 2, 3)))
        assert (facts.state, facts.told.rounds, facts.told.sites) == ("unfinished", 3, 3)
        assert facts.told.seconds == {"total": 6.0}
        assert facts.told.privacy is not None
        assert facts.told.privacy.epsilon == 2.5

    def test_one_that_failed(self, make: Make) -> None:
        events = [*rounds(1), {"event": "failed", "cause": "too few replies"}]
        facts = read_run(make("a", events=events))
        assert (facts.state, facts.cause) == ("failed", "too few replies")

    def test_one_that_failed_and_goes_on(self, make: Make) -> None:
        events = [*rounds(1), {"event": "failed", "cause": "x"}, {"event": "resumed", "round": 1}]
        assert read_run(make("a", events=events)).state == "unfinished"

    def test_one_that_never_began(self, make: Make) -> None:
        facts = read_run(make("a", events=[]))
        assert (facts.state, facts.told.rounds, facts.told.privacy) == ("unfinished", 0, None)

    def test_a_torn_last_line_is_left_out(self, make: Make) -> None:
        path = make("a", events=rounds(1))
        with (path / "events.jsonl").open("a") as opened:
            opened.write('{"event": "rou')
        assert read_run(path).told.rounds == 1


class TestBadInput:
    def test_one_run(self, make: Make) -> None:
        with pytest.raises(ConfigError, match=r"needs two runs or more, got 1"):
            compare([make("a")])

    def test_no_such_folder(self, make: Make, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"gone: holds no run; check the path"):
            compare([make("a"), tmp_path / "gone"])

    def test_a_folder_that_is_none(self, make: Make, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"holds no run"):
            compare([make("a"), tmp_path])

    def test_a_file(self, make: Make) -> None:
        path = make("a")
        with pytest.raises(ConfigError, match=r"metrics.json: is a file; give the folder"):
            compare([path, path / "metrics.json"])

    def test_the_same_folder_twice(self, make: Make) -> None:
        path = make("a")
        with pytest.raises(ConfigError, match=r"is the same run as .*name each run once"):
            compare([path, path / ".." / "a"])

    def test_a_copy(self, make: Make) -> None:
        with pytest.raises(ConfigError, match=r"b: is the same run as .*a"):
            compare([make("a", run_id="x"), make("b", run_id="x")])

    def test_two_that_never_began_are_two(self, make: Make) -> None:
        assert len(compare([make("a", events=[]), make("b", events=[])]).runs) == 2

    @pytest.mark.parametrize(
        ("name", "content", "told"),
        [
            ("metrics.json", b"{", r"metrics.json: is damaged"),
            ("metrics.json", b"[]", r"metrics.json: is damaged"),
            ("metrics.json", b"\xff", r"metrics.json: is damaged"),
            ("metrics.json", b"{}", r"metrics.json: run_id"),
            ("config.toml", b"a = ", r"config.toml: is not TOML"),
            ("schema.json", b"", r"schema.json: is damaged"),
            ("environment.json", b"3", r"environment.json: is damaged"),
        ],
    )
    def test_a_damaged_file(self, name: str, content: bytes, told: str, make: Make) -> None:
        path = make("a")
        (path / name).write_bytes(content)
        with pytest.raises(FedveilError, match=told) as caught:
            compare([path, make("b")])
        assert caught.value.exit_code == 1
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "change",
        [
            {"quality": {"loss": {"value": "much"}}},
            {"quality": {"loss": {"value": math.nan}}},
            {"quality": [1]},
            {"privacy": {"epsilon": 1.0}},
            {"seconds": {"total": None}},
        ],
    )
    def test_metrics_of_another_kind(self, change: dict[str, Any], make: Make) -> None:
        with pytest.raises(FedveilError, match=r"metrics.json: ") as caught:
            compare([make("a", **change), make("b")])
        assert caught.value.exit_code == 1

    @pytest.mark.parametrize(
        "line", ["no json", "3", '{"event": "round"}', '{"event": "evaluated"}']
    )
    def test_damaged_events(self, line: str, make: Make) -> None:
        path = make("a", events=[])
        (path / "events.jsonl").write_text(line + "\n")
        with pytest.raises(FedveilError, match=r"events.jsonl: is damaged") as caught:
            read_run(path)
        assert caught.value.exit_code == 1

    def test_no_configuration(self, make: Make) -> None:
        path = make("a")
        (path / "config.toml").unlink()
        with pytest.raises(FedveilError, match=r"config.toml: cannot be read") as caught:
            read_run(path)
        assert caught.value.exit_code == 1


class TestCompareCommand:
    def test_table(self, make: Make, call: Call) -> None:
        quality = [{"tstr_accuracy_mlp": value(found)} for found in (0.5, 0.9)]
        none = PRIVACY | {"mechanism": "none", "epsilon": None, "target_epsilon": None}
        paths = [
            make("small", quality=quality[0]),
            make("big", {"model.hidden": 64}, quality=quality[1], privacy=none),
        ]
        result = call("runs", "compare", *paths)
        rows = [line.split() for line in result.out.splitlines()]
        assert (result.code, result.err) == (0, "")
        assert rows[0] == ["small", "big"]
        assert ["model.hidden", "8", "64"] in rows
        assert ["schema", "the", "same", "the", "same"] in rows
        assert ["epsilon", "2.500", "NOT", "PRIVATE"] in rows
        assert ["seconds", "a", "round", "2", "2"] in rows
        assert ["tstr_accuracy_mlp", "0.5000", "+-", "0.0100", "*", "0.9000", "+-"] in rows
        assert "`fedveil evaluate`" in result.out
        assert "All runs together" not in result.out

    def test_two_shown_alike_say_so(self, make: Make, call: Call) -> None:
        quality = {"tstr_accuracy_mlp": value(0.9)}
        result = call("runs", "compare", make("a", quality=quality), make("b", quality=quality))
        assert "No run is better than every other" in result.out
        assert "*" not in result.out
        assert "All runs together cost at most epsilon 5.000" in result.out

    def test_what_is_not_comparable(self, make: Make, call: Call) -> None:
        result = call("runs", "compare", make("a"), make("b", {"data.records": 5}))
        assert "Not comparable, no figure is marked: data.records differs; fewer" in result.out

    def test_paths_lose_what_all_share(self, make: Make, call: Call) -> None:
        result = call("runs", "compare", make("a"), make("b", {"data.source": "/data/x/its.csv"}))
        assert next(
            line.split()[1:] for line in result.out.splitlines() if "data.source  " in line
        ) == [".../here/my.csv", ".../x/its.csv"]

    def test_equal_names_are_told_apart(self, make: Make, call: Call) -> None:
        result = call("runs", "compare", make("mon/demo"), make("tue/demo"))
        assert result.out.splitlines()[0].split() == [".../mon/demo", ".../tue/demo"]

    def test_eighty_columns_are_enough_for_many(self, make: Make, call: Call) -> None:
        """Three stand side by side; the next three begin a table of their own."""
        names = [f"run{i}" for i in range(7)]
        result = call("runs", "compare", *map(make, names))
        lines = result.out.splitlines()
        assert max(map(len, lines)) <= 80
        heads = [line.split() for line in lines if line.strip().startswith("run")]
        assert heads == [names[:3], names[3:6], names[6:]]

    def test_a_run_that_failed_says_why(self, make: Make, call: Call) -> None:
        events = [*rounds(1, 2), {"event": "failed", "cause": "[gone]"}]
        result = call("runs", "compare", make("a"), make("b", events=events))
        assert "failed: [gone]" in result.out
        assert "2 of 10" in result.out
        assert "counts its whole plan" in result.out

    def test_json(self, make: Make, call: Call) -> None:
        quality = [{"tstr_accuracy_mlp": value(found)} for found in (0.5, 0.9)]
        paths = [
            make("a", quality=quality[0]),
            make("b", {"privacy.epsilon": 8}, quality=quality[1]),
        ]
        result = call("runs", "compare", *paths, "--json")
        found = json.loads(result.out)
        assert [run["folder"] for run in found["runs"]] == list(map(str, paths))
        assert found["runs"][0]["state"] == "finished"
        assert found["config"] == {"privacy.epsilon": [3.0, 8]}
        assert found["best"] == {"tstr_accuracy_mlp": str(paths[1])}
        assert (found["comparable"], found["obstacles"]) == (True, [])
        assert found["epsilon_together"] == 5.0

    def test_a_real_run(self, make: Make, call: Call, finished_run: fedveil.Run) -> None:
        result = call("runs", "compare", finished_run.path, make("b"), "--json")
        told = json.loads(result.out)["runs"][0]
        assert told["run_id"] == finished_run.metrics["run_id"]
        assert told["privacy"]["epsilon"] == finished_run.privacy["epsilon"]
        assert told["quality"].keys() == finished_run.metrics["quality"].keys()
        assert told["seconds"] == finished_run.metrics["seconds"]

    @pytest.mark.parametrize(
        ("second", "code", "told"),
        [("gone", 2, "gone: holds no run"), ("torn", 1, "metrics.json: is damaged")],
    )
    def test_errors_are_one_line(
        self, second: str, code: int, told: str, make: Make, call: Call, tmp_path: Path
    ) -> None:
        (make("torn") / "metrics.json").write_text("{")
        result = call("runs", "compare", make("a"), tmp_path / second)
        assert (result.code, result.out) == (code, "")
        assert told in result.err
        assert result.err.count("\n") == 1


class TestListCommand:
    def test_newest_first_and_damaged_last(self, make: Make, call: Call, tmp_path: Path) -> None:
        ages = {"old": 1_000_000_000, "new": 1_500_000_000}
        none = PRIVACY | {"epsilon": None, "target_epsilon": None}
        make("new", events=rounds(1, 2))
        make("old", privacy=none)
        for name, age in ages.items():
            os.utime(tmp_path / name / "config.toml", (age, age))
        (make("torn") / "metrics.json").write_text("{")
        (tmp_path / "notes").mkdir()
        result = call("runs", "list", tmp_path)
        lines = result.out.splitlines()
        assert [line.split()[0] for line in lines] == ["run", "new", "old", "torn"]
        assert lines[1].split()[1:] == [
            "2017-07-14", "02:40", "vae", "2.500", "2", "of", "10", "unfinished", "4.0",
        ]  # fmt: skip
        assert lines[2].split()[1:] == [
            "2001-09-09", "01:46", "vae", "NOT", "PRIVATE", "10", "finished", "20.0",
        ]  # fmt: skip
        assert "damaged" in lines[3]

    def test_json(self, make: Make, call: Call, tmp_path: Path) -> None:
        make("a")
        (make("torn") / "metrics.json").write_text("{")
        found = json.loads(call("runs", "list", tmp_path, "--json").out)
        assert [(Path(r["folder"]).name, r["state"]) for r in found["runs"]] == [
            ("a", "finished"),
            ("torn", "damaged"),
        ]

    def test_none(self, call: Call, tmp_path: Path) -> None:
        assert call("runs", "list", tmp_path) == (0, f"{tmp_path}: holds no runs\n", "")

    def test_no_folder(self, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        result = call("runs", "list")
        assert (result.code, result.out) == (2, "")
        assert result.err == "error: runs: is no folder; give the one that holds your runs\n"
