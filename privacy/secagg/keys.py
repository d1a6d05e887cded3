"""Identities, key agreement, key derivation and sealed boxes; primitives of `cryptography` only.

Every hash, signature and key begins with what it is for (a label of this protocol) and names the
context that it belongs to, so that nothing made for one purpose means anything in another.
"""

import hashlib
import secrets
from collections.abc import Callable

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from .encoding import Buffer
from .errors import WeakKeyError

_PROTOCOL = b"fedveil secure aggregation 1"
NONCE_BYTES = 12
TAG_BYTES = 16
Entropy = Callable[[int], bytes]
"""So many secret random bytes; the system's, but in tests."""
system_entropy: Entropy = secrets.token_bytes


def digest(label: str, *parts: Buffer) -> bytes:
    """SHA-256 of labelled parts, 32 bytes; no two lists of parts give the same input."""
    state = hashlib.sha256(_joined(label, len(parts)))
    for part in parts:
        state.update(memoryview(part).nbytes.to_bytes(8, "big"))
        state.update(part)
    return state.digest()


def _joined(label: str, count: int) -> bytes:
    name = label.encode("ascii")
    return b"".join((_PROTOCOL, bytes([len(name)]), name, count.to_bytes(4, "big")))


class Identity:
    """A long-lived Ed25519 signing key, pinned out of band by whoever verifies (RFC 8032)."""

    def __init__(self, seed: bytes) -> None:
        """The identity of a secret seed.

        Raises:
            ValueError: The seed is not 32 bytes.
        """
        if len(seed) != 32:
            raise ValueError(f"seed = {len(seed)} bytes: must be 32 secret bytes")
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public = self._key.public_key().public_bytes_raw()

    def sign(self, statement: bytes) -> bytes:
        """64 bytes; the same ones each time. `statement` is a `digest`."""
        return self._key.sign(statement)


def is_signed(identity: bytes, statement: bytes, signature: bytes) -> bool:
    """Whether the holder of a pinned identity signed a statement."""
    try:
        Ed25519PublicKey.from_public_bytes(identity).verify(signature, statement)
    except (InvalidSignature, ValueError):
        return False
    return True


def public_of(private: bytes) -> bytes:
    """The X25519 public key of a private one."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes) -> bytes:
    """The X25519 shared secret (RFC 7748), to be derived from and never used as it is.

    Raises:
        WeakKeyError: Everybody would agree on the same with this public key.
    """
    try:
        theirs = X25519PublicKey.from_public_bytes(public)
        return X25519PrivateKey.from_private_bytes(private).exchange(theirs)
    except ValueError:
        raise WeakKeyError(
            f"public key {public.hex()}: is of small order, expected a fresh X25519 key"
        ) from None


def derive(secret: bytes, label: str, *parts: Buffer) -> bytes:
    """A 32-byte key for one purpose: HKDF-SHA256 (RFC 5869), its `info` a `digest`."""
    return HKDF(hashes.SHA256(), 32, salt=None, info=digest(label, *parts)).derive(secret)


def seal(key: bytes, nonce: bytes, content: Buffer, about: bytes) -> bytes:
    """AES-256-GCM (NIST SP 800-38D) of content, bound to what it is about."""
    return AESGCM(key).encrypt(nonce, content, about)


def unseal(key: bytes, nonce: bytes, box: Buffer, about: bytes) -> bytes | None:
    """What was sealed, or nothing if the key, the box or what it is about is another."""
    try:
        return AESGCM(key).decrypt(nonce, box, about)
    except InvalidTag:
        return None
