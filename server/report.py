"""The HTML report of a run: what was promised, what was spent, what came of it.

One file without scripts, which asks for nothing over a network. All that it says comes from the run
folder's accounted parts; everything is escaped, for a schema or a reason may hold any text.
"""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..config import FedveilError, not_below, small_not_below
from ..data_prep.schema import Schema
from .bars import Histogram
from .charts import Chart
from .description_charts import Federation, federation
from .exhibits import Figure, attendance, epsilon_chart, figure, marginals, quality_charts
from .history import History, history, spans
from .store import Checkpoint, Event

if TYPE_CHECKING:
    import numpy as np

GENERATOR = "fedveil report"
"""What every report says that it is."""


@dataclass(frozen=True)
class Sources:
    """What a report is made of; `None` is what the run folder does not hold.

    Attributes:
        folder: The run folder, as the reader knows it.
        events: The lines of `events.jsonl`.
        config: The resolved configuration, as TOML and as plain values.
        environment: Versions, and when the run was begun.
        schema: What a record is.
        metrics: What a finished run says of itself.
        point: The last whole state.
        synthetic: One-way histograms of the released model's records, joined.
        samples: A picture of synthetic images, PNG.
        texts: Some synthetic texts.
        statistics: What `description.describe` said, with the `epsilon` and the `unit` of it.
    """

    folder: str
    events: Sequence[Event]
    config: tuple[str, Mapping[str, Any]] | None = None
    environment: Mapping[str, Any] | None = None
    schema: Schema | None = None
    metrics: Mapping[str, Any] | None = None
    point: Checkpoint | None = None
    synthetic: "np.ndarray | None" = None
    samples: bytes | None = None
    texts: tuple[str, ...] = ()
    statistics: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Account:
    """What one side of the records was promised and is charged."""

    name: str
    limit: float | None
    charged: float | None
    releases: str
    noise: float
    rate: float


@dataclass(frozen=True)
class Facts:
    """What the template says.

    Attributes:
        name: The run's.
        folder: See `Sources`.
        status: Finished, failed, interrupted or unfinished.
        history: The run by its events.
        done: Rounds that were stored.
        begun: When, if it was noted.
        family: Of the model.
        privacy: What the run was priced as, and what is not claimed.
        accounts: Of the training and the held-out records; none without a mechanism.
        federation: Its data, by noisy statistics.
        charts: Epsilon and quality by round.
        figures: Of the last evaluation.
        marginals: Of every column.
        counted: How many held-out records the real shares are of, by their noised counts.
        picture: A data URI of synthetic images, or nothing.
        texts: See `Sources`.
        excess: Least and most noise in a round's sum over the accounted one, where it is shared.
        attendance: Usable replies by round.
        absences: Site, reason, how many rounds, which.
        heads: Count and head hash of each site's ledger.
        seconds: The server's time: part, seconds, share of the total.
        total: All of it.
        config: The resolved TOML.
        environment: See `Sources`.
        schema: See `Sources`.
    """

    name: str
    folder: str
    status: str
    history: History
    done: int
    begun: str
    family: str
    privacy: Mapping[str, Any]
    accounts: tuple[Account, ...]
    federation: Federation | None
    charts: tuple[Chart, ...]
    figures: tuple[Figure, ...]
    marginals: tuple[Histogram, ...]
    counted: float
    picture: str
    texts: tuple[str, ...]
    excess: tuple[float, float] | None
    attendance: Chart | None
    absences: tuple[tuple[int, str, int, str], ...]
    heads: Mapping[str, tuple[int, str]]
    seconds: tuple[tuple[str, float, float], ...]
    total: float
    config: str
    environment: Mapping[str, Any]
    schema: Schema | None


def render(sources: Sources) -> str:
    """The report as one HTML page.

    Raises:
        FedveilError: The run folder's files are whole, but none of ours.
    """
    try:
        found = gathered(sources)
        page = _templates().get_template("report.html.j2")
        return page.render(
            facts=found, generator=GENERATOR, not_private=found.privacy["epsilon"] is None
        )
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise FedveilError(
            f"{sources.folder}: events.jsonl, metrics.json or statistics.json is damaged "
            f"({error}); put a whole copy back"
        ) from None


def gathered(sources: Sources) -> Facts:
    """What there is to say of a run.

    Raises:
        LookupError, TypeError, ValueError: The sources are none of ours.
    """
    told, finished = history(sources.events), sources.metrics or {}
    config = sources.config[1] if sources.config else {}
    privacy = {"not_claimed": [], **told.privacy, **finished.get("privacy", {})}
    quality = finished.get("quality") or (list(told.evaluations.values()) or [{}])[-1]
    known = sources.point.evaluated if sources.point else None
    columns, counted = marginals(sources.schema, known, sources.synthetic, privacy)
    seconds, total = _seconds(sources, told)
    return Facts(
        name=str(config.get("federation", {}).get("name", sources.folder)),
        folder=sources.folder,
        status=_status(told, finished=sources.metrics is not None),
        history=told,
        done=told.rounds[-1].number if told.rounds else 0,
        begun=_moment((sources.environment or {}).get("begun")),
        family=str(finished.get("family") or config.get("model", {}).get("family", "model")),
        privacy=privacy,
        accounts=_accounts(privacy, config.get("privacy", {})),
        federation=federation(sources.statistics) if sources.statistics else None,
        charts=(*epsilon_chart(told), *quality_charts(told)),
        figures=tuple(figure(name, found) for name, found in quality.items()),
        marginals=columns,
        counted=counted,
        picture=_data_uri(sources.samples),
        texts=sources.texts,
        excess=told.excess,
        attendance=attendance(told),
        absences=tuple((a.site, a.reason, len(a.rounds), spans(a.rounds)) for a in told.absences),
        heads=_heads(sources),
        seconds=seconds,
        total=total,
        config=sources.config[0] if sources.config else "",
        environment=sources.environment or {},
        schema=sources.schema,
    )


def _templates() -> Environment:
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["figure"] = lambda value: "-" if value is None else f"{value:.4g}"
    made.filters["rough"] = lambda value: "-" if value is None else f"{value:.2g}"
    made.filters["fixed"] = lambda value: "-" if value is None else not_below(value)
    made.filters["small"] = small_not_below
    made.filters["factor"] = _factor
    made.filters["pretty"] = lambda value: json.dumps(value, indent=2, ensure_ascii=False)
    return made


def _factor(epsilon: float) -> str:
    """E to the epsilon, to three digits and never rounded down: it is a bound."""
    factor = math.exp(epsilon)
    unit = 10.0 ** (math.floor(math.log10(factor)) - 2)
    return f"{math.ceil(factor / unit) * unit:,.4g}"


def _moment(begun: str | None) -> str:
    return f"{datetime.fromisoformat(begun):%d %B %Y, %H:%M} UTC" if begun else ""


def _status(told: History, *, finished: bool) -> str:
    if finished:
        return "finished"
    if told.ending == "failed":
        return "interrupted" if told.cause == "KeyboardInterrupt" else "failed"
    # The last line may stand there before the last file does.
    return "unfinished"


def _accounts(privacy: Mapping[str, Any], limits: Mapping[str, Any]) -> tuple[Account, ...]:
    """Both accounts; a run of before there were two has one."""
    if privacy["epsilon"] is None:
        return ()
    per_round, rounds = privacy["releases_per_round"], privacy["rounds"]
    whole = privacy.get("unit") == "site"
    training = Account(
        "training and evaluation" if whole else "training",
        limits.get("epsilon", privacy["target_epsilon"]),
        privacy.get("training_epsilon", privacy["epsilon"]),
        f"{rounds} rounds, {per_round} release{'s' if per_round > 1 else ''} each",
        privacy["noise_multiplier"],
        1.0 if whole else privacy["sampling_rate"],
    )
    if whole or not privacy.get("evaluations"):
        return (training,)
    holdout = Account(
        "hold-out",
        limits.get("epsilon_holdout", privacy["target_epsilon"]),
        privacy["holdout_epsilon"],
        f"{privacy['evaluations']} evaluations",
        privacy["evaluation_noise"],
        1.0,
    )
    return training, holdout


def _data_uri(picture: bytes | None) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}" if picture else ""


def _heads(sources: Sources) -> Mapping[str, tuple[int, str]]:
    if sources.metrics is not None:
        found = sources.metrics.get("ledgers", {})
        return {site: (head["count"], head["head"]) for site, head in found.items()}
    known = sources.point.ledgers if sources.point else {}
    return {str(site): head for site, head in known.items()}


def _seconds(sources: Sources, told: History) -> tuple[tuple[tuple[str, float, float], ...], float]:
    """Parts of the server's time with their shares; what no round names is the rest."""
    parts = told.seconds
    total = sum(parts.values())
    known = sources.metrics["seconds"]["total"] if sources.metrics else None
    if known is None and sources.point is not None:
        known = sources.point.seconds
    if known is not None and known > total:
        parts["everything else"] = known - total
        total = known
    return tuple((name, part, part / total) for name, part in parts.items() if part), total
