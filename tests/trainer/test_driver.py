"""The driver under any order of events: no order raises, leaves a card hanging, performs twice, or cannot be replayed."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from automode import Session, replay
from automode.backends.inline import InlineBackend
from automode.engine import State, initial
from automode.errors import SessionError
from automode.planner.card_text import submission_from_yaml
from automode.planner.cards import TRANSITIONS, CardState
from automode.planner.events import (
    Adopt,
    Adopted,
    ClipSet,
    Command,
    Diagnose,
    Diagnosed,
    Envelope,
    Evaluate,
    Evaluated,
    FitGate,
    GateFitted,
    Group,
    Input,
    Merge,
    Merged,
    RateSet,
    Resolve,
    Resolved,
    Rewind,
    Rewound,
    RollBack,
    RolledBack,
    Run,
    Scan,
    Scanned,
    SessionStarted,
    SetClip,
    SetLearningRate,
    Snapshot,
    Snapshotted,
    Weights,
)
from automode.planner.policy import PLANNER_VERSION, Policy
from automode.planner.recipes import Variant
from automode.session import SessionStore, inbox
from automode.session.logs import SessionLog
from automode.testing.scripted import Script, ScriptedRunner
from automode.trainer.driver import Driver
from automode.trainer.narrator import Narrator
from automode.trainer.observation_block import Block

TOTAL, BATCH = 400, 10
NAMES = ("step", "time", "loss", "grad_norm", "lr_0", "applied", "finite")
POLICY = Policy.model_validate(
    {
        "reasons": ["loss_plateau", "merge_cadence", "high_loss_tail"],
        "trend": {"budget": 40, "gain": 0.9},
        "scan": {"every": 30, "probe": 32},
        "averages": {"finish_at": 0.3},
        "approval": {"ask": []},
        "pacing": {
            "min_rung": 4,
            "warmup_steps": 0,
            "cooldown_steps": 5,
            "exploration_share": 0.5,
            "total_share": 0.9,
        },
    }
)
CARD = submission_from_yaml("""
schema: 1
action: fork
reason: manual
because: To see what happens.
training_recipe: {variants: [{name: a}, {name: b}, {name: c}]}
gate_recipe: {kind: switch_softmax}
merge_recipe: {kind: uniform}
budget_steps: 3
asha: {reduction_factor: 3, max_steps: 9}
""")


class Silent:
    """Nobody looks on."""

    def card(self, text: str) -> None:
        assert text

    def event(self, text: str) -> None:
        assert text

    def climb(self, card: str, done: int, total: int, text: str) -> None:
        assert card
        assert text
        assert 0 <= done <= total

    def climbed(self, card: str) -> None:
        assert card


class Ticking:
    """A clock that moves on by itself, so that every poll is due."""

    def __init__(self) -> None:
        self.now = 0.0

    def wall(self) -> float:
        return 1.8e9 + self.now

    def mono(self) -> float:
        self.now += 1.0
        return self.now


class Stage:
    """Plays the performer: answers every command at once, or fails the next of a kind."""

    def __init__(self, gain: float) -> None:
        self.gain = gain
        self.failing: set[str] = set()
        self.saved = 0

    def digest(self) -> str:
        self.saved += 1
        return f"sha256:{self.saved:064x}"

    def carry_out(self, body: Command, state: State, step: int) -> Sequence[Input]:  # noqa: C901 - one case a command
        if body.kind in self.failing:
            self.failing.discard(body.kind)
            raise SessionError(f"{body.kind} was made to fail")
        match body:
            case Scan():
                return [Scanned(step=step, n=200, visits=3.0, passes=40)]
            case Snapshot():
                value = 0.5 if body.purpose == "control" else None
                return [
                    Snapshotted(
                        card=body.card,
                        purpose=body.purpose,
                        checkpoint=self.digest(),
                        step=step,
                        value=value,
                        choice=None if value is None else "raw",
                        passes=60,
                    )
                ]
            case Resolve():
                recipe = state.cards[body.card].card.training_recipe
                assert recipe is not None
                drawn = [Variant(name=f"draw{i}") for i in range(recipe.candidates - len(recipe.variants))]
                return [Resolved(card=body.card, n=200, pool=200, variants=(*recipe.variants, *drawn))]
            case FitGate():
                return [
                    GateFitted(
                        card=body.card,
                        value=0.4,
                        loads=(0.5, 0.5),
                        entropy=0.6,
                        experts=("control", "expert 1"),
                        checkpoint=self.digest(),
                        passes=100,
                    )
                ]
            case Merge():
                own = Weights(checkpoint=self.digest())
                return [
                    Merged(
                        card=body.card,
                        method=body.method,
                        members=("control", "expert 1"),
                        weights=Weights(checkpoint=self.digest(), choice="tail"),
                        value=0.5 + self.gain,
                        control=own if body.control is None else None,
                        control_value=0.5 if body.control is None else None,
                        step=step,
                        passes=100,
                    )
                ]
            case Evaluate():
                group = Group(n=100, mean=self.gain, variance=0.01, effective_n=100.0)
                return [Evaluated(card=body.card, candidate=body.candidate, overall=group, passes=80)]
            case Adopt():
                before = None if body.into == "export" else self.digest()
                return [
                    Adopted(
                        card=body.card, checkpoint=self.digest(), before=before, step=step, into=body.into
                    )
                ]
            case RollBack():
                return [RolledBack(card=body.card, checkpoint=body.checkpoint, step=step)]
            case Diagnose():
                return [Diagnosed(step=step, missing={"updates": "no moments"})]
            case Rewind():
                return [Rewound(step=step, to_step=0, rate_factor=body.rate_factor, rates=(0.1,))]
            case SetLearningRate():
                return [RateSet(step=step, factor=body.factor, rates=(0.1,), why=body.why)]
            case SetClip():
                return [ClipSet(step=step, norm=body.norm, why=body.why)]
            case _:
                raise AssertionError(f"{body.kind} is not for the performer")

    def keep(self, state: State, step: int) -> None:
        assert step >= 0

    def mend(self) -> int:
        return 0

    def save_final(self, step: int) -> str:
        return self.digest()

    def forget(self, card: str) -> None:
        assert card

    def slow_down(self, state: State) -> None:
        assert state.run is not None

    def delete(self, checkpoints: set[str]) -> None:
        assert checkpoints


class Watched(Driver):
    """A driver that insists on write-ahead order, and on performing each command once."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.performed: list[str] = []

    def _perform(self, command: Envelope, step: int) -> None:
        assert command.seq < self._store.next_seq, "carried out before it was durable"
        super()._perform(command, step)
        waits = command in self._agenda.scheduled or command in self._agenda.at_end
        if not waits:
            assert command.command_id is not None
            self.performed.append(command.command_id)


def started(folder: Path, mode: Any, gain: float, *, within: bool) -> Watched:
    """Open a session with a driver over the stage."""
    store = SessionStore.create(folder, header={})
    log = SessionLog(folder, console=lambda line: None)
    scripts = {
        0: Script(value=0.5 + gain),
        1: Script(fails="advance", error=OSError("now and then"), attempts=1, value=0.5 + 2 * gain),
        2: Script(fails="open", error=ValueError("always")),
    }
    driver = Watched(
        state=initial(),
        store=store,
        log=log,
        performer=Stage(gain),
        backend=InlineBackend(ScriptedRunner(scripts=scripts)),
        narrator=Narrator(Silent(), log.logger),
        total_steps=TOTAL,
        guard=True,
        within=within,
        clock=Ticking(),
    )
    policy = POLICY.model_copy(update={"budget": "within" if within else "on_top"})
    driver.start(
        SessionStarted(
            session="s",
            seed=1,
            mode=mode,
            asked_mode=mode,
            policy=policy.dump(),
            policy_digest=policy.digest,
            planner_version=PLANNER_VERSION,
            run=Run(
                total_steps=TOTAL,
                batch=BATCH,
                train_samples=200,
                val_a=60,
                val_b=100,
                task="classification",
                has_ids=True,
                exact_losses=True,
                averages=True,
            ),
        )
    )
    return driver


class Play:
    """Applies moves to a driver as the loop, the disk and people would."""

    def __init__(self, driver: Watched, folder: Path) -> None:
        self.driver = driver
        self.folder = folder
        self.step = 0
        self.rows = 0
        self.rng = np.random.default_rng(0)

    def steps(self, n: int, *, level: float = 1.0) -> None:
        for _ in range(n):
            if self.step >= self.driver.limit or self.driver.stop_requested is not None:
                return
            self.step += 1
            self._row(applied=True, level=level)
            self.driver.stepped()
            self.driver.boundary(self.step)

    def skipped(self, n: int) -> None:
        for _ in range(n):
            self._row(applied=False)
            self.driver.skipped(self.step, "the loss is nan")
        self.driver.boundary(self.step)

    def _row(self, *, applied: bool, level: float = 1.0) -> None:
        loss = level * float(np.exp(0.05 * self.rng.standard_normal())) if applied else float("nan")
        values = (self.step + (not applied), self.rows * 0.01, loss, 1.0, 0.1, float(applied), float(applied))
        self.driver.block(Block(names=NAMES, rows=np.array([values]), first_row=self.rows))
        self.rows += 1

    def ask(self, verb: str, **more: Any) -> None:
        cards = list(self.driver.state.cards.values())
        card = cards[-1].card if cards else None
        about = {"card": None if card is None else card.id, "rev": None if card is None else card.rev}
        inbox.post(self.folder, {"verb": verb, "actor": "ann", "note": "a note"} | about | more)
        self.driver.boundary(self.step)

    def fail(self, kind: str) -> None:
        self.driver.performer.failing.add(kind)  # type: ignore[attr-defined]

    def disk(self, *, full: bool) -> None:
        connection = self.driver._store._check_open()
        used = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count={used if full else 1_000_000}")


STEPS = st.tuples(st.just("steps"), st.integers(1, 60))
MOVES = st.one_of(
    STEPS,
    st.just(("steps", 120)),
    st.just(("ask", "approve")),
    st.tuples(st.just("skipped"), st.integers(1, 12)),
    st.tuples(st.just("diverged"), st.integers(20, 60)),
    st.tuples(
        st.just("ask"),
        st.sampled_from(["approve", "refuse", "cancel", "revise", "rollback", "submit", "edit"]),
    ),
    st.tuples(st.just("mode"), st.sampled_from(["observe", "propose", "act"])),
    st.tuples(
        st.just("fail"),
        st.sampled_from(
            ["snapshot", "resolve", "merge", "fit_gate", "evaluate", "adopt", "roll_back", "scan", "rewind"]
        ),
    ),
    st.tuples(st.just("disk"), st.booleans()),
)


@settings(max_examples=30, deadline=None)
@given(
    moves=st.lists(MOVES, min_size=3, max_size=25),
    mode=st.sampled_from(["act", "propose", "observe"]),
    gain=st.sampled_from([-0.1, 0.0, 0.1]),
    within=st.booleans(),
    ends=st.sampled_from(["finish", "abort"]),
)
@example(  # a scan that is answered when the trunk has ended
    moves=[*[("steps", 1)] * 6, ("steps", 59), ("disk", True), ("skipped", 6), ("steps", 15)],
    mode="act",
    gain=-0.1,
    within=False,
    ends="finish",
)
def test_any_order_of_events_ends_in_order_and_replays(
    moves: list[tuple[str, Any]], mode: str, gain: float, within: bool, ends: str
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "session"
        driver = started(folder, mode, gain, within=within)
        play = Play(driver, folder)
        for what, value in moves:
            match what:
                case "steps":
                    play.steps(value)
                case "skipped":
                    play.skipped(value)
                case "diverged":
                    play.steps(value, level=50.0)
                case "ask":
                    play.ask(value, **({"body": CARD} if value in ("submit", "edit") else {}))
                case "mode":
                    play.ask("mode", mode=value)
                case "fail":
                    play.fail(value)
                case "disk":
                    play.disk(full=value)
            assert 0 <= driver.limit <= TOTAL
            assert driver.state.ledger.held >= 0
        play.disk(full=False)
        if ends == "finish":
            driver.finish(play.step, "max_steps")
        else:
            driver.abort(play.step, RuntimeError("the user's own"))
        check(driver, folder)


def check(driver: Watched, folder: Path) -> None:
    """What must hold of every session that has ended."""
    report = replay(folder)
    assert report.differences == 0, report.first
    assert not driver.state.executions
    assert driver.state.ledger.held == 0
    final = {card: record.state for card, record in driver.state.cards.items()}
    assert all(not TRANSITIONS[state] or state is CardState.ADOPTED for state in final.values()), final
    told = [move.why for record in driver.state.cards.values() for move in record.history]
    assert not [why for why in told if "no budget is left" in why], "approved, and refused by the ledger"
    assert len(driver.performed) == len(set(driver.performed))
    assert not driver.busy
    with Session.open(folder) as session:
        events = list(session.events())
        assert {row.card_id: row.state for row in session.cards()} == {c: str(s) for c, s in final.items()}
    commands = {e.command_id for e in events if e.role == "command"}
    answers = [e.command_id for e in events if e.role == "input" and e.command_id is not None]
    assert len(answers) == len(set(answers)), "a command was answered twice"
    assert set(answers) <= commands
    assert not list((folder / "inbox").glob("*.json"))


@pytest.mark.parametrize("kind", ["snapshot", "resolve", "merge", "fit_gate", "evaluate", "adopt"])
def test_a_command_that_fails_ends_its_card_or_is_left_out(kind: str, tmp_path: Path) -> None:
    driver = started(tmp_path / "session", "propose", 0.1, within=False)
    play = Play(driver, tmp_path / "session")
    play.steps(3)
    play.ask("submit", body=CARD)
    play.fail(kind)
    play.ask("approve")
    play.steps(120)
    (record,) = [r for r in driver.state.cards.values() if r.card.reason == "manual"]
    left_out = kind in ("merge", "fit_gate")  # the specialists are judged without them
    assert record.state is (CardState.ADOPTED if left_out else CardState.FAILED)
    driver.finish(play.step, "max_steps")
    check(driver, tmp_path / "session")


def test_a_rollback_that_fails_leaves_the_card_adopted(tmp_path: Path) -> None:
    driver = started(tmp_path / "session", "propose", 0.1, within=False)
    play = Play(driver, tmp_path / "session")
    play.steps(3)
    play.ask("submit", body=CARD)
    play.ask("approve")
    play.steps(120)
    card = next(r for r in driver.state.cards.values() if r.card.reason == "manual")
    assert card.state is CardState.ADOPTED
    play.fail("roll_back")
    play.ask("rollback", card=card.card.id)
    assert card.state is CardState.ADOPTED
    play.ask("rollback", card=card.card.id)
    assert card.state is CardState.ROLLED_BACK
    driver.finish(play.step, "max_steps")
    check(driver, tmp_path / "session")
