"""What a person's order does to a run between two steps: length and rate, checkpoints, tests, cards.

Whatever is refused is refused before anything has been touched. Pausing and going on are the commander's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from automode.errors import ConflictError, NotExecutableError, SessionError, UsageError
from automode.planner.approval import PLANNER
from automode.planner.cards import CardState
from automode.planner.controls import LengthSet, Order, SetArguments, Tested, arguments_of
from automode.planner.events import (
    CardProposed,
    Clustered,
    Decided,
    RequestRefused,
    Scan,
    Scanned,
)
from automode.planner.health_report import HealthReport
from automode.trainer.checkpointing import CheckpointKeeper
from automode.trainer.driver import Driver
from automode.trainer.health.checking import checked
from automode.trainer.loop import Loop
from automode.trainer.plan import Plan
from automode.trainer.run_parts import RunParts
from automode.trainer.setting_rates import factor_of, set_rates
from automode.trainer.test_label import labelled, next_number


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an order came to, in words and for programs."""

    told: str
    result: Mapping[str, Any] = field(default_factory=dict)


def _scanned(body: Scanned | Clustered) -> str:
    if isinstance(body, Clustered):
        losses = ", ".join(f"{loss:.3g}" for loss in body.losses)
        return f"{body.k} clusters with mean losses {losses}"
    noise = "" if body.noise is None else f" (label noise {body.noise:.1%})"
    tail = "" if body.tail_mean is None else f", the tail's mean loss is {body.tail_mean:.3g}"
    return f"{body.n} samples seen {body.visits:.1f} times each, {body.suspects} suspects{noise}{tail}"


class Verbs:
    """Carries out orders that leave the run where it stands.

    Args:
        parts: The run.
        loop: Where it stands.
        driver: Its log.
        keeper: Stores its state; None where the run stores none by itself.
    """

    def __init__(self, parts: RunParts, loop: Loop, driver: Driver, keeper: CheckpointKeeper | None) -> None:
        self._parts = parts
        self._loop = loop
        self._driver = driver
        self._keeper = keeper

    @property
    def _step(self) -> int:
        return self._parts.trunk.step

    def set(self, order: Order) -> Outcome:
        """Change the length or the rate.

        Raises:
            UsageError: It cannot have that value now.
            NotExecutableError: The run cannot do with it.
        """
        asked: SetArguments = arguments_of("set", order.arguments)
        plan = self._plan(asked)
        factor = factor_of(asked, self._parts.trunk)
        told: list[str] = []
        result: dict[str, Any] = {}
        if plan is not None:
            told.append(self._set_length(plan))
            result |= {"max_epochs": plan.max_epochs, "max_steps": plan.max_steps, "total_steps": plan.total}
        if factor is not None:
            rates = set_rates(self._driver, self._parts.trunk, factor, asked.lr, order)
            told.append(f"learning rate {', '.join(f'{rate:.6g}' for rate in rates)}")
            result["rates"] = list(rates)
        return Outcome("; ".join(told), result)

    def _plan(self, asked: SetArguments) -> Plan | None:
        now = self._loop.plan
        if asked.max_epochs is not None:
            least = self._loop.epoch + 1
            if asked.max_epochs < least:
                raise UsageError(
                    f"max_epochs={asked.max_epochs} lies behind the run, which is in its epoch {least}; give at least {least}, or "
                    "`stop`"
                )
            plan = replace(now, max_epochs=asked.max_epochs, max_steps=None)
        elif asked.max_steps is not None:
            if asked.max_steps <= self._step:
                raise UsageError(
                    f"max_steps={asked.max_steps} lies behind the run, which has trained {self._step}; give more, or `stop`"
                )
            plan = replace(now, max_epochs=None, max_steps=asked.max_steps)
        else:
            return None
        if plan.total is None and self._driver.mode in ("propose", "act"):
            raise NotExecutableError(
                "max_epochs cannot be set here: the loader has no length, and the mode needs to know the end; set max_steps"
            )
        return plan

    def _set_length(self, plan: Plan) -> str:
        self._parts.plan = self._loop.plan = plan
        self._driver.set_length(plan.total)
        self._driver.scribe.feed(
            LengthSet(
                step=self._step,
                max_epochs=plan.max_epochs,
                max_steps=plan.max_steps,
                total_steps=plan.total or 0,
            ),
            effective_at=self._step,
        )
        length = f"max_epochs={plan.max_epochs}" if plan.max_steps is None else f"max_steps={plan.max_steps}"
        return f"{length}, which is {plan.total} steps in all" if plan.total is not None else length

    def checkpoint(self, order: Order, *, ended: bool) -> Outcome:
        """Store the run's complete state, to stay; in a held run, name the one at its end.

        Raises:
            NotExecutableError: The run stores no states.
            SessionError: It could not be stored.
        """
        if self._keeper is None:
            raise NotExecutableError(
                "this run stores no states: Trainer(checkpoint_every=None) was asked for; give it a cadence"
            )
        digest = self._keeper.at_this_step if ended else self._keeper.save("asked")
        if digest is None:
            raise SessionError(
                "there is no stored state of the run's end"
                if ended
                else "the state could not be stored; see the session's log"
            )
        return Outcome(
            f"the state of step {self._step} is stored as {digest[:19]}",
            {"checkpoint": digest, "step": self._step},
        )

    def test(self, order: Order) -> Outcome:
        """Evaluate on the test set, without a trace in the run.

        Raises:
            NotExecutableError: There is no test loader.
        """
        test = self._parts.test
        if test is None:
            raise NotExecutableError("there is nothing to test on: pass test_loader to fit")
        companions = self._loop.companions
        with labelled(next_number(self._parts.session_path)) as label:
            companions.tests()
            found = test.run(companions.see)
            metrics = {name: float(value) for name, value in companions.tested(found.metrics).items()}
        body = Tested(step=self._step, label=label, n=found.scores.n, metrics=metrics)
        self._driver.scribe.feed(body, effective_at=self._step)
        words = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        return Outcome(f"{label} on {found.scores.n} samples: {words}", {"label": label, "metrics": metrics})

    def check(self, order: Order) -> Outcome:
        """Check the run's health; it is put back bit for bit."""
        findings = []
        for found in checked(self._parts, self._loop, arguments_of("check", order.arguments)):
            self._driver.scribe.feed(found, effective_at=self._step)
            findings.append(found)
        report = HealthReport(findings=tuple(findings))
        words = (
            str(report)
            if len(findings) > 1
            else f"{findings[0].check}: {findings[0].verdict}: {findings[0].why}"
        )
        return Outcome(words, {"verdict": report.verdict, **report.model_dump(mode="json")})

    def scan(self, order: Order) -> Outcome:
        """Read the sample ledger and cluster the probe samples, for a person: the planner does not hear of it.

        Raises:
            NotExecutableError: The run has no exact per-sample losses.
        """
        scanner, state = self._driver.performer.scanner, self._driver.state
        if scanner is None:
            run = state.run
            why = None if run is None else run.why_no_ids or run.why_inexact
            raise NotExecutableError(
                f"this run has no exact per-sample losses to scan: {why or 'none are kept'}"
            )
        policy = state.policy.scan
        # Reading the ledger enters the visits that wait for it, earlier than they would have been, which rounds otherwise.
        probe = copy.deepcopy(self._parts.probe.state())
        try:
            found = replace(scanner).scan(
                Scan(tail_from=policy.tail_from, probe=policy.probe, clusters=True), self._step
            )
        finally:
            self._parts.probe.load(probe, self._parts.trunk.device)
        return Outcome(
            "; ".join(map(_scanned, found)), {body.kind: body.model_dump(mode="json") for body in found}
        )

    def card(self, order: Order, *, ended: bool) -> Outcome:
        """Hand in a fork or a merge, and let it run.

        Raises:
            ConflictError: The run refuses the card, or its approval.
        """
        try:
            return self._card(order)
        except ConflictError as error:
            if not ended:
                raise
            raise ConflictError(
                f"{error}; this run has come to its end: make it longer first (set max_epochs=N), or load an earlier state"
            ) from error

    def _card(self, order: Order) -> Outcome:
        asked = arguments_of(order.control, order.arguments)
        if order.control == "fork":
            body = self._fork(asked) if asked.card is None else dict(asked.card)
        else:
            body = {"merge_recipe": {"kind": "swa"}} if asked.card is None else dict(asked.card)
        body = {"action": order.control} | body
        if body["action"] != order.control:
            raise UsageError(
                f"{order.control} needs a card whose action is {order.control}, and this one's is {body['action']}"
            )
        if order.actor == PLANNER:
            raise UsageError(f"the name {PLANNER!r} belongs to automode: order under your own")
        facts = self._decide("submit", order, f"{order.request}+card", body=body)
        card = next(fact.card for fact in facts if isinstance(fact, CardProposed))
        if self._driver.state.cards[card.id].state is CardState.PROPOSED:
            self._decide("approve", order, f"{order.request}+approval", card=card.id, rev=card.rev)
        state = self._driver.state.cards[card.id].state
        if state is CardState.FAILED:
            raise ConflictError(f"card {card.id} failed: {self._driver.state.cards[card.id].history[-1].why}")
        return Outcome(f"card {card.id} is {state}", {"card": card.id, "state": str(state)})

    def _decide(self, verb: Any, order: Order, request: str, **more: Any) -> list[Any]:
        decided = Decided(request=request, verb=verb, actor=order.actor, note=order.note, **more)
        facts = [fact.body for fact in self._driver.decide(decided, self._step)]
        refused = next((fact for fact in facts if isinstance(fact, RequestRefused)), None)
        if refused is not None:
            raise ConflictError(f"refused: {refused.why}")
        return facts

    def _fork(self, asked: Any) -> dict[str, Any]:
        """A comparison of rates, sized by the planning budget, unless told otherwise."""
        variants: list[dict[str, Any]] = [
            {"name": "plain", "schedule": "constant"},
            {"name": "gentle", "lr_mul": 0.5, "schedule": "constant"},
        ]
        if asked.lr_mul is not None:
            variants = [
                {"name": f"rate times {asked.lr_mul:g}", "lr_mul": asked.lr_mul, "schedule": "constant"}
            ]
        first = asked.budget_steps or max(1, self._driver.state.planning_budget // 20)
        return {
            "selection": {"kind": "all"},
            "training_recipe": {"variants": variants},
            "budget_steps": first,
            "asha": {"reduction_factor": 3, "max_steps": asked.max_steps or 3 * first},
        }
