"""List the benchmarks: each is one command, and prints the table that the README quotes."""

from __future__ import annotations

import ast
from pathlib import Path


def main() -> None:
    for script in sorted(Path(__file__).parent.glob("[!_]*.py")):
        documentation = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
        print(f".venv/bin/python benchmarks/{script.name}\n    {documentation.partition(chr(10))[0]}")


if __name__ == "__main__":
    main()
