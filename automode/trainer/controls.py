"""A training run's controls: the verbs that another thread may call while ``fit`` runs.

Each verb is carried out between two steps and recorded with its actor; it returns when that is done, within one step or 0.2 s.
Called in the training thread itself (by a callback), it returns at once and waits its turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from automode.errors import UsageError
from automode.planner.cards import PlanCard
from automode.planner.controls import ALL, Check, ControlVerb, HealthChecked
from automode.planner.health_report import HealthReport
from automode.trainer.control import Control, Reply

ACTOR: Final = "trainer"
"""Who asks, in the record, where the script does not say."""


class Controls:
    """What whoever holds a Trainer can ask of its run."""

    def __init__(self) -> None:
        self._control = Control()

    @property
    def running(self) -> bool:
        """Whether ``fit`` runs now, so that it takes orders."""
        return self._control.running

    @property
    def waits(self) -> str | None:
        """``paused`` or ``held`` while the run waits for somebody; None while it trains, and outside of ``fit``."""
        return self._control.waits

    def wait_until_paused(self, timeout: float | None = None) -> bool:
        """Wait until the run is paused or held, after :meth:`step` say, or for the start of a run that begins paused.

        Args:
            timeout: Seconds; None: as long as it takes.

        Returns:
            False where the run has ended first, or the time is over.
        """
        return self._control.wait_until_it_waits(timeout)

    def pause(self, note: str = "", *, actor: str = ACTOR, timeout: float | None = None) -> Reply:
        """Wait after the step that runs, with the model in place; what follows later is the same bit for bit.

        Args:
            note: The reason, for the record.
            actor: Who asks, for the record.
            timeout: Seconds to wait for the run's answer; None: as long as it takes.

        Raises:
            ConflictError: No run trains, it has ended, or it did not answer in time.
        """
        return self._order("pause", {}, actor, note, timeout)

    def resume(self, note: str = "", *, actor: str = ACTOR, timeout: float | None = None) -> Reply:
        """Train on after a pause; arguments and errors as for :meth:`pause`."""
        return self._order("resume", {}, actor, note, timeout)

    def step(self, n: int = 1, *, note: str = "", actor: str = ACTOR, timeout: float | None = None) -> Reply:
        """Train ``n`` more steps, paused or not, and then pause; returns when they have begun.

        Args:
            n: Batches to train on, at least 1.
            note: As for :meth:`pause`; the other arguments and errors likewise.
            actor: Likewise.
            timeout: Likewise.

        Raises:
            UsageError: ``n`` is no whole number above 0.
        """
        return self._order("step", {"n": n}, actor, note, timeout)

    def stop(self, note: str = "", *, actor: str = ACTOR, timeout: float | None = None) -> Reply:
        """End the run after its step, in order and with its state stored: ``fit`` returns, ``automode resume`` goes on.

        Arguments and errors as for :meth:`pause`.
        """
        return self._order("stop", {}, actor, note, timeout)

    def set(
        self,
        *,
        max_epochs: int | None = None,
        max_steps: int | None = None,
        lr: float | None = None,
        lr_mul: float | None = None,
        note: str = "",
        actor: str = ACTOR,
        timeout: float | None = None,
    ) -> Reply:
        """Change the run's length or its learning rate; a run that is resumed has the change too.

        Args:
            max_epochs: Passes over the loader in all; this or ``max_steps``.
            max_steps: Training steps in all.
            lr: Learning rate of the first parameter group from here on; the others keep their ratio to it, and a schedule goes
                on from there. This or ``lr_mul``.
            lr_mul: Multiplies every learning rate.
            note: As for :meth:`pause`; the other arguments and errors likewise.
            actor: Likewise.
            timeout: Likewise.

        Raises:
            UsageError: A value makes no sense, or lies behind the run.
        """
        asked = {"max_epochs": max_epochs, "max_steps": max_steps, "lr": lr, "lr_mul": lr_mul}
        given = {name: value for name, value in asked.items() if value is not None}
        return self._order("set", given, actor, note, timeout)

    def checkpoint(self, note: str = "", *, actor: str = ACTOR, timeout: float | None = None) -> Reply:
        """Store the run's complete state, and keep it; ``result["checkpoint"]`` is its digest.

        Arguments and errors as for :meth:`pause`; SessionError where the disk refused.
        """
        return self._order("checkpoint", {}, actor, note, timeout)

    def load(
        self, checkpoint: str = "last", *, note: str = "", actor: str = ACTOR, timeout: float | None = None
    ) -> Reply:
        """Switch the run to an earlier state of this session, whose story goes on from there; a held run is paused there.

        Args:
            checkpoint: ``last``, ``best``, or the beginning of a digest.
            note: As for :meth:`pause`; the other arguments and errors likewise.
            actor: Likewise.
            timeout: Likewise.

        Raises:
            UsageError: There is no such state in the session's story.
            SessionCorruptError: It does not match its digest.
        """
        return self._order("load", {"checkpoint": checkpoint}, actor, note, timeout)

    def test(self, note: str = "", *, actor: str = ACTOR, timeout: float | None = None) -> Reply:
        """Evaluate on ``test_loader`` as the model is; ``result`` holds ``metrics`` and ``label``.

        Meanwhile the environment variable ``AUTOMODE_TEST_LABEL`` holds ``test_1``, ``test_2`` and so on, for code of yours that
        writes files in a test. The run is not touched. Arguments and errors as for :meth:`pause`.
        """
        return self._order("test", {}, actor, note, timeout)

    def check(
        self,
        what: Check | Literal["all"] = ALL,
        *,
        steps: int = 3,
        note: str = "",
        actor: str = ACTOR,
        timeout: float | None = None,
    ) -> HealthReport:
        """Check the run's health as it stands; whatever is trained or drawn for it is undone bit for bit.

        Args:
            what: ``determinism`` (steps are trained twice and compared), ``gradients``, ``activations``, ``numerics``,
                ``throughput``, ``data_order``, or ``all`` of them.
            steps: Batches that each check uses, at the most.
            note: As for :meth:`pause`; the other arguments and errors likewise.
            actor: Likewise.
            timeout: Likewise.

        Raises:
            UsageError: Also: the training thread itself asks, which cannot wait for the answer.
        """
        reply = self._order("check", {"what": what, "steps": steps}, actor, note, timeout)
        if reply.step is None:
            raise UsageError(
                "check: the training thread cannot wait for itself; it is made at the next boundary: `automode checks` shows it"
            )
        return HealthReport(findings=tuple(HealthChecked.model_validate(f) for f in reply.result["findings"]))

    def scan(self, note: str = "", *, actor: str = ACTOR, timeout: float | None = None) -> Reply:
        """Read the sample ledger and cluster samples as automode's own scans do; nothing is decided on it.

        ``result`` holds ``scanned`` (suspects, tail, estimated label noise) and ``clustered``. Arguments and errors as for
        :meth:`pause`; UsageError where the run has no exact per-sample losses.
        """
        return self._order("scan", {}, actor, note, timeout)

    def fork(
        self,
        card: PlanCard | Mapping[str, Any] | None = None,
        *,
        lr_mul: float | None = None,
        budget_steps: int | None = None,
        max_steps: int | None = None,
        note: str = "",
        actor: str = ACTOR,
        timeout: float | None = None,
    ) -> Reply:
        """Have specialists trained beside the run and judged against it, as a card of your own that is approved at once.

        Args:
            card: The whole card, as for ``automode submit``; None: the rates as they are and halved are compared.
            lr_mul: Compare this factor on the rates instead.
            budget_steps: Steps to the first rung.
            max_steps: Steps to the last one.
            note: As for :meth:`pause`; the other arguments and errors likewise.
            actor: Likewise.
            timeout: Likewise.

        Raises:
            ConflictError: Also: the mode runs no cards, or the budget does not allow it.
        """
        asked: dict[str, Any] = {"lr_mul": lr_mul, "budget_steps": budget_steps, "max_steps": max_steps}
        asked = {name: value for name, value in asked.items() if value is not None} | _body(card)
        return self._order("fork", asked, actor, note, timeout)

    def merge(
        self,
        card: PlanCard | Mapping[str, Any] | None = None,
        *,
        note: str = "",
        actor: str = ACTOR,
        timeout: float | None = None,
    ) -> Reply:
        """Judge the averages of the run's weights against the weights now, and take them where they are better.

        Args:
            card: The whole card, as for ``automode submit``; None: the trunk's averages.
            note: As for :meth:`pause`; the other arguments and errors likewise, and as for :meth:`fork`.
            actor: Likewise.
            timeout: Likewise.
        """
        return self._order("merge", _body(card), actor, note, timeout)

    def release(self, note: str = "", *, actor: str = ACTOR, timeout: float | None = None) -> Reply:
        """Let a held run end; arguments and errors as for :meth:`pause`."""
        return self._order("release", {}, actor, note, timeout)

    def _order(
        self, verb: ControlVerb, arguments: Mapping[str, Any], actor: str, note: str, timeout: float | None
    ) -> Reply:
        return self._control.order(verb, arguments, actor=actor, note=note, timeout=timeout)


def _body(card: PlanCard | Mapping[str, Any] | None) -> dict[str, Any]:
    if card is None:
        return {}
    if not isinstance(card, PlanCard | Mapping):
        raise UsageError(f"card must be a PlanCard or a mapping, got {type(card).__name__}")
    return {"card": card.dump() if isinstance(card, PlanCard) else dict(card)}
