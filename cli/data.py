"""From a site's own file to a declared schema and clean records: schema, check, clean."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .show import Json

if TYPE_CHECKING:
    from ..config import RunConfig
    from ..data_prep.findings import Checked, Finding
    from ..data_prep.schema import Schema

app = typer.Typer(help="Look at data, clean it, draft its schema.", no_args_is_help=True)

DataPath = Annotated[
    str,
    typer.Argument(metavar="FILE", help="A .csv, .tsv, .parquet, .npz, .txt or .jsonl; a folder."),
]
SchemaPath = Annotated[Path, typer.Option("--schema", help="What a record is; may be a draft.")]
RulesPath = Annotated[
    Path | None, typer.Option("--config", help="A run, for its rules; the defaults without.")
]


@app.command()
def schema(
    data: DataPath,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="A new file; stdout without.")
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="The column that generation is conditional on.")
    ] = None,
    *,
    as_json: Json = False,
) -> None:
    """Draft a schema for you to confirm; runs refuse it until you have."""
    from ..data_prep.cleaned import refuse_old
    from ..data_prep.draft import draft_schema, open_marks

    if out is not None:
        refuse_old(out)
    with _data_named():
        draft = draft_schema(data, label)
    if out is not None:
        _write_new(out, draft.text)
    facts = {
        "file": None if out is None else str(out),
        "schema": draft.text,
        "unconfirmed": open_marks(draft.schema),
        "left_out": draft.left_out,
        "keys": list(draft.keys),
        "notes": list(draft.notes),
        "private": open_marks(draft.schema) > 0,
    }
    if as_json:
        typer.echo(json.dumps(facts))
    elif out is None:
        typer.echo(draft.text, nl=False)
    for note in draft.notes:
        typer.echo(f"note: {note}", err=True)
    for name, why in draft.left_out.items():
        typer.echo(f"left out: column {name!a}: {why}", err=True)
    if not facts["unconfirmed"]:
        typer.echo(f"{out or 'this'}: nothing in it was read off the data", err=True)
        return
    typer.echo(
        f"{out or 'this'} is a draft, as private as the data: {facts['unconfirmed']} options are "
        "unconfirmed, and runs refuse it until those marks are gone",
        err=True,
    )


@app.command()
def check(
    data: DataPath, schema: SchemaPath, config: RulesPath = None, *, as_json: Json = False
) -> None:
    """What cleaning would do to data, and how to mend it. Quotes the data: stays at the site."""
    from ..config import Clean
    from ..data_prep.clean import DataError
    from ..data_prep.findings import check as check_data
    from ..data_prep.findings import records_note

    run, declared = _run(config), _schema(schema, data)
    with _data_named():
        found = check_data(data, declared, run.clean if run else Clean())
    kept = found.report.kept
    note = records_note(run, str(Path(data).resolve()), kept) if run else None
    if as_json:
        typer.echo(json.dumps({**found.as_dict(), "note": note, "private": True}))
    else:
        _print_checked(found, data, note)
    if found.refusal is not None:
        raise DataError(found.refusal)


@app.command()
def clean(
    data: DataPath,
    schema: SchemaPath,
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--out", help="A new .csv or .parquet (tables), .npz (images), .jsonl (texts)."
        ),
    ],
    config: RulesPath = None,
    *,
    as_json: Json = False,
) -> None:
    """Write cleaned records and, beside them, a report; both are as private as the data."""
    from ..config import Clean
    from ..data_prep.cleaned import write_cleaned

    run, declared = _run(config), _schema(schema, data)
    with _data_named():
        report = write_cleaned(data, declared, run.clean if run else Clean(), out)
    beside = f"{out}.cleaning.json"
    if as_json:
        facts = {"file": str(out), "report": beside, **report.as_dict(), "private": True}
        typer.echo(json.dumps(facts))
        return
    typer.echo(f"{out}: {report.kept} of {report.records} records; {beside} says what was found")
    typer.echo("Both are as private as the data: they stay at the site")


def _run(config: Path | None) -> "RunConfig | None":
    from ..config import load_config

    return None if config is None else load_config(config)


def _schema(path: Path, data: str) -> "Schema":
    from ..config import ConfigError
    from ..data_prep import held_by
    from ..data_prep.schema import load_schema, marks

    declared = load_schema(path, draft=True)
    held = held_by(data)
    if Path(data).exists() and held != declared.modality:
        raise ConfigError(f"--schema {path}: is for {declared.modality}s; {data} holds {held}s")
    if marks(declared):
        typer.echo(
            f"{path}: is a draft; runs refuse it until its `unconfirmed` lines are gone", err=True
        )
    return declared


@contextmanager
def _data_named() -> Iterator[None]:
    """Errors name the argument in place of the option that a run has for it."""
    from ..data_prep.clean import DataError

    try:
        yield
    except DataError as error:
        raise DataError(str(error).replace("data.source = ", "")) from None


def _write_new(out: Path, text: str) -> None:
    from ..config import ConfigError
    from ..files import create_secret_file

    try:
        create_secret_file(out, text.encode())
    except OSError as error:
        raise ConfigError(
            f"--out {out}: cannot be written ({error.strerror}); choose another folder"
        ) from None


def _print_checked(found: "Checked", data: str, note: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 120
    typer.echo(f"{data}: what cleaning would do. This quotes the data: it stays at the site")
    if found.findings:
        table = Table("column", "found", "times", "such as", "and then")
        for finding in found.findings:
            table.add_row(*_cells(finding))
        console.print(table)
    for finding in found.findings:
        if finding.mend:
            typer.echo(f"{_place(finding)}{finding.what}: {finding.mend}")
    if note is not None:
        typer.echo(note)
    report = found.report
    if found.refusal is None:
        dropped = report.records - report.kept
        typer.echo(f"USABLE: {report.kept} of {report.records} records, {dropped} dropped")
    else:
        typer.echo(f"NOT USABLE: {report.kept} of {report.records} records would be kept")


def _place(finding: "Finding") -> str:
    from ..data_prep.words import quoted

    return "" if finding.column is None else f"column {quoted(finding.column)}: "


def _cells(finding: "Finding") -> list[Any]:
    from rich.text import Text

    from ..data_prep.words import shown

    name = "(records)" if finding.column is None else shown(finding.column)[1:-1]
    examples = ", ".join(shown(example) for example in finding.examples)
    cells = (name, finding.what, str(finding.count), examples, finding.becomes)
    return [Text(cell) for cell in cells]
