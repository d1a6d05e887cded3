"""The sites of a simulation: their records, ledgers, secrets and what they keep for themselves."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from ...client.own_files import ledger_and_key, secret
from ...client.secure import Keys, SecureSite
from ...client.site import Budget, Site
from ...client.understanding import terms_of, understand
from ...config import Policy, RunConfig, site_policy
from ...data_prep import modality
from ...data_prep.clean import CleaningReport, refuse_unusable
from ...data_prep.partition import share_out
from ...data_prep.schema import Schema, schema_to_json
from ...files import replace_file
from ...privacy.books import Head
from ...privacy.limits import BudgetError, LedgerError, UnavailableError
from ...privacy.noise import Coins
from ...privacy.policy import PolicyRefusal, asked_by, floor_of, lifetime_of
from ...privacy.secagg.keys import Identity
from ...privacy.secagg.pins import read_identities
from ...wire import NO_LEDGER, site_name
from ..collect import IDENTITIES
from ..coordinator import coordinator
from ..replies import RunError
from ..rounds import Observer
from ..store import Event

_IDENTITY, _VAULT = "SIMULATED-identity.key", "SIMULATED-vault.key"
_STATES = "secagg"


@dataclass(frozen=True)
class Shards:
    """A simulation's raw records, shared out.

    Attributes:
        parts: One site's raw records each.
        report: What cleaning does to all of them; a simulation may look at it, a federation not.
    """

    parts: tuple[Any, ...]
    report: CleaningReport


def load_shards(config: RunConfig, schema: Schema) -> Shards:
    """Reads the source, checks that it is usable at all, and shares it out.

    Raises:
        DataError: The data cannot be used.
        ConfigError: They cannot be shared out so.
    """
    kind, data = modality(schema), config.data
    raw = kind.read(data.source, schema)
    # Cleaning is record-wise: the whole may be checked here, and each part cleaned at its site.
    _, report = kind.clean(raw, schema, config.clean)
    refuse_unusable(report)

    def column(name: str | None, *, wanted: bool) -> list[str]:
        return kind.values(raw, schema, name) if wanted and name is not None else []

    parts = share_out(
        data,
        config.federation.sites,
        report.records,
        np.random.default_rng(config.federation.seed),
        persons=column(schema.person, wanted=True),
        labels=column(schema.label, wanted=data.partition == "dirichlet"),
        column=column(data.column, wanted=True),
    )
    return Shards(tuple(kind.take(raw, rows) for rows in parts), report)


def simulated_site(
    node: int,
    raw: Any,  # noqa: ANN401
    folder: Path,
    config: RunConfig,
    records: int,
    *,
    hold: bool = True,
) -> Site:
    """A site with its ledger and its secrets, made where they are missing.

    They stand in the run folder, or where `data.ledger` says, and call themselves simulated: a
    simulation protects nobody from the one who runs it.

    Args:
        node: Its number.
        raw: Its raw records.
        folder: The run folder.
        config: The run.
        records: How many raw records all sites share: one more may change who holds which.
        hold: Whether this process alone answers for it; see `SecureSite`.

    Raises:
        LedgerError: The ledger cannot be used, or ledger and key are not of one site.
    """
    name = site_name(node)
    home = Path(config.data.ledger) if config.data.ledger else folder / "ledger"
    own = folder / "sites" / name
    try:
        for path in (own, home):
            path.mkdir(parents=True, exist_ok=True)
        files = home / f"{name}.sqlite", home / f"{name}.SIMULATED-split.key"
        # The key is made last, so that one without a ledger is the witness of a lost one.
        ledger, split_key = ledger_and_key(*files, files[1], name, simulated=True)
    except OSError as error:
        raise UnavailableError(f"{home}: {error.strerror}; check the path and the disk") from None
    data, policy = config.data, _policy(config, name, folder)
    budget = Budget(
        ledger,
        config.dataset_id,
        lifetime_of(policy),
        {
            "shared_out": f"{data.partition} to {config.federation.sites} sites, seed "
            f"{config.federation.seed}, alpha {data.alpha:g}, column {data.column}, of "
            f"{records} records"
        },
    )
    secure = SecureSite(name, _keys(name, folder), floor_of(policy), hold=hold)
    return Site(name, lambda _: raw, split_key, budget, Coins.from_system(), own, secure, policy)


def _policy(config: RunConfig, name: str, folder: Path) -> Policy:
    """A simulated site's policy; it expects the run's own coordinator, as if it were told so."""
    policy = site_policy(config, name)
    if policy.coordinator is not None:
        return policy
    return policy.model_copy(update={"coordinator": coordinator(folder).identity.public.hex()})


def pin_identities(sites: int, folder: Path) -> None:
    """Gives each simulated site an identity, and pins them all: what provisioning does elsewhere.

    What sites kept of secure sums before goes: with its server's process each epoch has ended.

    Raises:
        UnavailableError: They cannot be written.
    """
    try:
        known = {}
        for number in range(1, sites + 1):
            name = site_name(number)
            own = folder / "sites" / name
            own.mkdir(parents=True, exist_ok=True)
            for left in (own / _STATES).glob("*.state"):
                left.unlink()
            known[name] = Identity(secret(own / _IDENTITY)).public.hex()
        text = tomli_w.dumps({"identities": known})
        replace_file(folder / IDENTITIES, text.encode())
    except OSError as error:
        raise UnavailableError(f"{folder}: {error.strerror}; check the path and the disk") from None


def _keys(name: str, folder: Path) -> Keys:
    own, pins = folder / "sites" / name, folder / IDENTITIES
    identity = Identity(secret(own / _IDENTITY))
    # Without pins nobody is known, and no secure sum begins.
    pinned = read_identities(pins) if pins.exists() else {name: identity.public}
    # It need not outlive a power cut: see `pin_identities`.
    return Keys(identity, pinned, own / _STATES, secret(own / _VAULT), durable=False)


def check_sites(
    sites: Mapping[int, Site],
    run_id: str,
    known: Mapping[int, tuple[int, str]],
    config: RunConfig,
    schema: Schema,
    signer: bytes,
) -> dict[int, str]:
    """A federation learns of a refusal by its code; whoever simulates one is told why, at once.

    Args:
        sites: By number.
        run_id: The run.
        known: Their ledgers' heads, as the server saw them last.
        config: The run.
        schema: What a record is.
        signer: The coordinator's public key.

    Returns:
        Who will refuse, and why, where enough others remain.

    Raises:
        LedgerError: Too few remain, or a ledger cannot be used.
    """
    texts = config.shared().model_dump_json(by_alias=True), schema_to_json(schema)
    run, terms = understand(*texts), terms_of(*texts)
    asked = asked_by(run.config, run.priced, run.parameters, signer)
    refused: dict[int, LedgerError] = {}
    for number, site in sites.items():
        head = Head(*known.get(number, NO_LEDGER))
        try:
            site.accept(asked)
            site.check(run_id, terms, head, run.config, schema, run.priced)
        except (PolicyRefusal, BudgetError) as error:
            refused[number] = error
        except LedgerError as error:
            raise type(error)(f"{site.name}: {error}") from None
    if refused and len(sites) - len(refused) < config.min_replies:
        first, *others = refused
        more = f" (and so do {', '.join(sites[n].name for n in others)})" if others else ""
        raise type(refused[first])(f"{sites[first].name}: {refused[first]}{more}")
    return {number: str(error) for number, error in refused.items()}


def refuse_failed(folder: Path) -> Observer:
    """Stops a simulation as long as a site's records make it fail.

    A federation must not be told of that; who simulates one must be. The event, which a report
    shows, says no more than that it was so.
    """

    def seen(event: Event) -> None:
        if _is_time(event) and any((folder / "sites").glob("*.failed")):
            raise RunError(
                "a simulated site failed and took part without records; sites/*.failed in the run "
                "folder names it, sites/site.log says why"
            )

    return seen


def _is_time(event: Event) -> bool:
    """After the sites were asked; or when no round is left in which they could do better."""
    if event["event"] == "resumed":
        over: bool = event["round"] + len(event["lost"]) >= event["privacy"]["rounds"]
        return over
    return event["event"] in {"round", "evaluated"}


@contextmanager
def site_log(path: Path) -> Iterator[None]:
    """Keeps what the simulated sites log for themselves, for as long as the block runs."""
    logger, handler = keep_log(path)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def keep_log(path: Path) -> tuple[logging.Logger, logging.Handler]:
    """Keeps what the simulated sites log for themselves; nothing of it reaches the server."""
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    logger = logging.getLogger(Site.__module__.rpartition(".")[0])
    logger.addHandler(handler)
    return logger, handler
