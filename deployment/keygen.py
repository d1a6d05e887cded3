"""A site's keys: made at the site, and all that leaves it is a request with their public halves."""

import secrets
import shutil
from datetime import UTC, datetime
from pathlib import Path

from ..config import ConfigError
from ..files import replace_file, sync_folder
from .keys import (
    CONTROL,
    IDENTITY,
    KEPT,
    NODE,
    ROTATED,
    make_keys,
    read_control,
    read_identity,
    read_node,
)
from .kit import Kit
from .request import make_request, request_fingerprint

__all__ = ["keygen", "request_fingerprint"]


def keygen(kit_folder: Path, rotate: bool = False) -> Path:  # noqa: FBT001, FBT002
    """Makes a site's private keys in its kit, and the request that its authority is to sign.

    The keys that split the site's records and encrypt its state are made once and stay: with
    others, held-out records would be trained on and spent shares sent again.

    Args:
        kit_folder: The site's kit.
        rotate: Whether to make new keys in place of those that are there, which are kept in a
            folder of their own.

    Returns:
        `request.json`, to be sent to the authority; nothing in it is secret.

    Raises:
        ConfigError: It is no site's kit, has keys already, or cannot be written.
    """
    kit = Kit.read(kit_folder, "site")
    try:
        present = [name for name in ROTATED if (kit.keys / name).exists()]
        if present and not rotate:
            raise ConfigError(
                f"{kit.keys / present[0]}: is there already; `fedveil site keygen --rotate` makes "
                "new keys and keeps these aside"
            )
        draft = kit.folder / f".keys.{secrets.token_hex(8)}.partial"
        draft.mkdir(mode=0o700)
        try:
            return _make(kit, draft)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise ConfigError(
            f"{kit.keys}: cannot be written ({error.strerror}); check its owner and the disk"
        ) from None


def _make(kit: Kit, draft: Path) -> Path:
    missing = tuple(name for name in KEPT if not (kit.keys / name).exists())
    make_keys(draft, (*ROTATED, *missing))
    content = make_request(
        kit.name,
        kit.about.federation,
        read_identity(draft / IDENTITY),
        read_node(draft / NODE),
        read_control(draft / CONTROL),
    )
    request = kit.folder / "request.json"
    # Before the keys: without them it is only of no use, and they without it would be in the way.
    replace_file(request, content, 0o644)
    _put(draft, kit.keys)
    return request


def _put(draft: Path, keys: Path) -> None:
    """Moves new keys to their place, and what was there of them aside."""
    keys.mkdir(mode=0o700, exist_ok=True)
    keys.chmod(0o700)
    old = keys / f"old-{datetime.now(UTC):%Y%m%dT%H%M%S%fZ}"
    for name in ROTATED:
        if (keys / name).exists():
            old.mkdir(mode=0o700, exist_ok=True)
            (keys / name).rename(old / name)
    for new in sorted(draft.iterdir()):
        new.rename(keys / new.name)
    sync_folder(keys)
    sync_folder(keys.parent)
