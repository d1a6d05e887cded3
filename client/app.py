"""The Flower ClientApp: it unpacks, checks the budget, computes, replies. Handlers only."""

import hashlib
import logging
import threading
from collections.abc import Callable
from functools import lru_cache

from polars.exceptions import PanicException
from pydantic import ValidationError

from ..config import FedveilError, RunConfig
from ..data_prep.schema import Schema, schema_from_json
from ..flower import ClientApp, ConfigRecord, Context, Message, RecordDict
from ..models import Batch, family
from ..models.state import Arrays, load_arrays
from ..privacy.plan import Plan, plan
from ..wire import TRAIN, Refusal, Refused, Task, Update, WireError, pack, read_task
from .site import Site, no_records
from .training import train

# A panic of polars is no Exception, and may be as data-dependent as any.
_FAILURES = (Exception, PanicException)

log = logging.getLogger(__name__)


def client_app(open_site: Callable[[Context], Site]) -> ClientApp:
    """The app of every site; `open_site` finds the site that a context is for."""
    app, lock = ClientApp(), threading.Lock()

    @app.train(TRAIN.partition(".")[2])
    def step(message: Message, context: Context) -> Message:
        return Message(pack(_answer(message, context, open_site, lock)), reply_to=message)

    return app


def _answer(
    message: Message, context: Context, open_site: Callable[[Context], Site], lock: threading.Lock
) -> Update | Refused:
    try:
        task = read_task(message.content)
    except WireError as error:
        log.error("refused a message: %s", error)
        return Refused("", 0, Refusal.CONFIGURATION)
    try:
        config, schema, priced = _understand(task.config, task.schema)
    except (FedveilError, ValidationError) as error:
        log.error("refused run %s: %s", task.run_id, error)
        return Refused(task.run_id, task.round, Refusal.CONFIGURATION)
    with lock:  # two copies of one message must not both be answered
        refusal = _debit(context.state, task, priced)
    if refusal is not None:
        return Refused(task.run_id, task.round, refusal)
    try:
        arrays = _work(task, config, schema, priced, open_site(context))
    except _FAILURES:  # it fails without any record too, and says no more than that
        log.exception("run %s, round %d failed", task.run_id, task.round)
        return Refused(task.run_id, task.round, Refusal.FAILED)
    return Update(task.run_id, task.round, arrays)


def _work(task: Task, config: RunConfig, schema: Schema, priced: Plan, site: Site) -> Arrays:
    """The site's part of a round; without its records if they make it fail.

    Whether records make a site fail is itself private. So it then sends what it would send if it
    had none, zeros or noise, and the cause stays in its own log. That hides the failure, not the
    one record that may have caused it: the claim assumes that no single record can, which reading,
    cleaning and clipping see to, each of them record by record.
    """

    def part(records: Callable[[], Batch]) -> Arrays:
        module = family(config.model.family).build(config.model, schema)
        load_arrays(module, task.arrays)
        return train(module, records(), config, priced, site.coins)

    try:
        return part(lambda: site.records(config, schema).training)
    except _FAILURES:
        log.exception("%s: round %d: goes on without records", site.name, task.round)
        arrays = part(lambda: no_records(schema))
        site.failed = True  # now it is known that its records were the cause
        return arrays


@lru_cache(maxsize=4)
def _understand(config_json: str, schema_json: str) -> tuple[RunConfig, Schema, Plan]:
    """Reads the run and prices it by the site's own code; whatever the server says it costs."""
    config = RunConfig.model_validate_json(config_json)
    return config, schema_from_json(schema_json), plan(config)


def _debit(state: RecordDict, task: Task, priced: Plan) -> Refusal | None:
    """Counts a round before data is read: each is answered once, and none beyond the plan.

    A run is bound to the configuration and schema of its first message, and so to one price.
    The count lives as long as the context; the durable ledger comes on top.
    """
    terms = hashlib.sha256(f"{task.config}\0{task.schema}".encode()).hexdigest()
    spent = state.get(task.run_id, ConfigRecord({"round": 0, "terms": terms}))
    if not isinstance(spent, ConfigRecord) or spent["terms"] != terms:
        return Refusal.CONFIGURATION
    last = spent["round"]
    if not isinstance(last, int) or not last < task.round <= priced.rounds:
        return Refusal.BUDGET
    state[task.run_id] = ConfigRecord({"round": task.round, "terms": terms})
    return None
