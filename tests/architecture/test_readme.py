"""What the README shows works as printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from automode.cli.main import COMMANDS

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")

FENCE = re.compile(r"^(?P<above>[^\n]*)\n```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
RUNNABLE = "<!-- runnable -->"
NOT_RUNNABLE = re.compile(r"<!-- not runnable: \S.* -->")


def shown_commands() -> str:
    """Return the text of the console blocks and of the inline code."""
    blocks = re.findall(r"^```(?:console|bash|sh)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    inline = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", README)
    return "\n".join([*blocks, *inline])


def test_every_python_block_says_whether_it_runs() -> None:
    above = [match["above"] for match in FENCE.finditer(README)]
    assert len(above) == README.count("```python")
    assert [line for line in above if line != RUNNABLE and not NOT_RUNNABLE.fullmatch(line)] == []


def test_the_runnable_blocks_run_from_an_empty_folder(tmp_path: Path) -> None:
    blocks = [match["code"] for match in FENCE.finditer(README) if match["above"] == RUNNABLE]
    assert blocks, "the README shows nothing that a reader could run"
    for number, code in enumerate(blocks):
        folder = tmp_path / str(number)
        folder.mkdir()
        script = folder / "shown.py"
        script.write_text(code, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, str(script)],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert done.returncode == 0, f"{code}\n{done.stderr}"


def test_the_make_targets_that_it_names_exist() -> None:
    targets = set(
        re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    named = set(re.findall(r"^\s*(?:\$ )?make ([a-z-]+)", shown_commands(), re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_the_automode_commands_that_it_names_exist() -> None:
    named = set(re.findall(r"^\s*(?:\$ )?automode ([a-z-]+)", shown_commands(), re.MULTILINE))
    assert named <= set(COMMANDS)


def test_the_files_that_it_links_to_or_runs_exist() -> None:
    linked = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", README) if "://" not in link]
    run = re.findall(r"python ((?:examples|benchmarks)/\S+\.py)", shown_commands())
    assert linked
    assert [name for name in linked + run if not (REPOSITORY / name).exists()] == []
