"""Does a network foretell symbols of the alphabet that its inputs are written in, as language models do?

Of such a network nobody can tell wrong labels: what comes next is open, so that a label against a sure answer is no sign of a mistake, and what
two like samples are followed by differs by the entropy of the data themselves. It is told by its data alone: whole numbers in rows, all of them
classes that the network can answer with, about as frequent among the inputs as among the targets.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from automode.trainer.tasks import task_of
from automode.trainer.trees import tensors_in

OF_THE_ALPHABET = 0.95
"""Least share of an input's numbers that are classes; markers of the text's end and the like may be others."""

ALIKE = 0.8
"""Least cosine between how often each class that occurs among the targets is seen there and in the inputs. In 256 windows
of a text and what follows them it was .94 and more, also with 30 % of the labels wrong; codes of anything else, which merely are small
numbers too, seldom come as often as the classes of that number do."""


def foretells_symbols(batch: Any, outputs: Any, targets: Any) -> bool:
    """Tell from one batch whether the classes are the symbols that the inputs consist of.

    Args:
        batch: As the loader gives it; its input are those tensors of whole numbers [n, length] that it holds.
        outputs: Scores [n, C] of its samples, C above 2.
        targets: Their classes [n].
    """
    if task_of(outputs, targets) != "classification" or outputs.shape[1] < 3:
        return False
    n, classes = outputs.shape
    wanted = _counts(targets, classes)
    return any(
        _alike(_counts(given, classes), wanted, given.numel())
        for given in tensors_in(batch)
        if given.dim() == 2
        and given.shape[0] == n
        and given.shape[1] > 1
        and given.dtype in (torch.int32, torch.int64)
    )


def _counts(values: Tensor, classes: int) -> Tensor:
    flat = values.detach().reshape(-1).cpu().long()
    return torch.bincount(flat[(flat >= 0) & (flat < classes)], minlength=classes).double()


def _alike(given: Tensor, wanted: Tensor, n: int) -> bool:
    if float(given.sum()) < OF_THE_ALPHABET * n:
        return False
    # What is never foretold, as padding, says nothing.
    given = given * (wanted > 0)
    return bool(torch.nn.functional.cosine_similarity(given, wanted, dim=0) >= ALIKE)
