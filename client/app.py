"""The Flower ClientApp: it unpacks, checks, debits the ledger, computes, replies. Handlers only."""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from threading import Lock

from pydantic import ValidationError

from ..config import FedveilError, RunConfig
from ..config.options import LEAST_NORM, MOST_NORM
from ..data_prep.queries import run_workload
from ..data_prep.schema import schema_from_json, schema_to_json
from ..flower import ClientApp, Context, Message
from ..models import metrics
from ..privacy import vector
from ..privacy.books import Head
from ..privacy.limits import BudgetError, TermsError
from ..privacy.plan import Plan
from ..privacy.secagg.encoding import encode
from ..privacy.secagg.messages import Upload
from ..privacy.secagg.sealed import SealedReply, seal_reply
from ..privacy.secagg.site import Site as Party
from ..wire import (
    END,
    EVALUATE,
    READY,
    STATISTICS,
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
    to_bytes,
)
from .approvals import PausedError
from .secure import STEPS, Opened, check_name, open_round, upload
from .self_test import ConformanceError, Tested, self_test
from .site import Site
from .statistics_test import statistics_test
from .understanding import Understood, WorkError, asked_of, code_of, terms_of, understand
from .work import FAILURES, Parts, parts_of

log = logging.getLogger(__name__)
OpenSite = Callable[[Context], Site]
Work = Callable[[Task, Understood, Site], Update | Step]


def client_app(open_site: OpenSite) -> ClientApp:
    """The app of every site; `open_site` finds the site that a context is for."""
    app = ClientApp()

    @app.train(TRAIN.partition(".")[2])
    def step(message: Message, context: Context) -> Message:
        return Message(pack(_answer(message, context, open_site, _work)), reply_to=message)

    @app.evaluate(EVALUATE.partition(".")[2])
    def model(message: Message, context: Context) -> Message:
        return Message(pack(_answer(message, context, open_site, _work)), reply_to=message)

    @app.query(STATISTICS.partition(".")[2])
    def statistics(message: Message, context: Context) -> Message:
        return Message(pack(_answer(message, context, open_site, _work)), reply_to=message)

    @app.query(READY.partition(".")[2])
    def ready(message: Message, context: Context) -> Message:
        return Message(pack(_answer(message, context, open_site, _be_ready)), reply_to=message)

    for action in (*STEPS, END):
        _add_step(app, action, open_site)
    return app


def _add_step(app: ClientApp, action: str, open_site: OpenSite) -> None:
    @app.query(action.partition(".")[2])
    def answer(message: Message, context: Context) -> Message:
        return Message(pack(_answer_step(action, message, context, open_site)), reply_to=message)


def _answer_step(
    action: str, message: Message, context: Context, open_site: OpenSite
) -> Step | Refused:
    """Answers a step of the secure sum, which touches no record."""
    run_id = ""
    try:
        step = read_step(message.content)
        run_id = step.run_id
        site = open_site(context)
        if action != END:  # which only erases
            site.check_pause()
        return site.secure.answer(action, step)
    except PausedError as error:
        log.error("refused %s of run %s: %s", action, run_id, error)
        return Refused(run_id, 0, 0, Refusal.PAUSED)
    except Exception as error:  # noqa: BLE001  whatever it is, it is no answer
        log.error("refused %s of run %s: %s", action, run_id, error)
        return Refused(run_id, 0, 0, Refusal.PROTOCOL)


def _answer(
    message: Message, context: Context, open_site: OpenSite, work: Work
) -> Update | Step | Refused:
    """Answers a task, or refuses it before anything of the site's own is touched."""
    try:
        task = read_task(message.content)
    except WireError as error:
        log.error("refused a message: %s", error)
        return Refused("", 0, 0, Refusal.CONFIGURATION)
    run = None
    try:
        run = understand(task.config, task.schema)
        site = open_site(context)
        asked, terms = asked_of(task, run), terms_of(task.config, task.schema)
        site.accept(asked)
        known = Head(*task.ledger)
        site.admit(task.run_id, terms, known, asked, run.config, run.schema, run.priced)
        return work(task, run, site)
    except Exception as error:
        # What fails before anything is opened rests on what was sent.
        code = Refusal.CONFIGURATION if run is None else code_of(error)
        log.error("refused run %s, round %d: %s", task.run_id, task.round, error)
        if not isinstance(error, (FedveilError, ValidationError)):
            log.exception("which nobody foresaw")
        return Refused(task.run_id, task.round, task.evaluation, code, task.statistics)


def _work(task: Task, run: Understood, site: Site) -> Update:
    with site.secure.party(task.run_id) if run.priced.numbers else nullcontext() as party:
        update = _take_part(task, run, site, party)
    site.check_pause()  # again: a round may take long, and what was sent cannot be taken back
    return update


def _be_ready(task: Task, run: Understood, site: Site) -> Step:
    """Whether the site would take part: all that it would refuse before it touches a record.

    Nothing is debited, nothing read.
    """
    asked = task.statistics or task.round or task.evaluation
    if asked or task.arrays or task.released or task.exam:
        raise TermsError(f"run {task.run_id}: asks whether the site is ready, and for more")
    if site.policy.self_test and run.priced.epsilon is not None:
        _check_conformance(run)
    terms, known = terms_of(task.config, task.schema), Head(*task.ledger)
    site.check(task.run_id, terms, known, run.config, run.schema, run.priced)
    if run.priced.numbers is not None:
        check_name(task.run_id)
        site.secure.check(run.priced.numbers)
    if run.config.encryption == "sealed":
        _sealed(b"", task, site)
    return Step(task.run_id, b"")


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
        raise WorkError(type(error).__name__) from None
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
    ledger = head.number, head.hash
    plain = Update(*about, arrays, sums, ledger, statistics=task.statistics)
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
    about = task.run_id, task.round, task.evaluation
    return Update(*about, {}, {}, ledger, encode(sent), task.statistics)


def _blocks(task: Task, run: Understood) -> tuple[vector.Placed, ...]:
    """The round's vector, as the site itself derives it."""
    sizes = vector.Sizes(
        run.parameters,
        task.clipping_norm,
        metrics.size(run.schema, run.priced.evaluation_units),
        metrics.loss_size(),
        run.config.records,
    )
    if task.statistics:
        described = run_workload(run.config, run.schema, run.priced.statistics_noise)
        whole = described.size(run.priced.statistics_units)
        sizes = replace(sizes, statistics=whole, peak=described.peak)
    asked = vector.releases(
        sizes,
        run.priced,
        at_sites=run.config.trains_at_sites,
        training=bool(task.round),
        evaluating=bool(task.evaluation),
        describing=bool(task.statistics),
    )
    return vector.placed(asked, run.priced)


def _check_conformance(run: Understood) -> None:
    """Refuses code that does not do what was priced; tested once a run, by whichever site is first.

    Raises:
        ConformanceError: A check fails.
    """
    with _one_at_a_time:
        text = schema_to_json(run.schema)  # which can be a key
        found = _tested(run.config, text, run.priced, run.parameters)
    if failed := [name for tested in found for name in tested.failed]:
        raise ConformanceError(
            f"self-test: {', '.join(failed)}: is not as priced; do not run this code"
        )


# Ten sites that run sound code should refuse one run of a hundred thousand at most.
_ALARM = 1e-6
_one_at_a_time = Lock()


@lru_cache(maxsize=4)
def _tested(config: RunConfig, schema: str, priced: Plan, parameters: int) -> tuple[Tested, ...]:
    found = []
    if priced.rounds:
        found.append(self_test(config, priced, parameters=parameters, alarm=_ALARM / 2))
    if priced.statistics:
        asked = schema_from_json(schema)
        found.append(statistics_test(config, asked, priced, alarm=_ALARM / 2))
    return tuple(found)


def _debit(site: Site, task: Task, run: Understood) -> Head:
    """Commits what the task asks for, before any record is read."""
    releases = [("statistics", task.statistics)] if task.statistics else []
    if task.round:
        releases.append(("rounds", task.round))
    if task.evaluation:
        releases.append(("evaluations", task.evaluation))
        if run.priced.figures_noise:
            releases.append(("training_figures", task.evaluation))
    if not releases:
        raise BudgetError(f"run {task.run_id}: asks for no release")
    terms = terms_of(task.config, task.schema)
    known = Head(*task.ledger)
    return site.debit(task.run_id, terms, releases, known, run.config, run.schema, run.priced)
