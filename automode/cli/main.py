"""The console script ``automode``: one group whose commands load when they are called.

A command lives in a module of this room and is named in ``COMMANDS`` with the line that ``automode --help`` prints, so that
neither ``--help`` nor ``--version`` imports the command's module, nor torch behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import click

from automode import AutomodeError, UsageError, __version__


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


COMMANDS: Mapping[str, CommandSource] = {}


class _Refused(click.ClickException):
    """The caller asked for something that cannot be had; exit code 2, as click's own usage errors."""

    exit_code = 2


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

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error that automode raises on purpose is a message, not a traceback."""
        try:
            return super().invoke(ctx)
        except UsageError as error:
            raise _Refused(str(error)) from error
        except AutomodeError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=LazyGroup, sources=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="automode")
def main() -> None:
    """Read, decide and replay what automode did in a training run."""
