"""A session as one file: a zip with a manifest of digests, written carefully and read without trust.

An archive comes from anywhere, so importing follows no path that it names, believes no size that it states, unpickles
nothing, and looks at everything before the session appears under its name.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sqlite3
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from automode.errors import SessionCorruptError, SessionError, UsageError
from automode.session import database
from automode.session.durable_files import sync_file, sync_folder, temporary_name
from automode.session.ledger_file import LEDGER_NAME
from automode.session.records import dump_json, load_json
from automode.session.session import LOG_NAME, Session

FORMAT = "automode-session/1"
MAX_FILES = 100_000
MAX_BYTES = 64 * 2**30
MAX_RATIO = 100
MAX_MANIFEST = 64 * 2**20

_MANIFEST = "manifest.json"
_NAMES = re.compile(
    r"session\.db|log\.jsonl|ledger\.safetensors|artifacts/([0-9a-f]{64})\.npy"
    r"|checkpoints/([0-9a-f]{64})/(?:weights\.safetensors|rest\.pt|(manifest\.json))"
)
_CHUNK = 1 << 20
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same session gives the same archive
_SYMLINK = 0o120000


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an import takes at most: files, bytes unpacked, and how many bytes one packed byte may become."""

    files: int = MAX_FILES
    total_bytes: int = MAX_BYTES
    ratio: int = MAX_RATIO


def export_session(
    session_path: str | os.PathLike[str], target: str | os.PathLike[str], *, checkpoints: bool = True
) -> Path:
    """Write a session into one zip file; the run may go on meanwhile, the archive holds the state of one moment.

    Args:
        session_path: The session folder.
        target: The file to make; an existing one is never overwritten.
        checkpoints: Take the weights along.

    Returns:
        The file.

    Raises:
        UsageError: ``target`` exists.
        SessionError: There is no session there, or the disk refused; nothing is left behind.
    """
    folder, path = Path(session_path), Path(target)
    with Session.open(folder) as session:
        folder = session.path
    if os.path.lexists(path):
        raise UsageError(f"{path} exists already; choose another name or remove it")
    temporary = path.with_name(temporary_name())
    copy = path.with_name(temporary_name())
    try:
        with database.storage_errors(path.parent, "exporting the session"):
            _copy_database(folder / database.DATABASE_NAME, copy)
            members = {database.DATABASE_NAME: copy, **dict(_members(folder, checkpoints=checkpoints))}
            _write_zip(temporary, members)
            sync_file(temporary)
            temporary.rename(path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
        copy.unlink(missing_ok=True)
    return path


def import_session(
    archive: str | os.PathLike[str], folder: str | os.PathLike[str], *, limits: Limits | None = None
) -> Path:
    """Unpack an archive into a new session folder.

    Args:
        archive: What `export_session` wrote, or somebody says so.
        folder: The session folder to make; must not exist.
        limits: What to take at most; None: 100,000 files, 64 GiB, 100 : 1.

    Returns:
        The folder.

    Raises:
        UsageError: ``folder`` exists.
        SessionCorruptError: The archive holds what no archive of ours holds, or does not match its digests.
        SessionError: It cannot be read, or the disk refused. In every case nothing is left behind.
    """
    source, target = Path(archive), Path(folder)
    if os.path.lexists(target):
        raise UsageError(f"{target} exists already; an import makes a folder of its own")
    staging = target.with_name(temporary_name())
    try:
        with database.storage_errors(target.parent, "importing the session"):
            target.parent.mkdir(parents=True, exist_ok=True)
            staging.mkdir()
            try:
                with zipfile.ZipFile(source) as file:
                    _unpack(file, staging, limits or Limits(), source)
            except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
                raise SessionCorruptError(f"{source} cannot be unpacked: {error}") from error
            with Session.open(staging) as session:
                session.verify()
            for name in ("artifacts", "checkpoints", "inbox"):
                (staging / name).mkdir(exist_ok=True)
            staging.rename(target)
            sync_folder(target.parent)
    finally:
        if staging.exists():
            shutil.rmtree(staging, ignore_errors=True)
    return target


def _copy_database(source: Path, target: Path) -> None:
    # SQLite's own copying: reading the file by hand would miss the write-ahead log and, in the writer's process, drop
    # its locks.
    with (
        closing(database.connect_reader(source)) as reading,
        closing(sqlite3.connect(target, isolation_level=None)) as writing,
    ):
        reading.backup(writing)
        writing.execute("PRAGMA journal_mode=DELETE")


def _members(folder: Path, *, checkpoints: bool) -> Iterator[tuple[str, Path]]:
    found = [folder / LOG_NAME, folder / LEDGER_NAME, *(folder / "artifacts").glob("*.npy")]
    if checkpoints:
        found.extend((folder / "checkpoints").glob("*/*"))
    for path in sorted(found):
        name = path.relative_to(folder).as_posix()
        if _NAMES.fullmatch(name) and path.is_file() and not path.is_symlink():
            yield name, path


def _write_zip(target: Path, members: dict[str, Path]) -> None:
    files: dict[str, dict[str, Any]] = {}
    with zipfile.ZipFile(target, "x", allowZip64=True) as archive:
        for name, path in members.items():
            info = zipfile.ZipInfo(name, _EPOCH)
            info.compress_type = _compression(path)
            hasher, size = hashlib.sha256(), 0
            with path.open("rb") as source, archive.open(info, "w", force_zip64=True) as packed:
                while chunk := source.read(_CHUNK):
                    packed.write(chunk)
                    hasher.update(chunk)
                    size += len(chunk)
            files[name] = {"sha256": hasher.hexdigest(), "size": size}
        content = dump_json({"format": FORMAT, "files": files})
        archive.writestr(zipfile.ZipInfo(_MANIFEST, _EPOCH), content, zipfile.ZIP_STORED)


def _compression(path: Path) -> int:
    """Pack the log and the database, unless they pack so well that an importer would take it for an attack."""
    if path.suffix in (".npy", ".safetensors", ".pt"):
        return zipfile.ZIP_STORED
    packer, before, after = zlib.compressobj(), 0, 0
    with path.open("rb") as source:
        while chunk := source.read(_CHUNK):
            before += len(chunk)
            after += len(packer.compress(chunk))
    after += len(packer.flush())
    return zipfile.ZIP_DEFLATED if before < after * MAX_RATIO // 2 else zipfile.ZIP_STORED


def _unpack(archive: zipfile.ZipFile, folder: Path, limits: Limits, source: Path) -> None:
    infos = _checked_infos(archive, limits, source)
    files = _manifest(archive, infos.pop(_MANIFEST), source)
    if set(files) != set(infos):
        odd = sorted(set(files) ^ set(infos))[:3]
        raise SessionCorruptError(f"{source}: manifest and content differ in {odd}; ask for another copy")
    left = limits.total_bytes
    for name, info in infos.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        digest, size = _extract(archive, info, path, left)
        left -= size
        if files[name] != {"sha256": digest, "size": size}:
            raise SessionCorruptError(f"{source}: {name} does not match its digest; ask for another copy")
        _check_named_after_content(name, digest, source)


def _checked_infos(archive: zipfile.ZipFile, limits: Limits, source: Path) -> dict[str, zipfile.ZipInfo]:
    infos: dict[str, zipfile.ZipInfo] = {}
    if len(archive.infolist()) > limits.files:
        raise SessionCorruptError(
            f"{source} holds more than {limits.files} files; raise the limit if you trust it"
        )
    for info in archive.infolist():
        name = info.filename
        if name != info.orig_filename or (name != _MANIFEST and not _NAMES.fullmatch(name)):
            raise SessionCorruptError(
                f"{source} holds {info.orig_filename!r}, which no session has; do not trust it"
            )
        if name in infos:
            raise SessionCorruptError(f"{source} holds {name!r} twice; do not trust it")
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise SessionCorruptError(
                f"{source}: {name} is encrypted or packed in a way that we do not write"
            )
        if (info.external_attr >> 16) & 0o170000 == _SYMLINK:
            raise SessionCorruptError(f"{source}: {name} is a link, which no session has; do not trust it")
        if info.file_size > max(info.compress_size, 1) * limits.ratio:
            raise SessionCorruptError(
                f"{source}: {name} would grow more than {limits.ratio} times; raise the limit if you trust it"
            )
        infos[name] = info
    if sum(info.file_size for info in infos.values()) > limits.total_bytes:
        raise SessionCorruptError(
            f"{source} would unpack to more than {limits.total_bytes} bytes; raise the limit if you trust it"
        )
    for needed in (_MANIFEST, database.DATABASE_NAME):
        if needed not in infos:
            raise SessionCorruptError(f"{source} is no session archive: it has no {needed}")
    return infos


def _manifest(archive: zipfile.ZipFile, info: zipfile.ZipInfo, source: Path) -> dict[str, Any]:
    with archive.open(info) as file:
        data = file.read(MAX_MANIFEST + 1)
    if len(data) > MAX_MANIFEST:
        raise SessionCorruptError(
            f"{source}: its manifest has more than {MAX_MANIFEST} bytes; do not trust it"
        )
    content = load_json(data.decode("utf-8", "replace"))
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise SessionCorruptError(f"{source}: its manifest is no manifest; ask for another copy")
    if content.get("format") != FORMAT:
        raise SessionError(f"{source} has format {content.get('format')!r}; this automode reads {FORMAT!r}")
    files: dict[str, Any] = content["files"]
    return files


def _extract(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, left: int) -> tuple[str, int]:
    """Unpack one file, counting while reading: what the archive says about sizes proves nothing."""
    allowed = min(left, info.file_size)
    hasher, size = hashlib.sha256(), 0
    with archive.open(info) as packed, path.open("xb") as out:
        for chunk in _chunks(packed):
            size += len(chunk)
            if size > allowed:
                raise SessionCorruptError(
                    f"{info.filename} unpacks to more than it says; do not trust this archive"
                )
            hasher.update(chunk)
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    return hasher.hexdigest(), size


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK):
        yield chunk


def _check_named_after_content(name: str, digest: str, source: Path) -> None:
    match = _NAMES.fullmatch(name)
    assert match is not None
    artifact, checkpoint, manifest = match.groups()
    claimed = artifact or (checkpoint if manifest else None)
    if claimed is not None and claimed != digest:
        raise SessionCorruptError(f"{source}: {name} is not named after its content; do not trust it")
