"""The matched-compute benchmark: its short form end to end, and the random subset beside a mined one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from automode import Trainer
from automode.planner.policy import Policy


@pytest.fixture(scope="module")
def bench(benchmark_modules: Callable[..., Any]) -> Any:
    return benchmark_modules(matched="matched_compute", tasks="_matched_tasks", control="_random_control")


@pytest.mark.slow
def test_a_mined_subset_stands_beside_as_many_random_samples(bench: Any, tmp_path: Path) -> None:
    """A fork for the samples of highest loss; to train on these alone is worse than on all, and on as many random ones."""
    task = replace(bench.tasks.TASKS["digits4"], epochs=8)
    data = task.make(400)
    model = bench.matched.network(task, data, 1)
    everything = {"exploration_share": 1.0, "total_share": 1.0}
    policy = Policy()
    policy = policy.model_copy(
        update={
            "budget": "on_top",
            "pacing": policy.pacing.model_copy(update=everything),
            "reasons": ("merge_cadence",),
        }
    )

    class AtStep100:
        def on_train_batch_end(self, trainer_view: Any, *_: Any) -> None:
            if trainer_view.global_step == 100:
                trainer.fork(
                    card={
                        "because": "hard",
                        "selection": {"kind": "quantile", "from": 0.8, "to": 1.0, "exclude_suspects": False},
                        "training_recipe": {"replay": 0.0, "variants": [{"name": "hard"}]},
                        "budget_steps": 20,
                        "asha": {"reduction_factor": 3, "max_steps": 20},
                    }
                )

    trainer = Trainer(
        max_epochs=task.epochs,
        automode=True,
        policy=policy,
        session_dir=tmp_path,
        seed=0,
        progress=False,
        console=False,
        callbacks=[AtStep100()],
    )
    result = trainer.fit(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        loss_fn=nn.CrossEntropyLoss(),
        train_loader=DataLoader(bench.matched.dataset(data.train), batch_size=task.batch, shuffle=True),
        val_loader=DataLoader(bench.matched.dataset(data.val), batch_size=512),
    )
    with result.session as session:
        (found,) = bench.control.subsets(
            session,
            data,
            bench.matched.network(task, data, 1),
            seed=400,
            steps=result.steps,
            batch=task.batch,
        )
        (again,) = bench.control.subsets(
            session,
            data,
            bench.matched.network(task, data, 1),
            seed=400,
            steps=result.steps,
            batch=task.batch,
        )
    assert found == again
    assert found.share == pytest.approx(0.2, abs=0.02)
    # Eight seeds: mined 2.8 to 5.0 points below random samples (sd .8), and these 1.9 to 5.4 below all (sd 1.0): fails by chance in less
    # than one of a thousand draws, and the draw is fixed.
    assert found.mined < found.random < found.everything


def test_only_right_answers_of_the_worst_source_count_for_it(bench: Any) -> None:
    split = bench.tasks.Split(
        x=np.eye(4, dtype=np.float32), y=np.array([0, 1, 2, 0]), source=np.array([0, 0, 1, 1])
    )
    assert bench.matched.accuracies(nn.Identity(), split) == (75.0, 50.0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed"), [("digits4", 300), ("digits4_n20", 301)])
def test_the_short_form_works_from_end_to_end(
    bench: Any, name: str, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten development seeds: ahead of the script as it is by .7 points (sd .5) and 2.2 (sd 1.3), so that 3 points behind come by chance
    in less than one of ten thousand draws, and the draw is fixed.
    """
    task = replace(bench.tasks.TASKS[name], epochs=bench.matched.SMOKE_EPOCHS)
    table = bench.matched.measure(task, [seed], "default", verbose=False, settings=bench.matched.SMOKE_RATE)
    bench.matched.report(task, table)
    as_is, automode = table[0], table[-1]
    (run,) = automode.about["runs"]
    assert 0.95 < run["used"] <= 1.0
    assert run["cards"]
    assert automode.test[0] > as_is.test[0] - 3.0
    told = capsys.readouterr().out
    assert f"{name}: rate 0.01" in told
    assert f"{bench.matched.parameters(bench.matched.network(task, task.make(seed), 3)):8d}" in told
