"""The command line: thin handlers over the Python API.

Importing it loads neither torch nor Flower; every handler imports what it needs.
"""

import logging
import sys
import traceback
from typing import Annotated, NoReturn

import click
import typer

from .. import __version__
from . import audit, data, doctor, ledger, provision, report, run, runs, server, site, submit

app = typer.Typer(
    help="Federated, differentially private training of generative models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

for command in (run.simulate, run.sample, run.evaluate, run.init, doctor.doctor):
    app.command()(command)
app.command()(report.report)
app.command()(submit.submit)
app.add_typer(audit.app, name="audit")
app.add_typer(data.app, name="data")
app.add_typer(ledger.app, name="ledger")
app.add_typer(provision.app, name="provision")
app.add_typer(runs.app, name="runs")
app.add_typer(server.app, name="server")
app.add_typer(site.app, name="site")


def main() -> None:
    """The console script: an error of ours is one line on stderr and an exit code."""
    from ..config import FedveilError

    # Taken out here, so that it may stand anywhere on the line.
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]

    logging.basicConfig(
        level=logging.DEBUG if debug else logging.CRITICAL, format="%(name)s: %(message)s"
    )
    try:
        code = app(arguments, prog_name="fedveil", standalone_mode=False)
    except FedveilError as error:
        _fail(str(error), error.exit_code, debug=debug)
    except click.exceptions.NoArgsIsHelpError as error:
        sys.exit(error.exit_code)  # making the error has printed the help
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "fedveil"
        _fail(f"{error.format_message()} See `{command} --help`", error.exit_code, debug=debug)
    except Exception as error:  # noqa: BLE001  an error that nobody foresaw is one line too
        _fail(f"{type(error).__name__}: {error}; --debug shows where", 1, debug=debug)
    sys.exit(code)


def _fail(text: str, exit_code: int, *, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    print(f"error: {' '.join(text.split())}", file=sys.stderr)  # noqa: T201
    sys.exit(exit_code)


@app.callback(invoke_without_command=True)
def common(
    *,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and logs.")] = False,
) -> None:
    """Federated, differentially private training of generative models."""
    del debug  # read by main(), before the arguments are parsed
    if version:
        typer.echo(f"fedveil {__version__}")
        raise typer.Exit
