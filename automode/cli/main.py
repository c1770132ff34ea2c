"""The console script ``automode``: one group whose commands load when they are called.

A command lives in a module of this room and is named in ``COMMANDS`` with the line that ``automode --help`` prints, so that
neither ``--help`` nor ``--version`` imports the command's module, nor torch behind it.

Exit codes: 0 fine, 1 any error (or, for ``replay``, a difference), 2 cards are waiting (``cards`` and ``plan``).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import click

from automode import AutomodeError, __version__


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandSource:
    """Where a command lives.

    Attributes:
        module: Absolute module name.
        attribute: The ``click.Command`` in that module.
        summary: One line for the group's help; a test holds it equal to the command's own short help.
    """

    module: str
    attribute: str
    summary: str


def _from(module: str, **summaries: str) -> dict[str, CommandSource]:
    """Commands of one module of this room; each stands there under its own name."""
    return {
        name: CommandSource(module=f"automode.cli.{module}", attribute=name, summary=summary)
        for name, summary in summaries.items()
    }


COMMANDS: Mapping[str, CommandSource] = {
    **_from(
        "reading",
        cards="List a session's plan cards (exit code 2 when one waits for you).",
        show="Print a card as YAML, and what became of it.",
        story="Tell why a card was made and what became of it, cause by cause.",
        trials="Show each card's ladder: what the trials reported, who was promoted and why, and who trained otherwise.",
        lineage="Draw the family tree of the weights.",
        log="Print the session's events in order.",
    ),
    **_from("ledger", ledger="Show or export how each training sample has fared, all of them or a slice."),
    **_from("reviewing", suspects="List the samples that are probably mislabelled, for you to review."),
    **_from("laboratory", replay="Decide everything again and compare (exit code 1 on a difference)."),
    **_from(
        "answering",
        approve="Let a card run.",
        reject="Refuse a card that has not begun.",
        revise="Send a card back with a note on what should be different.",
        edit="Change a card in your editor; an approved card has to be approved again.",
        submit="Hand in a card of your own (a YAML file, or - for standard input).",
        cancel="Stop a card, running or not.",
        mode="Switch the mode of a running session.",
        rollback="Undo an adoption: the weights from before it come back.",
    ),
    **_from(
        "planning",
        plan="Show the cards that wait for you, and save one (exit code 2 when one waits).",
        apply="Let a saved card run, as it was saved or as you have edited it.",
    ),
    **_from(
        "control",
        checks="Print what the health checks of a session have found.",
        ctl="Pause, step, stop, test, change or check a run that trains in another process.",
        ls="List the sessions under a folder (automode-runs), the newest last, and what each run does.",
        status="Say whether a session's run trains, is paused, is held, has ended or was killed.",
    ),
    **_from("resuming", resume="Go on with a stopped run: its own command line, run again."),
    **_from(
        "signals",
        signals="Run the planner's signals and rules over a loss curve (CSV, or TensorBoard's event files).",
    ),
    **_from(
        "policies",
        policy="Check and compare policies.",
        schema="Print the JSON schema of plan cards or policies.",
    ),
}


class LazyGroup(click.Group):
    """A group that imports a command's module only when that command is called.

    Args:
        sources: Command name to its source.
        **attrs: What ``click.Group`` takes.
    """

    def __init__(self, *, sources: Mapping[str, CommandSource], **attrs: Any) -> None:
        super().__init__(**attrs)
        self._sources = sources

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the command names in alphabetical order."""
        return sorted({*super().list_commands(ctx), *self._sources})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load the command of this name, or return None when there is none."""
        source = self._sources.get(cmd_name)
        if source is None:
            return super().get_command(ctx, cmd_name)
        command = getattr(import_module(source.module), source.attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"{source.module}.{source.attribute} is no click command: {command!r}")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the summaries without loading a single command."""
        rows = [
            (name, self._sources[name].summary) for name in self.list_commands(ctx) if name in self._sources
        ]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the group's own arguments; what is wrong with them ends in exit code 1, as every error does."""
        with _errors_as_messages():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error that automode raises on purpose is a message, not a traceback."""
        with _errors_as_messages():
            return super().invoke(ctx)


@contextmanager
def _errors_as_messages() -> Iterator[None]:
    try:
        yield
    except click.UsageError as error:
        # Click would exit with 2, which says that cards are waiting.
        setattr(error, "exit_code", 1)  # noqa: B010 (declared for the class, read from the instance)
        raise
    except AutomodeError as error:
        from automode.cli.tables import safe  # not before it is needed: --help stays quick

        raise click.ClickException(safe(str(error))) from error
    except OSError as error:
        if error.errno == errno.EPIPE:  # who read the output has gone; click ends quietly
            raise
        from automode.cli.tables import safe

        raise click.ClickException(safe(str(error))) from error


@click.group(cls=LazyGroup, sources=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="automode")
def main() -> None:
    """Read, decide and replay what automode did in a training run."""
