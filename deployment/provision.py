"""From a federation's file to kits, and what an authority does later: sign, add, rotate, revoke.

Only the authority's folder and the server's roster change with a member, and no other member's kit.
A site's private keys are never here: `sign` takes public halves and answers with a certificate.
"""

import json
import re
from datetime import UTC, datetime
from pathlib import Path

import tomli_w
from cryptography.hazmat.primitives.asymmetric import ec

from ..config import PARTY, ConfigError, FederationFile, Members, read_federation
from ..config.federation_file import SERVER
from ..files import replace_file
from ..privacy.secagg.keys import Identity
from .authority import FOLDERS, Authority, whole_folder
from .certificates import (
    certificate_pem,
    check_valid,
    fingerprint,
    make_authority,
    new_key,
    private_pem,
)
from .keys import CONTROL, COORDINATOR, KEYS_OF, TLS, make_keys, read_control, read_hex
from .kit import Kit, KitFile, KitRole
from .request import Request, read_request
from .roster import ROLES, Member, Role, Roster, sign_roster
from .templates import texts


def create(federation_file: Path, out: Path, now: datetime | None = None) -> Path:
    """Makes the authority of a federation and a kit for each party.

    Args:
        federation_file: `FEDERATION.toml`.
        out: The folder to make, of `authority/`, `server/`, `sites/`, `operators/`, `auditors/`.
        now: With a time zone; the clock's where it is left out.

    Returns:
        `out`.

    Raises:
        ConfigError: The file is unusable, or `out` is taken or cannot be written; nothing is there.
    """
    file = read_federation(federation_file)
    try:
        if out.is_file() or (out.is_dir() and any(out.iterdir())):
            raise ConfigError(f"{out}: is not empty; give a folder that is not there yet")
        with whole_folder(out.resolve()) as draft:
            copy = federation_file.read_bytes()
            _fill(_make_authority(draft, file, copy, now or datetime.now(UTC)))
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error.strerror}); give another") from None
    return out


def sign(
    kits: Path,
    request: Path,
    out: Path | None = None,
    *,
    expect: str | None = None,
    now: datetime | None = None,
) -> Path:
    """Takes a site into the roster by its request; the same request gives the same entry.

    Args:
        kits: The folder that `create` made.
        request: The site's `request.json`.
        out: Where the answer goes; `answers/NAME.json` in `kits` where it is left out.
        expect: The fingerprint that the site read out, if it is to be held against the request's.
        now: With a time zone; the clock's where it is left out.

    Returns:
        The answer, with the site's certificate and the roster.

    Raises:
        ConfigError: The request is not whole, not a site's of this federation, or not the one that
            the site has an entry of.
    """
    asked = _expected(request, expect)
    with Authority.opened(kits, now) as authority:
        _check_site(authority, asked, request)
        if (present := authority.entry(asked.name)) is None:
            _enter_site(authority, asked, request)
        elif not _is_same(authority, present, asked):
            raise ConfigError(
                f"{request}: {asked.name} is in the roster with other keys; if these are to "
                f"replace them, `fedveil provision rotate {kits} {asked.name} --request {request}`"
            )
        authority.publish()
        return _answer(authority, asked.name, out)


def add(kits: Path, name: str, role: Role, now: datetime | None = None) -> Path:
    """Makes the kit of a new member; a site becomes one with `sign`, others at once.

    Returns:
        The kit.

    Raises:
        ConfigError: The name is taken or none, or a former member's keys are in the folder.
    """
    if role not in ROLES:
        raise ConfigError(f'role = "{role}": must be one of {", ".join(ROLES)}')
    if re.fullmatch(PARTY, name) is None:
        raise ConfigError(f'name = "{name}": must match {PARTY}')
    with Authority.opened(kits, now) as authority:
        folder, present = _kit_folder(authority, role, name), authority.role_of(name)
        if present and (present != role or authority.entry(name) or folder.exists()):
            raise ConfigError(
                f'name = "{name}": is {_a(present)} of this federation; take another name, or '
                "`fedveil provision rotate` for new keys"
            )
        if folder.exists() and role != "site":
            raise ConfigError(f"{folder}: is there already; move it away, it is a former member's")
        if present is None:
            authority.enlist(name, role)
        return _member_kit(authority, role, name)


def rotate(
    kits: Path,
    name: str,
    request: Path | None = None,
    *,
    expect: str | None = None,
    now: datetime | None = None,
) -> Path:
    """Gives a party new keys and a new certificate; the old ones are refused from then on.

    Args:
        kits: The folder that `create` made.
        name: A member's, or `server` for the server's TLS certificate.
        request: A site's new request, and of nobody else.
        expect: As for `sign`.
        now: With a time zone; the clock's where it is left out.

    Returns:
        A site's answer; else the kit.

    Raises:
        ConfigError: There is no such party, or the request is not the site's.
    """
    with Authority.opened(kits, now) as authority:
        role = authority.role_of(name)
        if role != "site" and request is not None:
            raise ConfigError(f"--request {request}: {name} is no site, and needs none")
        if name == SERVER:
            return _rotate_server(authority)
        if role is None:
            raise _unknown(authority, name)
        if role != "site":
            return _rotate_caller(authority, role, name)
        if request is None:
            raise ConfigError(
                f"{name}: is a site, whose keys are its own; `fedveil site keygen --rotate` there, "
                "and --request with what it writes"
            )
        return _rotate_site(authority, name, request, expect)


def revoke(kits: Path, name: str, now: datetime | None = None) -> Roster:
    """Takes a member out of the federation: it is refused as soon as the server has the roster.

    Returns:
        The roster without it.

    Raises:
        ConfigError: There is no such member.
    """
    if name == SERVER:
        raise ConfigError("server: is no member; `fedveil provision rotate` gives it new keys")
    with Authority.opened(kits, now) as authority:
        if authority.role_of(name) is None and authority.entry(name) is None:
            raise _unknown(authority, name)
        # The roster first: whatever happens then, nobody is a member who should not be.
        authority.remove(name)
        authority.strike(name)
        (authority.folder / "certificates" / f"{name}.pem").unlink(missing_ok=True)
        (kits / "answers" / f"{name}.json").unlink(missing_ok=True)
        return authority.roster


def _make_authority(kits: Path, file: FederationFile, copy: bytes, now: datetime) -> Authority:
    key, name = new_key(), file.federation.name
    made = make_authority(name, key, file.certificates.ca_days, now)
    authority = Authority(kits, file, key, made, now)
    authority.folder.mkdir(mode=0o700)
    (authority.folder / "certificates").mkdir()
    for owner in FOLDERS.values():
        (kits / owner).mkdir()
    replace_file(authority.folder / "ca.key", private_pem(key), 0o600)
    members = Members(**{owner: getattr(file.members, owner) for owner in FOLDERS.values()})
    for entry, content in {
        "ca.pem": certificate_pem(made),
        "federation.toml": copy,
        "members.toml": tomli_w.dumps(members.model_dump()).encode(),
        "roster.json": sign_roster(Roster(name, 1, ()), key),
    }.items():
        replace_file(authority.folder / entry, content, 0o644)
    return authority


def _fill(authority: Authority) -> None:
    """Makes the first kits: the server's, and one for each member."""
    keys = authority.kits / "server" / "keys"
    keys.parent.mkdir(mode=0o700)
    keys.mkdir(mode=0o700)
    make_keys(keys, KEYS_OF["server"])
    public = Identity(read_hex(keys / COORDINATOR, 64)[:32]).public.hex()
    replace_file(authority.folder / "coordinator.pub", f"{public}\n".encode(), 0o644)
    certificate = authority.issue_server(read_control(keys / TLS).public_key())
    replace_file(keys.parent / "certificate.pem", certificate_pem(certificate), 0o644)
    _write_kit(authority, keys.parent, "server", SERVER)
    for role, owner in FOLDERS.items():
        for name in getattr(authority.members, owner):
            _member_kit(authority, role, name)
    authority.publish()


def _write_kit(authority: Authority, folder: Path, role: KitRole, name: str) -> None:
    """The files of a kit that hold no key, into a folder that is there."""
    server = authority.file.server
    about = KitFile(
        federation=authority.federation,
        role=role,
        name=name,
        server=server.address,
        fleet_port=server.fleet_port,
        control_port=server.control_port,
        coordinator=authority.coordinator,
    )
    replace_file(folder / "kit.toml", tomli_w.dumps(about.model_dump()).encode(), 0o644)
    replace_file(folder / "ca.pem", certificate_pem(authority.certificate), 0o644)
    for entry, text in texts(about).items():
        replace_file(folder / entry, text.encode(), 0o644)


def _member_kit(authority: Authority, role: Role, name: str) -> Path:
    """A member's kit; who needs no request stands in the roster then."""
    folder = _kit_folder(authority, role, name)
    if role == "site" and folder.exists():  # of one that was revoked: it is the same again
        Kit.read(folder, role)
        return folder
    with whole_folder(folder) as draft:
        _write_kit(authority, draft, role, name)
        if role == "site":
            return folder
        (draft / "keys").mkdir(mode=0o700)
        entry = _new_caller(authority, draft, role, name)
    authority.enter(entry)
    return folder


def _new_caller(authority: Authority, folder: Path, role: Role, name: str) -> Member:
    """New key and certificate in the kit of an operator or an auditor, and its roster entry."""
    key = new_key()
    certificate = authority.issue(name, role, key.public_key())
    replace_file(folder / "keys" / CONTROL, private_pem(key), 0o600)
    replace_file(folder / "certificate.pem", certificate_pem(certificate), 0o644)
    return Member(name, role, fingerprint(certificate))


def _rotate_caller(authority: Authority, role: Role, name: str) -> Path:
    folder = _kit_folder(authority, role, name)
    if not folder.exists():
        return _member_kit(authority, role, name)
    Kit.read(folder, role)
    authority.enter(_new_caller(authority, folder, role, name))
    return folder


def _rotate_server(authority: Authority) -> Path:
    """A new TLS key; the coordinator's stays, every kit and site.toml has it pinned."""
    folder = authority.kits / SERVER
    Kit.read(folder, "server")
    key = new_key()
    certificate = authority.issue_server(key.public_key())
    replace_file(folder / "keys" / TLS, private_pem(key), 0o600)
    replace_file(folder / "certificate.pem", certificate_pem(certificate), 0o644)
    return folder


def _rotate_site(authority: Authority, name: str, request: Path, expect: str | None) -> Path:
    asked = _expected(request, expect)
    if asked.name != name:
        raise ConfigError(f"{request}: is of {asked.name}, and {name} is to be rotated")
    _check_site(authority, asked, request)
    if authority.entry(name) is None:
        raise ConfigError(
            f"{name}: has no entry yet; `fedveil provision sign {authority.kits} {request}`"
        )
    _enter_site(authority, asked, request)
    return _answer(authority, name, None)


def _expected(path: Path, expect: str | None) -> Request:
    asked = read_request(path)
    if expect is not None and asked.fingerprint != expect.strip().lower():
        raise ConfigError(
            f"{path}: has the fingerprint {asked.fingerprint}, and {expect} is expected; somebody "
            "changed it, or it is another request; ask the site"
        )
    return asked


def _check_site(authority: Authority, asked: Request, path: Path) -> None:
    """That a request is of a site of this federation."""
    if asked.federation != authority.federation:
        raise ConfigError(
            f"{path}: is for the federation {asked.federation}, and this is {authority.federation}"
        )
    if authority.role_of(asked.name) != "site":
        raise ConfigError(
            f"{path}: {asked.name} is no site of this federation; they are "
            f"{', '.join(authority.members.sites)}; `fedveil provision add` adds one"
        )


def _enter_site(authority: Authority, asked: Request, path: Path) -> None:
    for other in authority.roster.members:
        if other.name != asked.name and _shares(authority, other, asked):
            raise ConfigError(
                f"{path}: has a key of {other.name}; each site makes its own, "
                "`fedveil site keygen --rotate`"
            )
    certificate = authority.issue(asked.name, "site", asked.control)
    authority.enter(
        Member(asked.name, "site", fingerprint(certificate), asked.identity, asked.node)
    )


def _shares(authority: Authority, other: Member, asked: Request) -> bool:
    return (
        other.identity == asked.identity
        or other.node == asked.node
        or _control_of(authority, other) == asked.control
    )


def _is_same(authority: Authority, present: Member, asked: Request) -> bool:
    return (
        (present.identity, present.node) == (asked.identity, asked.node)
        and _control_of(authority, present) == asked.control
    )  # fmt: skip


def _control_of(authority: Authority, member: Member) -> ec.EllipticCurvePublicKey | None:
    """The key of the certificate that the roster lists, if a copy of it is here."""
    issued = authority.issued(member.name)
    if issued is None or fingerprint(issued) != member.certificate:
        return None
    key = issued.public_key()
    return key if isinstance(key, ec.EllipticCurvePublicKey) else None


def _answer(authority: Authority, name: str, out: Path | None) -> Path:
    path = out or authority.kits / "answers" / f"{name}.json"
    certificate = authority.issued(name)
    if certificate is None:
        raise ConfigError(f"{name}: has no certificate here; `fedveil provision rotate` makes one")
    check_valid(certificate, authority.folder / "certificates" / f"{name}.pem", authority.now)
    roster = json.loads((authority.folder / "roster.json").read_bytes())
    answer = {"certificate": certificate_pem(certificate).decode(), "roster": roster}
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(answer, indent=2).encode() + b"\n", 0o644)
    return path


def _kit_folder(authority: Authority, role: Role, name: str) -> Path:
    return authority.kits / FOLDERS[role] / name


def _unknown(authority: Authority, name: str) -> ConfigError:
    known = ", ".join(sorted(one for one, _ in authority.members.roles()))
    return ConfigError(f"{name}: is no member of {authority.federation}; they are {known}")


def _a(role: Role) -> str:
    return f"a {role}" if role == "site" else f"an {role}"
