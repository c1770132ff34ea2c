"""The finish: average along the trunk's own trajectory, the one merge that wins almost everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from automode.planner.cards import Reason
from automode.planner.recipes import MergeSwa
from automode.planner.rules.base import Proposal, Silence, View
from automode.planner.rules.execution import if_executable


@dataclass(frozen=True, slots=True)
class MergeCadence:
    """Propose the averages that the trunk carries and its best validated state, once: at ``policy.averages.finish_at`` of the run, or where it is ended before."""

    id: Reason = "merge_cadence"

    def propose(self, view: View) -> Proposal | Silence:
        """Propose the finishing merge when the run is far enough, or say why not."""
        if not view.run.averages:
            return Silence(code="no_averages", why="the trunk carries no averages in this run")
        made = view.counts.get(self.id, 0)
        if made:
            return Silence(code="done", why=f"{made} finishing merge was made already")
        total = view.step + view.remaining
        share = view.policy.averages.finish_at
        first = ceil(share * total)
        if view.step < first and not view.ending:
            return Silence(
                code="too_early",
                why=f"step {view.step} of {total}: the finish comes from step {first} ({share:.0%})",
            )
        earlier = ", and its best validated state," if view.run.keeps_best else ""
        due = (
            "the run was ended here"
            if view.ending
            else f"{view.step / total:.0%}; the finish is due at {share:.0%}"
        )
        return if_executable(
            Proposal(
                reason=self.id,
                action="merge",
                because=(
                    f"Step {view.step} of {total} ({due}): the trunk's exponential "
                    f"and tail averages{earlier} stand ready to replace its raw weights."
                ),
                merge_recipe=MergeSwa(),
                diagnostics={"step": view.step, "total": total, "finish_at": share},
            ),
            view,
        )
