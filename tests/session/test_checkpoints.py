"""Checkpoints: whole or not there, tied tensors, nothing unpickled."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from automode.errors import SessionCorruptError, SessionError, UsageError
from automode.session import durable_files
from automode.session.checkpoints import CheckpointStore

pytestmark = pytest.mark.torch


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _folder(store: CheckpointStore, digest: str) -> Path:
    return store.root / digest.removeprefix("sha256:")


def test_a_model_its_optimizer_and_a_manifest_come_back_as_they_were(store: CheckpointStore) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(16, 4)).square().mean().backward()
    optimizer.step()
    rest = {"optimizer": optimizer.state_dict(), "cursor": [3, None, "x"], "order": OrderedDict(a=1)}
    manifest = {"step": 7, "loss": float("nan"), "plan": {"seq": 12}}
    digest = store.save(model.state_dict(), rest, manifest)
    weights, found, remembered = store.load(digest)
    assert list(weights) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert weights[name].dtype == tensor.dtype
        assert _bits(weights[name]) == _bits(tensor)
    assert found["cursor"] == [3, None, "x"]
    assert found["order"] == OrderedDict(a=1)
    twin = torch.optim.AdamW(model.parameters())
    twin.load_state_dict(found["optimizer"])
    for key, state in optimizer.state_dict()["state"].items():
        assert _bits(twin.state_dict()["state"][key]["exp_avg"]) == _bits(state["exp_avg"])
    assert repr(remembered) == repr(manifest) == repr(store.manifest(digest))
    store.verify(digest)


def test_tied_tensors_are_stored_once_and_come_back_as_one_tensor(store: CheckpointStore) -> None:
    embedding = torch.nn.Embedding(1000, 64)
    head = torch.nn.Linear(64, 1000, bias=False)
    head.weight = embedding.weight
    model = torch.nn.ModuleDict({"head": head, "embedding": embedding})
    digest = store.save(model.state_dict(), {}, {})
    assert (_folder(store, digest) / "weights.safetensors").stat().st_size < 1.1 * 1000 * 64 * 4
    weights, _, _ = store.load(digest)
    assert weights["head.weight"] is weights["embedding.weight"]
    assert _bits(weights["head.weight"]) == _bits(embedding.weight)


def test_views_and_odd_layouts_keep_their_values(store: CheckpointStore) -> None:
    flat = torch.arange(100.0)
    weights = {
        "transposed": flat.view(10, 10).t(),
        "left": flat[:60],
        "right": flat[40:],
        "whole": flat,
        "strided": flat[::7],
        "expanded": torch.tensor(3.0).expand(4, 5),
        "empty": torch.empty(0, 3),
        "empty_too": torch.empty(0),
        "scalar": torch.tensor(2.5),
        "conjugated": torch.tensor([1 + 2j, 3 - 1j]).conj(),
        "negated": torch.tensor([1 + 2j, 3 - 1j]).conj().imag,
        "parameter": torch.nn.Parameter(torch.ones(3)),
    }
    loaded, _, _ = store.load(store.save(weights, {}, {}))
    for name, tensor in weights.items():
        assert loaded[name].shape == tensor.shape, name
        assert _bits(loaded[name]) == _bits(tensor.detach().resolve_conj().resolve_neg()), name
    loaded["left"].zero_()
    assert loaded["whole"][0] == 0.0
    assert loaded["right"][0] == 40.0


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn],
    ids=str,
)
def test_every_common_type_keeps_its_bits(store: CheckpointStore, dtype: torch.dtype) -> None:
    tensor = torch.randn(33).mul(3).to(dtype)
    loaded, _, _ = store.load(store.save({"w": tensor}, {}, {}))
    assert loaded["w"].dtype == dtype
    assert _bits(loaded["w"]) == _bits(tensor)


def test_not_a_number_and_infinity_keep_their_bits(store: CheckpointStore) -> None:
    tensor = torch.tensor([float("nan"), float("inf"), -0.0])
    loaded, _, _ = store.load(store.save({"w": tensor}, {}, {}))
    assert _bits(loaded["w"]) == _bits(tensor)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"w": torch.eye(3).to_sparse()}, "weight 'w' is a torch.sparse_coo tensor"),
        ({"w": torch.empty(3, device="meta")}, "weight 'w' is a meta tensor"),
        ({"w": [1.0]}, "weight 'w' must be a tensor, got list"),
        ({3: torch.ones(1)}, "name must be a string"),
        ({"__metadata__": torch.ones(1)}, "name must be a string other than"),
        ({"w": torch.ones(2, dtype=torch.complex128)}, "cannot be stored as safetensors"),
    ],
)
def test_tensors_without_plain_values_are_refused_and_nothing_is_left(
    store: CheckpointStore, weights: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        store.save(weights, {}, {})
    assert list(store.root.iterdir()) == []


@pytest.mark.parametrize(
    "value",
    [lambda: 1, object(), np.random.default_rng(0).random(3), Path("x"), threading.Lock()],
    ids=lambda value: type(value).__name__,
)
def test_what_only_unpickling_could_read_is_refused_and_nothing_is_left(
    store: CheckpointStore, value: object
) -> None:
    with pytest.raises(UsageError, match="rest holds something"):
        store.save({}, {"x": value}, {})
    assert list(store.root.iterdir()) == []


def test_the_advice_to_load_unsafely_is_never_passed_on(store: CheckpointStore) -> None:
    with pytest.raises(UsageError) as caught:
        store.save({}, {"x": object()}, {})
    assert "weights_only=False" not in str(caught.value)
    assert "add_safe_globals" not in str(caught.value)


class _Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_a_bomb_under_a_right_digest_is_refused_and_does_not_go_off(
    store: CheckpointStore, tmp_path: Path
) -> None:
    digest = store.save({"w": torch.ones(2)}, {"a": 1}, {})
    folder = _folder(store, digest)
    torch.save({"a": _Bomb(tmp_path / "gone-off")}, folder / "rest.pt")
    content = json.loads((folder / "manifest.json").read_text())
    found = durable_files.file_digest(folder / "rest.pt")
    content["files"]["rest.pt"] = {"sha256": found.sha256, "size": found.size}
    (folder / "manifest.json").write_text(json.dumps(content))
    name = durable_files.file_digest(folder / "manifest.json").sha256
    folder.rename(store.root / name)
    with pytest.raises(SessionCorruptError, match="cannot be read"):
        store.load(f"sha256:{name}")
    assert not (tmp_path / "gone-off").exists()
    assert pickle.loads(pickle.dumps(_Bomb(tmp_path / "gone-off"))) == 0  # it would have gone off
    assert (tmp_path / "gone-off").exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "rest.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "shorten", "lengthen", "remove", "empty"])
def test_a_damaged_file_is_named(store: CheckpointStore, name: str, damage: str) -> None:
    digest = store.save({"w": torch.randn(50)}, {"a": 1}, {"step": 3})
    file = _folder(store, digest) / name
    data = bytearray(file.read_bytes())
    match damage:
        case "flip":
            data[len(data) // 2] ^= 1
        case "shorten":
            data = data[:-1]
        case "lengthen":
            data += b" "
        case "empty":
            data.clear()
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(data)
    for reading in (store.load, store.verify):
        with pytest.raises(SessionCorruptError, match=name):
            reading(digest)


def test_an_unknown_checkpoint_and_a_name_that_leaves_the_folder_are_refused(store: CheckpointStore) -> None:
    with pytest.raises(SessionError, match="there is no checkpoint"):
        store.load("sha256:" + "0" * 64)
    for name in ("../x", "sha256:../../etc", "sha256:" + "0" * 63, "sha256:" + "A" * 64, ""):
        with pytest.raises(UsageError, match="64 hex digits"):
            store.load(name)


def test_saving_the_same_again_gives_the_same_digest_and_repairs_a_damaged_twin(
    store: CheckpointStore,
) -> None:
    content: tuple[Any, ...] = ({"w": torch.arange(9.0)}, {"a": [1, 2]}, {"step": 1})
    digest = store.save(*content)
    assert store.save(*content) == digest
    assert [p.name for p in store.root.iterdir()] == [digest.removeprefix("sha256:")]
    (_folder(store, digest) / "rest.pt").write_bytes(b"")
    assert store.save(*content) == digest
    assert store.load(digest)[1] == {"a": [1, 2]}
    assert store.sweep() == 1  # the damaged one, set aside
    assert store.digests() == [digest]


def test_collecting_deletes_what_is_not_kept_and_nothing_that_is_not_ours(store: CheckpointStore) -> None:
    digests = [store.save({"w": torch.full((3,), float(i))}, {}, {"i": i}) for i in range(4)]
    (store.root / "notes").mkdir()
    (store.root / ("f" * 64)).mkdir()
    (store.root / ("f" * 64) / "mine.txt").touch()
    (store.root / "file").touch()
    (_folder(store, digests[3]) / "added-by-a-person.txt").touch()
    outside = store.root.parent / "outside"
    _folder(store, digests[2]).rename(outside)
    _folder(store, digests[2]).symlink_to(outside, target_is_directory=True)
    assert store.collect([digests[0]]) == [digests[1]]
    assert (outside / "manifest.json").is_file()
    left = {p.name for p in store.root.iterdir()}
    assert left == {
        "notes",
        "f" * 64,
        "file",
        *(d.removeprefix("sha256:") for d in digests if d != digests[1]),
    }
    store.load(digests[0])


def test_deleting_takes_what_is_named_and_leaves_what_was_stored_meanwhile(store: CheckpointStore) -> None:
    digests = [store.save({"w": torch.full((3,), float(i))}, {}, {"i": i}) for i in range(3)]
    missing = "sha256:" + "f" * 64
    assert store.delete([digests[1], missing]) == [digests[1]]
    assert sorted(store.digests()) == sorted([digests[0], digests[2]])
    assert store.delete([]) == []


def test_sweeping_takes_half_written_folders_and_leaves_others(store: CheckpointStore) -> None:
    digest = store.save({"w": torch.ones(1)}, {}, {})
    for name, files in (
        (".tmp-0123456789abcdef", ["weights.safetensors", ".tmpAbC12"]),
        (".tmp-0123456789abcde0", ["thesis.tex"]),
        (".tmp-mine", []),
    ):
        (store.root / name).mkdir()
        for file in files:
            (store.root / name / file).touch()
    assert store.sweep() == 1
    assert {p.name for p in store.root.iterdir()} == {
        ".tmp-0123456789abcde0",
        ".tmp-mine",
        digest.removeprefix("sha256:"),
    }


_ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EIO: "check the disk",
    errno.EACCES: "check its permissions",
}


@pytest.mark.parametrize("code", _ADVICE)
@pytest.mark.parametrize("call", ["mkdir", "open", "fsync", "replace", "safetensors", "write"])
def test_whichever_call_fails_nothing_is_left_behind_and_the_next_try_succeeds(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    content: tuple[Any, ...] = ({"w": torch.randn(4)}, {"a": torch.ones(3)}, {"step": 1})
    failures, messages = 0, set()
    for at in range(1, 50):
        with monkeypatch.context() as patched:
            _fail(patched, call, at, code)
            try:
                digest = store.save(*content)
            except SessionError as error:
                failures += 1
                messages.add((str(error).partition(" in ")[0], _ADVICE[code] in str(error)))
                # The last thing to happen is the fsync after the rename: then the checkpoint is there already.
                assert all(not p.name.startswith(".tmp") for p in store.root.iterdir())
                for left in store.digests():
                    store.verify(left)
                continue
        assert failures >= 1
        assert messages == {("saving a checkpoint", True)}
        store.load(digest)
        return
    pytest.fail("saving never got through")


def _fail(patched: pytest.MonkeyPatch, call: str, at: int, code: int) -> None:
    calls = 0

    def faulty(real: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        return inner

    match call:
        case "safetensors":
            real = safetensors.torch.save_file

            def save_file(*args: Any, **kwargs: Any) -> None:
                nonlocal calls
                calls += 1
                if calls == at:
                    raise safetensors.SafetensorError(f"I/O error: {os.strerror(code)} (os error {code})")
                real(*args, **kwargs)

            patched.setattr(safetensors.torch, "save_file", save_file)
        case "write":
            patched.setattr(durable_files._HashingFile, "_put", faulty(durable_files._HashingFile._put))
        case "open":
            patched.setattr(Path, "open", faulty(Path.open))
        case _:
            patched.setattr(os, call, faulty(getattr(os, call)))


def test_a_disk_that_keeps_something_else_is_found_before_the_checkpoint_counts(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = safetensors.torch.save_file

    def lying(tensors: dict[str, torch.Tensor], path: Path) -> None:
        real({name: tensor + 1 for name, tensor in tensors.items()}, path)

    monkeypatch.setattr(safetensors.torch, "save_file", lying)
    with pytest.raises(SessionCorruptError, match="does not hold what was written"):
        store.save({"w": torch.zeros(3)}, {}, {})
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", lambda handle: os.truncate(handle, 5))
    with pytest.raises(SessionCorruptError):
        store.save({"w": torch.zeros(3)}, {}, {})
    assert store.digests() == []


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its writers")
def test_a_kill_while_saving_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    # One process loads torch and forks a writer for each line that it reads: four kills cost one import.
    code = """
import os, sys
import torch
from automode.session.checkpoints import CheckpointStore
torch.set_num_threads(1)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        store = CheckpointStore(sys.argv[1])
        print(os.getpid(), flush=True)
        i = 0
        while True:
            digest = store.save({"w": torch.full((400_000,), float(i))}, {"i": i}, {"i": i})
            print(digest, flush=True)
            i += 1
    _, status = os.waitpid(pid, 0)
    print(f"ended {os.waitstatus_to_exitcode(status)}", flush=True)
"""
    seed = random.SystemRandom().randrange(2**32)
    chance = random.Random(seed)
    store = CheckpointStore(tmp_path)
    acknowledged: set[str] = set()
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        for _ in range(4):
            parent.stdin.write("\n")
            parent.stdin.flush()
            writer = int(parent.stdout.readline())
            time.sleep(chance.uniform(0.01, 0.3))
            os.kill(writer, signal.SIGKILL)
            *said, end = lines_until(parent.stdout, "ended")
            assert end == f"ended {-signal.SIGKILL}", f"seed {seed}"
            acknowledged |= {line for line in said if len(line) == 71}
            store.sweep()
            assert not [p for p in tmp_path.iterdir() if p.name.startswith(".tmp")], f"seed {seed}"
            assert acknowledged <= set(store.digests()), f"seed {seed}"
            for digest in store.digests():
                weights, rest, manifest = store.load(digest)
                assert rest == manifest
                assert weights["w"].unique().tolist() == [float(rest["i"])]
        parent.stdin.close()


def lines_until(lines: Iterable[str], last: str) -> Iterator[str]:
    """Give lines up to the first that holds this: a killed writer's last line may lack its end."""
    for line in lines:
        said, found, rest = line.strip().partition(last)
        if said:
            yield said
        if found:
            yield found + rest
            return


def test_a_state_that_was_loaded_has_the_digest_of_the_one_that_it_equals(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)

    def rest(key: str) -> dict[str, Any]:
        shared = [1, 2]
        return {"optimizer": {0: {key: 3.0}}, "step": 5, "pair": (key, shared, shared)}

    weights = {"w": torch.ones(2)}
    first = store.save(weights, rest("step"), {})
    again = store.save(weights, rest("".join(["st", "ep"])), {})
    assert again == first
    pair = store.load(first)[1]["pair"]
    assert pair[1] is pair[2]
