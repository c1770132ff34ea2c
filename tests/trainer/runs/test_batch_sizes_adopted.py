"""A card whose trials draw larger batches: judged like any other, adopted without a change to the trunk's own, and refused in time."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

CARD = """
action: fork
because: The gradient is noisy.
training_recipe:
  variants: [{name: large, batch_mul: 2, lr_mul: 60, weight_decay: 0.01, clip_norm: 7.0}]
budget_steps: 20
asha: {reduction_factor: 2, max_steps: 40}
"""


class Grouped(BatchSampler):
    """Makes batches of its own kind."""


def test_the_trunk_keeps_its_batches_rates_decay_and_clipping(
    handed_in: Any, play_run: Any, script: Any
) -> None:
    run = play_run(
        script=script(rate=0.003, norm=False, dropout=0.0),
        policy={"budget": "on_top"},
        actions=handed_in(CARD, at=2),
        steps=240,
    )
    assert run.states()[-1] == "adopted"
    assert run.why().endswith("; the trunk goes on with batches of its own size, at its own rate")
    reports = {r["resource"]: r for r in run.bodies("trial_reported")}
    assert reports[40]["passes"] == 10 * 60 * 3 + 4 * 80
    (adopted,) = run.bodies("adopted")
    weights, rest = run.checkpoint(adopted["checkpoint"])
    trial, beside = run.checkpoint(reports[40]["checkpoint"])
    if reports[40]["choice"] == "raw":
        assert all(torch.equal(weights[name], trial[name]) for name in weights)
    assert rest["optimizer"]["param_groups"][0]["lr"] == 0.003
    assert rest["optimizer"]["param_groups"][0]["weight_decay"] == 0.0
    assert beside["optimizer"]["param_groups"][0]["weight_decay"] == 0.01
    momentum, theirs = (r["optimizer"]["state"][0]["momentum_buffer"] for r in (rest, beside))
    assert torch.equal(momentum, theirs)
    assert run.driver.performer.trunk.clip_norm is None
    assert set(run.column("lr_0")) == {0.003}


def test_a_loader_with_a_batch_sampler_of_its_own_refuses_such_a_card(
    play_run: Any, script: Any, training: Any
) -> None:
    own = Grouped(RandomSampler(training(), generator=torch.Generator().manual_seed(6)), 30, drop_last=False)
    run = play_run(
        script=script(),
        fit={"train_loader": DataLoader(training(), batch_sampler=own)},
        actions={2: lambda person: person.submit(CARD)},
        steps=20,
    )
    assert not run.bodies("card_proposed")
    (refused,) = run.bodies("request_refused")
    assert "put together by a Grouped" in refused["why"]
