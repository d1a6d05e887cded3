"""The Flower ClientApp: it unpacks, checks, debits the ledger, computes, replies. Handlers only."""

import hashlib
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from threading import Lock

import torch
from pydantic import ValidationError

from ..config import FedveilError, RunConfig
from ..config.options import LEAST_NORM, MOST_NORM
from ..data_prep import check_unit
from ..data_prep.schema import Schema, schema_from_json
from ..flower import ClientApp, Context, Message
from ..models import family, metrics
from ..privacy import vector
from ..privacy.books import Head
from ..privacy.limits import BudgetError, LedgerError, TermsError
from ..privacy.plan import Plan, plan
from ..privacy.policy import Asked, PolicyRefusal, asked_by
from ..privacy.secagg.encoding import encode
from ..privacy.secagg.errors import SecAggError
from ..privacy.secagg.keys import is_signed
from ..privacy.secagg.messages import Upload
from ..privacy.secagg.sealed import SealedReply, seal_reply
from ..privacy.secagg.site import Site as Party
from ..wire import (
    END,
    EVALUATE,
    TRAIN,
    Refusal,
    Refused,
    Step,
    Task,
    Update,
    WireError,
    pack,
    read_step,
    read_task,
    run_statement,
    to_bytes,
)
from .secure import STEPS, Opened, open_round, upload
from .self_test import ConformanceError, Tested, self_test
from .site import Site
from .work import FAILURES, Parts, parts_of

log = logging.getLogger(__name__)
OpenSite = Callable[[Context], Site]


def client_app(open_site: OpenSite) -> ClientApp:
    """The app of every site; `open_site` finds the site that a context is for."""
    app = ClientApp()

    @app.train(TRAIN.partition(".")[2])
    def step(message: Message, context: Context) -> Message:
        return Message(pack(_answer(message, context, open_site)), reply_to=message)

    @app.evaluate(EVALUATE.partition(".")[2])
    def model(message: Message, context: Context) -> Message:
        return Message(pack(_answer(message, context, open_site)), reply_to=message)

    for action in (*STEPS, END):
        _add_step(app, action, open_site)
    return app


def _add_step(app: ClientApp, action: str, open_site: OpenSite) -> None:
    @app.query(action.partition(".")[2])
    def answer(message: Message, context: Context) -> Message:
        return Message(pack(_answer_step(action, message, context, open_site)), reply_to=message)


def terms_of(config_json: str, schema_json: str) -> str:
    """What binds a run to its configuration and schema, and so to one price."""
    return hashlib.sha256(f"{config_json}\0{schema_json}".encode()).hexdigest()


@dataclass(frozen=True)
class Understood:
    """What a task is about, as the site understands it."""

    config: RunConfig
    schema: Schema
    priced: Plan
    parameters: int


def _answer_step(
    action: str, message: Message, context: Context, open_site: OpenSite
) -> Step | Refused:
    """Answers a step of the secure sum, which touches no record."""
    run_id = ""
    try:
        step = read_step(message.content)
        run_id = step.run_id
        return open_site(context).secure.answer(action, step)
    except Exception as error:  # noqa: BLE001  whatever it is, it is no answer
        log.error("refused %s of run %s: %s", action, run_id, error)
        return Refused(run_id, 0, 0, Refusal.PROTOCOL)


def _answer(message: Message, context: Context, open_site: OpenSite) -> Update | Refused:
    try:
        task = read_task(message.content)
    except WireError as error:
        log.error("refused a message: %s", error)
        return Refused("", 0, 0, Refusal.CONFIGURATION)
    run = None
    try:
        run = understand(task.config, task.schema)
        site = open_site(context)
        site.accept(asked_of(task, run))  # before anything of the site's own is touched
        with site.secure.party(task.run_id) if run.priced.numbers else nullcontext() as party:
            return _take_part(task, run, site, party)
    except Exception as error:
        # What fails before anything is opened rests on what was sent.
        code = Refusal.CONFIGURATION if run is None else _code(error)
        log.error("refused run %s, round %d: %s", task.run_id, task.round, error)
        if not isinstance(error, (FedveilError, ValidationError)):
            log.exception("which nobody foresaw")
        return Refused(task.run_id, task.round, task.evaluation, code)


class _WorkError(FedveilError):
    """The site fails without any record too, and says no more than that."""


_CODES: tuple[tuple[type[Exception], Refusal], ...] = (
    (_WorkError, Refusal.FAILED),
    (ConformanceError, Refusal.CONFORMANCE),
    (SecAggError, Refusal.PROTOCOL),
    (BudgetError, Refusal.BUDGET),
    (TermsError, Refusal.CONFIGURATION),
    (LedgerError, Refusal.LEDGER),
    (FedveilError, Refusal.CONFIGURATION),
    (ValidationError, Refusal.CONFIGURATION),
)
"""What a site says of each error."""


def _code(error: Exception) -> Refusal:
    """Of one that nobody foresaw it says that its ledger admits nothing."""
    if isinstance(error, PolicyRefusal):
        return Refusal[error.code.name]
    return next((code for kind, code in _CODES if isinstance(error, kind)), Refusal.LEDGER)


def _take_part(task: Task, run: Understood, site: Site, party: Party | None) -> Update:
    """The site's part of a round: checked, debited and only then computed."""
    _check_norm(task.clipping_norm, run.priced)
    if site.policy.self_test and run.priced.epsilon is not None:
        _check_conformance(run)
    opened = None
    if party is not None:
        opened = open_round(party, task, _blocks(task, run), run.priced)
        if opened.sent is not None:  # asked for again: the same bytes, and nothing debited anew
            return _uploaded(task, opened.sent)
    if run.config.encryption == "sealed":
        _sealed(b"", task, site)  # what cannot be sealed must not be paid for
    head = _debit(site, task, run)
    failures = site.failures
    try:
        parts = parts_of(task, run.config, run.schema, run.priced, site)
        update = _packed(task, run, site, head, parts, opened)
    except FAILURES as error:
        log.exception("run %s, round %d failed", task.run_id, task.round)
        raise _WorkError(type(error).__name__) from None
    if site.failures == failures:
        site.succeed()
    return update


def _check_norm(asked: float, priced: Plan) -> None:
    """The bound of a sum: the plan's or, where it adapts, one that a configuration may ask for."""
    if not priced.adaptive and asked != priced.clipping_norm:
        raise TermsError(f"clipping_norm = {asked}: expected {priced.clipping_norm} as priced")
    # Written so that what is no number is refused: nothing compares with NaN.
    if priced.adaptive and not LEAST_NORM <= asked <= MOST_NORM:
        raise TermsError(f"clipping_norm = {asked}: expected {LEAST_NORM:g} to {MOST_NORM:g}")


def _packed(
    task: Task, run: Understood, site: Site, head: Head, parts: Parts, opened: Opened | None
) -> Update:
    """What leaves the site: a masked vector, a sealed reply, or the parts as they are."""
    if opened is not None:
        count, known = head.number, bytes.fromhex(head.hash)
        return _uploaded(task, upload(opened, parts, run.priced, site.coins, count, known))
    arrays = parts.pop("update", {})
    sums = {f"{part}/{name}": array for part, of in parts.items() for name, array in of.items()}
    about = task.run_id, task.round, task.evaluation
    plain = Update(*about, arrays, sums, (head.number, head.hash))
    if run.config.encryption == "none":
        return plain
    sealed = _sealed(to_bytes(plain), task, site)
    return replace(plain, arrays={}, sums={}, upload=encode(sealed))


def _sealed(content: bytes, task: Task, site: Site) -> SealedReply:
    identity = site.secure.keys.identity
    return seal_reply(content, site.name, identity, task.aggregator, task.digest)


def _uploaded(task: Task, sent: Upload) -> Update:
    signed = sent.uploaded
    ledger = (signed.ledger_count, signed.ledger_head.hex())
    return Update(task.run_id, task.round, task.evaluation, {}, {}, ledger, encode(sent))


def _blocks(task: Task, run: Understood) -> tuple[vector.Placed, ...]:
    """The round's vector, as the site itself derives it."""
    sizes = vector.Sizes(
        run.parameters,
        task.clipping_norm,
        metrics.size(run.schema, run.priced.evaluation_units),
        metrics.loss_size(),
        run.config.records,
    )
    asked = vector.releases(
        sizes,
        run.priced,
        at_sites=run.config.trains_at_sites,
        training=bool(task.round),
        evaluating=bool(task.evaluation),
    )
    return vector.placed(asked, run.priced)


def _check_conformance(run: Understood) -> None:
    """Refuses code that does not do what was priced; tested once a run, by whichever site is first.

    Raises:
        ConformanceError: A check fails.
    """
    with _one_at_a_time:
        tested = _tested(run.config, run.priced, run.parameters)
    if tested.outcome == "violated":
        raise ConformanceError(
            f"self-test: {', '.join(tested.failed)}: is not as priced; do not run this code"
        )


# Ten sites that run sound code should refuse one run of a hundred thousand at most.
_ALARM = 1e-6
_one_at_a_time = Lock()


@lru_cache(maxsize=4)
def _tested(config: RunConfig, priced: Plan, parameters: int) -> Tested:
    return self_test(config, priced, parameters=parameters, alarm=_ALARM)


def asked_of(task: Task, run: Understood) -> Asked:
    """What is public about the run, for the site's policy."""
    statement = run_statement(task.run_id, task.config, task.schema, task.aggregator)
    signed = is_signed(task.coordinator, statement, task.signature)
    return asked_by(run.config, run.priced, run.parameters, task.coordinator if signed else None)


def _debit(site: Site, task: Task, run: Understood) -> Head:
    """Commits what the task asks for, before any record is read."""
    releases = [("rounds", task.round)] if task.round else []
    if task.evaluation:
        releases.append(("evaluations", task.evaluation))
        if run.priced.figures_noise:
            releases.append(("training_figures", task.evaluation))
    if not releases:
        raise BudgetError(f"run {task.run_id}: asks for no release")
    terms = terms_of(task.config, task.schema)
    known = Head(*task.ledger)
    return site.debit(task.run_id, terms, releases, known, run.config, run.schema, run.priced)


@lru_cache(maxsize=4)
def understand(config_json: str, schema_json: str) -> Understood:
    """Reads the run and prices it by the site's own code; whatever the server says it costs."""
    config, schema = RunConfig.model_validate_json(config_json), schema_from_json(schema_json)
    check_unit(config, schema)
    kind = family(config.model.family)
    with torch.device("meta"):  # to be counted, whatever size a server has asked for
        module = kind.build(config.model, schema)
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    parameters = sum(sizes[name] for name in kind.trainable(module))
    return Understood(config, schema, plan(config), parameters)
