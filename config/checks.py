"""Which options go together; each refusal names one option and what mends it."""

from collections.abc import Iterable

from .compatibility import COMPATIBILITY, least_threshold
from .derived import BUILT_IN_SIZES, Derived
from .options import MOST_SITES, Options, Secagg

_COLUMNS = (
    ("aggregation.strategy", "strategy", "strategies"),
    ("privacy.unit", "unit", "units"),
    ("aggregation.encryption", "encryption", "encryptions"),
)


def check_compatibility(config: Derived) -> None:
    """Holds a configuration against the compatibility table, and its options against each other.

    Raises:
        ValueError: Names an option that does not go with the others, and what does.
    """
    _check_table(config)
    _check_strategy(config)
    _check_unit(config)
    _check_clipping(config)
    _check_statistics(config)
    if config.encryption == "secagg":
        _check_secagg(config)
        _check_numbers(config)
    else:
        _check_without_secagg(config)
    if config.data.ledger is not None:
        _check_durable(config)
    if config.evaluation.training_share and not config.evaluations:
        raise ValueError(
            f"evaluation.training_share = {config.evaluation.training_share:g}: needs records to "
            "hold the figures against; set data.holdout > 0"
        )


def _check_table(config: Derived) -> None:
    mechanism = config.privacy.mechanism
    for option, name, column in _COLUMNS:
        chosen, choices = getattr(config, name), getattr(COMPATIBILITY[mechanism], column)
        if chosen in choices:
            continue
        # Not to be private at all is never a mend.
        others = [m for m, row in COMPATIBILITY.items() if chosen in getattr(row, column)]
        others = [other for other in others if other != "none"]
        why = ""
        if name == "encryption":
            why = ", where a site adds a share of the noise and only the sum is private"
        raise ValueError(
            f'{option} = "{chosen}": does not go with privacy.mechanism = "{mechanism}"{why}; use '
            f"{_either(choices)}, or privacy.mechanism = {_either(others)}"
        )


def _check_strategy(config: Derived) -> None:
    """Refuses options that the strategy in force does not read."""
    if config.training.local_steps > 1 and not config.trains_at_sites:
        raise ValueError(
            f"training.local_steps = {config.training.local_steps}: {config.strategy} takes one "
            'step a round at the server; use 1, or aggregation.strategy = "fedavg"'
        )
    if config.strategy == "fedprox" and config.training.local_steps == 1:
        raise ValueError(
            "training.local_steps = 1: the first step begins at the server's model, where fedprox "
            'pulls nowhere; take more, or aggregation.strategy = "fedavg"'
        )
    for option, strategy in (("server_learning_rate", "fedadam"), ("proximal", "fedprox")):
        if config.strategy != strategy and _is_given(config.aggregation, option):
            raise ValueError(
                f'aggregation.{option}: goes with aggregation.strategy = "{strategy}" only'
            )


def _check_unit(config: Derived) -> None:
    """Sizes and budgets hang on what is hidden."""
    if config.unit == "person" and config.data.persons is None:
        raise ValueError(
            'data.persons: missing: privacy.unit = "person" needs the public number of persons, a '
            "round number that may be published"
        )
    if config.unit != "person" and config.data.persons is not None:
        raise ValueError(
            f'data.persons = {config.data.persons}: goes with privacy.unit = "person" only'
        )
    # By the declared size only: to look at the data for it would be a release.
    known = config.data.records or BUILT_IN_SIZES.get(config.data.source)
    declared = config.units if config.unit != "record" else known
    if declared and config.delta >= 1 / declared:
        raise ValueError(
            f"privacy.delta = {config.delta:g}: must be below 1/{declared} {config.unit}s, or "
            f"publishing a {config.unit} whole would pass"
        )
    if config.unit != "site":
        return
    if config.evaluations and config.epsilon_holdout >= config.privacy.epsilon:
        raise ValueError(
            f"privacy.epsilon_holdout = {config.epsilon_holdout:g}: must be below privacy.epsilon "
            f"= {config.privacy.epsilon:g}, for a site's held-out records are the same site's"
        )
    if config.evaluation.training_share:
        raise ValueError(
            f"evaluation.training_share = {config.evaluation.training_share:g}: goes with the "
            "units record and person; leave it out"
        )


def _check_clipping(config: Derived) -> None:
    for option in ("clipping", "clipping_quantile"):
        if config.unit != "site" and _is_given(config.privacy, option):
            raise ValueError(f'privacy.{option}: goes with privacy.mechanism = "site" only')
    if config.privacy.clipping == "fixed" and _is_given(config.privacy, "clipping_quantile"):
        raise ValueError('privacy.clipping_quantile: goes with privacy.clipping = "adaptive" only')


def _check_statistics(config: Derived) -> None:
    share, family = config.privacy.statistics_share, config.model.family
    if family == "marginal" and share not in {None, 1.0}:
        raise ValueError(
            f'privacy.statistics_share = {share:g}: model.family = "marginal" is made of the '
            "statistics alone; leave it out"
        )
    if config.model.family != "marginal" and share == 1 and not config.model.warm_start:
        raise ValueError(
            "model.warm_start = false: with privacy.statistics_share = 1 nothing would be trained; "
            "leave one of them out"
        )
    if config.federation.rounds == 0 and share != 1 and family != "marginal":
        raise ValueError(
            "federation.rounds = 0: must be >= 1 unless privacy.statistics_share = 1, where "
            "nothing is trained beyond the statistics"
        )
    figures = config.evaluation.training_share
    if share not in {None, 1.0} and share + figures >= 1:
        raise ValueError(
            f"privacy.statistics_share + evaluation.training_share = {share + figures:g}: must "
            "leave some of the budget to training; lower one of them below a sum of 1"
        )


def _check_secagg(config: Derived) -> None:
    """What the secure sum asks of the other sections."""
    sites, mechanism = config.federation.sites, config.privacy.mechanism
    least = 3 if _shares_noise(config) else 2
    if sites < least:
        raise ValueError(_TOO_FEW_SITES.get(mechanism, _TOO_FEW).format(sites=sites, least=least))
    if sites > MOST_SITES:
        raise ValueError(
            f"federation.sites = {sites}: must be at most {MOST_SITES} with aggregation.encryption "
            f'= "secagg"; use fewer, or another encryption'
        )
    if config.strategy == "median":
        raise ValueError(
            'aggregation.strategy = "median": needs each site\'s model, and aggregation.encryption '
            '= "secagg" shows their sum only; use "fedavg", or aggregation.encryption = "none"'
        )
    if config.federation.min_replies not in {None, config.n_min}:
        raise ValueError(
            f"federation.min_replies = {config.federation.min_replies}: under "
            f'aggregation.encryption = "secagg" it is secagg.n_min = {config.n_min}; leave it out, '
            "or set that"
        )


_TOO_FEW = (
    'federation.sites = {sites}: aggregation.encryption = "secagg" needs at least {least} sites; '
    'use more, or aggregation.encryption = "none"'
)
_TOO_FEW_SITES = {
    "distributed": (
        'federation.sites = {sites}: privacy.mechanism = "distributed", the default, needs at '
        "least {least} sites, for it hides each among the others; use more, or privacy.mechanism = "
        '"central", whose server is trusted, or "local"'
    ),
    "site": (
        'federation.sites = {sites}: privacy.mechanism = "site" needs at least {least} sites to '
        'share its noise out; use more, or aggregation.encryption = "none", where each adds all '
        "of it"
    ),
}


def _check_numbers(config: Derived) -> None:
    """The rules of `privacy.secagg.terms.Numbers`, in terms of the options that the user gave."""
    sites, asked = config.federation.sites, config.secagg
    if _shares_noise(config) and asked.t_collude < 1:
        raise ValueError(
            f"secagg.t_collude = {asked.t_collude}: must be >= 1 with privacy.mechanism = "
            f'"{config.privacy.mechanism}", for each site knows its own share of the noise'
        )
    if asked.t_collude > sites - 2:
        raise ValueError(
            f"secagg.t_collude = {asked.t_collude}: must be at most {sites - 2} with "
            f"federation.sites = {sites}, so that two honest sites are in each sum"
        )
    least = least_threshold(sites, asked.t_collude)
    if asked.n_min is not None and not least <= asked.n_min <= sites:
        raise ValueError(
            f"secagg.n_min = {asked.n_min}: must be {least} to {sites} with federation.sites = "
            f"{sites} and secagg.t_collude = {asked.t_collude}"
        )
    most = asked.n_min or sites
    if asked.threshold is not None and not least <= asked.threshold <= most:
        raise ValueError(
            f"secagg.threshold = {asked.threshold}: must be {least} to {most}, from "
            "floor((federation.sites + secagg.t_collude) / 2) + 1 to secagg.n_min"
        )


def _check_without_secagg(config: Derived) -> None:
    for option in Secagg.model_fields:
        if _is_given(config.secagg, option):
            raise ValueError(
                f'secagg.{option}: goes with aggregation.encryption = "secagg" only, which is '
                f'"{config.encryption}" here; leave it out'
            )
    if config.min_replies > config.federation.sites:
        raise ValueError(
            f"federation.min_replies = {config.min_replies}: must be at most federation.sites = "
            f"{config.federation.sites}"
        )


def _check_durable(config: Derived) -> None:
    """A ledger that outlives the run needs limits that were said beforehand."""
    if config.privacy.mechanism == "none":
        raise ValueError(
            'data.ledger: no budget pays for privacy.mechanism = "none"; leave data.ledger out'
        )
    for name in ("epsilon_lifetime", "delta_lifetime"):
        if getattr(config.policy, name) is None:
            raise ValueError(
                f"policy.{name}: missing: data.ledger outlives this run, so say what all runs "
                "together may spend"
            )


def _shares_noise(config: Derived) -> bool:
    """Whether each site adds a share of the noise only, under the secure sum."""
    return config.privacy.mechanism in {"distributed", "site"}


def _is_given(section: Options, option: str) -> bool:
    """Whether an option differs from its default, however that came about."""
    return bool(getattr(section, option) != type(section).model_fields[option].default)


def _either(choices: Iterable[str]) -> str:
    return " or ".join(f'"{choice}"' for choice in choices)
