"""A real training process killed with SIGKILL while cards run: what it leaves behind opens, verifies and replays."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from automode.planner.events import RunEnded
from automode.session import Session, SessionStore
from automode.session.checkpoints import CheckpointStore

MOMENTS = ("session_started", "scanned", "card_started", "trial_reported", "evaluate", "verdict_given")
"""What the log holds when a trainer is killed, some moments later."""
SEED = 20261121

# One process imports torch once and forks a trainer for each line that it reads: six kills cost one import.
PARENT = """
import os, sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from automode import Policy, Trainer
import automode.trainer.clusters, sklearn.cluster  # what a scan would import

torch.set_num_threads(1)
POLICY = Policy.model_validate({
    "reasons": ["loss_plateau", "merge_cadence", "high_loss_tail"],
    "budget": "on_top",
    "approval": {"ask": []},
    "trend": {"budget": 40, "gain": 0.9},
    "scan": {"every": 30, "probe": 64},
    "pacing": {"min_rung": 4, "warmup_steps": 0, "cooldown_steps": 5, "max_cards": 1000, "exploration_share": 1.0,
               "total_share": 1.0},
    "evidence": {"min_samples": 20, "z": 0.0, "alpha": 0.45},
})

def data(n, seed):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x[:, :3].abs().argmax(1))

def train(folder):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
    Trainer(max_steps=100_000, automode="act", policy=POLICY, session_dir=folder, seed=3, progress=False,
            console=False).fit(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9),
        loss_fn=nn.CrossEntropyLoss(),
        train_loader=DataLoader(data(150, 1), batch_size=32, shuffle=True),
        val_loader=DataLoader(data(160, 2), batch_size=80),
    )

print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        train(line.strip())
        os._exit(0)
    print(pid, flush=True)
    _, status = os.waitpid(pid, 0)
    print("killed" if os.WIFSIGNALED(status) else f"ended {status}", flush=True)
"""


@pytest.fixture
def nursery() -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PARENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=30)


def killed_after(nursery: subprocess.Popen[str], folder: Path, kind: str, seconds: float) -> Path:
    """Let a trainer run until its log holds such an event, and for so long after it; kill it, and give the session's folder."""
    assert nursery.stdin is not None
    assert nursery.stdout is not None
    nursery.stdin.write(f"{folder}\n")
    nursery.stdin.flush()
    pid = int(nursery.stdout.readline())
    until = time.monotonic() + 200
    while not (list(folder.glob("*/*/log.jsonl")) and (kind == "session_started" or told(folder, kind))):
        assert time.monotonic() < until, f"the trainer never told a {kind}"
        time.sleep(0.005)
    time.sleep(seconds)
    children = psutil.Process(pid).children(recursive=True)
    os.kill(pid, signal.SIGKILL)
    assert nursery.stdout.readline() == "killed\n"
    assert not psutil.pid_exists(pid)
    assert not [child for child in children if child.is_running()]
    (path,) = [found.parent for found in folder.glob("*/*/session.db")]
    return path


def told(folder: Path, kind: str) -> bool:
    """Tell whether the session's log holds such an event by now."""
    (path,) = folder.glob("*/*/session.db")
    with Session.open(path) as session:
        return next(session.events(kind), None) is not None


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its trainers")
def test_a_trainer_killed_at_random_moments_leaves_a_session_that_replays(
    nursery: subprocess.Popen[str], tmp_path: Path, soundness: object
) -> None:
    chance = random.Random(SEED)
    kinds: set[str] = set()
    rows = 0
    for turn, kind in enumerate(MOMENTS):
        path = killed_after(nursery, tmp_path / f"run{turn}", kind, chance.uniform(0.0, 0.2))
        soundness(path, ended=False)  # type: ignore[operator]
        store = CheckpointStore(path / "checkpoints")
        with Session.open(path) as session:
            events = list(session.events())
            kinds |= {event.kind for event in events}
            rows += session.rows()
            recorded = {
                row.digest
                for row in session.checkpoints()
                if row.kind in ("base", "control", "before", "adopted")
            }
        assert events[0].kind == "session_started"
        assert "run_ended" not in kinds
        assert recorded <= set(store.digests())  # what the log speaks of was durable first
        store.sweep()
        assert not [folder for folder in store.root.iterdir() if len(folder.name) != 64]
        with SessionStore.open(path) as taken_up:  # the dead writer's lock is gone
            assert taken_up.next_seq == len(events) + 1
    assert rows > 100
    assert {"card_started", "trial_reported", "verdict_given"} <= kinds
    assert RunEnded.model_fields["kind"].default not in kinds
