"""Fedveil: federated, differentially private training of generative models.

    import fedveil

    run = fedveil.simulate("examples/digits-vae.toml", privacy={"epsilon": 3.0})
    images = run.sample(100)

Everything is imported on use, so that `import fedveil` costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import Run, load, simulate

__all__ = ["Run", "__version__", "load", "simulate"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name in {"Run", "load", "simulate"}:
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module 'fedveil' has no attribute {name!r}")
