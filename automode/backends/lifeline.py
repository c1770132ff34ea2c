"""A worker's side of staying no orphan: it dies with the process that it works for, and shares no file position with it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

HEARTBEAT_SECONDS = 0.5
_PR_SET_PDEATHSIG = 1


def die_with_parent(beat: Callable[[], None]) -> None:
    """End this process at once when the training process ends, however that ends; until then, give signs of life.

    A pipe alone would not do: its other end may have been inherited by processes that outlive the parent (a data
    loader's workers). So the kernel is asked to kill this process (Linux; for a worker that another process forked,
    with that one), and a thread watches the parent itself.

    Args:
        beat: Called every half second from that thread, as long as the parent lives.
    """
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None:
        raise RuntimeError("a worker is started by multiprocessing, and this process was not")
    forker = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != forker:  # it died before the kernel knew
            os._exit(1)
    handles = [parent.sentinel]
    if hasattr(os, "pidfd_open"):
        try:
            handles.append(os.pidfd_open(parent.pid))
        except ProcessLookupError:
            os._exit(1)
        except OSError:  # an old kernel, or a sandbox that forbids it: the other signs must do
            pass
    threading.Thread(target=_watch, args=(handles, forker, beat), daemon=True, name="lifeline").start()


def _watch(handles: list[int], forker: int, beat: Callable[[], None]) -> None:
    while not wait(handles, HEARTBEAT_SECONDS) and os.getppid() == forker:
        beat()
    os._exit(1)


def leave_interrupts_to_parent() -> None:
    """Ctrl-C reaches every process of a terminal, and the parent decides what becomes of this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def own_inherited_files() -> None:
    """After a fork (Linux): open every inherited regular file anew, so that reading here moves no position there.

    Objects that the parent made are never finalised here: their files, locks and connections are the parent's.

    Raises:
        OSError: A file cannot be opened again.
    """
    import fcntl

    gc.freeze()
    for fd in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        if fd <= 2 or not _is_regular(fd):
            continue
        flags = fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_APPEND)
        fresh = os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)
        with contextlib.suppress(OSError):
            os.lseek(fresh, os.lseek(fd, 0, os.SEEK_CUR), os.SEEK_SET)
        os.dup2(fresh, fd, inheritable=os.get_inheritable(fd))
        os.close(fresh)


def _is_regular(fd: int) -> bool:
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode)
    except OSError:  # the listing's own descriptor is gone by now
        return False
