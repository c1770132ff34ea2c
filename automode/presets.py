"""The policies and plan-card templates that ship with automode, by name.

In a wheel they lie inside the package (``automode/plans/``). An editable install has no copy: there the repository's own
``plans/`` folder is read, so that an edit counts at once. Only the text is returned; whoever asked parses it.
"""

from __future__ import annotations

import difflib
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from automode.errors import AutomodeError, UsageError

_SUFFIX = ".yaml"


def preset_names() -> tuple[str, ...]:
    """List the packaged presets.

    Returns:
        Names in alphabetical order: paths below ``plans/`` with ``/`` between folders and without ``.yaml``.

    Raises:
        AutomodeError: This installation holds no presets.
    """
    return tuple(sorted(_presets()))


def preset_text(name: str) -> str:
    """Read one preset.

    Args:
        name: One of :func:`preset_names`.

    Returns:
        The YAML text as it stands in the file.

    Raises:
        UsageError: There is no preset of this name.
        AutomodeError: This installation holds no presets.
    """
    presets = _presets()
    if name not in presets:
        near = difflib.get_close_matches(name.removesuffix(_SUFFIX), presets, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"there is no preset {name!r}; {hint}known presets: {', '.join(sorted(presets))}")
    return presets[name].read_text(encoding="utf-8")


def _presets() -> dict[str, Traversable]:
    root = _plans()
    found = dict(_walk(root, ""))
    if not found:
        raise AutomodeError(f"this installation of automode holds no presets in {root}; install it again")
    return found


def _plans() -> Traversable:
    package = resources.files("automode")
    packaged = package / "plans"
    if packaged.is_dir():
        return packaged
    if isinstance(package, Path) and (package.parent / "pyproject.toml").is_file():
        return package.parent / "plans"
    raise AutomodeError(
        f"this installation of automode has lost its presets ({packaged} is missing); install it again"
    )


def _walk(folder: Traversable, prefix: str) -> list[tuple[str, Traversable]]:
    found: list[tuple[str, Traversable]] = []
    if not folder.is_dir():
        return found
    for entry in folder.iterdir():
        if entry.is_dir():
            found += _walk(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(_SUFFIX):
            found.append((prefix + entry.name.removesuffix(_SUFFIX), entry))
    return found
