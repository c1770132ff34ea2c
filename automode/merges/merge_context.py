"""What a merge may use, what it gives back, and the protocol of a merge method."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from torch import Tensor, nn

from automode.errors import MergeError
from automode.merges.batches import BatchSource, Forward, forward_inputs
from automode.merges.distill import OptimizerFactory, Teacher, adamw
from automode.merges.lora import Adapter
from automode.merges.moe import Task
from automode.merges.norm_statistics import norm_layers, recompute
from automode.merges.state_dicts import StateDict, cloned, norm_statistics_keys

ReportValue: TypeAlias = str | float | int | bool | tuple[float, ...] | tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeContext:
    """What a merge may use besides the states. What a method needs and does not find is a reason to refuse it.

    Attributes:
        build_model: builds a network of the parent's architecture on the device to compute on; its weights are
            replaced.
        batches: gives a pass over shuffled training batches.
        score: held-out score of a full state, greater is better (val-A, never val-B).
        score_passes: forward-equivalents that one call of ``score`` costs.
        norm_samples: most samples used to recompute norm statistics.
        task: what outputs mean, for Fisher information and distillation.
        forward: how a model reads a batch.
        trajectory: the averages along the trunk by name, for ``swa`` (``TrajectoryAverages.candidates(base)``).
        adapters: the specialists' adapters, for ``adapter_fuse``.
        adapter_weights: one weight for each adapter; ``1 / n`` each unless given.
        teacher: for ``distill``; the ensemble of the members unless given.
        teacher_passes: the teacher's cost of one sample in forward-equivalents; needed with ``teacher``.
        optimizer: for ``distill``; AdamW unless given.
        seed: chance derives from it.
    """

    build_model: Callable[[], nn.Module] | None = None
    batches: BatchSource | None = None
    score: Callable[[StateDict], float] | None = None
    score_passes: float = 0.0
    norm_samples: int = 2048
    task: Task = "classification"
    forward: Forward = forward_inputs
    trajectory: Mapping[str, StateDict] = field(default_factory=dict)
    adapters: Sequence[Adapter] = ()
    adapter_weights: Sequence[float] | None = None
    teacher: Teacher | None = None
    teacher_passes: float | None = None
    optimizer: OptimizerFactory = adamw
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeResult:
    """One state made of several.

    Attributes:
        state: full state dict with the parent's keys.
        passes: forward-equivalents spent, all of them.
        report: what a card shows: the method's findings and how the norm statistics came about (``norm_statistics``:
            ``none`` to have, ``recomputed``, or ``merged`` with the weights because no batches were given).
    """

    state: dict[str, Tensor]
    passes: int
    report: Mapping[str, ReportValue]


class MergeMethod(Protocol):
    """One way to make one state of several."""

    @property
    def name(self) -> str:
        """The name on the card."""

    def applicable(
        self, parent: StateDict, members: Sequence[StateDict], context: MergeContext
    ) -> str | None:
        """Say why this merge cannot run, or return None when it can. Reads shapes and settings only."""

    def merge(self, parent: StateDict, members: Sequence[StateDict], context: MergeContext) -> MergeResult:
        """Merge; only called when applicable. Norm statistics and their cost are the caller's concern."""


class Judge:
    """Scores states as they would be adopted, norm statistics recomputed, and counts the passes."""

    def __init__(self, context: MergeContext) -> None:
        self.context = context
        self.spent = 0.0

    @property
    def passes(self) -> int:
        """Forward-equivalents spent so far, rounded up."""
        return math.ceil(self.spent)

    def score(self, state: StateDict) -> float:
        """Return the held-out score of a state, greater is better."""
        assert self.context.score is not None
        ready, _ = self.refreshed(state)
        self.spent += self.context.score_passes
        return float(self.context.score(ready))

    def checked(self, state: StateDict, what: str) -> float:
        """Return the score, or refuse one that is not a number by the name of ``what`` was scored."""
        value = self.score(state)
        if math.isnan(value):
            raise MergeError(f"the score of {what} is not a number: leave out what diverged")
        return value

    def refreshed(self, state: StateDict) -> tuple[dict[str, Tensor], str]:
        """Return the state with its norm statistics recomputed where that is possible, and how they came about."""
        if not norm_statistics_keys(state):
            return dict(state), "none"
        if self.context.build_model is None or self.context.batches is None:
            return dict(state), "merged"
        model = loaded(self.context.build_model(), state)
        if not norm_layers(model):
            return dict(state), "merged"
        self.spent += recompute(
            model, self.context.batches(), max_samples=self.context.norm_samples, forward=self.context.forward
        )
        return cloned(model.state_dict()), "recomputed"


def loaded(model: nn.Module, state: StateDict) -> nn.Module:
    """Load a state strictly and return the model.

    Raises:
        MergeError: the model is of another architecture.
    """
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise MergeError(
            f"`build_model` builds another architecture than the states are of: {error}"
        ) from error
    return model


def needs_score(context: MergeContext) -> str | None:
    """Return the reason why a method that chooses by score cannot run, or None."""
    return "it chooses by held-out score and the context has no `score`" if context.score is None else None


def needs_model(context: MergeContext, purpose: str) -> str | None:
    """Return the reason why a method that runs networks on batches cannot run, or None."""
    given = {"`build_model`": context.build_model, "`batches`": context.batches}
    missing = [name for name, value in given.items() if value is None]
    return f"the context has no {' and no '.join(missing)} to {purpose} with" if missing else None
