"""Adam and AdamW over one flat buffer: for small models, whose optimizer step costs as much as everything else.

The parameters become views of one buffer a group, the moments too, and a step is one fused kernel. ``state_dict`` has the layout of
torch's own class, both ways. Opt-in, since the last bits differ: after 100 steps of a small network parameters are within 1e-5
(float32) or 1e-12 (float64) of those of ``torch.optim.AdamW``; the arithmetic is that of ``fused=True``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors
from torch.autograd import _profiler_enabled  # type: ignore[attr-defined]
from torch.autograd.graph import increment_version
from torch.optim import optimizer as optimizer_module

from automode.errors import UsageError
from automode.trainer.gradient_norms import grad_norms, total_norm

_WIDE = (torch.float32, torch.float64)
_place = Tensor.data_ptr
_CANNOT = ("amsgrad", "maximize", "capturable", "differentiable")


class _Bucket(NamedTuple):
    """Parameters of one group that step together; ``idle`` ones have no gradient. ``places``: where each one's data must be."""

    group: dict[str, Any]
    parameters: list[Tensor]
    idle: bool
    flat: Tensor
    first: Tensor
    second: Tensor
    step: Tensor
    places: list[int]


class FlatAdam(torch.optim.Adam):
    """``torch.optim.Adam`` over flat buffers.

    A parameter without a gradient is left alone for that step, as torch does it; where others are left alone than the step
    before, the buffers are built anew, which costs about as much as ten steps.

    Args:
        params: Parameters or groups, as for torch's; each group's are moved into one buffer, in place.
        lr: Learning rate.
        betas: Decay of the two moments, each in [0, 1).
        eps: Added to the root of the second moment.
        weight_decay: Added to the gradient, times the parameter.

    Raises:
        UsageError: A group asks for ``amsgrad``, ``maximize``, ``capturable`` or ``differentiable``, or names a parameter twice, or one
            is complex.
    """

    _decoupled = False
    _buckets: list[_Bucket] | None = None
    _every: list[Tensor] | None = None
    _alike = False

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self._build()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see torch."""
        super().add_param_group(param_group)
        given = self.param_groups[-1]["params"]
        if len({id(parameter) for parameter in given}) < len(given):
            raise UsageError(
                f"a group of {len(given)} parameters names one of them twice, which would step it twice; name each once"
            )
        self._buckets = self._every = None

    def state_dict(self) -> dict[str, Any]:
        """Give the state as torch's class does; see there."""
        found: dict[str, Any] = super().state_dict()
        # Each parameter's own, since torch's Adam counts up what it is given in place; on the CPU, where its default loop wants it.
        found["state"] = {
            key: {**kept, "step": kept["step"].to("cpu", copy=True)} for key, kept in found["state"].items()
        }
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class, or of torch's Adam or AdamW."""
        super().load_state_dict(state_dict)
        self._buckets = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; see torch."""
        if not set_to_none:
            super().zero_grad(set_to_none=False)
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step; see torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks or _listened():
            self._step_heard()
        else:
            self._step()
        return loss

    # Torch wraps every optimizer's step to call hooks and to tell the profiler, at the price of a third of this one. Marked as
    # wrapped, ours is left alone, and calls torch's wrapper where somebody listens.
    step.hooked = True  # type: ignore[attr-defined]

    def gradient_norm(self) -> float | Tensor:
        """Euclidean norm of all gradients: on the CPU a float, else a 0-dimensional tensor that is not waited for."""
        parameters = self._every
        if parameters is None:
            parameters = self._every = [p for group in self.param_groups for p in group["params"]]
            # What decides how norms are taken must be the same after a cut: the ways differ in their last bits.
            self._alike = len({(p.dtype, p.device) for p in parameters}) == 1 and parameters[0].dtype in _WIDE
        gradients = [gradient for parameter in parameters if (gradient := parameter.grad) is not None]
        if not gradients:
            return 0.0
        if not self._alike or gradients[0].layout is not torch.strided:
            return total_norm(grad_norms(parameters))
        flat: Tensor = _flatten_dense_tensors(gradients)  # type: ignore[no-untyped-call]
        norm: Tensor = torch.linalg.vector_norm(flat)
        return norm.item() if norm.is_cpu else norm

    def _step(self) -> None:
        buckets = self._buckets
        found = None if buckets is None else _gradients(buckets)
        if found is None or buckets is None:
            buckets = self._build()
            found = _gradients(buckets)
            assert found is not None
        kernel: Any = torch._fused_adamw_ if self._decoupled else torch._fused_adam_
        for bucket, gradients in zip(buckets, found, strict=True):
            if bucket.idle:
                continue
            group = bucket.group
            beta1, beta2 = group["betas"]
            kernel(
                [bucket.flat],
                [_flat(gradients).detach()],
                [bucket.first],
                [bucket.second],
                [],
                [bucket.step.add_(1)],
                lr=float(group["lr"]),
                beta1=float(beta1),
                beta2=float(beta2),
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
            # A graph that still holds the old weights must not be run backward, and only this tells autograd.
            increment_version(bucket.parameters)

    _step_heard = torch.optim.Optimizer.profile_hook_step(_step)

    @torch.no_grad()
    def _build(self) -> list[_Bucket]:
        """Move parameters and moments into fresh buffers; values stay as they are."""
        self._buckets = [
            self._bucket(group, parameters, idle=idle)
            for group in self.param_groups
            for idle, parameters in _alike(group, self.state)
        ]
        return self._buckets

    def _bucket(self, group: dict[str, Any], parameters: list[Tensor], *, idle: bool) -> _Bucket:
        for name in _CANNOT:
            if group.get(name):
                raise UsageError(
                    f"{type(self).__name__} cannot do {name}=True; use torch.optim.{type(self).__name__.removeprefix('Flat')}"
                )
        flat = _flat([parameter.detach() for parameter in parameters])
        if flat.is_complex():
            raise UsageError(
                f"{type(self).__name__} steps real parameters, and {flat.dtype} came; use torch.optim.{type(self).__name__.removeprefix('Flat')}"
            )
        first, second = torch.zeros_like(flat), torch.zeros_like(flat)
        # torch keeps the step of a fused optimizer with its parameters, in single precision.
        step = torch.zeros((), dtype=torch.float32, device=flat.device)
        start = 0
        for parameter in parameters:
            end = start + parameter.numel()
            part = slice(start, end)
            known = self.state.get(parameter)
            parameter.data = flat[part].view(parameter.shape)
            moments = {"exp_avg": first[part], "exp_avg_sq": second[part]}
            if known:
                step.copy_(torch.as_tensor(known["step"], dtype=torch.float32))
                for name, kept in moments.items():
                    kept.copy_(known[name].reshape(-1))
            if known or not idle:
                views = {name: kept.view(parameter.shape) for name, kept in moments.items()}
                self.state[parameter] = {"step": step, **views}
            start = end
        return _Bucket(group, parameters, idle, flat, first, second, step, list(map(_place, parameters)))


class FlatAdamW(FlatAdam, torch.optim.AdamW):
    """``torch.optim.AdamW`` over flat buffers; see :class:`FlatAdam`.

    Args:
        params: As for :class:`FlatAdam`.
        lr: Learning rate.
        betas: Decay of the two moments, each in [0, 1).
        eps: Added to the root of the second moment.
        weight_decay: Times learning rate and parameter, taken off the parameter (Loshchilov and Hutter 2019).
    """

    _decoupled = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        torch.optim.AdamW.__init__(self, params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self._build()


def flatten(optimizer: torch.optim.Optimizer) -> FlatAdam:
    """Give the flat counterpart of an optimizer, over the same parameters, with its groups and its state.

    The parameters are moved in place; the optimizer given must not be used any more, and schedulers are built on the new one.

    Args:
        optimizer: A ``torch.optim.Adam`` or ``torch.optim.AdamW``.

    Raises:
        UsageError: It is another kind, or asks for what flat buffers cannot do.
    """
    kinds: dict[type, type[FlatAdam]] = {torch.optim.Adam: FlatAdam, torch.optim.AdamW: FlatAdamW}
    kind = kinds.get(type(optimizer))
    if kind is None:
        raise UsageError(
            f"flatten takes torch.optim.Adam or torch.optim.AdamW, got {type(optimizer).__name__}"
        )
    groups = [dict(group) for group in optimizer.param_groups]
    for group in groups:
        for name in _CANNOT:
            if group.get(name):
                raise UsageError(f"flatten: flat buffers cannot do {name}=True")
        group["foreach"], group["fused"] = None, None
    state = optimizer.state_dict()
    made = kind(groups)
    if state["state"]:
        made.load_state_dict({"state": state["state"], "param_groups": made.state_dict()["param_groups"]})
    return made


def _alike(group: dict[str, Any], state: Any) -> Iterator[tuple[bool, list[Tensor]]]:
    """Split a group's parameters by what must be equal in a buffer: gradient or none, device, type, steps taken."""
    found: dict[Any, list[Tensor]] = {}
    for parameter in group["params"]:
        gradient = parameter.grad
        if gradient is not None and gradient.layout is not torch.strided:
            raise UsageError(
                f"a gradient of layout {gradient.layout} came, and flat buffers hold dense ones; use torch.optim.SparseAdam"
            )
        known = state.get(parameter)
        steps = float(known["step"]) if known else 0.0
        key = (gradient is None, parameter.device, parameter.dtype, steps)
        found.setdefault(key, []).append(parameter)
    for (idle, *_), parameters in found.items():
        yield idle, parameters


def _gradients(buckets: list[_Bucket]) -> list[list[Tensor]] | None:
    """The gradients of every bucket; None where the buffers no longer fit."""
    found = []
    for bucket in buckets:
        parameters = bucket.parameters
        gradients = [gradient for parameter in parameters if (gradient := parameter.grad) is not None]
        if len(gradients) != (0 if bucket.idle else len(parameters)):
            return None
        # A parameter that was moved, or whose data were replaced, has left its buffer: a step on that would not reach it.
        if list(map(_place, parameters)) != bucket.places:
            return None
        found.append(gradients)
    return found


def _listened() -> bool:
    """Whether hooks on every optimizer, or the profiler, are to hear of steps; torch has no public name for either."""
    everywhere = optimizer_module._global_optimizer_pre_hooks or optimizer_module._global_optimizer_post_hooks  # noqa: SLF001
    return bool(everywhere) or bool(_profiler_enabled())


def _flat(tensors: list[Tensor]) -> Tensor:
    flat: Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
    # Of a single tensor torch gives a view, and a buffer of ours must not be the user's own.
    return flat.clone() if len(tensors) == 1 else flat
