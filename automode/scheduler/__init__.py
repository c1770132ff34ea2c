"""The scheduler room: which candidate trains next, to which resource, and what it may cost.

:class:`ASHA` decides, and :class:`Lockstep` makes its decisions independent of real speed. :class:`Candidates` draws candidates
from a search space. :class:`Ledger` counts and caps what is spent; :func:`worst_case_resource` and :func:`fit_ladder` size a
list of candidates before it is admitted. Nothing here reads a clock or a file, or imports torch.
"""

from __future__ import annotations

from automode.scheduler.accounts import (
    Account,
    Charge,
    Purpose,
    Refusal,
    Reservation,
    Work,
    optimizer_steps,
    units,
)
from automode.scheduler.asha import ASHA
from automode.scheduler.bounds import LadderFit, NoFit, fit_ladder, worst_case_resource
from automode.scheduler.bracket import RungView
from automode.scheduler.candidates import Candidate, Candidates
from automode.scheduler.decisions import (
    Best,
    Decision,
    Diverged,
    Failure,
    Finished,
    Held,
    Ignored,
    Issue,
    Job,
    Lost,
    Outcome,
    Paused,
    Promoted,
    PromotionRule,
    Requeued,
    Retried,
    Started,
    Stopped,
    decision_record,
)
from automode.scheduler.ladder import Ladder
from automode.scheduler.ledger import Ledger
from automode.scheduler.lockstep import Lockstep
from automode.scheduler.settings import Mode, Settings
from automode.scheduler.trials import Status

__all__ = [
    "ASHA",
    "Account",
    "Best",
    "Candidate",
    "Candidates",
    "Charge",
    "Decision",
    "Diverged",
    "Failure",
    "Finished",
    "Held",
    "Ignored",
    "Issue",
    "Job",
    "Ladder",
    "LadderFit",
    "Ledger",
    "Lockstep",
    "Lost",
    "Mode",
    "NoFit",
    "Outcome",
    "Paused",
    "Promoted",
    "PromotionRule",
    "Purpose",
    "Refusal",
    "Requeued",
    "Reservation",
    "Retried",
    "RungView",
    "Settings",
    "Started",
    "Status",
    "Stopped",
    "Work",
    "decision_record",
    "fit_ladder",
    "optimizer_steps",
    "units",
    "worst_case_resource",
]
