"""The trainer room: the loop, what watches it, and what carries decisions out."""

from __future__ import annotations

from automode.trainer.one_call import quickstart
from automode.trainer.result import FitResult
from automode.trainer.trainer import Trainer
from automode.trainer.watching import watch

__all__ = ["FitResult", "Trainer", "quickstart", "watch"]
