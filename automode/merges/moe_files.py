"""A mixture of experts on disk: one safetensors file and one JSON manifest, nothing pickled.

Weights cannot carry code, so loading asks for a ``build_model`` that builds one expert's architecture; everything else
(gate, routing, task) is in the manifest. Neither a session nor a trainer is needed to load.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from automode.errors import MergeError
from automode.merges.gate import Gate
from automode.merges.moe import MixtureOfExperts, Task
from automode.merges.state_dicts import alias_groups

WEIGHTS = "weights.safetensors"
MANIFEST = "moe.json"


class _GateConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    in_features: int = Field(ge=1)
    dimensions: int = Field(ge=1)
    experts: int = Field(ge=2)
    hidden: int = Field(ge=1)
    temperature: float = Field(gt=0)


class _Manifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["automode-moe"]
    schema_version: Literal[1]
    sha256: str
    experts: int = Field(ge=2)
    parent: int = Field(ge=0)
    feature_layer: str
    task: Task
    top1: bool
    gate: _GateConfig
    aliases: dict[str, str]


def save(moe: MixtureOfExperts, folder: Path | str) -> None:
    """Write a mixture into a folder: ``weights.safetensors`` and ``moe.json``.

    The manifest names the digest of the weights and is written last, so that a folder that was cut off does not load.

    Args:
        moe: the mixture.
        folder: created if missing.

    Raises:
        MergeError: the folder already holds a mixture.
    """
    target = Path(folder)
    if (target / MANIFEST).exists():
        raise MergeError(f"{target} already holds a mixture: choose another folder or remove it first")
    target.mkdir(parents=True, exist_ok=True)
    state = moe.state_dict()
    aliases = {key: first for first, *rest in alias_groups(state) for key in rest}
    # clones: views of one storage (flattened recurrent weights) would be refused or written whole
    unique = {key: value.detach().contiguous().clone() for key, value in state.items() if key not in aliases}
    blob = safetensors.torch.save(unique)
    manifest = {
        "format": "automode-moe",
        "schema_version": 1,
        "sha256": hashlib.sha256(blob).hexdigest(),
        **moe.config(),
        "aliases": aliases,
    }
    _replace(target / WEIGHTS, blob)
    _replace(target / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True).encode() + b"\n")


def load(folder: Path | str, build_model: Callable[[], nn.Module]) -> MixtureOfExperts:
    """Load a mixture that :func:`save` wrote, on the CPU.

    Args:
        folder: holds ``weights.safetensors`` and ``moe.json``.
        build_model: builds one expert's architecture; called once for each expert, its initial weights do not matter.

    Raises:
        MergeError: a file is missing or unreadable, the digest does not match, or the architecture is another one.
    """
    source = Path(folder)
    manifest = _read_manifest(source / MANIFEST)
    weights = source / WEIGHTS
    if not weights.is_file():
        raise MergeError(f"{weights} is missing: copy the whole folder of the mixture")
    blob = weights.read_bytes()
    if hashlib.sha256(blob).hexdigest() != manifest.sha256:
        raise MergeError(
            f"{weights} does not have the digest that {MANIFEST} names: it was changed or cut off"
        )
    state: dict[str, Tensor] = safetensors.torch.load(blob)
    for key, first in manifest.aliases.items():
        if first not in state:
            raise MergeError(f"{MANIFEST} ties {key!r} to {first!r}, which {WEIGHTS} does not hold")
        state[key] = state[first]
    moe = MixtureOfExperts(
        [build_model() for _ in range(manifest.experts)],
        Gate(**manifest.gate.model_dump()),
        feature_layer=manifest.feature_layer,
        task=manifest.task,
        parent=manifest.parent,
        top1=manifest.top1,
    )
    try:
        moe.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise MergeError(f"the saved experts are not what build_model builds: {error}") from error
    return moe


def _read_manifest(path: Path) -> _Manifest:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MergeError(f"{path} is missing: this folder holds no mixture") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise MergeError(f"{path} is not JSON: {error}") from error
    try:
        return _Manifest.model_validate(content)
    except ValidationError as error:
        raise MergeError(f"{path} is not a manifest that this version reads: {error}") from error


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
