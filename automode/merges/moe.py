"""The unified model: frozen experts and the gate over them, one ``nn.Module`` for inference.

The gate reads the parent's features: the input of one named layer of the expert that plays the parent, taken in that
expert's own forward pass, so that the features cost nothing extra and carry no information that the parent lacks.

What comes out, by ``task``:

* ``classification``: log-probabilities ``log sum_e g_e p_e(y|x)``, ``[..., classes]``. They are their own log-softmax, so
  ``argmax``, ``cross_entropy`` and ``nll_loss`` agree on them; ``exp`` gives probabilities.
* ``binary``: the logit of ``sum_e g_e sigmoid(z_e)``, so that ``binary_cross_entropy_with_logits`` applies.
* ``regression``: the mean ``sum_e g_e f_e(x)``.

Where outputs have further dimensions (a class for each token), the features must have them too, and every position is
routed by its own features: a gate that pooled over positions would let a token see its successors.

References:
    Jacobs et al. 1991; Gururangan et al. 2023 (c-BTM), arXiv:2303.14177; Fedus et al. 2022, arXiv:2101.03961.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from automode.errors import MergeError
from automode.merges.gate import Gate

Task: TypeAlias = Literal["classification", "binary", "regression"]


class MixtureOfExperts(nn.Module):
    """Experts and gate as one module for inference.

    It holds deep copies in evaluation mode with frozen parameters; what the caller passed stays as it is. All experts
    run on every input, except that in top-1 mode, outside of ``torch.compile`` and ``torch.export``, only the parent
    (for the features) and the chosen experts do.

    Args:
        experts: ``k`` networks with equal output shapes, at least 2.
        gate: routes to ``k`` experts on features of the parent.
        parent: index of the expert whose features the gate reads.
        feature_layer: name of a module of that expert (as in ``named_modules``); its first input, ``[..., d]``, is the
            feature. See :func:`last_layer`.
        task: how outputs are mixed.
        top1: the first choice answers alone, instead of the soft mixture.

    Raises:
        MergeError: the parts do not fit together.
    """

    def __init__(
        self,
        experts: Sequence[nn.Module],
        gate: Gate,
        *,
        feature_layer: str,
        task: Task,
        parent: int = 0,
        top1: bool = False,
    ) -> None:
        super().__init__()
        if len(experts) < 2 or gate.experts != len(experts):
            raise MergeError(
                f"{len(experts)} experts came with a gate over {gate.experts}: pass 2 or more, as many as gated"
            )
        if not 0 <= parent < len(experts):
            raise MergeError(f"the parent is expert {parent}, but must be one of 0 to {len(experts) - 1}")
        if task not in get_args(Task):
            raise MergeError(f"the task is {task!r}, but must be one of {', '.join(get_args(Task))}")
        if feature_layer not in dict(experts[parent].named_modules()) or not feature_layer:
            raise MergeError(f"the parent has no inner module {feature_layer!r} to take features from")
        # one copy of the whole list, so that weights that experts share (a frozen backbone) stay shared
        self.experts = nn.ModuleList(copy.deepcopy(list(experts)))
        self.gate = copy.deepcopy(gate)
        self.parent = parent
        self.feature_layer = feature_layer
        self.task: Task = task
        self.top1 = top1
        self.requires_grad_(False).eval()

    def config(self) -> dict[str, Any]:
        """Return what a file must hold besides the weights and the experts' own code."""
        return {
            "experts": len(self.experts),
            "parent": self.parent,
            "feature_layer": self.feature_layer,
            "task": self.task,
            "top1": self.top1,
            "gate": self.gate.config(),
        }

    def forward(self, inputs: Any) -> Tensor:
        """Return the mixed outputs (see the module's text for what they mean by task).

        Args:
            inputs: what each expert takes as its one argument; a leading dimension of ``n`` samples.

        Raises:
            MergeError: outputs and features do not line up.
        """
        own, features = self._parent_pass(inputs)
        scalar = self.task != "classification" and own.dim() == features.dim() - 1
        shape = own.shape if scalar else own.shape[:-1]
        if features.shape[:-1] != shape:
            raise MergeError(
                f"the parent's outputs are {tuple(own.shape)} and the features at {self.feature_layer!r} "
                f"{tuple(features.shape)}: all dimensions but the last must agree; choose the layer that the outputs "
                f"come from, with classes and features last"
            )
        log_weights = self.gate(features).to(own.dtype)
        if self.top1 and log_weights.dim() == 2 and not torch.compiler.is_compiling():
            return self._dispatched(inputs, own, log_weights.argmax(dim=-1))
        outputs = [own if i == self.parent else expert(inputs) for i, expert in enumerate(self.experts)]
        stacked = torch.stack([output.unsqueeze(-1) if scalar else output for output in outputs], dim=-2)
        if self.top1:
            chosen = log_weights.argmax(dim=-1)[..., None, None].expand(
                *stacked.shape[:-2], 1, stacked.shape[-1]
            )
            mixed = self._answer(stacked.gather(-2, chosen).squeeze(-2))
        else:
            mixed = self._mixed(stacked, log_weights.unsqueeze(-1))
        return mixed.squeeze(-1) if scalar else mixed

    def weights(self, inputs: Any) -> Tensor:
        """Return the gate's weights ``[..., k]`` for inputs; they sum to 1 over the last dimension."""
        _, features = self._parent_pass(inputs)
        log_weights: Tensor = self.gate(features)
        return log_weights.exp()

    def _parent_pass(self, inputs: Any) -> tuple[Tensor, Tensor]:
        return features_and_outputs(self.experts[self.parent], self.feature_layer, inputs)

    def _mixed(self, outputs: Tensor, log_weights: Tensor) -> Tensor:
        match self.task:
            case "classification":
                return torch.logsumexp(log_weights + outputs.log_softmax(dim=-1), dim=-2)
            case "binary":
                yes = torch.logsumexp(log_weights + nn.functional.logsigmoid(outputs), dim=-2)
                no = torch.logsumexp(log_weights + nn.functional.logsigmoid(-outputs), dim=-2)
                return yes - no
            case "regression":
                return (log_weights.exp() * outputs).sum(dim=-2)

    def _answer(self, outputs: Tensor) -> Tensor:
        return outputs.log_softmax(dim=-1) if self.task == "classification" else outputs

    def _dispatched(self, inputs: Any, own: Tensor, chosen: Tensor) -> Tensor:
        answers = own.clone()
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero().squeeze(-1)
            if index == self.parent or len(rows) == 0:
                continue
            if not isinstance(inputs, Tensor):
                answers[rows] = expert(inputs)[rows]
            else:
                answers[rows] = expert(inputs[rows])
        return self._answer(answers)


def features_and_outputs(model: nn.Module, layer: str, inputs: Any) -> tuple[Tensor, Tensor]:
    """Run a model once and return its outputs and the first input of one of its layers.

    Args:
        model: takes ``inputs`` as its one argument.
        layer: a module's name; it must be called in the forward pass (its last call counts).
        inputs: a batch of inputs.

    Raises:
        MergeError: the layer was not called, or was not given a tensor.
    """
    seen: list[Any] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        outputs: Tensor = model(inputs)
    finally:
        handle.remove()
    if not seen or not isinstance(seen[-1], Tensor):
        raise MergeError(
            f"the layer {layer!r} was not called with a tensor as its first argument: choose one that is, "
            f"the last layer for instance"
        )
    return outputs, seen[-1]


def last_layer(model: nn.Module) -> str:
    """Return the name of the last leaf module that has parameters, in registration order.

    Raises:
        MergeError: no inner module has parameters.
    """
    names: list[str] = [
        name
        for name, module in model.named_modules()
        if name and not any(module.children()) and any(True for _ in module.parameters(recurse=False))
    ]
    if not names:
        raise MergeError(
            "the model has no inner layer with parameters to take features from: wrap it in a module"
        )
    return names[-1]
