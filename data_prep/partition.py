"""Who holds which record: the keyed split at a site, and a simulation's sharing-out to sites."""

import hashlib
import hmac
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..config import ConfigError, Data


@dataclass(frozen=True)
class Sides:
    """Row indices of a site's three disjoint sides."""

    training: np.ndarray
    holdout: np.ndarray
    audit: np.ndarray


def keyed_split(identities: Sequence[bytes], key: bytes, holdout: float, audit: float) -> Sides:
    """Splits records three ways by HMAC-SHA256(key, identity).

    A record's side depends on the site's secret key and on the record alone: it is the same in
    every run, whatever other records come or go, and nobody without the key can predict it. Equal
    identities (all records of one person) share a side.

    Args:
        identities: [N] what decides the side of each record.
        key: The site's secret, at least 16 bytes.
        holdout: Share of the hold-out side.
        audit: Share of the audit side.

    Raises:
        ConfigError: The key is too short.
    """
    if len(key) < 16:
        raise ConfigError(f"split key = {len(key)} bytes: must be at least 16 secret bytes")
    # 64 bits decide: shares are met to 2^-64, and equal identities fall together.
    digests = b"".join(hmac.digest(key, identity, hashlib.sha256)[:8] for identity in identities)
    place = np.frombuffer(digests, dtype=">u8").astype(np.float64) / 2.0**64
    return Sides(
        training=np.flatnonzero(place >= holdout + audit),
        holdout=np.flatnonzero(place < holdout),
        audit=np.flatnonzero((place >= holdout) & (place < holdout + audit)),
    )


def places(identities: Sequence[bytes], key: bytes) -> np.ndarray:
    """A number for each record that hangs on nothing but itself: [N] int64, 0 to 2^62 - 1.

    Of equal records the first, the second, ... have numbers of their own: which of them is gone,
    if one is, nobody can tell.

    Args:
        identities: [N] what tells records apart.
        key: The site's secret.
    """
    seen: Counter[bytes] = Counter()
    digests = []
    for identity in identities:
        count = seen[identity].to_bytes(8, "big")
        digests.append(hmac.digest(key, b"place" + count + identity, hashlib.sha256)[:8])
        seen[identity] += 1
    found: np.ndarray = (np.frombuffer(b"".join(digests), dtype=">u8") >> np.uint64(2)).astype(
        np.int64
    )
    return found


def persons(identities: Sequence[bytes]) -> np.ndarray:
    """Whose record each one is: [N] int64, the persons numbered as they come.

    Args:
        identities: [N] the key of each record's person; equal ones are one person.
    """
    # Not `np.unique`: it takes zero bytes off their ends, and two persons would be one.
    numbers: dict[bytes, int] = {}
    found = [numbers.setdefault(identity, len(numbers)) for identity in identities]
    return np.array(found, dtype=np.int64)


def share_out(
    data: Data,
    sites: int,
    count: int,
    rng: np.random.Generator,
    *,
    persons: Sequence[str] = (),
    labels: Sequence[str] = (),
    column: Sequence[str] = (),
) -> list[np.ndarray]:
    """Shares a simulation's records out to its sites; never one person to two sites.

    Args:
        data: `partition` is `iid`, `dirichlet` (each class is spread by its own Dirichlet(alpha)
            draw, Hsu et al. 2019) or `column` (each value of the column goes to one site).
        sites: How many.
        count: N, how many records.
        rng: Public randomness; a simulated sharing-out hides nothing.
        persons: [N] whose record it is, or empty: then each record is its own person's.
        labels: [N] classes, or empty; for `dirichlet`. A person has their first record's.
        column: [N] values, or empty; for `column`.

    Returns:
        For each site the ascending row indices of its records.

    Raises:
        ConfigError: More sites than persons or values, or no labels where they are needed.
    """
    group, first = _groups(persons, count)
    if len(first) < sites:
        raise ConfigError(
            f"federation.sites = {sites}: more sites than "
            f"{'persons' if persons else 'records'} ({len(first)}); use fewer"
        )
    match data.partition:
        case "iid":
            place = rng.permutation(len(first)) % sites
        case "dirichlet":
            place = _dirichlet(_of(labels, first, "dirichlet"), sites, data.alpha, rng)
        case "column":
            place = _by_value(_of(column, first, "column"), sites)
    return [np.flatnonzero(place[group] == site) for site in range(sites)]


def _groups(persons: Sequence[str], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Each record's person as an index, and each person's first record."""
    if not persons:
        return np.arange(count), np.arange(count)
    _, first, group = np.unique(np.asarray(persons), return_index=True, return_inverse=True)
    return group, first


def _of(values: Sequence[str], first: np.ndarray, partition: str) -> np.ndarray:
    if not values:
        raise ConfigError(f'data.partition = "{partition}": needs records with a label; use "iid"')
    chosen: np.ndarray = np.asarray(values)[first]
    return chosen


def _dirichlet(
    labels: np.ndarray, sites: int, alpha: float, rng: np.random.Generator
) -> np.ndarray:
    place = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(sites, alpha))
        ends = np.rint(np.cumsum(shares) * len(members)).astype(np.int64)
        place[members] = np.searchsorted(ends, np.arange(len(members)), side="right").clip(
            max=sites - 1
        )
    # A draw may leave a site empty; it takes one record from the fullest.
    for site in range(sites):
        if not (place == site).any():
            fullest = np.bincount(place, minlength=sites).argmax()
            place[np.flatnonzero(place == fullest)[0]] = site
    return place


def _by_value(column: np.ndarray, sites: int) -> np.ndarray:
    values, place = np.unique(column, return_inverse=True)
    if len(values) < sites:
        raise ConfigError(
            f"federation.sites = {sites}: more sites than values of data.column ({len(values)}); "
            "use fewer"
        )
    # The commonest values first, each to the emptiest site.
    counts = np.bincount(place)
    load = np.zeros(sites, dtype=np.int64)
    home = np.empty(len(values), dtype=np.int64)
    for value in np.argsort(-counts, kind="stable"):
        home[value] = load.argmin()
        load[home[value]] += counts[value]
    return home[place]
