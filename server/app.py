"""The Flower ServerApp: it reads its run configuration and runs the round loop."""

from pathlib import Path

from ..config import ConfigError, RunConfig
from ..data_prep.schema import schema_from_json
from ..flower import Context, Grid, ServerApp
from .rounds import Observer, train
from .store import Event, RunFolder


def ignore(event: Event) -> None:
    """Watches nothing; `events.jsonl` has it all."""
    del event


def server_app(observe: Observer = ignore) -> ServerApp:
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
        train(
            grid,
            RunConfig.model_validate_json(values["config"]),
            schema_from_json(values["schema"]),
            values["run-id"],
            RunFolder(Path(values["folder"])),
            observe,
        )

    return app
