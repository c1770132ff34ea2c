"""A stand-in for the driver: it records what the loop tells it, and writes the smallest session that opens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from automode.planner.events import Mode
from automode.session import SessionStore
from automode.trainer import running
from automode.trainer.evaluation import PerSampleScores
from automode.trainer.observation_block import Block
from automode.trainer.run_parts import RunParts

UNLIMITED = 1 << 62


@dataclass
class RecordingObserver:
    """Does nothing but remember, in the order in which it is told."""

    limit: int = UNLIMITED
    guard: bool = False
    busy: bool = False
    charged_steps: float = 0.0
    stop_requested: str | None = None
    stride: int = 32
    mode: Mode = "observe"
    path: Path | None = None
    compute: dict[str, int] = field(default_factory=dict)
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)

    @classmethod
    def opened(cls, parts: RunParts) -> RecordingObserver:
        with SessionStore.create(parts.session_path, header={"project": parts.settings.project}):
            pass
        total = parts.plan.total
        return cls(
            limit=UNLIMITED if total is None else total,
            guard=parts.mode == "act" and parts.policy.safeguards.skip_nonfinite,
            mode=parts.mode,
            path=parts.session_path,
        )

    def block(self, block: Block) -> None:
        self.blocks.append(block)
        self.calls.append(("block", block.first_row, len(block.rows)))

    def tick(self, step: int) -> bool:
        self.calls.append(("tick", step))
        return False

    def boundary(self, step: int) -> None:
        self.calls.append(("boundary", step))

    def skipped(self, step: int, why: str) -> None:
        self.calls.append(("skipped", step, why))

    def stepped(self) -> None:
        self.calls.append(("stepped",))

    def validated(self, step: int, scores: PerSampleScores) -> None:
        self.calls.append(("validated", step, scores))

    def finish(self, step: int, why: str, *, early: bool = False) -> None:
        self.calls.append(("finish", step, why))

    def abort(self, step: int, error: BaseException) -> None:
        self.calls.append(("abort", step, error))

    def column(self, name: str) -> list[float]:
        return np.concatenate([block.rows[:, block.names.index(name)] for block in self.blocks]).tolist()

    def told(self, kind: str) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] == kind]


@pytest.fixture
def observers(monkeypatch: pytest.MonkeyPatch) -> list[RecordingObserver]:
    """Every ``fit`` of the test gets a stand-in in place of the driver; here they are, in order."""
    opened: list[RecordingObserver] = []

    def open_driver(parts: RunParts) -> RecordingObserver:
        opened.append(RecordingObserver.opened(parts))
        return opened[-1]

    monkeypatch.setattr(running, "_open_driver", open_driver)
    return opened


@pytest.fixture
def observer_of() -> Callable[[RunParts], RecordingObserver]:
    """Opens a stand-in for a prepared run."""
    return RecordingObserver.opened
