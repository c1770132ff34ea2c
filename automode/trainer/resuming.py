"""Taking a run up again: which session, which checkpoint, and everything of it back into the user's own objects."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from automode.errors import SessionCorruptError, SessionError, UsageError
from automode.session import Record, Session
from automode.session.checkpoints import CheckpointStore
from automode.session.database import DATABASE_NAME
from automode.session.paths import slug
from automode.session.taking_up import ENVIRONMENT, checkpointed, ever_checkpointed, is_finished
from automode.session.writer_lock import WriterLock
from automode.trainer import run_state
from automode.trainer.checkpointing import KIND
from automode.trainer.loop import Loop
from automode.trainer.resume_point import ResumePoint
from automode.trainer.run_identity import Comparison, compare, identity_of
from automode.trainer.run_parts import RunParts
from automode.trainer.settings import Settings
from automode.trainer.user_warning import warn_user

_taken_up: set[str] = set()


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A checkpoint that a run can go on from.

    Attributes:
        session: The session's folder.
        record: The log's record of the checkpoint.
        weights: The model's.
        rest: Everything else, as :func:`automode.trainer.run_state.take` gave it.
        header: The session's.
        finished: Whether the run had come to its end.
        stored: (digest, why) of the checkpoints of this session that are still there, oldest first.
    """

    session: Path
    record: Record
    weights: Mapping[str, Tensor]
    rest: Mapping[str, Any]
    header: Mapping[str, Any]
    finished: bool
    stored: list[tuple[str, str]]

    @property
    def seed(self) -> int:
        """The session's seed, by which held-out data were split."""
        return int(self.header["seed"])


def find(settings: Settings) -> Found | None:
    """Find what ``resume=`` or ``automode resume`` asks to go on from; None: begin a fresh run.

    Raises:
        SessionError: The session cannot be read, is being written, or holds no checkpoint.
        SessionCorruptError: Every checkpoint of it is damaged.
    """
    named = _from_environment(settings) if settings.resume in (None, "auto") else None
    if named is None and settings.resume == "auto":
        named = newest_unfinished(settings)
    elif named is None and settings.resume is not None:
        named = Path(settings.resume).expanduser()
    if named is None:
        return None
    folder = named.parent if named.name == DATABASE_NAME else named
    _refuse_busy(folder)
    return _loaded(folder)


def newest_unfinished(settings: Settings) -> Path | None:
    """Give the newest session of this project and run name that has a checkpoint, has not ended and is not being written."""
    project, run = slug(settings.project, what="project"), slug(settings.run_name, what="run_name")
    folders = (Path(settings.session_dir).expanduser() / project).glob(f"{run}-*/{DATABASE_NAME}")
    for file in sorted(folders, key=lambda file: file.parent.name, reverse=True):
        try:
            if _goes_on(file.parent, settings):
                return file.parent
        except SessionCorruptError as error:
            warn_user(f'resume="auto" passes over a damaged session: {error}')
        except SessionError:  # killed while it was made, being written, or of a newer version
            continue
    return None


def _goes_on(folder: Path, settings: Settings) -> bool:
    with Session.open(folder) as session:
        names = (session.header.get("project"), session.header.get("run_name"))
        if (
            names != (settings.project, settings.run_name)
            or is_finished(session)
            or not checkpointed(session)
        ):
            return False
    _refuse_busy(folder)
    return True


def _from_environment(settings: Settings) -> Path | None:
    """Give the session that ``automode resume`` names, if it is this run's and was not taken up before."""
    named = os.environ.get(ENVIRONMENT)
    if not named or named in _taken_up:
        return None
    with Session.open(named) as session:
        header = session.header
    if (header.get("project"), header.get("run_name")) != (settings.project, settings.run_name):
        return None
    _taken_up.add(named)
    return Path(named)


def _refuse_busy(folder: Path) -> None:
    if not (folder / DATABASE_NAME).is_file():
        raise SessionError(f"resume: {folder} is no session: it has no {DATABASE_NAME}")
    WriterLock(folder).release()


def _loaded(folder: Path) -> Found:
    """Load the newest checkpoint that is whole; damaged ones are told and passed over."""
    store = CheckpointStore(folder / "checkpoints")
    with Session.open(folder) as session:
        records = checkpointed(session)
        everything = [
            (record.body["checkpoint"], record.body["why"]) for record in ever_checkpointed(session)
        ]
        finished, header = is_finished(session), session.header
    present = set(store.digests())
    damaged = []
    for record in reversed(records):
        digest = record.body["checkpoint"]
        try:
            weights, rest, manifest = store.load(digest)
        except SessionCorruptError as error:
            damaged.append(digest)
            warn_user(
                f"resume: checkpoint {digest[:19]} at step {record.body['step']} is damaged ({error}); the one before is taken"
            )
            continue
        except SessionError:  # deleted, as older ones are
            continue
        if manifest.get("kind") != KIND:
            continue
        return Found(
            session=folder,
            record=record,
            weights=weights,
            rest=rest,
            header=header,
            finished=finished,
            stored=list(dict.fromkeys((d, why) for d, why in everything if d in present)),
        )
    if damaged:
        raise SessionCorruptError(
            f"resume: every checkpoint of {folder} is damaged; restore the session from a copy, or start a fresh run"
        )
    raise SessionError(
        f"resume: {folder} holds no checkpoint to go on from; it ended before its first one, or was run with "
        "checkpoint_every=None"
    )


def put_back(parts: RunParts, found: Found, actor: str | None = None) -> tuple[ResumePoint, Comparison]:
    """Put a checkpoint into the user's objects, all but the driver's and the loop's, and find the place in the data.

    Args:
        parts: The run, made by the same script.
        found: What to go on from.
        actor: Who had the state loaded; None: a run that was cut goes on.

    Returns:
        The point, for the driver, and what differs from the run that was cut.

    Raises:
        UsageError: It is another run.
        SessionCorruptError: The checkpoint cannot be used.
    """
    rest, record = found.rest, found.record
    step = int(rest["step"])
    run_state.put_length(parts, rest)
    comparison = compare(rest["identity"], identity_of(parts), step=step, finished=found.finished)
    try:
        run_state.put_trunk(parts, found.weights, rest)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UsageError(
            f"resume: the state of step {step} does not fit this script ({type(error).__name__}: {error}); resume with the "
            "script that was cut, or start a fresh run"
        ) from error
    run_state.put_watching(parts, rest)
    comparison.doubts[:0] = rest["doubts"]
    comparison.doubts.extend(parts.cursor.take_up(rest["loop"]["cursor"]))
    point = ResumePoint(
        session=found.session,
        checkpoint=record.body["checkpoint"],
        at_seq=record.seq,
        step=step,
        rows=record.frame_cursor,
        exact=not comparison.doubts,
        why_approximate="; ".join(comparison.doubts) or None,
        driver=rest["driver"],
        actor=actor,
    )
    return point, comparison


def longer_by(parts: RunParts, found: Found) -> int:
    """Steps that the run was made longer by; 0 where either length is not known beforehand."""
    then, now = found.rest["identity"]["total"], parts.plan.total
    return 0 if then is None or now is None else int(now) - int(then)


def put_loop(parts: RunParts, loop: Loop, rest: Mapping[str, Any]) -> None:
    """Set the loop to where it was cut; averages again, should opening the session have made new ones."""
    run_state.put_averages(parts, rest)
    loop.load(rest["loop"])


def tell(parts: RunParts, found: Found, point: ResumePoint, comparison: Comparison) -> None:
    """Say what was taken up, and what of it is not exact."""
    rest = found.rest["loop"]
    where = f"step {point.step} (epoch {rest['epoch'] + 1}, batch {rest['cursor']['read']})"
    parts.console.event(f"resumed {found.session} at {where}, from checkpoint {point.checkpoint[:19]}")
    for note in comparison.notes:
        parts.console.event(f"resumed: {note}")
    if not point.exact:
        parts.console.event(f"resumed approximately: {point.why_approximate}")
        warn_user(f"the run is resumed approximately, not bit for bit: {point.why_approximate}")
