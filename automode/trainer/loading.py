"""A checkpoint of the session that a person names, loaded and verified, for a run that goes back to it."""

from __future__ import annotations

from pathlib import Path

from automode.errors import UsageError
from automode.session import Session
from automode.session.checkpoints import CheckpointStore
from automode.session.taking_up import checkpointed, ever_checkpointed
from automode.trainer.checkpointing import KIND
from automode.trainer.resuming import Found

_LEAST = 4


def checkpoint_named(folder: Path, wanted: str) -> Found:
    """Load one of a session's stored states.

    Args:
        folder: The session's.
        wanted: ``last``, ``best``, or a digest or the beginning of one (with or without ``sha256:``).

    Raises:
        UsageError: None fits, or several do.
        SessionCorruptError: It is damaged.
        SessionError: It cannot be read.
    """
    store = CheckpointStore(folder / "checkpoints")
    present = set(store.digests())
    with Session.open(folder) as session:
        records = [r for r in checkpointed(session) if r.body["checkpoint"] in present]
        ever = [(r.body["checkpoint"], r.body["why"]) for r in ever_checkpointed(session)]
        header = session.header
    known = {r.body["checkpoint"]: r for r in records}
    if wanted == "last":
        fits = [r.body["checkpoint"] for r in records[-1:]]
    elif wanted == "best":
        fits = [r.body["checkpoint"] for r in records if r.body["why"] == "best"][-1:]
    else:
        begins = wanted.removeprefix("sha256:")
        if len(begins) < _LEAST:
            raise UsageError(
                f"load: {wanted!r} is too short: give {_LEAST} characters of the digest at least, last or best"
            )
        fits = [digest for digest in known if digest.removeprefix("sha256:").startswith(begins)]
    if len(fits) != 1:
        shown = ", ".join(
            f"{d.removeprefix('sha256:')[:12]} (step {r.body['step']}, {r.body['why']})"
            for d, r in known.items()
        )
        many = f"{len(fits)} checkpoints fit" if fits else "no checkpoint of this session's story fits"
        raise UsageError(f"load: {many} {wanted!r}; there are: {shown or 'none'}")
    weights, rest, manifest = store.load(fits[0])
    if manifest.get("kind") != KIND:
        raise UsageError(f"load: {wanted!r} holds weights of a card, and not a state of the run")
    return Found(
        session=folder,
        record=known[fits[0]],
        weights=weights,
        rest=rest,
        header=header,
        finished=False,
        stored=list(dict.fromkeys((d, why) for d, why in ever if d in present)),
    )
