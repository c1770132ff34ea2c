"""Do gradients reach every weight, and in a size that it can bear?"""

from __future__ import annotations

import math
from statistics import median
from typing import Any

import torch

from automode.trainer.health.ground import MOST_LAYERS, Finding, Ground

EXPLODING = 1e3
"""A gradient norm this many times the median layer's, per weight, is called exploding; below one over its square, vanishing."""


def check(ground: Ground) -> Finding:
    """Read the gradients of some batches, layer by layer: none at all, none at size, far larger than the rest, not finite."""
    batches = ground.batches()
    model = ground.parts.trunk.model
    names = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    sums = [0.0] * len(names)
    zeros = [0.0] * len(names)
    largest = [0.0] * len(names)
    reached = [False] * len(names)
    with ground.undisturbed():
        for batch in batches:
            for _, parameter in names:
                parameter.grad = None
            ground.forward(batch)[0].backward()  # type: ignore[no-untyped-call]
            for i, (_, parameter) in enumerate(names):
                gradient = parameter.grad
                if gradient is None:
                    zeros[i] += 1.0
                    continue
                reached[i] = True
                gradient = gradient.to_dense() if gradient.layout is not torch.strided else gradient
                sums[i] += float(gradient.detach().double().square().mean())
                zeros[i] += float((gradient == 0).double().mean())
                largest[i] = max(largest[i], float(gradient.detach().abs().max()))
    n = len(batches)
    layers = [
        {
            "layer": name,
            "norm": math.sqrt(sums[i] / n * parameter.numel()),
            "rms": math.sqrt(sums[i] / n),
            "largest": largest[i],
            "zero": zeros[i] / n,
            "reached": reached[i],
            "vector": parameter.dim() < 2,
        }
        for i, (name, parameter) in enumerate(names)
    ]
    return _judged(layers, n)


def _judged(layers: list[dict[str, Any]], n: int) -> Finding:
    vectors = {layer["layer"] for layer in layers if layer.pop("vector")}
    broken = [layer for layer in layers if not math.isfinite(layer["norm"])]
    dead = [layer for layer in layers if math.isfinite(layer["norm"]) and layer["norm"] == 0.0]
    alive = [layer["rms"] for layer in layers if layer["rms"] > 0.0 and math.isfinite(layer["rms"])]
    middle = median(alive) if alive else 0.0
    exploding = [
        layer for layer in layers if middle and layer not in broken and layer["rms"] > EXPLODING * middle
    ]
    # A bias that a normalisation takes off again gets next to nothing, and needs nothing.
    vanishing = [
        layer
        for layer in layers
        if 0.0 < layer["rms"] < middle / EXPLODING**2 and layer["layer"] not in vectors
    ]
    numbers = {
        "batches": float(n),
        "layers": float(len(layers)),
        "norm": math.sqrt(sum(layer["norm"] ** 2 for layer in layers if layer not in broken)),
        "dead": float(len(dead)),
        "exploding": float(len(exploding)),
        "vanishing": float(len(vanishing)),
        "not_finite": float(len(broken)),
    }
    worst = [*broken, *exploding, *dead, *vanishing]
    named = ", ".join(layer["layer"] for layer in worst[:3])
    if broken:
        why = f"the gradients of {len(broken)} of {len(layers)} weights are not finite ({named}): lower the rate, clip, or look for the first NaN"
        return Finding(verdict="bad", why=why, numbers=numbers, worst=worst[:MOST_LAYERS])
    if worst:
        parts = [
            f"{len(found)} {word}"
            for found, word in (
                (dead, "get none"),
                (exploding, "get far larger ones"),
                (vanishing, "get next to none"),
            )
            if found
        ]
        why = f"of {len(layers)} weights {', '.join(parts)} ({named})"
        return Finding(verdict="doubtful", why=why, numbers=numbers, worst=worst[:MOST_LAYERS])
    why = f"gradients reach all {len(layers)} weights; norm {numbers['norm']:.4g}"
    rest = sorted(layers, key=lambda layer: -layer["rms"])[:MOST_LAYERS]
    return Finding(verdict="good", why=why, numbers=numbers, worst=rest)
