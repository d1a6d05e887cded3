"""Pinned identities as a file: what each party gets out of band, and never from the server.

```toml
[identities]
st-mary = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
```
"""

import re
from pathlib import Path

from ...config import ConfigError, read_toml
from .encoding import Text

_NAMES = Text(64)
_HEX = re.compile(r"[0-9a-fA-F]{64}", re.ASCII)


def read_identities(path: Path) -> dict[str, bytes]:
    """Ed25519 public keys (32 bytes) by the site's name.

    Raises:
        ConfigError: The file cannot be read, or a line of it is no name with a key; or two names
            have one key.
    """
    raw = read_toml(path)
    table = raw.get("identities")
    if not isinstance(table, dict) or not table or raw.keys() != {"identities"}:
        raise ConfigError(
            f"{path}: holds {', '.join(raw) or 'nothing'}, expected one section [identities] with "
            'lines like st-mary = "64 hexadecimal digits"'
        )
    found: dict[str, bytes] = {}
    for name, value in table.items():
        if not _NAMES.fits(name):
            raise ConfigError(f"{path}: identities.{name!a}: expected a name of plain characters")
        if not isinstance(value, str) or not _HEX.fullmatch(value):
            raise ConfigError(
                f"{path}: identities.{name} = {value!a}: expected 64 hexadecimal digits, the "
                "site's Ed25519 public key"
            )
        found[name] = bytes.fromhex(value)
    if len(set(found.values())) < len(found):
        raise ConfigError(f"{path}: identities: two names have one key, expected one each")
    return found
