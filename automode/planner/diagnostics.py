"""What a card says of the diagnostics: pure arithmetic over what was read. Nothing here triggers anything.

The gradient noise scale is the ratio of two means, never the mean of ratios: single readings of the squared gradient norm
may be negative (McCandlish et al. 2018, arXiv:1812.06162, appendix A).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from automode.planner.cards import Diagnostic
from automode.planner.interventions import Diagnosed
from automode.planner.policy import DiagnosticPolicy

WINDOW: Final = 4
"""Readings that the noise scale is the ratio of the means of."""

RESOLVED: Final = 3.0
"""Samples needed for each unit of the noise scale; with fewer, only a bound is honest."""


def noise_scale(history: Sequence[Diagnosed]) -> tuple[float | None, float | None]:
    """Estimate the batch size at which noise and signal of the gradient are equal.

    Args:
        history: Readings in order; the last four that hold both parts count.

    Returns:
        The estimate in samples, or None; and where there is none, a bound that it is above, or None where nothing was read.
    """
    parts = [
        (d.gradient_variance, d.gradient_square, d.examples)
        for d in history
        if d.gradient_variance is not None and d.gradient_square is not None
    ][-WINDOW:]
    if not parts:
        return None, None
    variance = sum(v for v, _, _ in parts) / len(parts)
    square = sum(g for _, g, _ in parts) / len(parts)
    examples = sum(n for _, _, n in parts)
    if square <= 0.0 or examples < RESOLVED * variance / square:
        return None, examples / RESOLVED
    return variance / square, None


def summary(history: Sequence[Diagnosed]) -> dict[str, Diagnostic]:
    """Put the latest of each diagnostic into words of a card; empty where none was taken."""
    if not history:
        return {}
    found: dict[str, Diagnostic] = {"diagnosed_at": history[-1].step}
    scale, above = noise_scale(history)
    if scale is not None:
        found["noise_scale"] = scale
    elif above is not None:
        found["noise_scale_above"] = above
    sharp = next((d for d in reversed(history) if d.sharpness is not None), None)
    if sharp is not None:
        found["sharpness"] = sharp.sharpness
        if sharp.stability is not None:
            found["sharpness_to_edge"] = sharp.stability
    sizes = [size for size in history[-1].updates if size is not None]
    if sizes:
        found["update_rms"] = tuple(size.rms for size in sizes[:64])
        found["update_ratio"] = tuple(size.ratio for size in sizes[:64])
    absent = {"noise_scale": scale is None and above is None, "sharpness": sharp is None}
    for name, why in history[-1].missing.items():
        if absent.get(name, False):
            found[f"no_{name}"] = why[:200]
    return found


def cost_of(policy: DiagnosticPolicy) -> float:
    """Sample passes of one whole reading: a gradient is three, and a product with the Hessian two gradients."""
    return 3.0 * policy.examples + 6.0 * policy.probe * policy.iterations
