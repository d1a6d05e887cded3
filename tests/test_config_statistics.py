"""The share of the statistics: which shares are refused, which one is in force, what follows."""

from typing import Any

import pytest

from fedveil.config import ConfigError, RunConfig, validated

MODALITIES = ("table", "image", "text")


def config(**sections: dict[str, Any]) -> RunConfig:
    """A run on breast cancer; each keyword is a section whose options win."""
    raw: dict[str, Any] = {
        "data": {"source": "sklearn:breast_cancer"},
        "model": {"family": "vae"},
    }
    for section, options in sections.items():
        raw.setdefault(section, {}).update(options)
    return validated(RunConfig, raw)


def share(value: float | None, **options: Any) -> dict[str, Any]:  # noqa: ANN401
    return {"statistics_share": value, **options}


NO_ROUNDS = (
    "federation.rounds = 0: must be >= 1 unless privacy.statistics_share = 1, where nothing is "
    "trained beyond the statistics"
)
MARGINAL = {"family": "marginal"}
SITE = {"mechanism": "site"}


class TestRefusals:
    @pytest.mark.parametrize(
        ("sections", "line"),
        [
            (
                {"model": MARGINAL, "privacy": share(0.5)},
                (
                    'privacy.statistics_share = 0.5: model.family = "marginal" is made of the '
                    "statistics alone; leave it out"
                ),
            ),
            (
                {"model": MARGINAL, "privacy": share(0.0)},
                (
                    'privacy.statistics_share = 0: model.family = "marginal" is made of the '
                    "statistics alone; leave it out"
                ),
            ),
            (
                {"model": {"warm_start": False}, "privacy": share(1.0)},
                (
                    "model.warm_start = false: with privacy.statistics_share = 1 nothing would be "
                    "trained; leave one of them out"
                ),
            ),
            (
                {"federation": {"rounds": 0}},
                NO_ROUNDS,
            ),
            (
                {"federation": {"rounds": 0}, "privacy": share(0.99)},
                NO_ROUNDS,
            ),
            (
                {"privacy": share(0.7), "evaluation": {"training_share": 0.3}},
                (
                    "privacy.statistics_share + evaluation.training_share = 1: must leave some of "
                    "the budget to training; lower one of them below a sum of 1"
                ),
            ),
            ({"privacy": share(1.5)}, "privacy.statistics_share = 1.5: must be <= 1"),
            ({"privacy": share(-0.1)}, "privacy.statistics_share = -0.1: must be >= 0"),
            (
                {"privacy": share(float("nan"))},
                "privacy.statistics_share = NaN: must be a finite number",
            ),
            (
                {"statistics": {"max_cell": 5}},
                'statistics.max_cell: unknown key; did you mean "max_cells"?',
            ),
            ({"statistics": {"max_cells": 0}}, "statistics.max_cells = 0: must be >= 1"),
        ],
    )
    def test_in_one_line(self, sections: dict[str, dict[str, Any]], line: str) -> None:
        with pytest.raises(ConfigError) as caught:
            config(**sections)
        assert str(caught.value) == line

    @pytest.mark.parametrize(
        ("model", "line"),
        [
            (
                {"family": "marginel"},
                (
                    "model.family = \"marginel\": must be 'vae' or 'marginal'; did you mean "
                    '"marginal"?'
                ),
            ),
            ({"family": "gan"}, "model.family = \"gan\": must be 'vae' or 'marginal'"),
            (
                {"family": 'a "quoted" one'},
                "model.family = \"a \\\"quoted\\\" one\": must be 'vae' or 'marginal'",
            ),
            # What is one family's is not another's; the kind is no part of where it stands.
            ({"family": "marginal", "latent": 4}, "model.latent: unknown key"),
            ({"family": "marginal", "warm_start": True}, "model.warm_start: unknown key"),
            (
                {"family": "vae", "warm_strat": True},
                'model.warm_strat: unknown key; did you mean "warm_start"?',
            ),
            ({"family": "vae", "latent": 0}, "model.latent = 0: must be >= 1"),
        ],
    )
    def test_of_families_and_their_options(self, model: dict[str, Any], line: str) -> None:
        with pytest.raises(ConfigError) as caught:
            validated(RunConfig, {"data": {"source": "sklearn:digits"}, "model": model})
        assert str(caught.value).startswith(line)
        assert "\n" not in str(caught.value)

    def test_what_goes_together(self) -> None:
        config(model=MARGINAL, privacy=share(1.0))
        config(federation={"rounds": 0}, privacy=share(1.0))
        config(federation={"rounds": 0}, model=MARGINAL)
        config(model={"warm_start": False}, privacy=share(0.5))
        config(privacy=share(0.7), evaluation={"training_share": 0.29})
        config(privacy=share(1.0), evaluation={"training_share": 0.3})


class TestInForce:
    @pytest.mark.parametrize("modality", MODALITIES)
    def test_it_hangs_on_the_kind_of_data(self, modality: str) -> None:
        made = config().resolved(modality)
        assert 0 < (made.privacy.statistics_share or 0) < 1
        assert made.statistics_share == made.privacy.statistics_share
        assert made.rounds == made.federation.rounds == 200
        assert made.warm_start

    def test_while_nobody_said_what_the_data_is_it_stays_open(self) -> None:
        made = config().resolved()
        assert made.privacy.statistics_share is None
        assert made.statistics_share == 0
        assert not made.warm_start
        assert made.resolved("table").privacy == config().resolved("table").privacy

    @pytest.mark.parametrize("modality", ["", *MODALITIES])
    def test_a_family_that_is_fitted_has_all_and_is_never_trained(self, modality: str) -> None:
        made = config(model=MARGINAL).resolved(modality)
        assert made.privacy.statistics_share == made.statistics_share == 1
        assert made.rounds == made.federation.rounds == 0
        assert not made.warm_start
        assert (made.evaluate_every, made.evaluations) == (0, 1)
        assert config(model=MARGINAL, data={"holdout": 0.0}).evaluations == 0

    @pytest.mark.parametrize("modality", ["", *MODALITIES])
    def test_under_unit_site_there_are_none_but_by_wish(self, modality: str) -> None:
        made = config(privacy=SITE).resolved(modality)
        assert made.privacy.statistics_share == made.statistics_share == 0
        assert made.rounds == 200
        asked = config(privacy={**SITE, **share(0.3)}).resolved(modality)
        assert asked.statistics_share == 0.3
        assert config(privacy=SITE, model=MARGINAL).resolved(modality).statistics_share == 1

    def test_what_is_asked_for_is_in_force(self) -> None:
        for value, rounds in ((0.0, 200), (0.25, 200), (1.0, 0)):
            made = config(privacy=share(value)).resolved("table")
            assert (made.statistics_share, made.rounds) == (value, rounds)
            assert made.warm_start == (value > 0)
        assert not config(privacy=share(0.5), model={"warm_start": False}).warm_start

    @pytest.mark.parametrize("modality", ["", *MODALITIES])
    @pytest.mark.parametrize(
        "sections",
        [
            {},
            {"model": MARGINAL},
            {"privacy": SITE},
            {"privacy": share(1.0)},
            {"privacy": share(0.2)},
            {"privacy": {"mechanism": "local"}},
        ],
    )
    def test_resolved_twice_is_resolved_once(
        self, sections: dict[str, dict[str, Any]], modality: str
    ) -> None:
        once = config(**sections).resolved(modality)
        assert once.resolved(modality) == once
        read = RunConfig.model_validate_json(once.model_dump_json(by_alias=True))
        assert read == once
        assert read.resolved(modality) == once
        if modality:
            assert once.resolved() == once

    def test_of_the_records_that_are_trained_on(self) -> None:
        """What the workload is chosen by: public numbers, whatever the mechanism."""
        parts = {"holdout": 0.2, "audit": 0.1, "records": 1000}
        assert config(data=parts).trained == pytest.approx(700)
        assert config(data=parts, privacy=SITE).trained == pytest.approx(700)
        persons = {"unit": "person"}
        assert config(data={**parts, "persons": 50}, privacy=persons).trained == pytest.approx(35)
