"""Checkpoints by way of a shared place: what arrives is what was sent, or is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from automode.errors import SessionCorruptError, SessionError, UsageError
from automode.session.checkpoints import CheckpointStore
from automode.session.mirror import CheckpointMirror

CONTENT: tuple[Any, ...] = ({"w": torch.arange(9.0)}, {"steps": 3}, {"kind": "trial"})


@pytest.fixture(params=["path", "file", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    shared = tmp_path / "shared place"
    yield {"path": str(shared), "file": f"file://{shared}", "memory": "memory://run/checkpoints"}[
        request.param
    ]
    memory = fsspec.filesystem("memory")
    if memory.exists("/run"):
        memory.rm("/run", recursive=True)


@pytest.fixture
def here(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "here")


@pytest.fixture
def there(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "there")


def file_at(place: str, digest: str, name: str) -> Any:
    files, root = fsspec.core.url_to_fs(place)
    return files, f"{root}/{digest.removeprefix('sha256:')}/{name}"


def test_a_checkpoint_arrives_as_it_was_sent(
    place: str, here: CheckpointStore, there: CheckpointStore
) -> None:
    digest = here.save(*CONTENT)
    CheckpointMirror(here, place).push(digest)
    CheckpointMirror(there, place).pull(digest)
    assert there.digests() == [digest]
    weights, rest, manifest = there.load(digest)
    assert torch.equal(weights["w"], CONTENT[0]["w"])
    assert (rest, manifest) == CONTENT[1:]


def test_what_is_there_is_not_sent_or_fetched_again(
    place: str, here: CheckpointStore, there: CheckpointStore
) -> None:
    digest = here.save(*CONTENT)
    CheckpointMirror(here, place).push(digest)
    CheckpointMirror(there, place).pull(digest)
    files, weights = file_at(place, digest, "weights.safetensors")
    files.rm(weights)
    CheckpointMirror(there, place).pull(digest)
    CheckpointMirror(here, place).push(digest)
    assert not files.exists(weights)


def test_a_sending_that_broke_off_is_sent_again(
    place: str, here: CheckpointStore, there: CheckpointStore
) -> None:
    digest = here.save(*CONTENT)
    mirror = CheckpointMirror(here, place)
    mirror.push(digest)
    for name in ("manifest.json", "weights.safetensors"):
        files, path = file_at(place, digest, name)
        with files.open(path, "wb") as file:
            file.write(b"{")
    mirror.push(digest)
    CheckpointMirror(there, place).pull(digest)
    there.verify(digest)


@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors", "rest.pt"])
def test_damage_on_the_way_is_refused_and_leaves_nothing(
    place: str, here: CheckpointStore, there: CheckpointStore, name: str
) -> None:
    digest = here.save(*CONTENT)
    CheckpointMirror(here, place).push(digest)
    files, path = file_at(place, digest, name)
    data = bytearray(files.cat_file(path))
    data[len(data) // 2] ^= 1
    files.pipe_file(path, bytes(data))
    with pytest.raises(SessionCorruptError, match=name):
        CheckpointMirror(there, place).pull(digest)
    assert list(there.root.iterdir()) == []


def test_a_damaged_checkpoint_here_is_fetched_anew_and_never_sent(
    place: str, here: CheckpointStore, there: CheckpointStore
) -> None:
    digest = here.save(*CONTENT)
    CheckpointMirror(here, place).push(digest)
    (here.root / digest.removeprefix("sha256:") / "rest.pt").write_bytes(b"")
    with pytest.raises(SessionCorruptError, match=r"rest\.pt"):
        CheckpointMirror(here, place).push(digest)
    CheckpointMirror(here, place).pull(digest)
    here.verify(digest)


def test_what_is_not_there_is_an_error_that_names_the_store(
    place: str, here: CheckpointStore, there: CheckpointStore
) -> None:
    missing = "sha256:" + "0" * 64
    with pytest.raises(SessionError, match="there is no checkpoint"):
        CheckpointMirror(here, place).push(missing)
    with pytest.raises(SessionError, match="receiving a checkpoint"):
        CheckpointMirror(there, place).pull(missing)
    assert list(there.root.iterdir()) == []


@pytest.mark.parametrize("uri", ["nonsense://bucket/run", "s3-of-nobody://x"])
def test_a_place_without_a_driver_is_refused(here: CheckpointStore, uri: str) -> None:
    with pytest.raises(UsageError, match="cannot be opened"):
        CheckpointMirror(here, uri)
