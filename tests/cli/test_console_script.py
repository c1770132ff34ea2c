"""The console script answers at once and turns our errors into messages."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import automode
from automode.cli.main import COMMANDS, CommandSource, LazyGroup, main
from automode.errors import AutomodeError, CardError, UsageError
from automode.session import SessionStore

HEAVY = ("torch", "numpy", "pydantic", "yaml", "sklearn", "scipy", "optuna", "lightning", "sqlite3")


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_version_and_help_load_nothing_heavy(option: str) -> None:
    code = f"""
import sys
from automode.cli.main import main
try:
    main([{option!r}])
except SystemExit as end:
    assert end.code == 0, end.code
print(*(name for name in {HEAVY!r} if name in sys.modules), sep=",", file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=200
    )
    assert (done.returncode, done.stderr) == (0, "\n")
    assert "automode" in done.stdout


def test_no_command_needs_torch(tmp_path: Path) -> None:
    SessionStore.create(tmp_path / "run", header={}).close()
    code = f"""
import sys
from importlib import import_module
from automode.cli.main import COMMANDS, main
for source in COMMANDS.values():
    import_module(source.module)
for command in ("cards", "log", "lineage", "trials", "replay"):
    main([command, {str(tmp_path / "run")!r}], standalone_mode=False)
main(["replay", {str(tmp_path / "run")!r}, "--policy", "aggressive"], standalone_mode=False)
print("torch" in sys.modules, file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=200
    )
    assert (done.returncode, done.stderr) == (0, "False\n")


def test_version_is_the_one_of_the_package() -> None:
    done = CliRunner().invoke(main, ["--version"])
    assert done.output.strip() == f"automode, version {automode.__version__}"


def test_every_command_loads_and_its_summary_is_its_own() -> None:
    context = click.Context(main)
    own = {
        name: command.get_short_help_str(limit=1000)
        for name in COMMANDS
        if (command := main.get_command(context, name))
    }
    assert own == {name: source.summary for name, source in COMMANDS.items()}


def test_help_lists_every_command() -> None:
    listed = CliRunner().invoke(main, ["--help"]).output
    assert [name for name in COMMANDS if f"\n  {name} " not in listed] == []


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> LazyGroup:
    """A group with a command that fails as its argument says, and one whose module must never be loaded."""
    raised: dict[str, Exception] = {
        "usage": UsageError("mend this"),
        "card": CardError("mend that"),
        "other": AutomodeError("disk gone"),
        "file": PermissionError(13, "Permission denied", "x.csv"),
    }

    @click.command()
    @click.argument("how")
    def fail(how: str) -> None:
        raise raised[how]

    module = types.ModuleType("commands_for_this_test")
    module.fail = fail  # type: ignore[attr-defined]
    module.wrong = "not a command"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    source = {
        "fail": CommandSource(module=module.__name__, attribute="fail", summary="Fail as told."),
        "wrong": CommandSource(module=module.__name__, attribute="wrong", summary="Is no command."),
        "far": CommandSource(module="no_such_module_anywhere", attribute="x", summary="Cannot load."),
    }
    return LazyGroup(name="automode", sources=source)


def test_help_does_not_load_the_commands_that_it_lists(group: LazyGroup) -> None:
    done = CliRunner().invoke(group, ["--help"])
    assert done.exit_code == 0
    assert "Cannot load." in done.output


@pytest.mark.parametrize(
    ("how", "message", "code"),
    [
        ("usage", "mend this", 1),
        ("card", "mend that", 1),
        ("other", "disk gone", 1),
        ("file", "[Errno 13] Permission denied: 'x.csv'", 1),
    ],
)
def test_our_errors_are_messages_with_an_exit_code(
    group: LazyGroup, how: str, message: str, code: int
) -> None:
    done = CliRunner().invoke(group, ["fail", how])
    assert (done.exit_code, done.output) == (code, f"Error: {message}\n")


def test_other_errors_keep_their_traceback(group: LazyGroup) -> None:
    done = CliRunner().invoke(group, ["fail", "unknown"])
    assert isinstance(done.exception, KeyError)


def test_an_unknown_command_is_refused(group: LazyGroup) -> None:
    done = CliRunner().invoke(group, ["fial"])
    assert done.exit_code == 1  # 2 would say that cards are waiting
    assert "fial" in done.output


@pytest.mark.parametrize("arguments", [["--nonsense"], ["fail"], ["fail", "usage", "--nonsense"], []])
def test_wrong_usage_is_an_error_and_no_waiting_card(group: LazyGroup, arguments: list[str]) -> None:
    assert CliRunner().invoke(group, arguments).exit_code == 1


def test_a_source_that_is_no_command_is_our_own_mistake(group: LazyGroup) -> None:
    done = CliRunner().invoke(group, ["wrong"])
    assert isinstance(done.exception, TypeError)
