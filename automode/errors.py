"""The exception tree: every error that automode raises on purpose, drawn once.

::

    AutomodeError
    ├── UsageError (ValueError)        you called something with a value it cannot take
    │   ├── CardError                  a plan card that cannot be read, or says something impossible
    │   ├── PolicyError                a policy that cannot be read, or contradicts itself
    │   └── NotExecutableError         a valid request that this version or this run cannot carry out
    ├── ConflictError                  somebody else changed it first (revision, stale base, wrong state)
    ├── DataError (ValueError)         the loader, batch or loss is of a kind that cannot be trained on
    ├── MergeError (ValueError)        models or states that cannot be merged by the method asked for
    ├── SessionError                   the session folder cannot be read or written
    │   ├── SessionCorruptError        what is stored contradicts itself or its digest
    │   └── SessionBusyError           another process writes this session
    ├── ReplayDifferenceError          a replay came to another decision than the session recorded
    └── SchedulerError                 a report or job that the scheduler's protocol forbids

The class says who must act: a ``UsageError`` the caller, a ``ConflictError`` the person who came second,
a ``SessionError`` whoever looks after the disk. Messages say what came, what was needed and what to do.
"""

from __future__ import annotations


class AutomodeError(Exception):
    """Root of every error that automode raises on purpose."""


class UsageError(AutomodeError, ValueError):
    """An argument or a file holds a value that cannot be taken."""


class CardError(UsageError):
    """A plan card cannot be read, or says something impossible."""


class PolicyError(UsageError):
    """A policy cannot be read, or contradicts itself."""


class NotExecutableError(UsageError):
    """A valid request that this version, or this run, cannot carry out."""


class ConflictError(AutomodeError):
    """Somebody else changed it first: a revision, a base or a state is no longer what the request assumed."""


class DataError(AutomodeError, ValueError):
    """A loader, a batch or a loss is of a kind that cannot be trained on."""


class MergeError(AutomodeError, ValueError):
    """Models or states that cannot be merged by the method asked for."""


class SessionError(AutomodeError):
    """A session folder cannot be read or written."""


class SessionCorruptError(SessionError):
    """What a session stores contradicts itself or its digest."""


class SessionBusyError(SessionError):
    """Another process is writing this session."""


class ReplayDifferenceError(AutomodeError):
    """A replay came to another decision than the session recorded."""


class SchedulerError(AutomodeError):
    """A report or a job that the scheduler's protocol forbids."""
