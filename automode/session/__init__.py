"""The only room that touches files: the session's log and scalars, checkpoints, artifacts, inbox and log file.

``SessionStore`` writes, ``Session`` reads. Modules that need torch (``checkpoints``, ``rng_state``) are imported by
name, so that reading a session does not load it.
"""

from __future__ import annotations

from automode.session.records import CardRow, CheckpointRow, LineageRow, Record
from automode.session.session import Session
from automode.session.store import SessionStore

__all__ = ["CardRow", "CheckpointRow", "LineageRow", "Record", "Session", "SessionStore"]
