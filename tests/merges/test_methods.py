"""The merge menu: one call, every method, nothing silent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from automode.errors import MergeError
from automode.merges.adapter_fuse import fuse
from automode.merges.averages import interpolate, uniform
from automode.merges.lora import adapter_of, attach
from automode.merges.merge_context import MergeContext, MergeResult
from automode.merges.methods import METHODS, Distill, FisherSoup, Interpolate, find, merge
from automode.merges.norm_statistics import recompute
from automode.merges.state_dicts import StateDict
from automode.merges.trajectory import TrajectoryAverages


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def plain(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 4, generator=generator), torch.zeros(16, dtype=torch.long)) for _ in range(3)]


def near(target: StateDict) -> Any:
    """Score a state by its closeness to a target's parameters."""
    return lambda state: (
        -sum(float((state[k] - target[k]).square().sum()) for k in target if k.endswith("weight"))
    )


PARENT = plain(0).state_dict()
MEMBERS = [plain(seed).state_dict() for seed in (1, 2, 3)]


def test_the_menu_is_the_visible_tuple() -> None:
    names = ["uniform", "greedy", "swa", "interpolate", "fisher_soup", "distill", "adapter_fuse"]
    assert [method.name for method in METHODS] == names
    assert all(find(name).name == name for name in names)


@pytest.mark.parametrize(
    ("wrong", "right"), [("unifrom", "uniform"), ("fisher", "fisher_soup"), ("SWA", None)]
)
def test_an_unknown_method_is_refused_with_the_closest_name(wrong: str, right: str | None) -> None:
    with pytest.raises(MergeError, match="there is no merge method") as caught:
        merge(wrong, parent=PARENT, members=MEMBERS, context=MergeContext())
    assert (f"did you mean '{right}'" in str(caught.value)) == (right is not None)
    assert "adapter_fuse" in str(caught.value)


def test_every_method_runs_and_gives_the_parents_keys() -> None:
    adapted = plain(0)
    attach(adapted, rank=1, alpha=2.0)
    with torch.no_grad():
        adapted[0].lora_b.fill_(0.3)
    full = MergeContext(build_model=plain, batches=batches, score=near(PARENT), score_passes=10)
    for method in METHODS:
        members, context = MEMBERS, full
        if method.name == "interpolate":
            members = MEMBERS[:1]
        if method.name == "adapter_fuse":
            members, context = [], MergeContext(adapters=[adapter_of(adapted)])
        result = merge(method.name, parent=PARENT, members=members, context=context)
        assert list(result.state) == list(PARENT)
        assert all(result.state[key].shape == value.shape for key, value in PARENT.items())
        assert result.report["method"] == method.name
        assert result.report["norm_statistics"] == "none"


def test_identical_members_merge_to_themselves_whatever_the_method() -> None:
    context = MergeContext(build_model=plain, batches=batches, score=near(PARENT))
    for name in ("uniform", "greedy", "swa", "fisher_soup"):
        state = merge(name, parent=PARENT, members=[MEMBERS[0]] * 3, context=context).state
        assert all(torch.equal(state[key], MEMBERS[0][key]) for key in state), name
    state = merge("interpolate", parent=MEMBERS[0], members=[MEMBERS[0]], context=context).state
    assert all(torch.equal(state[key], MEMBERS[0][key]) for key in state)


@pytest.mark.parametrize("name", ["uniform", "greedy", "swa", "fisher_soup"])
def test_the_order_of_members_does_not_matter(name: str) -> None:
    context = MergeContext(build_model=plain, batches=batches, score=near(PARENT))
    one = merge(name, parent=PARENT, members=MEMBERS, context=context).state
    other = merge(name, parent=PARENT, members=MEMBERS[::-1], context=context).state
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-5, atol=1e-6)


def test_interpolate_takes_the_best_point_and_prefers_the_parent_in_a_tie() -> None:
    member = MEMBERS[0]
    half = interpolate(PARENT, member, 0.5)
    result = merge(
        "interpolate", parent=PARENT, members=[member], context=MergeContext(score=near(half), score_passes=7)
    )
    assert (result.report["weight"], result.passes) == (0.5, 28)
    tie = merge(
        Interpolate(weights=(1.0, 0.1, 0.7)),
        parent=PARENT,
        members=[member],
        context=MergeContext(score=lambda state: 0.0),
    )
    assert tie.report["weight"] == 0.1


def test_swa_takes_the_best_of_the_live_averages() -> None:
    model = plain(0)
    averages = TrajectoryAverages(dict(model.named_parameters()), 100, every=1)
    for step in range(1, 30):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
        averages.update(dict(model.named_parameters()), step)
    found = averages.candidates(model.state_dict())
    context = MergeContext(trajectory=found, score=near(found["ema10"]), score_passes=5)
    result = merge("swa", parent=model.state_dict(), members=[], context=context)
    assert result.report["chosen"] == "ema10"
    assert result.passes == 15
    assert all(torch.equal(result.state[key], found["ema10"][key]) for key in found["ema10"])


def test_norm_statistics_are_recomputed_where_batches_are_given_and_charged() -> None:
    parent, members = net(0).state_dict(), [net(seed).state_dict() for seed in (1, 2)]
    result = merge(
        "uniform", parent=parent, members=members, context=MergeContext(build_model=net, batches=batches)
    )
    expected = net(0)
    expected.load_state_dict(uniform(members, parent=parent))
    assert recompute(expected, batches()) == result.passes == 48
    assert result.report["norm_statistics"] == "recomputed"
    assert torch.equal(result.state["1.running_var"], expected[1].running_var)
    limited = MergeContext(build_model=net, batches=batches, norm_samples=20)
    assert merge("uniform", parent=parent, members=members, context=limited).passes == 20
    without = merge("uniform", parent=parent, members=members, context=MergeContext())
    assert (without.report["norm_statistics"], without.passes) == ("merged", 0)


def test_scores_are_of_states_with_their_own_norm_statistics() -> None:
    parent, members = net(0).state_dict(), [net(seed).state_dict() for seed in (1, 2)]
    seen: list[Tensor] = []

    def score(state: StateDict) -> float:
        seen.append(state["1.running_var"])
        return 0.0

    context = MergeContext(build_model=net, batches=batches, score=score, score_passes=100)
    result = merge("greedy", parent=parent, members=members, context=context)
    assert len(seen) == 3
    assert not any(torch.equal(variance, torch.ones(6)) for variance in seen)
    assert result.passes == 3 * (48 + 100) + 48


def test_fisher_soup_charges_every_member_and_frozen_builds_are_no_obstacle() -> None:
    context = MergeContext(build_model=lambda: plain().requires_grad_(False), batches=batches)
    result = merge(FisherSoup(samples=20), parent=PARENT, members=MEMBERS, context=context)
    assert result.passes == 3 * 20 * 4


@pytest.mark.parametrize("task", ["classification", "binary", "regression"])
def test_fisher_information_is_that_of_the_task(task: Any) -> None:
    # members that differ in one bias only, under outputs that are almost sure in one of them
    members = [{**PARENT, "2.bias": torch.tensor(bias)} for bias in ([0.0, 0.0, 0.0], [0.0, 30.0, 1.0])]
    context = MergeContext(build_model=plain, batches=batches, task=task)
    merged = merge("fisher_soup", parent=PARENT, members=members, context=context).state["2.bias"]
    if task == "regression":
        # a Gaussian's information does not depend on the output; 48 draws each, so a weight of 0.5 +- 0.15
        assert 0.2 < merged[1].item() / 30 < 0.8
    else:
        # a sure class carries no information: the floor alone speaks for the second member
        assert merged[1].item() / 30 < 0.01


def test_distill_starts_from_the_parent_and_moves_towards_the_members() -> None:
    context = MergeContext(
        build_model=plain, batches=batches, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2)
    )
    result = merge(Distill(steps=60), parent=PARENT, members=MEMBERS[:2], context=context)
    assert result.report["last_loss"] < 0.5 * result.report["first_loss"]  # type: ignore[operator]
    assert result.passes == 60 * 16 * (3 + 2)
    with_teacher = MergeContext(
        build_model=plain,
        batches=batches,
        teacher=lambda batch: torch.zeros(len(batch[0]), 3),
        teacher_passes=0.5,
    )
    assert merge(Distill(steps=2), parent=PARENT, members=[], context=with_teacher).passes == 2 * 16 * 3.5


def test_adapters_are_fused_with_equal_weights_unless_given() -> None:
    adapters = []
    for seed in (1, 2):
        model = plain(0)
        attach(model, rank=2, alpha=4.0, seed=seed)
        with torch.no_grad():
            model[0].lora_b.fill_(float(seed))
        adapters.append(adapter_of(model))
    result = merge("adapter_fuse", parent=PARENT, members=[], context=MergeContext(adapters=adapters))
    expected = fuse(PARENT, adapters, [0.5, 0.5])
    assert all(torch.equal(result.state[key], expected[key]) for key in expected)
    given = MergeContext(adapters=adapters, adapter_weights=[1.0, 0.0])
    assert merge("adapter_fuse", parent=PARENT, members=[], context=given).report["weights"] == (1.0, 0.0)


def test_each_inapplicable_call_is_refused_with_its_reason() -> None:
    head = [{**MEMBERS[0], "2.weight": torch.zeros(5, 6), "2.bias": torch.zeros(5)}]
    score = MergeContext(score=lambda state: 0.0)
    machine = MergeContext(build_model=plain, batches=batches)
    cases: list[tuple[Any, Sequence[StateDict], MergeContext, str]] = [
        ("uniform", [], MergeContext(), "nothing to merge"),
        ("uniform", head, MergeContext(), "mixture of experts"),
        ("greedy", MEMBERS, MergeContext(), "no `score`"),
        ("greedy", head, score, "mixture of experts"),
        ("swa", [], MergeContext(), "nothing to merge"),
        ("swa", MEMBERS, MergeContext(trajectory={"ema3": PARENT}), "give one of them"),
        ("swa", [], MergeContext(trajectory={"ema3": PARENT}), "no `score`"),
        ("interpolate", MEMBERS, score, "3 members came"),
        ("interpolate", MEMBERS[:1], MergeContext(), "no `score`"),
        (Interpolate(weights=(3.0,)), MEMBERS[:1], score, r"\[-1.0, 2.0\]"),
        ("fisher_soup", MEMBERS, MergeContext(), "no `build_model` and no `batches`"),
        (FisherSoup(floor=0.0), MEMBERS, machine, "floor 0.0"),
        ("distill", MEMBERS, MergeContext(build_model=plain), "no `batches` to distil with"),
        ("distill", [], machine, "or give a `teacher`"),
        ("distill", [], MergeContext(teacher=lambda batch: batch), "teacher_passes"),
        (Distill(steps=0), MEMBERS, machine, "steps 0"),
        ("adapter_fuse", [], MergeContext(), "no adapters came"),
        ("adapter_fuse", MEMBERS, MergeContext(adapters=[{}]), "reads adapters only"),
    ]
    for method, members, context, what in cases:
        with pytest.raises(MergeError, match=what):
            merge(method, parent=PARENT, members=members, context=context)


def test_a_builder_of_another_architecture_is_refused() -> None:
    context = MergeContext(build_model=lambda: nn.Linear(2, 2), batches=batches)
    with pytest.raises(MergeError, match="builds another architecture"):
        merge("distill", parent=PARENT, members=MEMBERS, context=context)


def test_a_score_that_is_not_a_number_is_refused() -> None:
    context = MergeContext(score=lambda state: float("nan"))
    for name, members in (("greedy", MEMBERS), ("interpolate", MEMBERS[:1])):
        with pytest.raises(MergeError, match="not a number"):
            merge(name, parent=PARENT, members=members, context=context)


def test_a_method_of_ones_own_joins_the_menu() -> None:
    @dataclass(frozen=True)
    class First:
        name: str = "first"

        def applicable(
            self, parent: StateDict, members: Sequence[StateDict], context: MergeContext
        ) -> str | None:
            return None if members else "no members"

        def merge(
            self, parent: StateDict, members: Sequence[StateDict], context: MergeContext
        ) -> MergeResult:
            return MergeResult(state=dict(members[0]), passes=3, report={})

    result = merge(
        "first", parent=PARENT, members=MEMBERS, context=MergeContext(), methods=(*METHODS, First())
    )
    assert result.passes == 3
    with pytest.raises(MergeError, match="first cannot merge this: no members"):
        merge(First(), parent=PARENT, members=[], context=MergeContext())


def test_no_merge_touches_the_global_random_state_or_its_inputs() -> None:
    context = MergeContext(build_model=copy_of_parent, batches=batches, score=near(PARENT))
    kept = [{key: value.clone() for key, value in state.items()} for state in (PARENT, *MEMBERS)]
    random_state = torch.get_rng_state()
    for name in ("uniform", "greedy", "swa", "fisher_soup", "distill"):
        merge(name, parent=PARENT, members=MEMBERS, context=context)
    assert torch.equal(torch.get_rng_state(), random_state)
    for state, before in zip((PARENT, *MEMBERS), kept, strict=True):
        assert all(torch.equal(state[key], before[key]) for key in state)


TEMPLATE = plain(0)


def copy_of_parent() -> nn.Module:
    import copy

    return copy.deepcopy(TEMPLATE)
