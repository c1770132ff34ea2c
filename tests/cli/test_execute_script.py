"""``replay --card --execute``: the user's own script, unchanged, runs a card again in a process of its own."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from automode.cli import executing
from automode.errors import UsageError
from automode.session import Session

SCRIPT = """\
import sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from automode import Policy, Trainer

def main():
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 64
    torch.manual_seed(0)
    x = torch.randn(n + 80, 4, generator=torch.Generator().manual_seed(1))
    y = (x[:, 0] > 0).long()
    model = nn.Linear(4, 2)
    policy = Policy.model_validate({"reasons": ["merge_cadence"], "budget": "on_top", "evidence": {"min_samples": 20},
        "pacing": {"total_share": 1.0, "exploration_share": 1.0, "warmup_steps": 0}})
    Trainer(project="p", run_name="r", automode=True, policy=policy, max_steps=60, seed=0, console=False, session_dir="runs").fit(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        loss_fn=nn.CrossEntropyLoss(),
        train_loader=DataLoader(TensorDataset(x[:n], y[:n]), batch_size=16, shuffle=True),
        val_loader=DataLoader(TensorDataset(x[n:], y[n:]), batch_size=40),
    )
    print("trained")

if __name__ == "__main__":
    main()
"""


@pytest.mark.nightly  # two processes that load torch; the parts are tested by themselves, here and beside the trainer
def test_a_script_runs_its_card_again_and_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained here, to save a process; run again by the command line's own process and the script's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    (tmp_path / "train.py").write_text(SCRIPT)
    runpy.run_path("train.py", run_name="__main__")
    (session,) = [file.parent for file in tmp_path.glob("runs/*/*/session.db")]
    with Session.open(session) as opened:
        (card,) = [row.card_id for row in opened.cards()]
    code = "from automode.cli.main import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "replay",
        str(session),
        "--card",
        card[:5],
        "--execute",
        "train:main",
        "--",
        "64",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"card {card}: the outcome is the same" in done.stdout
    assert "trained" not in done.stdout
    assert len(list(tmp_path.glob("runs/*/*/session.db"))) == 1


@pytest.mark.parametrize(("same", "code"), [("true", 0), ("false", 1)])
def test_what_the_trainer_reports_is_the_exit_code(
    cli: Any, told: Any, card: Any, tmp_path: Path, same: str, code: int
) -> None:
    told.propose(card)
    script = tmp_path / "report.py"
    script.write_text(
        "import os, sys\n"
        f"assert os.environ['AUTOMODE_EXECUTE_CARD'] == {f'{told.path}:{card.id}'!r}\n"
        "assert sys.argv[1:] == ['--lr', '1']\n"
        f"open(os.environ['AUTOMODE_EXECUTE_REPORT'], 'w').write('{{\"same\": {same}}}')\n"
    )
    arguments = ("--card", card.id, "--execute", script, "--", "--lr", "1")
    assert f"running card {card.id} again in" in cli("replay", told.path, *arguments, code=code).output


def test_a_script_is_a_file_or_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")
    assert executing._command("train.py", ["--lr", "1"]) == [sys.executable, "train.py", "--lr", "1"]
    assert executing._command("pkg.train:main", ["1"])[3:] == ["pkg.train:main", "1"]
    for neither in ("gone.py", "pkg.train", "pkg train:main", "pkg:", ":main"):
        with pytest.raises(UsageError, match="takes a script, or module:function"):
            executing._command(neither, [])


def test_a_script_that_fails_is_told(cli: Any, told: Any, card: Any, tmp_path: Path) -> None:
    told.propose(card)
    (tmp_path / "broken.py").write_text("raise SystemExit(3)\n")
    out = cli("replay", told.path, "--card", card.id, "--execute", tmp_path / "broken.py", code=1).output
    assert "ended with exit code 3 before the card had run again" in out


def test_what_does_not_go_together_is_told(cli: Any, live: Any, tmp_path: Path) -> None:
    assert "--card and --execute go together" in cli("replay", live.path, "--card", "c7", code=1).output
    assert "--card and --execute go together" in cli("replay", live.path, "--execute", "a.py", code=1).output
    assert "arguments are for the script" in cli("replay", live.path, "more", code=1).output
    out = cli("replay", live.path, "--card", "c7", "--execute", "a.py", "--policy", "default", code=1).output
    assert "give one of them" in out
    assert (
        "this session has none"
        in cli("replay", live.path, "--card", "c7", "--execute", "a.py", code=1).output
    )


def test_a_script_that_trains_nothing_is_told(cli: Any, told: Any, card: Any, tmp_path: Path) -> None:
    told.propose(card)
    (tmp_path / "idle.py").write_text("print('nothing')\n")
    out = cli("replay", told.path, "--card", card.id, "--execute", tmp_path / "idle.py", code=1).output
    assert "ended without calling Trainer.fit, so nothing was run again" in out
    out = cli("replay", told.path, "--card", card.id, "--execute", "no/such.py", code=1).output
    assert "--execute takes a script, or module:function" in out
