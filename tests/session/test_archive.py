"""One file out, one folder in, and nothing believed on the way in."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import random
import sqlite3
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from automode.errors import SessionCorruptError, SessionError, UsageError
from automode.session import CardRow, Record, Session, SessionStore
from automode.session.archive import Limits, export_session, import_session
from automode.session.artifacts import ArtifactStore
from automode.session.records import dump_json

MakeRecord = Callable[..., Record]
HEX = "ab" * 32


@pytest.fixture
def full(store: SessionStore, record: MakeRecord) -> SessionStore:
    """A session in mid-run, with something in every place."""
    store.add_rows(
        "trunk", 1, ("loss", "constant"), np.column_stack([np.random.default_rng(0).random(2000)] * 2)
    )
    store.write(
        [record(1, frame_cursor=2000)],
        cards=[CardRow(card_id="c", rev=1, state="proposed", body="b", seq=1)],
        durable=True,
    )
    ArtifactStore(store.path / "artifacts").put_ids([3, 1, 2])
    folder = store.path / "checkpoints" / hashlib.sha256(b"{}").hexdigest()
    folder.mkdir()
    (folder / "manifest.json").write_bytes(b"{}")
    (folder / "weights.safetensors").write_bytes(b"w" * 1000)
    (folder / "rest.pt").write_bytes(b"r")
    (store.path / "log.jsonl").write_text('{"event":"a"}\n')
    (store.path / "inbox" / "secret.json").write_text("{}")
    (store.path / "artifacts" / "notes.txt").write_text("private")
    (store.path / "artifacts" / f"{HEX}.npy").symlink_to("/etc/hostname")
    return store


def _content(path: Path) -> tuple[Any, ...]:
    with Session.open(path) as session:
        session.verify()
        frames = {name: values.tobytes() for name, values in session.frames().items()}
        return session.header, list(session.events()), frames, session.cards(), list(session.log())


def _names(archive: Path) -> set[str]:
    with zipfile.ZipFile(archive) as file:
        return set(file.namelist())


def test_a_running_session_goes_out_and_comes_in_equal(full: SessionStore, tmp_path: Path) -> None:
    archive = export_session(full.path, tmp_path / "out.zip")
    folder = import_session(archive, tmp_path / "in" / "copy")
    assert _content(folder) == _content(full.path)
    assert ArtifactStore(folder / "artifacts").get_ids(
        ArtifactStore(full.path / "artifacts").put_ids([3, 1, 2])
    ).tolist() == [3, 1, 2]
    for file in (full.path / "checkpoints").glob("*/*"):
        assert (folder / file.relative_to(full.path)).read_bytes() == file.read_bytes()
    with SessionStore.open(folder) as taken_up:
        assert taken_up.next_seq == 2
    full.write([], durable=True)  # the writer still has its lock and its log
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out.zip", "run"]
    assert sorted(p.name for p in (tmp_path / "in").iterdir()) == ["copy"]


def test_only_what_belongs_to_a_session_goes_out(full: SessionStore, tmp_path: Path) -> None:
    names = _names(export_session(full.path, tmp_path / "out.zip"))
    assert not [n for n in names if "secret" in n or "notes" in n or HEX in n or "writer" in n]
    assert len(names) == 7
    light = _names(export_session(full.path, tmp_path / "light.zip", checkpoints=False))
    assert light == {n for n in names if not n.startswith("checkpoints")}


def test_the_same_session_gives_the_same_bytes(full: SessionStore, tmp_path: Path) -> None:
    one, two = (export_session(full.path, tmp_path / name).read_bytes() for name in ("a.zip", "b.zip"))
    assert one == two


def test_a_log_that_packs_very_well_can_be_imported(full: SessionStore, tmp_path: Path) -> None:
    (full.path / "log.jsonl").write_text('{"event":"same"}\n' * 200_000)
    archive = export_session(full.path, tmp_path / "out.zip")
    folder = import_session(archive, tmp_path / "copy")
    assert (folder / "log.jsonl").stat().st_size == 17 * 200_000


def test_nothing_that_exists_is_overwritten(full: SessionStore, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("there", "dangling"):
        with pytest.raises(UsageError, match="exists already"):
            export_session(full.path, tmp_path / name)
        with pytest.raises(UsageError, match="exists already"):
            import_session(tmp_path / "x.zip", tmp_path / name)
    with pytest.raises(SessionError, match="is no session"):
        export_session(tmp_path / "there", tmp_path / "out.zip")


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_leaves_nothing_behind(
    full: SessionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    archive = export_session(full.path, tmp_path / "out.zip")

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(SessionError, match="free some space"):
        export_session(full.path, tmp_path / "again.zip")
    with pytest.raises(SessionError, match="free some space"):
        import_session(archive, tmp_path / "copy")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.zip", "run"]


def _forged(
    source: Path,
    target: Path,
    *,
    change: Callable[[dict[str, bytes]], None] = lambda members: None,
    listed: Callable[[dict[str, Any]], None] = lambda files: None,
    extra: Callable[[zipfile.ZipFile], None] = lambda archive: None,
) -> Path:
    """A copy of an archive with other content and a manifest that agrees with it."""
    with zipfile.ZipFile(source) as file:
        members = {name: file.read(name) for name in file.namelist() if name != "manifest.json"}
    change(members)
    files = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        for name, data in members.items()
    }
    manifest: dict[str, Any] = {"format": "automode-session/1", "files": files}
    listed(manifest)
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.writestr("manifest.json", dump_json(manifest))
        extra(archive)
    return target


def _link(archive: zipfile.ZipFile) -> None:
    info = zipfile.ZipInfo("log.jsonl")
    info.external_attr = 0o120777 << 16
    archive.writestr(info, "/etc/passwd")


def _bomb(archive: zipfile.ZipFile) -> None:
    archive.writestr("log.jsonl", b"\0" * 50_000_000, zipfile.ZIP_DEFLATED)


def _lzma(archive: zipfile.ZipFile) -> None:
    archive.writestr("log.jsonl", b"x", zipfile.ZIP_LZMA)


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "/etc/evil",
        "C:\\evil",
        "artifacts/../../evil",
        "artifacts\\evil.npy",
        f"artifacts/{HEX}.npy/../../x",
        f"artifacts/{HEX}.pkl",
        f"artifacts/{HEX.upper()}.npy",
        f"checkpoints/{HEX}/code.py",
        "checkpoints/x/rest.pt",
        "inbox/request.json",
        "writer.lock",
        "session.db-wal",
        "session.db\0.txt",
        "log.jsonl/",
        "",
    ],
)
def test_a_name_that_no_session_has_is_refused(full: SessionStore, tmp_path: Path, name: str) -> None:
    def add(archive: zipfile.ZipFile) -> None:
        info = zipfile.ZipInfo("placeholder")
        info.filename = info.orig_filename = name
        archive.writestr(info, b"x")

    archive = _forged(export_session(full.path, tmp_path / "good.zip"), tmp_path / "evil.zip", extra=add)
    _refused(archive, tmp_path, "which no session has|cannot be unpacked")


@pytest.mark.parametrize(
    ("forgery", "said"),
    [
        ({"change": lambda m: m.pop("session.db")}, "has no session.db"),
        ({"listed": lambda f: f["files"].pop("log.jsonl")}, r"differ in \['log.jsonl'\]"),
        ({"listed": lambda f: f["files"].update(x={})}, "differ in"),
        ({"listed": lambda f: f["files"]["log.jsonl"].update(size=3)}, "log.jsonl does not match its digest"),
        ({"listed": lambda f: f["files"]["log.jsonl"].update(sha256="0" * 64)}, "does not match its digest"),
        ({"listed": lambda f: f.update(files=3)}, "is no manifest"),
        ({"listed": lambda f: f.update(format="automode-session/2")}, "has format 'automode-session/2'"),
        ({"change": lambda m: m.update({f"artifacts/{HEX}.npy": b"x"})}, "not named after its content"),
        ({"change": lambda m: m.update({f"checkpoints/{HEX}/manifest.json": b"x"})}, "not named after"),
        ({"change": lambda m: m.update({"session.db": b"x" * 5000})}, "damaged"),
        ({"change": lambda m: m.pop("log.jsonl"), "extra": _link}, "is a link"),
        ({"change": lambda m: m.pop("log.jsonl"), "extra": _bomb}, "would grow more than 100 times"),
        ({"change": lambda m: m.pop("log.jsonl"), "extra": _lzma}, "encrypted or packed"),
    ],
)
def test_an_archive_that_is_not_what_it_says_is_refused(
    full: SessionStore, tmp_path: Path, forgery: dict[str, Any], said: str
) -> None:
    good = export_session(full.path, tmp_path / "good.zip")
    assert import_session(_forged(good, tmp_path / "same.zip"), tmp_path / "same").is_dir()
    _refused(_forged(good, tmp_path / "evil.zip", **forgery), tmp_path, said)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_comes_twice_is_refused(full: SessionStore, tmp_path: Path) -> None:
    good = export_session(full.path, tmp_path / "good.zip")
    evil = _forged(good, tmp_path / "evil.zip", extra=lambda a: a.writestr("log.jsonl", b"other"))
    _refused(evil, tmp_path, "twice")


def test_limits_hold(full: SessionStore, tmp_path: Path) -> None:
    good = export_session(full.path, tmp_path / "good.zip")
    for limits, said in (
        (Limits(files=3), "more than 3 files"),
        (Limits(total_bytes=1000), "more than 1000 bytes"),
        (Limits(ratio=0), "more than 0 times"),
    ):
        with pytest.raises(SessionCorruptError, match=said):
            import_session(good, tmp_path / "copy", limits=limits)


def test_a_size_that_lies_stops_the_unpacking(full: SessionStore, tmp_path: Path) -> None:
    good = export_session(full.path, tmp_path / "good.zip")

    def add(archive: zipfile.ZipFile) -> None:
        archive.writestr("log.jsonl", random.Random(0).randbytes(100_000), zipfile.ZIP_DEFLATED)

    evil = _forged(
        good,
        tmp_path / "evil.zip",
        change=lambda m: m.pop("log.jsonl"),
        listed=lambda f: f["files"].update({"log.jsonl": {"sha256": "0" * 64, "size": 10}}),
        extra=add,
    )
    data = bytearray(evil.read_bytes())
    for signature, offset in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        name_at = data.find(
            b"log.jsonl", data.find(b"manifest.json") if offset == 22 else data.rfind(b"PK\1\2") - 60
        )
        at = data.rfind(signature, 0, name_at)
        struct.pack_into("<I", data, at + offset, 10)
    evil.write_bytes(data)
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        assert file.getinfo("log.jsonl").file_size == 10
    _refused(evil, tmp_path, "does not match its digest|unpacks to more|cannot be unpacked")


def test_a_database_with_a_trigger_of_somebody_else_is_refused(full: SessionStore, tmp_path: Path) -> None:
    def poison(members: dict[str, bytes]) -> None:
        (tmp_path / "db").write_bytes(members["session.db"])
        with sqlite3.connect(tmp_path / "db") as other:
            other.execute("CREATE TRIGGER t AFTER INSERT ON events BEGIN DELETE FROM events; END")
        other.close()
        members["session.db"] = (tmp_path / "db").read_bytes()

    good = export_session(full.path, tmp_path / "good.zip")
    _refused(_forged(good, tmp_path / "evil.zip", change=poison), tmp_path, "do not trust this file")


def test_damaged_archives_never_import_anything_else(full: SessionStore, tmp_path: Path) -> None:
    good = export_session(full.path, tmp_path / "good.zip").read_bytes()
    wanted = _content(full.path)
    chance = random.Random(3)
    refused = 0
    for turn in range(120):
        data = bytearray(good)
        match chance.randrange(3):
            case 0:
                data = data[: chance.randrange(len(data))]
            case 1:
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            case _:
                at = chance.randrange(len(data) - 20)
                data[at : at + 20] = chance.randbytes(20)
        (tmp_path / "bad.zip").write_bytes(data)
        try:
            folder = import_session(tmp_path / "bad.zip", tmp_path / str(turn))
        except SessionError:
            refused += 1
            assert not (tmp_path / str(turn)).exists()
        else:
            assert _content(folder) == wanted
    assert refused > 100


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"hello")
    _refused(tmp_path / "x.zip", tmp_path, "cannot be unpacked")
    with pytest.raises(SessionError, match="importing the session"):
        import_session(tmp_path / "missing.zip", tmp_path / "copy")


def _refused(archive: Path, folder: Path, said: str) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(SessionError, match=said):
        import_session(archive, folder / "imported")
    assert sorted(folder.rglob("*")) == before
