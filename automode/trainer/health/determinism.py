"""Does the same step, from the same state, give the same bits? Some steps are really trained, twice, and compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from automode.trainer.health.ground import MOST_LAYERS, Finding, Ground
from automode.trainer.random_state import RandomState
from automode.trainer.step_choice import step_of


class _Unguarded:
    guard = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trained:
    """What some steps came to: bits of the losses, the weights and buffers, and the random states behind them."""

    losses: list[Tensor]
    states: dict[str, Tensor]
    random: RandomState


def check(ground: Ground) -> Finding:
    """Train some steps twice from the state as it is, and compare losses, weights, buffers and random states bit by bit."""
    batches = ground.batches()
    first, second = _train(ground, batches), _train(ground, batches)
    numbers = {"steps": float(len(batches))}
    at = next(
        (i for i, (a, b) in enumerate(zip(first.losses, second.losses, strict=True), 1) if not _equal(a, b)),
        None,
    )
    different: list[dict[str, Any]] = [
        {
            "layer": name,
            "largest_difference": float((value.double() - second.states[name].double()).abs().max()),
        }
        for name, value in first.states.items()
        if not _equal(value, second.states[name])
    ]
    if at is None and not different and first.random.same_as(second.random):
        return Finding(
            verdict="good",
            why=f"{len(batches)} steps, trained twice from here, are equal bit by bit: losses, weights, buffers, random states",
            numbers=numbers,
        )
    if at is not None:
        numbers["first_different_loss"] = float(at)
    different.sort(key=lambda layer: -float(layer["largest_difference"]))
    what = "the losses part at step " + str(at) if at is not None else "the losses are equal, and"
    why = (
        f"{len(batches)} steps, trained twice from the same state, differ: {what}; {len(different)} weights or buffers differ. A "
        "resumed run will not equal the one that was cut: torch.use_deterministic_algorithms(True) names the operation, unless the "
        "model draws from a source of its own"
    )
    return Finding(verdict="bad", why=why, numbers=numbers, worst=different[:MOST_LAYERS])


def _train(ground: Ground, batches: list[Any]) -> _Trained:
    parts, loop = ground.parts, ground.loop
    losses = []
    with ground.undisturbed():
        train = step_of(parts, _Unguarded())
        train.load(loop.train.state())
        try:
            for batch in batches:
                taken = train(batch, loop.epoch)
                if taken.pending:
                    parts.trunk.optimizer.step()
                loss = taken.loss
                losses.append(loss.detach().cpu().clone() if isinstance(loss, Tensor) else torch.tensor(loss))
        finally:
            train.close()
        model = parts.trunk.model
        named = [*model.named_parameters(), *model.named_buffers()]
        return _Trained(
            losses=losses,
            states={name: tensor.detach().cpu().clone() for name, tensor in named},
            random=RandomState.capture(),
        )


def _equal(left: Tensor, right: Tensor) -> bool:
    """Equality of bits, so that NaN equals NaN, and zero does not equal minus zero."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    if not left.is_floating_point():
        return torch.equal(left, right)
    return (
        torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))
        if left.dim()
        else _equal(left.reshape(1), right.reshape(1))
    )
