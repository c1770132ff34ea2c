"""The engine room: the fold over planner and scheduler, its replay, and the story behind a card."""

from __future__ import annotations

from automode.engine.machine import handle, initial
from automode.engine.replay import Difference, Outcome, fold
from automode.engine.state import State
from automode.engine.story import story

__all__ = ["Difference", "Outcome", "State", "fold", "handle", "initial", "story"]
