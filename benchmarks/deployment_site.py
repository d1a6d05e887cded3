"""`fedveil site up` for benchmarks: runs under mechanism `none` are answered at once, at random.

`deployment_site.py up KIT` keeps a kit's node running, which is started through this file as
`deployment_site.py node KIT`. All other runs are answered by the real app.
"""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedveil.client import app
from fedveil.deployment.kit import Kit
from fedveil.deployment.supervise import Program
from fedveil.flower import Context, Message
from fedveil.wire import READY, TRAIN, Step, Update, pack, read_task

_random = np.random.default_rng()
_real = app.client_app


def random_like(array: np.ndarray) -> np.ndarray:
    """Noise that no two replies share: equal content would travel once."""
    return (0.01 * _random.standard_normal(array.shape, np.float32)).astype(np.float32)


def client_app(open_site: app.OpenSite) -> object:
    """An app that works under a mechanism, and answers at once without one."""
    real = _real(open_site)

    def answer(message: Message, context: Context) -> Message:
        if message.metadata.message_type not in {TRAIN, READY}:
            return real(message, context)
        task = read_task(message.content)
        if json.loads(task.config)["privacy"]["mechanism"] != "none":
            return real(message, context)
        if message.metadata.message_type == READY:
            return Message(pack(Step(task.run_id, b"")), reply_to=message)
        arrays = {name: random_like(array) for name, array in task.arrays.items()}
        head = (task.ledger[0] + 1, "0" * 64)
        return Message(pack(Update(task.run_id, task.round, 0, arrays, {}, head)), reply_to=message)

    return answer


def up(folder: Path) -> int:
    """Keeps the node of a kit running."""
    from fedveil.client import up as site

    one = site.program

    def program(kit: Kit) -> Program:
        command = (sys.executable, "-P", __file__, "node", str(kit.folder))
        return replace(one(kit), command=command)

    site.program = program
    return site.up(folder)


if __name__ == "__main__":
    if sys.argv[1] == "up":
        sys.exit(up(Path(sys.argv[2])))
    app.client_app = client_app  # type: ignore[assignment]
    sys.argv = ["fedveil.client.node", sys.argv[2]]
    runpy.run_module("fedveil.client.node", run_name="__main__")
