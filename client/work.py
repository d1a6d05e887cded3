"""One round's work on a site's records: what it adds to each part of the round."""

import logging
from collections.abc import Callable, Mapping

import numpy as np
from polars.exceptions import PanicException
from torch import nn

from ..config import RunConfig
from ..data_prep.schema import Schema
from ..models import family
from ..models.metrics import exam_from_arrays
from ..models.state import Arrays, load_arrays
from ..privacy.mechanism import mechanism_of
from ..privacy.plan import Plan
from ..wire import Task
from .evaluation import holdout_sums, training_sums
from .site import Records, Site, no_records
from .statistics import statistics_sums
from .training import clipped_update, train

# A panic of polars is no Exception, and may be as data-dependent as any.
FAILURES = (Exception, PanicException)

Parts = dict[str, Arrays]
"""Arrays by name, by part of the round.

These are `statistics`, `update`, `clipping`, `holdout` and `training`.
"""

log = logging.getLogger(__name__)


def parts_of(  # noqa: C901  one branch a part
    task: Task, config: RunConfig, schema: Schema, priced: Plan, site: Site
) -> Parts:
    """What the site adds to each part that a task asks for, after its own noise.

    Where noise is shared out, it comes with the grid (`privacy.vector`): until then nothing of it
    may leave the site.
    """
    build = family(config.model.family).build

    def loaded(parameters: Mapping[str, np.ndarray]) -> nn.Module:
        module = build(config.model, schema)
        load_arrays(module, parameters)
        return module

    def training(records: Records) -> Parts:
        arrays = train(loaded(task.arrays), records.training, config, priced, site.coins)
        if priced.unit != "site":
            return {"update": arrays}
        return _whole(arrays, task, priced, site, nothing=not len(records.training.batch.y))

    def holdout(records: Records) -> Parts:
        exam, held_out = exam_from_arrays(task.exam, schema), records.holdout
        model = loaded(task.released)
        return {"holdout": holdout_sums(model, exam, held_out, config, schema, priced, site.coins)}

    def figures(records: Records) -> Parts:
        model = loaded(task.released)
        return {"training": training_sums(model, records.training, config, priced, site.coins)}

    def statistics(records: Records) -> Parts:
        found = statistics_sums(records.training, config, schema, priced, site.coins)
        return {"statistics": found}

    def part(work: Callable[[Records], Parts]) -> Parts:
        return _without_fail(work, config, schema, site)

    parts = Parts()
    if task.statistics:
        parts |= part(statistics)
    if task.round:
        loaded(task.arrays)  # what cannot be loaded fails before a record is read
        parts |= part(training)
    if task.evaluation:
        loaded(task.released)
        exam_from_arrays(task.exam, schema)
        parts |= part(holdout)
        if priced.figures_noise:
            parts |= part(figures)
    return parts


def _whole(change: Arrays, task: Task, priced: Plan, site: Site, *, nothing: bool) -> Parts:
    """A site's whole update, clipped; and whether it was within the bound, as a half more or less.

    Andrew et al. 2021, algorithm 1. A site without data adds zero, neither half: so the sensitivity
    of b - 1/2 is 1/2 where a site's data are there or not.
    """
    hooks, norm = mechanism_of(priced), task.clipping_norm
    update, within = clipped_update(change, norm)
    parts = {"update": hooks.at_site(update, priced.update_noise * norm, site.coins)}
    if priced.adaptive:
        half = {"within": np.array([0.0 if nothing else 0.5 if within else -0.5])}
        parts["clipping"] = hooks.at_site(half, priced.indicator_noise / 2, site.coins)
    return parts


def _without_fail(
    work: Callable[[Records], Parts], config: RunConfig, schema: Schema, site: Site
) -> Parts:
    """One account's part of a round; without the site's records if they make it fail.

    Whether records make a site fail is itself private. So it then sends what it would send if it
    had none, zeros or noise, and the cause stays in its own log. That hides the failure, not the
    one record that may have caused it: the claim assumes that no single record can, which reading,
    cleaning and clipping see to, each of them record by record. Each account's part is by itself:
    what a held-out record breaks leaves the training sum as it was.
    """
    try:
        return work(site.records(config, schema))
    except FAILURES:
        log.exception("%s: goes on without records", site.name)
        made = work(no_records(schema))
        site.fail()  # now it is known that its records were the cause
        return made
