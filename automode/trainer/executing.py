"""Running a card again: from its stored snapshot, with the model and the data of the very script that it ran in.

``AUTOMODE_EXECUTE_CARD=SESSION:CARD`` makes ``Trainer.fit`` do this in place of training, and leave. The script stays as it is:
it builds its model and its loaders, and calls ``fit`` with the same arguments. Nothing of the session is changed.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NoReturn

import torch

from automode.errors import UsageError
from automode.merges.trajectory import TrajectoryAverages
from automode.planner.policy import Policy
from automode.session import Session
from automode.session.artifacts import ArtifactStore
from automode.session.checkpoints import CheckpointStore
from automode.trainer.assembly import performer_of
from automode.trainer.card_again import Beside, CardAgain
from automode.trainer.execution_report import Execution
from automode.trainer.first_look import look_at
from automode.trainer.fit_request import FitRequest
from automode.trainer.random_state import forked_rng
from automode.trainer.recorded_card import RecordedCard, read_card
from automode.trainer.run_parts import RunParts, prepare
from automode.trainer.session_header import data_of
from automode.trainer.settings import Settings
from automode.trainer.steps import TrainingStep
from automode.trainer.trunk import trainable

ENVIRONMENT: Final = "AUTOMODE_EXECUTE_CARD"
"""Names the session and the card, with a colon between them."""

REPORT: Final = "AUTOMODE_EXECUTE_REPORT"
"""Names a file that the outcome is written to, as JSON."""

_TOGETHER: Final = ("stacked", "auto")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Which card to run again."""

    session: Path
    card: str


def ordered() -> Order | None:
    """Read what the environment asks for; None: train as usual.

    Raises:
        UsageError: It is no ``SESSION:CARD``.
    """
    text = os.environ.get(ENVIRONMENT)
    if not text:
        return None
    session, _, card = text.rpartition(":")
    if not session or not card:
        raise UsageError(f"{ENVIRONMENT} is {text!r}, and must be SESSION:CARD")
    return Order(session=Path(session), card=card)


def leave(order: Order, settings: Settings, request: FitRequest, own_step: TrainingStep | None) -> NoReturn:
    """Run the card again, print what came of it, and end the script.

    Raises:
        SystemExit: Always: 0 where the outcome is the same, 1 where it is not.
        AutomodeError: The card cannot be run again by this script.
    """
    done = execute(order, settings, request, own_step)
    sys.stdout.write(done.text() + "\n")
    sys.stdout.flush()
    report = os.environ.get(REPORT)
    if report:
        Path(report).write_text(json.dumps(done.as_plain()), encoding="utf-8")
    raise SystemExit(0 if done.same else 1)


def execute(
    order: Order, settings: Settings, request: FitRequest, own_step: TrainingStep | None
) -> Execution:
    """Run a card's trials, router, merge and evidence again, and compare them with the record.

    Args:
        order: The session and the card.
        settings: The Trainer's; mode, policy and seed are the session's.
        request: The arguments of ``fit``.
        own_step: The user's training step, or None.

    Raises:
        UsageError: The script is another one, or its data are.
        SessionError: What the card began from is not there any more.
    """
    with Session.open(order.session) as session, forked_rng():
        recorded = read_card(session, order.card)
        _same_script(recorded, settings, request)
        with tempfile.TemporaryDirectory(prefix="automode-execute-") as folder:
            parts = _prepared(recorded, settings, request, own_step, Path(folder))
            checkpoints = Beside(
                CheckpointStore(Path(folder) / "checkpoints"), CheckpointStore(session.path / "checkpoints")
            )
            performer, _ = performer_of(parts, look_at(parts), Path(folder), checkpoints)
            again = CardAgain(recorded, performer, checkpoints, ArtifactStore(session.path / "artifacts"))
            again.done.doubts = _doubts(recorded, parts)
            again.run()
            return again.done


def _prepared(
    recorded: RecordedCard,
    settings: Settings,
    request: FitRequest,
    own_step: TrainingStep | None,
    folder: Path,
) -> RunParts:
    started = recorded.started
    as_then = replace(settings, automode=started.mode, console=False, progress=False, seed=None, resume=None)
    policy = Policy.model_validate(started.policy)
    parts = prepare(as_then, policy, request, own_step, session=(folder / "session", started.seed))
    if (parts.plan.total or 0) != started.run.total_steps:
        raise UsageError(
            f"this script asks for {parts.plan.total} steps, and the session's run for {started.run.total_steps}: make it the same"
        )
    if started.run.averages:
        parts.trunk.averages = TrajectoryAverages(trainable(parts.trunk.model), started.run.total_steps)
    return parts


def _same_script(recorded: RecordedCard, settings: Settings, request: FitRequest) -> None:
    """Refuse a script that cannot be the one that the session was recorded from."""
    header = recorded.header
    then = (header.get("project"), header.get("run_name"))
    if then != (settings.project, settings.run_name):
        raise UsageError(
            f"this fit is of project {settings.project!r}, run {settings.run_name!r}, and the card ran in {then[0]!r}, {then[1]!r}: "
            "run the script that the session was recorded from"
        )
    data = header.get("data")
    if not isinstance(data, Mapping):
        raise UsageError(
            "the session was recorded before sessions named their data, so its cards cannot be run again"
        )
    for argument, name, loader in (
        ("train_loader", "train", request.train_loader),
        ("val_loader", "held_out", request.val_loader),
    ):
        now = data_of(loader)
        if now != data.get(name):
            raise UsageError(
                f"{argument}: the card ran on the samples {data.get(name)}, and this script gives {now}: a card is run again on "
                "its own data only"
            )
    kinds = {
        "model": type(request.model).__name__,
        "optimizer": type(request.optimizer).__name__,
        "scheduler": None if request.scheduler is None else type(request.scheduler).__name__,
    }
    for name, kind in kinds.items():
        if header.get(name) != kind:
            raise UsageError(f"{name}: the card ran with {header.get(name)}, and this script gives {kind}")


def _doubts(recorded: RecordedCard, parts: RunParts) -> list[str]:
    """Why the same bits cannot be promised."""
    header, doubts = recorded.header, []
    if header.get("backend") in _TOGETHER:
        doubts.append("its trials may have been trained together (stacked), and are trained one by one here")
    now = {
        "torch": str(torch.__version__),
        "device": str(parts.trunk.device),
        "threads": torch.get_num_threads(),
        "precision": parts.trunk.precision,
    }
    doubts += [
        f"{name} was {header.get(name)} and is {value}"
        for name, value in now.items()
        if header.get(name) != value
    ]
    if parts.trunk.device.type != "cpu":
        doubts.append(f"sums on {parts.trunk.device.type} may come in another order")
    return doubts
