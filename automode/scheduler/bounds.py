"""What a finite list can cost at worst, and the largest ladder that a cap allows."""

from __future__ import annotations

from dataclasses import dataclass

from automode.scheduler.bracket import Assignment
from automode.scheduler.ladder import Ladder, whole


def worst_case_resource(
    candidates: int,
    ladder: Ladder,
    *,
    quota: bool = False,
    brackets: int = 1,
    seed: int = 0,
    retries: int = 1,
) -> int:
    """Give an upper bound, in resource steps, of what a finite list spends: every rung, the drain, and retries.

    It holds for every order of arrival and any number of workers. By the paper's rule at most ``n - eta + 1`` of
    ``n`` arrivals leave a rung (each new one better than all before), with ``quota`` at most ``n // eta``; the drain
    makes it at least one. What it leaves out: more than ``retries`` repeated segments, trials lost for good whose
    promotions fall to others, trials that diverge above the first rung where nothing else reached the top, and
    restarts from the parent after a forgotten checkpoint. ``ASHA(budget=worst_case_resource(...))`` makes the bound
    binding even then.

    Args:
        candidates: Length of the list.
        ladder: The rungs.
        quota: As in ``ASHA``.
        brackets: As in ``ASHA``.
        seed: As in ``ASHA``; only read with more than one bracket.
        retries: How many repeated segments are allowed for, each at the price of the longest one.

    Returns:
        Resource steps.

    Raises:
        UsageError: An argument is no whole number or too small.
    """
    count = whole("candidates", candidates, least=1)
    repeats = whole("retries", retries, least=0)
    members = [0] * whole("brackets", brackets, least=1)
    if len(members) == 1:
        members[0] = count
    else:
        assign = Assignment(ladder=ladder, brackets=len(members), seed=seed)
        for trial in range(count):
            members[assign(trial)] += 1
    total = 0
    longest = 0
    for first, size in enumerate(members):
        arrivals = size
        below = 0
        for level in ladder.levels[first:]:
            if arrivals:
                longest = max(longest, level - below)
            total += arrivals * (level - below)
            below = level
            arrivals = _most_promoted(arrivals, ladder.reduction_factor, quota=quota)
    return total + repeats * longest


def _most_promoted(size: int, eta: int, *, quota: bool) -> int:
    if size == 0:
        return 0
    return max(1, size // eta if quota else size - eta + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LadderFit:
    """A ladder that fits a cap.

    Attributes:
        ladder: The rungs, with the top lowered as far as needed.
        quota: Whether the quota rule must be on for the bound to hold.
        worst_case: The bound, in resource steps.
        shrunk: Whether this is less than what was asked for.
    """

    ladder: Ladder
    quota: bool
    worst_case: int
    shrunk: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class NoFit:
    """No ladder over this many candidates fits the cap.

    Attributes:
        needed: Resource steps of the smallest one.
        cap: What there was.
    """

    needed: int
    cap: int

    @property
    def reason(self) -> str:
        """What is missing, and what would help."""
        return (
            f"even one rung needs {self.needed} resource steps at worst and the cap is {self.cap}:"
            " fewer candidates, a smaller first rung or a larger cap"
        )


def fit_ladder(
    candidates: int, ladder: Ladder, cap: int, *, quota: bool = False, retries: int = 1
) -> LadderFit | NoFit:
    """Find the largest top rung, with the first rung and the reduction factor kept, whose worst case fits a cap.

    What was asked for comes first; then the same ladder under the quota rule, which bounds the cost tightly; then
    lower top rungs under the quota rule.

    Args:
        candidates: Length of the list.
        ladder: What was asked for.
        cap: Resource steps that there are.
        quota: Whether the quota rule was asked for.
        retries: As in :func:`worst_case_resource`.

    Returns:
        The fit, or why there is none.

    Raises:
        UsageError: An argument is no whole number or too small.
    """
    allowed = whole("cap", cap, least=0)

    def bound(top: int, rule: bool) -> int:
        rungs = Ladder(ladder.min_resource, top, ladder.reduction_factor)
        return worst_case_resource(candidates, rungs, quota=rule, retries=retries)

    for rule in {quota, True}:
        worst = bound(ladder.max_resource, rule)
        if worst <= allowed:
            return LadderFit(ladder=ladder, quota=rule, worst_case=worst, shrunk=rule != quota)
    low, high = ladder.min_resource, ladder.max_resource
    least = bound(low, True)
    if least > allowed:
        return NoFit(needed=least, cap=allowed)
    while high - low > 1:  # the bound grows with the top rung: low fits, high does not
        middle = (low + high) // 2
        if bound(middle, True) <= allowed:
            low = middle
        else:
            high = middle
    fitted = Ladder(ladder.min_resource, low, ladder.reduction_factor)
    return LadderFit(ladder=fitted, quota=True, worst_case=bound(low, True), shrunk=True)
