"""What a watch does to a loop in propose and act: rates, clipping, skipping, averages, stopping; and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from automode.cli.main import main
from automode.planner.card_text import submission_from_yaml
from automode.planner.policy import Policy
from automode.session import Session, inbox
from automode.session.checkpoints import CheckpointStore
from automode.trainer.driver import Driver

FLAT = {
    "reasons": ["loss_plateau"],
    "trend": {"budget": 40, "gain": 0.5},
    "pacing": {"warmup_steps": 0, "max_cards": 1},
}
"""Nearly every loss is a plateau to it."""


@pytest.fixture(autouse=True)
def _at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """People are heard after every step."""
    monkeypatch.setattr(inbox, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(Driver, "stride", 1)


def loop(made: Any, watch: Any, steps: int, each: Callable[[int, Any], None] | None = None) -> None:
    """Train full batches; ``each`` is called at the beginning of every block with its number, from 0."""
    x, y = made.loader.dataset.tensors
    for number in range(steps):
        with watch.step() as s:
            if each is not None:
                each(number, s)
            made.optimizer.zero_grad()
            out = made.model(x)
            loss = made.loss_fn(out, y)
            loss.backward()
            s.loss(loss, out, y, range(len(y)))
            made.optimizer.step()
            if made.scheduler is not None:
                made.scheduler.step()


def post(watch: Any, verb: str, card: str | None = None, **more: Any) -> None:
    fields = {"card": card, "rev": None, "body": None, "mode": None, "note": "", "actor": "ann"}
    inbox.post(watch.path, fields | {"verb": verb} | more)


def submit(watch: Any, text: str) -> None:
    post(watch, "submit", body=submission_from_yaml(text))


def approve(watch: Any) -> None:
    (record,) = [r for r in watch.loop.driver.state.cards.values() if str(r.state) == "proposed"]
    post(watch, "approve", record.card.id, rev=record.card.rev)


def bodies(events: list[Any], kind: str) -> list[dict[str, Any]]:
    return [event.body for event in events if event.kind == kind]


def states(events: list[Any]) -> list[str]:
    return [body["after"] for body in bodies(events, "card_moved")]


@pytest.fixture
def acting(watching: Any) -> Callable[..., Any]:
    def act(made: Any, mode: str = "act", policy: dict[str, Any] | None = None, **more: Any) -> Any:
        values = {
            "total_steps": 400,
            "batch_size": 100,
            "policy": Policy.model_validate(policy or {"reasons": []}),
        }
        return watching(made, mode=mode, **(values | more))

    return act


@pytest.mark.torch
def test_a_card_is_shown_and_approved_on_the_command_line_and_lowers_the_rate(
    script: Any, acting: Any, soundness: Any, frame: Any
) -> None:
    made = script(rate=1e-6, dropout=0.0)
    watch = acting(made, "propose", FLAT)
    told: list[str] = []

    def person(number: int, _: Any) -> None:
        waiting = [r.card for r in watch.loop.driver.state.cards.values() if str(r.state) == "proposed"]
        if not waiting or told:
            return
        card, session = waiting[0], str(watch.path)
        for arguments in (["cards", session], ["show", session, card.id]):
            found = CliRunner().invoke(main, arguments)
            told.append(found.output)
        answer = CliRunner().invoke(main, ["approve", session, card.id, "--rev", "1", "--wait", "0"])
        told.append(answer.output)

    loop(made, watch, 300, person)
    watch.close()
    events = soundness(watch.path)
    assert "loss_plateau" in told[0]
    assert "rate_factor: 0.333" in told[1]
    assert states(events) == ["approved", "running", "applied"], told
    (set_at,) = bodies(events, "rate_set")
    rates = frame(watch.path, "lr_0")
    assert rates[set_at["step"] - 1] == 1e-6
    assert rates[set_at["step"]] == pytest.approx(1e-6 / 3)
    assert made.optimizer.param_groups[0]["lr"] == pytest.approx(1e-6 / 3)


@pytest.mark.torch
def test_a_rate_that_a_card_lowers_is_lowered_in_the_schedule_too(
    script: Any, acting: Any, soundness: Any
) -> None:
    made, alone = script(steplr=True, dropout=0.0), script(steplr=True, dropout=0.0)
    watch = acting(made, scheduler=made.scheduler)
    submit(watch, "{action: adjust, adjustment: {rate_factor: 0.25}}")
    loop(made, watch, 3, lambda number, s: approve(watch) if number == 1 else None)
    watch.close()
    loop_alone = [alone.optimizer.step() or alone.scheduler.step() for _ in range(3)]
    assert len(loop_alone) == 3
    for _ in range(9):
        made.optimizer.step()
        made.scheduler.step()
        alone.optimizer.step()
        alone.scheduler.step()
    assert made.optimizer.param_groups[0]["lr"] == pytest.approx(alone.optimizer.param_groups[0]["lr"] / 4)
    soundness(watch.path)


@pytest.mark.torch
def test_a_rate_that_an_unknown_schedule_sets_is_refused_with_what_to_do(
    script: Any, acting: Any, soundness: Any
) -> None:
    made = script(steplr=True)
    watch = acting(made)
    submit(watch, "{action: adjust, adjustment: {rate_factor: 0.25}}")
    loop(made, watch, 3)
    watch.close()
    (refused,) = bodies(soundness(watch.path), "request_refused")
    assert "give it as scheduler=" in refused["why"]


@pytest.mark.torch
@pytest.mark.parametrize("mode", ["propose", "act"])
def test_clipping_that_a_card_asks_for_holds_from_then_on(
    mode: str, script: Any, acting: Any, soundness: Any
) -> None:
    made = script(optimizer="sgd", norm=False, dropout=0.0)
    watch = acting(made, mode)
    submit(watch, "{action: adjust, adjustment: {clip_norm: 0.01}}")
    norms: list[float] = []
    made.optimizer.register_step_pre_hook(
        lambda *_: norms.append(
            float(torch.nn.utils.get_total_norm([p.grad for p in made.model.parameters()]))
        )
    )
    loop(made, watch, 8, lambda number, s: approve(watch) if number == 3 else None)
    watch.close()
    assert min(norms[:4]) > 0.05
    assert norms[5:] == pytest.approx([0.01] * 3, rel=1e-3)
    assert states(soundness(watch.path)) == ["approved", "running", "applied"]


class Poisoned(nn.Module):
    """A loss that is not a number, or whose gradient is none, on some calls."""

    def __init__(self, bad: dict[int, str]) -> None:
        super().__init__()
        self.bad, self.calls = bad, 0

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        loss = nn.functional.cross_entropy(out, y)
        match self.bad.get(self.calls):
            case "loss":
                return loss * float("nan")
            case "gradient":
                return loss + (out - out.detach()).abs().sum().sqrt()  # 0, with an infinite slope there
            case _:
                return loss


@pytest.mark.torch
@pytest.mark.parametrize("bad", ["loss", "gradient"])
@pytest.mark.parametrize("mode", ["act", "propose"])
def test_a_step_that_is_not_finite_does_not_reach_the_weights_in_act_and_does_in_propose(
    mode: str, bad: str, script: Any, acting: Any, soundness: Any, frame: Any, equal: Any
) -> None:
    made = script(norm=False)
    made.loss_fn = Poisoned({6: bad})
    watch = acting(made, mode)
    seen: dict[int, Any] = {}
    loop(made, watch, 10, lambda number, s: seen.update({number: made.state()["weights"]}))
    watch.close()
    finite = all(bool(torch.isfinite(p).all()) for p in made.model.parameters())
    assert finite == (mode == "act")
    events = soundness(watch.path)
    if mode == "act":
        assert equal(seen[5], seen[6])
        assert frame(watch.path, "applied") == [1.0] * 5 + [0.0] + [1.0] * 4
        (skipped,) = bodies(events, "safeguarded")
        assert skipped["what"] == "skipped"
        assert ("the loss is nan" if bad == "loss" else "the gradient norm is") in skipped["why"]


@pytest.mark.torch
def test_a_run_that_stays_broken_asks_the_loop_to_stop_and_does_not_go_back(
    script: Any, acting: Any, soundness: Any
) -> None:
    made = script(norm=False)
    made.loss_fn = Poisoned(dict.fromkeys(range(5, 100), "loss"))
    policy = {"reasons": [], "safeguards": {"stop_after_nonfinite": 8, "rewind_after_nonfinite": 2}}
    watch = acting(made, policy=policy)
    x, y = made.loader.dataset.tensors
    steps = 0
    while not watch.should_stop and steps < 50:
        with watch.step() as s:
            made.optimizer.zero_grad()
            loss = made.loss_fn(made.model(x), y)
            loss.backward()
            s.loss(loss)
            made.optimizer.step()
        steps += 1
        assert s.stop == watch.should_stop
    assert steps == 12
    assert "8 steps in a row were not finite" in str(watch.why_stop)
    watch.close()
    events = soundness(watch.path)
    failed = bodies(events, "command_failed")
    assert {body["command"] for body in failed} == {"rewind"}
    assert "the loop is the user's own" in failed[0]["error"]
    assert "not finite" in events[-1].body["why"] or "not finite" in bodies(events, "run_ended")[0]["why"]


FORK = """
action: fork
training_recipe: {variants: [{name: half, lr_mul: 0.5}]}
budget_steps: 2
asha: {max_steps: 4}
"""


@pytest.mark.torch
def test_forks_are_refused_with_the_reason(script: Any, acting: Any, soundness: Any) -> None:
    made = script()
    watch = acting(made, loss_fn=made.loss_fn, train=made.loader, val=made.held_out)
    submit(watch, FORK)
    submit(watch, FORK + "gate_recipe: {kind: switch_softmax, epochs: 1}\n")
    loop(made, watch, 3)
    watch.close()
    refused = [body["why"] for body in bodies(soundness(watch.path), "request_refused")]
    assert len(refused) == 2
    for why in refused:
        assert (
            "no specialist can be trained in this run: the loop is the user's own, seen through a hook" in why
        )


AVERAGES = {
    "reasons": ["merge_cadence"],
    "averages": {"finish_at": 0.5, "z": 0.0},
    "evidence": {"min_samples": 20},
    "pacing": {"warmup_steps": 0, "exploration_share": 1.0, "total_share": 1.0},
}


def thrown_off(made: Any, last: int) -> Callable[[int, Any], None]:
    """Throws the weights far off in the last step, which their averages hardly notice."""

    def each(number: int, _: Any) -> None:
        if number == last:
            for group in made.optimizer.param_groups:
                group["lr"] = 30.0

    return each


@pytest.mark.torch
def test_averages_that_held_out_data_prefer_are_in_the_model_when_the_watch_is_closed(
    script: Any, acting: Any, equal: Any, soundness: Any
) -> None:
    made = script(optimizer="sgd")
    watch = acting(
        made, policy=AVERAGES, loss_fn=made.loss_fn, train=made.loader, val=made.held_out, total_steps=800
    )
    loop(made, watch, 420, thrown_off(made, 419))
    before = made.state()
    watch.close()
    assert before["random"].same_as(made.state()["random"])
    events = soundness(watch.path)
    assert states(events)[-2:] == ["accepted", "adopted"]
    (adopted,) = bodies(events, "adopted")
    stored, _, _ = CheckpointStore(watch.path / "checkpoints").load(adopted["checkpoint"])
    assert equal(dict(stored), made.state()["weights"])
    assert not equal(before["weights"], made.state()["weights"])


@pytest.mark.torch
@pytest.mark.parametrize("early", [True, False])
def test_a_loop_that_breaks_off_before_its_length_has_its_finish_when_the_watch_is_closed(
    script: Any, acting: Any, soundness: Any, early: bool
) -> None:
    made = script(optimizer="sgd")
    total = 2000 if early else 100
    policy = AVERAGES | {"averages": {"finish_at": 1.0, "z": 0.0}, "budget": "on_top"}
    watch = acting(
        made, policy=policy, loss_fn=made.loss_fn, train=made.loader, val=made.held_out, total_steps=total
    )
    loop(made, watch, 100, thrown_off(made, 99))
    watch.close()
    events = soundness(watch.path)
    (ended,) = bodies(events, "trunk_ended")
    assert ended["early"] is early
    assert (states(events)[-1:] == ["adopted"]) is early


@pytest.mark.torch
def test_averages_handed_in_by_a_person_are_adopted_between_two_steps_and_can_be_rolled_back(
    script: Any, acting: Any, equal: Any, soundness: Any
) -> None:
    made = script(optimizer="sgd")
    policy = AVERAGES | {"reasons": []}
    watch = acting(
        made, policy=policy, loss_fn=made.loss_fn, train=made.loader, val=made.held_out, total_steps=2000
    )
    weights: dict[int, Any] = {}
    throw = thrown_off(made, 200)

    def person(number: int, s: Any) -> None:
        throw(number, s)
        weights[number] = made.state()["weights"]
        match number:
            case 199:
                submit(watch, "{action: merge, merge_recipe: {kind: swa}}")
            case 200:
                approve(watch)
            case 201:
                made.optimizer.param_groups[0]["lr"] = 0.0
            case 203:
                (card,) = watch.loop.driver.state.cards.values()
                post(watch, "rollback", card.card.id)

    loop(made, watch, 205, person)
    watch.close()
    events = soundness(watch.path)
    assert states(events) == ["approved", "running", "accepted", "adopted", "rolled_back"]
    before, _, _ = CheckpointStore(watch.path / "checkpoints").load(bodies(events, "adopted")[0]["before"])
    assert not equal(dict(before), weights[201])
    assert equal(
        {k: before[k] for k in ("0.weight", "4.bias")}, {k: weights[204][k] for k in ("0.weight", "4.bias")}
    )


@pytest.mark.torch
def test_what_automode_has_spent_is_taken_off_the_end_where_the_policy_says_within(
    script: Any, acting: Any
) -> None:
    for budget, stops in (("within", True), ("on_top", False)):
        made = script()
        watch = acting(
            made, policy=AVERAGES | {"budget": budget}, loss_fn=made.loss_fn, train=made.loader, val=made.held_out,
            total_steps=100,
        )  # fmt: skip
        loop(made, watch, 99)
        assert watch.should_stop == stops
        assert watch.why_stop == ("budget" if stops else None)
        watch.close()


@pytest.mark.torch
def test_a_running_watch_can_be_switched_from_observing_to_proposing(
    script: Any, acting: Any, soundness: Any
) -> None:
    made = script(rate=1e-6, dropout=0.0)
    watch = acting(made, "observe", FLAT | {"pacing": {"warmup_steps": 0}})
    loop(made, watch, 200, lambda number, s: post(watch, "mode", mode="propose") if number == 20 else None)
    assert watch.mode == "propose"
    watch.close()
    events = soundness(watch.path)
    (changed,) = [event.seq for event in events if event.kind == "mode_changed"]
    asked = [event.seq for event in events if event.kind == "ask_approval"]
    assert asked
    assert min(asked) > changed
    assert len(watch.cards) > len(asked)  # those from before were only recorded


@pytest.mark.torch
def test_samples_that_are_trained_and_held_out_turn_act_into_propose(script: Any, acting: Any) -> None:
    made = script()
    with pytest.warns(UserWarning, match="are training samples too"):
        watch = acting(made, loss_fn=made.loss_fn, train=made.loader, val=made.loader)
    assert watch.mode == "propose"


@pytest.mark.torch
def test_a_function_hears_of_every_card_and_may_answer_it(script: Any, acting: Any, soundness: Any) -> None:
    made = script(rate=1e-6, dropout=0.0)
    seen: list[str] = []

    def on_card(card: Any, handle: Any) -> None:
        seen.append(card.reason)
        handle.approve()

    watch = acting(made, "propose", FLAT, on_card=[on_card])
    loop(made, watch, 200)
    watch.close()
    assert seen == ["loss_plateau"]
    assert states(soundness(watch.path)) == ["approved", "running", "applied"]


@pytest.mark.torch
def test_the_sessions_seed_splits_the_held_out_data(script: Any, acting: Any) -> None:
    made = script()
    watch = acting(made, loss_fn=made.loss_fn, train=made.loader, val=made.held_out, seed=7)
    with Session.open(watch.path) as session:
        assert session.header["seed"] == 7
        run = next(session.events("session_started")).body["run"]
    assert (run["val_a"], run["val_b"], run["train_samples"], run["batch"]) == (60, 60, 100, 100.0)


@pytest.mark.torch
def test_a_function_may_judge_in_place_of_a_loader(
    script: Any, acting: Any, soundness: Any, equal: Any
) -> None:
    made = script(optimizer="sgd", norm=False)
    x, y = made.held_out.dataset.tensors
    asked: list[Any] = []

    def losses(model: nn.Module, ids: Any) -> Tensor:
        asked.append((tuple(sorted(ids.tolist())), model.training, torch.is_grad_enabled()))
        torch.rand(3)
        return nn.functional.cross_entropy(model(x[ids]), y[ids], reduction="none")

    watch = acting(
        made, policy=AVERAGES, val=losses, val_samples=len(y), total_steps=800, slices={"some": range(40)}
    )
    loop(made, watch, 420, thrown_off(made, 419))
    before = made.state()
    found = watch.validate()
    with torch.no_grad():
        made.model.eval()
        expected = nn.functional.cross_entropy(made.model(x), y).item()
        made.model.train()
    assert found["loss"] == pytest.approx(expected)
    assert set(found) == {"loss", "utility", "slice some"}
    watch.close()
    assert before["random"].same_as(made.state()["random"])
    assert states(soundness(watch.path))[-2:] == ["accepted", "adopted"]
    assert not equal(before["weights"], made.state()["weights"])
    assert {(training, grad) for _, training, grad in asked} == {(False, False)}
    first, second = {ids for ids, _, _ in asked if len(ids) == 60}
    assert sorted(first + second) == list(range(120))


@pytest.mark.torch
def test_a_card_that_ends_the_run_asks_the_loop_to_stop_and_leaves_the_best_of_its_states(
    script: Any, acting: Any, soundness: Any
) -> None:
    made = script(optimizer="sgd")
    watch = acting(
        made,
        policy=AVERAGES | {"reasons": []},
        loss_fn=made.loss_fn,
        train=made.loader,
        val=made.held_out,
        total_steps=2000,
    )
    throw = thrown_off(made, 201)
    steps = 0

    def person(_: int, s: Any) -> None:
        throw(steps, s)
        if steps == 200:
            submit(watch, "{action: stop}")
        elif steps == 201:
            approve(watch)

    while not watch.should_stop and steps < 300:
        loop(made, watch, 1, person)
        steps += 1
    watch.close()
    events = soundness(watch.path)
    assert 201 < steps < 205
    assert str(watch.why_stop).startswith("card ")
    (merged,) = bodies(events, "merged")
    assert merged["method"] == "keep_best"
    assert merged["why"] == "no validated state of before is stored"
    assert merged["weights"]["choice"] != "raw"
    assert states(events) == ["approved", "running", "accepted", "adopted"]


def order(watch: Any, verb: str, **arguments: Any) -> None:
    inbox.post(watch.path, {"control": verb, "actor": "ann", "note": "", "arguments": arguments})


@pytest.mark.torch
def test_a_watched_loop_can_be_ordered_to_stop_and_to_another_rate_and_to_nothing_else(
    script: Any, acting: Any, soundness: Any, frame: Any
) -> None:
    made = script(rate=0.05)
    watch = acting(made, "observe")
    order(watch, "set", lr=0.001)
    order(watch, "set", max_steps=9)
    order(watch, "pause")
    loop(made, watch, 5, lambda number, s: order(watch, "stop") if number == 3 else None)
    assert watch.should_stop
    assert watch.why_stop == "stopped by ann"
    watch.close()
    events = soundness(watch.path)
    answers = [(body["verb"], body["refused"]) for body in bodies(events, "controlled")]
    assert [verb for verb, _ in answers] == ["set", "set", "pause", "stop"]
    assert answers[0][1] is None
    assert answers[3][1] is None
    assert "its length is in your code" in answers[1][1]
    assert "pause needs a loop of ours" in answers[2][1]
    assert frame(watch.path, "lr_0") == [0.05] + [0.001] * 4
    assert bodies(events, "run_ended")[0]["why"] == "stopped by ann"
    assert not list((watch.path / "inbox").glob("*.json"))
    made = script(steplr=True)
    watch = acting(made, "observe")
    order(watch, "set", lr_mul=0.5)
    loop(made, watch, 2)
    watch.close()
    (refused,) = bodies(soundness(watch.path), "controlled")
    assert "give it as scheduler=" in refused["refused"]


@pytest.mark.torch
def test_a_watched_session_is_not_resumed_and_the_command_line_says_why(script: Any, acting: Any) -> None:
    watch = acting(script(), "observe")
    watch.close()
    answer = CliRunner().invoke(main, ["resume", str(watch.path), "--yes"])
    assert answer.exit_code == 1
    assert "its place in the data is in its own code" in answer.output
