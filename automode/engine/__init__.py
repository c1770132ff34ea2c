"""The engine room: the fold over planner and scheduler, its replay, and the story behind a card."""

from __future__ import annotations

from automode.engine.guarding import healthy
from automode.engine.machine import handle, initial
from automode.engine.recovery import Recovered, recover
from automode.engine.replay import Difference, Outcome, fold
from automode.engine.state import State
from automode.engine.story import story
from automode.engine.whatif import WhatIf, what_if

__all__ = [
    "Difference",
    "Outcome",
    "Recovered",
    "State",
    "WhatIf",
    "fold",
    "handle",
    "healthy",
    "initial",
    "recover",
    "story",
    "what_if",
]
