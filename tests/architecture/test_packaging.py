"""The wheel holds the package and its presets, and nothing that belongs to the checkout."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

PRINT_PRESETS = """
import site, sys
site.addsitedir(sys.argv[1])
import automode, automode.presets
print(automode.__file__)
for name in automode.presets.preset_names():
    automode.presets.preset_text(name)
    print(name)
"""


def repository_presets() -> list[str]:
    plans = REPOSITORY / "plans"
    return sorted(path.relative_to(plans).with_suffix("").as_posix() for path in plans.rglob("*.yaml"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("automode-*.whl")
    return built


def presets_seen_from(folder: Path, site: Path) -> tuple[Path, list[str]]:
    """Return where an interpreter with only this site folder finds automode, and the presets that it can read."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", PRINT_PRESETS, str(site)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    package, *names = done.stdout.splitlines()
    return Path(package).parent, names


def test_the_wheel_holds_the_package_its_presets_its_type_marker_and_its_license(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    presets = {f"automode/plans/{name}.yaml" for name in repository_presets()}
    assert presets
    assert presets <= names
    assert {"automode/__init__.py", "automode/py.typed", "automode/cli/main.py"} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_wheel_holds_nothing_else(wheel: Path) -> None:
    roots = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"automode"}


def test_an_installed_wheel_reads_the_presets_that_it_carries(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    package, names = presets_seen_from(tmp_path, site)
    assert package == site / "automode"
    assert names == repository_presets()


def test_a_wheel_on_the_search_path_reads_them_without_being_unpacked(wheel: Path, tmp_path: Path) -> None:
    package, names = presets_seen_from(tmp_path, wheel)
    assert package == wheel / "automode"
    assert names == repository_presets()


def test_an_editable_install_reads_the_presets_of_the_checkout_and_copies_none(tmp_path: Path) -> None:
    built = tmp_path / "built"
    built.mkdir()
    code = "import sys; from hatchling.build import build_editable; build_editable(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(built)], cwd=REPOSITORY, check=True, timeout=120)
    site = tmp_path / "site"
    (editable,) = built.glob("*.whl")
    zipfile.ZipFile(editable).extractall(site)
    package, names = presets_seen_from(tmp_path, site)
    assert package == REPOSITORY / "automode"
    assert names == repository_presets() != []
    assert list(site.rglob("*.yaml")) == []
