"""Soups: greedy selection on held-out data, and averages weighted by Fisher information.

At equal compute neither beat training on in our measurements (greedy -2.5 %, Fisher -5.0 % relative error against the
control); they are here as candidates that a guard judges, not as promises.

References:
    Wortsman et al. 2022, Model soups, arXiv:2203.05482; Matena & Raffel 2022, Merging models with Fisher-weighted
    averaging, arXiv:2111.09832.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from automode.errors import MergeError
from automode.merges.averages import accumulable, convex_combination, uniform
from automode.merges.state_dicts import (
    StateDict,
    alias_groups,
    check_compatible,
    merge_entries,
    norm_statistics_keys,
    overlapping_keys,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedySoup:
    """What the greedy soup found.

    Attributes:
        state: the average of the ingredients.
        ingredients: indices into the candidates, in the order in which they were added.
        score: the soup's score.
        single_scores: each candidate's own score, in the candidates' order.
        evaluations: how often ``score`` was called.
    """

    state: dict[str, Tensor]
    ingredients: tuple[int, ...]
    score: float
    single_scores: tuple[float, ...]
    evaluations: int


def greedy(
    candidates: Sequence[StateDict], score: Callable[[StateDict], float], *, parent: StateDict | None = None
) -> GreedySoup:
    """Start from the best candidate and add each next best one if the average does not score worse.

    The soup never scores below the best single candidate, on the data that ``score`` reads. That data chose the
    soup: judge it on other data.

    Args:
        candidates: compatible states, at least one.
        score: held-out score, greater is better; called once for each candidate and once for each addition tried.
        parent: gives integer and boolean entries and tied weights; the first candidate unless given.

    Raises:
        MergeError: the states are not compatible, or a score is not a number.
    """
    check_compatible(candidates[0] if parent is None and candidates else parent or {}, candidates)
    home = candidates[0] if parent is None else parent
    evaluations = 0

    def scored(state: StateDict, what: str) -> float:
        nonlocal evaluations
        evaluations += 1
        value = float(score(state))
        if math.isnan(value):
            raise MergeError(f"the score of {what} is not a number: leave out candidates that diverged")
        return value

    singles = tuple(scored(candidate, f"candidate {index}") for index, candidate in enumerate(candidates))
    order = sorted(range(len(candidates)), key=lambda index: (-singles[index], index))
    chosen = [order[0]]
    best = singles[order[0]]
    soup = uniform([candidates[order[0]]], parent=home)
    for index in order[1:]:
        trial = uniform([candidates[one] for one in (*chosen, index)], parent=home)
        value = scored(trial, f"the soup of candidates {[*chosen, index]}")
        if value >= best:
            chosen.append(index)
            best, soup = value, trial
    return GreedySoup(
        state=soup, ingredients=tuple(chosen), score=best, single_scores=singles, evaluations=evaluations
    )


def fisher_average(
    states: Sequence[StateDict],
    fishers: Sequence[Mapping[str, Tensor]],
    *,
    floor: float = 1e-3,
    parent: StateDict | None = None,
) -> dict[str, Tensor]:
    """Average states element by element with weights in proportion to their diagonal Fisher information.

    Each Fisher tensor is divided by its own mean and floored, so that the weights depend on which elements matter
    within a tensor and not on a model's overall scale, they always sum to 1, and no element shrinks where all
    information is tiny. A tensor without any information counts as uniform. Running norm statistics and entries
    in which all states agree need no Fisher and are averaged uniformly.

    Args:
        states: compatible states, at least one.
        fishers: for each state, name to non-negative tensor of the entry's shape (see
            :func:`automode.merges.fisher.diagonal_fisher`); for tied weights any one of their names will do.
        floor: smallest normalised Fisher value, as a share of the tensor's mean; in (0, 1].
        parent: gives integer and boolean entries and tied weights; the first state unless given.

    Raises:
        MergeError: a Fisher tensor is missing, misshapen, negative or not finite; the floor is out of range; the
            states are not compatible or overlap in memory without being tied.
    """
    if not 0.0 < floor <= 1.0:
        raise MergeError(f"the Fisher floor is {floor}, but must lie in (0, 1]")
    if len(fishers) != len(states):
        raise MergeError(f"{len(fishers)} Fisher estimates came for {len(states)} states: give one for each")
    check_compatible(states[0] if parent is None and states else parent or {}, states)
    home = states[0] if parent is None else parent
    overlap = overlapping_keys(home)
    if overlap is not None:
        raise MergeError(
            f"{overlap[0]!r} and {overlap[1]!r} share memory without being the same view, so element-wise Fisher "
            f"weights contradict each other: use uniform or interpolate"
        )
    names_of = {key: group for group in alias_groups(home) for key in group}
    statistics = norm_statistics_keys(home)

    def combine(key: str, tensors: list[Tensor]) -> Tensor:
        if key in statistics or all(torch.equal(tensor, tensors[0]) for tensor in tensors[1:]):
            return convex_combination(key, tensors, [1.0 / len(tensors)] * len(tensors))
        importance = [
            _normalised(_fisher_of(names_of.get(key, (key,)), fisher, index, tensor), floor)
            for index, (fisher, tensor) in enumerate(zip(fishers, tensors, strict=True))
        ]
        return _importance_weighted(key, tensors, importance)

    return merge_entries(home, states, combine)


def _fisher_of(names: Sequence[str], fisher: Mapping[str, Tensor], index: int, tensor: Tensor) -> Tensor:
    value = next((fisher[name] for name in names if name in fisher), None)
    if value is None:
        raise MergeError(
            f"Fisher estimate {index} lacks {names[0]!r}, where the states differ: estimate it for that parameter too"
        )
    if value.shape != tensor.shape:
        raise MergeError(
            f"the Fisher of {names[0]!r} in estimate {index} has shape {tuple(value.shape)}, "
            f"the parameter {tuple(tensor.shape)}"
        )
    if not bool((torch.isfinite(value) & (value >= 0)).all()):
        raise MergeError(f"the Fisher of {names[0]!r} in estimate {index} is negative or not finite")
    return accumulable(value.to(tensor.device))


def _normalised(fisher: Tensor, floor: float) -> Tensor:
    largest = fisher.max()
    if not bool(largest > 0):
        return torch.ones_like(fisher)
    scaled = (
        fisher / largest
    )  # first, so that neither tiny nor huge values leave the number range in the mean
    return (scaled / scaled.mean()).clamp_min(floor)


def _importance_weighted(key: str, tensors: Sequence[Tensor], importance: Sequence[Tensor]) -> Tensor:
    if tensors[0].is_complex():
        raise MergeError(f"{key!r} is complex: Fisher weights are defined for real parameters, use uniform")
    values = [accumulable(tensor) for tensor in tensors]
    total = torch.stack(list(importance)).sum(dim=0)
    mean = torch.zeros_like(values[0])
    low, high = values[0], values[0]
    for value, weight in zip(values, importance, strict=True):
        mean += value * (weight / total)
        low, high = torch.minimum(low, value), torch.maximum(high, value)
    if not bool(torch.isfinite(mean).all()):
        raise MergeError(f"{key!r} is not finite after merging: leave out the members that diverged")
    return mean.clamp(low, high)
