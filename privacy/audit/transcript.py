"""Whether a run's transcript is there, is this run's, holds, and agrees with the folder."""

from typing import Any

from ...config import ConfigError
from ...run import Run
from ...server.collect import IDENTITIES
from ...server.history import history
from ...server.transcript import NAME
from ...wire import site_name
from ..secagg.errors import SecAggError
from ..secagg.pins import read_identities
from ..secagg.transcript import Verdict, verify_transcript


def audit_transcript(run: Run) -> dict[str, Any] | None:
    """Verifies what the sites signed in a run's secure sums, and holds it against the run.

    Returns:
        `verdict`, `failed` (why, if it is violated) and how many `sums` were released; `None` if
        the run made no secure sums.

    Raises:
        FedveilError: The run folder is damaged.
    """
    if run.config.encryption != "secagg":
        return None
    path = run.path / NAME
    try:
        pinned = read_identities(run.path / IDENTITIES)
        found = verify_transcript(path.read_bytes(), pinned)
    except OSError as error:
        return _violated(f"{NAME}: cannot be read ({error.strerror})")
    except (SecAggError, ConfigError) as error:
        return _violated(f"{NAME}: {error}")
    faults = _faults(run, found)
    sums = sum(one.released is not None for one in found.rounds)
    verdict = "violated" if faults else "consistent"
    return {"verdict": verdict, "failed": faults, "sums": sums}


def _violated(why: str) -> dict[str, Any]:
    return {"verdict": "violated", "failed": [why], "sums": 0}


def _faults(run: Run, found: Verdict) -> list[str]:
    """Where the transcript says otherwise than the run's events and metrics."""
    run_id, faults = run.metrics["run_id"], []
    if found.run != run_id:
        faults.append(f"{NAME}: is of run {found.run}, not of {run_id}")
    rounds = len(history(list(run.events())).rounds)
    sums = sum(one.released is not None for one in found.rounds)
    if sums < rounds:
        faults.append(f"{NAME}: has {sums} sums, events.jsonl {rounds} rounds")
    for number, head in run.metrics["ledgers"].items():
        name = site_name(int(number))
        count, digest = found.ledgers.get(name, (0, b""))
        if (count, digest.hex()) != (head["count"], head["head"]):
            faults.append(
                f"{NAME}: {name} signed entry {count} of its ledger last, metrics.json has "
                f"{head['count']}"
            )
    return faults
