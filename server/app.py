"""The Flower ServerApp: it reads its run configuration and runs the round loop."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..config import ConfigError, RunConfig
from ..data_prep.schema import schema_from_json
from ..flower import Context, Grid, ServerApp
from .coordinator import Coordinator, coordinator
from .rounds import Observer, Prepare, at_once, train
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


@dataclass(frozen=True)
class Setting:
    """Where a run takes place; the defaults are a simulation's.

    Attributes:
        watch: Gives the observer of the run in a folder.
        roster: Says which node each site is, by the site's number: numbers stay the same in every
            process that goes on with a run, nodes need not.
        coordinator: Who asks in the run in a folder.
        prepare: Waits until the sites are ready.
    """

    watch: Callable[[RunFolder], Observer] = unwatched
    roster: Callable[[Grid, RunConfig], Mapping[int, int]] = by_node
    coordinator: Callable[[Path], Coordinator] = coordinator
    prepare: Prepare = at_once


def server_app(setting: Setting = Setting()) -> ServerApp:
    """The app of the coordinator.

    Its run configuration has `config` and `schema` (JSON), `run-id` and `folder`.
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
            setting.roster(grid, config),
            config,
            schema_from_json(values["schema"]),
            values["run-id"],
            RunFolder(folder),
            setting.watch(RunFolder(folder)),
            setting.coordinator(folder),
            setting.prepare,
        )

    return app
