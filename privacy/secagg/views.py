"""What a site and an auditor ask of what the server shows them: one function a message.

Each raises an error that is named after the attack that it stops, and changes nothing.
"""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet

from .errors import (
    AliveAndDeadError,
    DifferentContextError,
    DifferentRosterError,
    DifferentSetupError,
    ForgedSignatureError,
    ReusedKeyError,
    RolledBackLedgerError,
    SplitViewError,
    SwappedIdentityError,
    SwappedKeysError,
    TooFewConfirmationsError,
    UnknownSiteError,
    WrongRoundError,
)
from .keys import is_signed
from .messages import (
    Advertisement,
    Confirmation,
    Deal,
    Deals,
    Dealt,
    Roster,
    Uploaded,
    Uploaders,
    statement_on_uploaders,
)
from .terms import Opening, Setup, check_members


def check_identities(setup: Setup, pinned: Mapping[str, bytes]) -> None:
    """Every name on the roster stands beside the identity that is pinned for it.

    Raises:
        UnknownSiteError: No identity is pinned for a name.
        SwappedIdentityError: Another one is.
    """
    for member in setup.roster:
        if member.name not in pinned:
            raise UnknownSiteError(
                f"roster: has {member.name}, expected one of {', '.join(sorted(pinned))}"
            )
        if member.identity != pinned[member.name]:
            raise SwappedIdentityError(
                f"roster: {member.name} has identity {member.identity.hex()}, expected "
                f"{pinned[member.name].hex()} as pinned"
            )


def check_setup(setup: Setup, run: str, name: str, pinned: Mapping[str, bytes]) -> int:
    """The set-up is of this run, of pinned sites, and has this one.

    Returns:
        The site's index.

    Raises:
        DifferentSetupError: It is another run's.
        UnknownSiteError, SwappedIdentityError: See `check_identities`.
    """
    if setup.run != run:
        raise DifferentSetupError(f"set-up: is of run {setup.run}, expected {run}")
    check_identities(setup, pinned)
    names = [member.name for member in setup.roster]
    if name not in names:
        raise UnknownSiteError(f"roster: has {', '.join(names)}, expected {name} among them")
    return names.index(name)


def check_advertisement(setup: Setup, advertised: Advertisement) -> None:
    """A site's keys are of this set-up, and it signed them.

    Raises:
        UnknownSiteError: The site is not on the roster.
        DifferentSetupError: It advertised for another set-up, or another number of rounds.
        SwappedKeysError: It did not sign these keys.
    """
    if advertised.site >= setup.numbers.n:
        raise UnknownSiteError(
            f"advertisement of site {advertised.site}: expected 0 to {setup.numbers.n - 1}"
        )
    name, ours = setup.name(advertised.site), setup.digest
    if advertised.setup != ours or len(advertised.masks) != setup.rounds:
        raise DifferentSetupError(
            f"advertisement of {name}: {len(advertised.masks)} round keys for set-up "
            f"{advertised.setup.hex()}, expected {setup.rounds} for {ours.hex()}"
        )
    identity = setup.roster[advertised.site].identity
    if not is_signed(identity, advertised.statement(), advertised.signature):
        raise SwappedKeysError(
            f"advertisement of {name}: its keys are not signed by {identity.hex()}, expected the "
            "ones that the site made"
        )


def check_roster(setup: Setup, roster: Roster, own: Advertisement) -> None:
    """The roster has enough sites' own keys, this site's among them, and each key once.

    Raises:
        UnknownSiteError, DifferentSetupError, SwappedKeysError: See `check_advertisement`.
        ReusedKeyError: Two sites have one key.
        TooFewSitesError: Fewer than n_min.
    """
    for advertised in roster.advertisements:
        check_advertisement(setup, advertised)
    if own.site not in roster.sites:
        raise UnknownSiteError(f"roster: lacks {setup.name(own.site)}, expected this site's keys")
    if own not in roster.advertisements:
        raise SwappedKeysError("roster: has other keys for this site than it made itself")
    check_keys(roster)
    check_members(setup, roster.sites, "roster")


def check_keys(roster: Roster) -> None:
    """Each key is in one place.

    Raises:
        ReusedKeyError: Two sites have one.
    """
    known: set[bytes] = set()
    for advertised in roster.advertisements:
        check_fresh(known, advertised)
        known.update((advertised.channel, *advertised.masks))


def check_fresh(known: AbstractSet[bytes], advertised: Advertisement) -> None:
    """None of the keys is another site's.

    Raises:
        ReusedKeyError: One is.
    """
    if not known.isdisjoint((advertised.channel, *advertised.masks)):
        raise ReusedKeyError(
            f"advertisement of site {advertised.site}: has another site's key, expected its own"
        )


def check_dealt(setup: Setup, roster: Roster, dealt: Dealt) -> None:
    """A site signed this very roster.

    Raises:
        UnknownSiteError: It is not on it.
        DifferentRosterError: It signed another.
    """
    if dealt.site not in roster.sites:
        raise UnknownSiteError(f"deal of {setup.name(dealt.site)}: expected a site of the roster")
    identity = setup.roster[dealt.site].identity
    if not is_signed(identity, dealt.statement(roster.digest), dealt.signature):
        raise DifferentRosterError(
            f"deal of {setup.name(dealt.site)}: is signed on another roster, expected "
            f"{roster.digest.hex()}"
        )


def check_deals(setup: Setup, roster: Roster, deals: Deals, own: Deal) -> tuple[int, ...]:
    """Every member signed the roster that this site has.

    Returns:
        The members.

    Raises:
        UnknownSiteError, DifferentRosterError: See `check_dealt`; or this site is missing.
        TooFewSitesError: Fewer than n_min.
    """
    for dealt in deals.dealt:
        check_dealt(setup, roster, dealt)
    if own.dealt() not in deals.dealt:
        raise UnknownSiteError(f"deals: lack {setup.name(own.site)}, expected this site's own")
    members = tuple(dealt.site for dealt in deals.dealt)
    check_members(setup, members, "members")
    return members


def check_current(opening: Opening, number: int, context: bytes, what: str) -> None:
    """A message is about the round that is open.

    Raises:
        WrongRoundError: It is about another round.
        DifferentContextError: It is about this one on other terms.
    """
    if number != opening.round:
        raise WrongRoundError(f"{what}: of round {number}, expected {opening.round}")
    if context != opening.context:
        raise DifferentContextError(
            f"{what}: in context {context.hex()}, expected {opening.context.hex()}; model, "
            "blocks or members differ"
        )


def check_partition(
    setup: Setup, members: tuple[int, ...], uploaders: tuple[int, ...], dropped: tuple[int, ...]
) -> None:
    """Every member is either an uploader or dropped.

    Raises:
        UnknownSiteError: A site is no member.
        AliveAndDeadError: A member is both, or neither.
        TooFewSitesError: Fewer uploaders than n_min.
    """
    for site in (*uploaders, *dropped):
        if site not in members:
            raise UnknownSiteError(
                f"uploaders: {setup.name(site)} is no member, expected {members}"
            )
    for site in members:
        if (site in uploaders) == (site in dropped):
            listed = "twice" if site in dropped else "nowhere"
            raise AliveAndDeadError(
                f"uploaders: {setup.name(site)} is listed {listed}, expected once: as uploader or "
                "as dropped"
            )
    check_members(setup, uploaders, "uploaders")


def check_uploaders(
    setup: Setup, members: tuple[int, ...], own: int, context: bytes, uploaders: Uploaders
) -> None:
    """Each of U signed an upload in this round, on these terms.

    Raises:
        UnknownSiteError, AliveAndDeadError, TooFewSitesError: See `check_partition`; or this site
            has uploaded and is listed as dropped.
        DifferentContextError, ForgedSignatureError: See `check_uploaded`.
    """
    check_partition(setup, members, uploaders.uploaders, uploaders.dropped)
    if own not in uploaders.uploaders:
        raise AliveAndDeadError(
            f"uploaders: {setup.name(own)} is listed as dropped, expected as uploader: it is this "
            "site, and has sent its vector"
        )
    signed = tuple(uploaded.site for uploaded in uploaders.uploaded)
    if signed != uploaders.uploaders:
        raise UnknownSiteError(f"uploaders: signed by {signed}, expected {uploaders.uploaders}")
    for uploaded in uploaders.uploaded:
        check_uploaded(setup, members, context, uploaded)


def check_signature(setup: Setup, site: int, statement: bytes, signature: bytes, what: str) -> None:
    """A member signed a statement.

    Raises:
        ForgedSignatureError: It did not.
    """
    if not is_signed(setup.roster[site].identity, statement, signature):
        raise ForgedSignatureError(
            f"{what} of {setup.name(site)}: its signature does not hold, expected one by "
            f"{setup.roster[site].identity.hex()}"
        )


def check_uploaded(
    setup: Setup, members: tuple[int, ...], context: bytes, uploaded: Uploaded
) -> None:
    """A member signed an upload in this context.

    Raises:
        UnknownSiteError: It is no member.
        DifferentContextError: Its upload is on other terms.
        ForgedSignatureError: It did not sign it.
    """
    name = setup.name(uploaded.site)
    if uploaded.site not in members:
        raise UnknownSiteError(f"upload of {name}: is no member, expected {members}")
    if uploaded.context != context:
        raise DifferentContextError(
            f"upload of {name}: in context {uploaded.context.hex()}, expected {context.hex()}; "
            "it has another model or other terms"
        )
    check_signature(setup, uploaded.site, uploaded.statement(), uploaded.signature, "upload")


def check_ledger(setup: Setup, known: tuple[int, bytes], uploaded: Uploaded) -> tuple[int, bytes]:
    """A site's ledger has grown: whatever it sends, it has debited.

    Args:
        setup: Whose names are used.
        known: Count and head that the site signed last; (0, b"") for none.
        uploaded: What it signs now.

    Returns:
        What it has signed last now.

    Raises:
        RolledBackLedgerError: It has no more entries than then.
    """
    count, head = known
    if uploaded.ledger_count <= count:
        raise RolledBackLedgerError(
            f"ledger of {setup.name(uploaded.site)}: has {uploaded.ledger_count} entries, expected "
            f"more than the {count} up to {head.hex()}; an older copy was put in its place, or the "
            "round was not debited"
        )
    return uploaded.ledger_count, uploaded.ledger_head


def check_confirmation(
    setup: Setup, uploaders: tuple[int, ...], context: bytes, confirmation: Confirmation
) -> None:
    """A member of U signed this very U in this context.

    Raises:
        UnknownSiteError: It is not in U.
        SplitViewError: It signed another U, or in another context.
    """
    name = setup.name(confirmation.site)
    if confirmation.site not in uploaders:
        raise UnknownSiteError(f"confirmation of {name}: is no uploader, expected {uploaders}")
    statement = statement_on_uploaders(context, uploaders)
    identity = setup.roster[confirmation.site].identity
    if confirmation.context != context or not is_signed(
        identity, statement, confirmation.signature
    ):
        raise SplitViewError(
            f"confirmation of {name}: is signed on another set of uploaders, expected {uploaders}"
        )


def check_confirmed(
    setup: Setup,
    uploaders: tuple[int, ...],
    context: bytes,
    confirmations: tuple[Confirmation, ...],
) -> None:
    """At least t of U signed this very U.

    Raises:
        UnknownSiteError, SplitViewError: See `check_confirmation`.
        TooFewConfirmationsError: Fewer than t.
    """
    for confirmation in confirmations:
        check_confirmation(setup, uploaders, context, confirmation)
    sites = {confirmation.site for confirmation in confirmations}
    if len(sites) < setup.numbers.t:
        raise TooFewConfirmationsError(
            f"confirmations: of {len(sites)} sites, expected at least t = {setup.numbers.t}"
        )
