"""Taking a stopped run up again: the command line that it was started with, run once more."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import click

from automode.cli.sessions import session_argument
from automode.cli.tables import safe
from automode.errors import ConflictError, NotExecutableError, SessionError, UsageError
from automode.session import Session
from automode.session.taking_up import ENVIRONMENT, checkpointed, command_of, is_finished
from automode.session.writer_lock import WriterLock


@click.command()
@session_argument
@click.option("--yes", "-y", is_flag=True, help="Do not ask before the command is run.")
def resume(session: Path, yes: bool) -> None:
    """Go on with a stopped run: its own command line, run again.

    The session remembers how its script was started, and in which folder; the script then goes on from the newest checkpoint
    instead of beginning anew. Variables of the environment are not remembered: set those that the script needs.
    """
    folder = session.resolve()
    command, cwd, where = _of(folder)
    click.echo(safe(f"{where}\n  cd {shlex.quote(cwd)}\n  {shlex.join(command)}"))
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("there is no terminal to ask on; give --yes to run this command")
        click.confirm("Run it?", default=True, abort=True)
    _run(command, cwd, folder)


def _of(folder: Path) -> tuple[list[str], str, str]:
    """Give the command line, its folder and where the run stands; refuse a run that cannot go on."""
    with Session.open(folder) as session:
        records, started, finished = checkpointed(session), command_of(session.header), is_finished(session)
        watched = session.header.get("watched", False)
    if watched:
        raise NotExecutableError(
            f"{folder} is of a loop that was watched, which automode cannot resume: its place in the data is in its own code; run its "
            "script again for a session of its own"
        )
    if finished:
        raise ConflictError(
            f"{folder} has come to its end, so nothing is left to resume; to train on, give its script a larger max_epochs and "
            f"Trainer(resume={str(folder)!r})"
        )
    if not records:
        raise SessionError(
            f"{folder} holds no checkpoint to go on from; it was stopped before its first, or run with checkpoint_every=None"
        )
    if started is None:
        raise SessionError(
            f"{folder} does not say how to start its script again (it was typed, came from standard input or from a notebook); "
            f"start it yourself with {ENVIRONMENT}={shlex.quote(str(folder))} or Trainer(resume=...)"
        )
    command, cwd = started
    if not Path(cwd).is_dir() or not Path(command[0]).exists():
        missing = cwd if not Path(cwd).is_dir() else command[0]
        raise SessionError(
            f"{missing} is no longer there, and the run was started with it; start its script yourself with "
            f"{ENVIRONMENT}={shlex.quote(str(folder))}"
        )
    WriterLock(folder).release()  # raises where the run still goes on
    last = records[-1].body
    return command, cwd, f"{folder} stopped at step {last['step']} ({last['why']}); it was started by"


def _run(command: list[str], cwd: str, folder: Path) -> None:
    """Become the command, with this terminal and these signals; where a system cannot, wait for it."""
    environment = {**os.environ, ENVIRONMENT: str(folder)}
    sys.stdout.flush()
    if os.name == "posix":
        os.chdir(cwd)
        os.execve(command[0], command, environment)  # noqa: S606  # no shell: the recorded arguments as they were
    done = subprocess.run(command, cwd=cwd, env=environment, check=False)  # noqa: S603  # likewise
    raise SystemExit(done.returncode)
