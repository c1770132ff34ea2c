"""Whether a process can be started again the way it was started."""

from __future__ import annotations

import sys

import pytest

from automode.trainer.command_line import runs_again, started


@pytest.mark.parametrize(
    ("arguments", "again"),
    [
        (["train.py", "--lr", "0.1"], True),
        (["-u", "-W", "error", "-X", "dev", "train.py"], True),
        (["-m", "package.train", "-c"], True),
        (["-c", "import train"], True),
        ([], False),
        (["-"], False),
        (["-i"], False),
        (["-u"], False),
        (["-W", "train.py"], False),
        (["-m"], False),
        (["-m", "ipykernel_launcher", "-f", "kernel.json"], False),
        (["/usr/lib/python3/dist-packages/ipykernel_launcher.py", "-f", "kernel.json"], False),
    ],
)
def test_it_tells_programs_from_what_was_typed(arguments: list[str], again: bool) -> None:
    assert runs_again(arguments) is again


def test_this_process_knows_how_it_was_started() -> None:
    found = started()
    assert found["executable"] == sys.executable
    assert found["arguments"] is None or found["arguments"] == sys.orig_argv[1:]
