"""What a loader keeps outside of the global random states: generators, counters, and whatever offers a ``state_dict``.

A user's own sampler, batch sampler, dataset or loader may hold a ``torch.Generator``, a numpy ``Generator`` or a
``random.Random``, count epochs in an attribute, or know how to save itself. All of that is found by walking the attributes
from the loader on, a few levels deep, and is taken and put back in place: no object of the user's is ever replaced.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, Subset, TensorDataset

from automode.trainer.trees import is_plain

_DEPTH = 5
_MOST_ITEMS = 64
_MOST_OBJECTS = 400
_ROOTS = ("generator", "batch_sampler", "sampler", "dataset")
_SCALARS = (bool, int, float, str, type(None))
_ABSENT = object()

Parts = dict[str, dict[str, Any]]
"""What was taken, by kind (``generators``, ``stateful``, ``values``) and path: plain data and tensors."""


class LiveState:
    """Finds what a loader keeps, takes it and puts it back.

    Args:
        loader: A ``DataLoader`` or any other iterable of batches, as the user gave it.
    """

    def __init__(self, loader: Any) -> None:
        self._generators: dict[str, Any] = {}
        self._stateful: dict[str, Any] = {}
        self._objects: dict[str, Any] = {}
        for path, value in _reachable(loader):
            if isinstance(
                value, torch.Generator | np.random.Generator | np.random.RandomState | random.Random
            ):
                self._generators[path] = value
            elif _saves_itself(value):
                self._stateful[path] = value
            elif isinstance(value, Sampler | Dataset) or path in _ROOTS:
                self._objects[path] = value
        self._lost: dict[str, str] = {}
        self._at_first = self._values()

    def take(self) -> Parts:
        """Take everything as it is now; of plain attributes those that have changed since the run began."""
        values = {
            path: changed
            for path, now in self._values().items()
            if (
                changed := {
                    name: value
                    for name, value in now.items()
                    if _differs(value, self._at_first.get(path, {}).get(name, _ABSENT))
                }
            )
        }
        return {
            "generators": {path: _packed(generator) for path, generator in self._generators.items()},
            "stateful": self._saved(),
            "values": values,
        }

    def lost(self) -> list[str]:
        """What could not be taken when :meth:`take` was called last, in words."""
        return [f"{path} {why}" for path, why in self._lost.items()]

    def put(self, parts: Mapping[str, Mapping[str, Any]], *, samplers: bool) -> list[str]:
        """Put back what :meth:`take` gave.

        Args:
            parts: What was taken.
            samplers: Whether samplers that save themselves are loaded too; one that has been read up to the place already
                must not be.

        Returns:
            What could not be put back, in words; empty where everything was.
        """
        missing = []
        for path, packed in parts["generators"].items():
            generator = self._generators.get(path)
            if generator is None or not _unpacked(generator, packed):
                missing.append(f"the generator {path} is no longer there, or of another kind")
        for path, state in parts["stateful"].items():
            value = self._stateful.get(path)
            if value is None:
                missing.append(f"{path} no longer saves itself")
            elif samplers or not isinstance(value, Sampler):
                value.load_state_dict(state)
        self._as_at_first(parts["values"])
        for path, values in parts["values"].items():
            target = self._objects.get(path)
            if target is None:
                missing.append(f"{path} is no longer there")
                continue
            for name, value in values.items():
                vars(target)[name] = value
        return missing

    def _as_at_first(self, kept: Mapping[str, Mapping[str, Any]]) -> None:
        """Undo changes of attributes that had not changed when the parts were taken."""
        for path, first in self._at_first.items():
            target = vars(self._objects[path])
            for name, value in first.items():
                if name not in kept.get(path, {}) and _differs(target.get(name, _ABSENT), value):
                    target[name] = _copied(value)

    def _saved(self) -> dict[str, Any]:
        """States of what saves itself; one that fails, or gives what only unpickling could read, must not end the run."""
        found = {}
        self._lost = {}
        for path, value in self._stateful.items():
            try:
                state = value.state_dict()
            except Exception as error:
                self._lost[path] = f"could not save itself ({type(error).__name__}: {error})"
                continue
            if is_plain(state):
                found[path] = state
            else:
                self._lost[path] = "saves itself as more than numbers, text, tensors and containers of them"
        return found

    def _values(self) -> dict[str, dict[str, Any]]:
        return {path: _plain_attributes(value) for path, value in self._objects.items()}


def draws_nothing(dataset: Any) -> bool:
    """Tell whether reading a sample surely draws no random number and changes nothing: tensors and lists of them."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return type(dataset) in (TensorDataset, list, tuple)


def _reachable(loader: Any) -> Iterator[tuple[str, Any]]:
    """Give the objects that a loader leads to, each once, by a path of attribute names."""
    seen: set[int] = {id(loader)}
    roots = [(name, vars(loader)[name]) for name in _ROOTS if name in getattr(loader, "__dict__", {})]
    waiting = roots or list(_parts(loader))
    for depth in range(_DEPTH):
        found, waiting = waiting, []
        for path, value in found:
            if id(value) in seen or len(seen) > _MOST_OBJECTS:
                continue
            seen.add(id(value))
            if _is_interesting(value):
                yield path, value
            if depth + 1 < _DEPTH:
                waiting += [(f"{path}.{name}", part) for name, part in _parts(value)]


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """Give what an object holds that is worth a look, by name."""
    if isinstance(value, list | tuple):
        items: Any = ((str(i), item) for i, item in enumerate(value)) if len(value) <= _MOST_ITEMS else ()
    elif isinstance(value, dict):
        items = ((str(key), item) for key, item in value.items()) if len(value) <= _MOST_ITEMS else ()
    elif _is_interesting(value) and not isinstance(value, nn.Module):
        items = tuple(getattr(value, "__dict__", {}).items())
    else:
        items = ()
    for name, item in items:
        if isinstance(item, list | tuple | dict) or _is_interesting(item):
            yield name, item


def _is_interesting(value: Any) -> bool:
    if isinstance(value, torch.Generator | np.random.Generator | np.random.RandomState | random.Random):
        return True
    if isinstance(value, (type, Tensor, np.ndarray, *_SCALARS)) or hasattr(value, "__code__"):
        return False
    return hasattr(value, "__dict__") and type(value).__module__ not in ("builtins", "types", "functools")


def _saves_itself(value: Any) -> bool:
    return (
        isinstance(value, Dataset | Sampler)
        and callable(getattr(value, "state_dict", None))
        and callable(getattr(value, "load_state_dict", None))
    )


def _plain_attributes(value: Any) -> dict[str, Any]:
    """Give the attributes that are one plain value each; of a sampler also its lists and tensors of numbers."""
    held = getattr(value, "__dict__", {})
    found: dict[str, Any] = {name: item for name, item in held.items() if isinstance(item, _SCALARS)}
    if isinstance(value, Sampler):
        for name, item in held.items():
            if isinstance(item, Tensor):
                found[name] = item.clone()
            elif isinstance(item, list) and all(type(part) in (int, float) for part in item):
                found[name] = list(item)
    return found


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.copy(value)


def _differs(now: Any, before: Any) -> bool:
    if isinstance(now, Tensor) and isinstance(before, Tensor):
        return now.shape != before.shape or now.dtype != before.dtype or not torch.equal(now, before)
    if type(now) is not type(before):
        return True
    return bool(now != before) and not (now != now and before != before)


def _packed(generator: Any) -> dict[str, Any]:
    match generator:
        case torch.Generator():
            return {"kind": "torch", "state": generator.get_state()}
        case np.random.Generator():
            return {"kind": "numpy", "state": json.dumps(_listed(generator.bit_generator.state))}
        case np.random.RandomState():
            return {"kind": "numpy legacy", "state": json.dumps(_listed(generator.get_state(legacy=False)))}
        case _:
            return {"kind": "python", "state": json.dumps(generator.getstate())}


def _unpacked(generator: Any, packed: Mapping[str, Any]) -> bool:
    """Set a generator to a state; False where it is of another kind."""
    kind, state = packed["kind"], packed["state"]
    try:
        match generator:
            case torch.Generator() if kind == "torch":
                generator.set_state(state)
            case np.random.Generator() if kind == "numpy":
                generator.bit_generator.state = _arrayed(json.loads(state))
            case np.random.RandomState() if kind == "numpy legacy":
                generator.set_state(_arrayed(json.loads(state)))
            case random.Random() if kind == "python":
                version, numbers, gauss = json.loads(state)
                generator.setstate((version, tuple(numbers), gauss))
            case _:
                return False
    except (ValueError, RuntimeError, TypeError):
        return False
    return True


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return {"$dtype": str(value.dtype), "values": value.tolist()}
    return value.item() if isinstance(value, np.generic) else value


def _arrayed(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if set(value) == {"$dtype", "values"}:
        return np.array(value["values"], dtype=value["$dtype"])
    return {key: _arrayed(item) for key, item in value.items()}
