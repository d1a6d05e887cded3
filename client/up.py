"""`fedveil site up`: keeps a site's node running."""

import logging
import sys
from pathlib import Path

from ..deployment.kit import Kit, open_kit
from ..deployment.running import held, keep_running
from ..deployment.supervise import Program


def up(kit_folder: Path, *, level: int = logging.INFO) -> int:
    """Keeps a site's node running until it is told to stop. It listens at no port.

    Args:
        kit_folder: The site's kit.
        level: The least that is logged.

    Returns:
        0 if it was told to stop, 2 if the node finds its kit unusable.

    Raises:
        ConfigError: It is no site's kit, or it is up already.
    """
    kit = open_kit(kit_folder, "site")
    with held(kit):
        return keep_running(kit, [program(kit)], level)


def program(kit: Kit) -> Program:
    """The site's one program."""
    # -P: what lies where it is started must not stand in for an installed package.
    module = f"{__package__}.node"
    return Program("node", (sys.executable, "-P", "-m", module, str(kit.folder)))
