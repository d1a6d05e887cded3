"""Ledgers as people look at them: which files there are, what they say, what is known of them."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .config import ConfigError
from .privacy.books import EMPTY, Head
from .privacy.ledger import Ledger, verify
from .run import Run
from .server.store import RunFolder


def find(path: Path) -> list[Path]:
    """The ledgers at a path: a file, a folder of them, or a run's own.

    Raises:
        ConfigError: There are none.
    """
    if not path.is_dir():
        return [path]
    folders = [path, path / "ledger"]
    if (path / "config.toml").exists() and (durable := Run(path).config.data.ledger):
        folders.append(Path(durable))
    found = next((files for f in folders if (files := sorted(f.glob("*.sqlite")))), [])
    if not found:
        raise ConfigError(f"{path}: holds no ledger; name a ledger or a simulated run's folder")
    return found


def describe(path: Path) -> dict[str, Any]:
    """A ledger's accounts as plain values.

    Raises:
        LedgerError: It cannot be read, or is damaged.
    """
    opened = Ledger.open(path, read_only=True)
    books = opened.read()
    opened.close()
    return {
        "file": str(path),
        "site": books.opened["site"],
        "simulated": books.opened["simulated"],
        "entries": books.head.number,
        "head": books.head.hash,
        "accounts": [
            {
                "account": "/".join(statement.account),
                "epsilon": [statement.epsilon, statement.lifetime.epsilon],
                "delta": [statement.delta, statement.lifetime.delta],
                "composition": statement.lifetime.composition,
                "runs": statement.runs,
                "made": statement.made,
                "reserved": statement.reserved,
            }
            for statement in books.statements()
        ],
    }


def check(path: Path, known: Head | None) -> dict[str, Any]:
    """Verifies a ledger; what was found, as plain values.

    Raises:
        LedgerError: It does not hold.
    """
    verdict = verify(path, known or EMPTY)
    return {
        "file": str(path),
        "entries": verdict.head.number,
        "head": verdict.head.hash,
        "held_against": list(known) if known else None,
        "prices": [
            {"run_id": run_id, "side": side, "stated": stated, "recomputed": real}
            for (run_id, side), (stated, real) in verdict.prices.items()
        ],
    }


def known_heads(path: Path) -> Mapping[str, Head]:
    """The heads that a run saw last, by the stem of a simulated site's ledger.

    Raises:
        FedveilError: The run folder's state is damaged.
    """
    folder = RunFolder(path)
    if not (path / "checkpoint").is_dir():
        return {}
    point, _ = folder.load_checkpoint()
    seen = point.ledgers if point else {}
    return {f"site-{node:03d}": Head(*head) for node, head in seen.items()}


def parse_head(text: str, files: Sequence[Path]) -> Head:
    """Reads COUNT:HASH.

    Raises:
        ConfigError: It is none, or there are several ledgers that it could be of.
    """
    count, _, digest = text.partition(":")
    if not re.fullmatch("[0-9]{1,18}", count) or re.fullmatch("[0-9a-f]{64}", digest) is None:
        raise ConfigError(
            f"--head {text}: must be COUNT:HASH, as `fedveil ledger show` prints them"
        )
    if len(files) != 1:
        raise ConfigError(f"--head {text}: is of one ledger; name one")
    return Head(int(count), digest)
