"""`encryption = "sealed"`: a reply that only the aggregator can read, for relays that must not.

HPKE in base mode (RFC 9180) with X25519, HKDF-SHA256 and AES-256-GCM, signed by the site.

Formal guarantee: who holds neither the aggregator's private key nor the site's learns the length of
the reply and nothing else, and cannot alter it, pass it off as another site's or another context's.
The *aggregator* reads every single reply: noise must be added before (mechanism `local`, `site`),
or the aggregator trusted. A private key that gets out later opens what was recorded before.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from .encoding import MAX_WORDS, Buffer, Bytes, Hash, Name, Signature
from .errors import (
    DifferentContextError,
    ForgedSignatureError,
    TamperedCiphertextError,
    UnknownSiteError,
    WeakKeyError,
)
from .keys import Identity, digest, is_signed

_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


@dataclass(frozen=True)
class SealedReply:
    """A site's reply to the aggregator.

    Attributes:
        site: Whose, by name.
        context: What it answers: a hash of run, round, model and whatever else it rests on.
        box: HPKE's encapsulated key and ciphertext.
        signature: By the site's identity, over all of it.
    """

    KIND: ClassVar[int] = 20

    site: Name
    context: Hash
    box: Annotated[bytes, Bytes(48, 4 * MAX_WORDS)]
    signature: Signature

    def statement(self) -> bytes:
        """What is signed."""
        return digest("sealed reply", self.context, self.site.encode(), self.box)


def seal_reply(
    content: Buffer, site: str, identity: Identity, aggregator: bytes, context: bytes
) -> SealedReply:
    """Seals a reply.

    Args:
        content: Any bytes.
        site: The site's name.
        identity: Its own.
        aggregator: The aggregator's pinned X25519 public key.
        context: What the reply answers, 32 bytes.

    Raises:
        WeakKeyError: The aggregator's key is none.
    """
    about = digest("sealed", context, site.encode(), aggregator)
    try:
        key = X25519PublicKey.from_public_bytes(aggregator)
        box = _SUITE.encrypt(content, key, about)
    except ValueError:
        raise WeakKeyError(
            f"aggregator's key {aggregator.hex()}: is none, expected the pinned X25519 key"
        ) from None
    unsigned = SealedReply(site, context, box, bytes(64))
    signature = identity.sign(unsigned.statement())
    return SealedReply(site, context, box, signature)


def open_reply(
    reply: SealedReply, pinned: dict[str, bytes], private: bytes, context: bytes
) -> bytes:
    """Opens a reply.

    Args:
        reply: What came.
        pinned: The sites' public identities by name.
        private: The aggregator's X25519 private key.
        context: What was asked.

    Raises:
        UnknownSiteError: The site is none that is pinned.
        DifferentContextError: It answers something else.
        ForgedSignatureError: The site did not sign it.
        TamperedCiphertextError: It is not sealed for this key in this context.
    """
    if reply.site not in pinned:
        raise UnknownSiteError(
            f"reply of {reply.site}: expected one of {', '.join(sorted(pinned))}"
        )
    if reply.context != context:
        raise DifferentContextError(
            f"reply of {reply.site}: in context {reply.context.hex()}, expected {context.hex()}"
        )
    if not is_signed(pinned[reply.site], reply.statement(), reply.signature):
        raise ForgedSignatureError(
            f"reply of {reply.site}: its signature does not hold, expected one by "
            f"{pinned[reply.site].hex()}"
        )
    key = X25519PrivateKey.from_private_bytes(private)
    public = key.public_key().public_bytes_raw()
    about = digest("sealed", context, reply.site.encode(), public)
    try:
        return _SUITE.decrypt(reply.box, key, about)
    except (InvalidTag, ValueError):
        raise TamperedCiphertextError(
            f"reply of {reply.site}: does not open, expected what it sealed for this key"
        ) from None
