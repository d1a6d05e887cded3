"""A real site, opened from its kit: its own file, its keys, its ledger, and whom it knows.

Unlike a simulated one it makes no key and forgives nothing: what others could have read or
exchanged, and a ledger that is gone or older than it was, keep it from starting.
"""

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..config import ConfigError, SiteFile, read_site
from ..data_prep import modality
from ..deployment.kit import Kit
from ..deployment.roster import Roster
from ..files import replace_file
from ..privacy.books import Head
from ..privacy.ledger import Ledger
from ..privacy.limits import DamagedError, UnavailableError
from ..privacy.noise import Coins
from ..privacy.policy import floor_of, lifetime_of
from ..privacy.secagg.keys import Identity
from .approvals import Owner
from .own_files import ledger_and_key, read_key
from .secure import Keys, SecureSite
from .site import Budget, Site

_IDENTITY, _VAULT, _SPLIT = "identity.key", "vault.key", "split.key"
_WITNESS = "ledger.head"


@dataclass(frozen=True)
class Own:
    """What a site says of itself, and where its things are.

    Attributes:
        kit: Its kit.
        file: Its `site.toml`; the coordinator is never `None`.
        ledger: Its ledger; it need not be there yet.
    """

    kit: Kit
    file: SiteFile
    ledger: Path

    @property
    def witness(self) -> Path:
        """The ledger's head as the site saw it last; beside the keys, not beside the ledger."""
        return self.kit.keys / _WITNESS


def read_own(kit: Kit) -> Own:
    """Reads the `site.toml` of a kit.

    Raises:
        ConfigError: It cannot be read, a value is unusable, or it is another site's.
    """
    path = kit.folder / "site.toml"
    file = read_site(path)
    if file.site.name != kit.name:
        raise ConfigError(
            f'{path}: site.name = "{file.site.name}": the kit is of {kit.name}; use that'
        )
    if file.site.keys is not None and Path(file.site.keys) != kit.keys:
        raise ConfigError(
            f'{path}: site.keys = "{file.site.keys}": a deployed site\'s keys are in {kit.keys}; '
            "take the line out"
        )
    if file.policy.coordinator is None:
        policy = file.policy.model_copy(update={"coordinator": kit.about.coordinator})
        file = file.model_copy(update={"policy": policy})
    ledger = Path(file.site.ledger) if file.site.ledger else kit.state / "ledger.sqlite"
    return Own(kit, file, ledger)


def exposed(own: Own) -> list[str]:
    """What others than its owner can reach of a site's secrets: a line each, with the mend.

    Raises:
        ConfigError: A folder cannot be looked at.
    """
    try:
        keys = sorted(own.kit.keys.rglob("*"))
        beside = own.ledger.parent.glob(f"{own.ledger.name}*") if own.ledger.parent.is_dir() else ()
        paths = (own.kit.keys, *keys, own.kit.state, own.ledger.parent, *sorted(beside))
        return [line for path in dict.fromkeys(paths) for line in _open_to_others(path)]
    except OSError as error:
        raise ConfigError(
            f"{error.filename}: cannot be looked at ({error.strerror}); call it as the kit's owner"
        ) from None


def _open_to_others(path: Path) -> Iterable[str]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return
    if found.st_mode & 0o077:
        mode = "700" if path.is_dir() else "600"
        yield (
            f"{path}: is open to others than its owner (mode {found.st_mode & 0o777:04o}); "
            f"chmod {mode} {shlex.quote(str(path))}"
        )


def open_deployed(kit: Kit, coins: Coins) -> Site:
    """Opens the site of a kit; the caller closes it.

    Args:
        kit: The kit, with its keys and a roster in it.
        coins: The site's secret coins.

    Raises:
        ConfigError: A file of the kit is unusable, or others can reach the site's secrets.
        LedgerError: The ledger was lost, rolled back or damaged.
    """
    own = read_own(kit)
    _make_private(kit.state)
    _make_private(own.ledger.parent)
    if lines := exposed(own):
        raise ConfigError(lines[0] + (f" (and {len(lines) - 1} more)" if lines[1:] else ""))
    for name in (_IDENTITY, _VAULT, _SPLIT):
        if not (kit.keys / name).exists():
            raise ConfigError(
                f"{kit.keys / name}: is missing; put it back, or make a new site's keys by "
                f"`fedveil site keygen {kit.folder}`"
            )
    keys = known_keys(kit, kit.read_roster())
    ledger, split_key = open_ledger(own)
    file, data = own.file, own.file.site.data
    return Site(
        kit.name,
        lambda schema: modality(schema).read(data, schema, file.columns),
        split_key,
        Budget(
            ledger, file.policy.dataset_id, lifetime_of(file.policy), noted=partial(note_head, own)
        ),
        coins,
        kit.state / "records",
        SecureSite(kit.name, keys, floor_of(file.policy)),
        file.policy,
        columns=file.columns,
        owner=Owner(kit.state, manual=file.policy.approval == "manual"),
    )


def known_keys(kit: Kit, roster: Roster) -> Keys:
    """A site's secrets for secure sums, and the identities of a roster that it is in itself.

    Raises:
        ConfigError: It is not in it, or under another identity.
        UnavailableError: A key is none.
    """
    identity = Identity(read_key(kit.keys / _IDENTITY))
    _check_member(kit.name, identity.public, roster)
    vault = read_key(kit.keys / _VAULT)
    return Keys(identity, roster.identities, kit.state / "secagg", vault, durable=True)


def refresh_identities(site: Site, roster: Roster) -> None:
    """Takes the identities of a newer roster, from the next run on.

    Args:
        site: An open site.
        roster: One that `Kit.keep_roster` has admitted: signed, and newer.

    Raises:
        ConfigError: The site is not in it any more, or under another identity.
    """
    _check_member(site.name, site.secure.keys.identity.public, roster)
    site.secure.pin(roster.identities)


def _check_member(name: str, identity: bytes, roster: Roster) -> None:
    known = roster.identities.get(name)
    if known is None:
        raise ConfigError(
            f"roster: version {roster.version} has no site {name}; send request.json to the "
            "federation's authority, or ask them whether the site was revoked"
        )
    if known != identity:
        raise ConfigError(
            f"roster: version {roster.version} has another identity of {name} than "
            f"keys/{_IDENTITY}; put the site's own key back, or send request.json to the authority"
        )


def open_ledger(own: Own) -> tuple[Ledger, bytes]:
    """A site's ledger, which is made once, and the key of its split.

    Formal guarantee: a site opens no ledger that lacks a debit which it answered for, or an entry
    which the ledger had when it was opened last. It assumes that nobody puts the keys folder back
    along with it.

    Raises:
        LedgerError: It was lost, rolled back, exchanged or damaged.
    """
    known = read_witness(own)
    split = own.kit.keys / _SPLIT
    ledger, key = ledger_and_key(own.ledger, split, own.witness, own.kit.name, simulated=False)
    try:
        ledger.check_head(known)
        books = ledger.read()
        opened = books.opened
        if opened["simulated"] or opened["site"] != own.kit.name:
            raise DamagedError(
                f"{own.ledger}: is the ledger of {opened['site']}"
                f"{', SIMULATED' if opened['simulated'] else ''}; put {own.kit.name}'s own there"
            )
        note_head(own, books.head)
    except BaseException:
        ledger.close()
        raise
    return ledger, key


def note_head(own: Own, head: Head) -> None:
    """Writes the ledger's head down beside the keys.

    Raises:
        UnavailableError: The disk refuses.
    """
    try:
        replace_file(own.witness, f"{head.number}:{head.hash}\n".encode(), 0o600)
    except OSError as error:
        raise UnavailableError(
            f"{own.witness}: cannot be written ({error.strerror}); check its folder and the disk"
        ) from None


def read_witness(own: Own) -> Head:
    """The ledger's head as the site saw it last; an empty one before the first time.

    Raises:
        UnavailableError: It cannot be read.
    """
    try:
        text = own.witness.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return Head(0, "")
    except (OSError, UnicodeDecodeError):
        text = ""
    if re.fullmatch("[0-9]{1,18}:[0-9a-f]{64}", text) is None:
        raise UnavailableError(
            f"{own.witness}: holds no COUNT:HASH, which says what the ledger must hold; put a "
            "whole copy back"
        )
    number, _, digest = text.partition(":")
    return Head(int(number), digest)


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made ({error.strerror}); check the path") from None
