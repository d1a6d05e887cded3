"""Sealed shares: Shamir shares from one site for another, through whoever sits between them."""

from .encoding import Buffer
from .errors import MisdirectedShareError, TamperedCiphertextError
from .keys import NONCE_BYTES, Entropy, agree, derive, digest, seal, unseal
from .messages import SealedShare

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
