"""Specialists for the parts of a selection: which parts there are, and how the compute is shared out among them.

A part is a cluster, or a named slice. Its specialist does not compete with those of the others: what competes is what they make together,
a router's mixture or a merge. So there is no ladder: each trains once, from the fork to the end of its share, and the control goes
on for as many steps as all of them together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final, Literal

from automode.errors import UsageError
from automode.planner.cards import PlanCard
from automode.planner.recipes import SearchSpace, Selection, SelectKMeans, SelectSlices, TrainingRecipe

if TYPE_CHECKING:
    from automode.planner.rules.base import Proposal

MAX_EXPERTS: Final = 3
"""Specialists of one selection that a router or a merge takes at the most, beside the control; of parts, all are taken."""

MOST_PARTS: Final = 8
"""Most specialists of a card that has one for each part: a router over them holds all of them in memory."""

EQUAL_SHARE: Final = 0.3
"""Part of the compute that is shared out equally where the rest goes by size: a small part would learn nothing from its own share."""

Sharing = Literal["equal", "by_size"]


def part_names(selection: Selection) -> tuple[str, ...]:
    """Name the parts of a selection, in its own order; empty for a selection that has none."""
    match selection:
        case SelectKMeans(clusters=clusters):
            return tuple(f"cluster {cluster}" for cluster in clusters)
        case SelectSlices(slices=names):
            return names
        case _:
            return ()


def trials_of(recipe: TrainingRecipe, selection: Selection | None) -> int:
    """Return how many trials a card starts: one a part where each has a specialist of its own, else one a variant."""
    if recipe.per_part is None or selection is None:
        return recipe.candidates
    return len(part_names(selection))


def shares(sizes: Sequence[int], how: Sharing) -> tuple[float, ...]:
    """Return each part's share of the compute; they add up to one.

    Args:
        sizes: Training samples of each part, each at least 1. Slices may overlap: shares go by the sum of the sizes.
        how: ``equal``, or ``by_size``: .3 / k + .7 n_c / n for part c of k.

    Raises:
        UsageError: There is no part, or one is empty.
    """
    if not sizes or min(sizes) < 1:
        raise UsageError(f"parts of sizes {list(sizes)} share no compute: each needs at least one sample")
    k, n = len(sizes), sum(sizes)
    if how == "equal":
        return (1.0 / k,) * k
    return tuple(EQUAL_SHARE / k + (1.0 - EQUAL_SHARE) * size / n for size in sizes)


def split_steps(total: int, sizes: Sequence[int], how: Sharing) -> tuple[int, ...]:
    """Share out ``total`` steps, at least one to each part; what rounding leaves goes to the largest remainders.

    Raises:
        UsageError: There are fewer steps than parts.
    """
    k = len(sizes)
    if total < k:
        raise UsageError(f"{total} steps cannot be shared out among {k} specialists: give at least one each")
    exact = [share * (total - k) for share in shares(sizes, how)]
    steps = [1 + int(value) for value in exact]
    by_remainder = sorted(range(k), key=lambda i: (int(exact[i]) - exact[i], i))
    for i in by_remainder[: total - sum(steps)]:
        steps[i] += 1
    return tuple(steps)


def sharing_refusals(planned: PlanCard | Proposal) -> Iterator[str]:
    """Say why a card's parts cannot each have a specialist; nothing for a card that asks for none."""
    recipe = planned.training_recipe
    if recipe is None or recipe.per_part is None:
        return
    where, parts = "training_recipe.per_part", len(part_names(planned.selection))
    if not parts:
        yield (
            f"{where}: a selection of kind {planned.selection.kind} has no parts: select `kmeans` with its `clusters`, or `slices`"
        )
    elif not 2 <= parts <= MOST_PARTS:
        yield f"{where}: the selection has {parts} part{'s' if parts > 1 else ''}, and 2 to {MOST_PARTS} can each have a specialist"
    if len(recipe.variants) != 1 or isinstance(recipe.search, SearchSpace):
        yield f"{where}: all parts are trained alike, by one variant: write one in `variants`, and leave `search` out"
    if recipe.relabel is not None:
        yield f"{where}: samples that come back with new labels belong to no part: leave `relabel` out"
    if planned.gate_recipe is None and planned.merge_recipe is None:
        yield f"{where}: a specialist of a part is no candidate by itself: add a `gate_recipe` or a `merge_recipe`"
    if (
        isinstance(planned, PlanCard)
        and planned.asha is not None
        and planned.asha.max_steps != planned.budget_steps
    ):
        yield (
            f"{where}: the specialists do not compete, so that there is no rung below the top: set `budget_steps` to asha.max_steps "
            f"({planned.asha.max_steps})"
        )
