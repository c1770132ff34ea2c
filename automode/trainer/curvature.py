"""What gradients tell about a loss at one point: their noise, its sharpness, and how far Adam moves.

All of it is a function of vectors given; nothing here knows of a network or a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from automode.errors import NotExecutableError
from automode.planner.events import UpdateSize

STEP = 1e-3
"""Length of a finite difference in weight space, relative to the weights' norm (and at least this).

For float32 a central difference is best between 3e-4 and 3e-3 of the norm: rounding of the gradients grows below, the third
derivative above.
"""

ROUNDING = 1e-6
"""Relative error of a gradient that is allowed for: a difference no larger than this is none."""

Vector = list[Tensor]
Gradient = Callable[[Vector], Vector]


@dataclass(frozen=True, slots=True)
class Spread:
    """What the gradients of equal parts of the data tell about one sample's.

    Attributes:
        variance: Trace of the covariance of one sample's gradient, unbiased.
        square: Squared norm of the true gradient, unbiased; may fall below 0.
        examples: Samples in all.
    """

    variance: float
    square: float
    examples: int


def spread_of(gradients: Sequence[Vector], size: int) -> Spread:
    """Separate noise from signal (McCandlish et al. 2018, arXiv:1812.06162, appendix A).

    With m gradients of parts of b samples each: the trace is b times the parts' sample variance, and the squared norm of the
    true gradient is that of their mean less the trace over all b m samples. ``size`` 1 gives the per-sample estimator.

    Args:
        gradients: One gradient a part, at least two.
        size: Samples in each part.

    Raises:
        NotExecutableError: There are fewer than two parts, or a gradient is not finite.
    """
    parts = len(gradients)
    if parts < 2:
        raise NotExecutableError(f"{parts} part of the data says nothing about how gradients differ")
    mean = [torch.stack(tensors).mean(0) for tensors in zip(*gradients, strict=True)]
    deviation = sum(_dot(d, d) for d in ([g - m for g, m in zip(gs, mean, strict=True)] for gs in gradients))
    variance = size * deviation / (parts - 1)
    square = _dot(mean, mean) - variance / (size * parts)
    if not (math.isfinite(variance) and math.isfinite(square)):
        raise NotExecutableError("a gradient is not finite")
    return Spread(variance, square, size * parts)


@dataclass(frozen=True, slots=True)
class Sharpness:
    """The largest eigenvalue of a Hessian.

    Attributes:
        value: The Rayleigh quotient of the last direction.
        residual: Norm of what the direction lacks to be an eigenvector, over the value's magnitude.
        direction: Unit vector, for the next reading to go on from.
        products: Hessian-vector products made.
    """

    value: float
    residual: float
    direction: Vector
    products: int


def sharpest(gradient: Gradient, weights: Vector, start: Vector, iterations: int) -> Sharpness:
    """Find the largest eigenvalue by power iteration on finite differences of gradients.

    Power iteration finds the eigenvalue of largest magnitude. Where that is negative, it goes on with the Hessian shifted by it,
    whose largest eigenvalue belongs to the same direction as the Hessian's own.

    Args:
        gradient: Weights to the gradient of one fixed loss.
        weights: Where; not written to.
        start: A direction, not zero.
        iterations: Hessian-vector products, for each of the two phases.

    Raises:
        NotExecutableError: A gradient is not finite, or the loss is flat in every direction that was tried.
    """
    length = STEP * max(1.0, math.sqrt(_dot(weights, weights)))

    def product(direction: Vector) -> tuple[Vector, float]:
        ahead = gradient([w + length * d for w, d in zip(weights, direction, strict=True)])
        behind = gradient([w - length * d for w, d in zip(weights, direction, strict=True)])
        least = ROUNDING * math.sqrt(_dot(ahead, ahead)) / (2 * length)
        return [(a - b) / (2 * length) for a, b in zip(ahead, behind, strict=True)], least

    found = _power(product, _unit(start), iterations, shift=0.0)
    if found.value >= 0.0:
        return found
    again = _power(product, _unit(start), iterations, shift=-found.value)
    return Sharpness(again.value, again.residual, again.direction, found.products + again.products)


def _power(
    product: Callable[[Vector], tuple[Vector, float]], direction: Vector, iterations: int, *, shift: float
) -> Sharpness:
    value = residual = math.nan
    for done in range(1, iterations + 1):
        image, least = product(direction)
        value = _dot(direction, image)
        squared = _dot(image, image)
        if not (math.isfinite(value) and math.isfinite(squared)):
            raise NotExecutableError("a gradient beside the weights is not finite")
        residual = math.sqrt(max(0.0, squared - value * value)) / max(abs(value), 1e-30)
        moved = [i + shift * d for i, d in zip(image, direction, strict=True)]
        if squared <= least**2:
            raise NotExecutableError(
                "the loss is flat around these weights: its gradient does not change with them"
            )
        if done < iterations:
            direction = _unit(moved)
    return Sharpness(value, residual, direction, iterations)


def update_sizes(optimizer: torch.optim.Optimizer) -> tuple[tuple[UpdateSize | None, ...], str]:
    """Measure how far each parameter group moves in a step of Adam.

    From the optimizer's state alone (and the gradients, where they are still there): m / (sqrt(v) + eps), bias-corrected.
    The last value is StableAdamW's g^2 / v (Wortsman et al. 2023, arXiv:2304.13013), which rises some steps before a spike.

    Returns:
        One entry a group, None for a group without such state; and the reason where there is none at all.
    """
    found = tuple(_update_size(optimizer, group) for group in optimizer.param_groups)
    if any(size is not None for size in found):
        return found, ""
    return (), f"{type(optimizer).__name__} keeps no first and second moments to read an update from"


@torch.no_grad()
def _update_size(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> UpdateSize | None:
    updates = weights = surprises = 0.0
    n = seen = 0
    for parameter in group["params"]:
        state = optimizer.state.get(parameter, {})
        if not {"exp_avg", "exp_avg_sq", "step"} <= set(state) or "betas" not in group:
            continue
        step = float(state["step"])
        if step < 1 or not isinstance(state["exp_avg"], Tensor):
            continue
        first, second = (1.0 - float(beta) ** step for beta in group["betas"])
        v = state["exp_avg_sq"].float() / second
        update = (state["exp_avg"].float() / first) / (v.sqrt() + float(group["eps"]))
        updates += float(update.square().sum())
        weights += float(parameter.detach().float().square().sum())
        n += parameter.numel()
        if parameter.grad is not None and not parameter.grad.is_sparse:
            floor = v.clamp_min(float(group["eps"]) ** 2)
            surprises += float((parameter.grad.detach().float().square() / floor).sum())
            seen += parameter.numel()
    if not n:
        return None
    rms, weight = math.sqrt(updates / n), math.sqrt(weights / n)
    surprise = math.sqrt(surprises / seen) if seen else None
    ratio = float(group["lr"]) * rms / weight if weight > 0.0 else math.inf
    if not (math.isfinite(rms) and math.isfinite(ratio)):
        return None
    return UpdateSize(
        rms=rms, ratio=ratio, surprise=surprise if surprise is not None and math.isfinite(surprise) else None
    )


def edge_of(optimizer: torch.optim.Optimizer) -> float | None:
    """Sharpness at which full-batch gradient descent becomes unstable, 2 (1 + momentum) / rate; None where there is no such number."""
    if type(optimizer) is not torch.optim.SGD:
        return None
    settings = {(float(g["lr"]), float(g["momentum"]), bool(g["nesterov"])) for g in optimizer.param_groups}
    if len(settings) != 1:
        return None
    rate, momentum, nesterov = settings.pop()
    return None if nesterov or rate <= 0.0 else 2.0 * (1.0 + momentum) / rate


def _dot(a: Vector, b: Vector) -> float:
    return float(sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True)))


def _unit(vector: Vector) -> Vector:
    norm = math.sqrt(_dot(vector, vector))
    if not norm > 0.0 or not math.isfinite(norm):
        raise NotExecutableError(
            "the loss is flat around these weights: its gradient does not change with them"
        )
    return [v / norm for v in vector]
