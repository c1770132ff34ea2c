"""Backends that train outside of the training process: what they are made from, and which of them a name means."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from automode.backends.base import Backend
from automode.backends.process import ProcessBackend
from automode.backends.ray import RayBackend
from automode.backends.remote import BriefOf, RunnerFactory, no_brief
from automode.errors import SessionError, UsageError
from automode.session.checkpoints import CheckpointStore

AWAY: Mapping[str, Callable[..., Backend]] = {"process": ProcessBackend, "ray": RayBackend}


@dataclass(frozen=True, slots=True, kw_only=True)
class Away:
    """What a run gives a backend that trains elsewhere.

    Attributes:
        factory: Makes what workers make their runner of; called once, and only where such a backend is wanted.
        brief: Gives what travels with a job.
        checkpoints: The session's store, of which what nobody wants any more is deleted; the ray backend also copies from it and
            to it where a ``uri`` is among its options.
        options: More arguments of the backend: ``patience`` and ``start`` of ``process``; ``num_cpus``, ``num_gpus``,
            ``uri``, ``address`` and ``patience`` of ``ray``.
    """

    factory: Callable[[], RunnerFactory]
    brief: BriefOf = no_brief
    checkpoints: CheckpointStore | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def _discard(store: CheckpointStore, digest: str) -> None:
    with contextlib.suppress(SessionError):  # it stays where it is, and does no harm there
        store.delete([digest])


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Refuse options that a backend does not have.

    Raises:
        UsageError: There is such an option, or the backend takes none.
    """
    if name not in AWAY:
        raise UsageError(f"the {name} backend takes no options, but {', '.join(sorted(AWAY))} do")
    known = set(inspect.signature(AWAY[name]).parameters) - {
        *("factory", "slots", "brief", "checkpoints", "discard")
    }
    unknown = sorted(set(options) - known)
    if unknown:
        raise UsageError(
            f"the {name} backend has no option {unknown[0]!r}; it has {', '.join(sorted(known))}"
        )


def make_away(name: str, away: Away, *, slots: int = 2) -> Backend:
    """Make a backend that trains elsewhere.

    Args:
        name: ``process`` (worker processes on this machine) or ``ray`` (actors of a Ray cluster).
        away: What the run gives it.
        slots: Trials at once.

    Raises:
        UsageError: An option that this backend does not have.
        NotExecutableError: Workers cannot have what training needs; the inline backend can.
    """
    check_options(name, away.options)
    options = dict(away.options)
    store = away.checkpoints
    if store is not None:
        options["discard"] = partial(_discard, store)
    if options.get("uri") is not None:
        options["checkpoints"] = away.checkpoints
    return AWAY[name](away.factory(), slots=slots, brief=away.brief, **options)
