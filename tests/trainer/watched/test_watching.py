"""A watched loop is the bare loop bit by bit, and its session is sound however it ends."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import automode
from automode.errors import DataError, NotExecutableError, UsageError
from automode.session import Session
from automode.trainer.random_state import RandomState

EPOCHS = 3


def plainly(made: Any, x: Any, y: Any, tell: Callable[..., None] | None) -> float:
    made.optimizer.zero_grad()
    out = made.model(x)
    loss = made.loss_fn(out, y)
    loss.backward()
    if tell is not None:
        tell(loss, out, y)
    made.optimizer.step()
    return loss.item()


def clipped_and_scheduled(made: Any, x: Any, y: Any, tell: Callable[..., None] | None) -> float:
    made.optimizer.zero_grad()
    out = made.model(x)
    loss = made.loss_fn(out, y)
    if tell is not None:
        tell(loss, out, y)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(made.model.parameters(), 0.5)
    made.optimizer.step()
    made.scheduler.step()
    return loss.item()


def accumulating(made: Any, x: Any, y: Any, tell: Callable[..., None] | None) -> float:
    """Two halves of a batch into one optimizer step."""
    made.optimizer.zero_grad()
    total = 0.0
    for half_x, half_y in zip(x.chunk(2), y.chunk(2), strict=True):
        out = made.model(half_x)
        loss = made.loss_fn(out, half_y)
        (loss / 2).backward()
        if tell is not None:
            tell(loss, out, half_y)
        total += loss.item() / 2
    made.optimizer.step()
    return total


def autocast(made: Any, x: Any, y: Any, tell: Callable[..., None] | None) -> float:
    made.optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out = made.model(x)
        loss = made.loss_fn(out, y)
    loss.backward()
    if tell is not None:
        tell(loss, out, y)
    made.optimizer.step()
    return loss.item()


def autocast_around_all(made: Any, x: Any, y: Any, tell: Callable[..., None] | None) -> float:
    with torch.autocast("cpu", torch.bfloat16):
        return plainly(made, x, y, tell)


def closure(made: Any, x: Any, y: Any, tell: Callable[..., None] | None) -> float:
    """The optimizer calls the forward pass itself."""
    seen: list[Any] = []

    def again() -> torch.Tensor:
        made.optimizer.zero_grad()
        out = made.model(x)
        loss = made.loss_fn(out, y)
        loss.backward()
        seen[:] = [loss, out]
        return loss

    made.optimizer.step(again)
    if tell is not None:
        tell(seen[0], seen[1], y)
    return seen[0].item()


STEPS = [plainly, clipped_and_scheduled, accumulating, autocast, autocast_around_all, closure]


def bare(made: Any, one: Any) -> list[float]:
    return [one(made, x, y, None) for _ in range(EPOCHS) for x, y in made.loader]


@pytest.mark.torch
@pytest.mark.parametrize("mode", ["observe", "off", "propose"])
@pytest.mark.parametrize("one", STEPS)
def test_a_watched_loop_ends_where_the_bare_one_ends_bit_by_bit(
    one: Any, mode: Any, script: Any, equal: Any, watching: Any, soundness: Any, frame: Any
) -> None:
    alone = script(steplr=True)
    losses = bare(alone, one)
    expected = alone.state()
    made = script(steplr=True)
    watch = watching(
        made, mode=mode, loss_fn=made.loss_fn, train=made.loader, val=made.held_out, scheduler=made.scheduler,
        total_steps=21,
    )  # fmt: skip
    seen = []
    for epoch in range(EPOCHS):
        for x, y in watch.batches():
            with watch.step() as s:
                seen.append(one(made, x, y, s.loss))
        if epoch == 1:
            watch.validate()
    assert equal(made.state(), expected)
    assert seen == losses
    watch.close()
    assert equal(made.state(), expected)
    assert frame(watch.path, "loss") == pytest.approx(losses, rel=1e-6)
    assert frame(watch.path, "step") == list(range(1, len(losses) + 1))
    soundness(watch.path)
    if mode != "off" and one not in (autocast, autocast_around_all, accumulating):
        assert watch.why_no_samples is None
        assert watch.samples is not None
        assert watch.samples.n_seen == 100
        assert watch.samples.visits == 300


@pytest.mark.torch
@pytest.mark.parametrize("after", [False, True])
def test_observe_alone_sees_what_a_block_sees_before_or_after_the_optimizers_step(
    after: bool, script: Any, equal: Any, watching: Any, soundness: Any, frame: Any
) -> None:
    alone = script()
    losses = bare(alone, plainly)
    made = script()
    watch = watching(made, loss_fn=made.loss_fn, train=made.loader)
    positions = torch.arange(100)
    for _ in range(EPOCHS):
        for x, y in made.loader:
            made.optimizer.zero_grad()
            out = made.model(x)
            loss = made.loss_fn(out, y)
            loss.backward()
            ids = [int(i) for row in x for i in positions[(made.loader.dataset.tensors[0] == row).all(1)]]
            if not after:
                watch.observe(loss, out, y, ids)
            made.optimizer.step()
            if after:
                watch.observe(loss, out, y, torch.tensor(ids))
    assert equal(made.state(), alone.state())
    watch.close()
    assert frame(watch.path, "loss") == pytest.approx(losses, rel=1e-6)
    assert frame(watch.path, "applied") == [1.0] * len(losses)
    assert watch.samples.visits == 300
    soundness(watch.path)


@pytest.mark.torch
def test_the_row_holds_the_norm_of_the_gradients_and_the_rate_that_the_optimizer_stepped_with(
    script: Any, watching: Any, frame: Any
) -> None:
    for split in (False, True):
        made = script(steplr=True)
        watch = watching(made, run_name="norms")
        norms, rates = [], []
        for x, y in made.loader:
            with watch.step() as s:
                made.optimizer.zero_grad()
                loss = made.loss_fn(made.model(x), y)
                loss.backward()
                s.loss(loss)
                norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in made.model.parameters()])))
                rates.append(made.optimizer.param_groups[0]["lr"])
                made.optimizer.step()
                made.scheduler.step()
                if split:
                    made.optimizer.zero_grad()
        watch.close()
        assert frame(watch.path, "grad_norm") == pytest.approx(norms, rel=1e-5)
        assert frame(watch.path, "lr_0") == rates


@pytest.mark.torch
def test_batches_that_accumulate_are_rows_of_their_own_where_each_has_a_block(
    script: Any, equal: Any, watching: Any, frame: Any, soundness: Any
) -> None:
    def train(made: Any, watch: Any) -> None:
        for number, (x, y) in enumerate(made.loader):
            with watch.step() as s:
                loss = made.loss_fn(made.model(x), y)
                (loss / 2).backward()
                s.loss(loss)
                if number % 2:
                    made.optimizer.step()
                    made.optimizer.zero_grad()

    alone = script(norm=False)
    for number, (x, y) in enumerate(alone.loader):
        (alone.loss_fn(alone.model(x), y) / 2).backward()
        if number % 2:
            alone.optimizer.step()
            alone.optimizer.zero_grad()
    made = script(norm=False)
    watch = watching(made)
    train(made, watch)
    watch.close()
    assert equal(made.state(), alone.state())
    assert frame(watch.path, "applied") == [1.0] * 7
    assert all(norm > 0 for norm in frame(watch.path, "grad_norm"))
    soundness(watch.path)


@pytest.mark.torch
def test_each_of_several_batches_in_a_block_brings_its_own_samples(
    script: Any, watching: Any, frame: Any
) -> None:
    made = script(norm=False, dropout=0.0)
    watch = watching(made, loss_fn=made.loss_fn, train=made.loader)
    inputs, targets = made.loader.dataset.tensors
    losses = []
    for _ in range(2):
        with watch.step() as s:
            made.optimizer.zero_grad()
            for part in torch.arange(100).split(30):
                out = made.model(inputs[part])
                loss = made.loss_fn(out, targets[part])
                (loss / 4).backward()
                s.loss(loss, out, targets[part], part)
                losses.append(loss.item())
            with torch.no_grad():
                each = torch.nn.functional.cross_entropy(made.model(inputs), targets, reduction="none")
            made.optimizer.step()
    watch.close()
    assert watch.samples.visits == 200
    assert watch.samples.column("last_loss").tolist() == pytest.approx(each.tolist(), rel=1e-5)
    assert frame(watch.path, "loss") == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 4], rel=1e-6)


@pytest.mark.torch
def test_a_step_that_the_scaler_leaves_out_is_told_as_one(
    script: Any, watching: Any, frame: Any, soundness: Any
) -> None:
    made = script(norm=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    watch = watching(made, scaler=scaler)
    for number, (x, y) in enumerate(made.loader):
        with watch.step() as s:
            made.optimizer.zero_grad()
            loss = made.loss_fn(made.model(x), y) * (float("inf") if number == 2 else 1.0)
            scaler.scale(loss).backward()
            s.loss(loss)
            scaler.step(made.optimizer)
            scaler.update()
    watch.close()
    assert frame(watch.path, "applied") == [1, 1, 0, 1, 1, 1, 1]
    assert frame(watch.path, "step") == [1, 2, 2, 3, 4, 5, 6]
    soundness(watch.path)


@pytest.mark.torch
def test_two_loops_in_one_process_do_not_see_each_other(
    script: Any, equal: Any, watching: Any, soundness: Any, frame: Any
) -> None:
    alone = script()
    losses = bare(alone, plainly)
    expected = alone.state()
    made, other = script(), script(rate=0.5, optimizer="sgd")
    torch.manual_seed(0)
    before = RandomState.capture()
    first, second = watching(made, run_name="first"), watching(other, run_name="second")
    assert RandomState.capture().same_as(before)
    made = script()  # the random state of the bare run's beginning
    first.close()
    first = watching(made, run_name="first")
    for _ in range(EPOCHS):
        for x, y in made.loader:
            with first.step() as s:
                plainly(made, x, y, s.loss)
            between = RandomState.capture()
            with second.step() as s:
                plainly(other, x, y, s.loss)
            between.restore()
    assert equal(made.state(), expected)
    first.close()
    second.close()
    assert frame(first.path, "loss") == pytest.approx(losses, rel=1e-6)
    assert frame(second.path, "loss") != frame(first.path, "loss")
    for watch in (first, second):
        soundness(watch.path)


@pytest.mark.torch
def test_an_exception_in_a_block_ends_the_session_and_goes_on_its_way(
    script: Any, watching: Any, soundness: Any
) -> None:
    made = script()
    watch = watching(made)
    error = RuntimeError("the disk is on fire")
    batches = list(made.loader)

    def train() -> None:
        for number, (x, y) in enumerate(batches):
            with watch.step() as s:
                plainly(made, x, y, s.loss)
                if number == 3:
                    raise error

    with pytest.raises(RuntimeError) as caught:
        train()
    assert caught.value is error
    events = soundness(watch.path)
    assert events[-1].body["why"] == "failed: RuntimeError: the disk is on fire"
    with Session.open(watch.path) as session:
        assert len(session.frame("loss")) == 4  # the last one had reached the weights
    assert not made.optimizer._optimizer_step_pre_hooks
    assert not made.optimizer._optimizer_step_post_hooks
    with pytest.warns(RuntimeWarning, match="nothing is watched any more"), watch.step() as s:
        plainly(made, *batches[0], s.loss)
    with watch.step() as s:  # told once
        plainly(made, *batches[0], s.loss)
    watch.close()


@pytest.mark.torch
def test_an_exception_between_steps_ends_the_session_where_the_watch_is_a_context(
    script: Any, tmp_path: Path, soundness: Any
) -> None:
    made = script()
    with (
        pytest.raises(KeyboardInterrupt),
        automode.watch(made.model, made.optimizer, session_dir=tmp_path, console=False) as watch,
    ):
        raise KeyboardInterrupt
    assert soundness(watch.path)[-1].body["why"].startswith("stopped: KeyboardInterrupt")


@pytest.mark.torch
def test_a_watch_that_is_dropped_ends_its_session_and_says_so(
    script: Any, tmp_path: Path, soundness: Any
) -> None:
    made = script()
    watch = automode.watch(made.model, made.optimizer, session_dir=tmp_path, console=False)
    for x, y in made.loader:
        with watch.step() as s:
            plainly(made, x, y, s.loss)
    path = watch.path
    del watch, s
    gc.collect()
    assert "the watch was never closed" in soundness(path)[-1].body["why"]
    assert not made.optimizer._optimizer_step_pre_hooks


LEFT_OPEN = """
    import sys, torch, automode
    from torch import nn
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = automode.watch(model, optimizer, session_dir=sys.argv[1], console=False)
    for step in range(5):
        with watch.step() as s:
            optimizer.zero_grad()
            loss = model(torch.ones(3, 2)).square().mean()
            loss.backward()
            s.loss(loss)
            optimizer.step()
    raise ValueError("the loader broke")
"""


@pytest.mark.torch
def test_a_script_that_an_exception_ends_leaves_a_session_that_says_so(
    tmp_path: Path, soundness: Any
) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(LEFT_OPEN), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "runs")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: the loader broke\n")
    (database,) = (tmp_path / "runs").glob("*/*/session.db")
    assert soundness(database.parent)[-1].body["why"] == "failed: ValueError: the loader broke"
    with Session.open(database.parent) as session:
        assert len(session.frame("loss")) == 5


@pytest.mark.torch
def test_what_cannot_be_watched_is_refused_with_what_to_do(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = script()

    def refused(match: str, error: type[Exception] = UsageError, **arguments: Any) -> None:
        values = {"model": made.model, "optimizer": made.optimizer, "session_dir": tmp_path, "console": False}
        with pytest.raises(error, match=match):
            automode.watch(**(values | arguments))

    refused("did you mean 'observe'", mode="observ")
    refused("follows one optimizer, and 2 came", optimizer=[made.optimizer, made.optimizer])
    refused("torch.nn.modules.module.Module", model=3)
    refused("total_steps=epochs", mode="act")
    refused("give batch_size=", mode="propose", total_steps=5)
    refused("give loss_fn too", val=made.held_out)
    refused("scaler must be a torch.amp.GradScaler", scaler=3)
    refused("batch_size must be a whole number at least 1, got 0", batch_size=0)
    refused("total_steps must be a whole number at least 1, got 0", total_steps=0)
    refused("train must be a DataLoader", train=5)
    refused("val must be a DataLoader", val=5, loss_fn=made.loss_fn)
    refused("val is an iterator, which can be read only once", val=iter([]), loss_fn=made.loss_fn)
    refused("on_card takes a list of functions", on_card=[5])
    refused("on_card takes a list of functions", on_card=print)
    refused("give val too", slices={"a": [1]})
    refused("give both", val=lambda model, ids: ids)
    refused("give both", val=made.held_out, val_samples=3)
    refused(
        "give slices as lists of numbers", val=lambda m, i: i, val_samples=9, slices={"a": lambda x, y: y > 0}
    )
    refused(r"shape \(2,\) for 4 samples", DataError, val=lambda m, i: [1.0, 2.0], val_samples=9)
    refused("must give the loss of each sample", DataError, val=lambda m, i: "none", val_samples=9)
    monkeypatch.setenv("AUTOMODE_RESUME", "somewhere")
    refused("cannot be resumed by automode", NotExecutableError)
    assert not list(tmp_path.iterdir())
    assert not made.optimizer._optimizer_step_pre_hooks


@pytest.mark.torch
def test_mistakes_in_the_loop_are_told_where_they_are_made(script: Any, watching: Any) -> None:
    made = script()
    watch = watching(made)
    with pytest.raises(UsageError, match="watched already"):
        watching(made)
    x, y = next(iter(made.loader))
    with watch.step():
        pass  # a batch that is left out
    with pytest.raises(UsageError, match="give watch the training loader"):
        watch.batches()
    with pytest.raises(UsageError, match="give watch a val="):
        watch.validate()
    with pytest.raises(UsageError, match="must have one element"):
        watch.observe(torch.ones(3))
    with pytest.raises(UsageError, match="a list, but must be a number"):
        watch.observe([1.0])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="a real number"):
        watch.observe(torch.tensor(1j))
    with pytest.raises(UsageError, match="must be a number"):
        watch.observe(10**400)
    with pytest.raises(UsageError, match="metrics must be a mapping"):
        watch.observe(1.0, metrics="abc")  # type: ignore[arg-type]
    for ids in ("abc", [1.5], 5, torch.zeros(3, 1)):
        with pytest.raises(UsageError, match="ids must be the samples' positions"):
            watch.observe(1.0, x, y, ids)
    made.loss_fn(made.model(x), y).backward()
    with pytest.raises(UsageError, match=r"call s\.loss"), watch.step():
        made.optimizer.step()
    with pytest.raises(UsageError, match="inside of another"), watch.step(), watch.step():
        pass
    other = watching(script())
    other.close()
    with pytest.raises(UsageError, match="was closed at step 0"), other.step():
        pass


@pytest.mark.torch
def test_metrics_are_columns_and_reserved_names_are_refused(script: Any, watching: Any, frame: Any) -> None:
    made = script()
    watch = watching(made)
    for x, y in made.loader:
        with watch.step() as s:
            made.optimizer.zero_grad()
            out = made.model(x)
            loss = made.loss_fn(out, y)
            loss.backward()
            s.loss(loss, metrics={"right": (out.argmax(1) == y).float().mean()})
            made.optimizer.step()
    with pytest.raises(UsageError, match="a column that automode writes"):
        watch.observe(1.0, metrics={"grad_norm": 1.0})
    made = script()
    watch = watching(made)
    watch.observe(1.0, metrics={"right": "yes"})
    with pytest.raises(DataError, match="must be a number"):
        made.optimizer.step()


@pytest.mark.torch
def test_batches_that_the_watch_did_not_give_have_no_ids(script: Any, watching: Any) -> None:
    """After a pass that was left early, and beside one, a step's samples would otherwise be taken for those given last."""
    made = script()
    watch = watching(made, loss_fn=made.loss_fn, train=made.loader)
    for x, y in watch.batches():
        with watch.step() as s:
            plainly(made, x, y, s.loss)
        break
    visits = watch.samples.visits
    with watch.step() as s:
        plainly(made, *next(iter(made.loader)), s.loss)
    assert watch.samples.visits == visits
    left = watch.batches()
    next(left)
    assert len(list(watch.batches())) == len(made.loader)
    with pytest.raises(UsageError, match="begun again before this pass had ended"):
        next(left)
    with pytest.raises(UsageError, match="begun again before this pass had ended"):
        for _ in zip(watch.batches(), watch.batches(), strict=True):
            pass


@pytest.mark.torch
def test_samples_say_why_there_are_none(script: Any, watching: Any) -> None:
    made = script()
    blind = watching(made)
    assert blind.samples is None
    assert blind.why_no_samples == "per-sample losses need the loss_fn of watch"
    blind.close()
    made = script()
    silent = watching(made, loss_fn=made.loss_fn, train=made.loader)
    for x, y in made.loader:
        with silent.step() as s:
            plainly(made, x, y, s.loss)
    assert silent.samples is None
    assert "watch.batches() knows the ids" in str(silent.why_no_samples)
    silent.close()
    made = script()
    watch = watching(made, loss_fn=made.loss_fn, train=made.loader)
    x, y = next(iter(made.loader))
    for _ in range(5):
        with watch.step() as s:
            made.optimizer.zero_grad()
            out = made.model(x)
            loss = made.loss_fn(out, y)
            loss.backward()
            s.loss(loss, out, y, ids=range(95, 95 + len(x)))
            made.optimizer.step()
    watch.close()
    assert watch.samples is None
    assert "samples are numbered from 0 to 99" in str(watch.why_no_samples)
