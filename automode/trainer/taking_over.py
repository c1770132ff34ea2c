"""What the trunk takes over from the trial whose weights it has adopted, beside the weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from automode.errors import NotExecutableError
from automode.planner.cards import PlanCard
from automode.planner.recipes import Variant
from automode.trainer.batch_parts import part_rows
from automode.trainer.card_data import CardData
from automode.trainer.new_labels import NewLabels
from automode.trainer.optimizers import scale_rates, scale_schedule
from automode.trainer.sample_source import Ids
from automode.trainer.trunk import Trunk


def rate_factor(variant: Variant) -> float:
    """Return what the trunk's rates are multiplied by once the trial is adopted.

    An annealed rate is not taken over: the trunk goes on at its own, which re-warms what was annealed. The rate of an adapter is of other
    parameters, and one that was right for batches of another size is not for the trunk's, whose loader stays as it is.
    """
    own = variant.schedule == "anneal" or variant.adapter is not None or variant.batch_mul != 1.0
    return 1.0 if own else variant.lr_mul


def take_over(trunk: Trunk, variant: Variant, rest: dict[str, Any], factor: float, rows: int) -> None:
    """Give the trunk the trial's optimizer state and averages, its factors on rate and weight decay, its clipping, and its steps to a batch.

    Of adapters, the merged weights are all that it takes over. Where the trial drew batches of another size, rates, decay and clipping
    went with them, and stay the trunk's own.

    Args:
        trunk: Holds the adopted weights already.
        variant: How the trial trained.
        rest: Of the trial's checkpoint.
        factor: On every rate.
        rows: Rows of the trunk's batches.
    """
    if trunk.averages is not None and "averages" in rest:
        trunk.averages.load_state_dict(rest["averages"])
    if variant.adapter is not None:  # its rates, decay and moments are of other parameters than the trunk's
        return
    if rest.get("kind") == type(trunk.optimizer).__name__:
        groups = [{k: v for k, v in group.items() if k != "params"} for group in trunk.optimizer.param_groups]
        trunk.optimizer.load_state_dict(rest["optimizer"])
        for group, kept in zip(trunk.optimizer.param_groups, groups, strict=True):
            group.update(kept)
    else:
        trunk.optimizer.state.clear()
    if variant.batch_mul != 1.0:
        return
    for group in trunk.optimizer.param_groups:
        scale_rates(group, factor)
        if "weight_decay" in group:
            decay = group["weight_decay"] * variant.weight_decay_mul
            group["weight_decay"] = decay if variant.weight_decay is None else variant.weight_decay
    if trunk.scheduler is not None:
        scale_schedule(trunk.scheduler, factor)
    trunk.part_rows = part_rows(rows, trunk.part_rows, variant.updates)
    if variant.clip_norm is not None:
        trunk.clip_norm = variant.clip_norm


def curation_of(card: PlanCard, variant: Variant | None, data: CardData | None) -> tuple[Ids, NewLabels]:
    """Return what the trials left out and relabelled, and the trunk is to leave out and relabel from now on.

    Args:
        card: The card that is adopted.
        variant: How the trial trained; None where no single trial is adopted.
        data: What the card's trials trained on, if that is known.

    Raises:
        NotExecutableError: The card leaves out or relabels what is not known any more.
    """
    recipe = card.training_recipe
    if data is not None:
        source = variant.labels if variant is not None else next(iter(data.recipe.label_sources))
        return data.stays_out(source), data.labels(source)
    if recipe is None or (recipe.exclude is None and recipe.relabel is None):
        return np.empty(0, dtype=np.int64), NewLabels.none()
    raise NotExecutableError(
        f"what card {card.id} leaves out is not known any more, so that it cannot be adopted as it was judged"
    )
