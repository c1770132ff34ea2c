"""Write the reference pages from what they describe: card.md and policy.md from the models, cli.md from the commands.

    python docs/generate.py            # write the pages
    python docs/generate.py --check    # exit code 1 when a page is stale

Types and bounds are worded as the error messages word them; what runs is read from the capability table.
"""
# ruff: noqa: T201, TID251  (a script that prints and writes files)

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import Any

import click

from automode.cli.main import COMMANDS
from automode.planner.capability import TABLE
from automode.planner.cards import TRANSITIONS, CardState, PlanCard
from automode.planner.policy import Policy
from automode.planner.schema_problems import describe, schema_of
from automode.planner.yaml_writer import flow
from automode.presets import preset_names, preset_text

FOLDER = Path(__file__).parent
MARK = "<!-- Written by `python docs/generate.py`: edit the models or the commands, not this page. -->"
Schema = Mapping[str, Any]
Runs = Callable[[str, str, Schema], str]
"""Model, field and the model's schema to what the last column says."""

TOLD = frozenset(
    {
        *(f"PlanCard.{name}" for name in ("schema", "id", "rev", "session", "step", "created_by", "because")),
        *(f"PlanCard.{name}" for name in ("cost", "base", "diagnostics")),
        "Policy.schema",
        "Policy.name",
        "SelectKMeans.window",
        "Base.step",
        "Base.checkpoint",
        *(f"Cost.{name}" for name in ("sample_passes", "share_of_remaining", "memory_mib", "seconds")),
    }
)
"""Fields that tell something and ask for nothing."""

PARTS = {
    "Variant": "variant",
    "Adjustment": "adjustment",
    "TrainingRecipe": "training_recipe",
    "Acceptance": "acceptance",
}
"""Models whose fields stand in the capability table one by one."""

KINDS = {
    "Select": "selection",
    "Merge": "merge_recipe",
    "Gate": "gate_recipe",
    "Relabel": "training_recipe.relabel",
}
"""Beginnings of the names of models that stand there by their kind."""

STATES = {
    CardState.PROPOSED: "made, and waiting for an answer",
    CardState.REVISE: "sent back by a person, and waiting for an edit",
    CardState.APPROVED: "may run, and waits for its turn",
    CardState.RUNNING: "its trials train, or its merge waits for the end of the run",
    CardState.ACCEPTED: "the evidence is for it; its weights are being put in place",
    CardState.ADOPTED: "its weights are the trunk's; a mixture is stored beside the trunk",
    CardState.REFUSED: "a person said no, before it ran or while it did",
    CardState.EXPIRED: "nobody answered in time, or the run ended",
    CardState.STALE: "the policy or the lineage is no longer what it was made against",
    CardState.REJECTED: "significantly worse than the control, which is kept",
    CardState.INCONCLUSIVE: "neither better nor worse as far as the evidence goes; the control is kept",
    CardState.FAILED: "something could not be carried out; the run went on",
    CardState.ROLLED_BACK: "its adoption was undone",
    CardState.APPLIED: "the trunk trains on as the adjustment says; no evidence was asked for",
}

CARD_INTRO = """\
A plan card is YAML that a person can read, edit, approve or refuse. Unknown keys, repeated keys and values out of bounds are refused
with the line, what came and what was expected. `automode schema card` prints the same as JSON schema, and [plans/cards](../plans/cards)
holds a template of each reason.

**Runs** says whether this version carries the field out: *told* marks what only informs. What does not run, or cannot run in this
run (no sample ids, no held-out data, another task), is refused with the reason before anything is spent.

A card of your own (`automode submit`) leaves out what the run fills in: `id`, `rev`, `session`, `step`, `created_by`, `cost` and `base`;
`reason`, `because` and `cooldown_steps` it may leave out. An edit cannot change where a card comes from and what was seen: `id`, `session`,
`step`, `created_by`, `action`, `reason`, `base` and `diagnostics`.
"""

POLICY_INTRO = """\
The policy is what a person allows automode to do. `Trainer(policy=...)` takes a `Policy`, the name of a preset in
[plans](../plans) or the path of a YAML file; what a file does not say has its default. `automode policy check FILE` validates one,
`automode policy show FILE` prints it with every value written out. The policy's digest stands on every card: a card that was
made under another policy is stale. B is the planning budget, `trend.budget`.
"""

CLI_INTRO = """\
SESSION is a session's folder, as the run prints it, or `last`: the session under `automode-runs` in the current folder that was
written last. CARD is a card's id or as much of its beginning as only one card has. No command changes a session: what asks for
something posts a request, which the run takes up between two steps; its answer is waited for a few seconds.

Exit codes: 0 fine, 1 any error (or, for `replay`, a difference), 2 cards are waiting (`cards` and `plan`).
"""


def pages() -> dict[str, str]:
    """Return every generated page's text by its file name."""
    return {"card.md": card_page(), "policy.md": policy_page(), "cli.md": cli_page()}


def card_page() -> str:
    """Write the reference of the plan card."""
    lines = ["# The plan card, field by field", "", MARK, "", CARD_INTRO, "## States", ""]
    rows = [
        (f"`{state}`", STATES[state], ", ".join(f"`{s}`" for s in sorted(after)) or "nothing: it is final")
        for state, after in TRANSITIONS.items()
    ]
    lines += table(("state", "meaning", "leads to"), rows)
    lines += ["", "An edit makes a new revision and returns the card to `proposed`.", "", "## Templates", ""]
    lines += presets(name for name in preset_names() if "/" in name)
    lines += ["", "## The card", ""]
    schema = schema_of(PlanCard)
    titles = dict(parts(schema, schema["$defs"], ""))
    lines += fields("PlanCard", schema, schema["$defs"], titles, card_runs)
    for name, title in titles.items():
        part = schema["$defs"][name]
        lines += ["", f"## {title}", "", sentence(part)]
        lines += ["", *fields(name, part, schema["$defs"], titles, card_runs)]
    return "\n".join([*lines, ""])


def policy_page() -> str:
    """Write the reference of the policy."""
    schema = schema_of(Policy)
    lines = ["# The policy, value by value", "", MARK, "", POLICY_INTRO, "## Presets", ""]
    lines += presets(name for name in preset_names() if "/" not in name)
    lines += ["", "## The policy", ""]
    groups = {n: p["$ref"].rpartition("/")[2] for n, p in schema["properties"].items() if "$ref" in p}
    own = {**schema, "properties": {n: p for n, p in schema["properties"].items() if n not in groups}}
    lines += fields("Policy", own, schema["$defs"], {}, policy_runs)
    for group, name in groups.items():
        part = schema["$defs"][name]
        lines += ["", f"## {group}", "", sentence(part)]
        lines += ["", *fields(name, part, schema["$defs"], {}, policy_runs)]
    return "\n".join([*lines, ""])


def presets(names: Iterable[str]) -> list[str]:
    """List files of ``plans/`` with what they say of themselves in their first remarks."""
    rows = [
        (f"[`{name.rpartition('/')[2]}`](../plans/{name}.yaml)", about_preset(preset_text(name)))
        for name in names
    ]
    return table(("name", "what it is"), rows)


def about_preset(text: str) -> str:
    """Return the remarks that a file begins with, those that only say what kind of file it is left out."""
    remarks = [
        line.removeprefix("#").strip()
        for line in takewhile(lambda line: line.startswith("#"), text.splitlines())
    ]
    told = " ".join(remark for remark in remarks if not remark.startswith("Template of a plan card"))
    return told.removeprefix("automode policy").strip(" :").removeprefix("for ").strip() or "the defaults"


def cli_page() -> str:
    """Write the reference of the command line."""
    lines = ["# The command line", "", MARK, "", CLI_INTRO.rstrip()]
    for name, source in COMMANDS.items():
        lines += command_lines(name, getattr(import_module(source.module), source.attribute))
    return "\n".join([*lines, ""])


# Models.


def parts(schema: Schema, defs: Schema, above: str) -> Iterator[tuple[str, str]]:
    """Walk a model's parts in the order of its fields, each before its own parts; gives names and titles."""
    for field, inner in schema["properties"].items():
        where = f"{above}.{field}" if above else field
        for leaf in _leaves(inner):
            name = leaf.get("$ref", "").rpartition("/")[2]
            if not name or (above and name.startswith("Select")):  # told where the card's own selection is
                continue
            kind = defs[name]["properties"].get("kind", {}).get("const")
            yield name, f"{where}, kind {kind}" if kind else where
            yield from parts(defs[name], defs, where)


def fields(name: str, part: Schema, defs: Schema, titles: Mapping[str, str], runs: Runs) -> list[str]:
    """Return the table of a mapping's fields; parts that have a title are linked."""
    needed = part.get("required", ())
    rows = [
        (
            f"`{field}`",
            takes(schema, defs, titles),
            "needed" if field in needed else default_of(schema),
            schema.get("description", ""),
            runs(name, field, part),
        )
        for field, schema in part["properties"].items()
        if field != "kind"
    ]
    if not rows:
        return [f"It has no fields. Runs: {runs(name, 'kind', part)}."]
    return table(("field", "takes", "default", "meaning", "runs"), rows)


def takes(schema: Schema, defs: Schema, titles: Mapping[str, str]) -> str:
    """Say what a field takes, as the error messages do; parts by links to their sections."""
    names = [leaf["$ref"].rpartition("/")[2] for leaf in _leaves(schema) if "$ref" in leaf]
    if not names:
        return re.sub(r"like (\^.*?\$)", r"like `\1`", describe(schema, defs))
    links = []
    for name in names:
        title = titles[name]
        anchor = re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        links.append(f"[{title.partition(', ')[2] or title.rpartition('.')[2]}](#{anchor})")
    words = ", ".join(links)
    if schema.get("type") == "array":
        words = f"a list of at most {schema['maxItems']} {words}"
    if schema.get("type") == "object" and "additionalProperties" in schema:
        words = f"a mapping of at most {schema['maxProperties']} to {words}"
    return f"{words} or null" if any(m.get("type") == "null" for m in schema.get("anyOf", ())) else words


def _leaves(schema: Schema) -> Iterator[Schema]:
    inner = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
    if schema.get("type") == "array":
        inner.append(schema["items"])
    if isinstance(values := schema.get("additionalProperties"), dict) and _refers(values):
        inner.append(values)
    if not inner:
        yield schema
    for member in inner:
        yield from _leaves(member)


def _refers(schema: Schema) -> bool:
    return "$ref" in schema or any("$ref" in member for member in schema.get("oneOf", ()))


def default_of(schema: Schema) -> str:
    """Return a field's default as YAML writes it; a part's default is that of its own fields."""
    if "default" not in schema:
        return "none"
    default = schema["default"]
    if isinstance(default, dict):
        return f"`kind: {default['kind']}`" if "kind" in default else "its own"
    return f"`{flow(default)}`"


def card_runs(name: str, field: str, part: Schema) -> str:
    """Say whether this version carries a card's field out."""
    if f"{name}.{field}" in TOLD:
        return "told"
    if name in PARTS:
        return able(f"{PARTS[name]}.{field}")
    kind = part["properties"].get("kind", {}).get("const")
    group = next((group for beginning, group in KINDS.items() if name.startswith(beginning)), None)
    return able(group, kind) if group is not None else "yes"


def able(part: str, value: str | None = None) -> str:
    """Word what the capability table says of a part, or of one value of it; what it leaves out always runs."""
    found = [a for a in TABLE if a.part == part and (value is None or a.value == value)]
    can, cannot = [a for a in found if a.runs], [a for a in found if not a.runs]
    if not cannot:
        return "yes"
    why = "; ".join(a.why for a in cannot)
    if not can:
        return f"no: {why}"
    if any(a.value == "*" for a in cannot):
        return f"only {', '.join(f'`{a.value}`' for a in can)}: {why}"
    return f"all but {', '.join(f'`{a.value}`' for a in cannot)}: {why}"


def policy_runs(name: str, field: str, _part: Schema) -> str:
    """Say whether a value of the policy asks for something; this version carries all of them out."""
    return "told" if f"{name}.{field}" in TOLD else "yes"


def sentence(part: Schema) -> str:
    """Return the first paragraph of a model's docstring."""
    return plain(part.get("description", "").partition("\n\n")[0])


# Commands.


def command_lines(path: str, command: click.Command) -> Iterator[str]:
    """Describe a command, or each command of a group."""
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from command_lines(f"{path} {name}", inner)
        return
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    options = [p for p in command.params if isinstance(p, click.Option)]
    words = " ".join(["automode", path, *(["[OPTIONS]"] if options else []), *map(metavar, arguments)])
    yield from ("", f"## automode {path}", "", plain(command.help or ""), "", "```console", words, "```")
    if options:
        rows = [(f"`{', '.join(o.opts)}`", option_type(o), o.help or "") for o in options]
        yield from ("", *table(("option", "takes", "meaning"), rows))


def metavar(argument: click.Argument) -> str:
    """Name an argument as the usage line does."""
    if argument.metavar:
        return argument.metavar
    if isinstance(argument.type, click.Choice):
        return f"{{{'|'.join(argument.type.choices)}}}"
    return (argument.name or "").upper()


def option_type(option: click.Option) -> str:
    """Say what an option takes, and its default where the help shows one."""
    if option.is_flag:
        return "nothing"
    kind = option.type
    if isinstance(kind, click.Choice):
        words = "one of " + ", ".join(kind.choices)
    elif isinstance(kind, click.IntRange | click.FloatRange):
        words = (
            f"{'a whole number' if isinstance(kind, click.IntRange) else 'a number'} at least {kind.min:g}"
        )
    else:
        words = "text"
    needed = ", needed" if option.required else ""
    return f"{words} (default {option.default:g})" if option.show_default else f"{words}{needed}"


# Markdown.


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lay out a Markdown table."""
    cells = [head, tuple("---" for _ in head), *(tuple(cell(c) for c in row) for row in rows)]
    return [f"| {' | '.join(row)} |" for row in cells]


def cell(text: str) -> str:
    """Make a text fit a table's cell."""
    return plain(text).replace("|", "\\|").replace("<", "&lt;")


def plain(text: str) -> str:
    """Turn a docstring's markup into Markdown, on one line."""
    return re.sub(r":\w+:`~?([^`]*)`", r"`\1`", " ".join(text.split())).replace("``", "`")


def main() -> int:
    """Write the pages, or say which are stale."""
    stale = [name for name, text in pages().items() if not _stands(FOLDER / name, text)]
    if "--check" in sys.argv[1:]:
        for name in stale:
            print(f"docs/{name} is stale: run python docs/generate.py")
        return 1 if stale else 0
    for name in stale:
        (FOLDER / name).write_text(pages()[name], encoding="utf-8", newline="\n")
        print(f"docs/{name} written")
    return 0


def _stands(file: Path, text: str) -> bool:
    return file.is_file() and file.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main())
