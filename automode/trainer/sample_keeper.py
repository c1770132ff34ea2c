"""Leaves the sample ledger in the session, with what is known of each sample beside its losses, for people to read and export."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from automode.errors import AutomodeError
from automode.session.ledger_file import ledger_columns, write_file
from automode.session.sample_table import SampleTable
from automode.trainer.random_state import forked_rng
from automode.trainer.sample_source import READ_BATCH
from automode.trainer.scanning import Scanner
from automode.trainer.user_warning import tell_user
from automode.trainer.validation import SliceFn

MOST_SECONDS = 2.0
"""Time that reading the training samples may take to find the slices' members; above it they are not read."""

FAIR_SECONDS = 0.5
"""Time after which it is foreseen what all of it will take: the first samples open files, and any may meet a busy machine."""

MOST_BYTES = 16 << 20
"""A ledger above this size is stored at the run's end alone, and in the checkpoints."""

_BYTES_A_SAMPLE = 64


@dataclass(slots=True, kw_only=True)
class SampleKeeper:
    """Writes the ledger of a run.

    Attributes:
        folder: The session's.
        scanner: Reads the ledger and the samples; knows suspects, and what the policy asked for beside the losses.
        slices: Slices that are functions of (inputs, targets).
        listed: Names of slices that are lists of held-out samples.
    """

    folder: Path
    scanner: Scanner
    slices: Mapping[str, SliceFn]
    listed: tuple[str, ...]
    _members: dict[str, npt.NDArray[np.bool_]] | None = None
    _why_no_slice: dict[str, str] | None = None
    _warned: bool = False

    def at_scan(self, step: int) -> None:
        """Store the ledger after a scan, where it is small enough to be written so often."""
        if self.scanner.train_ids.size * _BYTES_A_SAMPLE <= MOST_BYTES:
            self._keep(step, "scan")

    def at_end(self, step: int) -> None:
        """Store the ledger as the run leaves it."""
        self._keep(step, "end")

    def _keep(self, step: int, moment: str) -> None:
        """Write; a disk that refuses is told once and ends nothing."""
        try:
            write_file(self.folder, self._table(step, moment))
        except AutomodeError as error:
            if not self._warned:
                self._warned = True
                tell_user(f"the sample ledger could not be stored in the session: {error}", RuntimeWarning)

    def _table(self, step: int, moment: str) -> SampleTable:
        ledger = self.scanner.ledger()
        ids = np.union1d(self.scanner.train_ids, ledger.seen())
        columns = ledger_columns(ledger.state()["columns"], ids, has_margins=ledger.has_margins)
        noise, details = self.scanner.noise, self.scanner.details
        if noise is not None:
            columns["suspect"] = np.isin(ids, noise.suspects).astype(np.float64)
        columns["left_out"] = np.isin(ids, self.scanner.trunk.excluded).astype(np.float64)
        columns["relabelled"] = np.isin(ids, self.scanner.trunk.relabelled.ids).astype(np.float64)
        for name, values in details.columns.items():
            columns[name] = np.full(ids.size, np.nan)
            columns[name][np.searchsorted(ids, details.ids)] = values
        members, unknown = self._found()
        inside = np.searchsorted(ids, self.scanner.train_ids)
        slices = {}
        for name, mask in members.items():
            slices[name] = np.zeros(ids.size, dtype=np.bool_)
            slices[name][inside] = mask
        return SampleTable(
            step=step,
            moment="end" if moment == "end" else "scan",
            columns=columns,
            slices=slices,
            why_no_slice=unknown,
            why_no_column=details.why_not,
            total=int(ids.size),
        )

    def _found(self) -> tuple[dict[str, npt.NDArray[np.bool_]], dict[str, str]]:
        """Return the training members of each slice, and why those of others are not known; read once a run."""
        if self._members is None or self._why_no_slice is None:
            listed = "it is a list of held-out samples: give it as a function of (inputs, targets)"
            self._members, self._why_no_slice = {}, dict.fromkeys(self.listed, listed)
            if self.slices:
                try:
                    self._read()
                except Exception as error:  # the user's functions: whatever they raise is a reason
                    self._members = {}
                    why = f"{type(error).__name__}: {error}"
                    self._why_no_slice |= dict.fromkeys(self.slices, why)
        return self._members, self._why_no_slice

    def _read(self) -> None:
        """Ask every slice's function about all training samples, unless reading them would take too long."""
        assert self._why_no_slice is not None
        parts: dict[str, list[npt.NDArray[np.bool_]]] = {name: [] for name in self.slices}
        train_ids = self.scanner.train_ids
        began = time.perf_counter()
        with forked_rng(), torch.no_grad():
            for start in range(0, train_ids.size, READ_BATCH):
                inputs, targets = self.scanner.source.batch(train_ids[start : start + READ_BATCH])
                for name, function in self.slices.items():
                    mask = torch.as_tensor(function(inputs, targets)).cpu().numpy().astype(np.bool_)
                    parts[name].append(mask)
                done = min(train_ids.size, start + READ_BATCH)
                spent = time.perf_counter() - began
                needed = spent / done * train_ids.size
                if spent > FAIR_SECONDS and needed > MOST_SECONDS and done < train_ids.size:
                    why = (
                        f"reading all {train_ids.size} training samples to ask it would take about {needed:.0f} s, and no more "
                        f"than {MOST_SECONDS:g} are taken from the run"
                    )
                    self._why_no_slice |= dict.fromkeys(self.slices, why)
                    return
        self._members = {name: np.concatenate(found) for name, found in parts.items()}
