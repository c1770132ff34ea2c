"""A driver cut off anywhere and taken up from any checkpoint comes to the decisions of the run that was never cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from automode import Session, replay
from automode.backends.base import Note, SegmentJob, note
from automode.backends.inline import InlineBackend
from automode.engine import State, initial
from automode.errors import SessionCorruptError, SessionError
from automode.planner.card_text import submission_from_yaml
from automode.planner.events import (
    Adopt,
    Adopted,
    Command,
    Evaluate,
    Evaluated,
    Group,
    Input,
    Merge,
    Merged,
    Resolve,
    Resolved,
    Resumed,
    Run,
    Scan,
    Scanned,
    SessionStarted,
    Snapshot,
    Snapshotted,
    Weights,
)
from automode.planner.policy import PLANNER_VERSION, Policy
from automode.planner.recipes import Variant
from automode.session import SessionStore, inbox
from automode.session.logs import SessionLog
from automode.session.replaying import recovered
from automode.testing.scripted import Script, ScriptedRunner
from automode.trainer.card_data import CardData
from automode.trainer.driver import Driver
from automode.trainer.earlier import read_earlier
from automode.trainer.narrator import Narrator
from automode.trainer.observation_block import Block

TOTAL = 260
NAMES = ("step", "time", "loss", "grad_norm", "lr_0", "applied", "finite")
POLICY = Policy.model_validate(
    {
        "reasons": ["merge_cadence", "high_loss_tail"],
        "trend": {"budget": 40, "gain": 0.9},
        "scan": {"every": 30, "probe": 32, "share": None},
        "averages": {"finish_at": 0.6},
        "diagnostics": {"enabled": False},
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
merge_recipe: {kind: uniform}
budget_steps: 3
asha: {reduction_factor: 3, max_steps: 9}
""")
SCRIPTS = {
    0: Script(value=0.55),
    1: Script(fails="advance", error=OSError("now and then"), attempts=1, value=0.6),
    2: Script(value=0.52),
}


class Silent:
    """Nobody looks on."""

    def card(self, text: str) -> None:
        assert text

    def event(self, text: str) -> None:
        assert text

    def climb(self, card: str, done: int, total: int, text: str) -> None:
        assert done <= total

    def climbed(self, card: str) -> None:
        assert card


class Ticking:
    """A clock that moves on by itself, so that every poll is due."""

    def __init__(self, start: float) -> None:
        self.now = start

    def wall(self) -> float:
        return 1.8e9 + self.now

    def mono(self) -> float:
        self.now += 0.5
        return self.now


@dataclass
class Stage:
    """Plays the performer; what it answers depends on the command and the step alone."""

    weights: ClassVar[str] = "the same"
    seed: int = 1
    trunk: Any = field(default_factory=lambda: SimpleNamespace(step=0))
    runner: Any = field(default_factory=lambda: SimpleNamespace(cards={}, per_sample=None))
    selector: Any = field(default_factory=lambda: SimpleNamespace(train_ids=np.arange(200)))
    scanner: Any = None
    good: Any = field(default_factory=lambda: SimpleNamespace(state=dict, load=len))
    best: Any = field(default_factory=lambda: SimpleNamespace(state=dict, load=len))
    diagnoser: Any = field(default_factory=lambda: SimpleNamespace(state=list, load=len))
    deleted: list[str] = field(default_factory=list)

    def carry_out(self, body: Command, state: State, step: int) -> Sequence[Input]:
        def digest(what: str) -> str:
            return f"sha256:{sha256(f'{what} {step} {self.weights}'.encode()).hexdigest()}"

        match body:
            case Scan():
                return [Scanned(step=step, n=200, visits=3.0, passes=40)]
            case Snapshot():
                value = 0.5 if body.purpose == "control" else None
                choice = None if value is None else "raw"
                return [
                    Snapshotted(
                        card=body.card,
                        purpose=body.purpose,
                        checkpoint=digest(body.purpose),
                        step=step,
                        value=value,
                        choice=choice,
                        passes=60,
                    )
                ]
            case Resolve():
                return [self.resolve(state.cards[body.card].card, step)]
            case Merge():
                control = Weights(checkpoint=digest("raw")) if body.control is None else None
                return [
                    Merged(
                        card=body.card,
                        method=body.method,
                        members=("control", "expert 1"),
                        weights=Weights(checkpoint=digest("merge"), choice="tail"),
                        value=0.51,
                        control=control,
                        control_value=0.5 if control else None,
                        step=step,
                        passes=100,
                    )
                ]
            case Evaluate():
                group = Group(n=100, mean=0.1, variance=0.01, effective_n=100.0)
                return [Evaluated(card=body.card, candidate=body.candidate, overall=group, passes=80)]
            case Adopt():
                return [
                    Adopted(
                        card=body.card,
                        checkpoint=digest("adopted"),
                        before=digest("before"),
                        step=step,
                        into=body.into,
                    )
                ]
            case _:
                raise AssertionError(f"{body.kind} is not for this stage")

    def resolve(self, card: Any, step: int) -> Resolved:
        recipe = card.training_recipe
        selected, others = np.arange(50), np.arange(50, 200)
        self.runner.cards[card.id] = CardData(
            recipe=recipe, selected=selected, others=others, entropy=(1,), step=step
        )
        drawn = [Variant(name=f"draw{i}") for i in range(recipe.candidates - len(recipe.variants))]
        return Resolved(card=card.id, n=50, pool=200, variants=(*recipe.variants, *drawn))

    def save_final(self, step: int) -> str:
        return f"sha256:{step:064x}"

    def keep(self, state: State, step: int) -> None:
        assert step <= TOTAL

    def forget(self, card: str) -> None:
        self.runner.cards.pop(card, None)

    def slow_down(self, state: State) -> None:
        assert state.run is not None

    def delete(self, checkpoints: set[str]) -> None:
        self.deleted += checkpoints


class Counting(ScriptedRunner):
    """Counts the segments that are opened, and fails those whose card it knows nothing of."""

    opened = 0

    def open(self, job: Any) -> Any:
        Counting.opened += 1
        return super().open(job)


def driver_over(store: SessionStore, state: State, clock: float) -> Driver:
    log = SessionLog(store.path, console=lambda line: None)
    return Driver(
        state=state,
        store=store,
        log=log,
        performer=Stage(),  # type: ignore[arg-type]
        backend=InlineBackend(Counting(scripts=SCRIPTS)),
        narrator=Narrator(Silent(), log.logger),
        total_steps=TOTAL,
        guard=True,
        within=False,
        clock=Ticking(clock),
    )


def begun(folder: Path) -> Driver:
    driver = driver_over(SessionStore.create(folder, header={}), initial(), 0.0)
    policy = POLICY.model_copy(update={"budget": "on_top"})
    run = Run(
        total_steps=TOTAL,
        batch=10,
        train_samples=200,
        val_a=60,
        val_b=100,
        task="classification",
        has_ids=True,
        exact_losses=True,
        averages=True,
    )
    driver.start(
        SessionStarted(
            session="s",
            seed=1,
            mode="act",
            asked_mode="act",
            policy=policy.dump(),
            policy_digest=policy.digest,
            planner_version=PLANNER_VERSION,
            run=run,
        )
    )
    return driver


@dataclass(frozen=True)
class Point:
    """What a checkpoint holds."""

    step: int
    seq: int
    kept: dict[str, Any]


class Play:
    """The loop, the clock and a person, as functions of the step."""

    def __init__(self, folder: Path, driver: Driver, step: int = 0, origin: float = 0.0) -> None:
        self.origin = origin
        self.folder = folder
        self.driver = driver
        self.step = step
        self.points: dict[int, Point] = {}

    def go(self, until: int, *, checkpoints: Sequence[int] = ()) -> None:
        while self.step < min(until, self.driver.limit):
            self.step += 1
            rng = np.random.default_rng(self.step)
            loss = float(np.exp(0.05 * rng.standard_normal()))
            values = (self.step, self.origin + self.step * 0.01, loss, 1.0, 0.1, 1.0, 1.0)
            self.driver.block(Block(names=NAMES, rows=np.array([values]), first_row=self.step - 1))
            if self.step == 21 and self.asks():
                self.post("submit", body=CARD)
            if self.step == 24 and self.asks():
                card = next(reversed(self.driver.state.cards.values())).card
                self.post("approve", card=card.id, rev=card.rev)
            due = self.step % self.driver.stride == 0 or self.driver.busy
            if due or self.driver.tick(self.step):
                self.driver.boundary(self.step)
            if self.step in checkpoints:
                self.points[self.step] = self.checkpoint()

    def asks(self) -> bool:
        """A person asks once, whatever becomes of the process."""
        asked = self.folder.parent / f"{self.folder.name}-asked-{self.step}"
        if asked.exists():
            return False
        asked.touch()
        return True

    def post(self, verb: str, **more: Any) -> None:
        fields = {"card": None, "rev": None, "body": None, "mode": None, "note": "", "actor": "ann"}
        inbox.post(self.folder, fields | {"verb": verb} | more)

    def checkpoint(self) -> Point:
        kept = self.driver.state_for_checkpoint()
        self.driver.checkpointed(f"sha256:{self.step:064x}", self.step, "periodic")
        return Point(self.step, self.driver.state.next_seq - 1, kept)

    def kill(self) -> None:
        """The process is gone: what was not committed is lost, and the lock is free."""
        self.driver._store.abandon()
        self.driver._session_log.close()

    def end(self) -> None:
        self.go(TOTAL)
        self.driver.finish(self.step, "max_steps")


def taken_up(
    folder: Path,
    point: Point,
    *,
    exact: bool = True,
    why: str = "a test",
    verify: Callable[[str], object] = len,
) -> Play:
    store = SessionStore.open(folder)
    with Session.open(folder) as session:
        found, earlier = recovered(session, point.seq), read_earlier(session, point.seq)
    driver = driver_over(store, found.state, 1e6)
    try:
        driver.resume(
            Resumed(
                checkpoint=f"sha256:{point.step:064x}",
                at_seq=point.seq,
                step=point.step,
                attempt=earlier.attempt + 1,
                exact=exact,
                why_approximate=None if exact else why,
                looks=earlier.looks,
            ),
            found.commands,
            kept=point.kept,
            earlier=earlier,
            verify=verify,
        )
    except BaseException:
        driver.let_go()
        raise
    return Play(folder, driver, point.step, origin=1e6)


LEFT_OUT = ("checkpointed", "resumed", "session_started")


def decisions(folder: Path) -> list[Any]:
    """The story: every event but those about cuts, by its place among the rows that count."""
    told = []
    rows = superseded = 0
    with Session.open(folder) as session:
        for record in session.events():
            if record.kind == "resumed":
                superseded += record.frame_cursor - rows
            rows = record.frame_cursor
            if record.kind not in LEFT_OUT:
                body = {
                    k: v for k, v in record.body.items() if k not in ("seconds", "note", "request", "card")
                }
                if record.kind == "card_proposed":
                    body["card"] = {k: v for k, v in record.body["card"].items() if k != "cost"}
                told.append((record.kind, record.effective_at, rows - superseded, body))
    return told


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("whole") / "s"
    play = Play(folder, begun(folder))
    play.end()
    told = decisions(folder)
    kinds = [kind for kind, *_ in told]
    for kind in ("scanned", "trial_failed", "trial_reported", "merged", "evaluated", "adopted"):
        assert kind in kinds
    return told


def check_cut(cut: int, steps: set[int], whole: list[Any], tmp_path: Path) -> None:
    for step in sorted(steps):
        folder = tmp_path / f"{cut}from{step}"
        play = Play(folder, begun(folder))
        play.go(cut, checkpoints=[step])
        play.kill()
        again = taken_up(folder, play.points[step])
        again.end()
        assert decisions(folder) == whole, f"cut at {cut}, from {step}"
        assert replay(folder).differences == 0


@pytest.mark.parametrize("cut", [22, 30])
def test_a_cut_changes_no_decision(cut: int, whole: list[Any], tmp_path: Path) -> None:
    check_cut(cut, {18, cut}, whole, tmp_path)


class Noting(InlineBackend):
    """Says of every segment, and of every attempt at it, that it trains alone."""

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        self.new: list[Note] = []

    def submit(self, job: SegmentJob) -> None:
        super().submit(job)
        self.new.append(note([job], "trained alone", f"attempt {job.attempt} to {job.to_resource}"))

    def notes(self) -> list[Note]:
        said, self.new = self.new, []
        return said


def test_what_is_said_of_trials_is_in_the_log_once_however_a_run_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "InlineBackend", Noting)
    play = Play(tmp_path / "whole", begun(tmp_path / "whole"))
    play.end()
    whole = decisions(tmp_path / "whole")
    noted = [body for kind, _, _, body in whole if kind == "trials_noted"]
    assert "trial_failed" in [kind for kind, *_ in whole]
    assert sorted((body["trials"][0], body["resource"]) for body in noted)[:3] == [(0, 3), (1, 3), (1, 9)]
    assert len({(tuple(body["trials"]), body["resource"]) for body in noted}) == len(noted)
    kept = [note for record in play.driver.state.cards.values() for note in record.notes]
    assert [(note.resource, note.why) for note in kept] == [(b["resource"], b["why"]) for b in noted]
    for cut in (27, 32):
        check_cut(cut, {18, cut}, whole, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("cut", [*range(19, 45), 64, 160, 170, 259])
def test_a_cut_anywhere_changes_no_decision_wherever_the_last_checkpoint_was(
    cut: int, whole: list[Any], tmp_path: Path
) -> None:
    check_cut(cut, set(range(18, min(cut, 44) + 1)), whole, tmp_path)


def test_cuts_one_after_the_other_change_no_decision(whole: list[Any], tmp_path: Path) -> None:
    folder = tmp_path / "s"
    play = Play(folder, begun(folder))
    play.go(23, checkpoints=[20])
    points = dict(play.points)
    # Back to the same checkpoint, on to a new one before what is known has come again, and cut before it is over.
    for last, cut, new in [(20, 31, 22), (22, 24, 23), (23, 23, None), (23, 29, 26), (26, 40, None)]:
        play.kill()
        play = taken_up(folder, points[last])
        play.go(cut, checkpoints=[] if new is None else [new])
        points |= play.points
    play.end()
    assert decisions(folder) == whole
    assert replay(folder).differences == 0


def test_segments_that_an_earlier_attempt_has_finished_are_not_trained_again(
    whole: list[Any], tmp_path: Path
) -> None:
    folder = tmp_path / "s"
    Counting.opened = 0
    play = Play(folder, begun(folder))
    play.go(40, checkpoints=[20])
    trained, Counting.opened = Counting.opened, 0
    play.kill()
    again = taken_up(folder, play.points[20])
    again.end()
    assert trained >= 5
    assert Counting.opened == 0
    assert decisions(folder) == whole


def test_a_segment_whose_checkpoint_is_damaged_is_trained_again(whole: list[Any], tmp_path: Path) -> None:
    def verify(digest: str) -> None:
        raise SessionCorruptError(digest)

    folder = tmp_path / "s"
    play = Play(folder, begun(folder))
    play.go(40, checkpoints=[20])
    play.kill()
    Counting.opened = 0
    again = taken_up(folder, play.points[20], verify=verify)
    again.end()
    assert Counting.opened >= 3
    assert decisions(folder) == whole


def kinds(folder: Path, *, after: int) -> list[str]:
    with Session.open(folder) as session:
        return [record.kind for record in session.events(after=after)]


def test_what_was_trained_on_other_weights_is_not_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "s"
    play = Play(folder, begun(folder))
    play.go(40, checkpoints=[22])
    play.kill()
    monkeypatch.setattr(Stage, "weights", "others")
    Counting.opened = 0
    again = taken_up(folder, play.points[22], exact=False)
    again.end()
    assert Counting.opened >= 5
    assert "trial_reported" in kinds(folder, after=play.points[22].seq)
    assert replay(folder).differences == 0


def test_a_request_behind_the_checkpoint_counts_where_nothing_else_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "s"
    play = Play(folder, begun(folder))
    play.go(28, checkpoints=[22])
    play.kill()
    monkeypatch.setattr(Stage, "weights", "others")
    again = taken_up(folder, play.points[22], exact=False)
    again.go(23)
    assert "decided" not in kinds(folder, after=play.points[22].seq)
    again.end()
    with Session.open(folder) as session:
        (approved,) = [r for r in session.events("decided") if r.body["verb"] == "approve"]
        (resumed,) = session.events("resumed")
        assert approved.frame_cursor - resumed.frame_cursor == 2
        assert [r.body["after"] for r in session.events("card_moved")][:2] == ["approved", "running"]


def test_a_card_whose_samples_nobody_knows_any_more_fails_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "s"
    play = Play(folder, begun(folder))
    play.go(27, checkpoints=[27])
    play.kill()
    point = play.points[27]
    assert point.kept["executor"]["memory"]["cards"]
    point.kept["executor"]["memory"]["cards"].clear()
    resolve = Stage.resolve
    monkeypatch.setattr(
        Stage, "resolve", lambda self, card, step: resolve(self, card, step).model_copy(update={"n": 49})
    )
    again = taken_up(folder, point)
    again.end()
    with Session.open(folder) as session:
        failed = next(session.events("command_failed"))
        assert "n was 50, and is 49" in failed.body["error"]
        assert [r.body["after"] for r in session.events("card_moved")][2] == "failed"
    assert replay(folder).differences == 0


def test_a_card_whose_samples_were_not_kept_goes_on_with_the_same_ones(
    whole: list[Any], tmp_path: Path
) -> None:
    folder = tmp_path / "s"
    play = Play(folder, begun(folder))
    play.go(27, checkpoints=[27])
    play.kill()
    play.points[27].kept["executor"]["memory"]["cards"].clear()
    again = taken_up(folder, play.points[27])
    again.end()
    assert decisions(folder) == whole


def test_a_session_that_cannot_be_written_is_not_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    play = Play(folder, begun(folder))
    play.go(20, checkpoints=[18])
    play.kill()
    before = kinds(folder, after=0)
    limit = SessionStore._take_up

    def full(self: SessionStore, connection: Any) -> None:
        limit(self, connection)
        connection.execute(f"PRAGMA max_page_count={connection.execute('PRAGMA page_count').fetchone()[0]}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SessionStore, "_take_up", full)
        with pytest.raises(SessionError, match="cannot be resumed"):
            taken_up(folder, play.points[18], exact=False, why="x" * 100_000)
    assert kinds(folder, after=0) == before
