"""Arrays by the digest of their content: sample ids, centroids, whatever is too long for the log."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from automode.errors import SessionCorruptError, SessionError, UsageError
from automode.session.database import storage_errors
from automode.session.durable_files import TEMPORARY, FileDigest, hex_of, replace_synced, verify

_KINDS = "biuf"  # booleans, integers, floats: what needs no pickle and means the same everywhere


class ArtifactStore:
    """Arrays in one folder, each in a ``.npy`` file named after its SHA-256; written once, never changed.

    Args:
        root: The folder, ``<session>/artifacts``; made if it is missing.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        with storage_errors(self.root, "making the artifacts folder"):
            self.root.mkdir(parents=True, exist_ok=True)

    def put_ids(self, ids: ArrayLike) -> str:
        """Store sample ids, shape (n,), int64.

        Returns:
            ``sha256:...``; the same ids in the same order always give the same digest.

        Raises:
            UsageError: They are no 1-D whole numbers.
            SessionError: The disk refused.
        """
        array = np.asarray(ids)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise UsageError(
                f"ids must be a 1-D array of whole numbers, got {array.dtype} of shape {array.shape}"
            )
        if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
            raise UsageError("ids must fit into 64 bits with sign")
        return self.put_array(array.astype(np.int64))

    def get_ids(self, digest: str) -> NDArray[np.int64]:
        """Ids by their digest, shape (n,).

        Raises:
            SessionError: There is no such artifact.
            SessionCorruptError: The file is damaged, or holds something else.
        """
        array = self.get_array(digest)
        if array.ndim != 1 or array.dtype != np.int64:
            raise SessionCorruptError(
                f"artifact {digest} holds {array.dtype} of shape {array.shape}, not ids"
            )
        return cast("NDArray[np.int64]", array)

    def put_array(self, array: NDArray[np.generic]) -> str:
        """Store booleans, integers or floats of any shape; returns ``sha256:...``.

        Raises:
            UsageError: Another kind of array.
            SessionError: The disk refused.
        """
        if array.dtype.kind not in _KINDS:
            raise UsageError(f"artifacts are booleans, integers or floats, got {array.dtype}")
        buffer = io.BytesIO()
        plain = np.array(array, dtype=array.dtype.newbyteorder("<"), order="C")
        np.lib.format.write_array(buffer, plain, version=(1, 0), allow_pickle=False)
        data = buffer.getvalue()
        name = hashlib.sha256(data).hexdigest()
        path = self.root / f"{name}.npy"
        with storage_errors(self.root, "storing an artifact"):
            try:
                verify(path, FileDigest(name, len(data)))
            except SessionCorruptError:  # missing or damaged: (re)write it
                replace_synced(path, data)
        return f"sha256:{name}"

    def get_array(self, digest: str) -> NDArray[np.generic]:
        """An array by its digest.

        Raises:
            SessionError: There is no such artifact.
            SessionCorruptError: The file is damaged.
        """
        name = hex_of(digest)
        path = self.root / f"{name}.npy"
        if not path.is_file():
            raise SessionError(f"there is no artifact {digest} in {self.root}")
        with storage_errors(self.root, "reading an artifact"):
            data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != name:
            raise SessionCorruptError(f"{path} does not match its digest; restore it from a copy")
        try:
            array: NDArray[np.generic] = np.load(io.BytesIO(data), allow_pickle=False)
        except ValueError as error:
            raise SessionCorruptError(f"{path} is no plain array: {error}") from error
        return array

    def __contains__(self, digest: str) -> bool:
        return (self.root / f"{hex_of(digest)}.npy").is_file()

    def sweep(self) -> int:
        """Remove what a killed writer left half done; returns how many files."""
        with storage_errors(self.root, "sweeping artifacts"):
            strays = [
                path for path in self.root.iterdir() if TEMPORARY.fullmatch(path.name) and path.is_file()
            ]
            for path in strays:
                path.unlink(missing_ok=True)
        return len(strays)
