"""``automode signals``: the planner over a loss curve of anybody's run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click
import numpy as np

from automode.cli.curves import Curve, load_curve
from automode.cli.loss_plot import Mark, MarkRow, text_plot, write_plot
from automode.cli.policies import load_policy
from automode.cli.tables import safe, table
from automode.engine.curve import LEAST_BUDGET, Finding, read_curve, with_budget
from automode.errors import UsageError
from automode.planner.policy import Policy
from automode.planner.yaml_text import shown

WIDEST, NARROWEST, BESIDE = 110, 40, 14
"""Columns of the plot, and what its scale takes beside them."""

MARKS: Final = {
    "rising": frozenset({("slow_divergence", "REGRESSING")}),
    "spike": frozenset(
        {
            ("loss_spike", "SPIKE"),
            ("grad_norm_spike", "SPIKE"),
            ("joint_spike", "SPIKE"),
            ("level_shift", "SHIFTED"),
        }
    ),
    "plateau": frozenset({("trend", "PLATEAU")}),
}
"""Readings that are marked under the curve, by the name of their row."""

FEW_ROWS = 25
"""Rows before a spike signal gives its first score."""


@click.command()
@click.argument("trace")
@click.option(
    "--budget",
    type=int,
    metavar="STEPS",
    help="planning budget B; default: the policy's, or 800 steps but at most a fifth of the curve",
)
@click.option(
    "--gain",
    type=float,
    metavar="SHARE",
    help="relative gain over B that would make waiting worthwhile; default: the policy's (0.01)",
)
@click.option(
    "--policy",
    "policy_name",
    default="default",
    metavar="FILE",
    help="policy whose thresholds and rules are used: a file, or a preset's name",
)
@click.option(
    "--loss", metavar="COLUMN", help="column that holds the training loss, where its name does not say so"
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="one JSON object a line: step, kind (reading or proposal), name, value; nothing else",
)
@click.option(
    "--plot",
    "plot",
    is_flag=False,
    flag_value="",
    metavar="[FILE]",
    help="also draw to this file (.html, .svg, or .png with matplotlib); without FILE, only the plot is printed, and no table",
)
def signals(
    trace: str,
    budget: int | None,
    gain: float | None,
    policy_name: str,
    loss: str | None,
    as_json: bool,
    plot: str | None,
) -> None:
    """Run the planner's signals and rules over a loss curve (CSV, or TensorBoard's event files).

    Read as they are: CSV with the columns `step` and `loss`, and optionally `grad_norm` and `lr`; Lightning's CSVLogger files; what
    W&B and MLflow export; `-` is standard input. The rules are those of a run under the same policy.
    """
    curve = load_curve(trace, loss)
    policy, rows = _planned(curve, load_policy(policy_name), budget, gain)
    for note in curve.notes:
        click.echo(f"note: {note}", err=True)
    findings = list(read_curve(curve.loss, grad_norm=curve.grad_norm, lr=curve.lr, policy=policy))
    steps = curve.steps.astype(np.float64)
    if plot:
        write_plot(
            Path(plot), f"automode signals {Path(trace).name}", steps, curve.loss, _marks(curve, findings)
        )
    if as_json:
        for finding in findings:
            click.echo(_line(curve, finding))
        return
    click.echo(_head(trace, curve, policy, rows))
    click.echo("\n" + text_plot(steps, curve.loss, _marks(curve, findings), width=_width()))
    if plot != "":
        click.echo("\n" + _told(curve, findings))


def _line(curve: Curve, finding: Finding) -> str:
    return json.dumps(
        {
            "step": int(curve.steps[finding.row]),
            "kind": finding.kind,
            "name": finding.name,
            "value": finding.value,
        }
    )


def _width() -> int:
    return min(WIDEST, max(NARROWEST, shutil.get_terminal_size().columns - BESIDE))


def _marks(curve: Curve, findings: Sequence[Finding]) -> list[MarkRow]:
    """Rows of marks under the curve; those that hold none are left out."""
    rows = []
    for name, states in MARKS.items():
        found = [f for f in findings if f.kind == "reading" and (f.name, f.value) in states]
        rows.append((name, found))
    rows.append(("card", [f for f in findings if f.kind == "proposal"]))
    return [
        MarkRow(
            name=name,
            marks=[
                Mark(step=float(curve.steps[f.row]), label=f"{f.name} {f.value}", about=f.why) for f in found
            ],
        )
        for name, found in rows
        if found
    ]


def _planned(curve: Curve, policy: Policy, budget: int | None, gain: float | None) -> tuple[Policy, int]:
    """The policy with the budget in rows of this log: a log of every tenth step has a tenth of the rows."""
    each, steps = curve.stride, int(curve.steps[-1] - curve.steps[0]) + curve.stride
    if budget is None:
        rows = policy.planning_budget(steps) // each
        if rows < LEAST_BUDGET:
            rows = LEAST_BUDGET
            curve.notes.append(
                f"the planning budget is {LEAST_BUDGET} rows ({LEAST_BUDGET * each} steps): with fewer, nothing can be said of a trend"
            )
    else:
        rows = budget // each
        if rows < LEAST_BUDGET:
            raise UsageError(
                f"a planning budget of {budget} steps holds {rows} rows of this log (one every {each} steps), and {LEAST_BUDGET} "
                f"are needed: give --budget {LEAST_BUDGET * each} or more"
            )
    if len(curve.loss) < FEW_ROWS:
        curve.notes.append(
            f"few rows ({len(curve.loss)}): spikes are told from row {FEW_ROWS}, a trend from row {rows // 4}"
        )
    return with_budget(policy, budget=rows, gain=gain), rows


def _head(trace: str, curve: Curve, policy: Policy, rows: int) -> str:
    every = f", one every {curve.stride} steps" if curve.stride > 1 else ""
    besides = [
        n for n, c in (("gradient norm", curve.grad_norm), ("learning rate", curve.lr)) if c is not None
    ]
    return (
        f"{shown(trace, 400)}: `{shown(curve.loss_name)}`{''.join(f', {name}' for name in besides)}; {len(curve.loss)} rows{every}, steps "
        f"{curve.steps[0]} to {curve.steps[-1]}\n"
        f"policy {shown(policy.name)}: B = {rows * curve.stride} steps, gain {policy.trend.gain:g}"
    )


def _told(curve: Curve, findings: list[Finding]) -> str:
    if not findings:
        return "nothing was found: no signal changed its state, and no rule would have fired"
    rows = [(str(curve.steps[f.row]), f.kind, f.name, f.value, safe(f.why)) for f in findings]
    return table(("step", "kind", "name", "value", "reason"), rows, right=(0,))
