"""Training scripts that are cut and taken up, and a server that runs them in fresh processes, forked from one that has loaded torch.

As a program it reads jobs from standard input, a JSON object a line, forks a process for each, and answers with a line of its
own: what the job returned, or its error. As a module it is that program's client.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

ROWS, BATCH, EPOCHS = 80, 8, 2
STEPS = ROWS // BATCH * EPOCHS


@dataclass(frozen=True)
class Cell:
    """One combination of what a script may be made of."""

    workers: int = 0
    dropout: bool = False
    per_step: bool = False
    accumulation: int = 1
    generator: bool = False
    noisy: bool = False


class Noisy(Dataset[Any]):
    """Samples that are augmented with random numbers of every kind as they are read."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets
        self.own = np.random.default_rng(8)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Any:
        drawn = random.random() + float(np.random.rand()) + float(self.own.random())  # noqa: NPY002
        return self.inputs[index] + 0.1 * torch.randn(5) + 0.01 * drawn, self.targets[index]


def script(cell: Cell) -> dict[str, Any]:
    random.seed(3)
    np.random.seed(4)  # noqa: NPY002
    torch.manual_seed(5)
    inputs = torch.randn(ROWS, 5)
    targets = (inputs[:, 0] + inputs[:, 1] > 0).long()
    model = nn.Sequential(
        nn.Linear(5, 12),
        nn.BatchNorm1d(12),
        nn.ReLU(),
        nn.Dropout(0.3 if cell.dropout else 0.0),
        nn.Linear(12, 2),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    if cell.per_step:
        scheduler: Any = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=STEPS + 1)
    else:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    return {
        "model": model,
        "optimizer": optimizer,
        "loss_fn": nn.CrossEntropyLoss(),
        "train_loader": DataLoader(
            (Noisy if cell.noisy else TensorDataset)(inputs, targets),
            batch_size=BATCH,
            shuffle=True,
            num_workers=cell.workers,
            generator=torch.Generator().manual_seed(9) if cell.generator else None,
        ),
        "val_loader": DataLoader(
            TensorDataset(torch.randn(40, 5), torch.randint(0, 2, (40,))), batch_size=16
        ),
        "scheduler": scheduler,
    }


def trainer(cell: Cell, folder: Path, **given: Any) -> Any:
    from automode import Trainer
    from automode.planner.policy import Policy
    from automode.trainer import run_parts

    run_parts.secrets.randbits = lambda _: 7  # type: ignore[assignment]  # the seed of a fresh session
    settings: dict[str, Any] = {
        "max_epochs": EPOCHS,
        "automode": "observe",
        "policy": Policy.model_validate(
            {"scan": {"share": None}}
        ),  # by default the clock says how often to scan
        "session_dir": folder,
        "val_every_n_epochs": 1,
        "scheduler_interval": "step" if cell.per_step else "epoch",
        "progress": False,
        "console": False,
        "seed": None,
    }
    made = Trainer(**{**settings, **given})
    if cell.accumulation > 1:

        @made.training_step
        def step(batch: Any, state: dict[str, Any]) -> dict[str, Any]:
            outputs = state["model"](batch[0])
            loss = state["loss_fn"](outputs, batch[1])
            (loss / cell.accumulation).backward()
            if (state["step"] + 1) % cell.accumulation == 0:
                state["optimizer"].step()
                state["optimizer"].zero_grad()
            return {
                "loss": loss.detach(),
                "outputs": outputs,
                "targets": batch[1],
                "double": 2 * loss.detach(),
            }

    return made


def told(result: Any, made: dict[str, Any], probe: Any, *, accumulates: bool) -> dict[str, Any]:
    """Everything that must be equal bit by bit, as text and digests."""
    generator = made["train_loader"].generator
    own = getattr(made["train_loader"].dataset, "own", None)
    frame = result.session.frames()
    ledger = probe.ledger.state()
    session = result.session
    return {
        "weights": digest(list(made["model"].state_dict().values())),
        "optimizer": digest(tensors(made["optimizer"].state_dict()))
        + str(made["optimizer"].param_groups[0]["lr"]),
        "gradients": digest(
            [p.grad for p in made["model"].parameters() if accumulates and p.grad is not None]
        ),
        "scheduler": json.dumps(made["scheduler"].state_dict(), default=str),
        "random": digest([torch.get_rng_state()]) + str(random.random()) + str(np.random.rand()),  # noqa: NPY002
        "generator": "" if generator is None else digest([generator.get_state()]),
        "own": "" if own is None else str(own.random()),
        "frame": {
            name: hashlib.sha256(column.tobytes()).hexdigest()
            for name, column in sorted(frame.items())
            if name not in ("time", "row", "attempt")
        },
        "history": json.dumps(result.history),
        "ledger": hashlib.sha256(b"".join(c.tobytes() for c in ledger["columns"].values())).hexdigest(),
        "decisions": json.dumps(
            [
                [r.kind, {k: v for k, v in r.body.items() if k not in ("session", "weights", "rest")}]
                for r in session.events()
                if r.role == "fact" or r.kind in ("validated", "scanned", "run_ended")
            ]
        ),
        "reason": result.reason,
        "steps": result.steps,
    }


def digest(values: list[Tensor]) -> str:
    found = hashlib.sha256()
    for value in values:
        found.update(f"{value.shape}{value.dtype}".encode() + value.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors(item)]
    return [t for item in value for t in tensors(item)] if isinstance(value, list | tuple) else []


def fitted(cell: Cell, folder: Path, **given: Any) -> dict[str, Any]:
    """Train and tell; where a run is taken up, random states and the session's seed are first made to be others."""
    from automode.trainer import run_parts
    from automode.trainer import running as module

    parts: list[Any] = []
    prepare, find = module.prepare, module.find

    def noting(*args: Any, **kwargs: Any) -> Any:
        parts.append(prepare(*args, **kwargs))
        return parts[-1]

    def finding(*args: Any) -> Any:
        found = find(*args)
        if found is not None:
            run_parts.secrets.randbits = lambda _: os.getpid()  # type: ignore[assignment]
            torch.manual_seed(os.getpid())
            random.seed(os.getpid())
        return found

    module.prepare, module.find = noting, finding  # type: ignore[assignment]
    made = script(cell)
    result = trainer(cell, folder, **given).fit(**made)
    found = told(result, made, parts[0].probe, accumulates=cell.accumulation > 1)
    return {"told": found, "path": str(result.path)}


def killed(cell: Cell, folder: Path, cuts: list[int], **given: Any) -> dict[str, Any]:
    """Train, and after these batches store the state and copy the session, as a kill at that moment would leave it."""
    from automode.trainer.checkpointing import CheckpointKeeper

    after_step = CheckpointKeeper.after_step
    (folder / "cuts").mkdir(parents=True)

    def copying(keeper: CheckpointKeeper) -> None:
        after_step(keeper)
        batch = keeper._loop.batches
        if batch in cuts:
            assert keeper.save("periodic") is not None
            shutil.copytree(keeper._parts.session_path, folder / "cuts" / f"{batch:03d}")

    CheckpointKeeper.after_step = copying  # type: ignore[method-assign]
    return fitted(cell, folder, **given)


def signalled(cell: Cell, folder: Path, signals: dict[str, list[int]], **given: Any) -> dict[str, Any]:
    """Train and send oneself signals after these updates of the weights; tells how that ended."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    made = script(cell)
    count = 0

    def after(*_: Any) -> None:
        nonlocal count
        count += 1
        for number in signals.get(str(count), ()):
            os.kill(os.getpid(), number)

    made["optimizer"].register_step_post_hook(after)
    error: BaseException | None = None
    try:
        trainer(cell, folder, **given).fit(**made)
    except BaseException as raised:
        error = raised
    return {
        "error": None,
        "raised": type(error).__name__,
        "text": str(error),
        "notes": getattr(error, "__notes__", []),
        "restored": all(signal.getsignal(number) == handler for number, handler in before.items()),
    }


def failing(cell: Cell, folder: Path, where: str, at: int, **given: Any) -> dict[str, Any]:
    """Train a script that fails at one batch: as it is read, in the forward pass, or in the update; tells what was said."""
    made = script(cell)
    count = 0

    def fail_at(*_: Any) -> None:
        nonlocal count
        count += made["model"].training
        if count == at:
            raise ArithmeticError(f"fails in the {where}")

    if where == "forward":
        made["model"].register_forward_pre_hook(fail_at)
    elif where == "update":
        made["optimizer"].register_step_pre_hook(fail_at)
    else:
        loader = made["train_loader"]
        collate = loader.collate_fn
        loader.collate_fn = lambda samples: (fail_at(), collate(samples))[1]
    try:
        trainer(cell, folder, **given).fit(**made)
    except ArithmeticError as error:
        return {"notes": error.__notes__}
    raise AssertionError("it did not fail")


def acknowledging(cell: Cell, folder: Path, **given: Any) -> dict[str, Any]:
    """Train with a checkpoint after every batch, and write down the step of each that was said to be stored.

    In a process group of its own, which its loader's workers join: it can be killed with them.
    """
    from automode.trainer.checkpointing import CheckpointKeeper

    folder.mkdir(exist_ok=True)
    os.setpgid(0, 0)
    (folder / "pid").write_text(str(os.getpid()))
    save = CheckpointKeeper.save

    def noting(keeper: CheckpointKeeper, *args: Any) -> str | None:
        stored = save(keeper, *args)
        assert stored is not None
        with (folder / "acknowledged").open("a") as file:
            file.write(f"{keeper._parts.session_path} {keeper._parts.trunk.step} .\n")
        return stored

    CheckpointKeeper.save = noting  # type: ignore[method-assign]
    return fitted(cell, folder, checkpoint_every="1 steps", **given)


JOBS = {
    "fitted": fitted,
    "killed": killed,
    "signalled": signalled,
    "failing": failing,
    "acknowledging": acknowledging,
}


@contextmanager
def server() -> Iterator[Any]:
    """Start the server; gives ``run(job, cell, folder, **given)``, which answers with what the job returned."""
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "AUTOMODE_RESUME": ""},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    requests, answers = process.stdin, process.stdout

    def run(job: str, cell: Cell, folder: Path, **given: Any) -> dict[str, Any]:
        line = json.dumps({"job": job, "cell": asdict(cell), "folder": str(folder), "given": given})
        requests.write(line + "\n")
        requests.flush()
        answer: dict[str, Any] = json.loads(answers.readline())
        if answer.get("error"):
            raise AssertionError(answer["error"])
        return answer

    try:
        yield run
    finally:
        requests.close()
        process.wait(30)
        answers.close()


def serve() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        # Loads whatever a run loads, once for every process that is forked below.
        trainer(Cell(), Path(folder)).fit(**script(Cell()))
    for line in sys.stdin:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            with os.fdopen(writing, "w") as out:
                out.write(json.dumps(answer_to(json.loads(line))))
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as back:
            said = back.read()
        os.waitpid(child, 0)
        sys.stdout.write((said or json.dumps({"error": "the process died"})) + "\n")
        sys.stdout.flush()


def answer_to(job: dict[str, Any]) -> dict[str, Any]:
    try:
        return JOBS[job["job"]](Cell(**job["cell"]), Path(job["folder"]), **job["given"])
    except BaseException:
        return {"error": traceback.format_exc()}


if __name__ == "__main__":
    serve()
