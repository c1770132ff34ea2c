"""Training samples held out of a run that has no validation loader: only where the policy names a share, and only in act mode.

The loader, its sampler and its random numbers stay the user's. A batch is drawn as ever, and the rows of held-out samples are taken from it
before the step, as those that an adopted card leaves out. Which samples they are follows from the session's seed, so that a run that is taken
up holds out the same ones.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch

from automode.errors import UsageError
from automode.planner.events import Mode
from automode.planner.policy import EvidencePolicy
from automode.trainer.held_back import INSTEAD, HeldBack
from automode.trainer.heldout import HeldOut, strata_of
from automode.trainer.ids import RecordedLoader, root_of
from automode.trainer.random_state import seeded_rng
from automode.trainer.reach import positions_read
from automode.trainer.rows import rows_of
from automode.trainer.sample_source import Ids
from automode.trainer.trees import tensors_in
from automode.trainer.user_warning import warn_user

LEAST_BATCH: Final = 8
"""Smallest batches that samples are taken out of: of smaller ones, too often nothing would be left."""


def hold_out(
    policy: EvidencePolicy, mode: Mode, loader: RecordedLoader, device: torch.device, seed: int
) -> tuple[HeldOut, HeldBack] | None:
    """Hold out the share of the training data that the policy names; None where it names none, or the run may not act.

    Args:
        policy: Names the share, and the least samples of each half.
        mode: That the run begins in.
        loader: The training batches.
        device: Where batches go.
        seed: The session's; which samples they are follows from it.

    Raises:
        UsageError: They cannot be kept out of the batches, or are too few to judge by.
    """
    share = policy.holdout_share
    if share is None or mode == "off":
        return None
    if mode != "act":
        warn_user(
            f"policy.evidence.holdout_share={share:g} holds nothing out in {mode} mode: training data are split in act mode alone. Without "
            "held-out data nothing can be proven; pass a validation loader for that"
        )
        return None
    given: Any = loader.loader
    if why := _why_not(given, loader):
        raise UsageError(
            f"policy.evidence.holdout_share={share:g} cannot hold training samples out: {why}; {INSTEAD}"
        )
    back = _chosen(share, given, seed)
    if back.ids.size < 2 * policy.min_samples:
        raise UsageError(
            f"policy.evidence.holdout_share={share:g} of {back.of} training samples is {back.ids.size}, and the two halves need "
            f"{policy.min_samples} each: name a larger share, or {INSTEAD}"
        )
    held_out = HeldOut(given, device, seed, positions=back.positions)
    assert held_out.reason is None, held_out.reason
    warn_user(
        f"{back.ids.size} of {back.of} training samples are held out to judge by, and never trained on, as "
        f"policy.evidence.holdout_share={share:g} asks; batches are that much smaller"
    )
    return held_out, back


def _why_not(given: Any, loader: RecordedLoader) -> str | None:
    if loader.reason is not None:
        return loader.reason
    size = getattr(given, "batch_size", None)
    if not isinstance(size, int):
        return "the loader does not say how large its batches are"
    if size < LEAST_BATCH:
        return f"batches of {size} are too small to take samples out of ({LEAST_BATCH} at the least)"
    with seeded_rng(0):
        probe = given.collate_fn([given.dataset[0]] * 3)
    kept = list(tensors_in(rows_of(probe, np.array([0, 2]), 3)))
    if not kept or any(tensor.dim() == 0 or tensor.shape[0] != 2 for tensor in kept):
        return "its batches are not tensors with one row a sample, in tuples, lists and mappings"
    return None


def _chosen(share: float, given: Any, seed: int) -> HeldBack:
    """Choose samples by class, each class its share."""
    read = positions_read(given, draw=False)
    positions = np.arange(len(given.dataset), dtype=np.int64) if read is None else read
    _, mapped = root_of(given.dataset)
    ids = positions if mapped is None else np.asarray(mapped, dtype=np.int64)[positions]
    ids, first = np.unique(ids, return_index=True)  # a Subset may hold a sample twice
    positions = positions[first]
    rng = np.random.default_rng(np.random.SeedSequence([seed, 0x401D]))
    mine = _share_of(strata_of(given.dataset, positions), share, rng)
    trained = positions[~mine]
    if not trained.size:
        raise UsageError(
            f"policy.evidence.holdout_share={share:g} leaves nothing of {ids.size} samples to train on"
        )
    return HeldBack(
        ids=ids[mine],
        positions=positions[mine],
        of=int(ids.size),
        stand_ins=rng.choice(trained, size=int(mine.sum())),
        fetch=lambda chosen: given.collate_fn([given.dataset[i] for i in chosen]),
        ids_at=lambda chosen: np.asarray(chosen, dtype=np.int64) if mapped is None else mapped[list(chosen)],
        seed=seed,
    )


def _share_of(strata: Ids, share: float, rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Mark a share of each stratum; what rounding leaves over is carried to the next."""
    marked, carried = np.zeros(strata.size, dtype=np.bool_), 0.0
    for value in np.unique(strata):
        members = rng.permutation(np.flatnonzero(strata == value))
        wanted = share * members.size + carried
        take = min(members.size, round(wanted))
        carried = wanted - take
        marked[members[:take]] = True
    return marked
