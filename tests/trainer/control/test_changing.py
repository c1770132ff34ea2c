"""Changing a run while it trains: its length, its rate, and the state that it goes on from."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from automode import Session, replay
from automode.errors import SessionCorruptError, SessionError, UsageError
from automode.session.standing import standing_of
from automode.trainer.checkpointing import CheckpointKeeper

pytestmark = pytest.mark.torch


class Cut(Exception):
    """Ends a run as if it had been killed: nothing is stored for it."""


@pytest.fixture
def cut_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Cuts whatever trains once it has trained on so many batches; returns a function that lets later runs live."""

    def cut(batches: int) -> Any:
        before = CheckpointKeeper.after_step, CheckpointKeeper.rescue

        def after_step(keeper: CheckpointKeeper) -> None:
            before[0](keeper)
            if keeper._loop.batches == batches:
                raise Cut

        monkeypatch.setattr(CheckpointKeeper, "after_step", after_step)
        monkeypatch.setattr(CheckpointKeeper, "rescue", lambda *_: None)

        def live() -> None:
            monkeypatch.setattr(CheckpointKeeper, "after_step", before[0])
            monkeypatch.setattr(CheckpointKeeper, "rescue", before[1])

        return live

    return cut


def changed(desk: Any, made: dict[str, Any] | None = None, **given: Any) -> Any:
    """A run of three epochs that becomes one of four, at a tenth of its rate, after 17 of its steps."""
    run = desk.run(made, **given)
    run.train(17)
    run.trainer.set(max_epochs=4, lr=0.01, actor="ann", timeout=desk.patience)
    return run


def test_a_longer_run_at_another_rate_is_what_was_asked_for_and_replays(desk: Any) -> None:
    result = changed(desk).finish()
    assert result.steps == 48
    rates = result.frame("lr_0")
    assert set(rates[:17]) == {0.1}
    assert set(rates[17:]) == {0.01}
    (rate,) = result.session.events("rate_set")
    (length,) = result.session.events("length_set")
    assert (rate.body["step"], rate.body["actor"]) == (17, "ann")
    assert (length.body["max_epochs"], length.body["total_steps"]) == (4, 48)
    assert replay(result.session).differences == 0


@pytest.mark.parametrize("every", ["5 steps", "18 steps"])
def test_a_run_that_is_killed_after_a_change_has_it_when_it_is_resumed(
    every: str, desk: Any, cut_after: Any
) -> None:
    whole = changed(desk, checkpoint_every=every).finish()
    run = changed(desk, checkpoint_every=every)  # stored before the change, or behind it
    live = cut_after(19)
    with pytest.raises(Cut):
        run.finish()
    live()
    resumed = desk.fit(folder=run.folder, resume=run.path, checkpoint_every=every)
    desk.same(whole, resumed)
    assert replay(resumed.session).differences == 0


def test_a_resumed_run_whose_script_asks_for_more_gets_that(desk: Any, cut_after: Any) -> None:
    run = changed(desk, checkpoint_every="18 steps")
    live = cut_after(20)
    with pytest.raises(Cut):
        run.finish()
    live()
    assert desk.fit(folder=run.folder, resume=run.path, max_epochs=5).steps == 60


def test_a_factor_scales_every_group_and_what_the_schedule_computes_from(desk: Any) -> None:
    made = desk.script()
    layers = list(made["model"].parameters())
    made["optimizer"] = torch.optim.SGD(
        [{"params": layers[:2], "lr": 0.1}, {"params": layers[2:], "lr": 0.02}], lr=0.1
    )
    made["scheduler"] = CosineAnnealingLR(made["optimizer"], 36)
    run = desk.run(made, scheduler_interval="step")
    run.train(9)
    before = [group["lr"] for group in made["optimizer"].param_groups]
    rates = run.trainer.set(lr_mul=0.5, timeout=desk.patience).result["rates"]
    assert rates == [rate * 0.5 for rate in before]
    result = run.finish()
    plain = desk.script()
    plain["optimizer"] = torch.optim.SGD(plain["model"].parameters(), lr=0.1)
    plain["scheduler"] = CosineAnnealingLR(plain["optimizer"], 36)
    rates_before = desk.fit(plain, scheduler_interval="step").frame("lr_0")
    assert result.frame("lr_0")[9:].tolist() == pytest.approx((rates_before[9:] / 2).tolist())


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({}, "give one of"),
        ({"max_epochs": 4, "max_steps": 9}, "not both"),
        ({"lr": 0.1, "lr_mul": 0.5}, "not both"),
        ({"lr": -1.0}, "lr"),
        ({"max_epochs": 1}, "give at least 2"),
        ({"max_steps": 17}, "lies behind the run"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_touched(
    asked: dict[str, Any], says: str, desk: Any
) -> None:
    run = desk.run()
    run.train(17)
    with pytest.raises(UsageError, match=says):
        run.trainer.set(**asked, timeout=desk.patience)
    assert run.events("rate_set") == run.events("length_set") == []


def test_a_run_by_epochs_can_end_at_a_step(desk: Any) -> None:
    run = desk.run()
    run.train(17)
    run.trainer.set(max_steps=19, timeout=desk.patience)
    result = run.finish()
    assert (result.steps, result.reason) == (19, "max_steps")


def test_a_rate_of_zero_cannot_be_scaled_to_another(desk: Any) -> None:
    run = desk.run(desk.script(lr=0.0))
    with pytest.raises(UsageError, match="no factor makes it"):
        run.trainer.set(lr=0.1, timeout=desk.patience)


# Earlier states.


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_goes_back_to_an_earlier_state_equals_one_that_never_left_it(
    workers: int, desk: Any
) -> None:
    plain = desk.fit(desk.script(workers=workers))
    run = desk.run(desk.script(workers=workers))
    run.train(14)
    kept = run.trainer.checkpoint(timeout=desk.patience).result["checkpoint"]
    run.train(3)
    run.trainer.set(lr=1.0, timeout=desk.patience)
    run.train(9)
    assert run.trainer.load(kept[:16], timeout=desk.patience).step == 14
    assert run.trainer.wait_until_paused(desk.patience)
    result = run.finish()
    desk.same(plain, result)
    assert replay(result.session).differences == 0
    (resumed,) = result.session.events("resumed")
    assert (resumed.body["actor"], resumed.body["exact"]) == ("trainer", True)


def test_what_was_changed_in_a_story_that_was_left_is_not_changed_again_by_a_resumption(
    desk: Any, cut_after: Any
) -> None:
    plain = desk.fit()
    run = desk.run(checkpoint_every="1000 steps")
    run.train(14)
    kept = run.trainer.checkpoint(timeout=desk.patience).result["checkpoint"]
    run.train(2)
    run.trainer.set(lr=1.0, timeout=desk.patience)
    run.train(2)
    run.trainer.load(kept, timeout=desk.patience)
    live = cut_after(19)
    run.trainer.wait_until_paused(desk.patience)
    with pytest.raises(Cut):
        run.finish()
    live()
    desk.same(plain, desk.fit(folder=run.folder, resume=run.path))


def test_a_generator_of_the_users_goes_back_too(desk: Any) -> None:
    def made() -> dict[str, Any]:
        script = desk.script()
        loader = script["train_loader"]
        generator = torch.Generator().manual_seed(5)
        script["train_loader"] = torch.utils.data.DataLoader(
            loader.dataset, batch_size=8, shuffle=True, generator=generator
        )
        return script

    plain = desk.fit(made())
    run = desk.run(made())
    run.train(5)
    kept = run.trainer.checkpoint(timeout=desk.patience).result["checkpoint"]
    run.train(20)
    run.trainer.load(kept, timeout=desk.patience)
    run.trainer.wait_until_paused(desk.patience)
    desk.same(plain, run.finish())


@pytest.mark.parametrize(
    ("wanted", "says"), [("ab", "too short"), ("best", "no checkpoint"), ("0000ffff", "no checkpoint")]
)
def test_a_state_that_is_not_there_is_refused_with_those_that_are(wanted: str, says: str, desk: Any) -> None:
    run = desk.run()
    run.train(3)
    run.trainer.checkpoint(timeout=desk.patience)
    with pytest.raises(UsageError, match=says):
        run.trainer.load(wanted, timeout=desk.patience)
    assert run.finish().steps == 36


def test_a_damaged_state_is_refused_and_the_run_goes_on(desk: Any) -> None:
    run = desk.run()
    run.train(3)
    digest = run.trainer.checkpoint(timeout=desk.patience).result["checkpoint"]
    folder = run.path / "checkpoints" / digest.removeprefix("sha256:")
    file = next(path for path in folder.iterdir() if path.suffix == ".safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(SessionCorruptError):
        run.trainer.load(digest, timeout=desk.patience)
    assert run.finish().steps == 36


def test_what_a_person_asked_to_store_is_never_deleted_by_newer_states(desk: Any) -> None:
    run = desk.run(checkpoint_every="2 steps", keep_checkpoints=1)
    run.train(3)
    digest = run.trainer.checkpoint(timeout=desk.patience).result["checkpoint"]
    run.train(20)
    assert run.trainer.load(digest, timeout=desk.patience).step == 3
    run.trainer.wait_until_paused(desk.patience)
    run.train(20)
    assert run.trainer.load(digest, timeout=desk.patience).step == 3


def test_without_stored_states_there_is_nothing_to_store_or_load(desk: Any) -> None:
    run = desk.run(checkpoint_every=None)
    with pytest.raises(UsageError, match="checkpoint_every=None"):
        run.trainer.checkpoint(timeout=desk.patience)
    with pytest.raises(UsageError, match="there are: none"):
        run.trainer.load(timeout=desk.patience)
    assert "no stored state" in run.trainer.stop(timeout=desk.patience).told


# A finished run that stays.


def held(desk: Any, **given: Any) -> Any:
    run = desk.run(start_paused=False, hold=True, **given)
    assert run.trainer.wait_until_paused(desk.patience)
    assert run.trainer.waits == "held"
    return run


def test_a_held_run_can_be_tested_and_made_longer_until_it_is_released(desk: Any) -> None:
    longer = desk.fit(max_epochs=4)
    run = held(desk)
    assert run.trainer.test(timeout=desk.patience).result["label"] == "test_1"
    with pytest.raises(Exception, match="has come to its end"):
        run.trainer.resume(timeout=desk.patience)
    assert run.trainer.set(max_epochs=4, timeout=desk.patience).result["total_steps"] == 48
    run.trainer.wait_until_paused(desk.patience)
    assert run.trainer.test(timeout=desk.patience).result["label"] == "test_2"
    run.trainer.release(timeout=desk.patience)
    result = run.ended()
    desk.same(longer, result, decided=False)  # what is planned by the length was planned for the one before
    assert replay(result.session).differences == 0


def test_a_held_run_that_ended_in_the_middle_of_an_epoch_can_be_made_longer(desk: Any) -> None:
    longer = desk.fit(max_epochs=None, max_steps=30)
    run = held(desk, max_epochs=None, max_steps=17)
    run.trainer.set(max_steps=30, timeout=desk.patience)
    run.trainer.wait_until_paused(desk.patience)
    run.trainer.release(timeout=desk.patience)
    desk.same(longer, run.ended(), decided=False)


def test_a_held_run_that_goes_back_waits_there(desk: Any) -> None:
    run = held(desk, checkpoint_every="20 steps")
    assert run.trainer.load(timeout=desk.patience).step == 36
    run.trainer.wait_until_paused(desk.patience)
    assert run.trainer.waits == "paused"
    run.trainer.resume(timeout=desk.patience)
    run.trainer.wait_until_paused(desk.patience)
    assert run.trainer.waits == "held"
    assert "released" in run.trainer.stop(timeout=desk.patience).told
    assert run.ended().steps == 36


def test_a_held_run_without_stored_states_cannot_be_made_longer(desk: Any) -> None:
    run = held(desk, checkpoint_every=None)
    with pytest.raises(SessionError, match="no stored state"):
        run.trainer.set(max_epochs=9, timeout=desk.patience)
    run.trainer.release(timeout=desk.patience)


@pytest.mark.parametrize(
    ("number", "left"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_releases_a_held_run_whose_end_is_recorded_all_the_same(
    number: signal.Signals, left: type[BaseException], desk: Any, tmp_path: Path
) -> None:
    trainer = desk.trainer(hold=True)

    def send() -> None:
        while trainer.waits != "held":
            threading.Event().wait(0.01)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(left):
        trainer.fit(**desk.script())
    sender.join()
    path = next((tmp_path / "fits" / "default").iterdir())
    with Session.open(path) as session:
        (ended,) = session.events("run_ended")
    assert ended.body["why"] == "max_epochs"
    assert ended.body["weights"] is not None


# Tests in the middle.


def test_a_test_in_the_middle_sees_its_label_and_leaves_no_trace(
    desk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOMODE_TEST_LABEL", "mine")
    plain = desk.fit()
    made, seen = desk.script(), []
    made["model"].register_forward_hook(lambda *_: seen.append(os.environ["AUTOMODE_TEST_LABEL"]))
    run = desk.run(made)
    run.train(10)
    first = run.trainer.test(timeout=desk.patience)
    run.train(3)
    second = run.trainer.test(timeout=desk.patience)
    result = run.finish()
    desk.same(plain, result)
    assert (first.result["label"], second.result["label"]) == ("test_1", "test_2")
    assert first.result["metrics"] != second.result["metrics"]
    assert list(dict.fromkeys(seen)) == ["mine", "test_1", "test_2"]
    told = [(r.body["step"], r.body["label"], r.body["n"]) for r in result.session.events("tested")]
    assert told == [(10, "test_1", 40), (13, "test_2", 40)]
    assert replay(result.session).differences == 0


def test_the_test_at_the_end_has_a_label_too(desk: Any) -> None:
    made, seen = desk.script(), []
    made["model"].register_forward_hook(lambda *_: seen.append(os.environ.get("AUTOMODE_TEST_LABEL")))
    run = desk.run(made, do_test_after=True)
    run.trainer.test(timeout=desk.patience)
    assert run.finish().test is not None
    assert list(dict.fromkeys(seen)) == [None, "test_1", "test_2"]


def test_a_scan_that_a_person_asks_for_leaves_no_trace_in_what_is_decided(desk: Any) -> None:
    plain = desk.fit()
    run = desk.run()
    run.train(15)
    found = run.trainer.scan(timeout=desk.patience)
    assert found.result["scanned"]["n"] == 96
    assert "samples seen" in found.told
    run.train(4)
    run.trainer.scan(timeout=desk.patience)
    desk.same(plain, run.finish())


def test_without_per_sample_losses_there_is_nothing_to_scan(desk: Any) -> None:
    run = desk.run(automode=False)
    with pytest.raises(UsageError, match="no exact per-sample losses"):
        run.trainer.scan(timeout=desk.patience)


def test_a_run_that_is_killed_while_it_is_paused_goes_on_from_the_pause(desk: Any, tmp_path: Path) -> None:
    plain = desk.fit()
    run = desk.run()
    run.trainer.step(20, timeout=desk.patience)
    run.trainer.pause(timeout=desk.patience)  # before the twentieth step, or it waits already
    run.trainer.checkpoint(timeout=desk.patience)
    # What a kill leaves behind is what the disk holds now.
    shutil.copytree(run.path, tmp_path / "killed" / "default" / run.path.name)
    killed = tmp_path / "killed" / "default" / run.path.name
    with Session.open(killed) as session:
        assert standing_of(session).condition == "killed"
    desk.same(plain, desk.fit(folder=tmp_path / "killed", resume=killed))
    with Session.open(killed) as session:
        assert standing_of(session).condition == "finished"
