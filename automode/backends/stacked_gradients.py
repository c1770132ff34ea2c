"""Losses and gradients of several members at once: one function, vectorised over rows, then traced into a plain graph.

``vmap(grad_and_value(loss))`` gives the right numbers for any network that torch can vectorise, and costs about a millisecond
of dispatch a step. Tracing it once leaves the bare operations, which are then simplified; that costs a fraction of a second
a graph, and a two-layer network's step falls from 1.0 to .3 ms. A graph is kept for later stacks of the same members' kind.

A graph is a recording: it holds for one shape of batch, and for the network's settings of that moment. Whether it tells the
truth is tested before it is used, against the members' own gradients.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.func import functional_call, functionalize, grad_and_value, vmap
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from automode.backends.graph_passes import is_random, simplify
from automode.backends.stacked_parameters import StackedParameters

LossOf = Callable[[nn.Module, Any, Tensor | None], Tensor]
PLAIN = (bool, int, float, str, bytes, type(None))
KEPT_GRAPHS = 8

TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-9}
"""Largest distance of a stacked gradient from the member's own, relative to its norm; 1e-6 and 1e-15 are usual."""


class CannotStackError(Exception):
    """These members cannot be trained together; the message says why."""


@dataclass(frozen=True, slots=True)
class Batches:
    """One batch for all members, or one for each.

    Attributes:
        leaves: Tensors and plain values, in the batch's own order; stacked [rows, ...] where there is one for each.
        spec: How the batch is put together from them.
        shared: Whether it is one for all.
    """

    leaves: tuple[Any, ...]
    spec: Any
    shared: bool

    @classmethod
    def of(cls, drawn: Sequence[Any], *, shared: bool) -> Batches:
        """Flatten what the members drew: a single batch for all, or one for each row.

        Raises:
            CannotStackError: The members' batches differ in more than their tensors' values.
        """
        flat = [pytree.tree_flatten(batch) for batch in drawn]
        first, spec = flat[0]
        if shared:
            return cls(tuple(first), spec, shared=True)
        leaves: list[Any] = []
        for column in zip(*(values for values, _ in flat), strict=True):
            if all(isinstance(value, Tensor) and value.shape == column[0].shape for value in column):
                leaves.append(torch.stack(column))
            elif not any(isinstance(value, Tensor) for value in column) and len(set(map(repr, column))) == 1:
                leaves.append(column[0])
            else:
                raise CannotStackError("the members' batches differ in shape")
        return cls(tuple(leaves), spec, shared=False)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the leaves."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    @property
    def shape(self) -> Hashable:
        """What a graph of this batch is fixed to; leaves of unknown kinds are only named."""
        return (
            self.shared,
            tuple(
                (tuple(x.shape), x.dtype)
                if isinstance(x, Tensor)
                else repr(x)
                if isinstance(x, PLAIN)
                else type(x)
                for x in self.leaves
            ),
        )

    @property
    def traceable(self) -> bool:
        """Whether nothing in the batch would be recorded by value unseen."""
        return all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in self.leaves)

    def rebuilt(self, tensors: Sequence[Tensor]) -> Any:
        """The batch with other tensors in it."""
        left = iter(tensors)
        leaves = [next(left) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return pytree.tree_unflatten(leaves, self.spec)


@dataclass(slots=True)
class Graph:
    """A traced graph.

    Attributes:
        run: Input tensors to losses and gradients.
        module: The graph behind it.
        rows: Members that it is made for.
        made_in: Seconds that making it took.
        step_seconds: Seconds of a whole training step with it, once measured.
        random: Whether it draws random numbers.
        compiled: Whether ``run`` is compiled code; None: not tried.
    """

    run: Callable[..., Sequence[Tensor]]
    module: GraphModule
    rows: int
    made_in: float
    step_seconds: float | None = None
    random: bool = False
    compiled: bool | None = None


@dataclass(slots=True)
class Graphs:
    """Graphs made so far, the latest used last; the oldest is dropped when there are too many."""

    kept: dict[Hashable, list[Graph]] = field(default_factory=dict)

    def find(self, key: Hashable, rows: int) -> list[Graph]:
        """Graphs of a kind for at least so many rows, the smallest first."""
        return sorted((g for g in self.kept.get(key, []) if g.rows >= rows), key=lambda g: g.rows)

    def keep(self, key: Hashable, graph: Graph) -> None:
        """Keep a graph for later."""
        others = [g for g in self.kept.pop(key, []) if g.rows != graph.rows]
        self.kept[key] = [*others, graph]
        while sum(map(len, self.kept.values())) > KEPT_GRAPHS:
            oldest = next(iter(self.kept))
            self.kept[oldest].pop(0)
            if not self.kept[oldest]:
                del self.kept[oldest]


class _Loss(nn.Module):
    """A network and what is computed from it, as one module whose parameters can be swapped."""

    def __init__(self, model: nn.Module, loss_of: LossOf) -> None:
        super().__init__()
        self.model = model
        self._loss_of = loss_of

    def forward(self, batch: Any, weight: Tensor | None) -> Tensor:
        return self._loss_of(self.model, batch, weight)


class StackedGradients:
    """Losses and gradients of all rows of a stack.

    Args:
        model: Any member's network, as a template: its own parameters are not read.
        loss_of: Network, batch and weight of the selected samples to a loss.
        parameters: The rows.
        weights: Weight of selected samples, one a row; None: all alike.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_of: LossOf,
        parameters: StackedParameters,
        weights: Sequence[float] | None,
    ) -> None:
        self._loss = _Loss(model, loss_of)
        self._parameters = parameters
        self._names = tuple(parameters.views)
        self._constant_names = tuple(parameters.constants)
        self._fixed = [*parameters.views.values(), *parameters.constants.values()]
        self._weighted = weights is not None
        if weights is not None:
            like = parameters.matrix
            self._fixed.append(torch.tensor(weights, dtype=like.dtype, device=like.device))
        self._graph: Graph | None = None

    @property
    def kind(self) -> Hashable:
        """What a graph depends on beside the members' likeness and the batch."""
        return (self._names, self._parameters.stacked_constants, self._weighted)

    def inputs(self, batches: Batches) -> list[Tensor]:
        """The tensors that a graph runs on."""
        return [*self._fixed, *batches.tensors]

    def use(self, graph: Graph | None) -> None:
        """Run a graph from now on; None: the function itself."""
        self._graph = graph

    def __call__(self, batches: Batches) -> Sequence[Tensor]:
        """Return the losses [rows], then the gradient of each parameter of all rows."""
        if self._graph is None:
            with _quiet():
                return self.eager(batches)(*self.inputs(batches))
        with torch.inference_mode():
            return self._graph.run(*self.inputs(batches))

    def eager(self, batches: Batches) -> Callable[..., tuple[Tensor, ...]]:
        """The vectorised function itself, over tensors alone."""
        n, m = len(self._names), len(self._names) + len(self._constant_names)
        stacked = set(self._parameters.stacked_constants)

        def one(
            trained: dict[str, Tensor], fixed: dict[str, Tensor], weight: Tensor | None, batch: list[Tensor]
        ) -> Tensor:
            tensors = {f"model.{name}": tensor for name, tensor in (fixed | trained).items()}
            return functional_call(self._loss, tensors, (batches.rebuilt(batch), weight))  # type: ignore[no-any-return]

        over = (
            0,
            {name: 0 if name in stacked else None for name in self._constant_names},
            0 if self._weighted else None,
            [None if batches.shared else 0] * len(batches.tensors),
        )
        function = vmap(grad_and_value(one), in_dims=over, randomness="different")

        def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
            trained = dict(zip(self._names, tensors[:n], strict=True))
            fixed = dict(zip(self._constant_names, tensors[n:m], strict=True))
            weight = tensors[m] if self._weighted else None
            gradients, losses = function(trained, fixed, weight, list(tensors[m + self._weighted :]))
            return (losses, *(gradients[name] for name in self._names))

        return flat

    def trace(self, batches: Batches) -> Graph:
        """Record the function as a graph of plain operations, and simplify it; raises whatever torch raises."""
        started = time.perf_counter()
        inputs = self.inputs(batches)
        with _quiet():
            function = functionalize(self.eager(batches), remove="mutations")
            module: GraphModule = make_fx(function, tracing_mode="real")(*inputs)
        random = is_random(module)
        simplify(module, inputs)
        return Graph(
            run=module,
            module=module,
            rows=self._parameters.matrix.shape[0],
            made_in=time.perf_counter() - started,
            random=random,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Attention as plain operations (the fused CPU kernel cannot be vectorised), and no warning of what is slow so."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield
