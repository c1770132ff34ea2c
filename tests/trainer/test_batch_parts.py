"""Batches that are trained on in parts: which parts there are, what a step of the trunk and of a trial then comes to, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedules

from automode.backends.stackability import why_variant_alone
from automode.errors import NotExecutableError
from automode.planner.recipes import TrainingRecipe, Variant
from automode.testing.bench import BATCH, CARD, identical, make_bench, small_network
from automode.trainer.batch_parts import Divided, part_rows, parts_of, whole_of
from automode.trainer.sample_source import BatchPlan
from automode.trainer.stackable import StackableSpecialist, StackableSpecialists
from automode.trainer.steps import DefaultStep, Scaler, Taken, pair_step
from automode.trainer.trunk import Trunk
from automode.trainer.worker_runner import CardBriefs

CPU = torch.device("cpu")


class On:
    guard = True


class Off:
    guard = False


def divided(updates: int = 4, **more: Any) -> Variant:
    return Variant(name="v", updates=updates, **more)


def pairs(rows: int, seed: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 5, generator=generator)
    return [x, (x[:, 0] > 0).long()]


def trunk_of(rows: int | None, loss: Any = None, **more: Any) -> Trunk:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))
    given = nn.CrossEntropyLoss() if loss is None else loss
    return Trunk(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.05),
        scheduler=None,
        step_fn=pair_step(given, CPU),
        loss_fn=given,
        device=CPU,
        part_rows=rows,
        **more,
    )


def step_of(trunk: Trunk, guarded: Any = Off) -> DefaultStep:
    return DefaultStep(trunk, Scaler("cpu", enabled=False), guarded(), 20.0)


def by_hand(
    pieces: list[list[Tensor]], clip: float | None = None, loss: Any = None
) -> tuple[nn.Module, Tensor, list[float]]:
    """Plain steps, one on each piece; returns the model, all outputs, and the norms."""
    trunk = trunk_of(None, loss)
    outputs, norms = [], []
    for x, y in pieces:
        trunk.optimizer.zero_grad()
        out = trunk.model(x)
        trunk.loss_fn(out, y).backward()
        largest = torch.inf if clip is None else clip
        norms.append(float(nn.utils.clip_grad_norm_(trunk.model.parameters(), largest)))
        trunk.optimizer.step()
        outputs.append(out.detach())
    return trunk.model, torch.cat(outputs), norms


def same(a: nn.Module, b: nn.Module) -> bool:
    return identical(dict(a.state_dict()), dict(b.state_dict()))


@given(size=st.integers(1, 70), rows=st.integers(2, 20))
def test_every_sample_is_in_one_part_in_its_order_and_parts_are_nearly_equal(size: int, rows: int) -> None:
    x = torch.arange(size)
    parts = parts_of([x, {"y": x.numpy(), "names": [str(i) for i in range(size)]}, None], rows)
    assert torch.cat([part[0] for part in parts]).tolist() == list(range(size))
    sizes = [len(part[0]) for part in parts]
    assert len(sizes) == max(1, round(size / rows))
    assert max(sizes) - min(sizes) <= 1
    for part in parts:
        assert part[1]["y"].tolist() == part[0].tolist()
        assert [int(name) for name in part[1]["names"]] == part[0].tolist()
        assert part[2:] == [None]


@pytest.mark.parametrize(
    ("batch", "why"),
    [
        ([torch.zeros(8, 2), torch.zeros(7)], "not of one length"),
        ([torch.zeros(8), torch.tensor(1.0)], "not of one length"),
        ([torch.zeros(8), np.zeros(3)], r"an array of shape \(3,\)"),
        ([torch.zeros(8), [1, 2, 3]], "a list of 3 values beside 8 samples"),
        ([torch.zeros(3), [{"a": torch.zeros(3)}] * 3], "holds tensors, for 3 samples"),
        ([torch.zeros(8), On()], "it holds a On"),
        (["a", "b"], "not of one length"),
    ],
)
def test_what_has_not_one_row_a_sample_is_not_divided(batch: Any, why: str) -> None:
    with pytest.raises(NotExecutableError, match=why):
        parts_of(batch, 4)
    assert parts_of(batch, None) == [batch]
    take = Divided()
    with pytest.warns(RuntimeWarning, match="trained on as a whole"):
        assert take(batch, 4) == [batch]
    assert take(batch, 4) == [batch]  # said once


def test_the_rows_of_parts_follow_from_what_they_are_already() -> None:
    assert part_rows(250, None, 1) is None
    assert part_rows(250, None, 16) == 16
    assert part_rows(250, 16, 1) == 16
    assert part_rows(250, 16, 4) == 4
    assert part_rows(250, 4, 64) == 2


@pytest.mark.parametrize("guarded", [On, Off])
@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_step_on_a_batch_in_parts_is_a_plain_step_on_each(
    guarded: Any, clip: float | None, reduction: str
) -> None:
    x, y = pairs(30)
    loss = nn.CrossEntropyLoss(reduction=reduction)
    trunk = trunk_of(8, loss, clip_norm=clip)
    taken = step_of(trunk, guarded)([x, y], 0)
    pieces = [[x[a:b].clone(), y[a:b].clone()] for a, b in ((0, 8), (8, 16), (16, 23), (23, 30))]
    model, outputs, norms = by_hand(pieces, clip, loss)
    assert same(trunk.model, model)
    assert torch.equal(taken.outputs, outputs)
    assert torch.equal(taken.targets, y)
    assert torch.equal(torch.as_tensor(taken.loss), loss(outputs, y))
    assert taken.grad_norm == pytest.approx(max(norms))
    assert (taken.applied, taken.stepped, taken.pending, taken.skipped) == (True, True, False, "")


def test_a_batch_too_small_for_two_parts_is_one_step_that_is_still_to_be_made() -> None:
    trunk = trunk_of(8)
    before = {k: v.clone() for k, v in trunk.model.state_dict().items()}
    taken = step_of(trunk)(pairs(11), 0)
    assert taken.pending
    assert identical(dict(trunk.model.state_dict()), before)


def broken(at: int) -> Taken | Any:
    x, y = pairs(32)
    x[at] = torch.nan
    trunk = trunk_of(8)
    step = step_of(trunk, On)
    return step([x, y], 0), trunk, step, x, y


def test_a_part_that_is_not_finite_ends_the_batch_after_what_was_made_before_it() -> None:
    taken, trunk, step, x, y = broken(at=17)
    model, outputs, _ = by_hand([[x[:8], y[:8]], [x[8:16], y[8:16]]])
    assert same(trunk.model, model)
    assert taken.applied
    assert taken.skipped == "the loss is nan"
    assert float(taken.loss) == pytest.approx(float(trunk.loss_fn(outputs, y[:16])))
    assert taken.outputs is None
    assert step.began


def test_a_first_part_that_is_not_finite_keeps_the_step_from_the_weights() -> None:
    taken, trunk, step, _, _ = broken(at=3)
    assert same(trunk.model, trunk_of(None).model)
    assert not taken.applied
    assert taken.skipped == "the loss is nan"
    assert not step.began


def test_losses_of_outputs_that_are_no_tensors_are_averaged() -> None:
    made = [
        (torch.tensor(1.0), {"a": torch.zeros(2)}, torch.zeros(2)),
        (3.0, {"a": torch.zeros(2)}, torch.zeros(2)),
    ]
    loss, outputs, targets = whole_of(made, nn.MSELoss())
    assert (float(loss), outputs, targets) == (2.0, None, None)


# Trials.


@pytest.mark.parametrize(
    ("own", "updates", "rows"),
    [(None, 4, BATCH // 4), (BATCH // 2, 2, BATCH // 4), (BATCH // 2, 1, BATCH // 2)],
)
def test_a_trial_takes_several_steps_on_each_batch_beside_those_of_the_trunk(
    own: int | None, updates: int, rows: int, tmp_path: Path
) -> None:
    bench = make_bench(
        tmp_path,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        scheduler=lambda o: schedules.ExponentialLR(o, 0.9),
    )
    bench.trunk.part_rows = own
    bench.card(TrainingRecipe(variants=(divided(updates),)))
    done = bench.train(bench.job(divided(updates), end=3), slices=0.7)
    data = bench.runner.cards[CARD]
    model = small_network()
    model.load_state_dict(bench.checkpoints.load(bench.base)[0])
    plan = BatchPlan(data.selected, data.others, replay=0.0, batch_size=BATCH, entropy=data.entropy)
    for k in range(3):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * 0.9 ** (bench.trunk.step + k))
        x, y = bench.runner.source.batch(plan.ids(k))
        for start in range(0, BATCH, rows):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[start : start + rows]), y[start : start + rows]).backward()
            optimizer.step()
    ours = bench.weights(done)
    assert all(torch.allclose(ours[name], value, atol=1e-6) for name, value in model.state_dict().items())
    rest = bench.rest(done)
    assert (rest["steps"], rest["resource"]) == (3, 3.0)
    plain = bench.train(bench.job(Variant(name="p"), end=3))
    assert done.passes == plain.passes


def test_a_way_in_two_rungs_is_the_way_in_one_and_averages_keep_their_clock(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, averages=True)
    bench.card(TrainingRecipe(variants=(divided(),), judged="tail"))
    first = bench.train(bench.job(divided(), end=3, top=7))
    kept = bench.rest(first)["averages"]
    # Read at the first and every other of 12 optimizer steps, and at the last; on the trunk's clock once it is stored.
    assert (kept["updates"], kept["last_step"]) == (7, bench.trunk.step + 3)
    then = bench.train(bench.job(divided(), start=3, end=7, top=7, checkpoint=first.checkpoint))
    assert bench.rest(then)["averages"]["updates"] == 7 + 8
    assert bench.rest(then)["averages"]["last_step"] == bench.trunk.step + 7
    assert then.choice == "tail"
    whole = bench.train(bench.job(divided(), end=7))
    assert identical(bench.weights(then), bench.weights(whole))


def test_selected_rows_weigh_in_every_part(tmp_path: Path) -> None:
    """Whole batches and parts of all rows are the same; halves with the wrong rows weighed would not be."""
    bench = make_bench(tmp_path, optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    recipe = TrainingRecipe(variants=(divided(2, loss_weight=3.0),), replay=0.5)
    bench.card(recipe, selected=np.arange(40))
    done = bench.train(bench.job(divided(2, loss_weight=3.0), end=1))
    data = bench.runner.cards[CARD]
    plan = BatchPlan(data.selected, data.others, replay=0.5, batch_size=BATCH, entropy=data.entropy)
    model = small_network()
    model.load_state_dict(bench.checkpoints.load(bench.base)[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = bench.runner.source.batch(plan.ids(0))
    weight = torch.from_numpy(np.where(plan.chosen(0), 3.0, 1.0).astype(np.float32))
    for half in (slice(0, BATCH // 2), slice(BATCH // 2, BATCH)):
        losses = nn.functional.cross_entropy(model(x[half]), y[half], reduction="none")
        optimizer.zero_grad()
        ((losses * weight[half]).sum() / weight[half].sum()).backward()
        optimizer.step()
    ours = bench.weights(done)
    assert all(torch.allclose(ours[name], value, atol=1e-6) for name, value in model.state_dict().items())


def test_workers_hear_of_the_trunks_parts_and_nothing_is_stacked(tmp_path: Path) -> None:
    bench = make_bench(tmp_path)
    bench.trunk.part_rows = 5
    assert CardBriefs(bench.runner)(bench.job(Variant(name="p"))).part_rows == 5
    opened = StackableSpecialists(bench.runner).open(bench.job(Variant(name="p")))
    assert not isinstance(opened, StackableSpecialist)
    bench.trunk.part_rows = None
    assert isinstance(
        StackableSpecialists(bench.runner).open(bench.job(Variant(name="p"))), StackableSpecialist
    )
    assert "several steps on each batch" in (why_variant_alone(bench.job(divided())) or "")
