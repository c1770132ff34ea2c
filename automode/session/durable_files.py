"""Files that are either there and whole, or not there: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from automode.errors import SessionCorruptError, UsageError

TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{16}")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class FileDigest:
    """SHA-256 (64 hex digits) and length in bytes of a file."""

    sha256: str
    size: int


class _HashingFile:
    """A file that hashes what passes through it on the way to the disk."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._hash = hashlib.sha256()
        self._size = 0
        self.failure: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        try:
            self._put(view)
        except OSError as error:
            self.failure = error
            raise
        self._hash.update(view)
        self._size += view.nbytes
        return view.nbytes

    def _put(self, view: memoryview) -> None:
        self._raw.write(view)

    def flush(self) -> None:
        self._raw.flush()

    def digest(self) -> FileDigest:
        return FileDigest(self._hash.hexdigest(), self._size)


def hex_of(digest: str) -> str:
    """The 64 hex digits of ``sha256:...``, fit to be a file name.

    Raises:
        UsageError: It is no such digest.
    """
    match = _DIGEST.fullmatch(digest)
    if match is None:
        raise UsageError(f"a digest reads 'sha256:' and 64 hex digits, got {digest!r}")
    return match[1]


def temporary_name() -> str:
    """A fresh name that `TEMPORARY` recognises."""
    return f".tmp-{secrets.token_hex(8)}"


def file_digest(path: Path) -> FileDigest:
    """Digest of what stands on disk."""
    hasher, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
            size += len(chunk)
    return FileDigest(hasher.hexdigest(), size)


def write_synced(path: Path, produce: Callable[[BinaryIO], None]) -> FileDigest:
    """Write a new file, wait until the disk has it, read it again and compare.

    Args:
        path: Must not exist.
        produce: Writes the content, front to back, into the file that it is given.

    Returns:
        The digest of what was written, found again on disk.

    Raises:
        SessionCorruptError: What stands on disk is not what was written.
        OSError: The disk refused; a part of the file may be left.
    """
    with path.open("xb") as raw:
        hashing = _HashingFile(raw)
        try:
            produce(cast("BinaryIO", hashing))
        except Exception as error:
            if hashing.failure is not None and error is not hashing.failure:
                # torch.save turns a full disk into a RuntimeError of its own.
                raise hashing.failure from error
            raise
        raw.flush()
        os.fsync(raw.fileno())
    written = hashing.digest()
    verify(path, written)
    return written


def replace_synced(path: Path, data: bytes) -> FileDigest:
    """Put ``data`` at ``path`` in one step; whoever looks sees the old file or the new one, never a part.

    Raises:
        SessionCorruptError: What stands on disk is not what was written.
        OSError: The disk refused; ``path`` is as it was.
    """
    temporary = path.with_name(temporary_name())

    def produce(file: BinaryIO) -> None:
        file.write(data)

    try:
        digest = write_synced(temporary, produce)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return digest


def sync_file(path: Path) -> None:
    """Wait until the disk has the content of a file that another library wrote."""
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Make names in ``folder`` durable; Windows has no such call, and its file systems need none."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def verify(path: Path, expected: FileDigest) -> None:
    """Compare a file with its digest.

    Raises:
        SessionCorruptError: It is missing, shorter, longer or different.
    """
    try:
        size = path.stat().st_size
        found = FileDigest("", size) if size != expected.size else file_digest(path)
    except FileNotFoundError:
        raise SessionCorruptError(f"{path} is missing; restore it from a copy") from None
    if found.size != expected.size:
        raise SessionCorruptError(
            f"{path} has {found.size} bytes instead of {expected.size}; restore it from a copy"
        )
    if found.sha256 != expected.sha256:
        raise SessionCorruptError(f"{path} does not match its digest; restore it from a copy")
