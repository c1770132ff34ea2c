"""Specialists that train low-rank adapters: what they change, what they offer, how they go on, and how they are fused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from automode.errors import MergeError, NotExecutableError
from automode.planner.recipes import Variant
from automode.planner.variants import Adapter
from automode.testing.bench import CPU, Bench, Memory, identical, make_bench, small_network
from automode.trainer.adapting import ADAPTER, Adapted, fused, rehearse, unmerged
from automode.trainer.flat_optimizers import FlatAdam


def low(rank: int = 2, **more: Any) -> Variant:
    """A variant that trains adapters of the bench's two layers, at a rate that shows."""
    spec = {"rank": rank, "alpha": 4.0} | {k: more.pop(k) for k in ("alpha", "targets") if k in more}
    return Variant.model_validate({"name": "low", "lr_mul": 5.0, "adapter": spec} | more)


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def base_of(bench: Bench) -> dict[str, Tensor]:
    return bench.checkpoints.load(bench.base)[0]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return make_bench(tmp_path, averages=True)


def test_what_is_offered_is_the_fork_with_low_rank_deltas_and_nothing_else_changed(bench: Bench) -> None:
    before = Memory.of(bench.trunk)
    done = bench.train(bench.job(low(), end=12))
    assert before.differences(Memory.of(bench.trunk)) == []
    base, mine = base_of(bench), bench.weights(done)
    assert differing(mine, base) == ["0.weight", "2.weight"]
    for name in differing(mine, base):
        assert int(torch.linalg.matrix_rank(mine[name] - base[name], rtol=1e-4)) == 2
    assert done.passes > 12 * 16 * 3  # a step is priced as any other
    assert bench.rest(done)["kind"] == ADAPTER


def test_an_adapter_learns(bench: Bench) -> None:
    short, long = (bench.train(bench.job(low(), end=end)) for end in (1, 120))
    assert long.value > short.value + 0.1


def test_only_the_layers_that_are_named_are_adapted(bench: Bench) -> None:
    for targets, changed in ((["2"], ["2.weight"]), (["*"], ["0.weight", "2.weight"])):
        done = bench.train(bench.job(low(targets=targets)))
        assert differing(bench.weights(done), base_of(bench)) == changed


def test_slices_and_rungs_change_no_bit(bench: Bench) -> None:
    whole = bench.train(bench.job(low(ema=0.9), end=12))
    first = bench.train(bench.job(low(ema=0.9), end=5, top=12), slices=2)
    second = bench.train(bench.job(low(ema=0.9), start=5, end=12, checkpoint=first.checkpoint), slices=3)
    assert (second.value, second.choice) == (whole.value, whole.choice)
    assert identical(bench.weights(second), bench.weights(whole))
    for part in (ADAPTER, "averages", "ema", "optimizer"):
        assert identical(bench.rest(second)[part], bench.rest(whole)[part]), part


def test_averages_are_of_merged_weights(bench: Bench) -> None:
    done = bench.train(bench.job(low(ema=0.5), end=12))
    rest, base = bench.rest(done), base_of(bench)
    assert set(rest["ema"]) == set(base)
    assert torch.equal(rest["ema"]["0.bias"], base["0.bias"])
    assert not torch.equal(rest["ema"]["0.weight"], base["0.weight"])
    assert set(rest["averages"]["averages"]["tail"]) == set(base)


@pytest.mark.parametrize("kind", ["sgd", "adamw", "sam"])
def test_other_optimizers_train_adapters_too(kind: str, bench: Bench) -> None:
    done = bench.train(bench.job(low(optimizer=kind), end=12))
    assert differing(bench.weights(done), base_of(bench)) == ["0.weight", "2.weight"]


@pytest.mark.parametrize("flat", [False, True])
def test_groups_and_schedules_go_on(flat: bool, tmp_path: Path) -> None:
    def grouped(model: nn.Module) -> torch.optim.Optimizer:
        assert isinstance(model, nn.Sequential)
        groups = [
            {"params": list(model[0].parameters()), "lr": 0.02},
            {"params": list(model[2].parameters()), "lr": 0.0},
        ]
        return FlatAdam(groups) if flat else torch.optim.Adam(groups)

    made = make_bench(
        tmp_path, optimizer=grouped, scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 4, gamma=0.5)
    )
    done = made.train(made.job(low(), end=9))
    # The layer whose group has no rate stands still: its adapter is in that group.
    assert differing(made.weights(done), base_of(made)) == ["0.weight"]
    rates = [group["lr"] for group in made.rest(done)["optimizer"]["param_groups"]]
    assert rates == pytest.approx([5 * 0.02 * 0.5**3, 0.0])  # 5 steps of the trunk, 9 of the trial


def test_norm_statistics_of_a_frozen_fork_follow_its_data(tmp_path: Path) -> None:
    made = make_bench(tmp_path, model=small_network(norm=True))
    done = made.train(made.job(low(), end=6))
    changed = differing(made.weights(done), base_of(made))
    assert {"1.running_mean", "1.running_var"} < set(changed)
    assert "1.weight" not in changed
    go_on = made.train(made.job(low(), start=6, end=9, checkpoint=done.checkpoint))
    assert "1.weight" not in differing(made.weights(go_on), base_of(made))


# Fusion.


def members(bench: Bench, *variants: Variant) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
    return [
        bench.checkpoints.load(bench.train(bench.job(variant, end=12)).checkpoint)[:2] for variant in variants
    ]


def test_one_adapter_at_weight_one_is_the_specialist_bit_by_bit(bench: Bench) -> None:
    (only,) = members(bench, low())
    assert identical(fused(None, [only], 1.0), dict(only[0]))
    assert identical(unmerged(*_first(only)), base_of(bench))


def _first(member: tuple[dict[str, Tensor], dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return member[0], member[1][ADAPTER]


def test_deltas_are_summed_and_not_their_factors(bench: Bench) -> None:
    one, other = members(bench, low(), low(rank=1, targets=["2"], lr_mul=20.0))
    base = base_of(bench)
    both = fused(None, [one, other], 0.5)
    for name, weight in both.items():
        expected = base[name] + 0.5 * ((one[0][name] - base[name]) + (other[0][name] - base[name]))
        torch.testing.assert_close(weight, expected, atol=1e-6, rtol=1e-5)
    elsewhere = {name: weight + 1.0 for name, weight in base.items()}
    moved = fused(elsewhere, [one, other], 1.0)
    torch.testing.assert_close(
        moved["0.weight"] - elsewhere["0.weight"], one[0]["0.weight"] - base["0.weight"], atol=1e-6, rtol=1e-5
    )
    assert torch.equal(moved["0.bias"], elsewhere["0.bias"])


def test_a_specialist_without_adapters_cannot_be_fused(bench: Bench) -> None:
    with pytest.raises(NotExecutableError, match="trained its whole network"):
        fused(None, members(bench, low(), Variant(name="plain")), 1.0)


# What cannot be adapted.


class Tied(nn.Module):
    """Two linear layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 6)
        self.two = nn.Linear(6, 6)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.two(self.one(x).relu())
        return answer


@pytest.mark.parametrize(
    ("model", "spec", "why"),
    [
        (
            small_network,
            Adapter(rank=2, targets=("head",)),
            "'head' names no linear layer of the model; it has 0, 2",
        ),
        (small_network, Adapter(rank=50), "both sides >= rank 50"),
        (small_network, Adapter(rank=9, targets=("2",)), "rank 9 came for a layer of 12 to 3"),
        (Tied, Adapter(rank=1), "tied"),
        (lambda: nn.Sequential(nn.Conv1d(1, 1, 1)), Adapter(rank=1), "no linear layer"),
    ],
)
def test_what_cannot_be_adapted_is_known_before_anything_is_trained(
    model: Any, spec: Adapter, why: str
) -> None:
    with pytest.raises(MergeError, match=why.replace("(", r"\(")):
        rehearse(model(), spec)


def test_an_adapted_network_reads_as_the_trunk_names_it() -> None:
    model = small_network(norm=True)
    names = [name for name, _ in model.named_parameters()]
    adapted = Adapted(model, Adapter(rank=1), (3,))
    assert sorted(adapted.parameters) == sorted(names)
    assert len(adapted.parameters) == len(names)
    assert next(model.parameters()).device == CPU
    state, kept = adapted.take_off(finite=True)
    assert [name for name, _ in model.named_parameters()] == names
    assert set(kept["a"]) == {"0", "3"}
    assert identical(state, dict(model.state_dict()))  # a fresh adapter changes nothing
