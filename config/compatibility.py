"""Which mechanism goes with which strategy, privacy unit and encryption: one table."""

from collections.abc import Mapping
from dataclasses import dataclass

from .options import EncryptionName, MechanismName, StrategyName, UnitName


@dataclass(frozen=True)
class Allowed:
    """A row of the compatibility table: what a mechanism protects against and goes with.

    The first of each is the default. `median` beside `secagg` is the one pair that two rows allow
    and the checks refuse.
    """

    against: str
    strategies: tuple[StrategyName, ...]
    units: tuple[UnitName, ...]
    encryptions: tuple[EncryptionName, ...] = ("none", "sealed", "secagg")


COMPATIBILITY: Mapping[MechanismName, Allowed] = {
    "distributed": Allowed(
        against="everyone: the server, and up to secagg.t_collude sites beside it",
        strategies=("adam", "sgd"),
        units=("record", "person"),
        encryptions=("secagg",),
    ),
    "central": Allowed(
        against="everyone but the server, which sees each site's un-noised sums",
        strategies=("adam", "sgd"),
        units=("record", "person"),
    ),
    "local": Allowed(
        against="everyone, the server and the other sites included",
        strategies=("fedavg", "fedprox", "fedadam", "median"),
        units=("record", "person"),
    ),
    "site": Allowed(
        against="everyone: the server, and up to secagg.t_collude sites beside it; any number "
        "without secagg",
        strategies=("fedavg", "fedadam"),
        units=("site",),
        encryptions=("secagg", "none", "sealed"),
    ),
    "none": Allowed(
        against="NOBODY: THIS RUN IS NOT PRIVATE",
        strategies=("adam", "sgd", "fedavg", "fedprox", "fedadam", "median"),
        units=("record", "person"),
    ),
}


def least_threshold(n: int, t_collude: int) -> int:
    """floor((n + t_collude) / 2) + 1: the smallest safe threshold of a secure sum.

    For the server to have two sets of uploaders confirmed, t - t_collude honest sites must sign
    each, and none signs two: 2 (t - t_collude) <= n - t_collude. One more than that is impossible.
    """
    return (n + t_collude) // 2 + 1
