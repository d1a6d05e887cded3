"""A federation's authority: make kits, sign requests, add, rotate and revoke members."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .show import Json

app = typer.Typer(
    help="Kits of a federation, for its authority: make, sign, add, rotate, revoke.",
    no_args_is_help=True,
)


class MemberRole(StrEnum):
    """What a member may be."""

    SITE = "site"
    OPERATOR = "operator"
    AUDITOR = "auditor"


Kits = Annotated[Path, typer.Argument(help="The folder that `provision create` made.")]
Name = Annotated[str, typer.Argument(help="The member's name.")]
Expect = Annotated[
    str | None,
    typer.Option(help="Fingerprint that the site read out; another one is refused."),
]


@app.command()
def create(
    federation: Annotated[Path, typer.Argument(help="FEDERATION.toml.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder to make.")],
    *,
    as_json: Json = False,
) -> None:
    """Make the authority, and a kit for the server and for each member."""
    from ..deployment.authority import FOLDERS
    from ..deployment.provision import create as make

    kits = make(federation, out)
    made = [kits / "server"]
    for owner in FOLDERS.values():
        made += sorted((kits / owner).iterdir())
    facts = {"authority": str(kits / "authority"), "kits": [str(kit) for kit in made]}
    _tell(
        facts,
        [f"{kit}: README.md there says what to do with it" for kit in made]
        + [f"{kits / 'authority'}: keep it to yourself, on no machine that others reach"],
        as_json=as_json,
    )


@app.command()
def sign(
    kits: Kits,
    request: Annotated[Path, typer.Argument(help="A site's request.json.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Default: KITS/answers/NAME.json.")
    ] = None,
    expect: Expect = None,
    *,
    as_json: Json = False,
) -> None:
    """Take a site into the roster by its request, and write the answer to it."""
    from ..deployment.provision import sign as sign_request

    answer = sign_request(kits, request, out, expect=expect)
    _tell_answer(kits, request, answer, as_json=as_json, expected=expect is not None)


@app.command()
def add(
    kits: Kits,
    name: Name,
    role: Annotated[MemberRole, typer.Option(help="What it is to be.")],
    *,
    as_json: Json = False,
) -> None:
    """Make the kit of a new member."""
    from ..deployment.provision import add as add_member

    kit = add_member(kits, name, role.value)
    facts = {"name": name, "role": role.value, "kit": str(kit), "version": _version(kits)}
    _tell(
        facts, [f"{kit}: README.md there says what to do with it", _spread(kits)], as_json=as_json
    )


@app.command()
def rotate(
    kits: Kits,
    name: Annotated[str, typer.Argument(help="A member's name, or `server`.")],
    request: Annotated[Path | None, typer.Option(help="A site's new request.json.")] = None,
    expect: Expect = None,
    *,
    as_json: Json = False,
) -> None:
    """Give a member new keys and a new certificate, or the server a new TLS certificate."""
    from ..deployment.provision import rotate as rotate_member

    made = rotate_member(kits, name, request, expect=expect)
    if request is not None:
        _tell_answer(kits, request, made, as_json=as_json, expected=expect is not None)
        return
    facts = {"name": name, "kit": str(made), "version": _version(kits)}
    _tell(facts, [f"{made}: has a new key and a new certificate", _spread(kits)], as_json=as_json)


@app.command()
def revoke(kits: Kits, name: Name, *, as_json: Json = False) -> None:
    """Take a member out of the roster; it is refused from then on."""
    from ..deployment.provision import revoke as revoke_member

    roster = revoke_member(kits, name)
    facts = {"name": name, "version": roster.version}
    _tell(facts, [f"{name}: is no member any more", _spread(kits)], as_json=as_json)


def _tell_answer(kits: Path, request: Path, answer: Path, *, as_json: bool, expected: bool) -> None:
    from ..deployment.request import read_request

    asked = read_request(request)
    facts = {
        "name": asked.name,
        "answer": str(answer),
        "fingerprint": asked.fingerprint,
        "version": _version(kits),
    }
    lines = [f"{asked.name}: signed; the request's fingerprint is {asked.fingerprint}"]
    if not expected:
        lines.append(
            "compare it with the site by telephone; if theirs is another, "
            f"`fedveil provision revoke {kits} {asked.name}`"
        )
    _tell(facts, [*lines, f"{answer}: send it to the site", _spread(kits)], as_json=as_json)


def _version(kits: Path) -> int:
    found = json.loads((kits / "authority" / "roster.json").read_bytes())
    return int(found["roster"]["version"])


def _spread(kits: Path) -> str:
    roster = kits / "authority" / "roster.json"
    return (
        f"{roster}: version {_version(kits)}; put it into the server's kit where that is elsewhere"
    )


def _tell(facts: dict[str, Any], lines: list[str], *, as_json: bool) -> None:
    typer.echo(json.dumps(facts) if as_json else "\n".join(lines))
