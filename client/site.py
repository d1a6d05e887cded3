"""A site: its records, read and cleaned once per run, its ledger and its secrets."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..config import Policy, RunConfig, UnitName
from ..data_prep import Encoded, check_unit, modality
from ..data_prep.harmonise import NO_MAP, Columns, check_columns, deciding
from ..data_prep.partition import keyed_split, persons, places
from ..data_prep.schema import Schema
from ..models import Batch
from ..privacy.books import Head, order
from ..privacy.ledger import Ledger
from ..privacy.limits import Account, Lifetime
from ..privacy.noise import Coins
from ..privacy.plan import Plan
from ..privacy.policy import Asked, check_policy
from ..privacy.secagg.errors import LostStateError
from .approvals import ApprovalError, Left, Owner, held, hold
from .secure import SecureSite


@dataclass(frozen=True)
class Side:
    """Records of one side of the keyed split.

    Attributes:
        batch: The records, [N].
        persons: [N] int64, whose record each one is, 0 to P - 1; `None` where the privacy unit is
            not a person. All records of a person are on one side.
        places: [N] int64, numbers that hang on each record alone, see `clipping.clipped_sum`;
            `None` for records that are nobody's.
    """

    batch: Batch
    persons: Tensor | None = None
    places: Tensor | None = None

    def groups(self, unit: UnitName) -> Tensor | None:
        """[N] whose record each one is, if persons are what is hidden; else `None`.

        Raises:
            ValueError: They are, and nothing says so. To go on would hide records only.
        """
        if unit != "person":
            return None
        if self.persons is None or len(self.persons) != len(self.batch.y):
            raise ValueError("persons: are what is hidden, and not every record has one")
        return self.persons

    def weights(self, unit: UnitName) -> Tensor | None:
        """[N] float64 such that every privacy unit counts once: 1 / (its records), or `None`."""
        groups = self.groups(unit)
        return None if groups is None else 1 / groups.bincount()[groups].double()


@dataclass(frozen=True)
class Records:
    """A site's cleaned, encoded records by side of the keyed split."""

    training: Side
    holdout: Side
    audit: Side


@dataclass(frozen=True)
class Budget:
    """What a site's owner allows, and where it is kept.

    Attributes:
        ledger: Where every release is committed before data is read.
        dataset_id: The account: the owner's own, stable name of the data.
        lifetime: Limits over all runs.
        origin: What else decides which records are this site's; it may not change either.
        noted: Is told of the ledger's head after each debit, to keep it apart from the ledger.
    """

    ledger: Ledger
    dataset_id: str
    lifetime: Lifetime
    origin: Mapping[str, Any] = field(default_factory=dict)
    noted: Callable[[Head], None] = lambda _: None


class Site:
    """One site in one run.

    Attributes:
        name: What its own log and folder call it.
        coins: Its secret coins.
        failures: How often it took part without its records because they made it fail.
        policy: What its owner accepts.
    """

    def __init__(
        self,
        name: str,
        read: Callable[[Schema], Any],
        split_key: bytes,
        budget: Budget,
        coins: Coins,
        folder: Path | None = None,
        secure: SecureSite | None = None,
        policy: Policy = Policy(),  # noqa: B008  it is frozen
        *,
        columns: Columns = NO_MAP,
        owner: Owner | None = None,
    ) -> None:
        """A site that reads its raw records by `read` and keeps its report in `folder`.

        Args:
            name: What its own log and folder call it.
            read: Its raw records, under the names of a schema's columns.
            split_key: Decides on which side of the split a record is.
            budget: What its owner allows.
            coins: Its secret coins.
            folder: Where it keeps what it finds of its own records; nowhere by default.
            secure: Its part in secure sums.
            policy: What its owner accepts.
            columns: What `read` does to names, for what rests on that.
            owner: Whom it asks besides; a simulated site asks nobody.
        """
        self._secure, self.policy = secure, policy
        self._columns, self._owner = columns, owner
        self.name, self.coins, self.failures = name, coins, 0
        self._read, self._split_key, self._folder = read, split_key, folder
        self._budget = budget
        self._records: Records | None = None
        self._run = ""
        self._about: tuple[Any, ...] = ()

    @property
    def secure(self) -> SecureSite:
        """Its part in secure sums, and its identity.

        Raises:
            SecAggError: It has no keys.
        """
        if self._secure is None:
            raise LostStateError(f"{self.name}: has no keys, expected an identity of its own")
        return self._secure

    def accept(self, asked: Asked) -> None:
        """Holds a run against the policy of the site's owner.

        Raises:
            PolicyRefusal: By the rule that it breaks.
            PausedError: The site is paused.
        """
        check_policy(self.policy, asked)
        self.check_pause()

    def check_pause(self) -> None:
        """Refuses everything while the site is paused.

        Raises:
            PausedError: It is.
        """
        if self._owner is not None:
            self._owner.check_pause()

    def admit(
        self,
        run_id: str,
        terms: str,
        known: Head,
        asked: Asked,
        config: RunConfig,
        schema: Schema,
        plan: Plan,
    ) -> None:
        """Holds a run that the policy accepts against the owner's word, and the site's own columns.

        What its budget refuses is not put before the owner.

        Args:
            run_id: The run.
            terms: As in `debit`, of which an approval is.
            known: As in `debit`.
            asked: What is public about the run.
            config: What was sent, read.
            schema: The same.
            plan: The site's own price of it.

        Raises:
            ConfigError: The site's columns do not fit the schema.
            LedgerError: The site would not take part even if it were approved.
            ApprovalError: The owner has not approved it; now it waits for that.
        """
        check_columns(self._columns, schema)
        if self._owner is None or self._owner.allows(run_id, terms):
            return
        self.check(run_id, terms, known, config, schema, plan)
        hold(self._owner.state, held(run_id, terms, asked, config, self._left(asked.unit)))
        raise ApprovalError(
            f"run {run_id}: waits for approval; `fedveil site approve` gives it on these terms"
        )

    def check(
        self,
        run_id: str,
        terms: str,
        known: Head,
        config: RunConfig,
        schema: Schema,
        plan: Plan,
    ) -> None:
        """Says whether the site would take part, and changes nothing.

        Raises:
            LedgerError: It would not, and why.
        """
        self._budget.ledger.check_head(known)
        books = self._budget.ledger.read()
        books.bind(self._budget.dataset_id, self._split_terms(config, schema))
        books.reserve(order(run_id, terms, self._budget.dataset_id, plan), self._budget.lifetime)

    def debit(
        self,
        run_id: str,
        terms: str,
        releases: Sequence[tuple[str, int]],
        known: Head,
        config: RunConfig,
        schema: Schema,
        plan: Plan,
    ) -> Head:
        """Debits releases before data is read: the run as a whole first, then each once.

        Args:
            run_id: The run; it is bound to the terms that it was reserved on.
            terms: Hash of the configuration and the schema that the server sent.
            releases: Parts of the plan and their indices.
            known: The ledger's head as the server saw it last.
            config: What was sent, read.
            schema: The same.
            plan: The site's own price of it.

        Returns:
            The ledger's head with these releases.

        Raises:
            LedgerError: The site takes no part. It rests on configuration and ledger only.
        """
        ledger, asked = self._budget.ledger, order(run_id, terms, self._budget.dataset_id, plan)
        ledger.check_head(known)
        split = self._split_terms(config, schema)
        head = ledger.debit(asked, self._budget.lifetime, split, releases)
        self._budget.noted(head)
        if run_id != self._run:  # who has been taken out of the records since is out of this run
            self._run, self._records = run_id, None
        return head

    def fail(self) -> None:
        """Notes that its records made it fail, for its owner's eyes: the server learns nothing."""
        self.failures += 1
        self._mark(failed=True)

    @property
    def failed(self) -> bool:
        """Whether it ever took part without its records."""
        return self.failures > 0

    def succeed(self) -> None:
        """Takes the note back: it took part with its records."""
        self._mark(failed=False)

    def _mark(self, *, failed: bool) -> None:
        if self._folder is None:
            return
        marker = self._folder.with_name(f"{self._folder.name}.failed")
        # Not even a full disk may make a site whose records failed look unlike the others.
        with suppress(OSError):
            if failed:
                marker.touch()
            else:
                marker.unlink(missing_ok=True)

    def close(self) -> None:
        """Lets go of the ledger and of the state of secure sums."""
        self._budget.ledger.close()
        if self._secure is not None:
            self._secure.close()

    def records(self, config: RunConfig, schema: Schema) -> Records:
        """The site's records, read on the first call of a run.

        Raises:
            DataError: They cannot be read at all.
        """
        by_person = config.unit == "person"
        about = (schema, config.clean, config.data.holdout, config.data.audit, by_person)
        if self._records is None or self._about != about:
            check_unit(config, schema)
            kind = modality(schema)
            cleaned, report = kind.clean(self._read(schema), schema, config.clean)
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
                text = json.dumps(report.as_dict(), indent=2)
                (self._folder / "cleaning.json").write_text(text, encoding="utf-8")
            encoded = kind.encode(cleaned, schema)
            identities = kind.identities(cleaned, schema)
            sides = keyed_split(identities, self._split_key, config.data.holdout, config.data.audit)
            keys = identities if by_person else None
            self._records = Records(
                training=_side(encoded, keys, sides.training, self._split_key),
                holdout=_side(encoded, keys, sides.holdout, self._split_key),
                audit=_side(encoded, keys, sides.audit, self._split_key),
            )
            self._about = about
        return self._records

    def _split_terms(self, config: RunConfig, schema: Schema) -> dict[str, Any]:
        """All that decides on which side of the split a record is: none of it may ever change.

        A record that is not known by its person is known by its cleaned content, and so by the
        schema and the rules that it was cleaned by.
        """
        identity = schema.person or _sha256(
            schema.model_dump_json(), config.clean.model_dump_json()
        )
        own = deciding(self._columns, schema)
        return {
            "holdout": config.data.holdout,
            "audit": config.data.audit,
            "identity": identity,
            "split_key": _sha256("fedveil split key", self._split_key.hex()),
            **({"columns": own} if own else {}),
            **self._budget.origin,
        }

    def _left(self, unit: UnitName) -> Left:
        """What its accounts may still spend by the limits that are in force, by side."""
        limits, dataset_id = self._budget.lifetime, self._budget.dataset_id
        found = {s.account: s for s in self._budget.ledger.read().statements()}
        left: dict[str, tuple[float | None, float | None]] = {}
        sides: tuple[Literal["training", "holdout"], ...] = ("training", "holdout")
        for side in sides:
            used = found.get(Account(dataset_id, unit, side))
            spent = (0.0, 0.0) if used is None else (used.epsilon or 0.0, used.delta)
            epsilon = None if limits.epsilon is None else max(0.0, limits.epsilon - spent[0])
            # A Renyi filter charges its delta once, for all runs.
            delta = None if limits.composition == "rdp" else max(0.0, limits.delta - spent[1])
            left[side] = epsilon, delta
        return left


def _sha256(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _side(
    encoded: Encoded, keys: Sequence[bytes] | None, rows: np.ndarray, split_key: bytes
) -> Side:
    x, y = encoded.take(rows)
    batch = Batch(torch.from_numpy(x), torch.from_numpy(y))
    # By all that a gradient can hang on: records that are told apart by nothing may change places.
    contents = [one.tobytes() + label.tobytes() for one, label in zip(x, y, strict=True)]
    own = torch.from_numpy(places(contents, split_key))
    if keys is None:
        return Side(batch, places=own)
    return Side(batch, torch.from_numpy(persons([keys[row] for row in rows])), own)


def no_records(schema: Schema) -> Records:
    """Zero records of a schema: what a site takes part with when it has none."""
    nobody = torch.zeros(0, dtype=torch.int64)
    none = Side(Batch(torch.zeros(0, *schema.shape), nobody), nobody, nobody)
    return Records(none, none, none)
