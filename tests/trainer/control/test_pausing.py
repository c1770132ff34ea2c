"""Pausing, stepping, stopping: in the training thread between two steps, and without a trace in what follows."""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any

import pytest
from click.testing import CliRunner

from automode import replay
from automode.cli.main import main
from automode.errors import ConflictError, UsageError
from automode.planner.controls import Order
from automode.trainer.commanding import Commander

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_was_paused_equals_one_that_was_not_bit_for_bit(workers: int, desk: Any) -> None:
    plain = desk.fit(desk.script(workers=workers))
    run = desk.run(desk.script(workers=workers))
    run.train(5)
    run.trainer.resume(timeout=desk.patience)
    run.trainer.pause(timeout=desk.patience)  # wherever it is by then
    run.train(1)
    paused = run.finish()
    desk.same(plain, paused)
    assert replay(paused.session).differences == 0


def test_step_trains_exactly_so_many_steps_and_waits_for_more(desk: Any) -> None:
    run = desk.run()
    assert run.trainer.waits == "paused"
    for steps, reached in ((1, 1), (16, 17), (3, 20)):
        run.train(steps)
        assert run.events("controlled")[-1].body["step"] == reached
    assert run.finish().steps == 36


def test_every_order_is_recorded_with_its_actor_and_its_step(desk: Any) -> None:
    run = desk.run()
    run.trainer.step(4, actor="ann", note="a look", timeout=desk.patience)
    run.trainer.wait_until_paused(desk.patience)
    run.trainer.resume(actor="bob", timeout=desk.patience)
    run.ended()
    told = [
        (r.body["verb"], r.body["actor"], r.body["step"], r.body["note"]) for r in run.events("controlled")
    ]
    assert told == [
        ("pause", "start_paused", 0, ""),
        ("step", "ann", 0, "a look"),
        ("pause", "ann", 4, "after 4 steps"),
        ("resume", "bob", 4, ""),
    ]


def test_a_paused_run_sleeps(desk: Any) -> None:
    run = desk.run()
    run.train(3)
    before = time.process_time()
    time.sleep(1.0)
    assert time.process_time() - before < 0.15  # a spin would take all of it


def test_an_order_that_comes_within_a_step_is_carried_out_when_the_step_ends(desk: Any) -> None:
    made = desk.script()
    orders = {step: Order(control="pause", actor="ann") for step in (3, 4, 9)}
    replies: dict[int, Any] = {}

    def order(step: int) -> None:
        ticket = run.trainer._control.post(orders[step])
        replies[step] = ticket.wait(desk.patience)
        run.trainer.resume(timeout=desk.patience)

    steps = itertools.count(1)
    threads: list[threading.Thread] = []

    def update(*_: Any) -> None:
        if (step := next(steps)) in orders:
            threads.append(threading.Thread(target=order, args=(step,)))
            threads[-1].start()
            until = time.monotonic() + desk.patience
            while not run.trainer._control._line and time.monotonic() < until:
                time.sleep(0.001)

    made["optimizer"].register_step_post_hook(update)
    run = desk.run(made)
    assert run.finish().steps == 36
    for thread in threads:
        thread.join(desk.patience)
    assert {step: reply.step for step, reply in replies.items()} == {3: 3, 4: 4, 9: 9}


def test_a_stopped_run_ends_in_order_and_goes_on_as_if_it_had_never_been_stopped(desk: Any) -> None:
    plain = desk.fit()
    run = desk.run()
    run.train(17)
    run.trainer.stop(actor="ann", timeout=desk.patience)
    stopped = run.ended()
    assert (stopped.reason, stopped.steps) == ("stopped by ann", 17)
    desk.same(plain, desk.fit(folder=run.folder, resume=stopped.path))


def test_a_run_that_is_stopped_before_its_first_step_can_be_resumed_too(desk: Any) -> None:
    run = desk.run()
    run.trainer.stop(timeout=desk.patience)
    stopped = run.ended()
    assert stopped.steps == 0
    desk.same(desk.fit(), desk.fit(folder=run.folder, resume="auto"))


def test_a_pause_that_somebody_asks_for_stores_the_runs_state(desk: Any) -> None:
    run = desk.run(max_epochs=100_000)
    run.trainer.resume(timeout=desk.patience)
    paused = run.trainer.pause(timeout=desk.patience)
    until = time.monotonic() + desk.patience
    while not run.events("checkpointed"):  # stored once the pause is answered
        assert time.monotonic() < until
        time.sleep(0.01)
    stored = run.events("checkpointed")[0].body
    assert (stored["step"], stored["why"]) == (paused.step, "pause")


def test_pausing_twice_and_going_on_twice_do_no_harm(desk: Any) -> None:
    run = desk.run(max_epochs=100_000)
    assert "already" in run.trainer.pause(timeout=desk.patience).told
    run.trainer.resume(timeout=desk.patience)
    assert "already" in run.trainer.resume(timeout=desk.patience).told


def test_going_on_takes_a_pause_back_that_is_still_to_come(desk: Any) -> None:
    run = desk.run(max_epochs=100_000)
    run.trainer.step(90_000, timeout=desk.patience)
    assert "without the pause" in run.trainer.resume(timeout=desk.patience).told
    until = time.monotonic() + desk.patience
    while run.trainer._control.wake < 1 << 60:  # set once the order is answered
        assert time.monotonic() < until
        time.sleep(0.001)


def test_requests_about_cards_and_the_mode_are_answered_while_a_run_is_paused(desk: Any) -> None:
    run = desk.run()
    run.train(3)
    done = CliRunner().invoke(main, ["mode", str(run.path), "propose", "--wait", "100"])
    assert done.output.strip() == "mode: observe -> propose"
    assert run.trainer.waits == "paused"
    assert run.finish().mode == "propose"


def test_orders_without_a_run_are_refused(desk: Any) -> None:
    trainer = desk.trainer()
    with pytest.raises(ConflictError, match="not training now"):
        trainer.pause()
    desk_run = desk.run()
    desk_run.finish()
    with pytest.raises(ConflictError, match="not training now"):
        desk_run.trainer.stop()


@pytest.mark.parametrize("steps", [0, -1, 1.5, "many"])
def test_steps_are_whole_numbers_above_zero(steps: Any, desk: Any) -> None:
    run = desk.run()
    with pytest.raises(UsageError, match="step: n"):
        run.trainer.step(steps)
    assert run.trainer.waits == "paused"


def test_one_trainer_trains_once_at_a_time(desk: Any) -> None:
    run = desk.run()
    with pytest.raises(ConflictError, match="training already"):
        run.trainer.fit(**desk.script())
    assert run.finish().steps == 36


def test_the_training_thread_may_give_orders_and_does_not_wait_for_them(desk: Any) -> None:
    trainer = desk.trainer()
    made = desk.script()
    replies: list[Any] = []

    @trainer.training_step
    def step(batch: Any, state: dict[str, Any]) -> dict[str, Any]:
        state["optimizer"].zero_grad()
        loss = state["loss_fn"](state["model"](batch[0]), batch[1])
        loss.backward()
        state["optimizer"].step()
        if state["step"] == 4:
            replies.append(trainer.pause("a look", actor="callback"))
        return {"loss": loss}

    waited = threading.Event()

    def wake() -> None:
        if trainer.wait_until_paused(desk.patience):
            waited.set()
        trainer.resume()

    helper = threading.Thread(target=wake)
    helper.start()
    result = trainer.fit(**made)
    helper.join()
    assert replies[0].step is None
    assert waited.is_set()
    pause = next(r.body for r in result.session.events("controlled") if r.body["verb"] == "pause")
    assert (pause["step"], pause["actor"]) == (5, "callback")


def test_an_error_while_paused_orders_stand_fails_them(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = desk.run()
    monkeypatch.setattr(
        "automode.trainer.commanding.Commander._resume",
        lambda self: (_ for _ in ()).throw(KeyboardInterrupt("now")),
    )
    with pytest.raises(ConflictError, match="ended meanwhile"):
        run.trainer.resume(timeout=desk.patience)
    with pytest.raises(KeyboardInterrupt):
        run.ended()
    desk.started.clear()


def test_what_the_run_cannot_do_is_refused_recorded_and_changes_nothing(desk: Any) -> None:
    plain = desk.fit()
    run = desk.run({**desk.script(), "test_loader": None})
    run.train(3)
    with pytest.raises(UsageError, match="pass test_loader to fit"):
        run.trainer.test(timeout=desk.patience)
    with pytest.raises(ConflictError, match="not held"):
        run.trainer.release(timeout=desk.patience)
    with pytest.raises(ConflictError, match="observe"):
        run.trainer.fork(timeout=desk.patience)
    result = run.finish()
    refused = [r.body["verb"] for r in result.session.events("controlled") if r.body["refused"] is not None]
    assert refused == ["test", "release", "fork"]
    for name in ("loss", "grad_norm"):
        assert plain.frame(name).tolist() == result.frame(name).tolist()


def test_whoever_waits_for_an_answer_that_cannot_be_recorded_does_not_wait_for_ever(
    desk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = desk.run()

    def breaks(*_: Any, **__: Any) -> None:
        raise RuntimeError("the log is broken")

    monkeypatch.setattr(Commander, "_record", breaks)
    with pytest.raises(ConflictError, match="ended meanwhile"):
        run.trainer.checkpoint(timeout=desk.patience)
    with pytest.raises(RuntimeError, match="the log is broken"):
        run.ended()


@pytest.mark.parametrize("timeout", [float("nan"), -1.0, "5"])
def test_a_time_to_wait_that_is_none_is_refused(timeout: Any, desk: Any) -> None:
    run = desk.run()
    with pytest.raises(UsageError, match="timeout"):
        run.trainer.pause(timeout=timeout)
    with pytest.raises(UsageError, match="timeout"):
        run.trainer.wait_until_paused(timeout)
    with pytest.raises(UsageError, match="PlanCard or a mapping"):
        run.trainer.fork("c0ffee00", timeout=desk.patience)
    assert run.trainer.checkpoint(timeout=1e30).step == 0
    assert [record.body["verb"] for record in run.events("controlled")] == ["pause", "checkpoint"]
    run.finish()
