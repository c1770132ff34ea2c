"""The default step and the user's own: what they train, what they refuse, and what the guard keeps from the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from automode.errors import DataError, UsageError
from automode.planner.policy import Policy
from automode.trainer.fit_request import FitRequest
from automode.trainer.run_parts import RunParts, prepare
from automode.trainer.running import begin
from automode.trainer.settings import Settings
from automode.trainer.trainer import Trainer

COMMON: dict[str, Any] = {"progress": False, "console": False}


def script(rows: int = 64, batch_size: int = 8, rate: float = 0.1) -> dict[str, Any]:
    torch.manual_seed(1)
    inputs = torch.randn(rows, 5)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9),
        "loss_fn": nn.CrossEntropyLoss(),
        "train_loader": DataLoader(TensorDataset(inputs, (inputs[:, 0] > 0).long()), batch_size=batch_size),
    }


def weights_of(made: dict[str, Any]) -> list[Tensor]:
    return [p.detach().clone() for p in made["model"].parameters()]


def same(mine: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))


def poison(made: dict[str, Any], batch: int) -> None:
    """Make one batch's loss NaN."""
    size = made["train_loader"].batch_size
    made["train_loader"].dataset.tensors[0][batch * size] = float("nan")


def test_the_accumulation_example_of_the_seed_runs_as_it_is(tmp_path: Path, observers: list[Any]) -> None:
    made = script()
    trainer = Trainer(project="demo", run_name="accum", max_epochs=2, session_dir=tmp_path, **COMMON)

    @trainer.training_step
    def train_step(batch: Any, state: Any) -> Any:
        accum = 4  # 4 micro-batches per optimizer step
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
    result = trainer.fit(**made)

    bare = script()
    losses = []
    for i, (x, y) in enumerate([*bare["train_loader"], *bare["train_loader"]]):
        if i % 4 == 0:
            bare["optimizer"].zero_grad(set_to_none=True)
        loss = bare["loss_fn"](bare["model"](x), y) / 4
        loss.backward()
        losses.append(loss.item())
        if i % 4 == 3:
            bare["optimizer"].step()
    assert same(weights_of(made), weights_of(bare))
    assert observers[0].column("loss") == losses
    assert result.steps == 16
    # A batch without an optimizer step is no failed step, however many there are in a row.
    assert observers[0].column("applied") == [1.0] * 16


def test_the_state_holds_what_is_documented_and_keeps_what_the_step_puts_there(
    tmp_path: Path, observers: list[Any]
) -> None:
    made = script()
    scheduler = torch.optim.lr_scheduler.StepLR(made["optimizer"], 1, 0.5)
    trainer = Trainer(max_epochs=2, session_dir=tmp_path, scheduler_interval="manual", **COMMON)
    seen: list[tuple[int, int, int]] = []

    @trainer.training_step
    def step(batch: Any, state: dict[str, Any]) -> dict[str, Any]:
        assert (state["model"], state["optimizer"], state["loss_fn"]) == (
            made["model"],
            made["optimizer"],
            made["loss_fn"],
        )
        assert state["scheduler"] is scheduler
        assert state["device"] == torch.device("cpu")
        state["mine"] = state.get("mine", 0) + 1
        seen.append((state["step"], state["epoch"], state["mine"]))
        loss = state["loss_fn"](state["model"](batch[0]), batch[1])
        state["optimizer"].zero_grad()
        loss.backward()
        state["optimizer"].step()
        return {"loss": loss, "half": loss.item() / 2, "count": torch.tensor(3)}

    trainer.fit(**made, scheduler=scheduler)
    assert seen == [(i, i // 8, i + 1) for i in range(16)]
    observer = observers[0]
    assert observer.column("half") == [loss / 2 for loss in observer.column("loss")]
    assert observer.column("count") == [3.0] * 16
    assert scheduler.last_epoch == 0


def test_outputs_and_targets_that_an_own_step_returns_give_per_sample_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, observers: list[Any]
) -> None:
    probes: list[Any] = []
    prepare = __import__("automode.trainer.running", fromlist=["prepare"]).prepare

    def noting(*args: Any, **given: Any) -> Any:
        parts = prepare(*args, **given)
        probes.append(parts.probe)
        return parts

    monkeypatch.setattr("automode.trainer.running.prepare", noting)
    for returned, visits in (({"outputs", "targets"}, 64), (set(), 0)):
        trainer = Trainer(max_epochs=1, automode="observe", session_dir=tmp_path, **COMMON)

        @trainer.training_step
        def step(batch: Any, state: dict[str, Any], names: Any = returned) -> dict[str, Any]:
            outputs = state["model"](batch[0])
            loss = state["loss_fn"](outputs, batch[1])
            state["optimizer"].zero_grad()
            loss.backward()
            state["optimizer"].step()
            every = {"loss": loss.detach(), "outputs": outputs, "targets": batch[1]}
            return {name: value for name, value in every.items() if name in {"loss", *names}}

        trainer.fit(**script())
        assert probes[-1].ledger.visits == visits


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (None, UsageError, "returned a NoneType; it must return a mapping with the entry `loss`"),
        ({"accuracy": 1.0}, UsageError, r"returned keys \['accuracy'\]"),
        ({"loss": torch.zeros(3)}, DataError, r"the loss is a tensor of shape \(3,\)"),
        ({"loss": "low"}, DataError, "the loss is a str"),
        ({"loss": 1.0, "step": 2}, UsageError, "'step', which is a column that automode writes"),
        ({"loss": 1.0, "lr_0": 2}, UsageError, "'lr_0', which is a column"),
        ({"loss": 1.0, 3: 2}, UsageError, "names a metric 3"),
        ({"loss": 1.0, "picture": torch.zeros(2, 2)}, DataError, "'picture' is a tensor of shape"),
    ],
)
def test_an_own_step_that_returns_something_else_is_told_what_to_return(
    returned: Any, error: Any, message: str, tmp_path: Path, observers: list[Any]
) -> None:
    trainer = Trainer(session_dir=tmp_path, **COMMON)
    trainer.training_step(lambda batch, state: returned)
    with pytest.raises(error, match=message) as caught:
        trainer.fit(**script())
    assert observers[0].told("abort") == [("abort", 0, caught.value)]


def test_training_step_decorates_functions_only() -> None:
    with pytest.raises(UsageError, match=r"a function of \(batch, state\)"):
        Trainer().training_step(3)  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("batch", "came"),
    [
        ({"x": torch.zeros(4, 5), "y": torch.zeros(4)}, "a dict with the keys 'x', 'y'"),
        (torch.zeros(4, 5), "a Tensor"),
        ((torch.zeros(4, 5),), "a tuple of 1"),
        ([torch.zeros(4, 5)] * 3, "a list of 3"),
    ],
)
def test_a_batch_that_is_no_pair_needs_a_step_of_its_own(
    batch: Any, came: str, tmp_path: Path, observers: list[Any]
) -> None:
    made = script() | {"train_loader": [batch]}
    with pytest.raises(DataError, match=f"the loader yields {came}.*@trainer.training_step"):
        Trainer(session_dir=tmp_path, **COMMON).fit(**made)


def test_a_loss_that_is_no_scalar_is_refused(tmp_path: Path, observers: list[Any]) -> None:
    made = script() | {"loss_fn": nn.CrossEntropyLoss(reduction="none")}
    with pytest.raises(DataError, match=r"shape \(8,\), but must be a tensor with one element"):
        Trainer(session_dir=tmp_path, **COMMON).fit(**made)


def test_a_nan_loss_is_watched_as_it_is_with_one_warning(tmp_path: Path, observers: list[Any]) -> None:
    made, bare = script(), script()
    poison(made, 3)
    poison(bare, 3)
    for x, y in [*bare["train_loader"], *bare["train_loader"]]:
        bare["optimizer"].zero_grad(set_to_none=True)
        bare["loss_fn"](bare["model"](x), y).backward()
        bare["optimizer"].step()
    with pytest.warns(RuntimeWarning, match="not finite from step 4 on") as caught:
        Trainer(max_epochs=2, automode="observe", session_dir=tmp_path, **COMMON).fit(**made)
    assert len(caught) == 1
    assert all(p.isnan().all() for p in weights_of(made)[2:])
    assert [p.isnan().tolist() for p in weights_of(made)] == [p.isnan().tolist() for p in weights_of(bare)]
    assert observers[0].column("finite") == [1.0] * 3 + [0.0] * 13


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_the_guard_skips_a_batch_that_is_not_finite_and_trains_on_the_others_as_if_it_were_not_there(
    clip_norm: float | None, tmp_path: Path, observers: list[Any]
) -> None:
    made, bare = script(), script()
    poison(made, 3)
    for i, (x, y) in enumerate(bare["train_loader"]):
        if i != 3:
            bare["optimizer"].zero_grad(set_to_none=True)
            bare["loss_fn"](bare["model"](x), y).backward()
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(bare["model"].parameters(), clip_norm)
            bare["optimizer"].step()
    result = Trainer(automode="act", clip_norm=clip_norm, session_dir=tmp_path, **COMMON).fit(**made)
    assert same(weights_of(made), weights_of(bare))
    observer = observers[0]
    assert observer.told("skipped") == [("skipped", 3, "the loss is nan")]
    assert observer.told("stepped") == [("stepped",)]
    assert observer.column("applied") == [1, 1, 1, 0, 1, 1, 1, 1]
    assert observer.column("step") == [1, 2, 3, 3, 4, 5, 6, 7]
    assert result.steps == 7
    assert result.reason == "max_epochs"
    assert result.history["train_loss"][0] == pytest.approx(
        sum(loss for loss in observer.column("loss") if loss == loss) / 7
    )


def test_the_guard_makes_an_own_step_with_a_bad_gradient_a_step_that_changes_nothing(
    tmp_path: Path, observers: list[Any]
) -> None:
    made = script()
    poison(made, 3)
    trainer = Trainer(automode="act", session_dir=tmp_path, **COMMON)
    kept: list[list[Tensor]] = []

    @trainer.training_step
    def step(batch: Any, state: dict[str, Any]) -> dict[str, Any]:
        state["optimizer"].zero_grad()
        loss = state["loss_fn"](state["model"](batch[0]), batch[1])
        loss.backward()
        state["optimizer"].step()
        kept.append(weights_of(made))
        return {"loss": loss.detach()}

    trainer.fit(**made)
    assert same(kept[2], kept[3])
    assert not same(kept[3], kept[4])
    assert not any(p.isnan().any() for p in weights_of(made))
    assert observers[0].column("applied") == [1, 1, 1, 0, 1, 1, 1, 1]
    assert observers[0].told("skipped") == [("skipped", 3, "the gradient norm is nan")]


def test_bf16_is_autocast_and_nothing_else(tmp_path: Path, observers: list[Any]) -> None:
    made, bare = script(), script()
    losses = []
    for x, y in bare["train_loader"]:
        bare["optimizer"].zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = bare["loss_fn"](bare["model"](x), y)
        loss.backward()
        bare["optimizer"].step()
        losses.append(loss.item())
    Trainer(precision="bf16", automode="observe", session_dir=tmp_path, **COMMON).fit(**made)
    assert observers[0].column("loss") == losses
    assert same(weights_of(made), weights_of(bare))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU refuses fp16")
def test_fp16_needs_cuda(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='precision="fp16" needs CUDA, and this run is on cpu'):
        Trainer(precision="fp16", session_dir=tmp_path, **COMMON).fit(**script())
    assert list(tmp_path.iterdir()) == []


def test_the_gradient_norm_is_taken_before_clipping_and_before_the_optimizer_writes_to_it(
    tmp_path: Path, observers: list[Any]
) -> None:
    def nesterov(made: dict[str, Any]) -> dict[str, Any]:
        parameters = made["model"].parameters()
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, foreach=True)
        return made | {"optimizer": optimizer}

    for clip_norm in (None, 1e-3):
        bare = nesterov(script())
        norms = []
        for x, y in bare["train_loader"]:
            bare["optimizer"].zero_grad(set_to_none=True)
            bare["loss_fn"](bare["model"](x), y).backward()
            norms.append(float(nn.utils.get_total_norm([p.grad for p in bare["model"].parameters()])))
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(bare["model"].parameters(), clip_norm)
            bare["optimizer"].step()
        Trainer(clip_norm=clip_norm, session_dir=tmp_path, **COMMON).fit(**nesterov(script()))
        assert observers[-1].column("grad_norm") == pytest.approx(norms, rel=1e-6)


def test_the_optimizer_has_no_hooks_left_after_fit_even_after_an_error(
    tmp_path: Path, observers: list[Any]
) -> None:
    made = script()
    trainer = Trainer(session_dir=tmp_path, **COMMON)

    @trainer.training_step
    def step(batch: Any, state: dict[str, Any]) -> Any:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        trainer.fit(**made)
    optimizer = made["optimizer"]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def scaled(tmp_path: Path, own_step: Any = None, *, size: float = 1.0) -> tuple[RunParts, dict[str, Any]]:
    """A run under gradient scaling; ``fit`` asks for CUDA, the step itself does not."""
    made = script()
    made["train_loader"].dataset.tensors[0].mul_(size)
    request = FitRequest(**made)
    parts = prepare(Settings(session_dir=tmp_path, automode="act", **COMMON), Policy(), request, own_step)
    parts.trunk.precision = "fp16"
    return parts, made


def bare_scaled(size: float, accumulate: int = 1) -> tuple[dict[str, Any], list[bool]]:
    made = script()
    made["train_loader"].dataset.tensors[0].mul_(size)
    scaler, applied = torch.amp.GradScaler("cpu"), []
    for i, (x, y) in enumerate(made["train_loader"]):
        if i % accumulate == 0:
            made["optimizer"].zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.float16):
            loss = made["loss_fn"](made["model"](x), y) / accumulate
        scaler.scale(loss).backward()
        before = weights_of(made)
        if i % accumulate == accumulate - 1:
            scaler.step(made["optimizer"])
            scaler.update()
            applied.append(not same(before, weights_of(made)))
    return made, applied


def test_under_gradient_scaling_the_scaler_decides_and_a_skipped_step_is_no_applied_one(
    tmp_path: Path, observer_of: Any
) -> None:
    for size in (1.0, 30.0):
        parts, made = scaled(tmp_path, size=size)
        observer = observer_of(parts)
        begin(parts, observer).run()
        bare, applied = bare_scaled(size)
        assert same(weights_of(made), weights_of(bare))
        assert observer.column("applied") == [float(one) for one in applied]
        assert len(observer.told("skipped")) == applied.count(False)
        assert all(applied) == (size == 1.0)
        norms = observer.column("grad_norm")
        assert [norm < 1e3 for norm in norms] == applied


def test_an_own_accumulating_step_under_gradient_scaling_is_watched_at_its_true_scale(
    tmp_path: Path, observer_of: Any
) -> None:
    accum = 4
    done = 0

    def train_step(batch: Any, state: dict[str, Any]) -> dict[str, Any]:
        nonlocal done
        if done % accum == 0:
            state["optimizer"].zero_grad(set_to_none=True)
        x, y = batch
        with state["autocast"]:
            loss = state["loss_fn"](state["model"](x), y) / accum
        state["scaler"].scale(loss).backward()
        if done % accum == accum - 1:
            state["scaler"].step(state["optimizer"])
            state["scaler"].update()
        done += 1
        return {"loss": loss.detach()}

    for size in (1.0, 30.0):
        done = 0
        parts, made = scaled(tmp_path, train_step, size=size)
        observer = observer_of(parts)
        begin(parts, observer).run()
        bare, applied = bare_scaled(size, accum)
        assert same(weights_of(made), weights_of(bare))
        expected = [1.0] * 3 + [float(applied[0])] + [1.0] * 3 + [float(applied[1])]
        assert observer.column("applied") == expected
        if size == 1.0:
            assert all(norm < 10 for norm in observer.column("grad_norm"))
