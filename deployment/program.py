"""What every program of a kit does first and last: `python -m MODULE KIT`."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path

from ..config import ConfigError, FedveilError
from .logs import configure, level_asked

_logger = logging.getLogger(__name__)


def run_program(name: str, serve: Callable[[Path], None]) -> None:
    """Runs a program on the kit that the command line names; its errors are one line each.

    Ends the process with the error's exit code: 2 of a wrong call or file, which its supervisor
    does not try again, 1 of anything else.

    Args:
        name: What its logs call it.
        serve: The program; takes the kit's folder.
    """
    configure(name)
    try:
        if len(sys.argv) != 2:
            raise ConfigError(f"{name}: takes one argument, the folder of the kit")
        serve(Path(sys.argv[1]))
    except FedveilError as error:
        shown = level_asked() <= logging.DEBUG
        _logger.critical("%s", error, exc_info=shown)
        sys.exit(error.exit_code)
