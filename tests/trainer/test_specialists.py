"""Specialists: trained on copies, exactly as their variant says, resumable at every rung, and invisible to the trunk."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedules
from torch.utils.data import Dataset

from automode.errors import NotExecutableError
from automode.planner.events import Weights
from automode.planner.policy import SafeguardPolicy
from automode.planner.recipes import EarlyStopping, TrainingRecipe, Variant
from automode.testing.bench import (
    BATCH,
    CARD,
    CLASSES,
    FEATURES,
    Bench,
    Memory,
    identical,
    make_bench,
    small_network,
)
from automode.trainer.random_state import forked_rng
from automode.trainer.sample_source import BatchPlan
from automode.trainer.trunk import copy_of, model_copy_of

PLAIN = Variant(name="plain")


def sgd(rate: float = 0.1, **more: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.SGD(model.parameters(), lr=rate, **more)


def moved(bench: Bench, variant: Variant, *, end: int = 1) -> dict[str, Tensor]:
    """How far each weight went from the snapshot."""
    before = bench.checkpoints.load(bench.base)[0]
    after = bench.weights(bench.train(bench.job(variant, end=end)))
    return {name: after[name] - before[name] for name in before}


def by_hand(
    bench: Bench,
    make: Callable[[nn.Module], torch.optim.Optimizer],
    steps: int,
    *,
    after: Callable[[torch.optim.Optimizer, nn.Module], None] = lambda optimizer, model: None,
    recipe: TrainingRecipe | None = None,
) -> nn.Module:
    """The same training written as a person would write it: a fresh network, a fresh optimizer, the card's batches."""
    data = bench.runner.cards[CARD]
    model = small_network()
    model.load_state_dict(bench.checkpoints.load(bench.base)[0])
    optimizer = make(model)
    plan = BatchPlan(
        data.selected, data.others, replay=data.recipe.replay, batch_size=BATCH, entropy=data.entropy
    )
    for k in range(steps):
        inputs, classes = bench.runner.source.batch(plan.ids(k))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), classes).backward()
        after(optimizer, model)
    return model


class Augmented(Dataset[Any]):
    """Samples with noise from all three global generators, and a record of which were read."""

    def __init__(self, n: int = 96) -> None:
        rng = np.random.default_rng(3)
        self.inputs = torch.from_numpy(rng.standard_normal((n, FEATURES)).astype(np.float32))
        self.targets = self.inputs[:, :CLASSES].argmax(dim=1)
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        self.read.append(i)
        noise = random.random() + np.random.random() + torch.rand(()).item()  # noqa: NPY002  # what a user's own code draws from
        return self.inputs[i] + 0.01 * noise, self.targets[i]


# On copies.


VARIANTS = {
    "plain": PLAIN,
    "rate": Variant(name="v", lr_mul=2.0, weight_decay=0.1, clip_norm=0.5),
    "sam": Variant(name="v", optimizer="sam"),
    "sgd": Variant(name="v", optimizer="sgd"),
    "adamw": Variant(name="v", optimizer="adamw"),
    "ema": Variant(name="v", ema=0.9),
    "bf16": Variant(name="v", precision="bf16"),
    "constant": Variant(name="v", schedule="constant"),
    "weighted": Variant(name="v", loss_weight=3.0),
    "mixed": Variant(name="v", batches="all", loss_weight=3.0),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_trunk_is_the_same_bit_by_bit_after_a_specialist_was_trained(name: str, tmp_path: Path) -> None:
    bench = make_bench(
        tmp_path,
        model=small_network(norm=True, dropout=0.4),
        scheduler=lambda optimizer: schedules.CosineAnnealingLR(optimizer, 40),
        dataset=Augmented(),
        averages=True,
    )
    bench.card(TrainingRecipe(variants=(VARIANTS[name],), replay=0.25), selected=np.arange(40))
    bench.step()  # the trunk went on, and holds gradients
    before = Memory.of(bench.trunk)
    done = bench.train(bench.job(VARIANTS[name]), slices=1.5)
    assert before.differences(Memory.of(bench.trunk)) == []
    assert math.isfinite(done.value)
    assert not identical(bench.weights(done), bench.checkpoints.load(bench.base)[0])


def test_a_failing_segment_leaves_the_trunk_as_it_was(tmp_path: Path) -> None:
    class Unreadable(Augmented):
        def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
            if len(self.read) > 150:
                raise OSError("the disk went away")
            return super().__getitem__(i)

    bench = make_bench(tmp_path, model=small_network(norm=True, dropout=0.4), dataset=Unreadable())
    before = Memory.of(bench.trunk)
    segment = bench.runner.open(bench.job(PLAIN, end=20))
    with pytest.raises(OSError, match="disk went away"):
        segment.advance(20)
    assert segment.passes > 0
    assert before.differences(Memory.of(bench.trunk)) == []


def test_a_specialist_shares_no_patched_step_with_the_trunk(tmp_path: Path) -> None:
    bench = make_bench(
        tmp_path, optimizer=sgd(), scheduler=lambda optimizer: schedules.StepLR(optimizer, step_size=100)
    )
    patched = bench.trunk.optimizer.step
    counted: list[int] = []
    bench.trunk.optimizer.register_step_post_hook(lambda *_: counted.append(1))
    done = bench.train(bench.job(PLAIN, end=3))
    assert bench.trunk.optimizer.step is patched or bench.trunk.optimizer.step == patched
    assert counted == []
    assert not identical(bench.weights(done), bench.checkpoints.load(bench.base)[0])


def test_the_snapshot_counts_and_not_what_the_trunk_became_since(tmp_path: Path) -> None:
    bench = make_bench(
        tmp_path, scheduler=lambda optimizer: schedules.ExponentialLR(optimizer, 0.9), averages=True
    )
    first = bench.train(bench.job(PLAIN))
    bench.step(4)
    second = bench.train(bench.job(PLAIN))
    assert identical(bench.weights(first), bench.weights(second))
    assert identical(bench.rest(first)["optimizer"], bench.rest(second)["optimizer"])
    assert first.value == second.value


def test_a_model_that_cannot_be_copied_is_refused_with_what_to_do(tmp_path: Path) -> None:
    bench = make_bench(tmp_path)
    bench.trunk.model.lock = threading.Lock()
    with pytest.raises(
        NotExecutableError, match=r"cannot be copied .*cannot pickle.*remove what cannot be deep-copied"
    ):
        bench.runner.open(bench.job(PLAIN))


class Remembers(nn.Module):
    """Keeps what its forward pass gave, as models do that show their attention."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small_network()
        self.kept: dict[str, Any] = {}
        self.last: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        self.last = self.body(inputs)
        self.kept = {"maps": [self.last * 2.0]}
        return self.last


def test_a_model_that_keeps_outputs_of_its_forward_pass_is_copied_with_their_values(tmp_path: Path) -> None:
    bench = make_bench(tmp_path)
    model = bench.trunk.model = Remembers()
    bench.trunk.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bench.trunk.follow()
    outputs = model(torch.randn(3, FEATURES))
    for copied in (copy_of(bench.trunk)[0], model_copy_of(bench.trunk)):
        assert isinstance(copied, Remembers)
        assert copied.last is not None
        assert copied.last is not model.last
        assert torch.equal(copied.last, outputs)
        assert torch.equal(copied.kept["maps"][0], outputs * 2.0)
        assert not copied.last.requires_grad
    outputs.sum().backward()  # the user's own graph is as it was
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_model_that_cannot_be_copied_is_judged_by_nothing_with_what_to_do(tmp_path: Path) -> None:
    bench = make_bench(tmp_path)
    bench.trunk.model.lock = threading.Lock()
    with pytest.raises(
        NotExecutableError, match=r"the model cannot be copied .*lock.*remove what cannot be deep-copied"
    ):
        model_copy_of(bench.trunk)


# Resuming.


RESUMED = {
    "plain": (PLAIN, 6, 18),
    "sam over odd rungs": (Variant(name="v", optimizer="sam"), 5, 15),
    "another optimizer": (Variant(name="v", optimizer="adamw", lr_mul=0.5), 6, 18),
    "its own average": (Variant(name="v", ema=0.8), 6, 18),
    "bf16": (Variant(name="v", precision="bf16"), 6, 18),
    "held rate": (Variant(name="v", schedule="constant", lr_mul=3.0), 6, 18),
    "weight decay and clipping": (Variant(name="v", weight_decay=0.2, clip_norm=0.3), 6, 18),
}


@pytest.mark.parametrize("name", RESUMED)
def test_going_on_from_a_rung_equals_one_long_segment(name: str, tmp_path: Path) -> None:
    variant, rung, top = RESUMED[name]
    bench = make_bench(
        tmp_path,
        model=small_network(norm=True, dropout=0.4),
        scheduler=lambda optimizer: schedules.CosineAnnealingLR(optimizer, 60),
        dataset=Augmented(),
    )
    bench.card(TrainingRecipe(variants=(variant,), replay=0.25), selected=np.arange(50))
    whole = bench.train(bench.job(variant, end=top), slices=2.5)
    lower = bench.train(bench.job(variant, end=rung, top=top))
    bench.step(2)  # the trunk and its random states go on meanwhile
    torch.rand(3)
    upper = bench.train(bench.job(variant, start=rung, end=top, checkpoint=lower.checkpoint), slices=4)
    assert identical(bench.weights(whole), bench.weights(upper))
    assert whole.value == upper.value
    mine, theirs = bench.rest(whole), bench.rest(upper)
    for part in ("optimizer", "scheduler", "steps", "rng", "ema"):
        assert identical(mine.get(part), theirs.get(part)), part
    assert lower.passes + upper.passes == pytest.approx(whole.passes + lower_evaluation(bench, variant))


def lower_evaluation(bench: Bench, variant: Variant) -> float:
    """Passes of the one more evaluation that two segments make than one."""
    held_out = bench.judged.scores(bench.trunk.model, "A").n
    refreshed = 4 * BATCH
    return held_out * (2 if variant.ema else 1) + (refreshed if variant.ema else 0)


def test_every_trial_of_a_card_sees_the_same_batches(tmp_path: Path) -> None:
    data = Augmented()
    bench = make_bench(tmp_path, dataset=data)
    seen = []
    for trial, variant in enumerate((PLAIN, Variant(name="slow", lr_mul=0.1))):
        data.read.clear()
        bench.train(bench.job(variant, trial=trial))
        seen.append(list(data.read))
    assert seen[0] == seen[1]


# What each field of a variant does.


def test_lr_mul_multiplies_the_step(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, optimizer=sgd())
    once, twice = moved(bench, PLAIN), moved(bench, Variant(name="v", lr_mul=2.0))
    for name, delta in once.items():
        torch.testing.assert_close(twice[name], 2 * delta)


def test_weight_decay_is_multiplied_or_replaced(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, optimizer=sgd(weight_decay=0.1))
    weights = bench.checkpoints.load(bench.base)[0]
    once, none = moved(bench, PLAIN), moved(bench, Variant(name="v", weight_decay_mul=0.0))
    thrice, given = (
        moved(bench, Variant(name="v", weight_decay_mul=3.0)),
        moved(bench, Variant(name="v", weight_decay=0.3)),
    )
    for name, weight in weights.items():
        torch.testing.assert_close(once[name], none[name] - 0.1 * 0.1 * weight)
        torch.testing.assert_close(thrice[name], none[name] - 0.1 * 0.3 * weight)
        torch.testing.assert_close(given[name], thrice[name])


def test_weight_decay_of_an_optimizer_without_any_is_refused(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, optimizer=lambda model: torch.optim.Rprop(model.parameters()))
    with pytest.raises(NotExecutableError, match="this optimizer has none"):
        bench.runner.open(bench.job(Variant(name="v", weight_decay=0.3)))


def test_clip_norm_limits_the_step(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, optimizer=sgd(rate=1.0))

    def length(deltas: dict[str, Tensor]) -> float:
        return float(torch.linalg.vector_norm(torch.cat([d.flatten() for d in deltas.values()])))

    assert length(moved(bench, PLAIN)) > 0.02
    assert length(moved(bench, Variant(name="v", clip_norm=0.01))) == pytest.approx(0.01, rel=1e-4)
    bench.trunk.clip_norm = 0.005  # the trunk's own clipping holds where the variant names none
    assert length(moved(bench, PLAIN)) == pytest.approx(0.005, rel=1e-4)
    assert length(moved(bench, Variant(name="v", clip_norm=0.01))) == pytest.approx(0.01, rel=1e-4)


MADE_BY_HAND: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.02),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.2),
}


@pytest.mark.parametrize("kind", MADE_BY_HAND)
def test_another_optimizer_is_the_one_that_torch_makes(kind: Any, tmp_path: Path) -> None:
    bench = make_bench(tmp_path, optimizer=lambda model: torch.optim.Adamax(model.parameters(), lr=0.02))
    decay = 0.2 if kind == "adamw" else None
    done = bench.train(bench.job(Variant(name="v", optimizer=kind, weight_decay=decay), end=5))
    hand = by_hand(bench, MADE_BY_HAND[kind], 5, after=lambda optimizer, model: optimizer.step())
    assert bench.rest(done)["kind"] == {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}[kind]
    for name, weight in hand.state_dict().items():
        torch.testing.assert_close(bench.weights(done)[name], weight)


def test_sam_costs_two_and_takes_half_the_steps(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, optimizer=sgd())
    variant = Variant(name="v", optimizer="sam", sam_rho=0.1)
    done = bench.train(bench.job(variant, end=6))
    plain = bench.train(bench.job(PLAIN, end=6))
    assert (bench.rest(done)["steps"], bench.rest(plain)["steps"]) == (3, 6)
    assert done.passes == plain.passes

    data = bench.runner.cards[CARD]
    plan = BatchPlan(data.selected, data.others, replay=0.1, batch_size=BATCH, entropy=data.entropy)
    model = small_network()
    model.load_state_dict(bench.checkpoints.load(bench.base)[0])
    for k in range(3):
        inputs, classes = bench.runner.source.batch(plan.ids(k))
        weights = list(model.parameters())
        grads = torch.autograd.grad(nn.functional.cross_entropy(model(inputs), classes), weights)
        norm = torch.sqrt(sum((g**2).sum() for g in grads))
        with torch.no_grad():
            for w, g in zip(weights, grads, strict=True):
                w.add_(0.1 * g / norm)
        sharp = torch.autograd.grad(nn.functional.cross_entropy(model(inputs), classes), weights)
        with torch.no_grad():
            for w, g, s in zip(weights, grads, sharp, strict=True):
                w.sub_(0.1 * g / norm + 0.1 * s)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(bench.weights(done)[name], weight)


def test_ema_offers_the_average_of_its_own_steps(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, optimizer=sgd())
    done = bench.train(bench.job(Variant(name="v", ema=0.75), end=6))
    average: dict[str, Tensor] = {}

    def follow(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        optimizer.step()
        for name, p in model.named_parameters():
            average[name] = (
                0.75 * average[name] + 0.25 * p.detach() if name in average else p.detach().clone()
            )

    by_hand(bench, sgd(), 6, after=follow)
    for name, weight in average.items():
        torch.testing.assert_close(bench.rest(done)["ema"][name], weight)
    state, _ = bench_states(bench).load(Weights(checkpoint=done.checkpoint, choice="ema"))
    assert identical({name: state[name] for name in average}, bench.rest(done)["ema"])


def test_bf16_computes_in_bf16_and_keeps_single_precision_weights(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, optimizer=sgd())
    kinds = []
    bench.trunk.model[0].register_forward_hook(
        lambda _m, _i, out: kinds.append(out.dtype)
    )  # hooks are copied along
    done = bench.train(bench.job(Variant(name="v", precision="bf16"), end=3))
    assert kinds[:3] == [torch.bfloat16] * 3
    assert {w.dtype for w in bench.weights(done).values()} == {torch.float32}
    kinds.clear()
    bench.train(bench.job(Variant(name="v", precision="fp32"), end=3))
    assert set(kinds) == {torch.float32}


def assert_weighed_step(bench: Any, deltas: dict[str, Tensor], ids: Any, weight: Tensor) -> None:
    """The first step went down the gradient of the weighed mean loss of these samples."""
    model = small_network()
    model.load_state_dict(bench.checkpoints.load(bench.base)[0])
    inputs, classes = bench.runner.source.batch(ids)
    losses = nn.functional.cross_entropy(model(inputs), classes, reduction="none")
    grads = torch.autograd.grad((losses * weight).sum() / weight.sum(), list(model.parameters()))
    for delta, grad in zip(deltas.values(), grads, strict=True):
        torch.testing.assert_close(delta, -0.1 * grad)


def test_loss_weight_favours_the_selected_samples(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, optimizer=sgd())
    bench.card(TrainingRecipe(variants=(PLAIN,), replay=0.5), selected=np.arange(30))
    deltas = moved(bench, Variant(name="v", loss_weight=4.0))
    data = bench.runner.cards[CARD]
    plan = BatchPlan(data.selected, data.others, replay=0.5, batch_size=BATCH, entropy=data.entropy)
    ids = plan.ids(0)
    weight = torch.where(torch.from_numpy(ids < 30), 4.0, 1.0)
    assert weight.tolist() == [4.0] * 8 + [1.0] * 8
    assert_weighed_step(bench, deltas, ids, weight)


def test_batches_of_all_samples_hold_each_once_a_pass_and_weigh_the_selected_wherever_they_stand(
    tmp_path: Path,
) -> None:
    bench = make_bench(tmp_path, optimizer=sgd())
    bench.card(TrainingRecipe(variants=(PLAIN,), replay=0.1), selected=np.arange(30))
    deltas = moved(bench, Variant(name="v", batches="all", loss_weight=3.0))
    data = bench.runner.cards[CARD]
    everything = np.union1d(data.selected, data.others)
    plan = BatchPlan(
        data.selected, data.others, replay=0.1, batch_size=BATCH, entropy=data.entropy, mixed=True
    )
    drawn = np.concatenate([plan.ids(k) for k in range(everything.size // BATCH)])
    assert np.unique(drawn).size == drawn.size
    ids = plan.ids(0)
    assert plan.chosen(0).tolist() == (ids < 30).tolist()
    assert 0 < plan.chosen(0).sum() < BATCH
    weight = torch.where(torch.from_numpy(ids < 30), 3.0, 1.0)
    assert_weighed_step(bench, deltas, ids, weight)


def test_a_weighed_batch_of_all_samples_is_weighed_alike_in_both_passes_of_a_sharp_step(
    tmp_path: Path,
) -> None:
    bench = make_bench(tmp_path, optimizer=sgd())
    bench.card(TrainingRecipe(variants=(PLAIN,), replay=0.1), selected=np.arange(30))
    weighed = Variant(name="v", batches="all", loss_weight=3.0, optimizer="sam", sam_rho=1e-12)
    plain = Variant(name="v", batches="all", loss_weight=3.0)
    sharp, flat = moved(bench, weighed, end=2), moved(bench, plain)
    for name, delta in flat.items():
        torch.testing.assert_close(sharp[name], delta, rtol=1e-4, atol=1e-6)


def test_loss_weight_without_per_sample_losses_is_refused(tmp_path: Path) -> None:
    bench = make_bench(tmp_path)
    bench.runner.per_sample = None
    with pytest.raises(NotExecutableError, match="has no exact per-sample losses"):
        bench.runner.open(bench.job(Variant(name="v", loss_weight=2.0)))


def final_rate(bench: Bench, variant: Variant, end: int = 8) -> float:
    return float(bench.rest(bench.train(bench.job(variant, end=end)))["optimizer"]["param_groups"][0]["lr"])


def test_schedule_keep_follows_and_constant_holds(tmp_path: Path) -> None:
    bench = make_bench(
        tmp_path,
        optimizer=sgd(0.4),
        scheduler=lambda optimizer: schedules.ExponentialLR(optimizer, 0.9),
        steps=5,
    )
    at_fork = 0.4 * 0.9**5
    assert final_rate(bench, PLAIN) == pytest.approx(at_fork * 0.9**8)
    assert final_rate(bench, Variant(name="v", schedule="constant")) == pytest.approx(at_fork)
    assert final_rate(bench, Variant(name="v", schedule="constant", lr_mul=0.5)) == pytest.approx(at_fork / 2)


def test_an_epoch_wise_schedule_steps_at_the_trunks_epochs(tmp_path: Path) -> None:
    bench = make_bench(
        tmp_path, optimizer=sgd(0.4), scheduler=lambda o: schedules.StepLR(o, 1, gamma=0.5), steps=0
    )
    bench.trunk.step = 4
    bench.card(TrainingRecipe(variants=(PLAIN,)))
    bench.runner.steps_per_epoch = 6
    assert final_rate(bench, PLAIN, end=1) == 0.4
    assert final_rate(bench, PLAIN, end=2) == 0.2  # step 6
    assert final_rate(bench, PLAIN, end=8) == 0.1  # step 12


def test_anneal_goes_linearly_to_zero_by_the_top_rung(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, optimizer=sgd(0.4))
    variant = Variant(name="v", schedule="anneal")
    lower = bench.train(bench.job(variant, end=4, top=8))
    assert bench.rest(lower)["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.4 * (1 - 3 / 8))
    upper = bench.train(bench.job(variant, start=4, end=8, top=8, checkpoint=lower.checkpoint))
    assert bench.rest(upper)["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.4 / 8)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "step": lambda o: schedules.StepLR(o, 3, gamma=0.5),
    "multistep": lambda o: schedules.MultiStepLR(o, [3, 7], gamma=0.5),
    "exponential": lambda o: schedules.ExponentialLR(o, 0.9),
    "lambda": lambda o: schedules.LambdaLR(o, lambda k: 1 / (1 + k)),
    "multiplicative": lambda o: schedules.MultiplicativeLR(o, lambda k: 0.95),
    "constant": lambda o: schedules.ConstantLR(o, 0.5, total_iters=8),
    "linear": lambda o: schedules.LinearLR(o, 0.1, total_iters=20),
    "polynomial": lambda o: schedules.PolynomialLR(o, total_iters=30),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 30),
    "warm restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 4),
    "one cycle": lambda o: schedules.OneCycleLR(o, max_lr=0.3, total_steps=40),
    "cyclic": lambda o: schedules.CyclicLR(o, 0.05, 0.5, step_size_up=4, cycle_momentum=False),
    "warm-up, then cosine": lambda o: schedules.SequentialLR(
        o,
        [schedules.LinearLR(o, 0.1, total_iters=7), schedules.CosineAnnealingLR(o, 20)],
        milestones=[7],
    ),
    "chained": lambda o: schedules.ChainedScheduler(
        [schedules.ConstantLR(o, 0.5, total_iters=7), schedules.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "on plateau": lambda o: schedules.ReduceLROnPlateau(o, patience=1),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_multiplied_rate_lasts_under_every_schedule(name: str, tmp_path: Path) -> None:
    on_plateau = name == "on plateau"
    bench = make_bench(
        tmp_path, optimizer=sgd(0.1, momentum=0.9), scheduler=SCHEDULERS[name], steps=0 if on_plateau else 5
    )
    before = Memory.of(bench.trunk)
    plain = final_rate(bench, PLAIN)
    assert final_rate(bench, Variant(name="v", lr_mul=0.25)) == pytest.approx(0.25 * plain)
    assert final_rate(bench, Variant(name="v", lr_mul=0.25, optimizer="adamw")) == pytest.approx(0.25 * plain)
    assert before.differences(Memory.of(bench.trunk)) == []
    if not on_plateau:
        bench.step(8)
        assert plain == pytest.approx(bench.trunk.rates()[0])


def test_early_stopping_ends_a_segment_that_gains_nothing(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, optimizer=sgd())
    bench.card(TrainingRecipe(variants=(PLAIN,), early_stopping=EarlyStopping(patience=2, min_delta=100.0)))
    done = bench.train(bench.job(PLAIN, end=50))
    assert done.stopped_early
    assert (
        bench.rest(done)["steps"] == 15
    )  # the first look sets the mark, two more of five steps each do not beat it
    bench.card(TrainingRecipe(variants=(PLAIN,)))
    assert not bench.train(bench.job(PLAIN, end=20)).stopped_early


def test_a_diverged_specialist_is_reported_with_nan_and_finite_weights(tmp_path: Path) -> None:
    class Poisoned(Augmented):
        def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
            x, y = super().__getitem__(i)
            return (x * float("nan") if poisoned else x), y

    poisoned = False
    bench = make_bench(tmp_path, dataset=Poisoned())
    segment = bench.runner.open(bench.job(PLAIN, end=10))
    assert not segment.advance(3)
    poisoned = True
    assert not segment.advance(4)
    assert segment.advance(1)
    done = segment.finish()
    assert math.isnan(done.value)
    assert all(torch.isfinite(w).all() for w in bench.weights(done).values())


class Broken(Augmented):
    """Some batches are not numbers, or of wrong scale, as often as a test says."""

    factor = 1.0

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = super().__getitem__(i)
        return x * self.factor, y


@pytest.mark.parametrize("variant", [PLAIN, Variant(name="sharp", optimizer="sam")], ids=lambda v: v.name)
@pytest.mark.parametrize(("factor", "norm"), [(math.nan, True), (1e6, False)])
def test_a_broken_batch_never_reaches_a_specialists_weights_and_one_rung_later_it_is_still_known(
    factor: float, norm: bool, variant: Variant, tmp_path: Path
) -> None:
    data = Broken()
    bench = make_bench(tmp_path, model=small_network(norm=norm), dataset=data, averages=True)
    segment = bench.runner.open(bench.job(variant, end=10))
    assert not segment.advance(8)
    data.factor = factor
    before = [weight.detach().clone() for weight in segment._model.parameters()]
    assert not segment.advance(1)
    assert identical(before, [weight.detach() for weight in segment._model.parameters()])
    assert all(buffer.isfinite().all() for buffer in segment._model.buffers())
    data.factor = 1.0
    first = segment.finish()
    assert math.isfinite(first.value)
    job = replace(bench.job(variant, end=20), from_resource=10, checkpoint=first.checkpoint)
    further = bench.runner.open(job)
    data.factor = factor
    assert not further.advance(1)
    data.factor = 1.0
    assert further.advance(20)
    assert math.isfinite(further.finish().value)


def test_where_the_policy_leaves_nothing_out_a_trial_leaves_nothing_out(tmp_path: Path) -> None:
    data = Broken()
    bench = make_bench(tmp_path, dataset=data)
    bench.runner.safeguards = SafeguardPolicy(skip_nonfinite=False, leap=None)
    segment = bench.runner.open(bench.job(PLAIN, end=10))
    data.factor = math.nan
    assert segment.advance(1)
    assert math.isnan(segment.finish().value)


# What a specialist trains on.


@pytest.mark.parametrize(("replay", "from_others"), [(0.0, 0), (0.25, 4), (0.5, 8)])
def test_the_replayed_share_of_each_batch_comes_from_outside_the_selection(
    replay: float, from_others: int, tmp_path: Path
) -> None:
    data = Augmented()
    bench = make_bench(tmp_path, dataset=data)
    bench.card(TrainingRecipe(variants=(PLAIN,), replay=replay), selected=np.arange(20))
    data.read.clear()
    segment = bench.runner.open(bench.job(PLAIN, end=4))
    segment.advance(4)
    batches = [data.read[i : i + BATCH] for i in range(0, 4 * BATCH, BATCH)]
    assert [sum(i >= 20 for i in batch) for batch in batches] == [from_others] * 4


# Averages.


def bench_states(bench: Bench) -> Any:
    return bench.judged._states


def test_averaged_candidates_get_norm_statistics_of_their_own(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, model=small_network(norm=True), averages=True)
    done = bench.train(bench.job(PLAIN, end=12))
    states = bench_states(bench)
    stored, _ = states.load(Weights(checkpoint=done.checkpoint, choice="ema10"))
    model, _, passes = states.model(Weights(checkpoint=done.checkpoint, choice="ema10"))
    assert passes == 4 * BATCH
    ids = np.arange(4 * BATCH)
    inputs, _ = bench.runner.source.batch(ids)
    with torch.no_grad():
        hidden = nn.functional.linear(inputs, stored["0.weight"], stored["0.bias"])
    torch.testing.assert_close(model[1].running_mean, hidden.mean(0), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(stored["1.running_mean"], hidden.mean(0), atol=1e-3)
    raw, _, none = states.model(Weights(checkpoint=done.checkpoint, choice="raw"))
    assert none == 0
    assert torch.equal(raw[1].running_mean, bench.weights(done)["1.running_mean"])


def test_the_trunks_averages_are_carried_on_to_the_rung_itself(tmp_path: Path) -> None:
    # Averages are read now and then; what is judged at a rung must know the steps up to that rung.
    bench = make_bench(tmp_path, optimizer=sgd(), averages=True)
    assert bench.trunk.averages is not None
    bench.trunk.averages.every = 1000
    bench.base = bench.snapshot()
    done = bench.train(bench.job(PLAIN, end=6))
    assert bench.rest(done)["averages"]["last_step"] == bench.trunk.step + 6
    untouched = bench.checkpoints.load(bench.base)[1]["averages"]
    assert not identical(untouched["averages"], bench.rest(done)["averages"]["averages"])


def test_the_judge_chooses_the_best_of_raw_weights_and_averages(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, optimizer=sgd(2.0), averages=True, steps=12)
    done = bench.train(bench.job(Variant(name="v", ema=0.5), end=6))
    states, values = bench_states(bench), {}
    for choice in ("raw", "ema3", "ema10", "tail", "ema"):
        with forked_rng():
            model, _, _ = states.model(Weights(checkpoint=done.checkpoint, choice=choice))
            values[choice] = bench.judged.value(model)[0]
    assert done.value == max(values.values())
    assert values[done.choice] == done.value


def with_first(bench: Bench, first: dict[str, Tensor]) -> None:
    """Let the bench's base hold other weights as the run's first ones."""
    weights, rest, _ = bench.checkpoints.load(bench.base)
    bench.base = bench.checkpoints.save(weights, rest | {"first": first}, {"kind": "base"})


@pytest.mark.parametrize("judged", [None, "tail"])
def test_a_restart_trains_from_the_first_weights_with_a_fresh_optimizer(judged: Any, tmp_path: Path) -> None:
    bench = make_bench(
        tmp_path, optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=0.02), averages=True, steps=8
    )
    recipe = TrainingRecipe(variants=(PLAIN,), judged=judged)
    bench.card(recipe)
    torch.manual_seed(11)
    first = small_network().state_dict()
    with_first(bench, first)
    job = bench.job(Variant(name="r", lr_mul=0.1, restart=True), end=6, top=12)
    lower = bench.train(job)

    data, model = bench.runner.cards[CARD], small_network()
    model.load_state_dict(first)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.002)
    plan = BatchPlan(data.selected, data.others, replay=recipe.replay, batch_size=BATCH, entropy=data.entropy)
    for k in range(6):
        inputs, classes = bench.runner.source.batch(plan.ids(k))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), classes).backward()
        optimizer.step()
    assert identical(bench.weights(lower), model.state_dict())
    averages = bench.rest(lower)["averages"]
    assert averages["followed"] == 6
    assert (lower.choice == "tail") == (judged == "tail")
    # The next rung goes on from there, and not from the first weights again.
    upper = bench.train(bench.job(job.variant, start=6, end=12, checkpoint=lower.checkpoint))
    whole = bench.train(bench.job(job.variant, end=12))
    assert identical(bench.weights(upper), bench.weights(whole))


def test_a_restart_without_the_first_weights_is_refused(tmp_path: Path) -> None:
    bench = make_bench(tmp_path)
    with pytest.raises(NotExecutableError, match="does not hold them"):
        bench.train(bench.job(Variant(name="r", restart=True)))


def test_the_tail_average_begins_at_the_fork_and_is_all_that_is_judged(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, optimizer=sgd(1.0), averages=True, steps=12)
    bench.card(TrainingRecipe(variants=(PLAIN,), judged="tail"))
    done = bench.train(bench.job(PLAIN, end=6))
    held_out = bench.judged.scores(bench.trunk.model, "A").n
    assert done.choice == "tail"
    assert done.passes == 6 * BATCH * 3 + held_out
    assert bench.rest(done)["averages"]["followed"] == 6
    with forked_rng():
        model, _, _ = bench_states(bench).model(Weights(checkpoint=done.checkpoint, choice="tail"))
        assert bench.judged.value(model)[0] == done.value


def test_what_the_user_has_frozen_stays_frozen(tmp_path: Path) -> None:
    network = small_network(norm=True, dropout=0.4)
    network[1].eval()  # statistics that are not to move
    network[0].weight.requires_grad_(False)
    bench = make_bench(tmp_path, model=network)
    done = bench.train(bench.job(PLAIN, end=4))
    base, after = bench.checkpoints.load(bench.base)[0], bench.weights(done)
    for name in ("0.weight", "1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(base[name], after[name]), name
    assert not torch.equal(base["4.bias"], after["4.bias"])
