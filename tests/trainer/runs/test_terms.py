"""On what terms automode works: the compute budget, the schedule's clock, modes, approval, and what forbids it to act."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules
from torch.utils.data import DataLoader

from automode.planner.card_text import from_yaml
from automode.session import Session

PASSES = 3 * 30
"""Sample passes of one step of these runs: 150 samples in 5 batches, trained."""

PLAIN = """
schema: 1
action: fork
reason: manual
because: A small one.
training_recipe: {variants: [{name: plain}, {name: fast, lr_mul: 30}]}
budget_steps: 8
asha: {reduction_factor: 2, max_steps: 16}
"""


def approving(at: int = 8) -> dict[int, Any]:
    return {at: lambda person: person.submit(PLAIN), at + 1: lambda person: person.approve()}


# The budget.


@pytest.mark.parametrize("rate", [0.003, 0.1])
def test_within_the_budget_trunk_and_automode_take_no_more_than_was_asked_for(
    rate: float, play_run: Any, script: Any
) -> None:
    run = play_run(
        automode="act",
        script=script(rate=rate),
        policy={"reasons": ["merge_cadence", "high_loss_tail"], "scan": {"every": 20, "probe": 64}},
        actions=approving(),
        steps=200,
    )
    compute = run.result.compute
    assert run.bodies("merged"), "the finishing merge belongs to the bill"
    assert compute["trunk"] == run.result.steps * PASSES
    assert compute["automode"] > 4000
    assert compute["trunk"] + compute["automode"] <= 200 * PASSES
    # Nearly all of it is used: what the merge reserves for a best state of before comes back when there are no steps to give it to.
    assert compute["trunk"] + compute["automode"] > 185 * PASSES
    assert run.result.reason == "budget"


def test_on_top_of_the_budget_the_trunk_takes_all_its_steps(play_run: Any, script: Any) -> None:
    run = play_run(
        automode="act",
        script=script(rate=0.003),
        policy={"budget": "on_top", "reasons": ["merge_cadence"]},
        actions=approving(),
        steps=150,
    )
    assert run.result.steps == 150
    assert run.result.reason == "max_steps"
    assert run.result.compute["trunk"] == 150 * PASSES
    assert run.result.compute["automode"] > 2000


def test_what_a_card_did_not_need_goes_back_to_the_trunk(play_run: Any, script: Any) -> None:
    run = play_run(
        script=script(rate=0.003), actions=approving() | {12: lambda p: p.ask("cancel", p.cards[-1].id)}
    )
    spent = run.result.compute["automode"]
    (reserved,) = run.bodies("budget_reserved")
    assert 0 < spent < reserved["passes"] / 2
    assert run.result.steps == 150 - -(-spent // PASSES)


@pytest.mark.parametrize("mode", ["propose", "act"])
def test_a_card_beyond_the_cap_is_refused_with_the_figures(mode: str, play_run: Any, script: Any) -> None:
    run = play_run(
        automode=mode,
        script=script(),
        policy={"pacing": {"exploration_share": 0.01, "total_share": 1.0, "warmup_steps": 0}},
        actions={8: lambda person: person.submit(PLAIN)},
        steps=40,
    )
    (refused,) = run.bodies("request_refused")
    assert "over_cap" in refused["why"]
    assert "1% of the" in refused["why"]
    assert not run.bodies("card_proposed")


# The schedule's clock.


def clocks(run: Any) -> int:
    return int(run.made["scheduler"].last_epoch)


def half_way(optimizer: Any) -> Any:
    return schedules.LambdaLR(optimizer, lambda tick: max(0.0, 1 - tick / 150))


def test_the_clock_counts_the_compute_that_automode_spent(play_run: Any, script: Any) -> None:
    run = play_run(
        script=script(rate=0.003, scheduler=half_way), actions=approving(), scheduler_interval="step"
    )
    assert run.result.steps < 150
    assert clocks(run) in (149, 150)  # the schedule ends where the user's would, less what fills no step
    rates = run.column("lr_0")
    assert rates[:9] == [pytest.approx(0.003 * (1 - tick / 150)) for tick in range(9)]


def test_the_clock_can_be_kept_to_the_steps(play_run: Any, script: Any) -> None:
    run = play_run(
        script=script(rate=0.003, scheduler=half_way),
        policy={"schedule": "keep"},
        actions=approving(),
        scheduler_interval="step",
    )
    assert run.result.steps < 150
    assert clocks(run) == run.result.steps


def test_a_clock_of_epochs_counts_the_compute_too(play_run: Any, script: Any) -> None:
    run = play_run(
        script=script(rate=0.003, scheduler=lambda o: schedules.StepLR(o, 100)), actions=approving()
    )
    assert run.result.steps < 150
    assert clocks(run) in (29, 30)
    assert clocks(run) > run.result.steps // 5


def test_on_top_of_the_budget_the_clock_is_that_of_the_steps(play_run: Any, script: Any) -> None:
    run = play_run(
        script=script(rate=0.003, scheduler=half_way),
        policy={"budget": "on_top"},
        actions=approving(),
        scheduler_interval="step",
    )
    assert (run.result.steps, clocks(run)) == (150, 150)


# Approval.


def test_a_card_that_asks_stands_as_yaml_and_is_approved_from_another_process(
    play_run: Any, script: Any
) -> None:
    told: list[str] = []

    def approve(person: Any) -> None:
        (card,) = person.cards
        path = person.path / "cards" / f"{card.id}.r1.yaml"
        assert from_yaml(path.read_text(encoding="utf-8")) == card
        command = [sys.executable, "-c", "from automode.cli.main import main; main()", "approve"]
        done = subprocess.run(
            [
                *command,
                str(person.path),
                card.id,
                "--rev",
                "1",
                "--as",
                "bob",
                "--note",
                "go on",
                "--wait",
                "0",
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        told.append(done.stdout)
        assert person.state() == "proposed"  # nothing happens within a step

    run = play_run(
        automode="act",  # a person's card asks in act mode too
        script=script(rate=0.003),
        policy={"budget": "on_top"},
        actions={8: lambda person: person.submit(PLAIN), 20: approve},
    )
    assert "the run takes it up between two steps" in told[0]
    first = run.bodies("card_moved")[0]
    assert (first["before"], first["after"], first["actor"], first["why"]) == (
        "proposed",
        "approved",
        "bob",
        "go on",
    )
    assert run.bodies("card_started")[0]["step"] == 20
    assert run.states()[-1] == "adopted"


def test_the_policy_lets_small_risks_run_and_asks_for_the_rest(play_run: Any, script: Any) -> None:
    for risk, asked in (("low", True), ("medium", False)):
        run = play_run(
            automode="act",
            script=script(rate=1e-6),
            policy={
                "reasons": ["instability_spike"],
                "spike": {"unapplied": 2},
                "pacing": {"min_rung": 4},
                "approval": {"auto_risk": risk},
                "budget": "on_top",
            },
            fit={"loss_fn": spiking(40)},
            steps=160,
        )
        (proposed,) = run.bodies("card_proposed")
        assert proposed["card"]["risk"] == "medium"
        assert bool(run.bodies("ask_approval")) is asked
        assert ("running" in run.states()) is not asked


def spiking(step: int) -> Any:
    """A loss that is not finite for three training steps."""

    calls = [0]

    def loss(outputs: Any, targets: Any) -> Any:
        value = nn.functional.cross_entropy(outputs, targets)
        if torch.is_grad_enabled() and outputs.requires_grad and outputs.shape[0] >= 22:
            calls[0] += 1
            if step <= calls[0] < step + 3:
                return value * float("nan")
        return value

    return loss


def test_an_edit_changes_what_runs(play_run: Any, script: Any) -> None:
    def edit(person: Any) -> None:
        card = person.cards[-1]
        body = card.dump()
        body["training_recipe"]["variants"] = [{"name": "faster", "lr_mul": 60.0}]
        person.ask("edit", card.id, rev=card.rev, body=body)

    run = play_run(
        script=script(rate=0.003),
        policy={"budget": "on_top"},
        actions={
            8: lambda p: p.submit(PLAIN),
            9: lambda p: p.ask("approve", p.cards[-1].id, rev=2),  # of a revision that is not there yet
            10: edit,
            11: lambda p: p.ask("approve", p.cards[-1].id, rev=1),  # of one that is there no more
            12: lambda p: p.approve(),
        },
    )
    assert run.states()[:3] == ["proposed", "approved", "running"]
    assert [why["why"].partition(":")[0] for why in run.bodies("request_refused")] == ["conflict", "conflict"]
    assert {t["variant"]["name"] for t in run.bodies("start_trial")} == {"faster"}
    with Session.open(run.path) as session:
        assert [row.rev for row in session.revisions(run.bodies("card_moved")[0]["card"])][-1] == 2
    files = sorted(path.name.partition(".")[2] for path in (run.path / "cards").iterdir())
    assert files == ["r1.yaml", "r2.yaml"]


def test_a_card_that_nobody_answers_expires_and_harms_nothing(play_run: Any, script: Any) -> None:
    run = play_run(
        script=script(),
        policy={"approval": {"expire_steps": 20}},
        actions={8: lambda p: p.submit(PLAIN)},
    )
    assert run.states() == ["expired"]
    assert run.bodies("card_moved")[0]["why"] == "nobody answered within 20 steps"
    assert run.result.steps == 150


def test_the_mode_can_be_changed_while_the_run_goes_on(play_run: Any, script: Any) -> None:
    run = play_run(
        automode="observe",
        script=script(rate=0.003),
        policy={"budget": "on_top"},
        actions={
            5: lambda p: p.submit(PLAIN),  # refused: nothing runs in observe
            8: lambda p: p.ask("mode", mode="act"),
            9: lambda p: p.submit(PLAIN.replace("8", "24").replace("16", "24")),
            10: lambda p: p.approve(),
        },
    )
    (refused,) = run.bodies("request_refused")
    assert "no card runs" in refused["why"]
    assert [(m["before"], m["after"]) for m in run.bodies("mode_changed")] == [("observe", "act")]
    assert run.states()[-1] == "adopted"
    assert run.result.mode == "act"


# What forbids automode to act.


def test_validation_samples_that_are_trained_on_turn_act_into_propose(
    play_run: Any, script: Any, training: Any
) -> None:
    data = training()
    loader = DataLoader(data, batch_size=32, shuffle=True)
    with pytest.warns(UserWarning, match="150 of the validation samples .* are training samples too"):
        run = play_run(
            automode="act",
            script=script(),
            fit={"train_loader": loader, "val_loader": DataLoader(data, batch_size=50)},
            actions={8: lambda p: p.submit(PLAIN), 9: lambda p: p.ask("mode", mode="act")},
            steps=40,
        )
    (started,) = run.bodies("session_started")
    assert (started["asked_mode"], started["mode"]) == ("act", "propose")
    assert "training samples too" in started["why_mode"]
    assert run.result.mode == "propose"
    card, mode = run.bodies("request_refused")
    assert "no held-out evidence" in card["why"]
    assert "nothing may be adopted without a person" in mode["why"]


def test_without_a_validation_loader_act_runs_no_fork_and_says_why(play_run: Any, script: Any) -> None:
    run = play_run(
        automode="act",
        script=script(rate=1e-6),
        policy={"reasons": ["loss_plateau"], "trend": {"budget": 40}, "pacing": {"min_rung": 4}},
        fit={"val_loader": None},
        actions={8: lambda p: p.submit(PLAIN)},
        steps=100,
    )
    assert run.bodies("session_started")[0]["mode"] == "act"
    (refused,) = run.bodies("request_refused")
    assert "there is no validation loader" in refused["why"]
    outcomes = [b for b in run.bodies("rule_evaluated") if b["rule"] == "loss_plateau"]
    assert any("there is no validation loader" in b["why"] for b in outcomes)
    assert not run.bodies("card_proposed")
    assert run.result.steps == 100


def test_a_run_of_unknown_length_is_only_observed(play_run: Any, script: Any, training: Any) -> None:
    class Stream:
        def __iter__(self) -> Any:
            return iter(DataLoader(training(), batch_size=32))

    with pytest.warns(UserWarning, match='automode="act" becomes "observe"'):
        run = play_run(
            automode="act", script=script(), fit={"train_loader": Stream()}, steps=None, max_epochs=2
        )
    assert run.result.mode == "observe"
    assert run.result.steps == 10


def test_an_optimizer_that_trains_more_than_the_model_gets_no_forks(play_run: Any, script: Any) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(()))

        def forward(self, outputs: Any, targets: Any) -> Any:
            return nn.functional.cross_entropy(outputs * self.temperature, targets)

    loss = Scaled()
    model = script().network()
    run = play_run(
        automode="act",
        script=script(),
        fit={
            "model": model,
            "loss_fn": loss,
            "optimizer": torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.01),
        },
        actions={8: lambda p: p.submit(PLAIN)},
        steps=30,
    )
    (refused,) = run.bodies("request_refused")
    assert "parameters that are not the model's" in refused["why"]
    assert float(loss.temperature.detach()) != 1.0


def test_specialists_draw_no_larger_batches_than_steps_are_priced_by(play_run: Any, script: Any) -> None:
    rows: list[tuple[int, float]] = []

    def look(person: Any) -> None:
        rows.append((person.performer.runner.batch_size, person.driver.state.run.batch))

    play_run(script=script(train=95), actions={5: look}, steps=20)  # 32, 32 and 31 samples
    assert rows == [(31, pytest.approx(95 / 3))]
