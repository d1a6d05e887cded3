"""Handing a run to a federation's server."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .remote import OperatorOption, follow
from .show import Json


def submit(
    config: Annotated[Path, typer.Argument(help="The run, a TOML file.")],
    kit: OperatorOption,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="An option that wins over the file: section.key=value."),
    ] = None,
    *,
    watch: Annotated[bool, typer.Option("--watch", help="Watch it until it ends.")] = False,
    as_json: Json = False,
) -> None:
    """Hand a run to a federation's server, where it waits for its turn."""
    from ..config import load_config, parse_setting
    from ..deployment.kit import open_kit

    opened = open_kit(kit, "operator")
    loaded = load_config(config, dict(parse_setting(text) for text in settings or []))
    from ..api import resolve
    from ..data_prep.schema import schema_to_json
    from ..deployment.control import ControlClient

    resolved, schema = resolve(loaded)
    # What is of this machine stays here; where it runs is for the server to refuse.
    shared = resolved.shared().model_copy(update={"federation": resolved.federation})
    request = {
        "config": shared.model_dump(mode="json", by_alias=True, exclude_none=True),
        "schema": json.loads(schema_to_json(schema)),
    }
    with ControlClient(opened) as client:
        # The first one after its start waits until the server has loaded what prices a run.
        answer = client.call("submit", request, deadline=180.0)
    run_id, receipt = answer["run"], answer["receipt"]
    if as_json and not watch:
        typer.echo(json.dumps(answer))
    else:
        place = answer["position"]  # none if it was taken up at once
        turn = f"place {place} in the queue" if place else "its turn has come"
        typer.echo(
            f"run {run_id}: submitted, {turn}; receipt {receipt['entry']}:{receipt['hash']}",
            err=watch,
        )
    if watch:
        follow(opened, run_id, as_json=as_json)
