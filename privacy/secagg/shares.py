"""Sealed shares: Shamir shares from one site for another, through whoever sits between them."""

from collections.abc import Mapping, Sequence

from .encoding import Buffer
from .errors import MalformedMessageError, MisdirectedShareError, TamperedCiphertextError
from .keys import NONCE_BYTES, Entropy, agree, derive, digest, public_of, seal, unseal
from .messages import Roster, SealedShare

MASK_KEYS, SEED = 1, 2
"""The kinds: shares of all of an epoch's mask keys, and the share of one round's seed."""


def seal_share(
    content: Buffer,
    route: tuple[int, int, int],
    context: bytes,
    private: bytes,
    public: bytes,
    entropy: Entropy,
) -> SealedShare:
    """Seals a share.

    Args:
        content: The share.
        route: Kind, source, destination.
        context: What it belongs to.
        private: A key that the source made for this one message.
        public: The destination's channel key.
        entropy: For the nonce. The derived key serves this one box already.

    Raises:
        WeakKeyError: The destination's key is none.
    """
    kind, source, destination = route
    nonce = entropy(NONCE_BYTES)
    key = derive(agree(private, public), "share", context, bytes(route))
    box = seal(key, nonce, content, digest("share", context, bytes(route)))
    return SealedShare(destination, source, kind, nonce, box)


def open_share(
    share: SealedShare,
    route: tuple[int, int, int],
    context: bytes,
    private: bytes,
    public: bytes,
    length: int,
) -> bytes:
    """Opens what `seal_share` sealed.

    `private` is the destination's channel key, `public` the one that the source signed with the
    message: the signature says whose the box is.

    Raises:
        MisdirectedShareError: It says that it is another kind of share, or another's.
        TamperedCiphertextError: It is not what the source sealed for this context, or not as long.
        WeakKeyError: The source's key is none.
    """
    found = (share.kind, share.source, share.destination)
    if found != route:
        raise MisdirectedShareError(
            f"sealed share: kind {found[0]} from {found[1]} for {found[2]}, expected kind "
            f"{route[0]} from {route[1]} for {route[2]}"
        )
    key = derive(agree(private, public), "share", context, bytes(route))
    content = unseal(key, share.nonce, share.box, digest("share", context, bytes(route)))
    if content is None or len(content) != length:
        raise TamperedCiphertextError(
            f"sealed share from {share.source}: does not open as {length} bytes, expected what "
            "that site sealed for this site in this context"
        )
    return content


def seal_shares(
    values: Sequence[bytes],
    sites: Sequence[int],
    kind: int,
    source: int,
    context: bytes,
    roster: Roster,
    entropy: Entropy,
) -> tuple[bytes, tuple[SealedShare, ...]]:
    """Seals one message's shares with a key that is forgotten here.

    Args:
        values: Everybody's share, by place on the set-up's roster.
        sites: For whom; the source keeps its own.
        kind: Of what.
        source: From whom.
        context: What they belong to.
        roster: The sites' channel keys.
        entropy: For key and nonces.

    Returns:
        The key's public half, to be signed with the message; and the sealed shares.

    Raises:
        WeakKeyError: A destination's key is none.
    """
    private = entropy(32)
    channels = {advertised.site: advertised.channel for advertised in roster.advertisements}
    return public_of(private), tuple(
        seal_share(values[site], (kind, source, site), context, private, channels[site], entropy)
        for site in sites
        if site != source
    )


def open_shares(
    shares: Sequence[SealedShare],
    kind: int,
    destination: int,
    context: bytes,
    private: bytes,
    channels: Mapping[int, bytes],
    length: int,
) -> dict[int, bytes]:
    """What each of the other sources sealed for this site.

    Args:
        shares: One of each source, in their order.
        kind: Of what.
        destination: This site.
        context: What they belong to.
        private: This site's channel key.
        channels: The keys that the sources signed with their messages; this site's is not needed.
        length: Bytes of a share.

    Raises:
        MalformedMessageError: There are more or fewer.
        MisdirectedShareError, TamperedCiphertextError, WeakKeyError: See `open_share`.
    """
    others = [source for source in channels if source != destination]
    if len(shares) != len(others):
        raise MalformedMessageError(f"shares: {len(shares)}, expected {len(others)}, one each")
    return {
        source: open_share(
            share, (kind, source, destination), context, private, channels[source], length
        )
        for source, share in zip(others, shares, strict=True)
    }
