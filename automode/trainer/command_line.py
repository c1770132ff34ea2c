"""How this process was started, so that a run can be started again the same way."""

from __future__ import annotations

import os
import sys
from typing import Any

_WITH_VALUE = frozenset({"-W", "-X", "--check-hash-based-pycs"})
_NOTEBOOKS = ("ipykernel", "colab_kernel_launcher", "jupyter")


def started() -> dict[str, Any]:
    """Say it as plain data: the interpreter, its arguments (None where they would not run the same again), the folder."""
    arguments = sys.orig_argv[1:]
    return {
        "executable": sys.executable,
        "arguments": arguments if sys.executable and runs_again(arguments) else None,
        "cwd": os.getcwd(),  # noqa: PTH109  # as text
    }


def runs_again(arguments: list[str]) -> bool:
    """Tell whether an interpreter given these arguments would run the same program again.

    It would not where the program came from standard input, was typed, or is a notebook's kernel.

    Args:
        arguments: What followed the interpreter on the command line.
    """
    waiting = iter(arguments)
    for argument in waiting:
        if argument in ("-", "-i"):
            return False
        if argument in ("-c", "-m") or not argument.startswith("-"):
            program = next(waiting, "") if argument in ("-c", "-m") else argument
            return bool(program) and not any(name in program for name in _NOTEBOOKS if argument != "-c")
        if argument in _WITH_VALUE:
            next(waiting, None)
    return False
