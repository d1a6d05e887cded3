"""What a ledger's entries mean, without a file: every rule, and what the books add up to."""

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from fractions import Fraction
from typing import Any

import dp_accounting
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.config import CompositionName, RunConfig
from fedveil.privacy.accounting import FILTER_ORDERS, Releases, event_to_plain
from fedveil.privacy.books import EMPTY, Books, Charge, Entry, Head, Order, order, sealed
from fedveil.privacy.limits import (
    Account,
    BudgetError,
    DamagedError,
    LedgerError,
    Lifetime,
    TermsError,
)
from fedveil.privacy.plan import Part, PartName, Side, plan

MakeConfig = Callable[..., RunConfig]

START = datetime(2026, 3, 1, 12, tzinfo=UTC).isoformat(timespec="milliseconds")
TENTH = Lifetime(0.3, 3e-6)
FREE = Lifetime(None, 0.5)


def part(
    count: int = 3, noise: float = 20.0, name: PartName = "rounds", side: Side = "training"
) -> Part:
    """Releases over all records."""
    return Part(name, side, Releases(noise, 1.0, 1), count)


def asked(
    run_id: str = "a",
    epsilon: float | None = 0.1,
    delta: float = 1e-6,
    *parts: Part,
    dataset_id: str = "heart",
    terms: str = "t",
) -> Order:
    """A run that draws on one account."""
    charge = Charge(parts[0].side if parts else "training", epsilon, delta, parts or (part(),))
    return Order(run_id, terms, dataset_id, "record", (charge,))


def both_sides(run_id: str, training: float, holdout: float) -> Order:
    """A run that draws on two accounts."""
    charges = (
        Charge("training", training, 1e-6, (part(),)),
        Charge("holdout", holdout, 1e-6, (part(2, name="evaluations", side="holdout"),)),
    )
    return Order(run_id, "t", "heart", "record", charges)


class Desk:
    """Books and the entries that made them."""

    def __init__(self) -> None:
        self.books, self.entries = Books(), list[Entry]()
        self.add("opened", {"site": "st-mary"})

    def add(self, kind: str, body: Mapping[str, Any] | None) -> None:
        if body is not None:
            entry = sealed(self.books.head, START, kind, body)
            self.books.apply(entry)
            self.entries.append(entry)

    def reserve(self, wanted: Order, lifetime: Lifetime = TENTH) -> None:
        self.add("reserve", self.books.reserve(wanted, lifetime))

    def commit(self, run_id: str, index: int, name: str = "rounds") -> None:
        self.add("commit", self.books.commit(run_id, name, index))

    def close(self, run_id: str) -> None:
        self.add("close", self.books.close(run_id))

    def spent(self, side: Side = "training", dataset_id: str = "heart") -> float | None:
        account = Account(dataset_id, "record", side)
        return next(s.epsilon for s in self.books.statements() if s.account == account)


@pytest.fixture
def desk() -> Desk:
    """Books that have just been opened."""
    return Desk()


def replayed(entries: list[Entry]) -> Books:
    """Books read anew, from entries as a file keeps them."""
    books = Books()
    for entry in entries:
        books.apply(replace(entry, body=json.loads(json.dumps(entry.body))))
    return books


def busy() -> Desk:
    """Books with an entry of every kind."""
    desk = Desk()
    desk.add("dataset", desk.books.bind("heart", {"holdout": 0.1}))
    desk.reserve(both_sides("a", 0.1, 0.2))
    for index in (1, 2):
        desk.commit("a", index)
    desk.commit("a", 1, "evaluations")
    desk.close("a")
    desk.reserve(asked("b", 0.1))
    return desk


class TestChain:
    def test_the_hash_is_over_everything_and_the_hash_before(self) -> None:
        entry = sealed(Head(7, "ab"), START, "commit", {"part": "rounds", "index": 3})
        text = f'[8,"{START}","commit",{{"index":3,"part":"rounds"}},"ab"]'
        assert (entry.sequence, entry.hash) == (8, hashlib.sha256(text.encode()).hexdigest())

    def test_reading_the_entries_gives_the_books_back(self) -> None:
        desk = busy()
        assert replayed(desk.entries) == desk.books
        assert desk.books.head == Head(8, desk.entries[-1].hash)

    @pytest.mark.parametrize("at", range(8))
    @pytest.mark.parametrize(
        "change",
        [
            {"time": "2026-03-01T12:00:01.000+00:00"},
            {"kind": "closed"},
            {"body": {"run_id": "b", "part": "rounds", "index": 3}},
            {"hash": "0" * 64},
            {"sequence": 12},
        ],
        ids=lambda change: str(next(iter(change))),
    )
    def test_an_edited_entry_is_noticed(self, at: int, change: dict[str, Any]) -> None:
        entries = busy().entries
        entries[at] = replace(entries[at], **change)
        with pytest.raises(DamagedError, match="entry"):
            replayed(entries)

    @pytest.mark.parametrize("at", range(7))
    def test_a_removed_entry_is_noticed(self, at: int) -> None:
        """But for the last: a shorter chain is whole, and its file and its head tell."""
        entries = busy().entries
        with pytest.raises(DamagedError, match=r"expected entry|the first"):
            replayed(entries[:at] + entries[at + 1 :])

    @pytest.mark.parametrize("at", range(7))
    def test_nor_does_counting_anew_hide_it(self, at: int) -> None:
        entries = busy().entries
        left = entries[:at] + [replace(e, sequence=e.sequence - 1) for e in entries[at + 1 :]]
        with pytest.raises(DamagedError, match="its hash does not fit"):
            replayed(left)

    @pytest.mark.parametrize("at", range(7))
    def test_swapped_entries_are_noticed(self, at: int) -> None:
        entries = busy().entries
        entries[at], entries[at + 1] = (
            replace(entries[at + 1], sequence=at + 1),
            replace(entries[at], sequence=at + 2),
        )
        with pytest.raises(DamagedError, match="its hash does not fit"):
            replayed(entries)

    def test_a_shorter_chain_is_whole(self) -> None:
        """What only a head that is known elsewhere tells."""
        entries = busy().entries
        assert replayed(entries[:-1]).head == Head(7, entries[6].hash)

    def test_the_first_entry_opens_and_no_other_does(self, desk: Desk) -> None:
        with pytest.raises(DamagedError, match="must be `opened`"):
            Books().apply(sealed(EMPTY, START, "close", {"run_id": "a"}))
        with pytest.raises(DamagedError, match="must be `opened`"):
            desk.add("opened", {"site": "st-mary"})

    def test_time_never_runs_backwards(self, desk: Desk) -> None:
        older = sealed(desk.books.head, "2026-03-01T11:59:59.999+00:00", "dataset", {})
        with pytest.raises(DamagedError, match="entry 2: is older"):
            desk.books.apply(older)

    @pytest.mark.parametrize("time", ["", "yesterday", "2026-03-01", None, 5])
    def test_a_time_that_is_none(self, desk: Desk, time: object) -> None:
        with pytest.raises(DamagedError, match="entry 2"):
            desk.books.apply(sealed(desk.books.head, time, "dataset", {}))  # type: ignore[arg-type]

    def test_a_refused_entry_leaves_the_books_as_they_were(self) -> None:
        desk = busy()
        before = copy.deepcopy(desk.books)
        bodies: list[tuple[str, dict[str, Any]]] = [
            ("commit", {"run_id": "b", "part": "rounds", "index": 4}),
            ("commit", {"run_id": "c", "part": "rounds", "index": 1}),
            ("close", {"run_id": "c"}),
            ("dataset", {"dataset_id": "heart", "terms": {"holdout": 0.2}}),
            ("gift", {}),
        ]
        for kind, body in bodies:
            with pytest.raises(DamagedError):
                desk.add(kind, body)
            assert desk.books == before

    def test_a_commit_states_the_event_that_was_reserved(self, desk: Desk) -> None:
        desk.reserve(asked())
        right = desk.books.commit("a", "rounds", 1)
        assert right["event"] == event_to_plain(Releases(20.0, 1.0, 1).event)
        with pytest.raises(DamagedError, match="entry 3"):
            desk.add("commit", {**right, "event": event_to_plain(Releases(90.0, 1.0, 1).event)})

    def test_every_rule_holds_for_an_entry_that_is_read(self, desk: Desk) -> None:
        """A chain that was made by other code is no way around a limit."""
        body = Books().reserve(asked(epsilon=0.4), FREE)
        assert body is not None
        with pytest.raises(DamagedError, match=r"epsilon 0 of 0\.3 is spent, 0\.4 more"):
            desk.add("reserve", {**body, "lifetime": asdict(TENTH)})


class TestAddition:
    def test_three_times_a_tenth_is_three_tenths(self, desk: Desk) -> None:
        """As floats 0.1 + 0.1 + 0.1 is above 0.3."""
        for run_id in "abc":
            desk.reserve(asked(run_id))
        assert desk.spent() == 0.3
        before = copy.deepcopy(desk.books)
        with pytest.raises(BudgetError) as refused:
            desk.reserve(asked("d", 1e-12, 0.0))
        assert str(refused.value).startswith(
            "account heart/record/training: epsilon 0.3 of 0.3 is spent, 1e-12 more is asked"
        )
        assert "policy.epsilon_lifetime" in str(refused.value)
        assert desk.books == before

    def test_so_is_it_for_delta(self, desk: Desk) -> None:
        lifetime = Lifetime(9.0, 3e-6)
        for run_id in "abc":
            desk.reserve(asked(run_id), lifetime)
        assert desk.books.statements()[0].delta == 3e-6
        with pytest.raises(BudgetError) as refused:
            desk.reserve(asked("d", 0.1, 1e-18), lifetime)
        assert str(refused.value).startswith(
            "account heart/record/training: delta 3e-06 of 3e-06 is spent, 1e-18 more is asked"
        )
        assert "policy.delta_lifetime" in str(refused.value)

    def test_a_run_is_charged_its_plan_however_early_it_stops(self, desk: Desk) -> None:
        desk.reserve(asked(epsilon=0.2))
        desk.close("a")
        assert desk.spent() == 0.2
        with pytest.raises(BudgetError, match=r"epsilon 0\.2 of 0\.3 is spent, 0\.2 more"):
            desk.reserve(asked("b", 0.2))

    def test_accounts_are_apart(self, desk: Desk) -> None:
        desk.reserve(both_sides("a", 0.3, 0.1))
        desk.reserve(asked("b", 0.3, dataset_id="lung"))
        assert [desk.spent(), desk.spent("holdout"), desk.spent("training", "lung")] == [
            0.3, 0.1, 0.3,
        ]  # fmt: skip
        desk.reserve(asked("c", 0.2, 1e-6, part(2, name="evaluations", side="holdout")))
        with pytest.raises(BudgetError, match="account heart/record/training"):
            desk.reserve(asked("d"))

    def test_a_run_is_reserved_from_all_of_its_accounts_or_from_none(self, desk: Desk) -> None:
        before = copy.deepcopy(desk.books)
        with pytest.raises(BudgetError, match=r"account heart/record/holdout: epsilon 0 of 0\.3"):
            desk.reserve(both_sides("a", 0.1, 0.4))
        assert desk.books == before

    def test_one_side_charged_twice_is_no_way_around_the_limit(self, desk: Desk) -> None:
        twice = (
            Charge("training", 0.2, 1e-6, (part(),)),
            Charge("training", 0.2, 1e-6, (part(2, name="evaluations"),)),
        )
        with pytest.raises(LedgerError):
            desk.reserve(Order("a", "t", "heart", "record", twice))

    def test_a_limit_may_be_raised_and_lowered(self, desk: Desk) -> None:
        desk.reserve(asked("a", 0.3))
        desk.reserve(asked("b", 0.3), Lifetime(0.6, 1e-5))
        assert desk.books.statements()[0].lifetime == Lifetime(0.6, 1e-5)
        with pytest.raises(BudgetError, match=r"epsilon 0\.6 of 0\.5 is spent"):
            desk.reserve(asked("c", 0.1), Lifetime(0.5, 1e-5))

    def test_without_noise_only_an_account_without_a_limit_admits(self, desk: Desk) -> None:
        bare = part(noise=0.0)
        with pytest.raises(BudgetError, match=r"inf more is asked"):
            desk.reserve(asked("a", None, 1e-6, bare))
        desk.reserve(asked("a", None, 1e-6, bare), FREE)
        assert desk.spent() is None
        with pytest.raises(BudgetError, match=r"epsilon inf of 0\.3 is spent"):
            desk.reserve(asked("b"))

    @pytest.mark.parametrize("epsilon", [-0.1, math.nan, math.inf, -math.inf])
    def test_no_charge_gives_budget_back(self, desk: Desk, epsilon: float) -> None:
        before = copy.deepcopy(desk.books)
        for lifetime in (TENTH, FREE, Lifetime(9.0, 1e-5, "rdp")):
            with pytest.raises(LedgerError):
                desk.reserve(asked(epsilon=epsilon), lifetime)
            with pytest.raises(LedgerError):
                desk.reserve(asked(delta=epsilon), lifetime)
        assert desk.books == before

    @pytest.mark.parametrize("count", [0, -3, 2.5])
    def test_nor_does_a_number_of_releases_that_is_none(self, desk: Desk, count: int) -> None:
        for lifetime in (TENTH, Lifetime(9.0, 1e-5, "rdp")):
            with pytest.raises(LedgerError):
                desk.reserve(asked("a", 0.1, 1e-6, part(count)), lifetime)

    @given(
        st.lists(st.sampled_from([0.1, 0.2, 0.05, 1e-9, 1 / 3, 0.7]), min_size=1, max_size=12),
        st.sampled_from([0.3, 0.7, 1.0, 2.1]),
    )
    def test_what_is_admitted_never_exceeds_the_limit_and_stops_only_there(
        self, prices: list[float], limit: float
    ) -> None:
        """Held against exact fractions of the numbers as they are written."""
        desk, exact, limited = Desk(), Fraction(0), Lifetime(limit, 1e-5)
        for number, price in enumerate(prices):
            after = exact + Fraction(repr(price))
            if after <= Fraction(repr(limit)):
                desk.reserve(asked(str(number), price, 1e-7), limited)
                exact = after
            else:
                with pytest.raises(BudgetError):
                    desk.reserve(asked(str(number), price, 1e-7), limited)
        if exact:
            assert desk.spent() == float(exact)


class TestReserve:
    def test_it_changes_nothing_the_second_time(self, desk: Desk) -> None:
        """A run that goes on reserves again, after some commits too."""
        desk.reserve(asked())
        desk.commit("a", 1)
        assert desk.books.reserve(asked(), TENTH) is None

    def test_a_closed_run_is_not_reserved_again(self, desk: Desk) -> None:
        desk.reserve(asked())
        desk.close("a")
        with pytest.raises(BudgetError, match="run a: is closed; begin a new run"):
            desk.reserve(asked())

    def test_nor_is_it_asked_for_budget_again(self, desk: Desk) -> None:
        desk.reserve(asked(epsilon=0.3))
        assert desk.books.reserve(asked(epsilon=0.3), Lifetime(0.1, 0.0)) is None

    @pytest.mark.parametrize(
        "other",
        [
            asked(terms="u"),
            asked(epsilon=0.2),
            asked(epsilon=None),
            asked(delta=2e-6),
            asked(dataset_id="lung"),
            asked("a", 0.1, 1e-6, part(4)),
            asked("a", 0.1, 1e-6, part(noise=21.0)),
            asked("a", 0.1, 1e-6, part(name="training_figures")),
            asked("a", 0.1, 1e-6, part(side="holdout")),
            asked("a", 0.1, 1e-6, part(), part(1, 30.0, "training_figures")),
            both_sides("a", 0.1, 0.1),
        ],
    )
    def test_other_terms_are_refused(self, desk: Desk, other: Order) -> None:
        desk.reserve(asked())
        before = copy.deepcopy(desk.books)
        with pytest.raises(TermsError, match="run a: was reserved on other terms"):
            desk.reserve(other, FREE)
        assert desk.books == before

    def test_the_same_numbers_from_a_file_are_the_same_terms(self) -> None:
        assert replayed(busy().entries[:-2]).reserve(both_sides("a", 0.1, 0.2), TENTH) is None


class TestCommit:
    def test_every_index_once_and_in_order(self, desk: Desk) -> None:
        desk.reserve(asked())
        for index in (1, 2, 3):
            desk.commit("a", index)
            for again in range(index + 1):
                with pytest.raises(BudgetError, match=f"rounds: release {again} asked, {index} of"):
                    desk.commit("a", again)
        with pytest.raises(BudgetError, match="release 4 asked, 3 of 3 are used up"):
            desk.commit("a", 4)

    def test_what_was_missed_is_gone(self, desk: Desk) -> None:
        """A site that missed a round goes on with the next, and never back."""
        desk.reserve(asked())
        desk.commit("a", 3)
        for index in (1, 2, 3, 4):
            with pytest.raises(BudgetError):
                desk.commit("a", index)
        run = desk.books.runs["a"]
        assert (run.made, run.last) == ({"rounds": 1}, {"rounds": 3})

    @pytest.mark.parametrize("index", [0, -1, 4, 2**80, True, 1.0, "1", None])
    def test_an_index_that_is_none(self, desk: Desk, index: int) -> None:
        desk.reserve(asked())
        with pytest.raises(BudgetError, match="release"):
            desk.commit("a", index)

    def test_parts_are_apart(self, desk: Desk) -> None:
        desk.reserve(both_sides("a", 0.1, 0.1))
        desk.commit("a", 2)
        desk.commit("a", 1, "evaluations")
        assert desk.books.runs["a"].last == {"rounds": 2, "evaluations": 1}

    def test_what_was_never_reserved(self, desk: Desk) -> None:
        with pytest.raises(BudgetError, match="run a: has reserved nothing"):
            desk.commit("a", 1)
        desk.reserve(asked())
        with pytest.raises(BudgetError, match="run a: evaluations: none are reserved"):
            desk.commit("a", 1, "evaluations")

    def test_a_closed_run(self, desk: Desk) -> None:
        desk.reserve(asked())
        desk.commit("a", 1)
        desk.close("a")
        with pytest.raises(BudgetError, match="run a: is closed; begin a new run"):
            desk.commit("a", 2)

    def test_a_run_that_does_not_exist_cannot_be_closed(self, desk: Desk) -> None:
        with pytest.raises(BudgetError, match="run a: has reserved nothing"):
            desk.close("a")


class TestDataSets:
    TERMS: Mapping[str, Any] = {"holdout": 0.1, "split_key": "k"}

    def test_they_are_bound_once(self, desk: Desk) -> None:
        desk.add("dataset", desk.books.bind("heart", self.TERMS))
        assert desk.books.bind("heart", self.TERMS) is None
        assert desk.books.bind("lung", {"holdout": 0.2}) is not None

    @pytest.mark.parametrize(
        "other",
        [
            {"holdout": 0.2, "split_key": "k"},
            {"holdout": 0.1},
            {"holdout": 0.1, "split_key": "k", "audit": 0.1},
        ],
    )
    def test_and_for_ever(self, desk: Desk, other: dict[str, Any]) -> None:
        desk.add("dataset", desk.books.bind("heart", self.TERMS))
        with pytest.raises(TermsError, match=r'data set "heart": .* may never change its side'):
            desk.books.bind("heart", other)


def by_hand(counts: Mapping[float, int], delta: float) -> float:
    """The filter's figure for Gaussian sums of sensitivity 1, by noise multiplier.

    Renyi DP of order a is a / (2 sigma^2) (Mironov 2017, corollary 3); to epsilon by Canonne,
    Kamath and Steinke 2020, proposition 12, each order with its part of delta.
    """
    part_of_delta = delta / len(FILTER_ORDERS)
    return min(
        sum(count * a / (2 * sigma**2) for sigma, count in counts.items())
        + math.log1p(-1 / a)
        - math.log(part_of_delta * a) / (a - 1)
        for a in FILTER_ORDERS
    )


class TestRenyi:
    MANY = Lifetime(3.0, 1e-5, "rdp")

    def test_the_figure_by_hand(self, desk: Desk) -> None:
        desk.reserve(asked("a", 0.3, 1e-6, part(5)), self.MANY)
        desk.reserve(asked("b", 0.3, 1e-6, part(7, 30.0)), self.MANY)
        assert desk.spent() == pytest.approx(by_hand({20.0: 5, 30.0: 7}, 1e-5), rel=1e-9)
        assert desk.books.statements()[0].delta == 1e-5

    @pytest.mark.parametrize("composition", [1, 4])
    def test_sampled_releases_are_what_dp_accounting_says_at_these_orders(
        self, desk: Desk, composition: int
    ) -> None:
        steps = Part("rounds", "training", Releases(2.0, 0.1, composition), 6)
        figures = part(2, name="training_figures")
        desk.reserve(asked("a", 3.0, 1e-6, steps, figures), self.MANY)
        accountant = dp_accounting.rdp.RdpAccountant(FILTER_ORDERS)
        accountant.compose(steps.each.event, 6)
        accountant.compose(dp_accounting.GaussianDpEvent(20.0), 2)
        expected = accountant.get_epsilon(1e-5 / len(FILTER_ORDERS))
        assert desk.spent() == pytest.approx(expected, rel=1e-9)

    def test_many_runs_cost_less_than_their_sum(self, desk: Desk) -> None:
        """Twenty runs of five sums at noise 20, each epsilon 0.4471 by its PLD at delta 1e-6.

        The filter's least order is 10: 100 * 10 / 800 + ln 0.9 - ln(1e-5 / 8 * 10) / 9 = 2.399.
        """
        added = Desk()
        for number in range(20):
            desk.reserve(asked(str(number), 0.4472, 1e-6, part(5)), self.MANY)
            added.reserve(asked(str(number), 0.4472, 1e-6, part(5)), Lifetime(9.0, 2e-5))
        assert desk.spent() == pytest.approx(by_hand({20.0: 100}, 1e-5), rel=1e-9)
        assert added.spent() == pytest.approx(8.944)
        assert desk.spent() == pytest.approx(2.399, abs=1e-3)

    def test_an_open_run_is_charged_its_whole_plan_and_a_closed_one_what_it_made(
        self, desk: Desk
    ) -> None:
        desk.reserve(asked("a", 0.3, 1e-6, part(50)), self.MANY)
        desk.commit("a", 1)
        desk.commit("a", 2)
        assert desk.spent() == pytest.approx(by_hand({20.0: 50}, 1e-5), rel=1e-9)
        desk.close("a")
        assert desk.spent() == pytest.approx(by_hand({20.0: 2}, 1e-5), rel=1e-9)

    def test_what_an_open_run_missed_can_no_longer_cost(self, desk: Desk) -> None:
        """It made 2, and 50 - 41 may still come."""
        desk.reserve(asked("a", 0.3, 1e-6, part(50)), self.MANY)
        desk.commit("a", 40)
        desk.commit("a", 41)
        assert desk.spent() == pytest.approx(by_hand({20.0: 11}, 1e-5), rel=1e-9)

    def test_a_closed_run_that_made_nothing_is_free(self, desk: Desk) -> None:
        desk.reserve(asked("a", 0.3, 1e-6, part(50)), self.MANY)
        desk.close("a")
        assert desk.spent() == 0.0

    def test_equal_releases_of_two_parts_are_counted_twice(self, desk: Desk) -> None:
        alike = asked("a", 0.3, 1e-6, part(5), part(5, name="training_figures"))
        low, high = by_hand({20.0: 5}, 1e-5), by_hand({20.0: 10}, 1e-5)
        with pytest.raises(BudgetError):
            desk.reserve(alike, Lifetime((low + high) / 2, 1e-5, "rdp"))
        desk.reserve(alike, Lifetime(high + 1e-6, 1e-5, "rdp"))
        assert desk.spent() == pytest.approx(high, rel=1e-9)

    def test_the_limit_holds(self, desk: Desk) -> None:
        limit = Lifetime(by_hand({20.0: 10}, 1e-5) + 1e-9, 1e-5, "rdp")
        for run_id in "ab":
            desk.reserve(asked(run_id, 0.3, 1e-6, part(5)), limit)
        with pytest.raises(BudgetError) as refused:
            desk.reserve(asked("c", 0.3, 1e-6, part(1)), limit)
        after = by_hand({20.0: 11}, 1e-5)
        assert f"epsilon {desk.spent():.6g} of {limit.epsilon:.6g} is spent" in str(refused.value)
        assert f"0.3 more is asked, which makes {after:.6g}" in str(refused.value)
        desk.close("a")
        desk.reserve(asked("c", 0.3, 1e-6, part(1)), limit)

    def test_without_noise_only_an_account_without_a_limit_admits(self, desk: Desk) -> None:
        with pytest.raises(BudgetError):
            desk.reserve(asked("a", None, 1e-6, part(noise=0.0)), self.MANY)
        desk.reserve(asked("a", None, 1e-6, part(noise=0.0)), Lifetime(None, 1e-5, "rdp"))
        assert desk.spent() is None

    @pytest.mark.parametrize(("first", "then"), [("addition", "rdp"), ("rdp", "addition")])
    def test_how_an_account_adds_up_may_not_change(
        self, desk: Desk, first: CompositionName, then: CompositionName
    ) -> None:
        desk.reserve(asked("a"), Lifetime(3.0, 1e-5, first))
        before = copy.deepcopy(desk.books)
        with pytest.raises(TermsError, match=f'policy.composition = "{then}": .* "{first}" since'):
            desk.reserve(asked("b"), Lifetime(3.0, 1e-5, then))
        assert desk.books == before
        desk.reserve(asked("c", dataset_id="lung"), Lifetime(3.0, 1e-5, then))

    @pytest.mark.parametrize("other", [Lifetime(3.0, 2e-5, "rdp"), Lifetime(4.0, 1e-5, "rdp")])
    def test_nor_may_its_limits_in_renyi_dp(self, desk: Desk, other: Lifetime) -> None:
        """A filter's are chosen before anything is seen."""
        desk.reserve(asked("a"), self.MANY)
        with pytest.raises(TermsError, match=r"heart/record/training: policy\..*_lifetime"):
            desk.reserve(asked("b"), other)

    @settings(max_examples=25)
    @given(
        st.lists(
            st.tuples(
                st.sampled_from([8.0, 20.0, 55.5]),  # noise
                st.integers(1, 12),  # reserved
                st.integers(0, 12),  # tried
                st.booleans(),  # closed
            ),
            min_size=1,
            max_size=6,
        )
    )
    def test_the_figure_is_never_below_what_was_made(
        self, runs: list[tuple[float, int, int, bool]]
    ) -> None:
        """Held against dp_accounting, with all orders and all of delta."""
        desk, made = Desk(), list[dp_accounting.DpEvent]()
        for number, (noise, reserved, tried, closed) in enumerate(runs):
            try:
                desk.reserve(asked(str(number), 0.3, 1e-6, part(reserved, noise)), self.MANY)
            except BudgetError:
                continue
            for index in range(1, min(reserved, tried) + 1):
                desk.commit(str(number), index)
                made.append(dp_accounting.GaussianDpEvent(noise))
            if closed:
                desk.close(str(number))
        for statement in desk.books.statements():
            assert statement.epsilon is not None
            assert real_epsilon(made, 1e-5) <= statement.epsilon <= 3.0
        assert replayed(desk.entries) == desk.books


def real_epsilon(events: list[dp_accounting.DpEvent], delta: float) -> float:
    """What dp_accounting says of releases."""
    accountant = dp_accounting.rdp.RdpAccountant([*range(2, 64), 96, 128, 256])
    for event in events:
        accountant.compose(event)
    return float(accountant.get_epsilon(delta))


class TestStatements:
    def test_by_account_and_in_order(self) -> None:
        found = busy().books.statements()
        assert [str(s.account) for s in found] == [
            "account heart/record/holdout",
            "account heart/record/training",
        ]
        assert [(s.runs, s.made, s.reserved, s.epsilon, s.delta) for s in found] == [
            (1, 1, 2, 0.2, 1e-6),
            (2, 2, 6, 0.2, 2e-6),
        ]
        assert found[0].lifetime == TENTH

    def test_of_nothing(self) -> None:
        assert Books().statements() == []


class TestOrders:
    def test_a_plan_is_reserved_from_two_accounts(self, make_config: MakeConfig) -> None:
        bare = plan(make_config(privacy={"mechanism": "none"}))
        priced = replace(
            bare, training_epsilon=1.5, holdout_epsilon=0.5, noise_multiplier=1.1,
            evaluation_noise=7.0, figures_noise=9.0,
        )  # fmt: skip
        rounds, evaluations, figures = priced.parts
        assert order("a", "t", "heart", priced) == Order(
            "a", "t", "heart", "record",
            (
                Charge("training", 1.5, bare.delta, (rounds, figures)),
                Charge("holdout", 0.5, bare.delta, (evaluations,)),
            ),
        )  # fmt: skip

    def test_a_run_without_a_holdout_leaves_that_account_alone(
        self, make_config: MakeConfig
    ) -> None:
        priced = plan(make_config(privacy={"mechanism": "none"}, data={"holdout": 0.0}))
        charges = order("a", "t", "heart", priced).charges
        assert [(c.side, c.epsilon) for c in charges] == [("training", None)]


def plain_reservation(composition: CompositionName) -> dict[str, Any]:
    """A reservation as an entry keeps it."""
    body = Books().reserve(both_sides("a", 0.1, 0.2), Lifetime(3.0, 1e-5, composition))
    assert body is not None
    return body


def places(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where values stand in a JSON value."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def altered(body: dict[str, Any], path: tuple[Any, ...], value: object) -> dict[str, Any]:
    """A copy with another value at a place."""
    changed = copy.deepcopy(body)
    inner: Any = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


ODD: list[Any] = [
    None, True, -1, 0, 2.5, -0.5, 10**400, 2**64, "", "1", "nan", "rdp", [], [1], {}, {"kind": "x"},
]  # fmt: skip


class TestOddEntries:
    """Well sealed, and by no code of ours: taken in as a good one is, or refused in our words."""

    @pytest.mark.parametrize("composition", ["addition", "rdp"])
    def test_a_reservation(self, composition: CompositionName) -> None:
        good, faults = plain_reservation(composition), list[str]()
        for path in places(good):
            for value in ODD:
                desk = Desk()
                with suppress(DamagedError):
                    try:
                        desk.add("reserve", altered(good, path, value))
                        with suppress(LedgerError):
                            desk.reserve(asked("b"), Lifetime(9.0, 1e-5, composition))
                        adds_up(desk.books)
                    except (AssertionError, ArithmeticError, TypeError, ValueError) as error:
                        faults.append(f"{path} = {str(value)[:9]}: {type(error).__name__} {error}")
        assert not faults

    @pytest.mark.parametrize("kind", ["dataset", "commit", "close"])
    def test_the_other_kinds(self, kind: str) -> None:
        bodies = {e.kind: dict(e.body) for e in busy().entries}
        for path in places(bodies[kind]):
            for value in ODD:
                desk = Desk()
                desk.reserve(both_sides("a", 0.1, 0.2))
                before = copy.deepcopy(desk.books)
                try:
                    desk.add(kind, altered(bodies[kind], path, value))
                except DamagedError:
                    assert desk.books == before
                else:
                    adds_up(desk.books)

    @pytest.mark.parametrize("kind", ["dataset", "reserve", "commit", "close"])
    def test_missing_and_added_values(self, kind: str) -> None:
        good = {e.kind: dict(e.body) for e in reversed(busy().entries)}[kind]
        odd = [{k: v for k, v in good.items() if k != key} for key in good]
        for body in [*odd, {**good, "refund": 1.0}]:
            desk = Desk()
            if kind != "reserve":
                desk.reserve(both_sides("a", 0.1, 0.2))
            with pytest.raises(DamagedError, match="entry"):
                desk.add(kind, body)


def adds_up(books: Books) -> None:
    """What passed is a sum within its limit, of releases that there are."""
    for statement in books.statements():
        limit = statement.lifetime.epsilon
        assert statement.epsilon is None or 0 <= statement.epsilon <= (limit or math.inf)
        assert 0 <= statement.delta <= statement.lifetime.delta < 1
        assert 0 <= statement.made <= statement.reserved
        assert statement.reserved > 0
        assert statement.account.side in {"training", "holdout"}
        assert statement.lifetime.composition in {"addition", "rdp"}
