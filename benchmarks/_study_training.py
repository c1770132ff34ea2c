"""A bare training loop for the signals study: small networks, one flat vector of weights, snapshots that cost a copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from _study_tasks import Task
from numpy.typing import NDArray
from torch import Tensor

PROBE = 512
PROBE_EVERY = 20
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Snapshot:
    """Everything that the next step depends on."""

    weights: Tensor
    moments: tuple[Tensor, Tensor]
    step: int
    taken: int
    order: NDArray[np.intp]
    at: int
    rng: dict[str, object]


@dataclass
class Curve:
    """What a run's log would hold, and the loss on fixed training samples every 20 steps, which it would not."""

    loss: list[float] = field(default_factory=list)
    gnorm: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    probe: list[float] = field(default_factory=list)


@dataclass
class Fault:
    """What is done to one step: to its batch, its gradient or its rate."""

    batch: Callable[[Tensor, Tensor, np.random.Generator], tuple[Tensor, Tensor]] | None = None
    gradient: float = 1.0
    rate: float = 1.0


class Training:
    """One run: SGD with momentum .9 or Adam on a task, in epochs without replacement.

    Args:
        task: What is learnt.
        optimizer: ``sgd`` or ``adam``.
        batch: Samples a step.
        seed: Of the first weights and of the order of the samples.
    """

    def __init__(self, task: Task, optimizer: str, batch: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.task, self.adam, self.batch = task, optimizer == "adam", batch
        self.model = task.network()
        parameters = list(self.model.parameters())
        self.weights = torch.cat([p.detach().flatten() for p in parameters])
        self.gradient = torch.zeros_like(self.weights)
        start = 0
        for p in parameters:
            stop = start + p.numel()
            p.data = self.weights[start:stop].view_as(p)
            p.grad = self.gradient[start:stop].view_as(p)
            start = stop
        self.moments = (torch.zeros_like(self.weights), torch.zeros_like(self.weights))
        self.rng = np.random.default_rng(seed)
        self.n = len(task.inputs)
        self.order = self.rng.permutation(self.n)
        self.at = self.taken = self.step = 0
        chosen = torch.from_numpy(np.random.default_rng(0).permutation(self.n)[:PROBE])
        self.probe_x, self.probe_y = task.inputs[chosen], task.targets[chosen]

    def probe(self) -> float:
        """Loss on the fixed samples."""
        with torch.no_grad():
            return float(self.task.loss(self.model, self.probe_x, self.probe_y))

    def snapshot(self) -> Snapshot:
        """Copy everything that the next step depends on."""
        return Snapshot(
            weights=self.weights.clone(),
            moments=(self.moments[0].clone(), self.moments[1].clone()),
            step=self.step,
            taken=self.taken,
            order=self.order.copy(),
            at=self.at,
            rng=self.rng.bit_generator.state,
        )

    def restore(self, saved: Snapshot) -> None:
        """Go back to a snapshot, bit for bit."""
        self.weights.copy_(saved.weights)
        self.moments[0].copy_(saved.moments[0])
        self.moments[1].copy_(saved.moments[1])
        self.step, self.taken, self.at = saved.step, saved.taken, saved.at
        self.order = saved.order.copy()
        self.rng.bit_generator.state = saved.rng

    def advance(self, rate: float, curve: Curve | None = None, fault: Fault | None = None) -> float:
        """Take one step and return its loss; a step that is not finite is not applied."""
        chosen = torch.from_numpy(self._next())
        x, y = self.task.inputs[chosen], self.task.targets[chosen]
        if fault is not None:
            if fault.batch is not None:
                x, y = fault.batch(x, y, self.rng)
            rate *= fault.rate
        self.gradient.zero_()
        loss = self.task.loss(self.model, x, y)
        loss.backward()  # type: ignore[no-untyped-call]
        if fault is not None and fault.gradient != 1.0:
            self.gradient.mul_(fault.gradient)
        value, norm = float(loss.detach()), float(self.gradient.norm())
        if curve is not None:
            if self.step % PROBE_EVERY == 0:
                curve.probe.append(self.probe())
            curve.loss.append(value)
            curve.gnorm.append(norm)
            curve.lr.append(rate)
        if np.isfinite(value) and np.isfinite(norm):
            self._update(rate)
        self.step += 1
        return value

    def _next(self) -> NDArray[np.intp]:
        if self.at + self.batch > self.n:
            self.order = self.rng.permutation(self.n)
            self.at = 0
        self.at += self.batch
        return self.order[self.at - self.batch : self.at]

    def _update(self, rate: float) -> None:
        first, second = self.moments
        if not self.adam:
            first.mul_(0.9).add_(self.gradient)
            self.weights.add_(first, alpha=-rate)
            return
        self.taken += 1
        first.lerp_(self.gradient, 0.1)
        second.mul_(0.999).addcmul_(self.gradient, self.gradient, value=0.001)
        scale = (second / (1.0 - 0.999**self.taken)).sqrt_().add_(1e-8)
        self.weights.addcdiv_(first, scale, value=-rate / (1.0 - 0.9**self.taken))
