"""Generative models. The registry of families, imported on use."""

from importlib import import_module

from .family import Batch, Family

__all__ = ["FAMILIES", "Batch", "Family", "family"]

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
