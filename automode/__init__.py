"""automode watches a PyTorch training run, decides what would make it better, and proves it before keeping it.

The public door. ``import automode`` costs next to nothing: names that need torch or pydantic load when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from automode.errors import (
    AutomodeError,
    CardError,
    ConflictError,
    DataError,
    MergeError,
    NotExecutableError,
    PolicyError,
    ReplayDifferenceError,
    SchedulerError,
    SessionBusyError,
    SessionCorruptError,
    SessionError,
    UsageError,
)

if TYPE_CHECKING:
    from automode.planner.cards import PlanCard
    from automode.planner.policy import Policy
    from automode.session import Session
    from automode.session.replaying import replay, story
    from automode.trainer import Trainer, quickstart, watch
    from automode.trainer.callbacks import Callback
    from automode.trainer.flat_optimizers import FlatAdam, FlatAdamW, flatten
    from automode.trainer.tensor_loader import TensorLoader

__version__ = "0.1.0.dev0"

__all__ = [
    "AutomodeError",
    "Callback",
    "CardError",
    "ConflictError",
    "DataError",
    "FlatAdam",
    "FlatAdamW",
    "MergeError",
    "NotExecutableError",
    "PlanCard",
    "Policy",
    "PolicyError",
    "ReplayDifferenceError",
    "SchedulerError",
    "Session",
    "SessionBusyError",
    "SessionCorruptError",
    "SessionError",
    "TensorLoader",
    "Trainer",
    "UsageError",
    "__version__",
    "flatten",
    "quickstart",
    "replay",
    "story",
    "watch",
]

_HOMES = {
    "Callback": "automode.trainer.callbacks",
    "FlatAdam": "automode.trainer.flat_optimizers",
    "FlatAdamW": "automode.trainer.flat_optimizers",
    "PlanCard": "automode.planner.cards",
    "Policy": "automode.planner.policy",
    "Session": "automode.session",
    "TensorLoader": "automode.trainer.tensor_loader",
    "Trainer": "automode.trainer",
    "flatten": "automode.trainer.flat_optimizers",
    "quickstart": "automode.trainer",
    "replay": "automode.session.replaying",
    "story": "automode.session.replaying",
    "watch": "automode.trainer",
}


def __getattr__(name: str) -> object:
    """Load a public name from its room when it is first used (PEP 562)."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'automode' has no attribute {name!r}")
    value: object = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted(__all__)
