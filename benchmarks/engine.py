"""What the simulation's transport costs: a round of a trivial app, beside a plain loop over it."""

import copy
from functools import partial

import numpy as np
from harness import interleaved, start

from fedveil.flower import ClientApp, Context, Message, RecordDict, set_identity
from fedveil.server.simulation.local import LocalGrid, local_grid
from fedveil.wire import NO_LEDGER, TRAIN, Task, Update, pack, read_reply, read_task


def main() -> None:
    """Milliseconds a round by number of sites, and the ratio to a loop without a grid."""
    report = start(__doc__ or "")
    app = ClientApp()

    @app.train("step")
    def step(message: Message, context: Context) -> Message:
        del context
        task = read_task(message.content)
        update = Update(task.run_id, task.round, 0, task.arrays, {}, (1, "0" * 64))
        return Message(pack(update), reply_to=message)

    arrays = {"weights": np.ones(20_000, dtype=np.float32)}
    content = pack(Task("run", 1, 0, "{}", "{}", arrays, {}, {}, NO_LEDGER))
    for sites in (2, 10) if report.quick else (2, 10, 100):
        nodes = list(range(1, sites + 1))
        set_identity(1, 0)
        with local_grid(app, nodes, 1) as grid:
            seconds = interleaved(
                {
                    "grid": partial(_round, grid, content),
                    "loop": partial(_loop, app, nodes, content),
                },
                repeats=30,
            )
        for name, value in seconds.items():
            report.add(f"{name}_ms_{sites}_sites", 1e3 * value, "ms a round")
        report.add(f"grid_over_loop_{sites}_sites", seconds["grid"] / seconds["loop"])
    report.finish()


def _round(grid: LocalGrid, content: RecordDict) -> None:
    messages = [Message(content, node, TRAIN) for node in grid.get_node_ids()]
    for reply in grid.send_and_receive(messages):
        read_reply(reply)


def _loop(app: ClientApp, nodes: list[int], content: RecordDict) -> None:
    for node in nodes:
        message = copy.deepcopy(Message(content, node, TRAIN))
        read_reply(app(message, Context(1, node, {}, RecordDict(), {})))


if __name__ == "__main__":
    main()
