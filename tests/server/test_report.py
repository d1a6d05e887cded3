"""The report as HTML: what it says of every kind of run, and that nothing in it can run or load."""

import math
import re
from html.parser import HTMLParser
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest

from fedveil.config import FedveilError
from fedveil.data_prep.schema import Schema, parse_schema
from fedveil.models import histograms
from fedveil.server.aggregation import ServerState
from fedveil.server.evaluation import Evaluated
from fedveil.server.intervals import BELOW, FEW
from fedveil.server.report import Sources, gathered, render
from fedveil.server.store import Checkpoint

PRIVACY: dict[str, Any] = {
    "mechanism": "central", "unit": "record", "against": "everyone but the server",
    "target_epsilon": 3.0, "epsilon": 2.875, "training_epsilon": 2.75, "holdout_epsilon": 2.875,
    "delta": 1e-6, "clipping_norm": 1.5, "noise_multiplier": 4.25, "sampling_rate": 0.125,
    "expected_batch": 512.0, "rounds": 4, "releases_per_round": 1, "evaluations": 2,
    "evaluation_noise": 1.25, "figures_noise": 0.0, "accountant": "PLD",
    "second_opinions": {"prv": 2.91, "rdp": 3.02},
}  # fmt: skip
NONE = PRIVACY | {
    "mechanism": "none", "against": "NOBODY: THIS RUN IS NOT PRIVATE", "epsilon": None,
    "target_epsilon": None, "training_epsilon": None, "holdout_epsilon": None, "accountant": "none",
    "noise_multiplier": 0.0, "evaluation_noise": 0.0, "clipping_norm": None, "second_opinions": {},
}  # fmt: skip
QUALITY = {
    "loss": {"value": 1.25, "noise": 0.0625},
    "one_way_tv": {"value": 0.25, "noise": 0.015, "floor": 0.24},
    "tstr_accuracy_mlp": {"value": 0.875, "noise": 0.02},
    "tstr_accuracy_logistic": {"value": 0.5, "noise": 0.4},
}
EVIL = "</style><script>alert(1)</script>\"'><img src=x onerror=y>"
SCHEMA = parse_schema(
    {
        "label": "ill",
        "column": [
            {"name": "hue", "kind": "categorical", "categories": ["a", "b"]},
            {"name": "ill", "kind": "categorical", "categories": ["no", "yes"]},
        ],
    },
    "here",
)


def event(name: str, number: int, **other: Any) -> dict[str, Any]:  # noqa: ANN401
    """A `round` or an `evaluated` event."""
    facts: dict[str, Any] = {"epsilon": 0.5 * number, "quality": QUALITY}
    if name == "round":
        facts |= {"sites": 3, "dropped": [], "seconds": {"sites": 2.0, "server": 0.5}}
    return {"event": name, "round": number, **facts, **other}


def run_event(privacy: dict[str, Any]) -> dict[str, Any]:
    """The event that a run begins with."""
    return {"event": "run", "run_id": "cafe12", "privacy": privacy, "sites": 3}


def sources(*events: dict[str, Any], **other: Any) -> Sources:  # noqa: ANN401
    """A private run of two rounds, with what else there is of it."""
    config = {"federation": {"name": "cohort"}, "privacy": {"epsilon": 3, "epsilon_holdout": 2.9}}
    told = (run_event(PRIVACY), event("round", 1), event("round", 2), event("evaluated", 2))
    given: dict[str, Any] = {"events": (*told, *events), "config": ("[federation]", config)}
    return Sources("demo", **(given | other))


def finished(privacy: dict[str, Any] = PRIVACY, **other: Any) -> dict[str, Any]:  # noqa: ANN401
    """What `metrics.json` holds."""
    return {
        "family": "vae", "privacy": privacy | {"not_claimed": ["a patient is not hidden"]},
        "quality": QUALITY, "seconds": {"total": 10.0},
        "ledgers": {"1": {"count": 7, "head": "ab" * 32}},
    } | other  # fmt: skip


def checkpoint(one_way: np.ndarray, noises: int = 1, count: int = 1) -> Checkpoint:
    """A state that knows noised histograms."""
    known = Evaluated(count, 2, QUALITY, {"one_way": one_way}, noises)
    return Checkpoint(
        "cafe12", "", ServerState(2, 2, {}, {}, {}, {}), known, {2: (5, "cd" * 32)}, 20.0
    )


class Page(HTMLParser):
    """Tags with their attributes, and the text that is read."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._parts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._parts.append(" " * (tag in {"td", "th", "small", "li"}))

    def handle_data(self, data: str) -> None:
        self._parts.append(data)

    @property
    def text(self) -> str:
        """Without markup, blanks as one."""
        return " ".join("".join(self._parts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of all such tags."""
        return [found for name, found in self.tags if name == tag]


def share(value: float, low: float, high: float, told: str = "") -> dict[str, Any]:
    """A figure with its interval, as `description.describe` says it."""
    return {"value": value, "low": low, "high": high, "told": told}


def federation(**other: Any) -> dict[str, Any]:  # noqa: ANN401
    """What `statistics.json` holds of three columns."""
    ages = zip((0.05, 0.25, 0.5, 0.75, 0.95), (20, 28, 37, 48, 64), strict=True)
    return {
        "modality": "table", "units": 1000.0, "epsilon": 0.3, "unit": "record",
        "interval": {"level": 0.95, "of": "noise of the mechanism, not sampling error"},
        "total": share(1012.0, 990.0, 1034.0),
        "columns": [
            {"name": "age", "kind": "integer", "label": False, "declared": [0.0, 100.0],
             "transform": "none", "missing": share(0.1, 0.05, 0.15),
             "quantiles": [{"part": q, "value": v, "low": v - 2, "high": v + 1} for q, v in ages]},
            {"name": "hue", "kind": "categorical", "label": False,
             "missing": share(0.001, 0.0, 0.004, BELOW),
             "levels": [{"name": "red", **share(0.75, 0.7, 0.8)},
                        {"name": "blue", **share(0.02, 0.001, 0.039, FEW)}]},
            {"name": "ill", "kind": "categorical", "label": True,
             "levels": [{"name": "no", **share(0.6, 0.55, 0.65)},
                        {"name": "yes", **share(0.4, 0.35, 0.45)}]},
        ],
        "pairs": [
            {"columns": ["age", "hue"], **share(0.1, 0.0, 0.2, "within its noise"), "floor": 0.15},
            {"columns": ["age", "ill"], **share(0.9, 0.8, 0.95), "floor": 0.05},
            {"columns": ["hue", "ill"], "told": "no two groups"},
        ],
    } | other  # fmt: skip


def page(found: Sources) -> Page:
    """A report, read."""
    return Page(render(found))


class TestThePromise:
    def test_unit_whom_and_how_much_in_one_sentence(self) -> None:
        text = page(sources(metrics=finished())).text
        assert (
            "Protects one record against everyone but the server, by mechanism central: "
            "(2.875, 1e-06)-differential privacy." in text
        )
        assert "Finished" in text
        assert "run cafe12" in text
        assert "family vae, 3 sites, 2 of 4 rounds" in text
        assert "3 sites" in text

    def test_both_accounts_with_their_limits(self) -> None:
        found = gathered(sources(metrics=finished()))
        training, holdout = found.accounts
        assert (training.limit, training.charged, training.noise, training.rate) == (
            3, 2.75, 4.25, 0.125,
        )  # fmt: skip
        assert training.releases == "4 rounds, 1 release each"
        assert (holdout.limit, holdout.charged, holdout.noise) == (2.9, 2.875, 1.25)
        text = page(sources(metrics=finished())).text
        for said in ("PRV 2.910, RDP 3.020", "PLD", "0.125", "512", "1.5"):
            assert said in text

    @pytest.mark.parametrize(
        ("epsilon", "said"),
        [(2.875, "17.8"), (8.0, "2,990"), (0.1, "1.11"), (3.0, "20.1"), (100.0, "2.69e+43")],
    )
    def test_what_it_means_is_never_rounded_down(self, epsilon: float, said: str) -> None:
        """e^2.875 is 17.73, e^8 2981, e^0.1 1.105, e^3 20.09, e^100 2.688e43."""
        priced = [run_event(PRIVACY | {"epsilon": epsilon})]
        assert f"eε ≈ {said} times" in page(Sources("demo", priced)).text

    def test_what_is_not_claimed(self) -> None:
        text = page(sources(metrics=finished())).text
        assert "a patient is not hidden" in text
        assert "How long a site takes" in text

    def test_no_mechanism_says_so_in_capitals_and_red_and_promises_nothing(self) -> None:
        none = [run_event(NONE), event("round", 1, epsilon=None)]
        html = render(Sources("demo", none))
        assert re.search(r'<div class="danger">\s*<p class="lead">NOT PRIVATE', html)
        text = Page(html).text
        assert "NOBODY: THIS RUN IS NOT PRIVATE" in text
        for never in ("differential privacy", "Protects one", "Epsilon charged", "None"):
            assert never not in text

    def test_a_private_run_has_no_such_box(self) -> None:
        html = render(sources(metrics=finished()))
        assert "NOT PRIVATE" not in html
        assert 'class="danger"' not in html

    def test_a_run_of_before_there_were_two_accounts(self) -> None:
        kept = {k: v for k, v in PRIVACY.items() if "holdout" not in k and "evaluation" not in k}
        old = {k: v for k, v in kept.items() if k not in {"training_epsilon", "figures_noise"}}
        found = gathered(Sources("old", [run_event(old), event("round", 1)]))
        assert [(a.limit, a.charged) for a in found.accounts] == [(3.0, 2.875)]
        assert "Training" in page(Sources("old", [run_event(old)])).text


class TestHowItEnded:
    def test_a_failure_names_its_cause_and_charges_the_plan(self) -> None:
        text = page(sources({"event": "failed", "cause": "round 3: too few"})).text
        assert "Failed" in text
        assert "The run failed after round 2: round 3: too few" in text
        assert "charged all of its plan" in text
        assert "1.000 of it drawn by round 2" in text

    def test_a_run_that_was_interrupted(self) -> None:
        text = page(sources({"event": "failed", "cause": "KeyboardInterrupt"})).text
        assert "Interrupted" in text
        assert "can go on with --resume" in text

    def test_a_run_that_failed_before_its_first_round(self) -> None:
        events = [run_event(PRIVACY), {"event": "failed", "cause": "x"}]
        text = page(Sources("demo", events)).text
        assert "The run failed in its first round: x" in text
        assert "No evaluation was made before the run stopped" in text
        assert "No round was completed." in text

    def test_a_last_line_without_the_last_file_is_unfinished(self) -> None:
        assert gathered(sources({"event": "finished"})).status == "unfinished"

    def test_resumes_and_lost_rounds(self) -> None:
        resumed = run_event(PRIVACY) | {
            "event": "resumed", "round": 2, "lost": [3], "damaged": ["000002: torn"],
        }  # fmt: skip
        text = page(sources(resumed, event("round", 4))).text
        assert "After round 2; round 3 was cut off; 000002: torn." in text
        assert "Cut off and lost: round 3; what was lost counts as spent." in text


class TestRoundsSitesAndTime:
    def test_charts_of_epsilon_and_of_each_kind_of_figure(self) -> None:
        charts = {chart.title: chart for chart in gathered(sources()).charts}
        assert [title.partition(":")[0] for title in charts] == [
            "Epsilon spent by round", "Loss", "Total variation", "Accuracy",
        ]  # fmt: skip
        assert charts["Epsilon spent by round"].summary == (
            "spent: 0 at round 0, 1 at round 2; limit: 3"
        )
        accuracy = list(charts.values())[-1]
        assert [line.name for line in accuracy.lines] == ["one hidden layer", "logistic regression"]
        floor = charts["Total variation: real against synthetic"].lines[1]
        assert (floor.dashed, floor.hue) == (True, 1)

    def test_figures_that_noise_drowns_say_so(self) -> None:
        drowned = {figure.name: figure.drowned for figure in gathered(sources()).figures}
        assert drowned == {
            "loss": False,
            "one_way_tv": True,  # 0.25 is within two times 0.015 of its floor, 0.24
            "tstr_accuracy_mlp": False,
            "tstr_accuracy_logistic": True,
        }

    def test_a_figure_that_nobody_knows_yet_is_shown(self) -> None:
        strange = event("evaluated", 2, quality={"fid": {"value": 3.5, "noise": 0.5}})
        text = page(sources(strange)).text
        assert "fid An accounted figure of this run. 3.5 0.5 -" in text

    def test_drop_outs_and_refusals(self) -> None:
        dropped = [{"site": 2, "reason": "refused: budget"}]
        told = sources(event("round", 3, dropped=dropped), event("round", 4, dropped=dropped))
        text = page(told).text
        assert "2 refused: budget 2 3-4" in text
        assert "Every site's reply" not in text
        assert "Every site's reply could be used in each of the 2 rounds." in page(sources()).text

    def test_heads_come_from_the_metrics_or_else_the_checkpoint(self) -> None:
        point = checkpoint(np.zeros(4))
        assert gathered(sources(metrics=finished(), point=point)).heads == {"1": (7, "ab" * 32)}
        assert gathered(sources(point=point)).heads == {"2": (5, "cd" * 32)}

    def test_seconds_add_up_to_the_total(self) -> None:
        found = gathered(sources(metrics=finished()))
        assert found.total == 10.0
        assert found.seconds == (
            ("sites", 4.0, 0.4), ("server", 1.0, 0.1), ("everything else", 5.0, 0.5),
        )  # fmt: skip
        assert gathered(sources(point=checkpoint(np.zeros(4)))).total == 20.0
        assert gathered(sources()).total == 5.0

    def test_when_it_was_begun(self) -> None:
        begun = {"begun": "2026-11-20T15:04:05+00:00"}
        assert "begun 20 November 2026, 15:04 UTC" in page(sources(environment=begun)).text


class TestMarginals:
    def shares(self, **other: Any) -> tuple[list[list[str]], float]:  # noqa: ANN401
        """What each bar says, by column."""
        found = gathered(sources(schema=SCHEMA, **other))
        return [[bar.words for bar in column.bars] for column in found.marginals], found.counted

    def test_noised_real_shares_beside_synthetic_ones(self) -> None:
        real = histograms.joined([np.array([150.0, 50.0]), np.array([210.0, -10.0])])
        synthetic = histograms.joined([np.array([40, 60]), np.array([100, 0])])
        point = checkpoint(real, noises=2, count=2)
        (hue, ill), counted = self.shares(point=point, synthetic=synthetic)
        assert counted == pytest.approx(100)  # records: 200 in two evaluations
        # Sensitivity of count, loss, one_way, two_way, tstr_logistic, tstr_mlp: sqrt(6).
        spread = 2 * 1.25 * math.sqrt(6) * 1.001 * math.sqrt(2) * math.sqrt(2) / 200
        assert hue == [
            f"a: real 75.0% ({0.75 - spread:.1%} to {0.75 + spread:.1%}), synthetic 40.0%",
            f"b: real 25.0% ({0.25 - spread:.1%} to {0.25 + spread:.1%}), synthetic 60.0%",
        ]
        assert ill == [
            f"no: real 100.0% ({1 - spread:.1%} to 100.0%), synthetic 100.0%",
            f"yes: real 0.0% (0.0% to {spread:.1%}), synthetic 0.0%",
        ]

    def test_without_evaluations_synthetic_ones_alone_and_said_so(self) -> None:
        synthetic = histograms.joined([np.array([1, 3]), np.array([2, 2])])
        (hue, _), counted = self.shares(synthetic=synthetic)
        assert hue == ["a: synthetic 25.0%", "b: synthetic 75.0%"]
        assert counted == 0
        text = page(sources(schema=SCHEMA, synthetic=synthetic)).text
        assert "Synthetic records only: no histogram of real ones was paid for." in text

    def test_a_failed_run_has_real_ones_alone(self) -> None:
        point = checkpoint(histograms.joined([np.array([1.0, 3.0]), np.array([2.0, 2.0])]))
        text = page(sources(schema=SCHEMA, point=point)).text
        assert "There is no released model to draw synthetic records from." in text

    def test_nothing_at_all_is_said(self) -> None:
        assert "the run has released no model" in page(sources(schema=SCHEMA)).text

    def test_images_are_in_the_file(self) -> None:
        html = render(sources(samples=b"\x89PNG"))
        assert 'src="data:image/png;base64,iVBORw=="' in html


class TestTheFederation:
    def test_without_statistics_there_is_no_such_section(self) -> None:
        html = render(sources())
        assert 'id="federation"' not in html
        assert 'href="#federation"' not in html

    def test_every_interval_is_said_to_be_of_the_noise(self) -> None:
        text = page(sources(statistics=federation())).text
        assert "95 % interval, which is for the noise of the mechanism, not for sampling" in text
        assert "it cost epsilon 0.300 by itself" in text
        assert "some 1,012 records (990 to 1,034)" in text

    def test_missing_values_largest_first_and_small_ones_flagged(self) -> None:
        text = page(sources(statistics=federation())).text
        assert "2 of 3 columns may be missing" in text
        assert "age 10.0 % 5.0 to 15.0 %" in text
        assert f"hue {BELOW} 0.10 % 0.00 to 0.40 %" in text
        assert text.index("age 10.0 %") < text.index(f"hue {BELOW}")

    def test_ranges_in_the_columns_own_units(self) -> None:
        found = page(sources(statistics=federation()))
        assert "0 to 100 20 18 to 21 28 26 to 29 37 35 to 38 48 46 to 49 64 62 to 65" in found.text
        strips = [a["aria-label"] for a in found.all("svg") if a.get("class") == "strip"]
        assert strips == [
            "5% below 20; 25% below 28; 50% below 37; 75% below 48; 95% below 64"
        ]  # fmt: skip

    def test_groups_and_classes_with_their_intervals(self) -> None:
        facts = gathered(sources(statistics=federation())).federation
        assert facts is not None
        assert facts.classes is not None
        assert [group.words for group in facts.classes.shown] == [
            "no: 60.0 % (55.0 to 65.0 %)", "yes: 40.0 % (35.0 to 45.0 %)",
        ]  # fmt: skip
        (hue,) = facts.groups
        assert [(g.words, g.short) for g in hue.shown] == [
            ("red: 75.0 % (70.0 to 80.0 %)", "75.0 % (70.0-80.0)"),
            (f"blue: 2.0 % (0.1 to 3.9 %), {FEW}", FEW),
        ]  # fmt: skip
        assert (hue.untold, hue.count, hue.more) == (1, 2, 0)
        # 240 wide is 1.05 times the highest end, 0.8.
        assert hue.shown[0].bar.width == round(240 * 0.75 / 0.84, 1)
        assert hue.shown[0].line.x == round(240 * 0.7 / 0.84, 1)

    def test_of_many_groups_the_largest_are_shown(self) -> None:
        many = [{"name": f"g{i}", **share(i / 1000, 0.0, 0.05, BELOW)} for i in range(40)]
        told = federation()
        told["columns"][1]["levels"] = many
        facts = gathered(sources(statistics=told)).federation
        assert facts is not None
        assert [group.name for group in facts.groups[0].shown] == [f"g{i}" for i in range(28, 40)]
        assert (
            "The largest 12 of 40. 40 of 40 are too small to tell."
            in page(sources(statistics=told)).text
        )

    def test_the_heat_map_greys_what_is_within_its_noise_and_says_all_in_words(self) -> None:
        told = sources(statistics=federation())
        facts = gathered(told).federation
        assert facts is not None
        assert facts.heat is not None
        hue, ill, blank = facts.heat.squares
        # Cells of 40; a column's row is its place in the schema.
        assert (hue.x, hue.y, hue.share, hue.text) == (0, 40, None, "")
        assert hue.words == "age and hue: 0.10 (0.00 to 0.20), within its noise"
        assert (ill.x, ill.y, ill.share, ill.text) == (0, 80, 0.9, ".90")
        assert (blank.x, blank.y, blank.share) == (40, 80, None)
        assert blank.words == "hue and ill: no two groups"
        assert facts.heat.words == (
            "1 of 3 pairs of columns are clear of the noise. Strongest: age and ill 0.90"
        )
        found = page(told)
        assert "age and ill 0.90 0.80 to 0.95 0.05" in found.text
        assert sum(box.get("class") == "drowned" for box in found.all("rect")) == 2
        assert sum(box.get("class") == "square" for box in found.all("rect")) == 1

    def test_sixty_columns_stay_readable(self) -> None:
        names = [f"column_{i}" for i in range(60)]
        pairs = [
            {"columns": [a, b], **share(0.001 * i, 0.0005 * i, 0.002 * i), "floor": 0.01}
            for i, (a, b) in enumerate(combinations(names, 2))
        ]
        columns = [
            {"name": name, "kind": "categorical", "label": False, "levels": []} for name in names
        ]
        told = sources(statistics=federation(columns=columns, pairs=pairs[1:500]))
        facts = gathered(told).federation
        assert facts is not None
        assert facts.heat is not None
        assert (facts.heat.side, len(facts.strongest)) == (14, 20)
        assert facts.heat.width <= 1100
        assert {square.text for square in facts.heat.squares} == {""}
        assert "The 20 strongest of 499" in page(told).text

    def test_a_run_without_noise_says_that_it_is_not_private(self) -> None:
        none = [run_event(NONE), event("round", 1, epsilon=None)]
        text = page(Sources("demo", none, statistics=federation(epsilon=None))).text
        assert "No noise was added: they are exact and NOT PRIVATE" in text
        assert "noise of the mechanism" not in text

    def test_other_kinds_of_data_have_what_they_have(self) -> None:
        bare = {k: federation()[k] for k in ("units", "interval")} | {"modality": "image"}
        text = page(sources(statistics=bare)).text
        assert "The data of the federation" in text
        for absent in ("Missing values", "Ranges", "What goes with what", "In all some"):
            assert absent not in text

    def test_texts_have_kinds_of_characters(self) -> None:
        levels = [{"name": "digits", **share(0.1, 0.09, 0.11)}]
        column = {"name": "characters", "kind": "text", "label": False, "levels": levels}
        told = {"modality": "text", "units": 9.0, "columns": [column]}
        text = page(sources(statistics={**told, "interval": {"level": 0.95}})).text
        assert "Kinds of characters" in text
        assert "10.0 % (9.0-11.0)" in text
        assert "Missing values" not in text
        assert "Representation of groups" not in text

    def test_shares_of_one_are_not_more(self) -> None:
        told = federation()
        told["columns"][2]["levels"] = [{"name": "no", **share(1.0, 0.99, 1.0)}]
        facts = gathered(sources(statistics=told)).federation
        assert facts is not None
        assert facts.classes is not None
        assert facts.classes.shown[0].bar.width == 240.0


def evil_schema() -> Schema:
    """A schema whose every name would run, if it could."""
    raw = {"modality": "table", "column": [
        {"name": EVIL, "kind": "categorical", "categories": [f"{EVIL}1", f"{EVIL}2"]},
    ]}  # fmt: skip
    return parse_schema(raw, "here")


def evil_statistics() -> dict[str, Any]:
    """Statistics in which every text would run, if it could."""

    def made(found: Any) -> Any:  # noqa: ANN401  JSON
        if isinstance(found, dict):
            return {key: made(value) for key, value in found.items()}
        if isinstance(found, list):
            return [made(value) for value in found]
        return f"{EVIL}{found}" if isinstance(found, str) and found else found

    found: dict[str, Any] = made(federation())
    return found


class TestTheFile:
    def evil(self) -> str:
        """A report with something evil wherever text comes in."""
        privacy = PRIVACY | {"against": EVIL, "accountant": EVIL, "second_opinions": {EVIL: 1.0}}
        quality = {EVIL: {"value": 1.0, "noise": 0.1}, f"tstr_x_{EVIL}": {"value": 1, "noise": 0}}
        resumed = run_event(privacy) | {
            "event": "resumed", "round": 2, "lost": [], "damaged": [EVIL],
        }  # fmt: skip
        events = (
            run_event(privacy) | {"run_id": EVIL},
            resumed | {"run_id": EVIL},
            event("round", 1, dropped=[{"site": 1, "reason": EVIL}], seconds={EVIL: 1.0}),
            event("evaluated", 1, quality=quality),
            {"event": "failed", "cause": EVIL},
        )
        metrics = finished(
            privacy | {"not_claimed": [EVIL]}, family=EVIL, quality=quality,
            ledgers={EVIL: {"count": 1, "head": EVIL}},
        )  # fmt: skip
        everything: dict[str, Any] = {
            "config": (EVIL, {"federation": {"name": EVIL}}), "environment": {EVIL: EVIL},
            "schema": evil_schema(), "synthetic": np.ones(2), "statistics": evil_statistics(),
        }  # fmt: skip
        html = render(Sources(EVIL, events, metrics=metrics, **everything))
        return html + render(Sources(EVIL, events, **everything))

    def test_whatever_is_put_in_is_escaped(self) -> None:
        html = self.evil()
        assert "&lt;script&gt;" in html
        found = Page(html)
        assert not found.all("script")
        assert not [tag for tag in found.all("img") if tag.get("src") == "x"]
        assert not [a for _, attrs in found.tags for a in attrs if a.startswith("on")]

    def test_it_loads_nothing(self) -> None:
        html = self.evil() + render(sources(samples=b"\x89PNG", metrics=finished()))
        assert "://" not in html
        assert "@import" not in html
        assert "url(" not in html
        found = Page(html)
        assert {"link", "iframe", "object", "embed", "form"}.isdisjoint({t for t, _ in found.tags})
        loaded = [
            a[k] for _, a in found.tags for k in ("src", "srcset", "data", "poster") if k in a
        ]
        assert loaded == ["data:image/png;base64,iVBORw=="]
        assert {a["href"] for a in found.all("a")} <= {f"#{s['id']}" for s in found.all("section")}
        policy = [m["content"] for m in found.all("meta") if "http-equiv" in m]
        assert policy[0] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

    def test_headings_tables_and_pictures_can_be_read_aloud(self) -> None:
        dropped = [{"site": 2, "reason": "no reply"}]
        told = sources(
            event("round", 3, dropped=dropped), metrics=finished(), schema=SCHEMA,
            synthetic=np.ones(4), samples=b"\x89PNG", statistics=federation(),
        )  # fmt: skip
        found = page(told)
        levels = [int(tag[1]) for tag, _ in found.tags if re.fullmatch("h[1-6]", tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(b - a <= 1 for a, b in pairwise(levels))
        assert all(head.get("scope") in {"col", "row"} for head in found.all("th"))
        assert all(picture.get("aria-label") for picture in found.all("svg"))
        assert all(picture.get("alt") for picture in found.all("img"))
        assert found.all("html")[0]["lang"] == "en"
        # What scrolls by itself must be reachable by the keyboard.
        regions = [box for box in found.all("div") if box.get("class") == "scroll"]
        assert len(regions) == len(found.all("table")) + 1  # and the heat map
        assert all(box.get("tabindex") == "0" and box.get("aria-label") for box in regions)

    def test_equal_sources_make_equal_reports(self) -> None:
        assert render(sources(metrics=finished())) == render(sources(metrics=finished()))

    @pytest.mark.parametrize(
        "damaged",
        [
            sources(metrics=finished() | {"seconds": 3}),
            sources({"event": "round", "round": 5}),
            sources(metrics=finished() | {"quality": {"loss": 3}}),
            Sources("demo", [{"event": "round"}]),
            Sources("demo", [{"no": "event"}]),
            Sources("demo", [run_event({"epsilon": 1.0})]),
            sources(environment={"begun": "yesterday"}),
            sources(statistics={"units": 3}),
            sources(statistics=federation(pairs=[{"columns": ["age", "nobody"], "told": ""}])),
            sources(statistics=federation(columns=3)),
        ],
    )
    def test_what_is_none_of_ours_is_one_line(self, damaged: Sources) -> None:
        with pytest.raises(FedveilError, match=r"demo: .* is damaged") as error:
            render(damaged)
        assert "\n" not in str(error.value)
