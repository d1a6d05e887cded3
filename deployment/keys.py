"""Private keys in a kit's `keys/`: for their owner's eyes, whole or an error of one line."""

import secrets
from collections.abc import Mapping
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from ..config import ConfigError
from ..files import create_secret_file
from ..privacy.secagg.keys import Identity
from .certificates import new_key, parse_key, private_pem

IDENTITY, VAULT, SPLIT, NODE = "identity.key", "vault.key", "split.key", "node.key"
CONTROL, TLS, COORDINATOR, LINK = "control.key", "server.key", "coordinator.key", "link.key"

KEYS_OF: Mapping[str, tuple[str, ...]] = {
    "site": (IDENTITY, VAULT, SPLIT, NODE, CONTROL),
    "server": (TLS, COORDINATOR, LINK),
    "operator": (CONTROL,),
    "auditor": (CONTROL,),
}
"""What stands in the keys folder of each role's kit."""
KEPT = (VAULT, SPLIT)
"""A site's keys that outlive a rotation: by them it reads its own state and splits its records."""
ROTATED = (IDENTITY, NODE, CONTROL)
"""A site's keys that a rotation replaces: others know their public halves."""


def read_secret(path: Path) -> bytes:
    """The content of a private key's file.

    Raises:
        ConfigError: It is missing, cannot be read, or others may read it.
    """
    try:
        mode = path.stat().st_mode
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); put the key back, or have it rotated"
        ) from None
    check_private(path, mode, "600")
    return content


def check_private(path: Path, mode: int, wanted: str) -> None:
    """Checks that nobody but its owner may use a file or a folder.

    Raises:
        ConfigError: Others may.
    """
    if mode & 0o077:
        raise ConfigError(
            f"{path}: is open to others (mode {mode & 0o777:03o}); `chmod {wanted} {path}`"
        )


def read_hex(path: Path, length: int) -> bytes:
    """The bytes of a key that is kept as hexadecimal digits.

    Raises:
        ConfigError: As `read_secret`, or it is none of `length` bytes.
    """
    try:
        found = bytes.fromhex(read_secret(path).decode("ascii"))
    except ValueError:
        found = b""
    if len(found) != length:
        raise ConfigError(
            f"{path}: holds no key of {2 * length} hexadecimal digits; put a whole copy back"
        )
    return found


def read_identity(path: Path) -> Identity:
    """A site's identity in secure sums.

    Raises:
        ConfigError: As `read_hex`.
    """
    return Identity(read_hex(path, 32))


def read_control(path: Path) -> ec.EllipticCurvePrivateKey:
    """The key of a certificate.

    Raises:
        ConfigError: As `read_secret`, or it holds none.
    """
    return parse_key(read_secret(path), path)


def read_node(path: Path) -> ec.EllipticCurvePrivateKey:
    """The key that signs requests to the Fleet API: P-384 in OpenSSH's form.

    Raises:
        ConfigError: As `read_secret`, or it holds none.
    """
    content = read_secret(path)
    try:
        key = load_ssh_private_key(content, password=None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp384r1":
        raise ConfigError(f"{path}: holds no P-384 private key (OpenSSH); put a whole copy back")
    return key


def openssh(key: ec.EllipticCurvePublicKey) -> str:
    """A node's public key as the roster has it, in OpenSSH's form."""
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def make_keys(folder: Path, names: tuple[str, ...]) -> None:
    """Makes private keys in a folder that is there.

    Raises:
        FileExistsError: One is there already.
        OSError: The disk refuses.
    """
    for name in names:
        create_secret_file(folder / name, _new(name))


def _new(name: str) -> bytes:
    if name in {CONTROL, TLS}:
        return private_pem(new_key())
    if name == NODE:
        key = ec.generate_private_key(ec.SECP384R1())
        return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    return f"{secrets.token_hex(64 if name == COORDINATOR else 32)}\n".encode()
