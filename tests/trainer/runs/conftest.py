"""Whole runs through the Trainer on a task that trains in a second, with a person at the inbox and an eye on every step."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from automode import Trainer, replay
from automode.backends import stacking_rule
from automode.backends.stacked_group import StackedGroup
from automode.planner.card_text import submission_from_yaml
from automode.planner.cards import TRANSITIONS, PlanCard
from automode.planner.policy import Policy
from automode.session import Session, inbox
from automode.session.checkpoints import CheckpointStore
from automode.session.log_rows import encode_records, event_checksum
from automode.trainer import running
from automode.trainer.driver import Driver
from automode.trainer.result import FitResult
from automode.trainer.run_parts import RunParts

FEATURES, CLASSES, BATCH = 6, 3, 32

GENEROUS = {
    "reasons": [],
    "pacing": {"exploration_share": 1.0, "total_share": 1.0, "warmup_steps": 0},
    "evidence": {"min_samples": 20},
}
"""A policy under which a person's small card fits into a small run, and no rule makes one."""


def samples(n: int, seed: int) -> TensorDataset:
    """A task of three classes that is not linear, and that a small network learns."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, n]))
    x = rng.standard_normal((n, FEATURES)).astype(np.float32)
    y = (np.abs(x[:, :CLASSES])).argmax(axis=1)
    return TensorDataset(torch.from_numpy(x), torch.from_numpy(y))


@dataclass(frozen=True, kw_only=True)
class Script:
    """One training script: everything made anew, from the same seeds."""

    rate: float = 0.01
    optimizer: str = "sgd"
    norm: bool = True
    dropout: float = 0.2
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None
    train: int = 150
    held_out: int = 160
    make_val: Callable[[], Any] | None = None
    loss: Callable[[], Any] = nn.CrossEntropyLoss
    model: Callable[[], nn.Module] | None = None

    def network(self) -> nn.Module:
        """A small network that draws random numbers and keeps running statistics."""
        layers: list[nn.Module] = [nn.Linear(FEATURES, 16)]
        if self.norm:
            layers.append(nn.BatchNorm1d(16))
        layers += [nn.ReLU(), nn.Dropout(self.dropout), nn.Linear(16, CLASSES)]
        return nn.Sequential(*layers)

    def build(self) -> dict[str, Any]:
        """The arguments of ``fit``."""
        torch.manual_seed(5)
        model = self.network() if self.model is None else self.model()
        if self.optimizer == "adam":
            optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=self.rate)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=self.rate, momentum=0.9)
        val = (
            DataLoader(samples(self.held_out, 2), batch_size=60) if self.make_val is None else self.make_val()
        )
        return {
            "model": model,
            "optimizer": optimizer,
            "loss_fn": self.loss(),
            "train_loader": DataLoader(
                samples(self.train, 1),
                batch_size=BATCH,
                shuffle=True,
                generator=torch.Generator().manual_seed(6),
            ),
            "val_loader": val,
            "scheduler": None if self.scheduler is None else self.scheduler(optimizer),
        }


class Person:
    """Somebody who answers the run, from within it, at exact steps."""

    def __init__(self, run: Played) -> None:
        self._run = run
        self.step = 0

    @property
    def cards(self) -> list[PlanCard]:
        """The cards so far, oldest first."""
        return [record.card for record in self._run.driver.state.cards.values()]

    @property
    def path(self) -> Path:
        """The session's folder."""
        return self._run.path

    @property
    def driver(self) -> Driver:
        """The run's driver, for looking."""
        return self._run.driver

    @property
    def performer(self) -> Any:
        """What carries commands out, for looking."""
        return self._run.driver.performer

    @property
    def adopted_at(self) -> int:
        """Step of the last adoption."""
        moves = [move for record in self.driver.state.cards.values() for move in record.history]
        return max(move.step for move in moves if move.after == "adopted")

    def data(self) -> Any:
        """What the latest card's trials train on."""
        return self.performer.runner.cards[self.cards[-1].id]

    def resolvable(self, cluster: int) -> Any:
        """Ids that the latest card's clusters of a single number hold."""
        return self.performer.selector.ids_of(self.cards[-1].selection)

    def state(self, card: str | None = None) -> str:
        """Where a card stands; the latest where none is named."""
        return str(self._run.driver.state.cards[card or self.cards[-1].id].state)

    def ask(self, verb: str, card: str | None = None, **more: Any) -> str:
        """Post a request, as the command line does."""
        fields = {"card": card, "rev": None, "body": None, "mode": None, "note": "", "actor": "ann"}
        return inbox.post(self._run.path, fields | {"verb": verb} | more)

    def submit(self, text: str) -> str:
        """Hand in a card as YAML."""
        return self.ask("submit", body=submission_from_yaml(text))

    def approve(self) -> str:
        """Approve the latest card."""
        card = self.cards[-1]
        return self.ask("approve", card.id, rev=card.rev)

    def refuse(self) -> str:
        """Refuse the latest card."""
        card = self.cards[-1]
        return self.ask("refuse", card.id, rev=card.rev)


Action = Callable[[Person], Any]


@dataclass
class Played:
    """A run and what was seen of it.

    Attributes:
        after: Trunk weights as each optimizer step left them; the first is step 1.
        at: Trunk weights by step, after everything that happened at that step's boundary.
    """

    folder: Path
    made: dict[str, Any] = field(default_factory=dict)
    drivers: list[Driver] = field(default_factory=list)
    after: list[dict[str, Tensor]] = field(default_factory=list)
    at: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    result: FitResult | None = None

    @property
    def driver(self) -> Driver:
        return self.drivers[-1]

    @property
    def path(self) -> Path:
        (path,) = [p.parent for p in self.folder.glob("*/*/session.db")]
        return path

    @property
    def losses(self) -> list[float]:
        with Session.open(self.path) as session:
            return session.frame("loss").tolist()

    def column(self, name: str) -> list[float]:
        """A column of the trunk's frame."""
        with Session.open(self.path) as session:
            return session.frame(name).tolist()

    @property
    def final(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.made["model"].state_dict().items()}

    def bodies(self, kind: str) -> list[dict[str, Any]]:
        """Bodies of all events of a kind, in order."""
        with Session.open(self.path) as session:
            return [record.body for record in session.events(kind=kind)]

    def states(self, card: str | None = None) -> list[str]:
        """Where a card went; the only one where none is named."""
        moves = self.bodies("card_moved")
        if card is None:
            assert len({m["card"] for m in moves}) <= 1, moves
        return [m["after"] for m in moves if card in (None, m["card"])]

    def why(self) -> str:
        """The reason of the last move."""
        return str(self.bodies("card_moved")[-1]["why"])

    def checkpoint(self, digest: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        weights, rest, _ = CheckpointStore(self.path / "checkpoints").load(digest)
        return weights, rest


def sound(path: Path, *, ended: bool = True) -> None:
    """What holds of every session, however its run went."""
    report = replay(path)
    assert report.differences == 0, report.first
    with Session.open(path) as session:
        session.verify()
        events = list(session.events())
        recorded = {row.digest for row in session.checkpoints()}
    store = CheckpointStore(path / "checkpoints")
    on_disk = store.digests()
    for digest in on_disk:
        store.verify(digest)
    assert [e.seq for e in events] == list(range(1, len(events) + 1))
    if ended:
        assert set(on_disk) <= recorded
        final = {m["card"]: m["after"] for m in (e.body for e in events if e.kind == "card_moved")}
        assert all(not TRANSITIONS[state] or state == "adopted" for state in final.values()), final
        assert not list((path / "inbox").glob("*.json"))
    reserved = {e.body["card"]: e.body["passes"] for e in events if e.kind == "budget_reserved"}
    for spent in (e.body for e in events if e.kind == "budget_released"):
        assert spent["spent"] <= reserved[spent["card"]], spent


def play(
    folder: Path,
    *,
    automode: Any = "propose",
    policy: Mapping[str, Any] | None = None,
    script: Script | None = None,
    actions: Mapping[int, Action] | None = None,
    each: Action | None = None,
    steps: int | None = 150,
    check: bool = True,
    fit: Mapping[str, Any] | None = None,
    keep: list[Played] | None = None,
    **settings: Any,
) -> Played:
    """Run a script to its end.

    Args:
        folder: Where the session goes.
        automode: The mode.
        policy: Changes to the default policy.
        script: What is trained.
        actions: What a person does while the optimizer makes its k-th step (from 1); taken up at that step's boundary.
        each: What a person does at every step.
        steps: Of the run.
        check: Whether the session must be sound at the end.
        fit: Arguments of ``fit`` in place of the script's.
        keep: Gets the run before it begins, for runs that end in an error.
        settings: Of the Trainer.
    """
    folder.mkdir(exist_ok=True)
    run = Played(folder)
    if keep is not None:
        keep.append(run)
    run.made = (script or Script()).build() | dict(fit or {})
    model, optimizer = run.made["model"], run.made["optimizer"]
    person = Person(run)

    def copied() -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in model.state_dict().items()}

    def after(*_: Any) -> None:
        person.step += 1
        run.after.append(copied())
        if each is not None:
            each(person)
        if actions and person.step in actions:
            actions[person.step](person)

    optimizer.register_step_post_hook(after)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inbox, "POLL_SECONDS", 0.0)
        patch.setattr(Driver, "stride", 1)

        def open_driver(parts: RunParts) -> Driver:
            driver = original(parts)
            run.drivers.append(driver)
            boundary = driver.boundary

            def watched(step: int) -> None:
                boundary(step)
                run.at[step] = copied()

            driver.boundary = watched  # type: ignore[method-assign]
            return driver

        original = running._open_driver
        patch.setattr(running, "_open_driver", open_driver)
        values = {"max_steps": steps, "seed": 3, "progress": False, "console": False, "session_dir": folder}
        run.result = Trainer(
            automode=automode,
            policy=Policy.model_validate(_merged(GENEROUS, policy or {})),
            **(values | settings),
        ).fit(**run.made)
    run.result.session.close()
    if check:
        sound(run.path)
    return run


def _merged(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        k: _merged(base[k], more[k])
        for k in base
        if isinstance(more.get(k), dict) and isinstance(base[k], dict)
    }
    return {**base, **more, **both}


Play = Callable[..., Played]


@pytest.fixture
def play_run(tmp_path: Path) -> Play:
    """Plays runs, each in a folder of its own."""
    count = iter(range(100))

    def one(**arguments: Any) -> Played:
        return play(tmp_path / f"run{next(count)}", **arguments)

    return one


@pytest.fixture
def failed_run(tmp_path: Path) -> Callable[..., Path]:
    """Plays a run that must end in an error; gives the path of its session, which opens and replays."""

    def one(error: type[BaseException], match: str, **arguments: Any) -> Path:
        with pytest.raises(error) as raised:
            play(tmp_path / "failed", **arguments)
        assert re.search(match, str(raised.value))  # what is noted on an error besides is not its message
        (path,) = [p.parent for p in (tmp_path / "failed").glob("*/*/session.db")]
        with Session.open(path) as session:
            ended = any(session.events(kind="run_ended"))
        sound(path, ended=ended)
        return path

    return one


@pytest.fixture(scope="session")
def run_once() -> Play:
    """Plays a run whose result several tests share."""
    return play


@pytest.fixture(scope="session")
def handed_in() -> Callable[..., dict[int, Any]]:
    """What a person does at which boundary to hand a card in, and to approve it at the next."""

    def actions(text: str, at: int = 8) -> dict[int, Any]:
        return {at: lambda person: person.submit(text), at + 1: lambda person: person.approve()}

    return actions


def take_up_run(
    path: Path,
    run: Played,
    script: Script,
    *,
    steps: int,
    fit: Mapping[str, Any] | None = None,
    **settings: Any,
) -> FitResult:
    """Take up, as a person's next process would, what another run has left in a copy of its session; ``fit``: instead of the script's."""
    return Trainer(
        policy=run.driver.state.policy,
        max_steps=steps,
        seed=3,
        progress=False,
        console=False,
        session_dir=path.parents[1],
        resume=path,
        **{"automode": "propose", "checkpoint_every": None} | settings,
    ).fit(**(script.build() if fit is None else fit))


@pytest.fixture(scope="session")
def take_up() -> Callable[..., FitResult]:
    return take_up_run


@pytest.fixture
def group_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many trials trained together in each step; whatever is more than one does, however short."""
    monkeypatch.setattr(
        stacking_rule, "why_too_short", lambda members, *_, **__: None if members > 1 else "alone"
    )
    monkeypatch.setattr(stacking_rule, "why_slower", lambda *_: None)
    sizes: list[int] = []
    step = StackedGroup._step

    def counted(group: StackedGroup, built: Any) -> Any:
        sizes.append(len(group.segments))
        return step(group, built)

    monkeypatch.setattr(StackedGroup, "_step", counted)
    return sizes


@pytest.fixture(scope="session")
def scripts() -> type[Script]:
    return Script


@pytest.fixture
def script() -> type[Script]:
    return Script


@pytest.fixture
def training() -> Callable[[], TensorDataset]:
    """The training samples of the script."""
    return lambda: samples(150, 1)


@pytest.fixture
def held_out_samples() -> Callable[[int, int], TensorDataset]:
    return samples


@pytest.fixture
def tamper() -> Callable[..., None]:
    """Rewrites an event of a closed session, checksum included."""

    def rewrite(path: Path, kind: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        with Session.open(path) as session:
            record = next(session.events(kind=kind))
        forged = replace(record, body=change(dict(record.body)))
        (row,) = encode_records(
            [forged], first_seq=forged.seq, first_cursor=forged.frame_cursor, rows=forged.frame_cursor
        )
        with closing(sqlite3.connect(path / "session.db")) as connection, connection:
            connection.execute(
                "UPDATE events SET body = ?, crc = ? WHERE seq = ?", (row[4], event_checksum(row), forged.seq)
            )

    return rewrite


@pytest.fixture
def soundness() -> Callable[..., None]:
    return sound
