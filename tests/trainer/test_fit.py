"""``fit`` from end to end: what it gives back, what it leaves on disk, and that it always ends by itself."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from automode import Session, Trainer, quickstart
from automode.errors import DataError

QUIET: dict[str, Any] = {"progress": False, "console": False}


def data(rows: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, 8, generator=generator)
    return TensorDataset(inputs, (inputs[:, :3].sum(1) > 0).long())


def script(*, validates: bool = True) -> dict[str, Any]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    made: dict[str, Any] = {
        "model": model,
        "optimizer": torch.optim.Adam(model.parameters(), lr=1e-2),
        "loss_fn": nn.CrossEntropyLoss(),
        "train_loader": DataLoader(data(256, 1), batch_size=16, shuffle=True),
    }
    if validates:
        made["val_loader"] = DataLoader(data(120, 2), batch_size=32)
        made["test_loader"] = DataLoader(data(100, 3), batch_size=32)
    return made


@pytest.mark.parametrize("mode", [False, "observe", "propose", True])
def test_a_run_in_every_mode_ends_and_leaves_a_session_that_opens(mode: Any, tmp_path: Path) -> None:
    trainer = Trainer(
        "a project",
        "first run",
        max_epochs=4,
        automode=mode,
        session_dir=tmp_path,
        val_every_n_epochs=1,
        do_test_after=True,
        seed=7,
        **QUIET,
    )
    result = trainer.fit(**script())
    assert result.mode == trainer.settings.mode
    assert result.path.parent == tmp_path / "a-project"
    assert result.path.name.startswith("first-run-")
    assert result.session.header["seed"] == 7
    assert result.test is not None
    assert result.test["accuracy"] > 0.8
    assert result.frame("loss").size == result.steps
    assert result.reason == "max_epochs" if result.steps == 64 else "budget"
    assert result.history["train_loss"][-1] < 0.7 * result.history["train_loss"][0]
    assert result.cards == []
    assert str(result.steps) in repr(result)
    assert "first-run" in result._repr_html_()
    assert [event.kind for event in result.session.events("run_ended")] == ["run_ended"]
    with Session.open(result.path) as again:
        assert np.array_equal(again.frame("loss"), result.frame("loss"))


def test_every_fit_makes_a_session_of_its_own_and_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(session_dir=tmp_path, progress=False)
    first = trainer.fit(**script(validates=False))
    second = trainer.fit(**script(validates=False))
    assert first.path != second.path
    said = capsys.readouterr().out
    assert f"session: {first.path}" in said
    assert f"session: {second.path}" in said


@pytest.mark.parametrize(
    ("mode", "validates", "told"), [(True, False, True), (True, True, False), ("observe", False, False)]
)
def test_an_acting_run_in_which_nothing_can_be_proven_says_so_as_it_begins(
    mode: Any, validates: bool, told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = script(validates=validates)
    made.pop("test_loader", None)
    Trainer(session_dir=tmp_path, progress=False, automode=mode).fit(**made)
    said = capsys.readouterr().out
    assert ("will try nothing in this run" in said) is told
    assert ("(there is no validation loader); its safeguards watch" in said) is told


def test_a_session_seed_is_drawn_and_recorded_where_none_is_given(tmp_path: Path) -> None:
    trainer = Trainer(session_dir=tmp_path, **QUIET)
    seeds = {trainer.fit(**script(validates=False)).session.header["seed"] for _ in range(3)}
    # Three draws of 32 bits are all equal once in 2^64 runs.
    assert len(seeds) > 1


def test_quickstart_is_a_trainer_in_one_call(tmp_path: Path) -> None:
    result = quickstart(
        project="demo",
        run_name="baseline",
        max_epochs=2,
        do_test_after=True,
        session_dir=tmp_path,
        seed=3,
        **QUIET,
        **script(),
    )
    same = Trainer(
        "demo",
        "baseline",
        max_epochs=2,
        do_test_after=True,
        session_dir=tmp_path,
        seed=3,
        val_every_n_epochs=1,
        **QUIET,
    ).fit(**script())
    assert result.history == same.history
    assert result.test == same.test
    assert result.path.parent == same.path.parent == tmp_path / "demo"
    assert quickstart(session_dir=tmp_path, **QUIET, **script(validates=False)).history["slices"] == [{}]


def test_a_run_that_fails_leaves_a_session_that_opens_and_says_why(tmp_path: Path) -> None:
    made = script()
    calls = 0

    def fails(module: nn.Module, inputs: Any) -> None:
        nonlocal calls
        calls += module.training
        if calls == 40:
            raise ZeroDivisionError("in the forward pass")

    made["model"].register_forward_pre_hook(fails)
    with pytest.raises(ZeroDivisionError, match="in the forward pass"):
        Trainer(max_epochs=9, automode="observe", session_dir=tmp_path, **QUIET).fit(**made)
    (folder,) = (tmp_path / "default").iterdir()
    with Session.open(folder) as session:
        (ended,) = session.events("run_ended")
        assert "ZeroDivisionError" in str(ended)
        assert session.frame("step").tolist() == list(range(1, 40))


def test_an_interrupt_is_no_exception_to_that(tmp_path: Path) -> None:
    made = script()

    def interrupts(module: nn.Module, inputs: Any) -> None:
        if module.training:
            raise KeyboardInterrupt

    made["model"].register_forward_pre_hook(interrupts)
    with pytest.raises(KeyboardInterrupt):
        Trainer(session_dir=tmp_path, **QUIET).fit(**made)
    (folder,) = (tmp_path / "default").iterdir()
    with Session.open(folder) as session:
        assert [event.kind for event in session.events("run_ended")] == ["run_ended"]


def test_batches_that_cannot_be_trained_on_end_in_a_clear_error_and_a_closed_session(tmp_path: Path) -> None:
    made = script() | {"train_loader": [{"x": torch.zeros(4, 8), "y": torch.zeros(4)}]}
    with pytest.raises(DataError, match=r"@trainer\.training_step"):
        Trainer(automode="observe", session_dir=tmp_path, **QUIET).fit(**made)
    (folder,) = (tmp_path / "default").iterdir()
    with Session.open(folder) as session:
        assert session.rows() == 0


def test_the_accumulation_example_runs_with_automode_on(tmp_path: Path) -> None:
    trainer = Trainer("demo", "accum", max_epochs=5, automode=True, session_dir=tmp_path, **QUIET)

    @trainer.training_step
    def train_step(batch: Any, state: Any) -> Any:
        accum = 8
        idx = train_step.counter % accum  # type: ignore[attr-defined]
        if idx == 0:
            state["optimizer"].zero_grad(set_to_none=True)
        x, y = batch
        with state["autocast"]:
            logits = state["model"](x.to(state["device"]))
            loss = state["loss_fn"](logits, y.to(state["device"])) / accum
        state["scaler"].scale(loss).backward()
        if idx == accum - 1:
            state["scaler"].step(state["optimizer"])
            state["scaler"].update()
        train_step.counter += 1  # type: ignore[attr-defined]
        return {"loss": loss.detach()}

    train_step.counter = 0  # type: ignore[attr-defined]
    result = trainer.fit(**script())
    # Seven batches of eight end without an optimizer step, which is no instability.
    assert result.cards == []
    assert not list(result.session.events("safeguarded"))
    assert result.history["train_loss"][-1] < result.history["train_loss"][0]


def test_a_warning_points_at_the_line_that_called_fit(tmp_path: Path) -> None:
    made = script(validates=False)
    made["model"].eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Trainer(session_dir=tmp_path, **QUIET).fit(**made)
    assert [Path(one.filename).name for one in caught] == ["test_fit.py"]


def test_what_a_run_shows_of_itself_is_no_markup(tmp_path: Path) -> None:
    trainer = Trainer("p<b>", "r<i>x", max_steps=3, automode="observe", session_dir=tmp_path, **QUIET)
    result = trainer.fit(**script())
    shown = result._repr_html_()
    assert "3 steps, ended by max_steps" in shown
    assert "training loss" in shown
    assert "<b>" not in shown
    assert "<i>" not in shown
    result.session.close()
    assert "session" in result._repr_html_()
