"""Record the sessions that later versions have to replay: a few short runs, each kept as an archive without its weights.

    python tests/golden/record.py [NAME ...]

Run it when decisions were changed on purpose (together with ``PLANNER_VERSION``), and read the difference that
``automode replay`` showed before you do. What tells of the machine that recorded it (command line, folders) is left out.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

import automode
from automode import Trainer
from automode.session.archive import export_session

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))

from _matched_tasks import TASKS  # noqa: E402 - benchmarks are no package
from _rescue_scripts import broken, loader_of, script  # noqa: E402
from matched_compute import one_run  # noqa: E402

SEED = 5000  # of development: no figure is reported for it


def wrong_labels(folder: str) -> None:
    """A fifth of the labels is wrong: probe, scan, a card that leaves samples out, adoption, and the finish."""
    task = TASKS["digits4_n20"]
    one_run(task, task.make(300), 300, 3e-3, 0.01, "default", True, folder)


def damaged(network: str, fault: str) -> Callable[[str], None]:
    """A script of ``benchmarks/rescue.py`` with a fault, in act mode."""

    def run(folder: str) -> None:
        given, _ = broken(fault, script(network, SEED), SEED)
        torch.manual_seed(SEED)
        model = given.network()
        Trainer(
            max_epochs=given.epochs,
            automode=True,
            session_dir=folder,
            val_every_n_epochs=max(1, given.epochs // 50),
            seed=SEED,
            progress=False,
            console=False,
            checkpoint_every=None,
        ).fit(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters(), lr=given.rate, weight_decay=given.decay),
            loss_fn=given.loss,
            train_loader=loader_of(given, SEED),
            val_loader=DataLoader(TensorDataset(*given.val), batch_size=512),
        ).session.close()

    return run


def watched(folder: str) -> None:
    """A loop by hand whose rate is raised until it comes apart, in propose mode."""
    torch.manual_seed(SEED)
    x = torch.randn(512, 8)
    y = (x[:, :3].sum(dim=1, keepdim=True)).tanh()
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with automode.watch(
        model, optimizer, mode="propose", session_dir=folder, total_steps=600, batch_size=32
    ) as watch:
        for step in range(600):
            rows = torch.arange(step * 32, step * 32 + 32) % len(x)
            if step == 400:
                optimizer.param_groups[0]["lr"] = 3.0
            with watch.step() as s:
                optimizer.zero_grad()
                loss = torch.nn.functional.mse_loss(model(x[rows]), y[rows])
                loss.backward()
                optimizer.step()
                s.loss(loss)


RUNS: dict[str, Callable[[str], None]] = {
    "wrong_labels": wrong_labels,
    "rate_too_low": damaged("mlp", "rate /10"),
    "rate_too_high": damaged("mlp", "rate x10"),
    "nan_batches": damaged("mlp", "nan"),
    "watched": watched,
}


def keep(session: Path, target: Path) -> None:
    """Archive what replay reads, without a word about this machine."""
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder) / target.stem
        bare.mkdir()
        shutil.copy(session / "session.db", bare)
        with closing(sqlite3.connect(bare / "session.db")) as database, database:
            ((text,),) = database.execute("SELECT value FROM meta WHERE key = 'header'").fetchall()
            header = json.loads(text) | {"command": [], "started": None}
            database.execute("UPDATE meta SET value = ? WHERE key = 'header'", (json.dumps(header),))
        target.unlink(missing_ok=True)
        export_session(bare, target, checkpoints=False)


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:] or RUNS:
        with tempfile.TemporaryDirectory() as folder:
            RUNS[name](folder)
            (database,) = Path(folder).rglob("session.db")
            keep(database.parent, HERE / f"{name}.zip")
        sys.stdout.write(f"{name}: {(HERE / f'{name}.zip').stat().st_size / 1024:.0f} KiB\n")


if __name__ == "__main__":
    main()
