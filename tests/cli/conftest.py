"""Sessions for the command line's tests: one that is told by hand, and one whose run answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from automode.cli.main import main
from automode.engine import State, handle, initial
from automode.planner.card_text import to_yaml
from automode.planner.cards import CardState, PlanCard
from automode.planner.events import (
    CardMoved,
    CardProposed,
    Decided,
    Envelope,
    LineageGrew,
    Rows,
    Run,
    RunEnded,
    SessionStarted,
    StartTrial,
    TrialDecided,
    TrialReported,
    TrunkEnded,
)
from automode.planner.policy import PLANNER_VERSION, Policy
from automode.planner.recipes import Variant
from automode.session import CardRow, LineageRow, SessionStore
from automode.session.inbox import Inbox
from automode.session.replaying import to_record

NAMES = ("step", "time", "loss", "grad_norm", "lr_0", "applied", "samples")
DIGEST = "sha256:" + "9f" * 32
WALL = 1.8e9

Cli = Callable[..., Result]


@pytest.fixture
def cli() -> Cli:
    """Call automode and insist that no traceback comes out."""

    def call(*arguments: object, code: int = 0, stdin: str | None = None) -> Result:
        done = CliRunner().invoke(main, [str(a) for a in arguments], input=stdin)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
        assert done.exit_code == code, done.output
        return done

    return call


@pytest.fixture
def card() -> PlanCard:
    """A small card."""
    return PlanCard.model_validate(
        {
            "id": "c7f3a1e0",
            "session": "test",
            "step": 100,
            "action": "fork",
            "reason": "loss_plateau",
            "because": "The loss is flat.",
            "training_recipe": {"variants": [{"name": "plain"}, {"name": "gentle", "lr_mul": 0.5}]},
            "budget_steps": 20,
            "asha": {"max_steps": 60},
            "cost": {"sample_passes": 31_000, "share_of_remaining": 0.11},
            "cooldown_steps": 50,
            "base": {"step": 100, "policy": Policy().digest},
        }
    )


def start(**changes: Any) -> SessionStarted:
    run = Run(
        total_steps=6000,
        batch=32,
        train_samples=1000,
        val_a=200,
        val_b=200,
        task="classification",
        has_ids=True,
        exact_losses=True,
    )
    policy = Policy()
    fields: dict[str, Any] = {
        "session": "test",
        "seed": 7,
        "mode": "propose",
        "asked_mode": "propose",
        "run": run,
    }
    return SessionStarted(
        policy=policy.dump(),
        policy_digest=policy.digest,
        planner_version=PLANNER_VERSION,
        **(fields | changes),
    )


@dataclass
class Told:
    """Writes whatever a test says into a session's log."""

    store: SessionStore
    seq: int = 0

    @property
    def path(self) -> Path:
        return self.store.path

    def tell(self, body: Any, role: str = "fact", **rows: Any) -> int:
        self.seq += 1
        envelope = Envelope(
            seq=self.seq,
            role=role,
            body=body,
            cause=self.seq - 1 or None,
            t_wall=WALL + self.seq,
            t_mono=self.seq,
        )
        self.store.write([to_record(envelope)], durable=False, **rows)
        return self.seq

    def propose(self, card: PlanCard) -> None:
        row = CardRow(card_id=card.id, rev=card.rev, state="proposed", body=to_yaml(card), seq=self.seq + 1)
        self.tell(CardProposed(card=card), cards=[row])

    def move(self, card: PlanCard, before: str, after: str, **more: Any) -> None:
        row = CardRow(card_id=card.id, rev=card.rev, state=after, body=to_yaml(card), seq=self.seq + 1)
        fields = {"actor": "alice", "why": "looks fine"} | more
        moved = CardMoved(
            card=card.id, rev=card.rev, before=CardState(before), after=CardState(after), **fields
        )
        self.tell(moved, cards=[row])

    def trial(
        self, card: str, trial: int, variant: Variant, resource: int, value: float, **decided: Any
    ) -> None:
        command = StartTrial(
            card=card,
            trial=trial,
            rung_attempt=1,
            variant=variant,
            base=DIGEST,
            checkpoint=DIGEST,
            from_resource=0,
            to_resource=resource,
            top_resource=60,
            per_trunk_step=1.0,
        )
        self.tell(command, role="command")
        report = TrialReported(
            card=card,
            trial=trial,
            rung_attempt=1,
            resource=resource,
            value=value,
            choice="ema3",
            passes=100.0,
        )
        self.tell(report, role="input")
        self.tell(TrialDecided(card=card, trial=trial, resource=resource, **decided))

    def node(self, node: str, *parents: str, role: str, **more: Any) -> None:
        fields = {"card": None, "step": 0, "checkpoint": None} | more
        verdict = fields.pop("verdict", None)
        grew = LineageGrew(node=node, parents=parents, role=role, verdict=verdict, **fields)
        row = LineageRow(node=node, parents=parents, kind=role, seq=self.seq + 1, **fields)
        self.tell(grew, lineage=[row])


@pytest.fixture
def told(tmp_path: Path) -> Iterator[Told]:
    """A session in which a run has just begun; it stays open, as while it trains."""
    with SessionStore.create(tmp_path / "run", header={"project": "p"}) as store:
        writer = Told(store)
        writer.tell(start(), role="input")
        yield writer


@dataclass
class Live:
    """A run without training: the machine decides, the session records, the inbox is read when somebody waits."""

    store: SessionStore
    inbox: Inbox
    state: State = field(default_factory=initial)

    @property
    def path(self) -> Path:
        return self.store.path

    def feed(self, body: Any) -> None:
        now = self.state.t_mono + 1.0
        envelope = Envelope(
            seq=self.state.next_seq,
            role="input",
            body=body,
            frame_cursor=self.state.rows,
            t_wall=time.time(),
            t_mono=now,
        )
        _, facts, commands = handle(self.state, [envelope])
        self._record([envelope, *facts, *commands])

    def rows(self, n: int, loss: Any = None) -> None:
        first = self.state.rows
        steps = np.arange(first + 1, first + n + 1, dtype=np.float64)
        ones = np.ones(n)
        shown = 1.0 + 1.0 / steps if loss is None else loss
        values = np.stack([steps, steps * 1e-3, shown, ones, ones * 1e-3, ones, ones * 32], axis=1)
        self.store.add_rows("trunk", 1, NAMES, values)
        _, facts, commands = handle(self.state, [Rows(first=first, names=NAMES, values=values)])
        self._record([*facts, *commands])

    def end(self) -> None:
        self.feed(TrunkEnded(step=self.state.step, why="all steps done"))
        self.feed(RunEnded(step=self.state.step, why="all steps done"))

    def look(self, _seconds: float = 0.0) -> None:
        """Take up what was asked, as at a step boundary."""
        for request, body in self.inbox.poll(time.monotonic() + 1e6):
            self.feed(Decided.model_validate({**body, "request": request}))
            self.inbox.done(request)

    def _record(self, envelopes: list[Envelope]) -> None:
        envelopes = sorted(envelopes, key=lambda e: e.seq)
        cards = [row for e in envelopes for row in self._cards(e)]
        if envelopes:
            self.store.write([to_record(e) for e in envelopes], cards=cards, durable=False)

    def _cards(self, envelope: Envelope) -> Iterator[CardRow]:
        match envelope.body:
            case CardProposed(card=card):
                state = "proposed"
            case CardMoved() as moved:
                card, state = moved.edited or self.state.cards[moved.card].card, str(moved.after)
            case _:
                return
        yield CardRow(card_id=card.id, rev=card.rev, state=state, body=to_yaml(card), seq=envelope.seq)


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    """A run in propose mode, a hundred steps old, that answers whenever the command line waits for it."""
    with SessionStore.create(tmp_path / "run", header={"project": "p"}) as store:
        run = Live(store, Inbox(store.path))
        run.feed(start())
        run.rows(100)

        class Clock:
            monotonic = staticmethod(time.monotonic)
            sleep = staticmethod(run.look)

        monkeypatch.setattr("automode.cli.asking.time", Clock)
        yield run
