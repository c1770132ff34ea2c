"""How worker processes come into being: from a server that has torch loaded, anew, or as forks of the training process."""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
import types
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, Literal, TypeAlias

from automode.backends.remote import RunnerFactory
from automode.backends.worker import Inherited, Pulse, Sent, work
from automode.errors import NotExecutableError

Start: TypeAlias = Literal["auto", "forkserver", "spawn", "fork"]

LARGEST_SENT = 1 << 30
"""Bytes, at the most, of a pickled factory: every worker gets a copy of its own."""

_SLOW = ("torch", "torch._dynamo")
"""What takes long to load, and is loaded beforehand where the training process has it; the second comes with the first optimizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A worker process, and what is shared with it."""

    process: BaseProcess
    connection: Connection
    pulse: Pulse


class Starter:
    """Starts workers, all in one way.

    Args:
        factory: Makes each worker's runner.
        how: ``forkserver``: from a clean process that has torch loaded. ``spawn``: from a fresh interpreter each. Both send
            the factory pickled. ``fork``: from the training process, which hands on everything as it is.

    Raises:
        NotExecutableError: This platform, or this factory, does not allow it.
    """

    def __init__(self, factory: RunnerFactory, how: str) -> None:
        reason = _no_fork() if how == "fork" else None
        if how not in multiprocessing.get_all_start_methods():
            reason = f"{sys.platform} has no such way"
        if multiprocessing.current_process().daemon:
            reason = "the training runs in a daemonic process itself, which may have no children"
        if reason is not None:
            raise NotExecutableError(reason)
        self.how = how
        self._factory = factory
        self._pickled = None if how == "fork" else _pickled(factory)
        self._context: BaseContext = multiprocessing.get_context(how)
        if how == "forkserver":
            # Takes effect where no such server runs yet; one that does serves as well, and imports torch for each worker.
            slow = [name for name in _SLOW if name in sys.modules]
            self._context.set_forkserver_preload(
                [*slow, "automode.backends.worker", type(factory).__module__]
            )

    def start(self, others: Iterable[Connection]) -> Started:
        """Start a worker; it will say whether it is ready.

        Args:
            others: The parent's ends of the running workers' pipes.

        Raises:
            OSError: The operating system has no more processes, pipes or memory to give.
        """
        mine, theirs = self._context.Pipe()
        pulse = Pulse(self._context)
        parcel: Sent | Inherited
        parcel = Inherited(self._factory, (mine, *others)) if self._pickled is None else Sent(self._pickled)
        process = self._context.Process(  # type: ignore[attr-defined]  # every context has one
            target=work, args=(theirs, pulse, parcel), daemon=True, name="automode worker"
        )
        try:
            with _without_main() if self._pickled is not None else _quiet_fork():
                process.start()
        except BaseException:
            mine.close()
            raise
        finally:
            theirs.close()
        return Started(process=process, connection=mine, pulse=pulse)


def ways(start: Start) -> list[str]:
    """Tell the ways of starting workers on this platform, the best one first."""
    if start != "auto":
        return [start]
    return ["forkserver", "fork"] if sys.platform == "linux" else ["spawn"]


class _Pickler(ForkingPickler):
    """multiprocessing's own pickler, but tensors travel as bytes: torch's way would move the user's into shared memory."""

    _extra_reducers: dict[type, Any] = {}  # noqa: RUF012  # the name and kind that the base class reads

    def reducer_override(self, obj: Any) -> Any:
        """Refuse what only the user's script holds: no worker runs that a second time."""
        if isinstance(obj, type | types.FunctionType) and obj.__module__ == "__main__":
            raise TypeError(f"{obj.__qualname__} is defined in the script that was started, not in a module")
        return NotImplemented


def _pickled(factory: RunnerFactory) -> bytes:
    try:
        pickled = bytes(_Pickler.dumps(factory))
    except Exception as error:  # a user's object may raise anything when it is pickled
        raise NotExecutableError(
            f"it cannot be pickled ({type(error).__name__}: {str(error)[:300]})"
        ) from error
    if len(pickled) > LARGEST_SENT:
        raise NotExecutableError(
            f"it is {len(pickled) >> 20} MiB pickled, and every worker would hold a copy"
        )
    return pickled


def _no_fork() -> str | None:
    if sys.platform != "linux":
        return f"forking a process that computes is not safe on {sys.platform}"
    torch = sys.modules.get("torch")
    for name in ("cuda", "xpu", "hpu"):
        device = getattr(torch, name, None)
        if device is not None and getattr(device, "is_initialized", bool)():
            return f"the training process uses {name}, which no fork of it could use"
    return None


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Keep multiprocessing from running the user's script again in the worker, guarded by ``__name__`` or not."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextlib.contextmanager
def _quiet_fork() -> Iterator[None]:
    """Fork although there may be threads: the worker keeps to one thread, and to what it alone uses."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
        yield
