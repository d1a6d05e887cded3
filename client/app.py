"""The Flower ClientApp: it unpacks, debits the ledger, computes, replies. Handlers only."""

import hashlib
import logging
from collections.abc import Callable, Mapping
from functools import lru_cache

import numpy as np
from polars.exceptions import PanicException
from pydantic import ValidationError
from torch import nn

from ..config import FedveilError, RunConfig
from ..data_prep import check_unit
from ..data_prep.schema import Schema, schema_from_json
from ..flower import ClientApp, Context, Message
from ..models import family
from ..models.metrics import exam_from_arrays
from ..models.state import Arrays, load_arrays
from ..privacy.books import Head
from ..privacy.limits import BudgetError, LedgerError, TermsError
from ..privacy.plan import Plan, plan
from ..wire import EVALUATE, TRAIN, Refusal, Refused, Task, Update, WireError, pack, read_task
from .evaluation import holdout_sums, training_sums
from .site import Records, Site, no_records
from .training import train

# A panic of polars is no Exception, and may be as data-dependent as any.
_FAILURES = (Exception, PanicException)

log = logging.getLogger(__name__)


def client_app(open_site: Callable[[Context], Site]) -> ClientApp:
    """The app of every site; `open_site` finds the site that a context is for."""
    app = ClientApp()

    @app.train(TRAIN.partition(".")[2])
    def step(message: Message, context: Context) -> Message:
        return Message(pack(_answer(message, context, open_site)), reply_to=message)

    @app.evaluate(EVALUATE.partition(".")[2])
    def model(message: Message, context: Context) -> Message:
        return Message(pack(_answer(message, context, open_site)), reply_to=message)

    return app


def terms_of(config_json: str, schema_json: str) -> str:
    """What binds a run to its configuration and schema, and so to one price."""
    return hashlib.sha256(f"{config_json}\0{schema_json}".encode()).hexdigest()


def _answer(
    message: Message, context: Context, open_site: Callable[[Context], Site]
) -> Update | Refused:
    try:
        task = read_task(message.content)
    except WireError as error:
        log.error("refused a message: %s", error)
        return Refused("", 0, 0, Refusal.CONFIGURATION)

    def refused(code: Refusal) -> Refused:
        return Refused(task.run_id, task.round, task.evaluation, code)

    try:
        config, schema, priced = _understand(task.config, task.schema)
    except (FedveilError, ValidationError) as error:
        log.error("refused run %s: %s", task.run_id, error)
        return refused(Refusal.CONFIGURATION)
    try:
        site = open_site(context)
        head = _debit(site, task, config, schema, priced)
    except LedgerError as error:
        log.error("refused run %s, round %d: %s", task.run_id, task.round, error)
        return refused(_code(error))
    except Exception:  # a ledger that fails in a way that nobody foresaw admits nothing
        log.exception("refused run %s, round %d", task.run_id, task.round)
        return refused(Refusal.LEDGER)
    failures = site.failures
    try:
        arrays, sums = _work(task, config, schema, priced, site)
    except _FAILURES:  # it fails without any record too, and says no more than that
        log.exception("run %s, round %d failed", task.run_id, task.round)
        return refused(Refusal.FAILED)
    if site.failures == failures:
        site.succeed()
    return Update(task.run_id, task.round, task.evaluation, arrays, sums, (head.number, head.hash))


def _debit(site: Site, task: Task, config: RunConfig, schema: Schema, priced: Plan) -> Head:
    """Commits what the task asks for, before any record is read."""
    releases = [("rounds", task.round)] if task.round else []
    if task.evaluation:
        releases.append(("evaluations", task.evaluation))
        if priced.figures_noise:
            releases.append(("training_figures", task.evaluation))
    if not releases:
        raise BudgetError(f"run {task.run_id}: asks for no release")
    terms = terms_of(task.config, task.schema)
    return site.debit(task.run_id, terms, releases, Head(*task.ledger), config, schema, priced)


def _code(error: LedgerError) -> Refusal:
    if isinstance(error, BudgetError):
        return Refusal.BUDGET
    return Refusal.CONFIGURATION if isinstance(error, TermsError) else Refusal.LEDGER


def _work(
    task: Task, config: RunConfig, schema: Schema, priced: Plan, site: Site
) -> tuple[Arrays, Arrays]:
    """The site's part of a round: arrays from training, sums from evaluation."""
    build, arrays, sums = family(config.model.family).build, Arrays(), Arrays()

    def loaded(parameters: Mapping[str, np.ndarray]) -> nn.Module:
        module = build(config.model, schema)
        load_arrays(module, parameters)
        return module

    def training(records: Records) -> Arrays:
        return train(loaded(task.arrays), records.training, config, priced, site.coins)

    def holdout(records: Records) -> Arrays:
        exam, held_out = exam_from_arrays(task.exam, schema), records.holdout
        model = loaded(task.released)
        return holdout_sums(model, exam, held_out, config, schema, priced, site.coins)

    def figures(records: Records) -> Arrays:
        model = loaded(task.released)
        return training_sums(model, records.training, config, priced, site.coins)

    def part(work: Callable[[Records], Arrays]) -> Arrays:
        return _without_fail(work, config, schema, site)

    if task.round:
        loaded(task.arrays)  # what cannot be loaded fails before a record is read
        arrays = part(training)
    if task.evaluation:
        loaded(task.released)
        exam_from_arrays(task.exam, schema)
        sums = {f"holdout/{name}": total for name, total in part(holdout).items()}
        if priced.figures_noise:
            sums |= {f"training/{name}": total for name, total in part(figures).items()}
    return arrays, sums


def _without_fail(
    work: Callable[[Records], Arrays], config: RunConfig, schema: Schema, site: Site
) -> Arrays:
    """One account's part of a round; without the site's records if they make it fail.

    Whether records make a site fail is itself private. So it then sends what it would send if it
    had none, zeros or noise, and the cause stays in its own log. That hides the failure, not the
    one record that may have caused it: the claim assumes that no single record can, which reading,
    cleaning and clipping see to, each of them record by record. Each account's part is by itself:
    what a held-out record breaks leaves the training sum as it was.
    """
    try:
        return work(site.records(config, schema))
    except _FAILURES:
        log.exception("%s: goes on without records", site.name)
        made = work(no_records(schema))
        site.fail()  # now it is known that its records were the cause
        return made


@lru_cache(maxsize=4)
def _understand(config_json: str, schema_json: str) -> tuple[RunConfig, Schema, Plan]:
    """Reads the run and prices it by the site's own code; whatever the server says it costs."""
    config, schema = RunConfig.model_validate_json(config_json), schema_from_json(schema_json)
    check_unit(config, schema)
    return config, schema, plan(config)
