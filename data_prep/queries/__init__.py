"""Bounded linear queries over encoded records: which are asked, and what a site answers.

Which queries are asked follows from the schema, the options and public numbers: a data-free rule.
"""

from importlib import import_module
from types import ModuleType

import numpy as np

from ...config import ConfigError, RunConfig, Statistics
from ..modality import Encoded
from ..schema import Schema
from .workload import Noisy, Query, Workload, noisy

__all__ = ["Noisy", "Query", "Workload", "answers", "noisy", "run_workload", "workload"]

_OWN_OPTIONS = {
    "marginals": ("table", ()),
    "image_coefficients": ("image", None),
    "image_covariances": ("image", None),
}
_MODULES = {"image": ".images", "table": ".tables", "text": ".texts"}


def workload(
    schema: Schema, options: Statistics, units: float, noise_multiplier: float
) -> Workload:
    """What a run asks.

    Args:
        schema: What a record is.
        options: The run's.
        units: Declared public number of privacy units that the sums are over.
        noise_multiplier: Standard deviation of the noise over the vector's sensitivity; 0 for none.

    Raises:
        ConfigError: It would have too many cells, or an option is for another kind of data.
    """
    for name, (modality, default) in _OWN_OPTIONS.items():
        if schema.modality != modality and getattr(options, name) != default:
            raise ConfigError(f"statistics.{name}: goes with {modality}s only; leave it out")
    found: Workload = _module(schema).workload(schema, options, units, noise_multiplier)
    return found


def run_workload(config: RunConfig, schema: Schema, noise_multiplier: float) -> Workload:
    """What a run asks, at every site and at the server alike.

    Raises:
        ConfigError: It would have too many cells.
    """
    return workload(schema, config.statistics, config.trained, noise_multiplier)


def answers(
    asked: Workload, records: Encoded, schema: Schema, persons: np.ndarray | None = None
) -> np.ndarray:
    """A site's exact sums: what leaves the site has noise first.

    Formal guarantee: one record more or less, or with `persons` one whole person, changes the
    result by at most `asked.sensitivity` in L2.

    Args:
        asked: What is asked.
        records: The site's, [N].
        schema: What a record is.
        persons: [N] int64, whose record each one is; `None`: each is its own unit.

    Returns:
        [asked.length] float64, weighted.
    """
    found: np.ndarray = _module(schema).answers(asked, records, schema, persons)
    return found


def _module(schema: Schema) -> ModuleType:
    return import_module(_MODULES[schema.modality], __name__)
