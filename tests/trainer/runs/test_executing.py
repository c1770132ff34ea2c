"""A card that ran is run again from its stored snapshot by the very script that it ran in, and comes out the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Subset

from automode import Trainer
from automode.errors import SessionError, UsageError
from automode.session import Session
from automode.session.checkpoints import CheckpointStore
from automode.trainer.executing import ENVIRONMENT, REPORT, Order, execute, ordered
from automode.trainer.execution_report import Compared, Execution
from automode.trainer.fit_request import FitRequest
from automode.trainer.settings import Settings

STEPS = 180
CARD = """
action: fork
because: The rate was a guess.
selection: {kind: quantile, from: 0.5, to: 1.0, exclude_suspects: false}
training_recipe:
  replay: 0.2
  variants: [{name: plain}, {name: fast, lr_mul: 30, clip_norm: 5.0}, {name: flat, optimizer: sam, ema: 0.9}]
gate_recipe: {kind: switch_softmax, epochs: 2}
merge_recipe: {kind: interpolate}
budget_steps: 4
asha: {reduction_factor: 3, max_steps: 12}
"""


def settings(path: Path, **changes: Any) -> Settings:
    values = {"automode": "propose", "max_steps": STEPS, "seed": 3, "session_dir": path, "console": False}
    return Settings(**(values | changes))


def again(run: Any, script: Any, card: str | None = None, *, fit: Any = None, **changes: Any) -> Execution:
    """Do what the script does where the environment names the card."""
    wanted = card or run.bodies("card_proposed")[0]["card"]["id"]
    request = FitRequest(**(script.build() | (fit or {})))
    return execute(Order(session=run.path, card=wanted), settings(run.folder, **changes), request, None)


@pytest.fixture(scope="module")
def script(scripts: Any) -> Any:
    return scripts(rate=0.001, held_out=80, scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 2))


@pytest.fixture(scope="module")
def played(run_once: Any, script: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run in which a card went all the way."""
    return run_once(
        tmp_path_factory.mktemp("executed") / "run",
        script=script,
        policy={"budget": "on_top"},
        actions={20: lambda person: person.submit(CARD), 22: lambda person: person.approve()},
        steps=STEPS,
    )


def test_everything_comes_out_the_same_bit_by_bit(played: Any, script: Any) -> None:
    before = {file: file.stat().st_mtime_ns for file in played.path.rglob("*") if file.is_file()}
    done = again(played, script)
    text = done.text()
    assert done.same, text
    assert not done.doubts
    assert not done.left_out
    assert all(row.tolerance == 0.0 for row in done.rows)
    told = [row.what for row in done.rows]
    for part in (
        "trial 0 (plain) at 4",
        "trial 1 (fast) at 12",
        "control",
        "router",
        "router, loads",
        "merge by interpolate",
    ):
        assert part in told, text
    assert sum("checkpoint" in what for what in told) == len(played.bodies("trial_reported"))
    assert "the outcome is the same" in text
    assert len(played.bodies("evaluated")) == told.count("val-B, mean")
    # Of the session nothing was touched.
    assert {file: file.stat().st_mtime_ns for file in played.path.rglob("*") if file.is_file()} == before


def test_the_random_state_and_the_scripts_model_stay_as_they_were(played: Any, script: Any) -> None:
    made = script.build()
    before = {name: value.clone() for name, value in made["model"].state_dict().items()}
    torch.manual_seed(11)
    state = torch.get_rng_state()
    execute(_order(played), settings(played.folder), FitRequest(**made), None)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in made["model"].state_dict().items())


def _order(run: Any) -> Order:
    return Order(session=run.path, card=run.bodies("card_proposed")[0]["card"]["id"])


# ------------------------------------------------------------------------------------------------------ the same script


def test_fit_itself_does_it_where_the_environment_says_so(
    played: Any,
    script: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    order = _order(played)
    monkeypatch.setenv(ENVIRONMENT, f"{order.session}:{order.card}")
    monkeypatch.setenv(REPORT, str(tmp_path / "report.json"))
    trainer = Trainer(automode="propose", max_steps=STEPS, seed=3, session_dir=tmp_path, console=False)
    with pytest.raises(SystemExit) as left:
        trainer.fit(**script.build())
    assert left.value.code == 0
    assert f"card {order.card}: the outcome is the same" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["same"]
    assert report["compared"] > 10
    assert not list(tmp_path.glob("*/*/session.db"))


def test_the_environment_has_to_name_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert ordered() is None
    monkeypatch.setenv(ENVIRONMENT, "C:/runs/a:deadbeef")
    assert ordered() == Order(session=Path("C:/runs/a"), card="deadbeef")
    monkeypatch.setenv(ENVIRONMENT, "deadbeef")
    with pytest.raises(UsageError, match="must be SESSION:CARD"):
        ordered()


# ------------------------------------------------------------------------------------------------------- another script


def test_other_data_are_refused_by_their_fingerprint(played: Any, script: Any, scripts: Any) -> None:
    other = scripts(rate=0.001, held_out=80, train=151, scheduler=script.scheduler)
    with pytest.raises(UsageError, match=r"train_loader: the card ran on the samples TensorDataset:150:"):
        again(played, other)
    made = script.build()
    subset = Subset(made["train_loader"].dataset, range(149))
    loader = DataLoader(subset, batch_size=32, shuffle=True)
    with pytest.raises(UsageError, match=r"gives TensorDataset:150:.*\[149:"):
        again(played, script, fit={"train_loader": loader})
    changed = script.build()["train_loader"].dataset
    changed.tensors[0][0, 0] += 1.0
    with pytest.raises(UsageError, match="its own data only"):
        again(played, script, fit={"train_loader": DataLoader(changed, batch_size=32, shuffle=True)})
    with pytest.raises(UsageError, match="val_loader: the card ran on"):
        again(played, script, fit={"val_loader": None})


def test_another_model_optimizer_length_or_run_is_refused(played: Any, script: Any, scripts: Any) -> None:
    wider = scripts(rate=0.001, held_out=80, scheduler=script.scheduler, norm=False)
    with pytest.raises(UsageError, match="the stored weights do not fit this script's model"):
        again(played, wider)
    adam = scripts(rate=0.001, held_out=80, scheduler=script.scheduler, optimizer="adam")
    with pytest.raises(UsageError, match="optimizer: the card ran with SGD, and this script gives Adam"):
        again(played, adam)
    with pytest.raises(UsageError, match="this script asks for 181 steps"):
        again(played, script, max_steps=STEPS + 1)
    with pytest.raises(UsageError, match="run the script that the session was recorded from"):
        again(played, script, project="other")


def test_a_script_of_other_hyperparameters_comes_out_differently(
    played: Any, script: Any, scripts: Any
) -> None:
    """What a snapshot does not hold is the script's: the network's own dropout rate, here."""
    other = scripts(rate=0.001, held_out=80, scheduler=script.scheduler, dropout=0.6)
    done = again(played, other)
    assert not done.same
    assert "results differ (compared bit by bit)" in done.text()


# ---------------------------------------------------------------------------------------------------------- what is gone


def test_a_checkpoint_that_was_deleted_is_explained(played: Any, script: Any, tmp_path: Path) -> None:
    base = played.bodies("snapshotted")[0]["checkpoint"]
    store = CheckpointStore(played.path / "checkpoints")
    folder = store.root / base.removeprefix("sha256:")
    folder.rename(tmp_path / "away")
    try:
        with pytest.raises(
            SessionError, match=r"the checkpoint that its trials began from .* may be deleted to save space"
        ):
            again(played, script)
    finally:
        (tmp_path / "away").rename(folder)


def test_a_card_that_never_ran_has_nothing_to_run_again(play_run: Any, script: Any) -> None:
    run = play_run(
        script=script,
        policy={"budget": "on_top"},
        actions={20: lambda person: person.submit(CARD), 22: lambda person: person.refuse()},
        steps=STEPS,
    )
    with pytest.raises(UsageError, match="is refused and never ran, so there is nothing to run again"):
        again(run, script)
    with pytest.raises(UsageError, match="there is no card 00000000 in session"):
        again(run, script, "00000000")


# ---------------------------------------------------------------------------------------------------------- other cards


def test_the_finishing_merge_of_a_regression_comes_out_the_same(play_run: Any, scripts: Any) -> None:
    """The Huber loss's scale was settled by a validation of the run; the card is judged by that one again."""
    import numpy as np
    from torch import nn
    from torch.utils.data import TensorDataset

    def data(n: int, seed: int) -> TensorDataset:
        x = torch.from_numpy(np.random.default_rng(seed).standard_normal((n, 6)).astype("float32"))
        return TensorDataset(x, x[:, :1] * 3.0)

    made = scripts(
        loss=nn.MSELoss,
        model=lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)),
        make_val=lambda: DataLoader(data(90, 2), batch_size=30),
    )
    fit = {"train_loader": DataLoader(data(96, 1), batch_size=32)}
    run = play_run(
        script=made,
        automode="act",
        policy={"reasons": ["merge_cadence"], "budget": "on_top"},
        steps=60,
        fit=fit,
        val_every_n_epochs=4,
    )
    assert run.bodies("merged")
    done = again(run, made, fit=fit, automode="act", max_steps=60, val_every_n_epochs=4)
    assert done.same, done.text()
    assert [row.what for row in done.rows][:3] == [
        "raw weights",
        "merge by swa",
        "merge by swa, weights chosen",
    ]


def test_trials_that_were_trained_together_come_out_within_the_tolerance(
    play_run: Any, scripts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from automode.backends import stacking_rule

    monkeypatch.setattr(stacking_rule, "why_too_short", lambda *_, **__: None)
    monkeypatch.setattr(stacking_rule, "why_slower", lambda *_: None)
    plain = scripts(rate=0.003, norm=False, dropout=0.0, held_out=80)
    run = play_run(
        script=plain,
        policy={"budget": "on_top"},
        actions={
            8: lambda p: p.submit(CARD.replace(", {name: flat, optimizer: sam, ema: 0.9}", "")),
            9: lambda p: p.approve(),
        },
        backend="stacked",
        steps=STEPS,
    )
    done = again(run, plain, backend="stacked")
    assert done.same, done.text()
    assert "trials may have been trained together (stacked)" in done.text()
    assert all(row.tolerance >= 1e-3 for row in done.rows if isinstance(row.recorded, float))


# -------------------------------------------------------------------------------------------------------------- the report


@pytest.mark.parametrize(
    ("recorded", "now", "tolerance", "same"),
    [
        (0.5, 0.5, 0.0, True),
        (0.5, 0.5 + 1e-12, 0.0, False),
        (0.5, 0.5005, 1e-3, True),
        (0.5, 0.502, 1e-3, False),
        (float("nan"), float("nan"), 0.0, True),
        (float("nan"), 0.5, 1.0, False),
        (-200.0, -200.1, 1e-3, True),
        ((0.2, 0.8), (0.2, 0.8), 0.0, True),
        ((0.2, 0.8), (0.2,), 1.0, False),
        ("raw", "ema3", 0.5, False),
        (None, None, 0.0, True),
    ],
)
def test_two_results_are_the_same_within_their_tolerance(
    recorded: Any, now: Any, tolerance: float, same: bool
) -> None:
    assert Compared(what="x", recorded=recorded, again=now, tolerance=tolerance).same is same


def test_a_report_says_what_differs_and_what_was_left_out() -> None:
    done = Execution(card="c0ffee00", left_out=["2 segments that had failed"])
    assert "nothing of it could be run again" in done.text()
    done.rows += [
        Compared(what="trial 0", recorded=0.5, again=0.5),
        Compared(what="trial 1", recorded=0.5, again=0.7),
    ]
    assert "1 of 2 results differ (compared bit by bit)" in done.text()
    assert "left out: 2 segments that had failed" in done.text()
    assert done.text().splitlines()[2].endswith("NO")


def test_a_session_is_opened_by_the_card_that_it_holds(played: Any) -> None:
    with Session.open(played.path) as session:
        assert session.header["data"]["train"].startswith("TensorDataset:150:")
        assert session.header["backend"] == "inline"


def test_the_command_line_and_the_trainer_name_the_same_variables() -> None:
    from automode.cli import executing as command

    assert (command.CARD, command.REPORT) == (ENVIRONMENT, REPORT)
