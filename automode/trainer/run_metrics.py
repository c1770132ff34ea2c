"""Metrics of the user's, over each epoch of training and over each validation: torchmetrics, or any object like one."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from automode.errors import UsageError
from automode.trainer.trees import is_plain, map_tensors
from automode.trainer.user_warning import warn_user

_TAKEN = ("loss", "metric")


class RunMetrics:
    """Copies of the user's metrics, one set for training and one for held-out data.

    Args:
        metrics: By name, objects with ``update(outputs, targets)``, ``compute()`` and ``reset()``; they are copied and left alone.
        device: Where outputs are.
    """

    def __init__(self, metrics: Mapping[str, Any], device: torch.device) -> None:
        self._train = {name: _copied(metric, device) for name, metric in metrics.items()}
        self._held_out = {name: _copied(metric, device) for name, metric in metrics.items()}
        self._seen = False
        self._warned = False
        self._lost: list[str] = []

    def __bool__(self) -> bool:
        return bool(self._train)

    def trained(self, outputs: Any, targets: Any) -> None:
        """Take a training batch; one whose step does not show outputs and targets counts for nothing."""
        if outputs is not None:
            self._seen = True
            _update(self._train, outputs, targets)

    def held_out(self, outputs: Any, targets: Any) -> None:
        """Take a batch of held-out data."""
        _update(self._held_out, outputs, targets)

    def take_trained(self) -> dict[str, float]:
        """What training came to since the last time, by name, each with ``train_`` before it."""
        if self._train and not self._seen and not self._warned:
            self._warned = True
            warn_user(
                "metrics= saw no training batch: return `outputs` and `targets` from your training step to have them computed"
            )
        found = _taken(self._train, "train_") if self._seen else {}
        self._seen = False
        return found

    def take_held_out(self, prefix: str) -> dict[str, float]:
        """What held-out data came to since the last time, by name, each with the prefix before it."""
        return _taken(self._held_out, prefix)

    def state(self) -> dict[str, Any]:
        """What training has come to within the epoch, for :meth:`load`; tensors are live."""
        self._lost = []
        found = {}
        for name, metric in self._train.items():
            state = _state_of(metric)
            if state is None:
                self._lost.append(
                    f"the metric {name} keeps more than numbers, text, tensors and containers of them"
                )
            else:
                found[name] = state
        return {"train": found, "seen": self._seen}

    def lost(self) -> list[str]:
        """What could not be taken when :meth:`state` was called last, in words."""
        return list(self._lost)

    def load(self, state: Mapping[str, Any]) -> list[str]:
        """Go on from what :meth:`state` gave; returns what could not be put back, in words."""
        self._seen = bool(state["seen"])
        for name, kept in state["train"].items():
            if name in self._train:
                _put(self._train[name], kept)
        return [f"the metric {name} is no longer there" for name in state["train"] if name not in self._train]


def check_metrics(metrics: Any) -> dict[str, Any]:
    """Refuse what is no mapping of names to metrics; returns it.

    Raises:
        UsageError: It is not.
    """
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise UsageError(
            f'metrics must be a mapping of names to metrics, as in {{"accuracy": metric}}, got {type(metrics).__name__}'
        )
    for name, metric in metrics.items():
        if not isinstance(name, str) or not name:
            raise UsageError(f"a metric is named by a non-empty string, got {name!r}")
        if name in _TAKEN:
            raise UsageError(f"metrics: {name!r} is what automode itself calls a column; choose another name")
        missing = [
            part for part in ("update", "compute", "reset") if not callable(getattr(metric, part, None))
        ]
        if missing or isinstance(metric, type):
            what = (
                f"the class {metric.__name__}" if isinstance(metric, type) else f"a {type(metric).__name__}"
            )
            raise UsageError(
                f"metrics: {name!r} is {what}; a metric is an object with update(outputs, targets), compute() and reset()"
            )
    return dict(metrics)


def _copied(metric: Any, device: torch.device) -> Any:
    copied = copy.deepcopy(metric)
    copied.reset()
    return copied.to(device) if isinstance(copied, nn.Module) else copied


@torch.no_grad()
def _update(metrics: Mapping[str, Any], outputs: Any, targets: Any) -> None:
    outputs, targets = map_tensors(Tensor.detach, outputs), map_tensors(Tensor.detach, targets)
    for name, metric in metrics.items():
        try:
            metric.update(outputs, targets)
        except Exception as error:
            error.add_note(f"this was the metric {name!r} of metrics=, given a batch's outputs and targets")
            raise


def _taken(metrics: Mapping[str, Any], prefix: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, metric in metrics.items():
        _flatten(prefix + name, metric.compute(), found)
        metric.reset()
    return found


def _flatten(name: str, value: Any, found: dict[str, float]) -> None:
    """Enter a number; a mapping, and a tensor of several numbers, as one entry each."""
    match value:
        case Mapping():
            for key, part in value.items():
                _flatten(f"{name}_{key}", part, found)
        case Tensor() if value.numel() != 1:
            for index, part in enumerate(value.flatten().tolist()):
                found[f"{name}_{index}"] = float(part)
        case None:
            found[name] = math.nan
        case _:
            try:
                found[name] = float(value)
            except (TypeError, ValueError):
                raise UsageError(
                    f"metrics: compute() of {name!r} gave a {type(value).__name__}, where a number, a tensor or a mapping of them "
                    "was needed"
                ) from None


def _state_of(metric: Any) -> Any:
    """What a metric has gathered, as plain data; None where it cannot be told."""
    parts = _parts(metric)
    if parts:
        return {
            "parts": [[{name: getattr(m, name) for name in m._defaults}, m._update_count] for m in parts]  # noqa: SLF001
        }
    if callable(getattr(metric, "state_dict", None)) and callable(getattr(metric, "load_state_dict", None)):
        state = metric.state_dict()
        return {"state": dict(state)} if is_plain(dict(state)) else None
    held = dict(getattr(metric, "__dict__", {}))
    return {"vars": held} if is_plain(held) else None


def _put(metric: Any, kept: Mapping[str, Any]) -> None:
    if "parts" in kept:
        for part, (values, count) in zip(_parts(metric), kept["parts"], strict=True):
            for name, value in values.items():
                setattr(part, name, map_tensors(lambda t, home=part: t.to(home.device), value))
            part._update_count = count  # noqa: SLF001
    elif "state" in kept:
        metric.load_state_dict(kept["state"])
    else:
        vars(metric).update(kept["vars"])


def _parts(metric: Any) -> list[Any]:
    """The torchmetrics that a metric is made of: itself, or those of a collection. Their states have no public way in."""
    if not isinstance(metric, nn.Module):
        return []
    return [m for m in metric.modules() if hasattr(m, "_defaults") and hasattr(m, "_update_count")]
