"""Parameters as arrays: checked against the module they are for, stored as safetensors."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import nn

from ..config import FedveilError

Arrays = dict[str, np.ndarray]


class StateError(FedveilError):
    """Arrays that do not fit the module, or a file that holds none."""


def to_arrays(module: nn.Module, names: list[str] | None = None) -> Arrays:
    """Copies of a module's parameters by name: all of them, or those named."""
    parameters = dict(module.named_parameters())
    return {
        n: parameters[n].detach().numpy().copy() for n in (parameters if names is None else names)
    }


def check_arrays(arrays: Mapping[str, np.ndarray], like: Mapping[str, np.ndarray]) -> None:
    """Checks arrays against others: the same keys, shapes and types, all finite.

    Raises:
        StateError: What was expected and what came; never a value of the arrays.
    """
    if arrays.keys() != like.keys():
        raise StateError(
            f"arrays: expected the {len(like)} names of the model, got {len(arrays)} with "
            f"{len(arrays.keys() & like.keys())} of them"
        )
    for name, expected in like.items():
        got = arrays[name]
        if got.shape != expected.shape or got.dtype != expected.dtype:
            raise StateError(
                f"{name}: expected {expected.shape} {expected.dtype}, got {got.shape}"
                f"{'' if got.dtype == expected.dtype else ' of another type'}"
            )
        if not np.isfinite(got).all():
            raise StateError(f"{name}: expected finite numbers")


@torch.no_grad()
def load_arrays(module: nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Sets all of a module's parameters.

    Raises:
        StateError: The arrays are not exactly those of the module.
    """
    check_arrays(arrays, to_arrays(module))
    for name, parameter in module.named_parameters():
        parameter.copy_(torch.from_numpy(np.array(arrays[name])))


def to_bytes(arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> bytes:
    """Arrays and facts about them as one safetensors file, with a checksum over all of it."""
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    about = {"facts": facts, "sha256": _checksum(contiguous, facts)}
    # One key: safetensors writes several in an order of chance.
    return save(contiguous, metadata={"fedveil": json.dumps(about, sort_keys=True)})


def read_file(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """Reads what `to_bytes` made.

    Raises:
        StateError: The file is missing or damaged.
    """
    try:
        with safe_open(path, framework="numpy") as opened:
            about = json.loads((opened.metadata() or {})["fedveil"])
            facts, checksum = about["facts"], about["sha256"]
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StateError(f"{path}: holds no model of ours ({type(error).__name__})") from None
    if checksum != _checksum(arrays, facts):
        raise StateError(f"{path}: is damaged: its checksum does not fit")
    return arrays, facts


def _checksum(arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"\0{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
