"""Random states as plain text, so that a checkpoint can be read without unpickling anything.

Thousands of small integers would make every checkpoint slow to write, to read and to copy; as hexadecimal digits they
are one string each.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from automode.errors import SessionError

_VERSION = 2


def pack_rng() -> dict[str, Any]:
    """The global random states of Python, numpy, torch and every CUDA device in use, as numbers and hexadecimal strings.

    Reading them changes none of them, and CUDA is not started for it: in a process that has not used CUDA there is no
    CUDA state to keep.
    """
    version, numbers, gauss = random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]  # torch has no annotation here
    return {
        "version": _VERSION,
        "python": [version, _hex(np.array(numbers, dtype="<u4")), gauss],
        "numpy": _plain(np.random.get_state(legacy=False)),  # noqa: NPY002 - the user's code may draw from it
        "torch": _hex(torch.get_rng_state().numpy()),
        "cuda": [_hex(state.cpu().numpy()) for state in cuda],
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
    random.setstate((version, tuple(_array(numbers, "<u4").tolist()), gauss))
    torch.set_rng_state(torch.from_numpy(_array(packed["torch"], "u1")))
    if cuda:
        torch.cuda.set_rng_state_all([torch.from_numpy(_array(state, "u1")) for state in cuda])


def _hex(array: np.ndarray[Any, Any]) -> str:
    return array.tobytes().hex()


def _array(digits: str, dtype: str) -> np.ndarray[Any, Any]:
    return np.frombuffer(bytearray.fromhex(digits), dtype=dtype)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        portable = value.astype(value.dtype.newbyteorder("<"))
        return {"dtype": portable.dtype.str, "hex": _hex(portable)}
    return value.item() if isinstance(value, np.generic) else value


def _arrays(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if set(value) == {"dtype", "hex"}:
        found = _array(value["hex"], value["dtype"])
        return found.astype(found.dtype.newbyteorder("="))
    return {key: _arrays(item) for key, item in value.items()}
