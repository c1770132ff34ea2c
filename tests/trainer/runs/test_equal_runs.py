"""Two runs of one seed decide the same at the same steps, however long their steps take."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from automode import Trainer, replay
from automode.planner.policy import Policy
from automode.session import Session
from automode.trainer import loop, run_parts
from automode.trainer.agenda import stride_of

POLICY = Policy.model_validate(
    {
        "reasons": ["loss_plateau", "merge_cadence", "high_loss_tail"],
        "trend": {"budget": 40, "gain": 0.9},
        "scan": {"every": 15, "probe": 64, "share": None, "tail_ratio": 1.01},
        "averages": {"finish_at": 0.6},
        "approval": {"ask": []},
        "pacing": {
            "min_rung": 4,
            "warmup_steps": 0,
            "cooldown_steps": 5,
            "exploration_share": 0.6,
            "total_share": 0.9,
        },
        "evidence": {"min_samples": 20, "z": 0.0, "alpha": 0.45},
    }
)
TIMED = ("seconds", "rest")
"""What is measured with a clock, and so differs from run to run."""


def run(folder: Path, made: dict[str, Any], sleeps: random.Random | None, patch: pytest.MonkeyPatch) -> Path:
    """Train the script in act mode, with or without sleeps at random steps; the session's name makes the ids of cards."""
    folder = folder / "session"
    folder.mkdir(parents=True)
    patch.setattr(run_parts, "new_session_folder", lambda *_: folder)

    def sleep(*_: Any) -> None:
        if sleeps is not None and sleeps.random() < 0.3:
            time.sleep(0.001 + 0.004 * sleeps.random())

    made["optimizer"].register_step_post_hook(sleep)
    Trainer(
        max_steps=210,
        automode="act",
        policy=POLICY,
        session_dir=folder,
        seed=3,
        progress=False,
        console=False,
        scheduler_interval="step",
    ).fit(**made)
    return folder


def decisions(path: Path) -> list[Any]:
    """Everything in the log but what a clock has measured."""
    with Session.open(path) as session:
        return [
            (r.seq, r.role, r.kind, r.cause, r.command_id, r.effective_at, r.frame_cursor, _untimed(r.body))
            for r in session.events()
        ]


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _untimed(v) for k, v in value.items() if k not in TIMED}
    return [_untimed(v) for v in value] if isinstance(value, list) else value


def test_random_sleeps_change_no_decision_and_no_step_of_one(
    tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = decisions(run(tmp_path / "first", script(rate=0.003).build(), None, monkeypatch))
    monkeypatch.setattr(loop, "TICK_SECONDS", 0.002)
    monkeypatch.setattr(loop, "ROWS_SECONDS", 0.004)
    path = run(tmp_path / "second", script(rate=0.003).build(), random.Random(1), monkeypatch)
    second = decisions(path)
    kinds = [entry[2] for entry in first]
    for kind in ("card_proposed", "snapshotted", "trial_reported", "verdict_given", "scanned"):
        assert kind in kinds
    for mine, theirs in zip(first, second, strict=True):
        assert mine == theirs
    assert replay(path).differences == 0


def test_a_stride_is_whole_looks_and_longer_where_nothing_is_acted_on() -> None:
    every = (1, 2, 5, 16, 20, 31, 40, 500)
    assert [stride_of(n, acts=True) for n in every] == [16, 16, 15, 16, 20, 31, 32, 32]
    assert [stride_of(n, acts=False) for n in every] == [128, 128, 125, 128, 120, 124, 120, 128]
