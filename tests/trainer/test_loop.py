"""The loop: how long it trains, whom it tells what and when, and how it ends when something goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from automode.errors import DataError, UsageError
from automode.merges.trajectory import TrajectoryAverages
from automode.planner.policy import Policy
from automode.session import Session
from automode.trainer.fit_request import FitRequest
from automode.trainer.loop import Loop
from automode.trainer.run_parts import RunParts, prepare
from automode.trainer.running import begin
from automode.trainer.settings import Settings
from automode.trainer.trainer import Trainer

COMMON: dict[str, Any] = {"progress": False, "console": False}


def script(rows: int = 60, batch_size: int = 10, rate: float = 0.1) -> dict[str, Any]:
    torch.manual_seed(1)
    inputs = torch.randn(rows, 5)
    model = nn.Linear(5, 2)
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=rate),
        "loss_fn": nn.CrossEntropyLoss(),
        "train_loader": DataLoader(TensorDataset(inputs, (inputs[:, 0] > 0).long()), batch_size=batch_size),
    }


class Stream(IterableDataset[Any]):
    """Samples that nobody can count beforehand."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        for i in range(self.rows):
            yield torch.full((5,), i / self.rows), i % 2


def fit(tmp_path: Path, made: dict[str, Any] | None = None, **given: Any) -> Any:
    return Trainer(session_dir=tmp_path, **COMMON, **given).fit(**(made or script()))


@pytest.mark.parametrize(
    ("given", "steps", "epochs", "reason"),
    [
        ({}, 6, [6], "max_epochs"),
        ({"max_epochs": 3}, 18, [6, 12, 18], "max_epochs"),
        ({"max_steps": 4}, 4, [4], "max_steps"),
        ({"max_steps": 6}, 6, [6], "max_steps"),
        ({"max_steps": 15}, 15, [6, 12, 15], "max_steps"),
    ],
)
def test_it_trains_as_long_as_asked(
    given: dict[str, Any], steps: int, epochs: list[int], reason: str, tmp_path: Path, observers: list[Any]
) -> None:
    result = fit(tmp_path, **given)
    assert result.steps == steps
    assert result.reason == reason
    assert result.history["step"] == epochs
    assert result.history["epoch"] == list(range(len(epochs)))
    assert observers[0].column("step") == list(range(1, steps + 1))
    assert observers[0].calls[-1] == ("finish", steps, reason)


def test_every_row_is_handed_over_before_the_boundary_that_follows_it(
    tmp_path: Path, observers: list[Any]
) -> None:
    fit(tmp_path, script(rows=500), max_epochs=2)
    told = 0
    for call in observers[0].calls:
        if call[0] == "block":
            assert call[1] == told
            told += call[2]
        elif call[0] == "boundary":
            assert call[1] == told
    assert told == 100
    assert observers[0].calls[-2] == ("boundary", 100)


def prepared(tmp_path: Path, made: dict[str, Any] | None = None, **given: Any) -> RunParts:
    settings = Settings(session_dir=tmp_path, **COMMON, **given)
    return prepare(settings, Policy(), FitRequest(**(made or script())), None)


def test_while_something_is_busy_every_step_has_a_boundary(tmp_path: Path, observer_of: Any) -> None:
    parts = prepared(tmp_path, script(rows=100))
    observer = observer_of(parts)
    loop = begin(parts, observer)
    for step in loop.steps():
        loop.flush()  # as whoever does something to the run between two steps
        observer.busy = 3 <= step < 6
    assert [call[1] for call in observer.told("boundary")] == [4, 5, 6, 10]
    assert observer.column("step") == list(range(1, 11))


def test_a_slow_step_lets_people_and_the_disk_have_their_turn_and_no_more(
    tmp_path: Path, observer_of: Any
) -> None:
    parts = prepared(tmp_path)
    observer = observer_of(parts)
    loop = begin(parts, observer)
    now = [0.0]
    loop.clock = loop.probe.clock = lambda: now[0]
    steps = loop.steps()
    at = []
    for now[0] in (0.0, 0.3, 0.3, 0.49, 0.51):
        next(steps)
        at.append([call[1] for call in observer.told("tick")])
    assert at == [[], [2], [2], [2], [2, 5]]
    assert observer.told("boundary") == []
    assert observer.column("step") == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("seconds", [0.0, 0.07, 1.0])
def test_boundaries_fall_at_the_same_batches_however_slow_the_steps_are(
    seconds: float, tmp_path: Path, observer_of: Any
) -> None:
    parts = prepared(tmp_path, script(rows=300), max_epochs=1)
    observer = observer_of(parts)
    observer.stride = 8
    loop = begin(parts, observer)
    now = [0.0]
    loop.clock = loop.probe.clock = lambda: now[0]
    for _ in loop.steps():
        now[0] += seconds
    assert [call[1] for call in observer.told("boundary")] == [8, 16, 24, 30]
    assert len(observer.told("tick")) == {0.0: 0, 0.07: 8, 1.0: 26}[seconds]


def test_somebody_who_asks_gets_a_boundary_at_once(tmp_path: Path, observer_of: Any) -> None:
    parts = prepared(tmp_path, script(rows=100))
    observer = observer_of(parts)
    loop = begin(parts, observer)
    now = [0.0]
    loop.clock = loop.probe.clock = lambda: now[0]
    observer.tick = lambda step: step == 4
    for _ in loop.steps():
        now[0] += 1.0
    assert [call[1] for call in observer.told("boundary")] == [4, 10]


@pytest.mark.parametrize(("limit", "epochs"), [(9, [6, 9]), (15, [6, 12, 15]), (12, [6, 12])])
def test_a_shrinking_limit_ends_the_run_and_the_end_is_validated(
    limit: int, epochs: list[int], tmp_path: Path, observer_of: Any
) -> None:
    held_out = TensorDataset(torch.randn(12, 5), torch.arange(12) % 2)
    made = script() | {"val_loader": DataLoader(held_out, batch_size=4)}
    parts = prepared(tmp_path, made, max_epochs=3, val_every_n_epochs=1)
    observer = observer_of(parts)
    loop = begin(parts, observer)
    for step in loop.steps():
        if step == 7:
            observer.limit = limit
    assert loop.reason == "budget"
    assert parts.trunk.step == limit
    assert loop.history.step == epochs
    assert [call[1] for call in observer.told("validated")] == epochs
    assert all(loss > 0 for loss in loop.history.val_loss)


def test_a_limit_that_falls_below_the_step_ends_the_run_at_once(tmp_path: Path, observer_of: Any) -> None:
    parts = prepared(tmp_path, max_epochs=3)
    observer = observer_of(parts)
    loop = begin(parts, observer)
    for step in loop.steps():
        if step == 5:
            observer.limit = 2
    assert (parts.trunk.step, loop.reason) == (5, "budget")


def test_a_requested_stop_ends_the_run_with_its_reason(tmp_path: Path, observer_of: Any) -> None:
    parts = prepared(tmp_path, max_epochs=3)
    observer = observer_of(parts)
    loop = begin(parts, observer)
    for step in loop.steps():
        if step == 6:
            observer.stop_requested = "a person asked"
    assert (parts.trunk.step, loop.reason) == (6, "a person asked")


def test_a_charged_schedule_follows_what_automode_spends(tmp_path: Path, observer_of: Any) -> None:
    made = script()
    made["scheduler"] = torch.optim.lr_scheduler.LambdaLR(made["optimizer"], lambda tick: 1.0 / (1 + tick))
    parts = prepared(tmp_path, made, max_epochs=4, scheduler_interval="step", automode="act")
    observer = observer_of(parts)
    loop = begin(parts, observer)
    for step in loop.steps():
        if step == 6:
            observer.charged_steps, observer.limit = 7.5, 16
    assert parts.trunk.step == 16
    assert made["scheduler"].last_epoch == 16 + 7


def test_averages_of_the_trunk_are_fed_after_applied_steps(tmp_path: Path, observer_of: Any) -> None:
    parts = prepared(tmp_path, max_epochs=2)
    parts.trunk.averages = TrajectoryAverages(dict(parts.trunk.model.named_parameters()), 12, every=5)
    begin(parts, observer_of(parts)).run()
    assert parts.trunk.averages.updates == 2


@pytest.mark.parametrize(("given", "steps"), [({"max_steps": 13}, 13), ({"max_epochs": 2}, 20)])
def test_a_loader_without_a_length_is_trained_on(
    given: dict[str, Any], steps: int, tmp_path: Path, observers: list[Any]
) -> None:
    made = script() | {"train_loader": DataLoader(Stream(100), batch_size=10)}
    result = Trainer(session_dir=tmp_path, automode="observe", **COMMON, **given).fit(**made)
    assert result.steps == steps
    assert result.mode == "observe"


def test_without_a_length_nothing_is_planned_unless_steps_are_given(
    tmp_path: Path, observers: list[Any]
) -> None:
    made = script() | {"train_loader": DataLoader(Stream(100), batch_size=10)}
    with pytest.warns(UserWarning, match='automode="act" becomes "observe".*give max_steps'):
        result = Trainer(session_dir=tmp_path, automode=True, **COMMON).fit(**made)
    assert result.mode == "observe"
    result = Trainer(session_dir=tmp_path, automode=True, max_steps=5, **COMMON).fit(**made)
    assert result.mode == "act"


@pytest.mark.parametrize(
    ("settings", "more", "told"),
    [
        ({"val_every_n_epochs": 1}, {}, "val_every_n_epochs=1 needs a val_loader"),
        (
            {},
            {"slices": {"all": lambda inputs, targets: targets >= 0}},
            "slices are subsets of the validation set",
        ),
    ],
)
def test_without_a_length_no_training_data_stand_in_for_a_val_loader_that_is_needed(
    settings: dict[str, Any], more: dict[str, Any], told: str, tmp_path: Path, observers: list[Any]
) -> None:
    made = script() | {"train_loader": DataLoader(Stream(100), batch_size=10), **more}
    policy = Policy.model_validate({"evidence": {"holdout_share": 0.2}})
    trainer = Trainer(session_dir=tmp_path, automode=True, policy=policy, **COMMON, **settings)
    with pytest.raises(UsageError, match=told):
        trainer.fit(**made)


def test_an_iterator_that_can_be_read_only_once_is_told_apart_from_an_empty_loader(
    tmp_path: Path, observers: list[Any]
) -> None:
    batches = [(torch.randn(4, 5), torch.tensor([0, 1, 0, 1]))] * 3
    with pytest.raises(DataError, match=r"epoch 2 gave no batch: .* only once; pass a DataLoader"):
        Trainer(session_dir=tmp_path, max_epochs=2, **COMMON).fit(
            **script() | {"train_loader": iter(batches)}
        )
    with pytest.raises(DataError, match="the training loader is empty: it gave no batch"):
        Trainer(session_dir=tmp_path, **COMMON).fit(**script() | {"train_loader": iter([])})
    assert Trainer(session_dir=tmp_path, **COMMON).fit(**script() | {"train_loader": batches}).steps == 3


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "it has 0 batches"),
        (
            DataLoader(TensorDataset(torch.zeros(3, 5), torch.zeros(3)), batch_size=8, drop_last=True),
            "3 samples do not fill one batch of 8, and drop_last=True drops the rest",
        ),
    ],
)
def test_an_empty_loader_is_refused_before_a_session_is_made(
    loader: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        Trainer(session_dir=tmp_path, **COMMON).fit(**script() | {"train_loader": loader})
    assert list(tmp_path.iterdir()) == []


def test_an_exception_of_the_model_leaves_fit_as_it_is_and_the_session_whole(
    tmp_path: Path, observers: list[Any]
) -> None:
    made = script(rows=300)
    calls = 0

    def fails(module: nn.Module, inputs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 26:
            raise ZeroDivisionError("in the forward pass")

    made["model"].register_forward_pre_hook(fails)
    with pytest.raises(ZeroDivisionError, match="in the forward pass") as caught:
        Trainer(session_dir=tmp_path, **COMMON).fit(**made)
    observer = observers[0]
    assert observer.calls[-1] == ("abort", 25, caught.value)
    assert observer.column("step") == list(range(1, 26))
    assert observer.told("finish") == []
    with Session.open(observer.path) as session:
        assert session.header["project"] == "default"


def test_an_error_while_rows_are_saved_after_an_error_does_not_hide_the_first(
    tmp_path: Path, observers: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = script()
    made["model"].register_forward_pre_hook(lambda module, inputs: (_ for _ in ()).throw(KeyError("first")))

    def flush(self: Loop) -> None:
        raise OSError("second")

    monkeypatch.setattr(Loop, "flush", flush)
    with pytest.raises(KeyError, match="first") as caught:
        Trainer(session_dir=tmp_path, **COMMON).fit(**made)
    assert any("second" in note for note in caught.value.__notes__)
    assert observers[0].told("abort") == [("abort", 0, caught.value)]


def test_history_has_one_entry_an_epoch(tmp_path: Path, observers: list[Any]) -> None:
    held_out = TensorDataset(torch.randn(12, 5), torch.arange(12) % 2)
    made = script() | {"val_loader": DataLoader(held_out, batch_size=5)}
    made["scheduler"] = torch.optim.lr_scheduler.StepLR(made["optimizer"], 1, 0.5)
    result = Trainer(session_dir=tmp_path, max_epochs=3, val_every_n_epochs=2, **COMMON).fit(
        **made, slices={"odd": lambda inputs, targets: targets == 1, "few": [3, 4]}
    )
    history = result.history
    losses = observers[0].column("loss")
    assert history["train_loss"] == pytest.approx([sum(losses[i : i + 6]) / 6 for i in (0, 6, 12)])
    assert history["learning_rate"] == [0.05, 0.025, 0.0125]
    assert [value == value for value in history["val_loss"]] == [False, True, False]
    assert [sorted(found) for found in history["slices"]] == [[], ["few", "odd"], []]
    assert set(history) == {
        "epoch", "step", "train_loss", "val_loss", "val_metric", "learning_rate", "slices"
    }  # fmt: skip


def test_the_rate_of_every_group_is_recorded_as_it_was_at_the_step(
    tmp_path: Path, observers: list[Any]
) -> None:
    made = script()
    model = made["model"]
    made["optimizer"] = torch.optim.Adam(
        [{"params": [model.weight], "lr": torch.tensor(0.5)}, {"params": [model.bias], "lr": 0.25}],
        foreach=False,
        capturable=False,
    )
    made["scheduler"] = torch.optim.lr_scheduler.ExponentialLR(made["optimizer"], 0.5)
    Trainer(session_dir=tmp_path, scheduler_interval="step", **COMMON).fit(**made)
    assert observers[0].column("lr_0") == [0.5**k for k in range(1, 7)]
    assert observers[0].column("lr_1") == [0.5**k for k in range(2, 8)]


def test_a_loaded_optimizer_state_is_followed(tmp_path: Path, observer_of: Any) -> None:
    parts = prepared(tmp_path)
    observer = observer_of(parts)
    loop = begin(parts, observer)
    optimizer = parts.trunk.optimizer
    for step in loop.steps():
        if step == 3:
            state = optimizer.state_dict()
            state["param_groups"][0]["lr"] = 0.01
            optimizer.load_state_dict(state)
    assert observer.column("lr_0") == [0.1] * 3 + [0.01] * 3


def test_the_test_set_is_looked_at_once_when_training_has_ended(tmp_path: Path, observers: list[Any]) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(40, 5)
    targets = (inputs[:, 0] > 0).long()
    made = script() | {"test_loader": DataLoader(TensorDataset(inputs, targets), batch_size=16)}
    result = Trainer(session_dir=tmp_path, max_epochs=2, do_test_after=True, **COMMON).fit(**made)
    with torch.no_grad():
        outputs = made["model"](inputs)
    assert result.test is not None
    assert result.test["loss"] == pytest.approx(
        float(nn.functional.cross_entropy(outputs, targets)), rel=1e-6
    )
    assert result.test["accuracy"] == pytest.approx(float((outputs.argmax(1) == targets).double().mean()))
    assert Trainer(session_dir=tmp_path, **COMMON).fit(**made).test is None


def test_a_module_that_the_user_froze_stays_frozen(tmp_path: Path, observers: list[Any]) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[1].eval()
    held_out = DataLoader(TensorDataset(torch.randn(12, 5), torch.arange(12) % 2), batch_size=6)
    made = script() | {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}
    Trainer(session_dir=tmp_path, val_every_n_epochs=1, **COMMON).fit(**made, val_loader=held_out)
    assert [module.training for module in model] == [True, False, True]
    assert int(model[1].num_batches_tracked) == 0


def test_a_model_that_is_all_in_evaluation_mode_is_trained_so_with_a_warning(
    tmp_path: Path, observers: list[Any]
) -> None:
    made = script()
    made["model"].eval()
    with pytest.warns(UserWarning, match="call model.train"):
        Trainer(session_dir=tmp_path, **COMMON).fit(**made)
    assert not made["model"].training


def test_a_seed_makes_runs_equal_and_no_seed_leaves_the_generators_alone(
    tmp_path: Path, observers: list[Any]
) -> None:
    finals = []
    for start in (1, 2):
        made = script()
        made["train_loader"] = DataLoader(made["train_loader"].dataset, batch_size=10, shuffle=True)
        torch.manual_seed(start)
        Trainer(session_dir=tmp_path, seed=5, **COMMON).fit(**made)
        finals.append(made["model"].weight.detach().clone())
    assert torch.equal(*finals)


WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"model": 3}, "model must be a torch.nn.modules.module.Module"),
    ({}, {"optimizer": "adam"}, "optimizer must be a torch.optim.optimizer.Optimizer, got a builtins.str"),
    ({}, {"loss_fn": "mse"}, r"loss_fn must be callable as loss_fn\(outputs, targets\)"),
    (
        {},
        {"train_loader": None},
        "train_loader must be a DataLoader or another iterable of batches, got None",
    ),
    ({}, {"val_loader": 3}, "val_loader must be a DataLoader"),
    ({"val_every_n_epochs": 1}, {}, "needs a val_loader"),
    ({"do_test_after": True}, {}, "needs a test_loader"),
    ({}, {"slices": {"a": [1]}}, "slices are subsets of the validation set; pass val_loader too"),
    ({}, {"slices": [1]}, "slices must be a collections.abc.Mapping"),
    ({}, {"model": nn.Linear(5, 2)}, "the optimizer holds none of the model's parameters"),
    (
        {"scheduler_interval": "manual"},
        {"scheduler": "StepLR"},
        "leaves the scheduler to your own training step",
    ),
]


@pytest.mark.parametrize(("given", "arguments", "message"), WRONG, ids=lambda part: str(part)[:40])
def test_fit_refuses_what_it_cannot_train_before_a_session_is_made(
    given: dict[str, Any], arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    made = script()
    if arguments.get("scheduler") == "StepLR":
        arguments = {"scheduler": torch.optim.lr_scheduler.StepLR(made["optimizer"], 1)}
    with pytest.raises(UsageError, match=message):
        Trainer(session_dir=tmp_path, **COMMON, **given).fit(**made | arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_own_step_may_drive_an_optimizer_by_closure(tmp_path: Path, observers: list[Any]) -> None:
    made = script(rows=10)
    made["optimizer"] = torch.optim.LBFGS(made["model"].parameters(), max_iter=3)
    trainer = Trainer(session_dir=tmp_path, max_epochs=4, **COMMON)

    @trainer.training_step
    def step(batch: Any, state: dict[str, Any]) -> dict[str, Any]:
        def closure() -> torch.Tensor:
            state["optimizer"].zero_grad()
            loss: torch.Tensor = state["loss_fn"](state["model"](batch[0]), batch[1])
            loss.backward()
            return loss

        return {"loss": state["optimizer"].step(closure)}

    losses = trainer.fit(**made).history["train_loss"]
    assert losses[-1] < 0.5 * losses[0]


def test_a_frozen_model_is_refused(tmp_path: Path) -> None:
    made = script()
    made["model"].requires_grad_(False)
    with pytest.raises(UsageError, match="no parameter of the optimizer requires a gradient"):
        Trainer(session_dir=tmp_path, **COMMON).fit(**made)
