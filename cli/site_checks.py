"""What `fedveil site check` tries, one thing after another; none of it changes anything."""

import os
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import ConfigError, FedveilError

if TYPE_CHECKING:
    from ..client.deployed import Own
    from ..deployment.kit import Kit

_PATIENCE = 10.0  # seconds for a server to answer
_SHORTLY = 30  # days before a certificate ends


@dataclass(frozen=True)
class Found:
    """What came of one check.

    Attributes:
        name: The thing.
        ok: Whether it will do.
        said: What it is, or the cause and the mend.
    """

    name: str
    ok: bool
    said: str


def examine(folder: Path, schema: Path | None = None) -> Iterator[Found]:
    """All checks, in the order in which their causes hang together.

    Args:
        folder: The site's kit.
        schema: A federation's schema to read the records by.
    """
    from ..client.deployed import read_own
    from ..deployment.kit import Kit

    opened: list[Kit] = []

    def read_kit() -> str:
        opened.append(Kit.read(folder, "site"))
        return f"site {opened[0].name} of the federation {opened[0].about.federation}"

    yield _tried("kit", read_kit)
    if not opened:
        return
    kit, owns = opened[0], list["Own"]()

    def read_file() -> str:
        owns.append(read_own(kit))
        policy = owns[0].file.policy
        return (
            f"account {policy.dataset_id}, epsilon {policy.epsilon_lifetime:g} and delta "
            f"{policy.delta_lifetime:g} over all runs; approval is {policy.approval}"
        )

    yield _tried("site.toml", read_file)
    for own in owns:
        yield from _own(own, schema)
    yield _tried("roster", lambda: _roster(kit))
    yield _tried("certificate", lambda: _certificate(kit, datetime.now(UTC)))
    yield from _clock()
    yield from _server(kit)


def _fine(name: str, said: str) -> Found:
    return Found(name, ok=True, said=said)


def _fault(name: str, said: str) -> Found:
    return Found(name, ok=False, said=said)


def _tried(name: str, check: Callable[[], str]) -> Found:
    try:
        return _fine(name, check())
    except FedveilError as error:
        return _fault(name, " ".join(str(error).split()))
    except Exception as error:  # noqa: BLE001  a check that nobody foresaw to fail has failed
        return _fault(name, " ".join(f"{type(error).__name__}: {error}".split()))


# What is here


def _own(own: "Own", schema: Path | None) -> Iterator[Found]:
    from ..client.deployed import exposed

    try:
        lines = exposed(own)
        yield from (_fault("permissions", line) for line in lines)
        if not lines:
            yield _fine("permissions", "keys, ledger and state are for their owner only")
    except ConfigError as error:
        yield _fault("permissions", str(error))
    yield _tried("ledger", lambda: _ledger(own))
    yield _tried("data", lambda: _data(own, schema))


def _ledger(own: "Own") -> str:
    from ..client.deployed import read_witness
    from ..ledgers import check

    known = read_witness(own)
    if not known.number and not os.path.lexists(own.ledger):
        return f"{own.ledger}: none yet; it is made when the site is up for the first time"
    found = check(own.ledger, known if known.number else None)
    return f"{own.ledger}: whole, {found['entries']} entries, {len(found['prices'])} prices"


def _data(own: "Own", schema: Path | None) -> str:
    source = own.file.site.data
    count = _count(own) if schema is None else _read_by(own, schema)
    return f"{source}: {count}; this number stays here, it is printed for you only"


def _count(own: "Own") -> str:
    """Records without a schema: lines, rows or images, and the columns that the map names."""
    from ..data_prep import held_by
    from ..data_prep.images import image_files, read_npz_arrays
    from ..data_prep.tabular import named, read_parquet, read_rows, table_path
    from ..data_prep.texts import objects, text_files
    from ..data_prep.words import nearest, quoted

    source, columns = own.file.site.data, own.file.columns
    path = Path(source)
    if held_by(source) == "text":
        if columns:
            raise ConfigError("map: texts have no columns; take [map] out")
        if path.suffix.lower() == ".jsonl":
            return f"{_some(sum(one is not None for one in objects(path)))} lines"
        return f"{_some(sum(file.stat().st_size for file in text_files(path)))} bytes of text"
    if path.is_dir() or path.suffix == ".npz":
        if columns:
            raise ConfigError("map: images have no columns; take [map] out")
        if path.is_dir():
            return f"{_some(len(image_files(path)))} images"
        lengths = [len(array) for array in read_npz_arrays(path, None).values() if array.ndim]
        return f"{_some(max(lengths, default=0))} images"
    if table_path(source).suffix.lower() == ".parquet":
        frame = read_parquet(path)
        names, records = frame.columns, frame.height
    else:
        rows = read_rows(path)
        names, records = (named(rows[0]) if rows else []), max(0, len(rows) - 1)
    for name, wanted in columns.items():
        if wanted not in names:
            raise ConfigError(
                f'map.{name} = "{wanted}": {source} has no such column'
                f"{nearest(wanted, names) or '; it has ' + ', '.join(map(quoted, names[:8]))}"
            )
    return f"{_some(records)} records, {len(names)} columns"


def _some(count: int) -> str:
    if not count:
        raise ConfigError("site.data: holds no record; check the path")
    return str(count)


def _read_by(own: "Own", schema: Path) -> str:
    """Records as a run would have them: read by the map and cleaned by the default rules."""
    from ..config import Clean
    from ..data_prep import modality
    from ..data_prep.clean import refuse_unusable
    from ..data_prep.schema import load_schema

    declared = load_schema(str(schema))
    kind = modality(declared)
    raw = kind.read(own.file.site.data, declared, own.file.columns)
    _, report = kind.clean(raw, declared, Clean())
    refuse_unusable(report)
    return f"{report.kept} of {report.records} records are usable by {schema}"


def _roster(kit: "Kit") -> str:
    from ..client.deployed import known_keys

    roster = kit.read_roster()
    known_keys(kit, roster)
    return f"version {roster.version}, {len(roster.sites)} sites, this one among them"


def _certificate(kit: "Kit", now: datetime) -> str:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes

    found = x509.load_pem_x509_certificate(kit.certificate())
    try:
        found.verify_directly_issued_by(kit.authority())
    except (ValueError, TypeError, InvalidSignature):
        raise ConfigError(
            f"{kit.answer}: its certificate is not signed by the federation's authority; have the "
            "answer sent again"
        ) from None
    first, last = found.not_valid_before_utc, found.not_valid_after_utc
    if not first <= now <= last:
        raise ConfigError(
            f"{kit.answer}: its certificate holds from {first:%Y-%m-%d} to {last:%Y-%m-%d}, and "
            f"the clock says {now:%Y-%m-%d}; set the clock, or have the site rotated"
        )
    member = kit.read_roster().holder(found.fingerprint(hashes.SHA256()).hex())
    if member is None or (member.role, member.name) != ("site", kit.name):
        raise ConfigError(
            f"{kit.answer}: its certificate is not the one that the roster has of {kit.name}; put "
            "the authority's newest answer there"
        )
    left = (last - now).days
    mend = "; have the site rotated soon" if left < _SHORTLY else ""
    return f"its last day is {last:%Y-%m-%d}, in {left} days{mend}"


def _clock() -> Iterator[Found]:
    from ..doctor import clock, time_server
    from ..machine import clock_state

    now = datetime.now(UTC)
    installed = datetime.fromtimestamp(Path(__file__).stat().st_mtime, UTC)
    for found in (clock(now, installed), time_server(clock_state())):
        mend = f"; {found.mend}" if found.mend else ""
        # That no time server is known is worth a word, and no fault.
        yield Found(found.name, found.state == "ok" or found.name != "clock", found.found + mend)


# The server


def _server(kit: "Kit") -> Iterator[Found]:
    host = kit.about.server
    found = _tried("name", lambda: _resolved(host))
    yield found
    if not found.ok:
        return
    for name, port in (("fleet", kit.about.fleet_port), ("control", kit.about.control_port)):
        reached = _tried(f"{name} port", lambda port=port: _reached(host, port))  # type: ignore[misc]
        yield reached
        if reached.ok:
            yield _tried(f"{name} TLS", lambda port=port: _trusted(kit, host, port))  # type: ignore[misc]


def _resolved(host: str) -> str:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"{host}: has no address ({error}); check the name in kit.toml and this machine's DNS"
        ) from None
    return f"{host} is {', '.join(dict.fromkeys(str(one[4][0]) for one in found))}"


def _reached(host: str, port: int) -> str:
    try:
        socket.create_connection((host, port), _PATIENCE).close()
    except OSError as error:
        raise ConfigError(
            f"{host}:{port}: cannot be reached ({error.strerror or error}); is the server up, and "
            "does a firewall here let this port out?"
        ) from None
    return f"{host}:{port} answers"


def _trusted(kit: "Kit", host: str, port: int) -> str:
    try:
        context = ssl.create_default_context(cafile=str(kit.ca))
        context.set_alpn_protocols(["h2", "http/1.1"])
        with (
            socket.create_connection((host, port), _PATIENCE) as plain,
            context.wrap_socket(plain, server_hostname=host) as opened,
        ):
            return f"{host}:{port} is the federation's server, {opened.version()}"
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(
            f"{host}:{port}: shows a certificate that is not the federation's "
            f"({error.verify_message}); check kit.toml's server, or ask the operator: somebody may "
            "stand in between"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{host}:{port}: speaks no TLS ({error.strerror or error}); is another program there?"
        ) from None
