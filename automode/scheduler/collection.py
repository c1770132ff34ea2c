"""Which stored checkpoints nothing can need any more: garbage collection without loss.

In a finite list a rank only worsens, and the final size of every rung has an upper bound. A paused trial whose rank
is past what that bound lets go on will never be promoted. Three things only can bring such a trial back: better ones
lost for good, better ones stopped, or all that went up diverging. A job is then issued from resource 0 (recomputed
from the parent), and one spare per rung is kept until a trial is fully trained, so that this stays rare.
"""

from __future__ import annotations

from automode.scheduler.board import Board
from automode.scheduler.bracket import Bracket
from automode.scheduler.trials import IN_FLIGHT, Status


def collectable(board: Board) -> set[tuple[int, int]]:
    """List the (trial, rung index) of checkpoints that were written, not forgotten, and are not needed.

    Not needed are: a rung's checkpoint once the trial reported at a later one, everything of a diverged, lost or
    stopped trial, and paused trials that can never be promoted. Always kept are what a segment in flight builds on,
    fully trained trials, and the best so far.
    """
    doomed: set[int] = set()
    for bracket in board.brackets:
        doomed.update(_never_promoted(board, bracket))
    free: set[tuple[int, int]] = set()
    for number, trial in enumerate(board.trials):
        held = trial.held
        if trial.status in (*IN_FLIGHT, Status.FINISHED) or (
            trial.status is Status.PAUSED and number not in doomed
        ):
            held &= ~(1 << trial.rung) if trial.rung >= 0 else ~0
        while held:
            lowest = held & -held
            free.add((number, lowest.bit_length() - 1))
            held ^= lowest
    best = board.best()
    if best is not None:
        index = board.ladder.rung_of(best.resource)
        assert index is not None
        free.discard((best.trial, index))
    return free


def _never_promoted(board: Board, bracket: Bracket) -> list[int]:
    """List the trials that wait in this bracket and can never be promoted."""
    if board.cancelled or (board.in_flight == 0 and board.choose() is None):
        return [trial for rung in bracket.rungs[:-1] for trial in rung.beyond(0)]
    arrivals = _still_to_start(board, bracket)
    if arrivals is None:
        return []
    spare_needed = not any(each.rung(board.ladder.top).usable for each in board.brackets)
    doomed: list[int] = []
    for place, rung in enumerate(bracket.rungs[:-1]):
        final = rung.size + bracket.in_flight[place] + arrivals
        allowed = max(1, final // board.ladder.reduction_factor) if final else 0
        waiting = rung.beyond(0)
        beyond = rung.beyond(allowed)
        if (
            bracket.quota
        ):  # whoever goes on is the best of those waiting, and there are places for so many only
            beyond = max(beyond, waiting[max(0, allowed - rung.promoted) :], key=len)
        arrivals = len(waiting) - len(beyond) + final - rung.size
        if bracket.quota:
            arrivals = min(arrivals, max(0, allowed - rung.promoted))
        if spare_needed and len(beyond) == len(waiting):
            beyond = beyond[1:]
        doomed.extend(beyond)
    return doomed


def _still_to_start(board: Board, bracket: Bracket) -> int | None:
    """Count the candidates that may still start in this bracket; ``None`` when there is no end to them."""
    if not board.source_open():
        return 0
    candidates = board.settings.candidates
    if candidates is None:
        return None
    unstarted = range(len(board.trials), candidates)
    if len(board.brackets) == 1:
        return len(unstarted)
    return sum(1 for trial in unstarted if board.assign(trial) == bracket.first)
