"""One card under each backend: the same trials with the same values, wherever they train."""

from __future__ import annotations

from typing import Any

import pytest

from automode import Trainer, UsageError
from automode.backends.inline import InlineBackend
from automode.trainer import backing

CARD = """
schema: 1
action: fork
reason: manual
because: The trunk hardly moves.
selection: {kind: all}
training_recipe:
  replay: 0.1
  variants: [{name: plain}, {name: fast, lr_mul: 30}, {name: slow, lr_mul: 0.1}]
budget_steps: 8
asha: {reduction_factor: 3, max_steps: 24}
"""


def first_rung(play_run: Any, script: Any, backend: str) -> dict[int, float]:
    """Run the card, and give each trial's value at the first rung."""
    run = play_run(
        script=script(rate=0.003),
        policy={"budget": "on_top"},
        actions={8: lambda person: person.submit(CARD), 9: lambda person: person.approve()},
        backend=backend,
    )
    return {body["trial"]: body["value"] for body in run.bodies("trial_reported") if body["resource"] == 8}


@pytest.mark.slow
def test_trials_come_to_the_same_values_in_worker_processes(play_run: Any, script: Any) -> None:
    inline = first_rung(play_run, script, "inline")
    assert sorted(inline) == [0, 1, 2]
    assert first_rung(play_run, script, "process") == inline


def test_trials_come_to_about_the_same_values_stacked(play_run: Any, script: Any) -> None:
    inline = first_rung(play_run, script, "inline")
    stacked = first_rung(play_run, script, "stacked")
    assert sorted(stacked) == sorted(inline)
    assert [stacked[trial] for trial in sorted(stacked)] == pytest.approx(
        [inline[trial] for trial in sorted(inline)], abs=0.01
    )  # single precision, rounded in another order over eight steps


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="inline"):
        Trainer(backend="inlined")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"the inline backend takes no options, but process, ray do"):
        Trainer(backend_options={"slots": 2})
    with pytest.raises(UsageError, match=r"the process backend has no option 'uri'; it has patience, start"):
        Trainer(backend="process", backend_options={"uri": "/nowhere"})


def test_the_backend_gets_its_options_from_the_trainer(play_run: Any, script: Any) -> None:
    slots: list[int] = []
    play_run(
        script=script(),
        backend="process",
        backend_options={"slots": 3, "start": "fork"},
        steps=20,
        actions={5: lambda person: slots.append(person.driver.state.run.slots)},
    )
    assert slots == [3]
    with pytest.raises(UsageError, match="backend_options must be a mapping"):
        Trainer(backend="process", backend_options=["slots"])  # type: ignore[arg-type]


def test_a_run_that_observes_starts_no_workers(play_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    kept = backing.backend_of

    def noted(*arguments: Any) -> Any:
        made.append(kept(*arguments))
        return made[-1]

    monkeypatch.setattr("automode.trainer.assembly.backend_of", noted)
    play_run(automode="observe", backend="process", steps=20)
    assert [type(backend) for backend in made] == [InlineBackend]


@pytest.mark.parametrize("backend", ["inline", "stacked"])
def test_a_card_that_asks_for_resources_is_refused_where_trials_train_in_this_process(
    play_run: Any, script: Any, backend: str
) -> None:
    asking = CARD.replace("  replay: 0.1\n", "  replay: 0.1\n  resources: {cpus: 2, gpus: 0}\n")
    run = play_run(
        script=script(), backend=backend, steps=20, actions={8: lambda person: person.submit(asking)}
    )
    (refused,) = run.bodies("request_refused")
    assert "the card asks for 2 cores and 0 GPUs a trial, which only a Ray cluster can give" in refused["why"]
    assert "trials train in the training process, with what that has" in refused["why"]
    assert 'train with Trainer(backend="ray"), or leave resources out' in refused["why"]
    assert run.bodies("card_proposed") == []
