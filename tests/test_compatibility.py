"""What goes with what: every cell of mechanism, encryption, strategy and unit, and its mend."""

import re
from typing import Any, get_args

import pytest

from fedveil.config import (
    COMPATIBILITY,
    ConfigError,
    EncryptionName,
    MechanismName,
    RunConfig,
    StrategyName,
    UnitName,
    validated,
)
from fedveil.privacy.secagg.terms import Numbers

MECHANISMS: tuple[MechanismName, ...] = get_args(MechanismName)
STRATEGIES: tuple[StrategyName, ...] = get_args(StrategyName)
UNITS: tuple[UnitName, ...] = get_args(UnitName)
ENCRYPTIONS: tuple[EncryptionName, ...] = get_args(EncryptionName)

# The design's table, by hand: strategies, units, encryptions; the default of each comes first.
TABLE: dict[MechanismName, tuple[list[str], list[str], list[str]]] = {
    "distributed": (["adam", "sgd"], ["record", "person"], ["secagg"]),
    "central": (["adam", "sgd"], ["record", "person"], ["none", "sealed", "secagg"]),
    "local": (
        ["fedavg", "fedprox", "fedadam", "median"],
        ["record", "person"],
        ["none", "sealed", "secagg"],
    ),
    "site": (["fedavg", "fedadam"], ["site"], ["secagg", "none", "sealed"]),
    "none": (
        ["adam", "sgd", "fedavg", "fedprox", "fedadam", "median"],
        ["record", "person"],
        ["none", "sealed", "secagg"],
    ),
}
OPTIONS = ("aggregation.strategy", "privacy.unit", "aggregation.encryption")


def raw_config(**sections: dict[str, Any]) -> dict[str, Any]:
    raw: dict[str, Any] = {"data": {"source": "sklearn:digits"}, "model": {"family": "vae"}}
    for section, options in sections.items():
        raw.setdefault(section, {}).update(options)
    return raw


def cell(mechanism: str, strategy: str, unit: str, encryption: str) -> dict[str, Any]:
    """A run in a cell of the matrix, with what its strategy and its unit need."""
    return raw_config(
        privacy={"mechanism": mechanism, "unit": unit},
        aggregation={"strategy": strategy, "encryption": encryption},
        training={"local_steps": 2} if strategy == "fedprox" else {},
        data={"persons": 500} if unit == "person" else {},
    )


def refusal(raw: dict[str, Any]) -> str:
    """The one line that refuses a configuration."""
    with pytest.raises(ConfigError) as caught:
        validated(RunConfig, raw)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_the_table_is_the_design_s() -> None:
    assert {
        name: (list(row.strategies), list(row.units), list(row.encryptions))
        for name, row in COMPATIBILITY.items()
    } == TABLE
    assert set(TABLE) == set(MECHANISMS)
    assert next(iter(COMPATIBILITY)) == RunConfig.model_fields["privacy"].default.mechanism


def test_every_mechanism_says_against_whom_it_protects() -> None:
    against = {name: row.against for name, row in COMPATIBILITY.items()}
    assert "NOBODY" in against["none"]
    assert against["central"].startswith("everyone but the server")
    assert against["local"] == "everyone, the server and the other sites included"
    assert "secagg.t_collude" in against["distributed"]
    assert "secagg.t_collude" in against["site"]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("encryption", ENCRYPTIONS)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_each_cell_is_accepted_or_refused_with_its_mend(
    mechanism: MechanismName, encryption: EncryptionName, strategy: StrategyName, unit: UnitName
) -> None:
    raw = cell(mechanism, strategy, unit, encryption)
    asked = (strategy, unit, encryption)
    wrong = [k for k in range(3) if asked[k] not in TABLE[mechanism][k]]
    if not wrong and (strategy, encryption) != ("median", "secagg"):
        found = validated(RunConfig, raw)
        assert (found.strategy, found.unit, found.encryption) == asked
        return
    line = refusal(raw)
    if not wrong:
        assert line == (
            'aggregation.strategy = "median": needs each site\'s model, and aggregation.encryption '
            '= "secagg" shows their sum only; use "fedavg", or aggregation.encryption = "none"'
        )
        return
    k = wrong[0]
    others = [name for name, row in TABLE.items() if asked[k] in row[k] and name != "none"]
    assert line.startswith(
        f'{OPTIONS[k]} = "{asked[k]}": does not go with privacy.mechanism = "{mechanism}"'
    )
    mend, other = line.split("; use ")[1].split(", or privacy.mechanism = ")
    assert re.findall(r'"(\w+)"', mend) == TABLE[mechanism][k]
    assert re.findall(r'"(\w+)"', other) == others


class TestFewSites:
    """A federation of one or two meets the default mechanism: the line's mends work."""

    @pytest.mark.parametrize("sites", [1, 2])
    def test_under_the_default(self, sites: int) -> None:
        raw = raw_config(federation={"sites": sites})
        assert refusal(raw) == (
            f'federation.sites = {sites}: privacy.mechanism = "distributed", the default, needs at '
            "least 3 sites, for it hides each among the others; use more, or privacy.mechanism = "
            '"central", whose server is trusted, or "local"'
        )
        for mechanism in ("central", "local"):
            mended = validated(RunConfig, raw | {"privacy": {"mechanism": mechanism}})
            assert mended.federation.sites == sites
        assert validated(RunConfig, raw_config(federation={"sites": 3})).n_min == 3

    @pytest.mark.parametrize("sites", [1, 2])
    def test_under_unit_site(self, sites: int) -> None:
        raw = raw_config(federation={"sites": sites}, privacy={"mechanism": "site"})
        assert refusal(raw) == (
            f'federation.sites = {sites}: privacy.mechanism = "site" needs at least 3 sites to '
            'share its noise out; use more, or aggregation.encryption = "none", where each adds '
            "all of it"
        )
        mended = validated(RunConfig, raw | {"aggregation": {"encryption": "none"}})
        assert mended.encryption == "none"

    @pytest.mark.parametrize("mechanism", ["central", "local", "none"])
    def test_where_no_noise_is_shared_a_sum_needs_two(self, mechanism: str) -> None:
        alone = raw_config(
            federation={"sites": 1},
            privacy={"mechanism": mechanism},
            aggregation={"encryption": "secagg"},
        )
        assert refusal(alone) == (
            'federation.sites = 1: aggregation.encryption = "secagg" needs at least 2 sites; use '
            'more, or aggregation.encryption = "none"'
        )
        two = alone | {"federation": {"sites": 2}}
        assert refusal(two) == (
            "secagg.t_collude = 1: must be at most 0 with federation.sites = 2, so that two honest "
            "sites are in each sum"
        )
        mended = validated(RunConfig, two | {"secagg": {"t_collude": 0}})
        assert (mended.threshold, mended.n_min) == (2, 2)

    def test_many_sites(self) -> None:
        assert refusal(raw_config(federation={"sites": 256})) == (
            'federation.sites = 256: must be at most 255 with aggregation.encryption = "secagg"; '
            "use fewer, or another encryption"
        )
        many = raw_config(federation={"sites": 256}, privacy={"mechanism": "central"})
        assert validated(RunConfig, many).min_replies == 129


class TestTheNumbersOfASecureSum:
    """Ten sites, one colluder: t is 6 to n_min, n_min is t to 10."""

    @pytest.mark.parametrize(
        ("options", "line"),
        [
            ({"n_min": 5}, "secagg.n_min = 5: must be 6 to 10 with federation.sites = 10 and"),
            ({"n_min": 11}, "secagg.n_min = 11: must be 6 to 10 with federation.sites = 10 and"),
            ({"threshold": 5}, "secagg.threshold = 5: must be 6 to 10, from floor("),
            ({"threshold": 11}, "secagg.threshold = 11: must be 6 to 10, from floor("),
            ({"threshold": 9, "n_min": 8}, "secagg.threshold = 9: must be 6 to 8, from floor("),
            ({"t_collude": 9}, "secagg.t_collude = 9: must be at most 8 with federation.sites"),
            ({"t_collude": 5, "n_min": 7}, "secagg.n_min = 7: must be 8 to 10 with federation"),
            ({"t_collude": 0}, "secagg.t_collude = 0: must be >= 1 with privacy.mechanism = "),
        ],
    )
    def test_are_refused_where_they_are_not_safe(self, options: dict[str, Any], line: str) -> None:
        assert refusal(raw_config(secagg=options)).startswith(line)

    @pytest.mark.parametrize(
        "options",
        [
            {"n_min": 6}, {"n_min": 10}, {"threshold": 6}, {"threshold": 10}, {"t_collude": 8},
            {"threshold": 8, "n_min": 8}, {"t_collude": 5, "n_min": 8},
        ],
    )  # fmt: skip
    def test_are_accepted_up_to_the_last_safe_one(self, options: dict[str, Any]) -> None:
        found = validated(RunConfig, raw_config(secagg=options))
        Numbers(10, found.threshold, found.n_min, found.secagg.t_collude).noise_share(1.0)

    @pytest.mark.parametrize("mechanism", ["central", "local", "none"])
    def test_without_shared_noise_nobody_need_be_held_to_collude(self, mechanism: str) -> None:
        raw = raw_config(
            privacy={"mechanism": mechanism},
            aggregation={"encryption": "secagg"},
            secagg={"t_collude": 0},
        )
        assert validated(RunConfig, raw).threshold == 6

    @pytest.mark.parametrize("encryption", ["none", "sealed"])
    @pytest.mark.parametrize(
        ("option", "value"),
        [("t_collude", 2), ("n_min", 9), ("threshold", 7), ("epoch_rounds", 8), ("deadline", 9.0)],
    )
    def test_are_refused_where_nothing_reads_them(
        self, option: str, value: float, encryption: str
    ) -> None:
        raw = raw_config(
            privacy={"mechanism": "site"},
            aggregation={"encryption": encryption},
            secagg={option: value},
        )
        assert refusal(raw) == (
            f'secagg.{option}: goes with aggregation.encryption = "secagg" only, which is '
            f'"{encryption}" here; leave it out'
        )
        kept = validated(RunConfig, raw | {"aggregation": {}}).secagg
        assert getattr(kept, option) == value

    def test_decide_the_fewest_replies(self) -> None:
        raw = raw_config(federation={"min_replies": 6})
        assert refusal(raw) == (
            'federation.min_replies = 6: under aggregation.encryption = "secagg" it is '
            "secagg.n_min = 9; leave it out, or set that"
        )
        raw["federation"]["min_replies"] = 9
        assert validated(RunConfig, raw).min_replies == 9
        raw |= {"federation": {}, "secagg": {"n_min": 7}}
        assert validated(RunConfig, raw).min_replies == 7

    def test_decide_nothing_without_it(self) -> None:
        raw = raw_config(privacy={"mechanism": "central"}, federation={"min_replies": 11})
        assert refusal(raw) == (
            "federation.min_replies = 11: must be at most federation.sites = 10"
        )


class TestClipping:
    @pytest.mark.parametrize("mechanism", ["distributed", "central", "local", "none"])
    @pytest.mark.parametrize(
        ("option", "value"), [("clipping", "adaptive"), ("clipping_quantile", 0.7)]
    )
    def test_follows_updates_under_site_only(
        self, mechanism: str, option: str, value: object
    ) -> None:
        line = refusal(raw_config(privacy={"mechanism": mechanism, option: value}))
        assert line == f'privacy.{option}: goes with privacy.mechanism = "site" only'

    def test_has_a_quantile_where_it_follows_one(self) -> None:
        privacy: dict[str, Any] = {"mechanism": "site", "clipping_quantile": 0.7}
        assert refusal(raw_config(privacy=privacy)) == (
            'privacy.clipping_quantile: goes with privacy.clipping = "adaptive" only'
        )
        found = validated(RunConfig, raw_config(privacy={**privacy, "clipping": "adaptive"}))
        assert (found.privacy.clipping, found.privacy.clipping_quantile) == ("adaptive", 0.7)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_where_sites_train_they_may_take_several_steps(strategy: StrategyName) -> None:
    raw = raw_config(
        privacy={"mechanism": "none"},
        aggregation={"strategy": strategy},
        training={"local_steps": 5},
    )
    if strategy not in {"adam", "sgd"}:
        assert validated(RunConfig, raw).training.local_steps == 5
    else:
        assert refusal(raw).startswith(f"training.local_steps = 5: {strategy} takes one step")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("option", "owner"), [("proximal", "fedprox"), ("server_learning_rate", "fedadam")]
)
def test_an_option_of_another_strategy_is_refused(
    strategy: StrategyName, option: str, owner: str
) -> None:
    raw = raw_config(
        privacy={"mechanism": "none"},
        aggregation={"strategy": strategy, option: 0.5},
        training={"local_steps": 2} if strategy == "fedprox" else {},
    )
    if strategy == owner:
        assert getattr(validated(RunConfig, raw).resolved().aggregation, option) == 0.5
    else:
        assert refusal(raw).startswith(f"aggregation.{option}: goes with aggregation.strategy")


def test_fedprox_with_one_step_would_be_fedavg() -> None:
    raw = raw_config(privacy={"mechanism": "none"}, aggregation={"strategy": "fedprox"})
    assert refusal(raw).startswith("training.local_steps = 1: the first step begins at the server")
