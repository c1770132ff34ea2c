"""Checkpoints at a place that several machines can reach, by the same digests as in a session."""

from __future__ import annotations

from automode.errors import UsageError
from automode.session.checkpoints import CheckpointStore
from automode.session.durable_files import hex_of


class CheckpointMirror:
    """Copies checkpoints between a store on this machine and a shared place; what arrives is compared with its digests.

    Args:
        store: On this machine.
        uri: The place: a path, or any URI that fsspec and its installed drivers can open (``s3://bucket/run``).

    Raises:
        UsageError: No driver is installed for such a URI.
    """

    def __init__(self, store: CheckpointStore, uri: str) -> None:
        import fsspec

        self._store = store
        try:
            self._files, self._root = fsspec.core.url_to_fs(uri)
        except (ImportError, ValueError) as error:
            raise UsageError(
                f"{uri} cannot be opened: {error}; give a path, or install its fsspec driver"
            ) from error

    def push(self, digest: str) -> None:
        """Copy a checkpoint to the shared place, unless it is there.

        Raises:
            SessionError: There is no such checkpoint in the store, or it is damaged.
        """
        paths = self._store.files(digest)
        place = self._place(digest)
        manifest = paths[-1]
        # The manifest is written last, so that where it stands in full the others do.
        there = f"{place}/{manifest.name}"
        if self._files.exists(there) and self._files.size(there) == manifest.stat().st_size:
            return
        self._files.makedirs(place, exist_ok=True)
        for path in paths:
            self._files.put_file(str(path), f"{place}/{path.name}")

    def pull(self, digest: str) -> None:
        """Copy a checkpoint from the shared place into the store, unless it is there.

        Raises:
            SessionCorruptError: It is damaged at the shared place.
            SessionError: It is not there, or this disk refused.
        """
        place = self._place(digest)
        self._store.receive(digest, lambda name, path: self._files.get_file(f"{place}/{name}", str(path)))

    def _place(self, digest: str) -> str:
        return f"{self._root}/{hex_of(digest)}"
