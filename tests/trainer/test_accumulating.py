"""Steps over several batches: what they train, record, keep from the weights and refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from automode import Trainer
from automode.errors import UsageError
from automode.planner.policy import Policy
from automode.trainer.checkpointing import CheckpointKeeper
from automode.trainer.fit_request import FitRequest
from automode.trainer.run_parts import prepare
from automode.trainer.running import begin
from automode.trainer.schedule import known_drops
from automode.trainer.settings import Settings

pytestmark = pytest.mark.torch

COMMON: dict[str, Any] = {"progress": False, "console": False}
ROWS, BATCH, EVERY = 80, 8, 4
"""Ten batches an epoch: groups of four, four and two."""


def script(size: float = 1.0) -> dict[str, Any]:
    torch.manual_seed(1)
    inputs = torch.randn(ROWS, 5)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "loss_fn": nn.CrossEntropyLoss(),
        "train_loader": DataLoader(TensorDataset(size * inputs, (inputs[:, 0] > 0).long()), BATCH),
    }


def weights_of(made: dict[str, Any]) -> list[Tensor]:
    return [p.detach().clone() for p in made["model"].parameters()]


def same(mine: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))


def bare(epochs: int, clip: float | None = None) -> tuple[dict[str, Any], list[float], list[float]]:
    """The loop written by hand; returns it, the losses, and the norm of the gradient at each optimizer step."""
    made = script()
    losses, norms = [], []
    for _ in range(epochs):
        for i, (x, y) in enumerate(made["train_loader"]):
            loss = made["loss_fn"](made["model"](x), y)
            (loss / EVERY).backward()
            losses.append(loss.item())
            if i % EVERY == EVERY - 1 or i == ROWS // BATCH - 1:
                parameters = list(made["model"].parameters())
                norms.append(float(nn.utils.get_total_norm([p.grad for p in parameters])))
                if clip is not None:
                    nn.utils.clip_grad_norm_(parameters, clip)
                made["optimizer"].step()
                made["optimizer"].zero_grad()
    return made, losses, norms


@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_group_of_batches_is_one_optimizer_step_and_an_epochs_end_ends_it(
    clip: float | None, tmp_path: Path, observers: list[Any]
) -> None:
    made = script()
    scheduler = torch.optim.lr_scheduler.ConstantLR(made["optimizer"], 1.0, 1)
    trainer = Trainer(
        max_epochs=3,
        accumulate_grad_batches=EVERY,
        clip_norm=clip,
        automode="observe",
        scheduler_interval="step",
        session_dir=tmp_path,
        **COMMON,
    )
    result = trainer.fit(**made, scheduler=scheduler)
    other, losses, norms = bare(3, clip)
    assert same(weights_of(made), weights_of(other))
    observer = observers[0]
    assert observer.column("loss") == losses
    assert result.steps == 30
    assert scheduler.last_epoch == 9
    assert observer.column("applied") == [1.0] * 30
    at_ends = [norm for i, norm in enumerate(observer.column("grad_norm")) if i % 10 in (3, 7, 9)]
    assert at_ends == pytest.approx(norms, rel=1e-6)


def test_within_a_group_the_gradient_norm_is_that_of_the_mean_gradient_so_far(
    tmp_path: Path, observers: list[Any]
) -> None:
    made = script()
    Trainer(max_steps=2, accumulate_grad_batches=EVERY, session_dir=tmp_path, **COMMON).fit(**made)
    other = script()
    (x, y), (u, v) = list(other["train_loader"])[:2]
    expected = []
    for inputs, targets in ((x, y), (torch.cat([x, u]), torch.cat([y, v]))):
        other["optimizer"].zero_grad()
        other["loss_fn"](other["model"](inputs), targets).backward()
        expected.append(float(nn.utils.get_total_norm([p.grad for p in other["model"].parameters()])))
    assert observers[0].column("grad_norm") == pytest.approx(expected, rel=1e-5)
    # The run ends within a group, whose gradients reach no weight.
    assert same(weights_of(made), weights_of(script()))


def test_the_guard_drops_the_group_that_meets_a_loss_that_is_not_finite(
    tmp_path: Path, observers: list[Any]
) -> None:
    made = script()
    made["train_loader"].dataset.tensors[0][2 * BATCH] = float("nan")
    trainer = Trainer(automode="act", accumulate_grad_batches=EVERY, session_dir=tmp_path, **COMMON)
    trainer.fit(**made)
    # Batches 0 to 2 are gone, 3 to 6 are a group, 7 to 9 the epoch's last.
    other = script()
    for group in (range(3, 7), range(7, 10)):
        for i, (x, y) in enumerate(other["train_loader"]):
            if i in group:
                (other["loss_fn"](other["model"](x), y) / EVERY).backward()
        other["optimizer"].step()
        other["optimizer"].zero_grad()
    assert same(weights_of(made), weights_of(other))
    assert observers[0].told("skipped") == [("skipped", 2, "the loss is nan")]
    assert observers[0].column("applied") == [1, 1, 0, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_under_gradient_scaling_the_group_is_scaled_stepped_and_watched_as_by_hand(
    size: float, tmp_path: Path, observer_of: Any
) -> None:
    made, other = script(size), script(size)
    settings = Settings(session_dir=tmp_path, accumulate_grad_batches=EVERY, **COMMON)
    parts = prepare(settings, Policy(), FitRequest(**made), None)
    parts.trunk.precision = "fp16"  # fit asks for CUDA, the step itself does not
    observer = observer_of(parts)
    begin(parts, observer).run()
    scaler, applied = torch.amp.GradScaler("cpu"), []
    for i, (x, y) in enumerate(other["train_loader"]):
        with torch.autocast("cpu", torch.float16):
            loss = other["loss_fn"](other["model"](x), y)
        scaler.scale(loss / EVERY).backward()
        if i in (3, 7, 9):
            before = weights_of(other)
            scaler.step(other["optimizer"])
            scaler.update()
            applied.append(not same(before, weights_of(other)))
            other["optimizer"].zero_grad()
    assert same(weights_of(made), weights_of(other))
    assert [bool(observer.column("applied")[i]) for i in (3, 7, 9)] == applied
    assert all(applied) == (size == 1.0)
    if size == 1.0:
        assert all(norm < 10 for norm in observer.column("grad_norm"))


class Cut(Exception):
    """Ends a run as if it had been killed."""


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 6, 9, 10, 11])
def test_a_cut_at_any_batch_of_a_group_does_not_show(
    cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(folder: Path, **given: Any) -> Any:
        trainer = Trainer(
            max_epochs=2,
            accumulate_grad_batches=EVERY,
            automode="observe",
            session_dir=folder,
            **given,
            **COMMON,
        )
        return trainer.fit(**script())

    def after_step(keeper: CheckpointKeeper) -> None:
        if keeper._loop.batches == cut:
            assert keeper.save("periodic") is not None
            raise Cut

    whole = fit(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointKeeper, "after_step", after_step)
        patch.setattr(CheckpointKeeper, "rescue", lambda *_: None)
        with pytest.raises(Cut):
            fit(tmp_path)
    resumed = fit(tmp_path, resume="auto")
    (record,) = resumed.session.events("resumed")
    assert record.body["exact"]
    for column in ("loss", "grad_norm"):
        assert resumed.frame(column).tolist() == whole.frame(column).tolist()
    assert same(list(resumed.model.parameters()), list(whole.model.parameters()))


def test_a_run_is_resumed_with_the_groups_that_it_was_begun_with(tmp_path: Path) -> None:
    Trainer(max_epochs=1, accumulate_grad_batches=EVERY, session_dir=tmp_path, **COMMON).fit(**script())
    (folder,) = (tmp_path / "default").iterdir()
    with pytest.raises(
        UsageError, match="accumulate_grad_batches: the run to resume was begun with optimizer steps of 4"
    ):
        Trainer(max_epochs=2, resume=folder, session_dir=tmp_path, **COMMON).fit(**script())


def test_no_specialist_is_trained_in_such_a_run_and_it_says_why(tmp_path: Path) -> None:
    made = script()
    trainer = Trainer(automode=True, accumulate_grad_batches=2, session_dir=tmp_path, **COMMON)
    result = trainer.fit(**made)
    (began,) = result.session.events("session_started")
    assert "accumulates gradients over several" in began.body["run"]["why_no_forks"]


@pytest.mark.parametrize("every", [0, 1.5, True])
def test_a_number_of_batches_is_a_whole_one(every: Any) -> None:
    with pytest.raises(UsageError, match="accumulate_grad_batches must be a whole number at least 1"):
        Trainer(accumulate_grad_batches=every)


def test_an_own_step_accumulates_itself(tmp_path: Path) -> None:
    trainer = Trainer(accumulate_grad_batches=2, session_dir=tmp_path, **COMMON)
    trainer.training_step(lambda batch, state: {"loss": 0.0})
    with pytest.raises(UsageError, match="is for the default step, and yours steps the optimizer itself"):
        trainer.fit(**script())


@pytest.mark.parametrize(("length", "expected"), [(10, (8, 20)), (None, (8, 16))])
def test_known_drops_are_counted_in_batches(length: int | None, expected: tuple[int, ...]) -> None:
    """Ten batches an epoch make three optimizer steps: the second is made after 8 batches, the sixth after 20."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4] if length is None else [2, 6])
    assert known_drops(scheduler, "step", length, 40, batches_per_step=4) == expected


@pytest.mark.filterwarnings("ignore")
def test_lightning_comes_to_the_same_weights_bit_by_bit(tmp_path: Path) -> None:
    pl = pytest.importorskip("lightning.pytorch")
    made, other = script(), script()
    Trainer(max_epochs=2, accumulate_grad_batches=EVERY, clip_norm=0.05, session_dir=tmp_path, **COMMON).fit(
        **made
    )

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = other["model"]

        def training_step(self, batch: Any, _: int) -> Tensor:
            loss: Tensor = other["loss_fn"](self.network(batch[0]), batch[1])
            return loss

        def configure_optimizers(self) -> Any:
            return other["optimizer"]

    pl.Trainer(
        max_epochs=2,
        accumulate_grad_batches=EVERY,
        gradient_clip_val=0.05,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Module(), other["train_loader"])
    assert same(weights_of(made), weights_of(other))
