"""Do units still tell samples apart, or are they dead (always zero) or saturated (always at their bound)?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from automode.trainer.health.ground import MOST_LAYERS, Finding, Ground

DEAD, SATURATED = 0.5, 0.9
"""Share of dead units, or of saturated values, from which a layer is doubtful."""

_NEAR = 0.01
_ZEROED = (nn.ReLU, nn.ReLU6, nn.Threshold, nn.Hardswish)
_BOUNDED: dict[type[nn.Module], tuple[float, float]] = {
    nn.Sigmoid: (0.0, 1.0),
    nn.Hardsigmoid: (0.0, 1.0),
    nn.Tanh: (-1.0, 1.0),
    nn.Hardtanh: (-1.0, 1.0),
    nn.Softsign: (-1.0, 1.0),
}


class _Seen:
    """What one module's outputs have shown so far."""

    def __init__(self, module: nn.Module) -> None:
        self._bounds = _BOUNDED.get(type(module))
        self._zeroed = isinstance(module, _ZEROED)
        self._fired: Tensor | None = None
        self._low: Tensor | None = None
        self._high: Tensor | None = None
        self._saturated = 0.0
        self._values = 0
        self.not_finite = 0
        self.largest = 0.0

    def see(self, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) and output else output
        if (
            not isinstance(value, Tensor)
            or not value.is_floating_point()
            or value.dim() < 2
            or not value.numel()
        ):
            return
        value = value.detach().float()
        finite = torch.isfinite(value)
        self.not_finite += int((~finite).sum())
        self.largest = max(self.largest, float(value[finite].abs().max()) if bool(finite.any()) else 0.0)
        # Units are features of sequences and rows, and channels of images.
        units = value.movedim(1, -1).flatten(0, -2) if value.dim() >= 4 else value.flatten(0, -2)
        fired, low, high = (units != 0).any(dim=0), units.amin(dim=0), units.amax(dim=0)
        if self._fired is None or self._fired.shape != fired.shape:
            self._fired, self._low, self._high = fired, low, high
        else:
            assert self._low is not None
            assert self._high is not None
            self._fired |= fired
            self._low, self._high = torch.minimum(self._low, low), torch.maximum(self._high, high)
        if self._bounds is not None:
            lower, upper = self._bounds
            near = _NEAR * (upper - lower)
            self._saturated += float(((units <= lower + near) | (units >= upper - near)).sum())
        self._values += units.numel()

    def told(self, name: str) -> dict[str, Any] | None:
        if self._fired is None or self._low is None or self._high is None:
            return None
        return {
            "layer": name,
            "units": self._fired.numel(),
            "dead": float((~self._fired).double().mean()) if self._zeroed else 0.0,
            "constant": float((self._low == self._high).double().mean()),
            "saturated": self._saturated / self._values if self._bounds is not None else 0.0,
            "largest": self.largest,
            "not_finite": self.not_finite,
        }


def check(ground: Ground) -> Finding:
    """Read the outputs of every layer on some batches, in evaluation mode; only modules are seen, not functions."""
    batches = ground.batches()
    model = ground.parts.trunk.model
    seen = {name: _Seen(module) for name, module in model.named_modules() if not any(module.children())}
    with ground.undisturbed(), torch.no_grad():
        model.eval()
        handles = [
            module.register_forward_hook(lambda _m, _i, output, name=name: seen[name].see(output))
            for name, module in model.named_modules()
            if name in seen
        ]
        try:
            for batch in batches:
                ground.forward(batch)
        finally:
            for handle in handles:
                handle.remove()
    layers = [told for name, one in seen.items() if (told := one.told(name)) is not None]
    if not layers:
        return Finding(
            verdict="unknown",
            why="no module of the model gives a matrix of floats, so there is no layer to look at",
        )
    return _judged(layers)


def _judged(layers: list[dict[str, Any]]) -> Finding:
    broken = [layer for layer in layers if layer["not_finite"]]
    dead = [layer for layer in layers if layer["dead"] >= DEAD]
    saturated = [layer for layer in layers if layer["saturated"] >= SATURATED]
    numbers = {
        "layers": float(len(layers)),
        "dead": max(layer["dead"] for layer in layers),
        "saturated": max(layer["saturated"] for layer in layers),
        "constant": max(layer["constant"] for layer in layers),
        "largest": max(layer["largest"] for layer in layers),
        "not_finite": float(sum(layer["not_finite"] for layer in layers)),
    }
    worst = sorted(layers, key=lambda layer: (-layer["not_finite"], -layer["dead"] - layer["saturated"]))[
        :MOST_LAYERS
    ]
    if broken:
        why = f"{len(broken)} of {len(layers)} layers give values that are not finite, {broken[0]['layer']} first"
        return Finding(verdict="bad", why=why, numbers=numbers, worst=worst)
    if dead or saturated:
        parts = [
            f"in {layer['layer']} {layer['dead']:.0%} of the units are zero for every sample"
            for layer in dead[:3]
        ]
        parts += [
            f"{layer['saturated']:.0%} of {layer['layer']}'s values are at their bound"
            for layer in saturated[:3]
        ]
        return Finding(verdict="doubtful", why="; ".join(parts), numbers=numbers, worst=worst)
    why = f"no layer of {len(layers)} has {DEAD:.0%} dead units or {SATURATED:.0%} saturated values"
    return Finding(verdict="good", why=why, numbers=numbers, worst=worst)
