"""Diagnostics of the trunk as it stands: gradient noise scale, sharpness, size of Adam's updates.

The network is called through :func:`torch.func.functional_call` with detached weights and copies of its buffers, and gradients
come from :func:`torch.autograd.grad`: no parameter, gradient, buffer, version counter or training flag of the run is written,
and random numbers are drawn in a state of their own. What cannot be had gets its reason and no number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from automode.errors import AutomodeError, NotExecutableError
from automode.planner.events import Diagnose, Diagnosed
from automode.trainer.curvature import Gradient, Vector, edge_of, sharpest, spread_of, update_sizes
from automode.trainer.random_state import seeded_rng
from automode.trainer.sample_source import Ids, SampleSource
from automode.trainer.trunk import StepFn, Trunk, trainable

if TYPE_CHECKING:
    from automode.trainer.run_parts import RunParts

PARTS = 16
"""Parts that the samples for the noise scale are divided into; each gives one gradient."""

COPIES, LARGEST_MIB = PARTS + 2, 4096
"""Vectors as long as the weights that a reading holds at once, and the memory that they may take, MiB."""


@dataclass(slots=True, kw_only=True)
class Diagnoser:
    """Answers Diagnose commands.

    Attributes:
        trunk: The run.
        source: Training samples by id; None where there are none.
        train_ids: Those to choose from.
        seed: Of the choice, of the first direction, and of what the network draws at random.
        why_not: Why gradients of chosen samples cannot be taken in this run; empty where they can.
        why_no_noise: Why their spread would mean nothing; empty where it does.
    """

    trunk: Trunk
    source: SampleSource | None
    train_ids: Ids
    seed: int
    why_not: str = ""
    why_no_noise: str = ""
    _direction: Vector = field(default_factory=list)

    def state(self) -> Vector:
        """The direction that the next reading goes on from, for :meth:`load`."""
        return self._direction

    def load(self, direction: Vector) -> None:
        """Go on from what :meth:`state` gave."""
        self._direction = [part.to(self.trunk.device) for part in direction]

    def diagnose(self, command: Diagnose, step: int) -> Diagnosed:
        """Take what can be taken."""
        missing: dict[str, str] = {}
        found: dict[str, Any] = {"step": step}
        passes = 0.0
        if command.examples:
            passes += self._try("noise_scale", missing, lambda: self._noise(command.examples, found))
        if command.probe:
            passes += self._try(
                "sharpness", missing, lambda: self._sharpness(command.probe, command.iterations, found)
            )
        updates, why = update_sizes(self.trunk.optimizer)
        if why:
            missing["updates"] = why
        return Diagnosed(**found, updates=updates, missing=missing, passes=passes)

    def _try(self, name: str, missing: dict[str, str], take: Callable[[], float]) -> float:
        """Take one reading, or note why there is none. Returns the sample passes that it took."""
        if self.why_not:
            missing[name] = self.why_not
            return 0.0
        try:
            with seeded_rng(self.seed & 0x7FFFFFFF):
                return take()
        except AutomodeError as error:
            missing[name] = str(error)[:500]
        except Exception as error:  # whatever a network does when it is called in another way
            missing[name] = f"{type(error).__name__}: {str(error)[:500]}"
        return 0.0

    def _noise(self, examples: int, found: dict[str, Any]) -> float:
        if self.why_no_noise:
            raise NotExecutableError(self.why_no_noise)
        # Other samples each time, so that readings can be averaged.
        ids = self._chosen(examples, found["step"])
        size = ids.size // PARTS
        if size < 1:
            raise NotExecutableError(f"{ids.size} training samples cannot be divided into {PARTS} parts")
        at = self._weights()
        gradients = [
            self._gradient(self._batch(ids[i * size : (i + 1) * size]), seeded=False)(at)
            for i in range(PARTS)
        ]
        spread = spread_of(gradients, size)
        found |= {
            "gradient_variance": spread.variance,
            "gradient_square": spread.square,
            "examples": spread.examples,
        }
        return 3.0 * spread.examples

    def _sharpness(self, probe: int, iterations: int, found: dict[str, Any]) -> float:
        ids = self._chosen(probe)  # the same each time, so that one reading can be compared with the next
        at = self._weights()
        start = self._direction
        if [d.shape for d in start] != [w.shape for w in at]:
            start = [torch.randn(w.shape, dtype=torch.float32).to(w) for w in at]
        sharp = sharpest(self._gradient(self._batch(ids), seeded=True), at, start, iterations)
        self._direction = sharp.direction
        found |= {"sharpness": sharp.value, "residual": sharp.residual}
        edge = edge_of(self.trunk.optimizer)
        if edge is not None:
            found["stability"] = sharp.value / edge
        return 6.0 * ids.size * sharp.products

    def _chosen(self, n: int, *more: int) -> Ids:
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, 0xD1A6, *more]))
        return rng.permutation(self.train_ids)[:n]

    def _batch(self, ids: Ids) -> Any:
        assert self.source is not None
        return self.source.batch(ids)

    def _weights(self) -> Vector:
        weights = [p.detach() for p in self._trained().values()]
        low = next((w.dtype for w in weights if w.dtype not in (torch.float32, torch.float64)), None)
        if low is not None:
            raise NotExecutableError(f"the weights are {low}, too coarse for differences of gradients")
        copies = COPIES * sum(w.nbytes for w in weights) / 2**20
        if copies > LARGEST_MIB:
            raise NotExecutableError(
                f"about {copies:,.0f} MiB would be needed for copies of the weights, and {LARGEST_MIB:,} are allowed"
            )
        if not weights:
            raise NotExecutableError("the network has nothing to train")
        return weights

    def _trained(self) -> dict[str, Tensor]:
        return trainable(self.trunk.model)

    def _gradient(self, batch: Any, *, seeded: bool) -> Gradient:
        """Weights to the gradient of the loss on a batch, in full precision; ``seeded``: with the same random numbers each time."""
        names = tuple(self._trained())

        def gradient(weights: Vector) -> Vector:
            leaves = [w.detach().requires_grad_() for w in weights]
            view = _View(self.trunk.model, dict(zip(names, leaves, strict=True)))
            if seeded:
                torch.default_generator.manual_seed(self.seed & 0x7FFFFFFF)
            with torch.enable_grad():
                loss = _loss(self.trunk.step_fn, view, batch)
                grads = torch.autograd.grad(loss, leaves, allow_unused=True)
            return [
                torch.zeros_like(w) if g is None else g.detach() for w, g in zip(leaves, grads, strict=True)
            ]

        return gradient


class _View(nn.Module):
    """The network with other weights and buffers of its own, for one call."""

    def __init__(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        super().__init__()
        # Not registered as a submodule: whatever is done to this module must not reach the run's.
        object.__setattr__(self, "_model", model)
        self._state = weights | {name: b.detach().clone() for name, b in model.named_buffers()}

    def forward(self, *inputs: Any, **named: Any) -> Any:
        model: nn.Module = vars(self)["_model"]
        return functional_call(model, self._state, inputs, named)


def _loss(step_fn: StepFn, view: nn.Module, batch: Any) -> Tensor:
    loss, _, _ = step_fn(view, batch)
    if not math.isfinite(float(loss.detach())):
        raise NotExecutableError(f"the loss is {float(loss.detach())}")
    return loss


def diagnoser_of(
    parts: RunParts, source: SampleSource | None, train_ids: Ids, why_inexact: str | None
) -> Diagnoser:
    """Make a run's diagnoser, which knows what cannot be had in this run.

    Args:
        parts: The run.
        source: Its training samples by id, or None.
        train_ids: Those that training may visit.
        why_inexact: Why the loss is no mean over samples, or None.
    """
    why_not = ""
    if parts.own_step is not None:
        why_not = "the training step is the user's own, and how it makes a loss of a batch is not known"
    elif source is None or not train_ids.size:
        why_not = "there are no training samples that can be chosen by id"
    return Diagnoser(
        trunk=parts.trunk,
        source=source,
        train_ids=train_ids,
        seed=parts.seed,
        why_not=why_not,
        why_no_noise=f"the loss is no mean over samples: {why_inexact}" if why_inexact else "",
    )
