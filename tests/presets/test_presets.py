"""Presets are had by name, and only by name."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import automode
from automode.errors import AutomodeError, UsageError
from automode.presets import preset_names, preset_text


def test_names_are_sorted_and_each_is_yaml() -> None:
    names = preset_names()
    assert names == tuple(sorted(names))
    assert all(isinstance(yaml.safe_load(preset_text(name)), dict) for name in names)


def test_the_text_is_what_the_file_says() -> None:
    name = preset_names()[0]
    plans = Path(automode.__file__).parents[1] / "plans"
    assert preset_text(name) == (plans / f"{name}.yaml").read_text(encoding="utf-8")


def test_a_misspelt_name_is_refused_with_the_nearest() -> None:
    name = preset_names()[0]
    with pytest.raises(UsageError, match=f"did you mean '{name}'"):
        preset_text(name[:-1])


def test_the_file_name_is_no_name_but_leads_to_it() -> None:
    name = preset_names()[0]
    with pytest.raises(UsageError, match=f"did you mean '{name}'"):
        preset_text(f"{name}.yaml")


@pytest.mark.parametrize("name", ["", "../pyproject", "/etc/hosts", "..", "."])
def test_a_path_is_no_name(name: str) -> None:
    with pytest.raises(UsageError, match="there is no preset"):
        preset_text(name)


@pytest.mark.parametrize("beside", [[], ["pyproject.toml"]], ids=["installed", "checkout"])
def test_an_installation_that_lost_its_presets_says_so(tmp_path: Path, beside: list[str]) -> None:
    package = tmp_path / "automode"
    package.mkdir()
    source = Path(automode.__file__).parent
    for name in ("__init__.py", "errors.py", "presets.py"):
        shutil.copy(source / name, package / name)
    for name in beside:
        (tmp_path / name).touch()
    code = "import automode.presets as p, automode.errors as e\ntry: p.preset_names()\nexcept e.AutomodeError as x: print(x)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "presets" in done.stdout, done.stderr
    assert "install it again" in done.stdout
    assert not issubclass(AutomodeError, UsageError)
