"""The guard's benchmark: what it reads back from a session is what the session judged, and what it counts is what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from automode.session import Session
from automode.trainer.heldout import HeldOut


@pytest.fixture(scope="module")
def bench(benchmark_modules: Callable[..., Any]) -> Any:
    return benchmark_modules(guard="guard", sessions="_guard_sessions", tasks="_guard_tasks")


def decision(bench: Any, **more: Any) -> Any:
    plain = {
        "task": "moons",
        "seed": 1,
        "own_cards": True,
        "kind": "ema",
        "candidate": "t0:ema",
        "look": 1,
        "metric": "utility",
        "verdict": "accepted",
        "z": 2.0,
        "n": 400,
        "gain": 0.01,
        "gain_se": 0.001,
        "error": -0.05,
        "loss": -0.05,
        "points": 1.0,
    }
    return bench.sessions.Decision(**(plain | more))


def test_a_share_has_an_exact_interval(bench: Any) -> None:
    assert bench.guard.share(3, 232) == "3/232 = 0.013 [0.003, 0.037]"
    assert bench.guard.share(0, 7) == "0/7 = 0.000 [0.000, 0.410]"
    assert bench.guard.share(0, 0) == "none"


@pytest.mark.parametrize(
    ("changes", "worse"),
    [
        ({}, set()),
        ({"gain": -0.0005}, {"metric"}),
        ({"gain": -0.002}, {"metric", "surely"}),
        ({"error": 0.005, "points": -0.1}, {"error"}),
        ({"error": 0.02, "points": -0.3}, {"error", "by 1 %", "by .2"}),
        ({"error": 0.02, "loss": 0.02, "points": float("nan")}, {"error", "loss", "by 1 %"}),
    ],
)
def test_worse_is_what_its_name_says(bench: Any, changes: dict[str, float], worse: set[str]) -> None:
    seen = decision(bench, **changes)
    assert {name for name, test in bench.guard.WORSE.items() if test(seen)} == worse


def test_too_much_harm_is_no_success(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fine = [decision(bench)] * 480 + [decision(bench, verdict="inconclusive", error=0.5, gain=-0.1)] * 20
    harmed = replace(decision(bench), gain=-0.01, error=0.01)
    assert bench.guard.report([bench.sessions.Outcome(decisions=fine, cards=[], refused=[])])
    assert not bench.guard.report(
        [bench.sessions.Outcome(decisions=fine + [harmed] * 30, cards=[], refused=[])]
    )
    assert not bench.guard.report(
        [bench.sessions.Outcome(decisions=[*fine, replace(harmed, error=0.03)], cards=[], refused=[])]
    )
    told = capsys.readouterr().out
    assert "MISSED accepted and worse (metric or error) <= 5%: 5.7%" in told
    assert "MISSED worst <= 2% relative error: 3.00 %" in told


@pytest.mark.slow
def test_what_is_scored_is_what_the_session_judged(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scored on val-B in place of the test set, every state gives the very numbers that the session compared."""
    sessions, tasks = bench.sessions, bench.tasks
    monkeypatch.setattr(tasks, "TEST", 500)
    monkeypatch.setattr(sessions, "EPOCHS", 36)
    seed, kinds = 1, ("rates", "average", "interpolation")
    shares = (0.1, 0.3, 0.5)
    plan = replace(
        tasks.plan("blobs", seed, own_cards=True),
        rate=1e-3,
        cosine=False,
        sgd=False,
        cards={at: (kind, 0.03) for at, kind in zip(shares, kinds, strict=True)} | {0.7: ("merge", 0.0)},
    )
    monkeypatch.setattr(sessions, "plan", lambda *_, **__: plan)
    seen: list[tuple[str, float, float]] = []
    read = sessions._read

    def compared(session: Session, judge: Any, given: Any) -> Any:
        data = tasks.TASKS["blobs"].make(seed)
        held = HeldOut(DataLoader(TensorDataset(*data.val), batch_size=512), torch.device("cpu"), seed)
        rows = torch.from_numpy(np.flatnonzero(~held.is_a(np.arange(len(data.val[0])))))
        judge._x, judge._y = (part[rows] for part in data.val)
        answers = {r.body["card"]: r.body for r in session.events(kind="evaluated")}
        for look in (r.body for r in session.events(kind="evaluate")):
            mixture = look["candidate"] == "mixture"
            scores = (
                judge.scores(look["weights"], mixture=mixture),
                judge.scores(look["control"], mixture=False),
            )
            difference = float((scores[0].by(look["metric"]) - scores[1].by(look["metric"])).mean())
            seen.append((look["candidate"], difference, answers[look["card"]]["overall"]["mean"]))
        return read(session, judge, given)

    monkeypatch.setattr(sessions, "_read", compared)
    outcome = sessions.decided("blobs", seed, own_cards=True)
    assert not outcome.refused
    assert len(outcome.cards) == 5
    assert len(seen) == len(outcome.decisions) >= 2, seen
    for candidate, scored, judged in seen:
        assert scored == pytest.approx(judged, abs=1e-9), candidate
    assert not any(word in card for card in outcome.cards for word in ("failed", "stale"))
