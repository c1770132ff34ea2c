"""Is everything finite, and does it fit into the numbers that the run computes with?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from automode.errors import NotExecutableError
from automode.merges.batches import map_tensors
from automode.trainer.health.ground import MOST_LAYERS, Finding, Ground

HEADROOM = 0.1
"""Share of the largest number that the arithmetic holds, from which values are doubtful."""

_COMPUTED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_Named = Iterator[tuple[str, Tensor]]


def check(ground: Ground) -> Finding:
    """Look for values that are not finite, and at the largest: in all that the run holds, and in a batch's loss and gradients."""
    trunk = ground.parts.trunk
    computed = torch.finfo(_COMPUTED[trunk.precision])
    rows = [_row("weights", name, tensor) for name, tensor in trunk.model.named_parameters()]
    rows += [_row("buffers", name, tensor) for name, tensor in trunk.model.named_buffers()]
    rows += [_row("moments", name, tensor) for name, tensor in _moments(trunk.optimizer)]
    told = ""
    tiny = 0.0
    try:
        batches = ground.batches()
    except NotExecutableError as error:
        told = f"; gradients were not looked at: {error}"
    else:
        with ground.undisturbed():
            for parameter in trunk.parameters:
                parameter.grad = None
            loss = ground.forward(batches[0])[0]
            loss.backward()  # type: ignore[no-untyped-call]
            rows.append(_row("loss", "loss", loss))
            found = [(name, p.grad) for name, p in trunk.model.named_parameters() if p.grad is not None]
            rows += [_row("gradients", name, gradient) for name, gradient in found]
            tiny = _below([gradient for _, gradient in found], computed.tiny)
    kept = [row for row in rows if row is not None]
    return _judged(kept, float(computed.max), tiny, str(trunk.precision), told)


def _judged(rows: list[dict[str, Any]], most: float, tiny: float, precision: str, told: str) -> Finding:
    broken = [row for row in rows if row["not_finite"]]
    numbers = {
        "tensors": float(len(rows)),
        "not_finite": float(sum(row["not_finite"] for row in rows)),
        "largest": max((row["largest"] for row in rows), default=0.0),
        "largest_share_of_range": max((row["largest"] for row in rows), default=0.0) / most,
        "gradients_below_range": tiny,
    }
    worst = sorted(rows, key=lambda row: (-row["not_finite"], -row["largest"]))[:MOST_LAYERS]
    if broken:
        why = f"{broken[0]['kind']} {broken[0]['layer']} and {len(broken) - 1} more tensors hold values that are not finite{told}"
        return Finding(verdict="bad", why=why, numbers=numbers, worst=worst)
    if numbers["largest_share_of_range"] > HEADROOM:
        why = f"{worst[0]['kind']} {worst[0]['layer']} reaches {worst[0]['largest']:.4g}, and {precision} ends at {most:.4g}{told}"
        return Finding(verdict="doubtful", why=why, numbers=numbers, worst=worst)
    if tiny > 0.5:
        why = f"{tiny:.0%} of the gradients' values are too small for {precision}{told}"
        return Finding(verdict="doubtful", why=why, numbers=numbers, worst=worst)
    why = f"all {len(rows)} tensors are finite; the largest value is {numbers['largest']:.4g}, and {precision} ends at {most:.4g}{told}"
    return Finding(verdict="good", why=why, numbers=numbers, worst=worst)


def _row(kind: str, name: str, tensor: Tensor) -> dict[str, Any] | None:
    value = tensor.detach()
    if not value.is_floating_point() or not value.numel():
        return None
    value = value.to_dense() if value.layout is not torch.strided else value
    finite = torch.isfinite(value)
    largest = float(value.abs().masked_fill(~finite, 0.0).max())
    return {"layer": name, "kind": kind, "not_finite": int((~finite).sum()), "largest": largest}


def _moments(optimizer: torch.optim.Optimizer) -> _Named:
    found: list[tuple[str, Tensor]] = []

    def see(tensor: Tensor) -> Tensor:
        found.append((f"{type(optimizer).__name__}.{len(found)}", tensor))
        return tensor

    map_tensors(see, optimizer.state_dict()["state"])
    yield from found


def _below(gradients: list[Tensor], smallest: float) -> float:
    """Share of the values that are not zero and below the smallest number of full precision."""
    small = total = 0
    for gradient in gradients:
        size = gradient.detach().abs()
        nonzero = size > 0
        total += int(nonzero.sum())
        small += int((nonzero & (size < smallest)).sum())
    return small / total if total else 0.0
