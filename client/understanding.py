"""What a task asks of a site, as the site itself reads, prices and builds it; and its refusals."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import torch
from pydantic import ValidationError

from ..config import FedveilError, RunConfig
from ..data_prep import check_unit
from ..data_prep.queries import run_workload
from ..data_prep.schema import Schema, schema_from_json
from ..models import check_modality, family
from ..privacy.limits import BudgetError, LedgerError, TermsError
from ..privacy.plan import Plan, plan
from ..privacy.policy import Asked, PolicyRefusal, asked_by
from ..privacy.secagg.errors import SecAggError
from ..privacy.secagg.keys import is_signed
from ..wire import Refusal, Task, run_statement
from .approvals import ApprovalError, PausedError
from .self_test import ConformanceError


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


@lru_cache(maxsize=4)
def understand(config_json: str, schema_json: str) -> Understood:
    """Reads the run and prices it by the site's own code; whatever the server says it costs."""
    config, schema = RunConfig.model_validate_json(config_json), schema_from_json(schema_json)
    check_unit(config, schema)
    check_modality(config.model.family, schema)
    kind = family(config.model.family)
    with torch.device("meta"):  # to be counted, whatever size a server has asked for
        module = kind.build(config.model, schema)
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    parameters = sum(sizes[name] for name in kind.trainable(module))
    priced = plan(config)
    if priced.statistics:
        run_workload(config, schema, priced.statistics_noise)  # what cannot be asked is not paid
    return Understood(config, schema, priced, parameters)


def asked_of(task: Task, run: Understood) -> Asked:
    """What is public about the run, for the site's policy."""
    statement = run_statement(task.run_id, task.config, task.schema, task.aggregator)
    signed = is_signed(task.coordinator, statement, task.signature)
    return asked_by(run.config, run.priced, run.parameters, task.coordinator if signed else None)


class WorkError(FedveilError):
    """The site fails without any record too, and says no more than that."""


_CODES: tuple[tuple[type[Exception], Refusal], ...] = (
    (ApprovalError, Refusal.APPROVAL),
    (PausedError, Refusal.PAUSED),
    (WorkError, Refusal.FAILED),
    (ConformanceError, Refusal.CONFORMANCE),
    (SecAggError, Refusal.PROTOCOL),
    (BudgetError, Refusal.BUDGET),
    (TermsError, Refusal.CONFIGURATION),
    (LedgerError, Refusal.LEDGER),
    (FedveilError, Refusal.CONFIGURATION),
    (ValidationError, Refusal.CONFIGURATION),
)
"""What a site says of each error."""


def code_of(error: Exception) -> Refusal:
    """What the server is told of an error.

    Of one that nobody foresaw it says that its ledger admits nothing.
    """
    if isinstance(error, PolicyRefusal):
        return Refusal[error.code.name]
    return next((code for kind, code in _CODES if isinstance(error, kind)), Refusal.LEDGER)
