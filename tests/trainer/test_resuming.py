"""Which session and which checkpoint a run goes on from, what must be the same, and what is kept."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from automode import Trainer
from automode.errors import SessionCorruptError, SessionError, UsageError
from automode.session import Session, SessionStore
from automode.session.checkpoints import CheckpointStore
from automode.trainer.checkpointing import CheckpointKeeper
from automode.trainer.result import FitResult

pytestmark = pytest.mark.torch


class Cut(Exception):
    """Ends a run as if it had been killed: nothing is stored for it."""


def script(width: int = 6, rows: int = 40, batch_size: int = 8, **other: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    inputs = torch.randn(rows, 5)
    model = nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 2))
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "loss_fn": nn.CrossEntropyLoss(),
        "train_loader": DataLoader(
            TensorDataset(inputs, (inputs[:, 0] > 0).long()), batch_size=batch_size, shuffle=True
        ),
        **other,
    }


def with_validation() -> dict[str, Any]:
    made = script()
    inputs = torch.randn(30, 5)
    return {
        **made,
        "val_loader": DataLoader(TensorDataset(inputs, (inputs[:, 0] > 0).long()), batch_size=10),
    }


def fit(folder: Path, made: dict[str, Any] | None = None, own_step: Any = None, **given: Any) -> FitResult:
    settings = {"max_epochs": 2, "session_dir": folder, "progress": False, "console": False, "seed": 3}
    trainer = Trainer(**{**settings, **given})
    if own_step is not None:
        trainer.training_step(own_step)
    return trainer.fit(**(made or script()))


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Cuts a run after so many batches, its state stored after each of some of them."""

    def run(folder: Path, after: int, stored: tuple[int, ...], made: Any = None, **given: Any) -> Path:
        def after_step(keeper: CheckpointKeeper) -> None:
            if keeper._loop.batches in stored:
                assert keeper.save("periodic") is not None
            if keeper._loop.batches == after:
                raise Cut

        with monkeypatch.context() as patch:
            patch.setattr(CheckpointKeeper, "after_step", after_step)
            patch.setattr(CheckpointKeeper, "rescue", lambda *_: None)
            with pytest.raises(Cut):
                fit(folder, made, **given)
        return newest(folder)

    return run


def newest(folder: Path) -> Path:
    return max((folder / "default").iterdir(), key=lambda path: path.stat().st_mtime_ns)


def stored(path: Path) -> list[tuple[str, int]]:
    """(why, step) of the checkpoints that are recorded and still there, oldest first."""
    present = set(CheckpointStore(path / "checkpoints").digests())
    with Session.open(path) as session:
        records = [record.body for record in session.events("checkpointed")]
    return [(body["why"], body["step"]) for body in records if body["checkpoint"] in present]


# Which session.


def test_auto_begins_a_run_where_there_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    first = fit(tmp_path, resume="auto")
    assert first.steps == 10
    again = fit(tmp_path, resume="auto")
    assert again.path != first.path  # the first has come to its end


def test_auto_takes_the_newest_unfinished_session_of_its_name(tmp_path: Path, cut: Any) -> None:
    path = cut(tmp_path, 4, (3,), run_name="one")
    cut(tmp_path, 4, (3,), run_name="other")
    fit(tmp_path, run_name="one")
    assert fit(tmp_path, run_name="one", resume="auto").path == path
    assert fit(tmp_path, run_name="one", resume="auto").path != path


def test_auto_passes_over_a_session_without_a_checkpoint_and_one_that_is_written(
    tmp_path: Path, cut: Any
) -> None:
    path = cut(tmp_path, 4, (3,))
    cut(tmp_path, 4, ())
    with SessionStore.open(path):
        assert fit(tmp_path, resume="auto").path != path
    assert fit(tmp_path, resume="auto").path == path


def test_the_environment_names_the_session_once_and_only_for_its_own_run(
    tmp_path: Path, cut: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cut(tmp_path, 4, (3,))
    monkeypatch.setenv("AUTOMODE_RESUME", str(path))
    assert fit(tmp_path, project="another").path != path
    assert fit(tmp_path).path == path
    assert fit(tmp_path).path != path


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: folder / "nothing", "is no session"),
        (lambda folder: fit(folder, checkpoint_every=None).path, "holds no checkpoint"),
    ],
)
def test_what_cannot_be_resumed_is_refused(make: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(SessionError, match=says):
        fit(tmp_path, resume=make(tmp_path))


# Which checkpoint.


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, cut: Any) -> None:
    whole = fit(tmp_path / "whole", resume=None)
    path = cut(tmp_path, 7, (2, 6))
    with Session.open(path) as session:
        newer = list(session.events("checkpointed"))[-1].body["checkpoint"]
    file = path / "checkpoints" / newer.removeprefix("sha256:") / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.warns(UserWarning, match="at step 6 is damaged"):
        result = fit(tmp_path, resume=path)
    np.testing.assert_array_equal(result.frame("loss"), whole.frame("loss"))
    assert all(
        torch.equal(a, b)
        for a, b in zip(result.model.state_dict().values(), whole.model.state_dict().values(), strict=True)
    )


def test_where_every_checkpoint_is_damaged_that_is_an_error(tmp_path: Path, cut: Any) -> None:
    path = cut(tmp_path, 4, (3,))
    for file in (path / "checkpoints").glob("*/rest.pt"):
        file.write_bytes(b"torn")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(SessionCorruptError, match="every checkpoint"),
    ):
        fit(tmp_path, resume=path)


@pytest.mark.parametrize("validates", [False, True])
def test_a_cut_between_two_epochs_is_exact_too(validates: bool, tmp_path: Path, cut: Any) -> None:
    make = with_validation if validates else script
    given = {"max_epochs": 3, "checkpoint_every": "1 epoch", "val_every_n_epochs": int(validates)}
    whole = fit(tmp_path / "whole", make(), **given)
    path = cut(tmp_path, 7, (), make(), **given)
    assert stored(path) == [("best" if validates else "periodic", 5)]
    result = fit(tmp_path, make(), resume=path, **given)
    np.testing.assert_array_equal(result.frame("loss"), whole.frame("loss"))
    assert json.dumps(result.history) == json.dumps(whole.history)


def test_a_run_that_was_cut_after_its_last_step_only_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("automode.trainer.driver.Driver.finish", raising)
        with pytest.raises(Cut):
            fit(tmp_path)
    path = newest(tmp_path)
    assert stored(path) == [("end", 10)]
    result = fit(tmp_path, resume="auto")
    assert result.path == path
    assert result.reason == whole.reason
    assert json.dumps(result.history) == json.dumps(whole.history)
    np.testing.assert_array_equal(result.frame("loss"), whole.frame("loss"))


def raising(*_: Any, **__: Any) -> None:
    raise Cut


def test_a_state_that_cannot_be_stored_ends_no_run_and_is_told(tmp_path: Path) -> None:
    class Odd(nn.CrossEntropyLoss):
        def get_extra_state(self) -> Any:
            return lambda: None

    result = fit(tmp_path, script(loss_fn=Odd()), checkpoint_every="2 steps")
    assert result.steps == 10
    assert stored(result.path) == []
    told = [line for line in result.session.log() if line["event"] == "checkpoint_not_stored"]
    assert len(told) == 1
    assert "could not be stored" in told[0]["why"]


def test_what_an_own_step_keeps_in_its_state_comes_along_where_it_can_be_stored(
    tmp_path: Path, cut: Any
) -> None:
    def counting(batch: Any, state: dict[str, Any]) -> dict[str, Any]:
        state["count"] = state.get("count", 0) + 1
        state["odd"] = {1, 2}
        loss = state["loss_fn"](state["model"](batch[0]), batch[1])
        state["optimizer"].zero_grad()
        loss.backward()
        state["optimizer"].step()
        return {"loss": loss.detach(), "count": state["count"]}

    path = cut(tmp_path, 4, (3,), own_step=counting)
    with pytest.warns(UserWarning, match=r"state\['odd'\] of the training step cannot be stored"):
        result = fit(tmp_path, own_step=counting, resume=path)
    np.testing.assert_array_equal(result.frame("count"), np.arange(1.0, 11.0))


# What must be the same.


def own_step(batch: Any, state: dict[str, Any]) -> dict[str, Any]:
    raise AssertionError("never called")


@pytest.mark.parametrize(
    ("made", "given", "says"),
    [
        (
            lambda: script(width=7),
            {},
            r"model: .*0\.weight \(was torch.float32 of shape \(6, 5\), is torch.float32",
        ),
        (lambda: script(rows=48), {}, "train_loader: .*dataset"),
        (lambda: script(batch_size=4), {}, "train_loader: .*batches of 8, and this script gives 4"),
        (lambda: adam(script()), {}, "optimizer: .*SGD, and this script gives Adam"),
        (lambda: two_groups(script()), {}, r"optimizer: .*\[4\], and this script gives \[2, 2\]"),
        (lambda: scheduled(script()), {}, "scheduler: .*None, and this script gives StepLR"),
        (with_validation, {}, "val_loader"),
        (script, {"automode": "observe"}, "automode: .*off, and this script gives observe"),
        (script, {"policy": "conservative"}, "policy"),
        (script, {"max_epochs": 1}, "less"),
        (script, {"max_epochs": None, "max_steps": 9}, "less"),
        (script, {"own_step": own_step}, "training_step"),
    ],
)
def test_another_run_is_refused_with_what_came_and_what_was_needed(
    made: Any, given: dict[str, Any], says: str, tmp_path: Path, cut: Any
) -> None:
    path = cut(tmp_path, 4, (3,))
    with pytest.raises(UsageError, match=says):
        fit(tmp_path, made(), resume=path, **given)
    assert fit(tmp_path, resume=path).steps == 10  # nothing of it was harmed


def adam(made: dict[str, Any]) -> dict[str, Any]:
    return {**made, "optimizer": torch.optim.Adam(made["model"].parameters())}


def two_groups(made: dict[str, Any]) -> dict[str, Any]:
    parameters = list(made["model"].parameters())
    groups = [{"params": parameters[:2]}, {"params": parameters[2:]}]
    return {**made, "optimizer": torch.optim.SGD(groups, lr=0.1, momentum=0.9)}


def scheduled(made: dict[str, Any]) -> dict[str, Any]:
    return {**made, "scheduler": torch.optim.lr_scheduler.StepLR(made["optimizer"], 1)}


def test_what_may_differ_makes_the_run_approximate_and_that_is_said_and_recorded(
    tmp_path: Path, cut: Any
) -> None:
    path = cut(tmp_path, 4, (3,))
    with pytest.warns(UserWarning, match="approximately, not bit for bit: clip_norm was None and is 1.0"):
        fit(tmp_path, resume=path, clip_norm=1.0)
    with Session.open(path) as session:
        (resumed,) = session.events("resumed")
    assert resumed.body["exact"] is False
    assert "clip_norm" in resumed.body["why_approximate"]


def test_a_run_that_is_the_same_is_exact_and_that_is_recorded(tmp_path: Path, cut: Any) -> None:
    path = cut(tmp_path, 4, (3,))
    assert fit(tmp_path, resume=path).reason == "max_epochs"
    with Session.open(path) as session:
        (resumed,) = session.events("resumed")
    assert resumed.body["exact"] is True


# Longer.


@pytest.mark.parametrize(
    ("first", "longer"),
    [
        ({"max_epochs": 2}, {"max_epochs": 3}),
        ({"max_epochs": None, "max_steps": 7}, {"max_epochs": None, "max_steps": 13}),
    ],
)
@pytest.mark.parametrize("mode", ["off", "observe"])
def test_a_finished_run_goes_on_when_it_is_made_longer(
    first: dict[str, Any], longer: dict[str, Any], mode: Any, tmp_path: Path
) -> None:
    whole = fit(tmp_path / "whole", automode=mode, **longer)
    short = fit(tmp_path, automode=mode, **first)
    with pytest.raises(UsageError, match="nothing is left to resume"):
        fit(tmp_path, resume=short.path, automode=mode, **first)
    result = fit(tmp_path, resume=short.path, automode=mode, **longer)
    assert result.path == short.path
    assert result.reason == whole.reason
    np.testing.assert_array_equal(result.frame("loss"), whole.frame("loss"))
    assert json.dumps(result.history) == json.dumps(whole.history)


# What is kept.


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"checkpoint_every": "2 steps"}, [("periodic", 8), ("end", 10)]),
        (
            {"checkpoint_every": "2 steps", "keep_checkpoints": 4},
            [("periodic", 4), ("periodic", 6), ("periodic", 8), ("end", 10)],
        ),
        ({"checkpoint_every": "1 epoch"}, [("end", 10), ("periodic", 10)]),
        ({}, [("end", 10)]),
        ({"checkpoint_every": None}, []),
    ],
)
def test_the_newest_are_kept(given: dict[str, Any], kept: list[tuple[str, int]], tmp_path: Path) -> None:
    assert stored(fit(tmp_path, **given).path) == kept


def test_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    made = with_validation()
    result = fit(tmp_path, made, max_epochs=6, val_every_n_epochs=1, checkpoint_every="5 steps")
    metrics = result.history["val_metric"]
    best = [step for why, step in stored(result.path) if why == "best"]
    assert result.history["step"][metrics.index(max(metrics))] in best
    assert len([why for why, _ in stored(result.path) if why != "best"]) + len(best) <= 3


def test_time_stores_the_state_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(np.arange(0.0, 1e6, 7.0))
    made = CheckpointKeeper.__init__

    def with_clock(keeper: CheckpointKeeper, *args: Any, **given: Any) -> None:
        made(keeper, *args, **{**given, "clock": lambda: float(next(now))})

    monkeypatch.setattr(CheckpointKeeper, "__init__", with_clock)
    path = fit(tmp_path, checkpoint_every="10 s", keep_checkpoints=9).path
    assert [why for why, _ in stored(path)][:-1] == ["periodic"] * (len(stored(path)) - 1)
    assert len(stored(path)) > 3


def test_what_is_left_of_earlier_attempts_is_deleted_in_its_turn(tmp_path: Path, cut: Any) -> None:
    path = cut(tmp_path, 4, (2, 3))
    fit(tmp_path, resume=path, checkpoint_every="3 steps")
    assert stored(path) == [("periodic", 9), ("end", 10)]
    assert len(CheckpointStore(path / "checkpoints").digests()) == 3  # and the final weights


@pytest.mark.parametrize("workers", [0, 1])
def test_the_batch_of_a_step_that_failed_is_not_held_against_the_sampler(
    workers: int, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    def failing(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Cut
        return torch.nn.functional.cross_entropy(outputs, targets)

    calls = 0
    for again in (False, True):
        made = script()
        loader = made["train_loader"]
        made["train_loader"] = DataLoader(loader.dataset, batch_size=8, shuffle=True, num_workers=workers)
        made["loss_fn"] = failing
        expected: Any = contextlib.nullcontext() if again else pytest.raises(Cut)
        with expected:
            fit(tmp_path, made, resume="auto")
    told = [str(warning.message) for warning in recwarn if "approximately" in str(warning.message)]
    assert len(told) == 1
    assert "the step that failed may have moved random numbers" in told[0]
    assert "sampler" not in told[0]
