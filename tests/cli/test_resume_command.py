"""``automode resume``: what it refuses, what it shows, and a script that it brings to its end."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from automode.session import Record, Session, SessionStore

DIGEST = "sha256:" + "9f" * 32


def session(path: Path, *, kinds: tuple[str, ...] = ("checkpointed",), **header: Any) -> Path:
    bodies = {
        "checkpointed": {"checkpoint": DIGEST, "step": 7, "why": "signal"},
        "run_ended": {"step": 9, "why": "max_epochs", "weights": DIGEST},
    }
    started = {
        "executable": sys.executable,
        "arguments": ["train me.py", "--lr", "0.1"],
        "cwd": str(path.parent),
    }
    with SessionStore.create(
        path, header={"project": "p", "run_name": "r", "started": started, **header}
    ) as store:
        for seq, kind in enumerate(kinds, 1):
            record = Record(seq=seq, role="input", kind=kind, v=1, body=bodies[kind], t_wall=0.0, t_mono=0.0)
            store.write([record], durable=True)
    return path


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"kinds": ("checkpointed", "run_ended")}, "has come to its end"),
        ({"kinds": ()}, "holds no checkpoint"),
        ({"started": {"executable": sys.executable, "arguments": None, "cwd": "/"}}, "does not say how"),
        ({"started": None}, "AUTOMODE_RESUME="),
        (
            {"started": {"executable": sys.executable, "arguments": ["x"], "cwd": "/no/such"}},
            "/no/such is no longer there",
        ),
        (
            {"started": {"executable": "/no/python", "arguments": ["x"], "cwd": "/"}},
            "/no/python is no longer there",
        ),
    ],
)
def test_what_cannot_go_on_is_refused_in_words(
    given: dict[str, Any], says: str, cli: Any, tmp_path: Path
) -> None:
    assert says in cli("resume", session(tmp_path / "s", **given), "--yes", code=1).output


def test_a_run_that_still_goes_on_is_refused(cli: Any, tmp_path: Path) -> None:
    path = session(tmp_path / "s")
    with SessionStore.open(path):
        assert "is being written" in cli("resume", path, "--yes", code=1).output


def test_the_command_is_shown_and_not_run_where_nobody_can_be_asked(cli: Any, tmp_path: Path) -> None:
    said = cli("resume", session(tmp_path / "s"), code=1).output
    assert "stopped at step 7 (signal)" in said
    assert f"cd {tmp_path}" in said
    assert f"{sys.executable} 'train me.py' --lr 0.1" in said
    assert "give --yes" in said


SCRIPT = """
import os, signal, sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from automode import Trainer

torch.manual_seed(int(sys.argv[1]))
inputs = torch.randn(40, 5)
model = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
updates = 0

def stop(*_):
    global updates
    updates += 1
    if updates == 7 and "AUTOMODE_RESUME" not in os.environ and "WHOLE" not in os.environ:
        os.kill(os.getpid(), signal.SIGTERM)

optimizer.register_step_post_hook(stop)
Trainer(max_epochs=2, session_dir="runs", progress=False).fit(
    model=model, optimizer=optimizer, loss_fn=nn.CrossEntropyLoss(),
    train_loader=DataLoader(TensorDataset(inputs, (inputs[:, 0] > 0).long()), batch_size=4, shuffle=True),
)
print("weights", [float(value) for p in model.parameters() for value in p.detach().flatten()])
"""


def weights(text: str) -> str:
    return next(line for line in text.splitlines() if line.startswith("weights"))


@pytest.mark.torch
def test_a_script_that_was_terminated_is_run_again_and_comes_to_its_own_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "elsewhere").mkdir()
    from automode.trainer.random_state import forked_rng

    with monkeypatch.context() as patch, forked_rng():
        patch.chdir(tmp_path)
        patch.setenv("WHOLE", "1")
        patch.setattr(sys, "argv", ["train.py", "5"])
        runpy.run_path("train.py", run_name="__main__")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}

    def run(*command: str, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    stopped = run("train.py", "5")
    assert stopped.returncode == 143, stopped.stderr
    assert "stopped at step 7, whose state is stored; go on with: automode resume" in stopped.stdout
    path = max((tmp_path / "runs" / "default").iterdir(), key=lambda folder: folder.stat().st_mtime_ns)
    command = "from automode.cli.main import main; main()"
    resumed = run("-c", command, "resume", str(path), "--yes", cwd=tmp_path / "elsewhere")
    assert resumed.returncode == 0, resumed.stderr
    assert "train.py 5" in resumed.stdout
    assert f"resumed {path} at step 7 (epoch 1, batch 7)" in resumed.stdout
    assert weights(resumed.stdout) == weights(capsys.readouterr().out)
    with Session.open(path) as found:
        assert len(list(found.events("resumed"))) == 1
