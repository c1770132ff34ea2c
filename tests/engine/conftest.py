"""A small simulated world that answers the machine's commands, so that whole cards can be folded without torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from automode.engine import State, handle, initial
from automode.planner.events import (
    Acknowledged,
    Adopt,
    Adopted,
    AskApproval,
    ClipSet,
    Clustered,
    CommandFailed,
    Decided,
    Diagnose,
    Diagnosed,
    Envelope,
    Evaluate,
    Evaluated,
    FitGate,
    GateFitted,
    Group,
    Merge,
    Merged,
    RateSet,
    Resolve,
    Resolved,
    Rewind,
    Rewound,
    RollBack,
    RolledBack,
    Rows,
    Run,
    RunEnded,
    Scan,
    Scanned,
    SessionStarted,
    SetClip,
    SetLearningRate,
    Snapshot,
    Snapshotted,
    StartTrial,
    StopRun,
    StopTrial,
    TrialReported,
    TrunkEnded,
    Weights,
)
from automode.planner.policy import PLANNER_VERSION, Policy
from automode.planner.recipes import TrainingRecipe, Variant

NAMES = ("step", "time", "loss", "grad_norm", "lr_0", "applied", "finite")


def digest(text: str) -> str:
    import hashlib

    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def rows_of(loss: np.ndarray, *, start: int = 1) -> np.ndarray:
    n = len(loss)
    steps = np.arange(start, start + n, dtype=np.float64)
    return np.stack(
        [
            steps,
            steps * 1e-3,
            loss,
            np.ones(n),
            np.full(n, 1e-3),
            np.ones(n),
            np.isfinite(loss).astype(float),
        ],
        axis=1,
    )


RUN = Run(
    total_steps=6000,
    batch=32,
    train_samples=1000,
    val_a=200,
    val_b=200,
    task="classification",
    has_ids=True,
    exact_losses=True,
    averages=True,
)


def all_variants(recipe: TrainingRecipe) -> tuple[Variant, ...]:
    """Those that are written out, and as many more as the recipe draws."""
    draws = 0 if recipe.search is None else recipe.search.draws
    return (*recipe.variants, *(Variant(name=f"draw{i}", lr_mul=0.5 + 0.1 * i) for i in range(draws)))


@dataclass
class World:
    """Feeds rows and answers commands; keeps the log as the driver would."""

    policy: Policy = field(default_factory=Policy)
    mode: str = "act"
    run: Run = RUN
    trial_value: Callable[[int, int], float] = lambda trial, resource: 0.5 + 0.01 * trial + 1e-5 * resource
    control_value: float = 0.5
    trunk_choice: str = "tail"
    evidence: Group = field(default_factory=lambda: Group(n=200, mean=0.05, variance=0.01, effective_n=200.0))
    guard: Group | None = None
    merged: dict[str, Any] = field(default_factory=dict)
    gate_value: float = 0.4
    clusters: Clustered | None = None
    scanned: dict[str, Any] = field(default_factory=dict)
    state: State = field(default_factory=initial)
    log: list[Rows | Envelope] = field(default_factory=list)
    commands: list[Envelope] = field(default_factory=list)
    scheduled: list[Envelope] = field(default_factory=list)
    at_end: list[Envelope] = field(default_factory=list)
    hold: set[str] = field(default_factory=set)
    good: int | None = 10**9
    """The latest good state that there is; None: there is none."""

    def start(self) -> None:
        self.feed(
            SessionStarted(
                session="test",
                seed=7,
                mode=self.mode,
                asked_mode=self.mode,
                policy=self.policy.dump(),
                policy_digest=self.policy.digest,
                planner_version=PLANNER_VERSION,
                run=self.run,
            )
        )

    def feed(self, body: Any, command_id: str | None = None) -> None:
        envelope = Envelope(
            seq=self.state.next_seq,
            role="input",
            body=body,
            command_id=command_id,
            frame_cursor=self.state.rows,
            t_mono=self.state.t_mono,
        )
        _, facts, commands = handle(self.state, [envelope])
        self._keep([envelope, *facts], commands)
        self._answer_all()

    def rows(self, values: np.ndarray, sizes: Sequence[int] = (20,)) -> None:
        position, i = 0, 0
        while position < len(values):
            block = values[position : position + sizes[i % len(sizes)]]
            rows = Rows(first=self.state.rows, names=NAMES, values=block)
            self.log.append(rows)
            _, facts, commands = handle(self.state, [rows])
            self._keep(facts, commands)
            position += len(block)
            i += 1
            self._answer_all()

    def end(self, *, early: bool = False) -> None:
        self.scheduled.clear()
        self.feed(TrunkEnded(step=self.state.step, why="done", early=early))
        for command in self.at_end:
            self._answer(command)
        self._answer_all()
        self.feed(RunEnded(step=self.state.step, why="done"))

    def decide(self, verb: str, card: str | None = None, **more: Any) -> None:
        request = f"r{self.state.next_seq}"
        self.feed(Decided(request=request, verb=verb, card=card, actor="ann", **more))

    def _keep(self, told: list[Envelope], commands: list[Envelope]) -> None:
        self.log.extend(sorted((*told, *commands), key=lambda e: e.seq))
        self.commands.extend(commands)

    def _answer_all(self) -> None:
        due = [c for c in self.scheduled if c.body.at_step <= self.state.step]
        self.scheduled = [c for c in self.scheduled if c.body.at_step > self.state.step]
        self.commands.extend(due)
        while self.commands:
            self._answer(self.commands.pop(0))

    def _answer(self, command: Envelope) -> None:  # noqa: C901 - one case a command
        body, step = command.body, self.state.step
        if body.kind in self.hold:
            return
        answer: Any
        match body:
            case Snapshot() if body.at_step is not None and body.at_step > step:
                self.scheduled.append(command)
                return
            case Merge() if body.at_end and not self.state.trunk_ended:
                self.at_end.append(command)
                return
            case AskApproval() | StopTrial() | StopRun():
                answer = Acknowledged(command=body.kind)
            case Snapshot():
                control = body.purpose == "control"
                answer = Snapshotted(
                    card=body.card,
                    purpose=body.purpose,
                    checkpoint=digest(f"{body.purpose}{step}"),
                    step=step,
                    value=self.control_value if control else None,
                    choice="ema3" if control else None,
                    passes=200.0 if control else 0.0,
                )
            case Resolve():
                card = self.state.cards[body.card].card
                answer = Resolved(
                    card=body.card, n=500, pool=1000, variants=all_variants(card.training_recipe)
                )
            case StartTrial():
                answer = TrialReported(
                    card=body.card,
                    trial=body.trial,
                    rung_attempt=body.rung_attempt,
                    resource=body.to_resource,
                    value=self.trial_value(body.trial, body.to_resource),
                    checkpoint=digest(f"t{body.trial}-{body.to_resource}"),
                    passes=96.0 * (body.to_resource - body.from_resource) + 200,
                )
            case Scan():
                self.feed(
                    Scanned(step=step, n=1000, visits=5.0, **self.scanned),
                    None if self.clusters is not None else command.command_id,
                )
                if self.clusters is not None:
                    self.feed(self.clusters.model_copy(update={"step": step}), command.command_id)
                return
            case FitGate():
                answer = GateFitted(
                    card=body.card,
                    value=self.gate_value,
                    loads=(0.5, 0.5),
                    entropy=0.5,
                    experts=("control", "expert 1"),
                    checkpoint=digest("gate"),
                    passes=1000,
                )
            case Merge():
                own = body.control is None
                merged = Merged(
                    card=body.card,
                    method=body.method,
                    members=("a", "b"),
                    weights=Weights(
                        checkpoint=digest("trunk" if own else "merge"),
                        choice=self.trunk_choice if own else "raw",
                    ),
                    value=0.6 if own else 0.3,
                    control=Weights(checkpoint=digest("trunk")) if own else None,
                    control_value=0.5 if own else None,
                    step=step,
                    passes=800,
                )
                answer = merged.model_copy(update=self.merged)
            case Evaluate():
                answer = Evaluated(
                    card=body.card,
                    candidate=body.candidate,
                    overall=self.evidence,
                    metric=body.metric,
                    half=body.half,
                    guard=self.guard,
                    passes=400,
                )
            case Adopt():
                answer = Adopted(
                    card=body.card,
                    checkpoint=digest("adopted"),
                    before=digest("before"),
                    step=step,
                    into=body.into,
                )
            case RollBack():
                answer = RolledBack(card=body.card, checkpoint=body.checkpoint, step=step)
            case Diagnose():
                answer = Diagnosed(step=step, missing={"updates": "no moments"})
            case Rewind() if self.good is None:
                answer = CommandFailed(command="rewind", card=None, error="no good state is kept")
            case Rewind():
                answer = Rewound(
                    step=step,
                    to_step=min(body.to_step, self.good),
                    rate_factor=body.rate_factor,
                    rates=(1e-3,),
                )
            case SetLearningRate():
                answer = RateSet(step=step, factor=body.factor, rates=(1e-3,), why=body.why, card=body.card)
            case SetClip():
                answer = ClipSet(step=step, norm=body.norm, why=body.why, card=body.card)
            case _:
                raise AssertionError(f"no answer for {body.kind}")
        self.feed(answer, command.command_id)

    def facts(self, kind: str) -> list[Any]:
        return [
            e.body for e in self.log if isinstance(e, Envelope) and e.role == "fact" and e.body.kind == kind
        ]

    def states_of(self, card: str) -> list[str]:
        return [str(m.after) for m in self.facts("card_moved") if m.card == card]


def plateau(n: int = 6000, seed: int = 0) -> np.ndarray:
    """A loss that falls for a while and then stands still."""
    rng = np.random.default_rng(seed)
    steps = np.arange(1, n + 1)
    return np.maximum(0.4, 2 * np.exp(-steps / 300)) * np.exp(0.1 * rng.standard_normal(n))


@pytest.fixture
def make_world() -> Callable[..., World]:
    return World


@pytest.fixture
def plateau_rows() -> np.ndarray:
    return rows_of(plateau())


@pytest.fixture
def to_rows() -> Callable[..., np.ndarray]:
    return rows_of
