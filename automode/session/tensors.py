"""Tensors on their way to and from a safetensors file: tied names once, plain memory layout, compared bit by bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors
import torch

from automode.errors import SessionCorruptError, UsageError

_RESERVED = "__metadata__"


def storable_tensors(
    weights: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Plain CPU tensors that share no memory, and which further names mean the same tensor.

    Names whose tensors have the same storage, offset, shape, strides and type are aliases of the first of them. Views
    that overlap otherwise (slices of one flat buffer) become independent copies: their values are kept, not the fact
    that they share memory.

    Returns:
        Tensors by name, and alias -> name.

    Raises:
        UsageError: A value is no tensor, or one without plain values (sparse, quantized, meta).
    """
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    first_name: dict[tuple[object, ...], str] = {}
    storages: set[tuple[torch.device, int]] = set()
    for name, value in weights.items():
        _check(name, value)
        tensor = value.detach()
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        if tensor.numel():
            key = (
                *storage,
                tensor.storage_offset(),
                tensor.shape,
                tensor.stride(),
                tensor.dtype,
                tensor.is_neg(),
            )
            if key in first_name:
                aliases[name] = first_name[key]
                continue
            first_name[key] = name
        plain = tensor.resolve_conj().resolve_neg().cpu().contiguous()
        if storage in storages and plain.untyped_storage().data_ptr() == storage[1]:
            plain = plain.clone()
        storages.add(storage)
        tensors[name] = plain
    return tensors, aliases


def _check(name: str, value: object) -> None:
    if not isinstance(name, str) or name == _RESERVED:
        raise UsageError(f"a weight's name must be a string other than {_RESERVED!r}, got {name!r}")
    if not isinstance(value, torch.Tensor):
        raise UsageError(f"weight {name!r} must be a tensor, got {type(value).__name__}; put it into rest")
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        kind = "meta" if value.is_meta else "quantized" if value.is_quantized else str(value.layout)
        raise UsageError(
            f"weight {name!r} is a {kind} tensor, which has no plain values to store; materialise it"
        )


def check_stored(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Compare a safetensors file with the tensors that were written into it, bit by bit.

    Raises:
        SessionCorruptError: They differ.
    """
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            same = set(file.keys()) == set(tensors)
            for name in tensors if same else ():
                same = same and _same_bits(file.get_tensor(name), tensors[name])
    except safetensors.SafetensorError as error:
        raise SessionCorruptError(f"{path} cannot be read back: {error}; check the disk") from error
    if not same:
        raise SessionCorruptError(f"{path} does not hold what was written into it; check the disk")


def restore_tensors(
    stored: Mapping[str, torch.Tensor], names: Sequence[str], aliases: Mapping[str, str], *, where: str
) -> dict[str, torch.Tensor]:
    """The mapping that was saved, in its order, aliases being the very same tensor object.

    Raises:
        SessionCorruptError: The file lacks a name.
    """
    missing = [name for name in names if aliases.get(name, name) not in stored]
    if missing:
        raise SessionCorruptError(f"{where} lacks {missing[:3]}")
    return {name: stored[aliases.get(name, name)] for name in names}


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
