"""Checkpoints: a folder each, named after the digest of its manifest, there and whole or not there.

``weights.safetensors`` holds the tensors, ``rest.pt`` everything else that ``torch.load(weights_only=True)`` can read,
and ``manifest.json`` the digests of both, the names, which names are one and the same tensor, and what the caller wants
remembered. A checkpoint is put together under a temporary name, read back and compared, and only then renamed.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch

from automode.errors import SessionCorruptError, SessionError, UsageError
from automode.session.database import storage_errors
from automode.session.durable_files import (
    TEMPORARY,
    FileDigest,
    file_digest,
    hex_of,
    sync_file,
    sync_folder,
    temporary_name,
    verify,
    write_synced,
)
from automode.session.records import dump_json, load_json
from automode.session.tensors import check_stored, restore_tensors, storable_tensors

FORMAT = "automode-checkpoint/1"

_WEIGHTS, _REST, _MANIFEST = "weights.safetensors", "rest.pt", "manifest.json"
_FILES = frozenset((_WEIGHTS, _REST, _MANIFEST))
_FOLDER = re.compile(r"[0-9a-f]{64}")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_HALF_WRITTEN = re.compile(r"\.tmp\w+")  # how safetensors calls a file that it is still writing

Checkpoint = tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, Any]]


class CheckpointStore:
    """The checkpoints of one session.

    Args:
        root: The folder, ``<session>/checkpoints``; made if it is missing.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        with storage_errors(self.root, "making the checkpoints folder"):
            self.root.mkdir(parents=True, exist_ok=True)

    def save(
        self, weights: Mapping[str, torch.Tensor], rest: Mapping[str, Any], manifest: Mapping[str, Any]
    ) -> str:
        """Store a checkpoint; when this returns, the disk has it and it has been read back.

        Args:
            weights: Tensors by name, on any device, of any strides. Names for one and the same tensor (tied weights)
                are stored once.
            rest: Optimizer state and the like: containers, numbers, strings, tensors; random states through
                `automode.session.rng_state`.
            manifest: JSON types; what to find again without reading the tensors.

        Returns:
            ``sha256:...`` of the manifest, which holds the digests of the other files.

        Raises:
            UsageError: A tensor that has no plain values, or ``rest`` holds an object that only unpickling could read.
            SessionError: The disk refused; nothing is left behind.
        """
        tensors, aliases = storable_tensors(weights)
        text = dump_json(dict(manifest))
        folder = self.root / temporary_name()
        try:
            with storage_errors(self.root, "saving a checkpoint"):
                folder.mkdir()
                files = {
                    _WEIGHTS: _write_weights(folder / _WEIGHTS, tensors),
                    _REST: _write_rest(folder / _REST, dict(rest)),
                }
                content = {
                    "format": FORMAT,
                    "files": {name: {"sha256": d.sha256, "size": d.size} for name, d in files.items()},
                    "names": list(weights),
                    "aliases": aliases,
                    "manifest": load_json(text),
                }
                data = dump_json(content).encode()
                digest = write_synced(folder / _MANIFEST, lambda file: _put(file, data))
                sync_folder(folder)
                self._settle(folder, digest.sha256)
        finally:
            if folder.exists():
                shutil.rmtree(folder, ignore_errors=True)
        return f"sha256:{digest.sha256}"

    def _settle(self, folder: Path, name: str) -> None:
        """Give a complete folder its name, unless an intact twin has it."""
        target = self.root / name
        if target.exists():
            try:
                self._verified(name)
            except SessionCorruptError:
                target.replace(self.root / temporary_name())
            else:
                return
        folder.replace(target)
        sync_folder(self.root)

    def files(self, digest: str) -> list[Path]:
        """The files of a checkpoint, the manifest last: what has it has the others.

        Raises:
            SessionError: There is no such checkpoint.
            SessionCorruptError: A file is missing or does not match its digest; the message names it.
        """
        self.verify(digest)
        return [self.root / hex_of(digest) / name for name in (_WEIGHTS, _REST, _MANIFEST)]

    def receive(self, digest: str, fetch: Callable[[str, Path], object]) -> None:
        """Take over a checkpoint that stands elsewhere; it is compared with its digests before it is here.

        Args:
            digest: Which one. Nothing is fetched where it is here already, and whole.
            fetch: Given the name of a file and where to write it.

        Raises:
            SessionCorruptError: What was fetched is another checkpoint, or a damaged one; nothing is left behind.
            SessionError: The disk refused.
        """
        name = hex_of(digest)
        if (self.root / name).is_dir():
            with contextlib.suppress(SessionCorruptError):
                return self.verify(digest)
        folder = self.root / temporary_name()
        try:
            with storage_errors(self.root, "receiving a checkpoint"):
                folder.mkdir()
                for file in (_MANIFEST, _WEIGHTS, _REST):
                    fetch(file, folder / file)
                    sync_file(folder / file)
                self._compare(folder, self._content(folder, name))
                sync_folder(folder)
                self._settle(folder, name)
        finally:
            if folder.exists():
                shutil.rmtree(folder, ignore_errors=True)

    def load(self, digest: str) -> Checkpoint:
        """Weights (on the CPU, tied names sharing one tensor), rest and manifest of a checkpoint.

        Raises:
            SessionError: There is no such checkpoint.
            SessionCorruptError: A file is missing or does not match its digest; the message names it.
        """
        name = hex_of(digest)
        folder = self.root / name
        with storage_errors(self.root, "loading a checkpoint"):
            content = self._verified(name)
            try:
                stored = safetensors.torch.load_file(folder / _WEIGHTS, device="cpu")
                rest = torch.load(folder / _REST, weights_only=True, map_location="cpu")
            except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
                raise SessionCorruptError(f"checkpoint {digest} cannot be read: {_gist(error)}") from error
        weights = restore_tensors(stored, content["names"], content["aliases"], where=str(folder / _WEIGHTS))
        return weights, rest, content["manifest"]

    def manifest(self, digest: str) -> dict[str, Any]:
        """What was remembered with a checkpoint, without reading its tensors.

        Raises:
            SessionError: There is no such checkpoint.
            SessionCorruptError: The manifest does not match its digest.
        """
        with storage_errors(self.root, "reading a checkpoint"):
            name = hex_of(digest)
            content: dict[str, Any] = self._content(self.root / name, name)["manifest"]
        return content

    def verify(self, digest: str) -> None:
        """Compare every file of a checkpoint with its digest.

        Raises:
            SessionError: There is no such checkpoint.
            SessionCorruptError: A file is missing or does not match; the message names it.
        """
        with storage_errors(self.root, "verifying a checkpoint"):
            self._verified(hex_of(digest))

    def digests(self) -> list[str]:
        """Every complete checkpoint of this store, in no particular order."""
        return [f"sha256:{folder.name}" for folder in self._own_folders()]

    def collect(self, keep: Iterable[str]) -> list[str]:
        """Delete every checkpoint but those in ``keep``.

        A folder is deleted only if its name is the digest of its manifest and it holds nothing but a checkpoint's
        files, which is how this store leaves them.

        Returns:
            The digests deleted.

        Raises:
            SessionError: The disk refused.
        """
        kept = {hex_of(digest) for digest in keep}
        with storage_errors(self.root, "deleting checkpoints"):
            return [self._delete(folder) for folder in self._own_folders() if folder.name not in kept]

    def delete(self, digests: Iterable[str]) -> list[str]:
        """Delete these checkpoints and no other, whatever other processes are storing meanwhile; see :meth:`collect`.

        Returns:
            The digests deleted; one that is not here is none of them.

        Raises:
            SessionError: The disk refused.
        """
        doomed = {hex_of(digest) for digest in digests}
        with storage_errors(self.root, "deleting checkpoints"):
            return [self._delete(folder) for folder in self._own_folders() if folder.name in doomed]

    def _delete(self, folder: Path) -> str:
        # Under a temporary name first: a kill half-way leaves rubbish, not half a checkpoint.
        doomed = self.root / temporary_name()
        folder.replace(doomed)
        shutil.rmtree(doomed)
        return f"sha256:{folder.name}"

    def sweep(self) -> int:
        """Remove what a killed writer left half done; returns how many folders."""
        swept = 0
        with storage_errors(self.root, "sweeping checkpoints"):
            for folder in list(self.root.iterdir()):
                if TEMPORARY.fullmatch(folder.name) and _holds_only_ours(folder):
                    shutil.rmtree(folder)
                    swept += 1
        return swept

    def _own_folders(self) -> list[Path]:
        return [
            folder
            for folder in self.root.iterdir()
            if _FOLDER.fullmatch(folder.name)
            and _holds_only_ours(folder)
            and (folder / _MANIFEST).is_file()
            and file_digest(folder / _MANIFEST).sha256 == folder.name
        ]

    def _content(self, folder: Path, name: str) -> dict[str, Any]:
        path = folder / _MANIFEST
        if not path.parent.is_dir():
            raise SessionError(f"there is no checkpoint sha256:{name} in {self.root}")
        if not path.is_file() or file_digest(path).sha256 != name:
            raise SessionCorruptError(
                f"{path} is missing or does not match its digest; restore it from a copy"
            )
        content: dict[str, Any] = load_json(path.read_text(encoding="utf-8"))
        if content.get("format") != FORMAT:
            raise SessionError(f"{path} has format {content.get('format')!r}; this automode reads {FORMAT!r}")
        return content

    def _verified(self, name: str) -> dict[str, Any]:
        folder = self.root / name
        content = self._content(folder, name)
        self._compare(folder, content)
        return content

    def _compare(self, folder: Path, content: dict[str, Any]) -> None:
        for file in (_WEIGHTS, _REST):
            entry = content["files"][file]
            verify(folder / file, FileDigest(entry["sha256"], entry["size"]))


def _write_weights(path: Path, tensors: dict[str, torch.Tensor]) -> FileDigest:
    try:
        safetensors.torch.save_file(tensors, path)
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"the weights cannot be stored as safetensors: {error}") from error
    except safetensors.SafetensorError as error:
        # The library tells the operating system's error only in words: "... (os error 28)".
        number = _OS_ERROR.search(str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, f"safetensors could not write {path.name}: {error}") from error
    sync_file(path)
    check_stored(path, tensors)
    return file_digest(path)


def _write_rest(path: Path, rest: dict[str, Any]) -> FileDigest:
    try:
        digest = write_synced(path, lambda file: torch.save(_texts_once(rest, {}), file))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UsageError(f"rest holds something that cannot be stored: {error}") from error
    try:
        # Maps the tensors instead of reading them: this asks only whether safe loading accepts the structure.
        torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"rest holds something that only unsafe loading could read ({_gist(error)}); "
            "keep to containers, numbers, strings and tensors, and pass random states through pack_rng()"
        ) from error
    return digest


def _texts_once(value: Any, known: dict[int, Any]) -> Any:
    """Make equal texts one object: pickle writes an object once, so that a loaded state would have another digest than the one it equals."""
    kind = type(value)
    if kind is str:
        return sys.intern(value)
    if kind not in (dict, list, tuple):
        return value
    if id(value) in known:
        return known[id(value)]
    if kind is tuple:
        known[id(value)] = made = tuple(_texts_once(item, known) for item in value)
        return made
    found = known[id(value)] = kind()
    if kind is dict:
        found.update({_texts_once(k, known): _texts_once(v, known) for k, v in value.items()})
    else:
        found.extend(_texts_once(item, known) for item in value)
    return found


def why_not_storable(rest: Any) -> str | None:
    """Say why something could not stand in a checkpoint beside the weights; None: it could. Nothing is written."""
    file = io.BytesIO()
    try:
        torch.save(rest, file)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        return str(error)
    file.seek(0)
    try:
        torch.load(file, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        return f"only unsafe loading could read it ({_gist(error)})"
    return None


def _gist(error: Exception) -> str:
    """What torch found, without its advice to load unsafely."""
    text = str(error)
    found = text.partition("WeightsUnpickler error: ")[2].partition("\n")[0].partition(" Please use")[0]
    return found.strip() or text.partition("\n")[0]


def _put(file: BinaryIO, data: bytes) -> None:
    file.write(data)


def _holds_only_ours(folder: Path) -> bool:
    if folder.is_symlink() or not folder.is_dir():
        return False
    return all(
        (entry.name in _FILES or _HALF_WRITTEN.fullmatch(entry.name)) and entry.is_file()
        for entry in folder.iterdir()
    )
