"""Trains one small run, in a process of its own that may be killed at any of its system calls; see ``test_killed_everywhere``.

Reads lines of JSON from standard input and forks a trainer for each: ``folder``, ``backend``, ``resume``, ``kill``, the number of
the call that it does not live through (0: it lives), and ``stop``, the step at which it gets a SIGTERM (0: none). Answers
with the exit status, 9 for a kill.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sqlite3
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import sklearn.cluster  # noqa: F401  # what a scan would import, once for all
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import automode.trainer.clusters
from automode import Policy, Trainer
from automode.backends.inline import InlineBackend
from automode.backends.process import ProcessBackend
from automode.session import database
from automode.trainer import run_parts

STEPS = 72
CALLS = ("replace", "fsync", "unlink", "rmdir", "mkdir")
POLICY = Policy.model_validate(
    {
        "reasons": ["learning_rate_probe", "loss_plateau", "merge_cadence", "high_loss_tail"],
        "budget": "on_top",
        "approval": {"ask": []},
        "trend": {"budget": 40, "gain": 0.95},
        "scan": {"every": 9, "probe": 32, "share": None, "cost": 1.0, "tail_ratio": 1.01},
        "averages": {"finish_at": 0.7},
        "probe": {"share": 1.0, "restart_share": 1.0, "until": 0.5},
        "diagnostics": {"enabled": False},
        "pacing": {
            "min_rung": 2,
            "warmup_steps": 0,
            "cooldown_steps": 5,
            "max_cards": 4,
            "exploration_share": 1.0,
            "total_share": 1.0,
        },
        "evidence": {"min_samples": 10, "z": 0.0, "alpha": 0.45},
    }
)


class Calls:
    """Counts system calls of ours around files, and ends the process before the one that it is told."""

    def __init__(self, folder: Path, kill: int) -> None:
        self.made = 0
        self._folder = folder
        self._kill = kill
        self._me = os.getpid()

    def count(self, path: object) -> None:
        """Another call is due."""
        if os.getpid() != self._me or not str(path).startswith(str(self._folder)):
            return
        self.made += 1
        if self.made == self._kill:
            os._exit(9)

    def watch(self) -> None:
        """Wrap the calls."""
        opened: dict[int, object] = {}
        for name in CALLS:
            setattr(os, name, self._wrapped(name, getattr(os, name), opened))
        real = os.open

        def recording(path: Any, *args: Any, **kwargs: Any) -> int:
            handle = real(path, *args, **kwargs)
            opened[handle] = path
            return handle

        os.open = recording  # type: ignore[assignment]
        calls = self

        class Connection(sqlite3.Connection):
            def execute(self, sql: str, *args: Any) -> Any:
                committing = sql == "COMMIT"
                if committing:
                    calls.count(calls._folder)
                done = super().execute(sql, *args)
                if committing:
                    calls.count(calls._folder)
                return done

        connect = sqlite3.connect
        database.sqlite3 = type(sys)("sqlite3")  # type: ignore[attr-defined]
        vars(database.sqlite3).update(vars(sqlite3))  # type: ignore[attr-defined]
        database.sqlite3.connect = lambda *a, **k: connect(*a, **k, factory=Connection)  # type: ignore[attr-defined]

    def _wrapped(self, name: str, real: Any, opened: dict[int, object]) -> Any:
        def call(target: Any, *args: Any, **kwargs: Any) -> Any:
            where = opened.get(target, self._folder) if isinstance(target, int) else target
            self.count(where if Path(str(where)).is_absolute() else self._folder)
            return real(target, *args, **kwargs)

        return call


def data(n: int, seed: int) -> TensorDataset:
    """A task of three classes."""
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x[:, :3].abs().argmax(1))


def count_segments(file: Path) -> None:
    """Write a line for every segment that a backend is given; let the trunk wait for workers, as it would not for itself."""
    for kind in (InlineBackend, ProcessBackend):

        def submitted(self: Any, job: Any, submit: Any = kind.submit) -> None:
            with file.open("a") as lines:
                lines.write(f"{job.card} {job.trial} {job.to_resource}\n")
            submit(self, job)

        kind.submit = submitted  # type: ignore[method-assign]
    pump = ProcessBackend.pump

    def patient(self: Any, trunk_steps: int) -> Any:
        until = time.monotonic() + 600.0
        while not (ended := pump(self, trunk_steps)) and self.busy and time.monotonic() < until:
            self.wait(0.1)
        return ended

    ProcessBackend.pump = patient  # type: ignore[method-assign]


steps = itertools.count(1)


def stop_at(step: int) -> None:
    """Ask this process to end, as a cluster does, while its optimizer makes a step."""
    if next(steps) == step:
        os.kill(os.getpid(), signal.SIGTERM)


def train(folder: Path, *, backend: Any, resume: bool, kill: int, stop: int) -> None:
    """Train the run, or what is left of it."""
    calls = Calls(folder, kill)
    count_segments(folder.parent / f"{folder.name}-segments")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0, momentum=0.9)
    optimizer.register_step_post_hook(lambda *_: stop_at(stop))
    if not resume:
        folder.mkdir(parents=True)
        run_parts.new_session_folder = lambda *_: folder  # type: ignore[assignment]
    calls.watch()
    Trainer(
        max_steps=STEPS,
        automode="act",
        policy=POLICY,
        session_dir=folder.parent,
        seed=3,
        progress=False,
        console=False,
        backend=backend,
        checkpoint_every="5 steps",
        resume=folder if resume else None,
    ).fit(
        model=model,
        optimizer=optimizer,
        loss_fn=nn.CrossEntropyLoss(),
        train_loader=DataLoader(
            data(150, 1), batch_size=32, shuffle=True, generator=torch.Generator().manual_seed(6)
        ),
        val_loader=DataLoader(data(64, 2), batch_size=32),
    )
    (folder.parent / f"{folder.name}-calls").write_text(str(calls.made))


def main() -> None:
    """Fork a trainer for each line."""
    torch.set_num_threads(1)
    assert automode.trainer.clusters
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                train(
                    Path(order["folder"]),
                    backend=order["backend"],
                    resume=order["resume"],
                    kill=order["kill"],
                    stop=order["stop"],
                )
                status = 0
            except SystemExit as error:
                status = int(error.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
