"""Generative models. The registry of families, imported on use."""

from importlib import import_module

from ..config import ConfigError
from ..data_prep.schema import Schema
from .family import Batch, Family

__all__ = ["FAMILIES", "Batch", "Family", "check_modality", "family"]

FAMILIES = {
    "marginal": "marginal:FAMILY",
    "vae": "vae:FAMILY",
}


def family(name: str) -> Family:
    """The family of that name.

    Raises:
        KeyError: None is registered; a validated configuration names none such.
    """
    module, attribute = FAMILIES[name].split(":")
    found = getattr(import_module(f".{module}", __name__), attribute)
    if not isinstance(found, Family):
        raise TypeError(f"{module}:{attribute} is no Family")
    return found


def check_modality(name: str, schema: Schema) -> None:
    """Refuses a family that does not make a schema's kind of data.

    Raises:
        ConfigError: It does not; those are named that do.
    """
    if schema.modality in family(name).modalities:
        return
    others = [f'"{other}"' for other in FAMILIES if schema.modality in family(other).modalities]
    raise ConfigError(
        f'model.family = "{name}": makes no {schema.modality}s; use {" or ".join(others)}'
    )
