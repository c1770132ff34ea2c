"""The planner over a loss curve: the same fold as in a run, without a session.

The rows of a log (one loss each, and where they were logged a gradient norm and a learning rate) are told to the machine as the
rows of an observed run that could carry out every card. What a run would have told comes back: signals that changed their state,
and rules that made a card. Steps are counted in rows, so that a log of every tenth step is judged by the steps it has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from automode.engine.machine import handle, initial
from automode.errors import UsageError
from automode.planner.events import Envelope, ReadingChanged, Rows, RuleEvaluated, Run, SessionStarted
from automode.planner.policy import PLANNER_VERSION, Policy, TrendPolicy
from automode.planner.signals.nonfinite import NonFiniteState, SteppingState
from automode.planner.signals.trend import TrendState

Values: TypeAlias = Sequence[float] | NDArray[np.float64]

LEAST_BUDGET: Final = 40
"""Rows that a planning budget has at the least: the trend's blocks are a fortieth of it."""

FIRM: Final = "trend_firm"
"""Name under which the trend at the confidence for acting is told; ``trend`` is the advice."""

BLOCK: Final = 4096
MANY: Final = 1_000_000
"""Samples of a batch in the run that stands behind the curve: so many that judging a card costs nothing beside training it."""

_NAMES: Final = ("step", "time", "loss", "grad_norm", "lr_0", "applied", "samples")
_SIGNS: Final = (
    ("non_finite", NonFiniteState.NON_FINITE),
    ("skipped_steps", SteppingState.STALLED),
    ("spike_burst", "BURST"),
    ("level_shift", "SHIFTED"),
    (FIRM, TrendState.REGRESSING),
)
"""States that make an unstable run, in the order in which ``instability_spike`` names them."""

_FIRED_BY: Final = {
    "loss_plateau": TrendState.PLATEAU,
    "merge_cadence": "FINISH",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that a run would have told at a row of the curve.

    Attributes:
        row: Which row, from 0.
        kind: ``reading``: a signal changed its state; ``proposal``: a rule made a card.
        name: The signal's name, or the rule's reason.
        value: The state that was entered, or the states that made the rule propose, joined by ``+``.
        why: One sentence with the numbers.
    """

    row: int
    kind: Literal["reading", "proposal"]
    name: str
    value: str
    why: str


def with_budget(policy: Policy, *, budget: int | None = None, gain: float | None = None) -> Policy:
    """Return the policy with another planning budget (rows) or gain where one is given.

    Raises:
        UsageError: The budget is below 40 rows, or the gain does not lie between 0 and 1.
    """
    if budget is not None and budget < LEAST_BUDGET:
        raise UsageError(
            f"a planning budget of {budget} rows is too short: blocks of a fortieth need {LEAST_BUDGET}"
        )
    if gain is not None and not 0.0 < gain < 1.0:
        raise UsageError(f"the gain is {gain}, but a relative gain lies between 0 and 1")
    changes: dict[str, int | float] = {}
    if budget is not None:
        changes["budget"] = budget
    if gain is not None:
        changes["gain"] = gain
    if not changes:
        return policy
    trend = TrendPolicy.model_validate({**policy.trend.model_dump(), **changes})
    return policy.model_copy(update={"trend": trend})


def read_curve(
    loss: Values,
    *,
    grad_norm: Values | None = None,
    lr: Values | None = None,
    policy: Policy | None = None,
) -> Iterator[Finding]:
    """Fold a loss curve, and tell what a run under the policy would have told, in order.

    Args:
        loss: Raw losses, one a row, oldest first; NaN and infinity are findings and no errors.
        grad_norm: Global gradient norms before clipping, as many.
        lr: Learning rates, as many.
        policy: Thresholds and rules; None: the default policy. Its ``trend.budget`` counts rows. The probe of the learning rate is
            left out: it comes at its time whatever the curve does, and would only stand in the way of what the curve says.

    Raises:
        UsageError: The columns are not equally long.
    """
    policy = policy or Policy()
    policy = policy.model_copy(
        update={"reasons": tuple(r for r in policy.reasons if r != "learning_rate_probe")}
    )
    n = len(loss)
    for name, column in (("grad_norm", grad_norm), ("lr", lr)):
        if column is not None and len(column) != n:
            raise UsageError(f"`{name}` has {len(column)} rows, but `loss` has {n}")
    if n == 0:
        return
    values = np.empty((n, len(_NAMES)))
    values[:, 0] = np.arange(1, n + 1)
    values[:, 1] = 0.0  # no clock: a curve has none, and timers stand still
    values[:, 2] = loss
    # A norm that was never measured is one that never changes: it scores 0, and neither spikes nor alarms.
    values[:, 3] = 1.0 if grad_norm is None else grad_norm
    values[:, 4] = 1.0 if lr is None else lr
    values[:, 5:] = 1.0
    state = initial()
    _, facts, _ = handle(state, [_started(n, policy)])
    teller = _Teller()
    for first in range(0, n, BLOCK):
        block = Rows(first=first, names=_NAMES, values=values[first : first + BLOCK])
        _, facts, _ = handle(state, [block])
        yield from teller.tell(facts)


def _started(n: int, policy: Policy) -> Envelope:
    run = Run(
        total_steps=n,
        batch=float(MANY),
        val_a=policy.evidence.min_samples,
        val_b=policy.evidence.min_samples,
        task="classification",
        has_ids=True,
        exact_losses=False,
        why_inexact="a curve holds no losses of samples",
        averages=True,
    )
    body = SessionStarted(
        session="curve",
        seed=0,
        mode="observe",
        asked_mode="observe",
        policy=policy.dump(),
        policy_digest=policy.digest,
        planner_version=PLANNER_VERSION,
        run=run,
    )
    return Envelope(seq=1, role="input", body=body)


class _Teller:
    """Turns facts into findings; remembers what every signal said last, for the states behind a proposal."""

    __slots__ = ("_told",)

    def __init__(self) -> None:
        self._told: dict[str, str] = {FIRM: TrendState.UNKNOWN, "trend": TrendState.UNKNOWN}

    def tell(self, facts: Sequence[Envelope]) -> Iterator[Finding]:
        for fact in facts:
            match fact.body:
                case ReadingChanged() as reading:
                    yield from self._reading(reading)
                case RuleEvaluated(outcome="fired") as fired:
                    yield Finding(
                        row=fired.step - 1,
                        kind="proposal",
                        name=fired.rule,
                        value=self._cause(fired.rule),
                        why=fired.why,
                    )
                case _:
                    pass

    def _reading(self, reading: ReadingChanged) -> Iterator[Finding]:
        states = [(reading.name, reading.state)]
        if reading.name == "trend":
            states.append((FIRM, str(reading.details["execute_state"])))
        for name, state in states:
            if self._told.get(name) == state:
                continue
            self._told[name] = state
            yield Finding(
                row=reading.step - 1, kind="reading", name=name, value=state, why=_numbers(reading, name)
            )

    def _cause(self, reason: str) -> str:
        if reason == "instability_spike":
            found = [state for name, state in _SIGNS if self._told.get(name) == state]
            return "+".join(found) or "BURST"
        return _FIRED_BY.get(reason, "FIRED")


def _numbers(reading: ReadingChanged, name: str) -> str:
    if reading.name == "trend":
        return _trend_numbers(reading, firm=name == FIRM)
    if reading.name == "non_finite":
        parts = (("loss", "loss_finite"), ("gradient norm", "grad_norm_finite"))
        bad = " and ".join(part for part, finite in parts if not reading.details[finite])
        return f"not finite: {bad}" if bad else "finite again"
    if reading.name == "slow_divergence":
        return f"a rise of at least {reading.value:.1%} over {reading.window} rows, against {reading.threshold or 0.0:.0%}"
    return f"{reading.value:.3g} against {reading.threshold or 0.0:.3g} over {reading.window} rows"


def _trend_numbers(reading: ReadingChanged, *, firm: bool) -> str:
    if not reading.window:
        return str(reading.details.get("reset_by", "no look yet"))
    told = {name: float(value) for name, value in reading.details.items() if isinstance(value, float | int)}
    best = reading.value if firm else told["best_case_advise"]
    worst, z = (
        (told["worst_case"], told["z_execute"]) if firm else (told["worst_case_advise"], told["z_advise"])
    )
    return (
        f"the next {told['budget']:.0f} rows bring between {worst:.2%} and {best:.2%} (z {z:g}), and "
        f"{reading.threshold or 0.0:.2%} was asked for; {reading.window} rows, level {told['level']:.4g}"
    )
