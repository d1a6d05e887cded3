"""What a column seems to be, guessed from its values, for a person to confirm or correct.

A guess is as private as the values. It is rounded and sorted so that it shows no more of them than
it must, but nothing here is differentially private.
"""

import re
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any

import polars as pl

from .schema import Column
from .words import quoted

CATEGORIES = 50
"""More distinct words than that are no categories."""

_NUMBERS = 0.95  # a column of so many numbers is one of numbers with a few bad values
_UNIQUE = 0.95  # so many distinct values are a key, or free text
_FEW = 10  # so few whole numbers may be codes
_SKEWED = 1.0  # the usual limit of what is called highly skewed
_KEY_LENGTH = 40
_KEY_NAME = re.compile(r"(^|[_ .-])(id|ids|key|mrn|ssn|uuid|guid|identifier)$", re.IGNORECASE)
_DATE = r"^(\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.](\d{4}|\d{2}))([ T]\d.*)?$"
_LONG_TAIL = 'transform = "log1p"   # for a long tail: it spreads out what is small'
_CODES = 0.01  # so many values with a leading nought are no slips
_CODE = r"^[+-]?0\d"


@dataclass(frozen=True)
class Guess:
    """A drafted column, all of it marked as unconfirmed.

    Attributes:
        column: What it seems to be.
        remarks: What a person should know of it, a line each.
        suggestion: An option that it may want, as TOML.
    """

    column: Column
    remarks: tuple[str, ...] = ()
    suggestion: str | None = None


@dataclass(frozen=True)
class LeftOut:
    """A column that makes no part of a model as it is.

    Attributes:
        name: Its name.
        why: Why, and what to do about it.
        key: Whether it may be the key of a person.
    """

    name: str
    why: str
    key: bool = False


def guess(text: pl.Series, *, label: bool = False) -> Guess | LeftOut:
    """Guesses a column from its trimmed values, `None` for missing.

    Args:
        text: [N] strings; named as the column.
        label: Whether it is to be the label, and so categorical and not nullable.
    """
    present, nullable = text.drop_nulls(), text.null_count() > 0 and not label
    distinct = present.n_unique()
    if distinct < 2:
        return LeftOut(text.name, "it has one value only" if distinct else "it has no value")
    numbers = None if label else _numbers(present)
    if numbers is not None:
        return _number(present, numbers, nullable=nullable)
    return _words(present, nullable=nullable, label=label, gaps=text.null_count() > 0)


def round_outwards(low: float, high: float, *, whole: bool) -> tuple[float, float]:
    """Bounds around both, at multiples of a step of 1, 2 or 5 times a power of ten.

    The step is the smallest of at least a fifth of the range, so that the bounds do not show the
    extremes, and at least 1 where `whole`.
    """
    first, last = Decimal(repr(low)), Decimal(repr(high))
    fifth = (last - first) / 5
    steps = (Decimal(digit).scaleb(fifth.adjusted()) for digit in (1, 2, 5, 10))
    step = next(step for step in steps if step >= fifth)
    step = max(step, Decimal(1)) if whole else step
    below = (first / step).to_integral_value(ROUND_FLOOR) * step
    above = (last / step).to_integral_value(ROUND_CEILING) * step
    return float(below), float(above)


def _numbers(present: pl.Series) -> pl.Series | None:
    """The finite numbers among the values, if they are numbers but for a few bad ones."""
    values = present.cast(pl.Float64, strict=False)
    usable = values.filter(values.is_finite().fill_null(value=False)) + 0.0
    words = values.null_count()
    # One in many may be a slip, but "4+" among a few is a category like the others.
    slips = words == 0 or (present.n_unique() > 20 and words <= (1 - _NUMBERS) * len(present))
    # Numbers do not begin with a nought, codes do: 01 and 1 may be two places.
    codes = present.str.contains(_CODE).sum() > _CODES * len(present)
    return usable if slips and not codes else None


def _number(present: pl.Series, numbers: pl.Series, *, nullable: bool) -> Guess | LeftOut:
    if numbers.n_unique() < 2:
        return LeftOut(present.name, "it has one number only")
    whole = bool((numbers == numbers.round()).all())
    low, high = (float(bound) for bound in (numbers.min(), numbers.max()))  # type: ignore[arg-type]
    distinct = numbers.n_unique()
    if whole and distinct == present.n_unique() == 2:
        return _category(present, nullable=nullable)
    if whole and _is_key(present.name, numbers, high - low):
        why = "it seems to be a key; declare it if it is a quantity"
        return LeftOut(present.name, why, key=True)
    bounds = round_outwards(low, high, whole=whole)
    if max(abs(bound) for bound in bounds) > 2**53:
        return LeftOut(present.name, "it holds numbers beyond 2^53; use a larger unit")
    remarks = []
    if len(numbers) < len(present):
        remarks.append("Some values are no finite numbers; `fedveil data check` shows them.")
    if whole and distinct <= _FEW:
        remarks.append('Few distinct numbers: kind = "categorical" if they are codes.')
    tailed = low >= 0 and high >= 10 and (numbers.skew() or 0) > _SKEWED
    kind = "integer" if whole else "numeric"
    options = {"kind": kind, "bounds": bounds, "nullable": nullable}
    return _guess(present.name, options, remarks, _LONG_TAIL if tailed else None)


def _is_key(name: str, numbers: pl.Series, spread: float) -> bool:
    distinct = numbers.n_unique()
    counted = len(numbers) >= 20 and distinct == len(numbers) and spread < 2 * distinct
    counted &= distinct >= 200 or numbers.is_sorted()
    return counted or (distinct > CATEGORIES and _KEY_NAME.search(name) is not None)


def _words(present: pl.Series, *, nullable: bool, label: bool, gaps: bool) -> Guess | LeftOut:
    name, distinct = present.name, present.n_unique()
    if not label and present.str.contains(_DATE).sum() >= _NUMBERS * len(present):
        return LeftOut(name, "it holds dates; turn them into a number, such as an age in days")
    if len(present) >= 10 and distinct >= _UNIQUE * len(present):
        return _unique(present)
    if distinct > CATEGORIES:
        why = f"it has more than {CATEGORIES} distinct values; group them if the model needs it"
        return LeftOut(name, why, key=_KEY_NAME.search(name) is not None and not label)
    return _category(present, nullable=nullable, gaps=gaps and label)


def _unique(present: pl.Series) -> LeftOut:
    if (present.str.len_chars().max() or 0) > _KEY_LENGTH:  # type: ignore[operator]
        return LeftOut(present.name, "it seems to be free text")
    return LeftOut(present.name, "nearly every record has a value of its own", key=True)


def _category(present: pl.Series, *, nullable: bool, gaps: bool = False) -> Guess | LeftOut:
    categories = sorted(present.unique())
    if any(category != category.strip() for category in categories):
        return LeftOut(present.name, "control characters stand around its values; take them out")
    folded: dict[str, str] = {}
    alike = [(c, kept) for c in categories if (kept := folded.setdefault(c.casefold(), c)) != c]
    aliases = ", ".join(f"{quoted(one)} = {quoted(two)}" for one, two in alike)
    remarks = []
    if alike:
        remarks.append("Some categories differ by case only: keep one of each if they are one.")
    if gaps:
        remarks.append("Some records have no label: they will be dropped.")
    options = {"kind": "categorical", "categories": categories, "nullable": nullable}
    return _guess(present.name, options, remarks, f"aliases = {{ {aliases} }}" if alike else None)


def _guess(name: str, options: dict[str, Any], remarks: list[str], suggestion: str | None) -> Guess:
    column = Column(name=name, unconfirmed=("name", *options), **options)
    return Guess(column, tuple(remarks), suggestion)
