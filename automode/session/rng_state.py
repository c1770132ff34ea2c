"""Random states as plain numbers, so that a checkpoint can be read without unpickling anything."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from automode.errors import SessionError

_VERSION = 1


def pack_rng() -> dict[str, Any]:
    """The global random states of Python, numpy, torch and every CUDA device in use, as lists of integers.

    Reading them changes none of them, and CUDA is not started for it: in a process that has not used CUDA there is no
    CUDA state to keep.
    """
    version, numbers, gauss = random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]  # torch has no annotation here
    return {
        "version": _VERSION,
        "python": [version, list(numbers), gauss],
        "numpy": _plain(np.random.get_state(legacy=False)),  # noqa: NPY002 - the user's code may draw from it
        "torch": torch.get_rng_state().tolist(),
        "cuda": [state.tolist() for state in cuda],
    }


def unpack_rng(packed: dict[str, Any]) -> None:
    """Set the global random states back to what `pack_rng` found.

    Raises:
        SessionError: The states are of another version, or this machine has another number of CUDA devices.
    """
    if packed.get("version") != _VERSION:
        raise SessionError(
            f"random states have version {packed.get('version')!r}; this automode reads {_VERSION}"
        )
    cuda = packed["cuda"]
    if cuda and len(cuda) != torch.cuda.device_count():
        raise SessionError(
            f"random states of {len(cuda)} CUDA devices cannot be set on {torch.cuda.device_count()}; "
            "resume on as many devices, or resume approximately"
        )
    version, numbers, gauss = packed["python"]
    try:
        np.random.set_state(_arrays(packed["numpy"]))  # noqa: NPY002 - the user's code may draw from it
    except ValueError as error:
        raise SessionError(
            f"numpy's global generator is of another kind than the one that was saved: {error}"
        ) from error
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(torch.tensor(packed["torch"], dtype=torch.uint8))
    if cuda:
        torch.cuda.set_rng_state_all([torch.tensor(state, dtype=torch.uint8) for state in cuda])


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return {"dtype": str(value.dtype), "values": value.tolist()}
    return value.item() if isinstance(value, np.generic) else value


def _arrays(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if set(value) == {"dtype", "values"}:
        return np.array(value["values"], dtype=value["dtype"])
    return {key: _arrays(item) for key, item in value.items()}
