"""``replay``: decide everything again and compare; try another policy on what was seen; run a card again from its snapshot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from automode.cli.executing import execute
from automode.cli.loss_plot import Mark as PlotMark
from automode.cli.loss_plot import MarkRow, text_plot, write_plot
from automode.cli.policies import load_policy
from automode.cli.sessions import find_card, session_argument
from automode.cli.tables import safe, table
from automode.engine import WhatIf
from automode.engine.comparing import Pair
from automode.errors import UsageError
from automode.planner.approval import PLANNER
from automode.planner.cards import PlanCard
from automode.planner.yaml_text import shown
from automode.planner.yaml_writer import flow
from automode.session import Session


@click.command()
@session_argument
@click.option(
    "--policy", help="Compare with what this policy (a file, or a preset's name) would have proposed."
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    help="With --policy: draw the loss and both sets of cards to this file (.html, .svg, or .png with matplotlib).",
)
@click.option("--card", help="Run this card again from its stored snapshot; needs --execute.")
@click.option(
    "--execute",
    "target",
    help="The training script (or module:function) that the card ran in; Trainer.fit there runs the card and leaves.",
)
@click.argument("arguments", nargs=-1, metavar="[-- ARGUMENTS]", type=click.UNPROCESSED)
@click.pass_context
def replay(
    context: click.Context,
    session: Path,
    policy: str | None,
    plot: Path | None,
    card: str | None,
    target: str | None,
    arguments: tuple[str, ...],
) -> None:
    """Decide everything again and compare (exit code 1 on a difference)."""
    if plot is not None and policy is None:
        raise UsageError("--plot draws what another policy would have proposed: give --policy too")
    if (card is None) != (target is None):
        raise UsageError("--card and --execute go together: which card, and the script that it ran in")
    if target is None and arguments:
        raise UsageError(f"{' '.join(arguments)}: arguments are for the script of --execute")
    if policy is not None and card is not None:
        raise UsageError("--policy and --card ask for different things: give one of them")
    with Session.open(session) as opened:
        if card is not None and target is not None:
            found = find_card(opened, card).card_id
            if not execute(opened.path, found, target, arguments):
                context.exit(1)
            return
        if policy is not None:
            _what_if(opened, policy, plot)
            return
        if not _same(opened):
            context.exit(1)


def _same(session: Session) -> bool:
    from automode.session.replaying import replay as run

    report = run(session)
    click.echo(
        f"{report.observations:,} observations and {report.decisions:,} decisions in {report.seconds:.2f} s "
        f"({report.rate:,.0f} observations/s)"
    )
    if report.label:
        click.echo(f"this is {report.label}")
    if report.differences == 0:
        click.echo("0 differences")
        return True
    click.echo(f"{report.differences:,} difference{'s' if report.differences > 1 else ''}; the first:")
    click.echo(safe(str(report.first)))
    return False


# -------------------------------------------------------------------------------------------------------- another policy


def _what_if(session: Session, name: str, plot: Path | None) -> None:
    """Print the recorded cards beside those of another policy, as a table and over the loss."""
    from automode.session.replaying import replay_with

    found = replay_with(session, load_policy(name))
    pairs = found.pairs
    if pairs:
        head = ["RECORDED", "WHAT IF", "ACTION", "REASON", "COST", "BECAUSE", "DIFFERS"]
        click.echo(table(head, [_line(pair) for pair in pairs], right=(0, 1, 4)))
        click.echo("")
    notes = _notes(found, name)
    click.echo(safe("\n".join(notes)))
    steps, losses = session.frame("step"), session.frame("loss")
    rows = _marks(found)
    if steps.size:
        click.echo("")
        click.echo(text_plot(steps, losses, rows))
    if plot is not None:
        title = f"{session.path.name}: cards recorded, and under {Path(name).name}"
        write_plot(plot, title, steps, losses, rows, "\n".join(notes))
        click.echo(f"\ndrawn to {shown(str(plot), 400)}")


def _line(pair: Pair) -> list[str]:
    card = pair.proposed or pair.recorded
    assert card is not None
    return [
        str(pair.recorded.step) if pair.recorded is not None else "-",
        f"{pair.proposed.step}{'*' if pair.on_scans else ''}" if pair.proposed is not None else "-",
        card.action,
        card.reason,
        f"{card.cost.sample_passes:,.0f}",
        shown(card.because, 60),
        _differs(pair),
    ]


def _differs(pair: Pair) -> str:
    if pair.proposed is None:
        assert pair.recorded is not None
        by = pair.recorded.created_by
        return "only recorded" if by == PLANNER else f"only recorded: submitted by {by}"
    if pair.recorded is None or pair.later is None:
        return "only under the other policy"
    told = [f"{abs(pair.later)} steps {'later' if pair.later > 0 else 'sooner'}"] if pair.later else []
    told += [f"{name} {flow(a)} -> {flow(b)}" for name, (a, b) in pair.difference.items()]
    return "; ".join(told) or "nothing"


def _notes(found: WhatIf, name: str) -> list[str]:
    notes = [f"{len(found.recorded)} cards recorded, {len(found.proposed)} under {name}"]
    if found.waited:
        notes.append(
            "the session began in propose mode: a card there had to leave time for an answer, and nothing waits in a what-if, so "
            "that budget_steps may differ for that alone"
        )
    if found.scans.why:
        notes.append(f"* {found.scans.why}")
    if found.counterfactual_from is not None:
        notes.append(
            f"counterfactual from step {found.counterfactual_from} on: a card was adopted there, and the run went on from it"
        )
    return notes


def _marks(found: WhatIf) -> list[MarkRow]:
    def mark(card: PlanCard) -> PlotMark:
        return PlotMark(step=card.step, label=card.reason, about=card.because)

    def row(title: str, cards: Sequence[Any]) -> MarkRow:
        return MarkRow(name=title, marks=[mark(card) for card in cards])

    return [row("recorded", found.recorded), row("what if", found.proposed)]
