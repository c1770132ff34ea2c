"""Whole runs that go wrong: what the safeguards make of them, and sound runs, of which they make nothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from automode import Trainer, replay
from automode.planner.policy import Policy

GUARDED = {"reasons": [], "diagnostics": {"enabled": False}}
TOLD = ("rewind", "rewound", "rate_set", "clip_set", "safeguarded", "stop_run")


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)
    )


def exploding(factor: float, at: int = 200) -> Any:
    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: factor if step >= at else 1.0
    )


def held_out_loss(model: nn.Module, samples: Any) -> float:
    x, y = samples(160, 2).tensors
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model.eval()(x), y))


@pytest.fixture
def trained(tmp_path: Any) -> Any:
    """Trains without an eye on every step; gives what was made and the session's events of the safeguards by kind."""
    count = iter(range(100))

    def one(script: Any, mode: str, **settings: Any) -> tuple[dict[str, Any], dict[str, list[Any]]]:
        made = script.build()
        values = {"seed": 3, "progress": False, "console": False, "scheduler_interval": "step"}
        result = Trainer(
            automode=mode,
            policy=Policy.model_validate(GUARDED),
            session_dir=tmp_path / f"{next(count)}",
            **(values | settings),
        ).fit(**made)
        told = {kind: [event.body for event in result.session.events(kind)] for kind in TOLD}
        report = replay(result.session)
        assert report.differences == 0, report.first
        return made, {kind: bodies for kind, bodies in told.items() if bodies}

    return one


@pytest.mark.parametrize(("network", "optimizer"), [("mlp", "sgd"), ("mlp", "adam"), ("cnn", "adam")])
def test_a_rate_that_explodes_ends_finite_and_better_than_without_safeguards(
    trained: Any, script: Any, held_out_samples: Any, network: str, optimizer: str
) -> None:
    ends = {}
    for mode in ("observe", "act"):
        written = script(
            optimizer=optimizer,
            rate=0.05 if optimizer == "sgd" else 0.01,
            norm=False,
            dropout=0.0,
            train=600,
            scheduler=exploding(100.0),
            model=convolutions if network == "cnn" else None,
        )
        made, told = trained(written, mode, max_steps=700)
        ends[mode] = held_out_loss(made["model"], held_out_samples)
        assert ("rewound" in told) is (mode == "act")
        assert not told or mode == "act"
    assert ends["act"] < 0.8
    assert not ends["observe"] < 0.95  # NaN too


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_sound_runs_trigger_no_safeguard(trained: Any, script: Any, optimizer: str) -> None:
    # 3 runs of 300 steps each; benchmarks/safeguards.py counts over more tasks.
    for seed in range(3):
        written = script(optimizer=optimizer, rate=0.05 if optimizer == "sgd" else 0.01)
        assert trained(written, "act", max_steps=300, seed=seed)[1] == {}


def test_equal_runs_go_back_at_equal_steps_to_equal_weights(trained: Any, script: Any) -> None:
    written = script(optimizer="adam", norm=False, train=600, scheduler=exploding(100.0, 100))
    (first, told), (second, again) = (trained(written, "act", max_steps=250) for _ in range(2))
    assert told == again
    assert told["rewound"]
    ours, theirs = first["model"].state_dict(), second["model"].state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def spoil(person: Any) -> None:
    """Weights that are not finite, as a bad memory chip leaves them."""
    with torch.no_grad():
        next(iter(person.performer.trunk.model.parameters())).fill_(math.nan)


def test_weights_that_are_not_finite_are_gone_back_from_with_half_the_rate(
    play_run: Any, script: Any, held_out_samples: Any
) -> None:
    run = play_run(automode="act", policy=GUARDED, script=script(rate=0.05), steps=300, actions={150: spoil})
    (rewound,) = run.bodies("rewound")
    assert rewound["to_step"] <= 150
    assert rewound["step"] == 150  # nothing was applied meanwhile, and the clock goes on from there
    assert rewound["rates"] == [pytest.approx(0.025)]
    assert [body["what"] for body in run.bodies("safeguarded")].count("skipped") == 5
    kept = run.at[rewound["to_step"]]
    assert all(torch.equal(run.at[150][name], kept[name]) for name in kept)
    assert held_out_loss(run.made["model"], held_out_samples) < 1.0
    assert run.result is not None
    assert run.result.steps == 300
    assert np.isfinite(run.column("loss")[-100:]).all()


def test_a_batch_that_is_not_finite_is_left_out_and_norm_statistics_stay_finite(
    play_run: Any, script: Any, held_out_samples: Any
) -> None:
    data = held_out_samples(160, 1)
    data.tensors[0][7] = math.nan
    loader = torch.utils.data.DataLoader(
        data, batch_size=32, shuffle=True, generator=torch.Generator().manual_seed(6)
    )
    run = play_run(
        automode="act", policy=GUARDED, script=script(rate=0.05), steps=200, fit={"train_loader": loader}
    )
    told = [body["what"] for body in run.bodies("safeguarded")]
    assert told.count("skipped") == told.count("statistics_restored") >= 40  # one batch of each epoch
    assert not run.bodies("rewind")  # a bad batch now and then is no reason to go back
    assert all(bool(torch.isfinite(v).all()) for v in run.final.values() if v.is_floating_point())
    assert held_out_loss(run.made["model"], held_out_samples) < 1.0


def test_data_that_are_never_finite_go_back_thrice_and_stop(play_run: Any, script: Any) -> None:
    class Never(nn.Module):
        """A loss that is not finite from batch 50 on."""

        def __init__(self) -> None:
            super().__init__()
            self.seen = 0

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            self.seen += torch.is_grad_enabled()
            value = nn.functional.cross_entropy(outputs, targets)
            return value * math.nan if self.seen > 50 and torch.is_grad_enabled() else value

    run = play_run(automode="act", policy=GUARDED, script=script(loss=Never), steps=200)
    assert [body["rate_factor"] for body in run.bodies("rewound")] == [0.5, 0.25, 0.125]
    assert run.result is not None
    assert "50 steps in a row were not finite" in run.result.reason
    assert run.result.steps < 60
    assert all(bool(torch.isfinite(v).all()) for v in run.final.values() if v.is_floating_point())


CARD = """
schema: 1
action: fork
reason: manual
because: To see what becomes of it.
training_recipe: {variants: [{name: plain}]}
budget_steps: 40
asha: {reduction_factor: 3, max_steps: 40}
"""


def test_a_running_card_whose_trunk_went_back_ends_and_the_run_goes_on(play_run: Any, script: Any) -> None:
    run = play_run(
        automode="act",
        policy=GUARDED,
        script=script(rate=0.05),
        steps=300,
        actions={20: lambda p: p.submit(CARD), 21: lambda p: p.approve(), 60: spoil},
    )
    assert run.bodies("rewound")
    assert run.states()[-2:] == ["running", "inconclusive"]
    assert "went back" in run.why()
    assert run.result is not None
    assert run.result.reason == "budget"  # what the card had cost came off the last steps


def test_a_users_own_step_goes_back_too(play_run: Any, script: Any, tmp_path: Any) -> None:
    made = script(rate=0.05).build()
    trainer = Trainer(
        automode="act",
        policy=Policy.model_validate(GUARDED),
        max_steps=120,
        seed=3,
        progress=False,
        console=False,
        session_dir=tmp_path,
    )
    seen = 0

    @trainer.training_step
    def step(batch: Any, state: dict[str, Any]) -> dict[str, Any]:
        nonlocal seen
        seen += 1
        if seen == 60:
            with torch.no_grad():
                next(iter(state["model"].parameters())).fill_(math.nan)
        state["optimizer"].zero_grad()
        loss = state["loss_fn"](state["model"](batch[0]), batch[1])
        loss.backward()
        state["optimizer"].step()
        return {"loss": loss.detach()}

    result = trainer.fit(**made)
    assert len(list(result.session.events("rewound"))) == 1
    assert all(bool(torch.isfinite(p).all()) for p in made["model"].parameters())
    assert math.isfinite(result.frame("loss")[-1])


def test_people_are_told(play_run: Any, script: Any, capsys: Any) -> None:
    run = play_run(
        automode="act",
        policy=GUARDED,
        script=script(rate=0.05),
        steps=200,
        actions={150: spoil},
        console=True,
    )
    printed = " ".join(capsys.readouterr().out.split())
    assert "safeguard: going back (5 steps in a row were left out: the loss is nan)" in printed
    assert "safeguard: the trunk is back at its state of step" in printed
    assert "rates times 0.5 from here: 0.025" in printed
    assert (run.path / "log.jsonl").read_text().count('"rewound"') >= 1


def test_diagnostics_stand_in_the_session_and_cost_what_the_ledger_says(play_run: Any, script: Any) -> None:
    policy = {
        "reasons": [],
        "scan": {"share": None},
        "diagnostics": {"every": 50, "share": 1.0, "examples": 64, "probe": 32},
    }
    run = play_run(automode="observe", policy=policy, script=script(optimizer="adam"), steps=200)
    found = run.bodies("diagnosed")
    assert len(found) >= 3
    assert all(body["sharpness"] is not None and not body["missing"] for body in found[:3])
    assert all(body["updates"][0]["rms"] > 0 for body in found)
    assert run.driver.compute["automode"] >= sum(body["passes"] for body in found)
