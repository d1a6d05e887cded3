"""How figures, promises and progress are shown, and the options that commands share."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import not_below, small_not_below

if TYPE_CHECKING:
    from rich.console import Console

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def plus_minus(found: dict[str, float]) -> str:
    """An accounted figure with its noise, or with its floor where it has one."""
    # Noise pulls a total variation towards its floor, so that its spread alone would mislead.
    if "floor" in found:
        return f"{found['value']:.4f} (floor {found['floor']:.4f})"
    return f"{found['value']:.4f} +- {found['noise']:.4f}"


def promise(privacy: dict[str, Any]) -> str:
    """What was promised and spent, on one line."""
    if privacy["epsilon"] is None:
        return "NONE: THIS RUN IS NOT PRIVATE"
    return (
        f"epsilon {not_below(privacy['epsilon'])} of {privacy['target_epsilon']:g}, "
        f"delta {small_not_below(privacy['delta'])}, mechanism {privacy['mechanism']}, "
        f"accountant {privacy['accountant']}"
    )


def figure(value: Any) -> str:  # noqa: ANN401
    """A plain value as people read it."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {figure(part)}" for key, part in value.items())
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _lines(event: dict[str, Any]) -> Iterator[str]:
    """What an event has to say in words."""
    kind = event["event"]
    if kind == "refused":
        for one in event["refused"]:
            yield f"site {one['site']} will refuse: {one['reason']}"
    if kind == "statistics":
        what = "noisy cells" if event["epsilon"] is not None else "exact cells, NOT PRIVATE,"
        yield f"statistics: {event['cells']:,} {what} of {event['sites']} sites"
    if kind == "prepared":
        yield f"made a model of the statistics in {event['seconds']['server']:.1f} s"
    if kind in {"statistics", "round"}:
        what = f"round {event['round']}" if kind == "round" else "statistics"
        for how, sites in (("dropped", event["dropped"]), ("left", event.get("left", []))):
            for one in sites:
                yield f"{what}: site {one['site']} {how}: {one['reason']}"


def _print_resumed(event: dict[str, Any], console: "Console") -> None:
    for fault in event["damaged"]:
        console.print(f"{fault}; went back to the checkpoint before", markup=False, soft_wrap=True)
    lost = ", ".join(map(str, event["lost"]))
    told = f"; round {lost} was cut off and counts as spent" if lost else ""
    told += "; the statistics were cut off and count as spent" * event["lost_statistics"]
    console.print(f"resumed after round {event['round']}{told}", markup=False, soft_wrap=True)


@contextmanager
def progress() -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar on stderr: round, epsilon spent of target, time left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("round {task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[spent]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=None, start=False, spent="", visible=False)
        target, loss = None, ""

        def observe(event: dict[str, Any]) -> None:
            nonlocal target, loss
            if event["event"] in {"run", "resumed"}:
                target = event["privacy"]["target_epsilon"]
                bar.start_task(task)
                rounds = event["privacy"]["rounds"]
                bar.update(task, total=rounds, visible=rounds > 0)
                if event["event"] == "resumed":
                    _print_resumed(event, console)
                    bar.update(task, completed=event["round"] + len(event["lost"]))
            elif event["event"] == "evaluated":
                loss = f", loss {event['loss']:.2f}"
            elif event["event"] == "round":
                spent = (
                    "NOT PRIVATE"
                    if target is None
                    else f"epsilon {not_below(event['epsilon'], 2)}/{target:g}"
                )
                bar.update(task, completed=event["round"], spent=f"{spent}{loss}")
            for line in _lines(event):
                console.print(line, markup=False, soft_wrap=True)

        yield observe
