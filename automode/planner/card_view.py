"""A card as a person skims it: a dozen plain lines for the console, one small table for a notebook.

Everything that a card holds may have been typed by somebody: text is escaped for the place where it is shown.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import assert_never

from automode.planner.cards import PlanCard
from automode.planner.displays import Panel
from automode.planner.recipes import (
    Adjustment,
    MergeRecipe,
    RelabelGiven,
    RelabelPredicted,
    SelectAll,
    SelectIndices,
    Selection,
    SelectKMeans,
    SelectQuantile,
    SelectSlices,
    TrainingRecipe,
    Variant,
)
from automode.planner.sharing import part_names
from automode.planner.variants import Draw, DrawChoice, DrawInt, DrawLogUniform, DrawUniform
from automode.planner.yaml_text import shown
from automode.planner.yaml_writer import flow

_WIDTH = 100


def selection_text(selection: Selection) -> str:
    """Say in a few words which samples a selection means."""
    match selection:
        case SelectAll():
            return "every training sample"
        case SelectQuantile(from_=low, to=high, metric=metric, exclude_suspects=careful):
            suspects = "likely mislabelled left out" if careful else "likely mislabelled included"
            return f"{metric} from quantile {low:g} to {high:g}, {suspects}"
        case SelectKMeans(clusters=clusters, k=k, feature=feature):
            which = ", ".join(map(str, clusters))
            return f"cluster{'s' if len(clusters) > 1 else ''} {which} of {k} by {feature}"
        case SelectSlices(slices=names):
            return f"slice{'s' if len(names) > 1 else ''} {', '.join(names)}"
        case SelectIndices(ids=ids, slice=name):
            count = f"{len(ids)} given samples" if ids is not None else "given samples (artifact)"
            return count if name is None else f"slice {name}" if ids is None else f"{count} of slice {name}"


def variant_text(variant: Variant) -> str:
    """Name a variant and what it does differently from the trunk."""
    changes = variant.model_dump(exclude_defaults=True, exclude={"name"})
    told = ", ".join(f"{key} {flow(value)}" for key, value in changes.items())
    return f"{variant.name} ({told})" if told else variant.name


def draw_text(draw: Draw) -> str:
    """Say in a few words what is drawn for a field."""
    match draw:
        case DrawLogUniform(low=low, high=high):
            return f"{low:g} to {high:g} (log)"
        case DrawUniform(low=low, high=high, step=step) | DrawInt(low=low, high=high, step=step):
            apart = "" if step is None or (step == 1 and isinstance(draw, DrawInt)) else f" by {step:g}"
            return f"{low:g} to {high:g}{apart}"
        case DrawChoice(choices=choices):
            return f"one of {', '.join(flow(c) for c in choices)}"


def _recipe_text(recipe: TrainingRecipe) -> str:
    told = [variant_text(v) for v in recipe.variants]
    if recipe.search is not None:
        search = recipe.search
        over = ", ".join(f"{name} {draw_text(draw)}" for name, draw in search.parameters.items())
        told.append(f"{search.draws} drawn by {search.sampler} over {over}")
    return "; ".join(told)


def _parts_text(selection: Selection, how: str, steps: int) -> str:
    k = len(part_names(selection))
    shared = f"{steps} steps each" if how == "equal" else f"{k * steps} steps shared by size"
    return f"a specialist for each of {k}, {shared}"


def _data_text(selection: Selection, recipe: TrainingRecipe | None) -> str:
    told = selection_text(selection)
    if recipe is None:
        return told
    if recipe.exclude is not None:
        told += f", without {selection_text(recipe.exclude)}"
    match recipe.relabel:
        case None:
            return told
        case RelabelPredicted(confidence=share):
            return f"{told}; new labels predicted ({share:.0%} agreeing)"
        case RelabelGiven(ids=ids):
            return f"{told}; {len(ids)} labels given"
        case _:
            assert_never(recipe.relabel)


def _merge_text(merge: MergeRecipe) -> str:
    values = merge.model_dump(exclude={"kind"})
    told = ", ".join(f"{key} {flow(value)}" for key, value in values.items())
    return f"{merge.kind} ({told})" if told else merge.kind


def _adjustment_text(adjustment: Adjustment) -> str:
    told = []
    if adjustment.rate_factor != 1.0:
        told.append(f"learning rates times {adjustment.rate_factor:g}")
    if adjustment.clip_norm is not None:
        told.append(f"gradient norm at most {adjustment.clip_norm:g}")
    return " and ".join(told) + ", from the next step on"


def _facts(card: PlanCard) -> Iterator[tuple[str, str]]:
    """Yield what a person decides on, most important first: a label and a line."""
    if card.adjustment is not None:
        yield "change", _adjustment_text(card.adjustment)
        yield "needs", "your word: an adjustment has no control to be compared with"
        if card.diagnostics:
            yield "readings", ", ".join(f"{k} {flow(v)}" for k, v in card.diagnostics.items())
        return
    yield "data", _data_text(card.selection, card.training_recipe)
    if card.training_recipe is not None:
        yield "variants", _recipe_text(card.training_recipe)
        if card.training_recipe.per_part is not None and card.asha is not None:
            yield "parts", _parts_text(card.selection, card.training_recipe.per_part, card.asha.max_steps)
        if card.training_recipe.resources is not None:
            yield "each gets", card.training_recipe.resources.text
    if card.gate_recipe is not None:
        yield "gate", f"{card.gate_recipe.kind}, temperature {card.gate_recipe.temperature:g}"
    if card.merge_recipe is not None:
        yield "merge", _merge_text(card.merge_recipe)
    parts = card.training_recipe is not None and card.training_recipe.per_part is not None
    ladder = (
        ""
        if parts or card.asha is None
        else f"; first rung {card.budget_steps} steps, top rung {card.asha.max_steps}"
    )
    share = f"{card.cost.share_of_remaining:.1%} of what remains"
    yield "cost", f"{card.cost.sample_passes:,.0f} sample passes, {share}{ladder}"
    slices = "no slice worse" if card.acceptance.slices == "no_worse" else "slices ignored"
    anneals = card.training_recipe is not None and card.training_recipe.anneals
    whose = "the annealed control's and the trunk's" if anneals else "the control's"
    yield "needs", f"{card.acceptance.metric} above {whose}, z at least {card.acceptance.z:g}, {slices}"
    if card.diagnostics:
        yield "readings", ", ".join(f"{k} {flow(v)}" for k, v in card.diagnostics.items())


def card_summary(card: PlanCard) -> str:
    """Return a card as at most twelve lines of plain text, none wider than a hundred characters."""
    head = f"card {card.id}, revision {card.rev}: {card.action} for {card.reason} at step {card.step} (risk {card.risk})"
    because = textwrap.wrap(
        shown(" ".join(card.because.split()), limit=4000),
        width=_WIDTH - 2,
        max_lines=3,
        placeholder=" …",
    )
    facts = [f"{label:<9} {shown(text, limit=_WIDTH - 12)}" for label, text in _facts(card)]
    return "\n".join([head, *(f"  {line}" for line in [*because, *facts])])


def card_panel(card: PlanCard, yaml: str) -> Panel:
    """Return a card as a panel, for a notebook or a terminal.

    Args:
        card: The card.
        yaml: Its full text, shown on demand.
    """
    head = f"{card.action} · {card.reason} · step {card.step} · risk {card.risk}"
    title = f"plan card {card.id}, revision {card.rev} · {head}"
    return Panel(title=title, lead=card.because, rows=list(_facts(card)), more=("YAML", yaml))
