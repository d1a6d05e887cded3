"""Faults that are put into the real code: the self-test flags each, by its name.

Coins are fixed, so that a test says the same every time. Where a share of ten is asserted, ten
different coins are tried.
"""

import itertools
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedveil.client import self_test as running
from fedveil.client import training
from fedveil.client.self_test import ConformanceError, self_test
from fedveil.privacy import clipping, discrete, mechanism
from fedveil.privacy.clipping import CLIPPING_SLACK
from fedveil.privacy.ledger import Ledger
from fedveil.privacy.mechanism import add_noise, add_nothing
from fedveil.privacy.noise import Coins

MakeCase = Callable[[str], Any]
Patch = pytest.MonkeyPatch
Fault = Callable[[Patch], None]

TRIES = 10
LATE = 17  # a step


def steps_of() -> Callable[[Coins], int]:
    """Counts how often it was asked of the same coins; they are asked once a step."""
    counts: weakref.WeakKeyDictionary[Coins, int] = weakref.WeakKeyDictionary()

    def step(coins: Coins) -> int:
        counts[coins] = counts.get(coins, -1) + 1
        return counts[coins]

    return step


def on_noise(
    patch: Patch, change: Callable[[np.ndarray, Coins, Callable[[Coins], Any]], Any]
) -> None:
    """Changes the noise, continuous and integer: (noise, coins, draw anew of other coins)."""
    gaussian, integer = Coins.gaussian, discrete.add_noise

    def drawn(coins: Coins, shape: tuple[int, ...], scale: float) -> np.ndarray:
        noise = gaussian(coins, shape, scale)
        return np.asarray(change(noise, coins, lambda other: gaussian(other, shape, scale)))

    def added(words: np.ndarray, stretch: int, coins: Coins) -> None:
        def noise_of(of: Coins) -> np.ndarray:
            noise = np.zeros_like(words)
            integer(noise, stretch, of)
            return noise.view("<i4").astype(np.float64)

        changed = np.rint(change(noise_of(coins), coins, noise_of))
        words += changed.astype(np.int64).astype("<u4")

    patch.setattr(Coins, "gaussian", drawn)
    patch.setattr(discrete, "add_noise", added)


def less_noise(patch: Patch) -> None:
    on_noise(patch, lambda noise, _coins, _draw: 0.98 * noise)


def one_site_with_less_noise(patch: Patch) -> None:
    """The first of five; they add theirs in turns."""
    calls = itertools.count()
    on_noise(patch, lambda noise, _coins, _draw: noise * (1 if next(calls) % 5 else 0.97))


def noise_of_one_seed(patch: Patch) -> None:
    on_noise(patch, lambda _noise, _coins, draw: draw(Coins(bytes(32))))


def a_round_without_noise(patch: Patch) -> None:
    step = steps_of()
    on_noise(patch, lambda noise, coins, _draw: noise * (step(coins) != LATE))


def noise_in_the_first_round(patch: Patch) -> None:
    step = steps_of()
    on_noise(patch, lambda noise, coins, _draw: noise * (step(coins) == 0))


def noise_of_the_round_before(patch: Patch) -> None:
    """Kept and used twice."""
    step, kept = steps_of(), dict[int, Any]()

    def change(noise: np.ndarray, coins: Coins, _draw: object) -> Any:  # noqa: ANN401
        if step(coins) % 2 and kept[id(coins)].shape == noise.shape:
            return kept[id(coins)]
        kept[id(coins)] = noise
        return noise

    on_noise(patch, change)


def no_hook(patch: Patch) -> None:
    """The mechanism's row says that nobody adds noise."""
    nothing = {
        name: replace(row, at_site=add_nothing, at_server=add_nothing)
        for name, row in mechanism.MECHANISMS.items()
    }
    patch.setattr(mechanism, "MECHANISMS", nothing)


def both_hooks(patch: Patch) -> None:
    """Noise twice: paid for with utility, and not as priced."""
    twice = {
        name: replace(row, at_site=add_noise, at_server=add_noise)
        for name, row in mechanism.MECHANISMS.items()
    }
    patch.setattr(mechanism, "MECHANISMS", twice)


CHECK_WHOLE_NORM = running._check_whole_norm


def by_statistics_alone(patch: Patch) -> None:
    """Without the one record whose clipped gradient the self-test looks at by itself."""
    patch.setattr(running, "_check_whole_norm", lambda _priced: None)


def no_clipping(patch: Patch) -> None:
    by_statistics_alone(patch)
    patch.setattr(clipping, "_factors", lambda _flat, real, _bound: real.double())
    patch.setattr(training, "CLIPPING_SLACK", 1e-6)  # what a site's update is clipped with


def clipped_too_late(patch: Patch) -> None:
    by_statistics_alone(patch)
    patch.setattr(clipping, "CLIPPING_SLACK", CLIPPING_SLACK / 1.1)
    patch.setattr(training, "CLIPPING_SLACK", CLIPPING_SLACK / 1.1)


def clipped_by_record(patch: Patch) -> None:
    real = clipping.clipped_sum
    patch.setattr(training, "clipped_sum", lambda *a, **k: real(*a, **k | {"groups": None}))


def sampled_by_record(patch: Patch) -> None:
    real = training._poisson_sample
    patch.setattr(
        training, "_poisson_sample", lambda count, _groups, *rest: real(count, None, *rest)
    )


def rate_too_high(patch: Patch) -> None:
    real = Coins.poisson_sample
    patch.setattr(Coins, "poisson_sample", lambda coins, n, rate: real(coins, n, 1.2 * rate))


def batches_of_one_size(patch: Patch) -> None:
    def chosen(coins: Coins, count: int, rate: float) -> np.ndarray:
        size = round(count * rate) + int(coins.uniform(1)[0] <= count * rate - round(count * rate))
        return np.sort(np.argsort(coins.uniform(count))[:size])

    patch.setattr(Coins, "poisson_sample", chosen)


def the_same_batch(patch: Patch) -> None:
    real, kept = Coins.poisson_sample, weakref.WeakKeyDictionary[Coins, np.ndarray]()

    def chosen(coins: Coins, count: int, rate: float) -> np.ndarray:
        if coins not in kept:
            kept[coins] = real(coins, count, rate)
        return kept[coins]

    patch.setattr(Coins, "poisson_sample", chosen)


def shuffled(patch: Patch) -> None:
    """Each record has its turn, once in 1 / rate steps."""
    order, step = weakref.WeakKeyDictionary[Coins, np.ndarray](), steps_of()

    def chosen(coins: Coins, count: int, rate: float) -> np.ndarray:
        turns, turn = round(1 / rate), step(coins)
        if turn % turns == 0:
            order[coins] = np.argsort(coins.uniform(count))
        return np.sort(order[coins][turn % turns :: turns])

    patch.setattr(Coins, "poisson_sample", chosen)


def a_release_not_debited(patch: Patch) -> None:
    real = Ledger.debit

    def debit(ledger: Ledger, asked: Any, lifetime: Any, terms: Any, releases: Any) -> Any:  # noqa: ANN401
        if releases == [("rounds", LATE)]:
            return ledger.read().head
        return real(ledger, asked, lifetime, terms, releases)

    patch.setattr(Ledger, "debit", debit)


def no_noise_in_the_words(patch: Patch) -> None:
    patch.setattr(discrete, "add_noise", lambda *_: None)


def half_of_the_words_without_noise(patch: Patch) -> None:
    real = discrete.add_noise
    patch.setattr(discrete, "add_noise", lambda words, *rest: real(words[: len(words) // 2], *rest))


NOISE = {"noise"}
CLIPPED = {"slot mean", "clipping"}
SAMPLED = {"slot mean", "rate"}
SUMS = {"batch sizes", "slot totals"}
ANY = ("central", "distributed", "local", "site", "site, secagg")
ONE_NOISE = ("central", "local", "site")
WORDS = ("distributed", "site, secagg")
SAMPLING = ("central", "distributed", "central, person")
CLIPS = ("central", "distributed", "distributed, person", "site", "site, secagg")

FAULTS: dict[str, tuple[Fault, set[str], tuple[str, ...]]] = {
    # What must be in `failed`, and where it is tried.
    "noise x 0.98": (less_noise, NOISE, ANY),
    "noise of one seed": (noise_of_one_seed, {"correlation of steps"}, ANY),
    "a round without noise": (a_round_without_noise, {"noise of a step"}, ANY),
    "noise in the first round only": (noise_in_the_first_round, {"noise", "zeros"}, ANY),
    "noise used twice": (noise_of_the_round_before, {"correlation of steps"}, WORDS),
    # Where each step draws twice, a draw and the one before it are of one step.
    "noise used twice in a step": (
        noise_of_the_round_before,
        {"correlation of halves"},
        ("local",),
    ),
    "no hook": (no_hook, {"noise", "noise of a step", "zeros"}, ONE_NOISE),
    "both hooks": (both_hooks, {"noise", "noise of a step"}, ONE_NOISE),
    "no noise in the words": (no_noise_in_the_words, {"noise", "zeros"}, WORDS),
    "half of the words": (half_of_the_words_without_noise, {"noise", "zeros"}, WORDS),
    "no clipping": (no_clipping, {"clipping bound"}, CLIPS),
    "clipping x 1.1": (clipped_too_late, CLIPPED, CLIPS),
    "clipped by record": (clipped_by_record, CLIPPED, ("central, person", "distributed, person")),
    "sampled by record": (sampled_by_record, SAMPLED, ("central, person", "distributed, person")),
    "rate x 1.2": (rate_too_high, SAMPLED, SAMPLING),
    "batches of one size": (batches_of_one_size, {"batch sizes"}, SAMPLING),
    "the same batch": (the_same_batch, {"slot totals"}, SAMPLING),
    "shuffled": (shuffled, {"slot totals"}, SAMPLING),
    "not debited": (a_release_not_debited, {"ledger"}, ("central", "distributed", "site")),
    "one share short": (one_site_with_less_noise, {"share"}, ("distributed",)),
}
OF_NOISE = {
    "noise x 0.98",
    "noise used twice",
    "noise used twice in a step",
    "one share short",
    "not debited",
}
PAIRS = [(fault, name) for fault, (_, _, names) in FAULTS.items() for name in names]
FAST_PAIRS = [
    ("noise x 0.98", "distributed"),
    ("noise of one seed", "central"),
    ("a round without noise", "distributed"),
    ("no clipping", "central"),
    ("clipping x 1.1", "site"),
    ("clipped by record", "central, person"),
    ("rate x 1.2", "central"),
    ("batches of one size", "local"),
    ("the same batch", "central"),
    ("not debited", "central"),
]


class TestFaults:
    @pytest.mark.parametrize(("fault", "name"), FAST_PAIRS)
    def test_is_flagged_by_its_name(
        self, case: MakeCase, monkeypatch: Patch, fault: str, name: str
    ) -> None:
        one, (inject, due, _) = case(name), FAULTS[fault]
        inject(monkeypatch)
        found = one.tested()
        assert found.outcome == "violated"
        assert due <= {*found.failed}
        if fault in OF_NOISE:
            # Clipping and sampling, which are right, are not accused.
            assert not (CLIPPED | SAMPLED | SUMS) & {*found.failed}

    @pytest.mark.slow
    @pytest.mark.parametrize(("fault", "name"), PAIRS)
    def test_nine_times_in_ten(
        self, case: MakeCase, monkeypatch: Patch, fault: str, name: str
    ) -> None:
        one, (inject, due, _) = case(name), FAULTS[fault]
        inject(monkeypatch)
        found = [one.tested(seed) for seed in range(TRIES)]
        assert sum(due <= {*each.failed} for each in found) >= 0.9 * TRIES
        assert sum(each.outcome == "violated" for each in found) >= 0.9 * TRIES

    @pytest.mark.parametrize("name", ["central", "distributed", "local", "site"])
    @pytest.mark.parametrize("fault", ["each by itself", "x 1.1"])
    def test_clipping_that_is_not_over_all_parameters(
        self, case: MakeCase, monkeypatch: Patch, name: str, fault: str
    ) -> None:
        one = case(name)
        real, whole = clipping._factors, training.clipped_update
        if fault == "x 1.1":
            clipped_too_late(monkeypatch)
            monkeypatch.setattr(running, "_check_whole_norm", CHECK_WHOLE_NORM)
        else:

            def add(total: Any, flat: Any, rows: Any, bound: float) -> None:  # noqa: ANN401
                for key, gradients in flat.items():
                    factors = real({key: gradients}, rows, bound)
                    total[key] += (factors @ gradients).view_as(total[key])

            def each(change: Any, norm: float) -> Any:  # noqa: ANN401
                return {k: whole({k: v}, norm)[0][k] for k, v in change.items()}, True

            monkeypatch.setattr(clipping, "_add_clipped", add)
            monkeypatch.setattr(running, "clipped_update", each)
        with pytest.raises(ConformanceError, match=r"^clipping = .*one (record|site) must move"):
            one.tested()

    @pytest.mark.parametrize("name", ["central", "local"])
    def test_noise_on_one_parameter_only(
        self, case: MakeCase, monkeypatch: Patch, name: str
    ) -> None:
        real = mechanism.add_noise

        def first(total: Any, scale: float, coins: Coins) -> Any:  # noqa: ANN401
            key = min(total)
            return {**total, key: real({key: total[key]}, scale, coins)[key]}

        row = mechanism.MECHANISMS[name]  # type: ignore[index]
        site, server = (first if hook is real else hook for hook in (row.at_site, row.at_server))
        broken: dict[Any, Any] = dict(mechanism.MECHANISMS)
        broken[name] = replace(row, at_site=site, at_server=server)
        monkeypatch.setattr(mechanism, "MECHANISMS", broken)
        assert "noise" in case(name).tested().failed

    def test_an_update_that_gets_the_whole_of_the_budget(
        self, case: MakeCase, monkeypatch: Patch
    ) -> None:
        one = case("site")
        adaptive = replace(one.priced, adaptive=True)
        self_test(one.config, adaptive, 1, one.coins(0))
        less = property(lambda plan: plan.noise_multiplier / 4)
        monkeypatch.setattr(type(adaptive), "update_noise", less)
        with pytest.raises(ConformanceError, match=r"^noise of a round = "):
            self_test(one.config, adaptive, 1, one.coins(0))

    def test_the_same_coins_at_two_sites(self, case: MakeCase) -> None:
        for name in ("distributed", "site", "site, secagg"):
            one = case(name)
            found = self_test(one.config, one.priced, one.all_sites, lambda: Coins(bytes(32)))
            assert "correlation of shares" in found.failed

    def test_at_two_of_them_only(self, case: MakeCase) -> None:
        for seed in range(3):
            one = case("distributed")
            make = one.coins(seed)
            first, others = make().words(4).tobytes(), [make() for _ in range(6)]
            # Each trial asks for five coins; the first two of each are of one key.
            keys = [Coins(first), Coins(first), *others[:3], Coins(first), Coins(first)]
            coins = iter([*keys, *others[3:]])
            found = self_test(one.config, one.priced, 5, coins.__next__)
            assert "correlation of shares" in found.failed
