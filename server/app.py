"""The Flower ServerApp: it reads its run configuration and runs the round loop."""

from collections.abc import Callable, Mapping
from pathlib import Path

from ..config import ConfigError, RunConfig
from ..data_prep.schema import schema_from_json
from ..flower import Context, Grid, ServerApp
from .rounds import Observer, train
from .store import Event, RunFolder


def ignore(event: Event) -> None:
    """Watches nothing; `events.jsonl` has it all."""
    del event


def unwatched(folder: RunFolder) -> Observer:
    """Nobody watches the run in this folder."""
    del folder
    return ignore


def by_node(grid: Grid, config: RunConfig) -> Mapping[int, int]:
    """The roster of a grid whose nodes are numbered as the sites are."""
    del config
    return {node: node for node in sorted(grid.get_node_ids())}


def server_app(
    watch: Callable[[RunFolder], Observer] = unwatched,
    roster: Callable[[Grid, RunConfig], Mapping[int, int]] = by_node,
) -> ServerApp:
    """The app of the coordinator.

    Its run configuration has `config` and `schema` (JSON), `run-id` and `folder`.

    Args:
        watch: Gives the observer of the run in a folder.
        roster: Says which node each site is, by the site's number: numbers stay the same in every
            process that goes on with a run, nodes need not.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        values = {}
        for key in ("config", "schema", "run-id", "folder"):
            value = context.run_config.get(key)
            if not isinstance(value, str):
                raise ConfigError(f"run configuration: {key}: missing")
            values[key] = value
        config, folder = RunConfig.model_validate_json(values["config"]), Path(values["folder"])
        train(
            grid,
            roster(grid, config),
            config,
            schema_from_json(values["schema"]),
            values["run-id"],
            RunFolder(folder),
            watch(RunFolder(folder)),
        )

    return app
