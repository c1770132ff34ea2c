"""Arrays by digest."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from automode.errors import SessionCorruptError, SessionError, UsageError
from automode.session.artifacts import ArtifactStore


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "artifacts")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(ids=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=50))
def test_ids_read_back_in_order_and_the_same_ids_have_the_same_digest(
    store: ArtifactStore, ids: list[int]
) -> None:
    digest = store.put_ids(np.array(ids, dtype=np.int64))
    found = store.get_ids(digest)
    assert found.dtype == np.int64
    assert found.tolist() == ids
    assert store.put_ids(np.array(ids, dtype=np.int64)) == digest
    assert digest in store
    assert len(ids) < 2 or ids[::-1] == ids or store.put_ids(np.array(ids[::-1], dtype=np.int64)) != digest


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(
    array=hnp.arrays(
        st.one_of(hnp.floating_dtypes(endianness="?"), hnp.integer_dtypes(endianness="?"), st.just(np.bool_)),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    )
)
def test_arrays_read_back_bit_by_bit_whatever_their_layout(
    store: ArtifactStore, array: np.ndarray[Any, Any]
) -> None:
    for given_array in (array, np.asfortranarray(array), array.T):
        found = store.get_array(store.put_array(given_array))
        assert found.shape == given_array.shape
        assert found.dtype == given_array.dtype.newbyteorder("<")
        np.testing.assert_array_equal(found, given_array)


@pytest.mark.parametrize(
    "ids", [[1, 2], np.array([1, 2], dtype=np.int32), (1, 2), np.array([1, 2], dtype=">i8")]
)
def test_ids_of_any_integer_type_have_the_digest_of_the_ids(store: ArtifactStore, ids: Any) -> None:
    assert store.put_ids(ids) == store.put_ids(np.array([1, 2]))


@pytest.mark.parametrize(
    "ids", [[1.5], [[1], [2]], 3, ["a"], [True], np.array([2**63], dtype=np.uint64), [2**70]], ids=repr
)
def test_what_is_no_list_of_ids_is_refused(store: ArtifactStore, ids: Any) -> None:
    with pytest.raises(UsageError, match="ids must"):
        store.put_ids(ids)


@pytest.mark.parametrize(
    "array", [np.array([object()]), np.array(["a"]), np.array([1j]), np.zeros(2, dtype=[("a", "f8")])]
)
def test_arrays_that_are_no_plain_numbers_are_refused(
    store: ArtifactStore, array: np.ndarray[Any, Any]
) -> None:
    with pytest.raises(UsageError, match="booleans, integers or floats"):
        store.put_array(array)
    assert list(store.root.iterdir()) == []


def test_an_array_that_is_not_ids_is_not_read_as_ids(store: ArtifactStore) -> None:
    with pytest.raises(SessionCorruptError, match="not ids"):
        store.get_ids(store.put_array(np.zeros(3)))


def test_unknown_and_malformed_digests_are_refused(store: ArtifactStore) -> None:
    with pytest.raises(SessionError, match="there is no artifact"):
        store.get_ids("sha256:" + "0" * 64)
    with pytest.raises(UsageError, match="64 hex digits"):
        store.get_ids("sha256:../../x")


def test_a_damaged_artifact_is_named_and_repaired_when_it_is_stored_again(store: ArtifactStore) -> None:
    digest = store.put_ids([1, 2, 3])
    (file,) = store.root.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(SessionCorruptError, match=file.name):
        store.get_ids(digest)
    assert store.put_ids([1, 2, 3]) == digest
    assert store.get_ids(digest).tolist() == [1, 2, 3]


def test_a_pickle_under_a_right_digest_is_not_read(store: ArtifactStore) -> None:
    np.save(store.root / "x.npy", np.array([{}]), allow_pickle=True)
    data = (store.root / "x.npy").read_bytes()
    name = hashlib.sha256(data).hexdigest()
    (store.root / "x.npy").rename(store.root / f"{name}.npy")
    with pytest.raises(SessionCorruptError, match="no plain array"):
        store.get_array(f"sha256:{name}")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing_behind(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(SessionError, match="free some space"):
        store.put_ids([1])
    monkeypatch.undo()
    assert list(store.root.iterdir()) == []
    assert store.get_ids(store.put_ids([1])).tolist() == [1]


def test_sweeping_takes_only_our_temporary_files(store: ArtifactStore) -> None:
    digest = store.put_ids([1])
    (store.root / ".tmp-0123456789abcdef").touch()
    (store.root / ".tmp-notes").touch()
    assert store.sweep() == 1
    assert store.get_ids(digest).tolist() == [1]
    assert (store.root / ".tmp-notes").exists()
