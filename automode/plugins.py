"""Rules of third parties: found by entry point, loaded only when somebody asks.

A distribution offers a rule in its ``pyproject.toml``::

    [project.entry-points."automode.rules"]
    my_rule = "my_package.rules:MyRule"

The object is a rule (:class:`automode.planner.rules.base.Rule`), or a class that makes one without arguments. Its
reason is one of the planner's; it takes the place of the built-in rule with that reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Final, cast

from automode.errors import UsageError
from automode.planner.rules import BUILT_IN
from automode.planner.rules.base import Rule

GROUP: Final = "automode.rules"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugin:
    """An installed rule.

    Attributes:
        name: Name of the entry point.
        distribution: Name and version of the distribution that offers it, as they belong into a session's record.
        rule: The rule.
    """

    name: str
    distribution: str
    rule: Rule


def plugins() -> tuple[Plugin, ...]:
    """Load every installed rule, in order of name.

    Raises:
        UsageError: One cannot be loaded, or is no rule; the message names the distribution.
    """
    return tuple(_load(entry) for entry in sorted(entry_points(group=GROUP), key=lambda e: (e.name, e.value)))


def _load(entry: EntryPoint) -> Plugin:
    dist = entry.dist
    origin = f"{dist.name} {dist.version}" if dist is not None else "an unknown distribution"
    where = f"the rule {entry.name!r} ({entry.value}) of {origin}"
    try:
        found = entry.load()
        made = found() if isinstance(found, type) else found
    except Exception as error:
        raise UsageError(f"{where} cannot be loaded: {error!r}; repair or uninstall {origin}") from error
    known = [rule.id for rule in BUILT_IN]
    if getattr(made, "id", None) not in known or not callable(getattr(made, "propose", None)):
        raise UsageError(
            f"{where} is no rule: it needs a method `propose` and an `id`, one of {', '.join(known)}"
        )
    return Plugin(name=entry.name, distribution=origin, rule=cast("Rule", made))
