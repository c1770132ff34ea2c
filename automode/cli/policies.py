"""Commands about policies and formats: they need no session."""

from __future__ import annotations

import json
from typing import Literal

import click

from automode.cli.files import read_text
from automode.errors import PolicyError
from automode.planner import displays
from automode.planner.card_text import json_schema, policy_from_yaml, policy_to_yaml
from automode.planner.policy import Policy
from automode.planner.rules import chosen
from automode.planner.yaml_text import shown
from automode.planner.yaml_writer import flow
from automode.plugins import plugins
from automode.presets import preset_names, preset_text


@click.group()
def policy() -> None:
    """Check and compare policies."""


@policy.command()
@click.argument("file")
def check(file: str) -> None:
    """Validate a policy (a file, or a preset's name) and say how it differs from the default."""
    found = load_policy(file)
    offered = plugins()
    chosen(found, [plugin.rule for plugin in offered])
    digest = found.digest_with(plugin.distribution for plugin in offered)
    click.echo(f"{shown(file, 400)} is a valid policy: {shown(found.name)}, digest {digest}")
    changed = differences(Policy(), found)
    click.echo("it is the default policy" if not changed else "it differs from the default in:")
    for line in changed:
        click.echo(f"  {line}")


@policy.command()
@click.argument("a")
@click.argument("b")
def diff(a: str, b: str) -> None:
    """Compare two policies (files, or presets' names)."""
    changed = differences(load_policy(a), load_policy(b))
    click.echo("\n".join(changed) if changed else "no differences")


@policy.command()
@click.argument("file")
def show(file: str) -> None:
    """Print a policy with every value written out and explained."""
    click.echo(policy_to_yaml(load_policy(file)), nl=False)


@click.command()
@click.argument("what", type=click.Choice(["card", "policy"]))
def schema(what: Literal["card", "policy"]) -> None:
    """Print the JSON schema of plan cards or policies."""
    click.echo(json.dumps(json_schema(what), indent=2))


def load_policy(name: str) -> Policy:
    """Read a policy by a preset's name or from a file; a file of the same name is meant by ``./NAME``.

    Raises:
        PolicyError: The text is no policy; the message begins with the file's name.
        UsageError: The file cannot be read.
    """
    text = preset_text(name) if name in preset_names() else read_text(name, known=preset_names())
    try:
        return policy_from_yaml(text)
    except PolicyError as error:
        raise PolicyError(f"{shown(name, 400)}: {error}") from error


def differences(a: Policy, b: Policy) -> list[str]:
    """Say what differs, one dotted name a line."""
    return [
        f"{name}: {shown(flow(before), 200)} -> {shown(flow(after), 200)}"
        for name, before, after in displays.differences(a, b)
    ]
