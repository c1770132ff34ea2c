"""The trunk: the user's own model, optimizer and schedule, held together so that they can be snapshotted and put back.

A snapshot is two parts: ``weights`` (the model's state dict) and ``rest`` (optimizer, schedule clock, averages,
random states), which the checkpoint store writes as safetensors and as plain data.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from automode.errors import NotExecutableError
from automode.merges.batches import map_tensors
from automode.merges.trajectory import DEFAULT_EVERY, TrajectoryAverages
from automode.trainer.curation import Curation
from automode.trainer.held_back import HeldBack
from automode.trainer.ids import RecordedLoader
from automode.trainer.new_labels import NewLabels
from automode.trainer.sample_source import Ids
from automode.trainer.trees import tensors_in

Precision = Literal["fp32", "bf16", "fp16"]
Judged = Literal["tail"] | None
"""What of a candidate is judged: the tail average since the fork; None: the best of raw weights and averages."""

EVERY_SINCE_FORK = 2
"""Steps between two updates of averages that begin at a fork: some tens of steps have to do."""

StepFn = Callable[[nn.Module, Any], tuple[Tensor, Any, Any]]
"""Model and batch to (loss, outputs, targets)."""


@dataclass(slots=True, kw_only=True)
class Trunk:
    """What is being trained, and how.

    Attributes:
        model: The user's model, never replaced.
        optimizer: The user's optimizer, never replaced.
        scheduler: The user's learning-rate scheduler, or None.
        step_fn: Model and batch to (loss, outputs, targets).
        loss_fn: The user's loss.
        device: Where batches go.
        precision: Arithmetic of the forward pass.
        clip_norm: Largest gradient norm, or None.
        cap_norm: Largest gradient norm that a safeguard allows for now, or None.
        part_rows: Rows of the parts that each batch is trained on in, with an optimizer step each, or None: batches are not divided.
        averages: EMA and tail averages outside the model (act mode), or None.
        loader: The training batches; None where samples have no ids to be left out by.
        curation: Takes samples from batches that an adopted card left out, and gives others new labels; None while there are none.
        held: Training samples that are held out of every batch, or None.
        relabelling: Hears of the ids whose labels are replaced, before another batch is trained on; None: nobody wants to.
        step: Optimizer steps taken.
        first: The run's first weights, on the host, while a card may restart from them, or None.
        first_moments: What the optimizer held then, by parameter; most kinds hold nothing before their first step.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    step_fn: StepFn
    loss_fn: Callable[..., Tensor]
    device: torch.device
    precision: Precision = "fp32"
    clip_norm: float | None = None
    cap_norm: float | None = None
    part_rows: int | None = None
    averages: TrajectoryAverages | None = None
    loader: RecordedLoader | None = None
    curation: Curation | None = None
    held: HeldBack | None = None
    relabelling: Callable[[Ids], None] | None = None
    step: int = 0
    first: dict[str, Tensor] | None = None
    first_moments: dict[Any, Any] = field(default_factory=dict)
    parameters: list[nn.Parameter] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.follow()

    def follow(self) -> None:
        """Know the parameters that the optimizer has been given since the last call; the list stays the same one."""
        groups = self.optimizer.param_groups
        if sum(len(group["params"]) for group in groups) != len(self.parameters):
            self.parameters[:] = [p for group in groups for p in group["params"]]

    def autocast(self, precision: Precision | None = None) -> AbstractContextManager[Any]:
        """The context that a forward pass runs in."""
        return autocast(self.device, precision or self.precision)

    def rates(self) -> tuple[float, ...]:
        """Learning rate of every parameter group."""
        return tuple(float(group["lr"]) for group in self.optimizer.param_groups)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return (weights, rest): references to live tensors, to be saved before the next step."""
        rest: dict[str, Any] = {"optimizer": self.optimizer.state_dict(), "step": self.step}
        if self.scheduler is not None:
            rest["scheduler"] = self.scheduler.state_dict()
        if self.averages is not None:
            rest["averages"] = self.averages.state_dict()
        if self.curation is not None:
            rest["excluded"] = torch.from_numpy(self.curation.excluded)
            rest["relabelled"] = torch.from_numpy(self.curation.relabelled.packed())
        return dict(self.model.state_dict()), rest

    def load(self, weights: Mapping[str, Tensor], rest: Mapping[str, Any], *, schedule: bool) -> None:
        """Put a snapshot back into the user's own objects. ``schedule`` says whether the schedule's clock goes back too."""
        self.model.load_state_dict(weights)
        for (
            parameter
        ) in self.parameters:  # of other weights; a step that accumulates must not go on from them
            parameter.grad = None
        self.optimizer.load_state_dict(rest["optimizer"])
        if schedule and self.scheduler is not None and "scheduler" in rest:
            self.scheduler.load_state_dict(rest["scheduler"])
        if self.averages is not None and "averages" in rest:
            self.averages.load_state_dict(rest["averages"])
        self.curation = None
        excluded = rest["excluded"].numpy() if "excluded" in rest else np.empty(0, dtype=np.int64)
        labels = NewLabels.unpacked(rest["relabelled"].numpy()) if "relabelled" in rest else NewLabels.none()
        self.curate(excluded, labels)

    @property
    def excluded(self) -> Ids:
        """Ids of the samples that training leaves out, ascending."""
        return np.empty(0, dtype=np.int64) if self.curation is None else self.curation.excluded

    @property
    def relabelled(self) -> NewLabels:
        """Labels that take the place of the data's own."""
        return NewLabels.none() if self.curation is None else self.curation.relabelled

    @property
    def curated_ids(self) -> Ids:
        """Ids of the samples that are left out or have a new label, ascending."""
        return np.union1d(self.excluded, self.relabelled.ids)

    def curate(self, excluded: Ids, labels: NewLabels) -> None:
        """Train on without some samples and with new labels of others, beside what was left out and relabelled before.

        Raises:
            NotExecutableError: The training batches have no sample ids.
        """
        if excluded.size or labels.size:
            if self.loader is None or self.loader.reason is not None:
                raise NotExecutableError(
                    "samples cannot be left out of the run, nor relabelled: its batches have no sample ids"
                    + ("" if self.loader is None else f" ({self.loader.reason})")
                )
            out = np.union1d(self.excluded, excluded)
            self.curation = Curation(self.loader, out, labels.over(self.relabelled).without(out), self.held)
        elif self.held is not None and self.curation is None:
            self.hold_out(self.held)
        if self.relabelling is not None:
            self.relabelling(self.relabelled.ids)

    def hold_out(self, held: HeldBack) -> None:
        """Train without some samples from here on, whatever cards leave out beside them."""
        assert self.loader is not None
        self.held = held
        self.curation = Curation(self.loader, np.empty(0, dtype=np.int64), held=held)

    def curated(self, batch: Any, positions: Sequence[Any] | None) -> tuple[Any, Sequence[Any] | None]:
        """Return a batch, and its samples' positions, without what training leaves out and with the labels it trains with."""
        return (batch, positions) if self.curation is None else self.curation(batch, positions)

    def weights(self) -> dict[str, Tensor]:
        """A copy of the current weights."""
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    @property
    def mebibytes(self) -> float:
        """Memory of the weights, MiB."""
        return float(sum(t.numel() * t.element_size() for t in self.model.state_dict().values())) / 2**20

    def keep_first(self) -> None:
        """Keep a copy of weights and optimizer state as they are, on the host, for cards that restart from them."""
        self.first = _on_host(dict(self.model.state_dict()))
        self.first_moments = _on_host(self.optimizer.state_dict()["state"])

    def forget_first(self) -> None:
        """Free what :meth:`keep_first` keeps."""
        self.first, self.first_moments = None, {}

    def first_state(self) -> dict[str, Any]:
        """Return what the run began with, on the host, as snapshots hold it: ``first`` and ``first_moments``.

        Raises:
            NotExecutableError: They are not kept any more.
        """
        if self.first is None:
            raise NotExecutableError(
                "a card that restarts needs the run's first weights, which are kept until policy.probe.until of the run is over (longer_until where a "
                "probe of a restart is undecided), and are not there any more: submit it earlier, or leave restart out"
            )
        return {"first": self.first, "first_moments": self.first_moments}

    def candidates(self, judged: Judged = None) -> dict[str, dict[str, Tensor]]:
        """What is judged of the raw weights and every average of them, as full state dicts."""
        return judged_of(candidates_of(self.model, self.averages), judged)


def first_of(rest: Mapping[str, Any], variant: str, snapshot: str) -> dict[str, Tensor]:
    """Return the run's first weights, which a snapshot of the trunk holds beside its own.

    Raises:
        NotExecutableError: It does not.
    """
    if "first" not in rest:
        raise NotExecutableError(
            f"variant `{variant}` restarts from the run's first weights, and snapshot {snapshot[:19]} does not hold them"
        )
    first: dict[str, Tensor] = rest["first"]
    return first


def _on_host(value: Any) -> Any:
    return map_tensors(lambda tensor: tensor.detach().to("cpu", copy=True), value)


def begin_averages(averages: TrajectoryAverages | None, *, every: int = DEFAULT_EVERY) -> None:
    """Let averages forget what was before, and read the weights every so many steps from now on."""
    if averages is not None:
        averages.restart()
        averages.every = every


def judged_of(candidates: dict[str, dict[str, Tensor]], judged: Judged) -> dict[str, dict[str, Tensor]]:
    """Return those candidates that are judged; a variant's own average is in any case."""
    if judged is None:
        return candidates
    return {name: state for name, state in candidates.items() if name in ("tail", "ema")}


def candidates_of(model: nn.Module, averages: TrajectoryAverages | None) -> dict[str, dict[str, Tensor]]:
    """The raw weights of a model, and its averages where it has any, as full state dicts."""
    raw = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    found = {"raw": raw}
    if averages is not None and averages.updates > 0:
        found |= averages.candidates(raw)
    return found


@torch.no_grad()
def moving_average(
    average: dict[str, Tensor] | None, named: Mapping[str, Tensor], decay: float
) -> dict[str, Tensor]:
    """Move an average of weights towards them, in place; without one, begin it."""
    floats = {n: p.detach() for n, p in named.items() if p.is_floating_point()}
    if average is None:
        return {n: p.clone() for n, p in floats.items()}
    for name, p in floats.items():
        average[name].lerp_(p, 1.0 - decay)
    return average


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """The autocast context of a precision; none at all for fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Name to parameter of what is trained."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def copy_of(trunk: Trunk) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """Copy model, optimizer and scheduler together, so that the copies refer to each other and to nothing of the trunk's.

    One ``deepcopy`` with one memo relinks the optimizer's parameters and the scheduler's optimizer. An optimizer pickles
    only its defaults, state and groups, so that the schedule's patched ``step`` method stays behind.

    Raises:
        NotExecutableError: The model cannot be copied.
    """
    with without_gradients(trunk.parameters):
        try:
            model, optimizer = copy.deepcopy((trunk.model, trunk.optimizer), kept_activations(trunk.model))
            scheduler = (
                copy.deepcopy(trunk.scheduler, {id(trunk.optimizer): optimizer})
                if trunk.scheduler is not None
                else None
            )
        except Exception as error:
            raise NotExecutableError(
                f"the model, optimizer or scheduler cannot be copied ({type(error).__name__}: {error}), so no specialist can be "
                "trained beside the run; remove what cannot be deep-copied (open files, locks, generators) from the model"
            ) from error
    return model, optimizer, scheduler


def model_copy_of(trunk: Trunk) -> nn.Module:
    """Copy the model alone.

    Raises:
        NotExecutableError: It cannot be copied.
    """
    with without_gradients(trunk.parameters):
        try:
            return copy.deepcopy(trunk.model, kept_activations(trunk.model))
        except Exception as error:
            raise NotExecutableError(
                f"the model cannot be copied ({type(error).__name__}: {error}), so no other weights can be judged; remove what "
                "cannot be deep-copied (open files, locks, generators) from the model"
            ) from error


def kept_activations(model: nn.Module) -> dict[int, Any]:
    """What a ``deepcopy`` is to take for the outputs of a forward pass that modules keep (attention maps, hidden states).

    Torch refuses to copy them, as their graph belongs to the model's own parameters; a copy has their values without it.
    """
    own = ("_parameters", "_buffers", "_modules")
    values = [value for m in model.modules() for name, value in vars(m).items() if name not in own]
    return {id(kept): kept.detach().clone() for kept in tensors_in(values) if not kept.is_leaf}


@contextmanager
def without_gradients(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Hide the gradients for a moment, so that a copy does not carry them."""
    grads = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in zip(parameters, grads, strict=True):
            p.grad = grad
