"""The secret between the server's own processes."""

from ..config import ConfigError
from ..deployment.kit import Kit


def link_key(kit: Kit) -> bytes:
    """32 bytes from a server kit's `keys/link.key`.

    Raises:
        ConfigError: It cannot be read, or is none.
    """
    path = kit.keys / "link.key"
    try:
        key = bytes.fromhex(path.read_text(encoding="ascii"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the kit") from None
    except ValueError:
        key = b""
    if len(key) != 32:
        raise ConfigError(f"{path}: holds no key; put a whole copy of the kit back")
    return key
