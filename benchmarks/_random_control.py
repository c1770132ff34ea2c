"""Was it the choice of samples that helped, or any choice of as many? Every mined subset beside a random one.

For each fork card of a session that trained on a part of the data (a selection, or all but what it left out), three arms train on
from the card's own snapshot of the trunk to the end of the run, at the trunk's rate and with its optimizer state, for the same
number of steps of the same size: on the mined samples, on as many drawn at random, and on all. The average of each arm's weights over
the last fifth is scored on the clean test set. Nothing of it is charged to the run: it is a measurement of the run, not a part of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from _matched_tasks import Data
from torch import Tensor, nn

from automode.session import Session
from automode.session.artifacts import ArtifactStore
from automode.session.checkpoints import CheckpointStore

Ids = npt.NDArray[np.int64]
TAIL = 0.2


@dataclass(frozen=True, kw_only=True)
class Subset:
    """A mined subset, and what training on it, on as many random samples, and on all samples came to: test accuracy in percent."""

    card: str
    state: str
    share: float
    mined: float
    random: float
    everything: float


def subsets(
    session: Session, data: Data, model: nn.Module, *, seed: int, steps: int, batch: int
) -> list[Subset]:
    """Train the three arms of every card of a session that mined a subset."""
    cards = {r.body["card"]["id"]: r.body["card"] for r in session.events(kind="card_proposed")}
    started = {r.body["card"]: r.body for r in session.events(kind="card_started")}
    states = {row.card_id: str(row.state) for row in session.cards()}
    checkpoints = CheckpointStore(session.path / "checkpoints")
    found = []
    for record in session.events(kind="resolved"):
        body, everyone = record.body, np.arange(len(data.train.x))
        mined = mined_ids(body, cards[body["card"]], ArtifactStore(session.path / "artifacts"), everyone)
        if body["card"] not in started or not 0 < mined.size < everyone.size:
            continue
        base = started[body["card"]]
        rng = np.random.default_rng(np.random.SeedSequence([seed, 4, base["step"]]))
        picked = {
            "mined": mined,
            "random": rng.choice(everyone, mined.size, replace=False),
            "everything": everyone,
        }
        weights, rest, _ = checkpoints.load(base["checkpoint"])
        scores = {
            name: _accuracy(
                model,
                trained_on(
                    model, weights, rest, data, ids, steps=steps - base["step"], batch=batch, seed=seed
                ),
                data,
            )
            for name, ids in picked.items()
        }
        found.append(
            Subset(
                card=f"{cards[body['card']]['reason']}@{base['step']}",
                state=states[body["card"]],
                share=mined.size / everyone.size,
                **scores,
            )
        )
    return found


def mined_ids(
    resolved: Mapping[str, Any], card: Mapping[str, Any], artifacts: ArtifactStore, everyone: Ids
) -> Ids:
    """The samples that a card's trials were meant for, less those that it left out."""
    selection = card["selection"]
    chosen = everyone
    if resolved["artifact"] is not None:
        chosen = artifacts.get_ids(resolved["artifact"])
    elif selection["kind"] == "indices":
        chosen = np.asarray(selection["ids"], dtype=np.int64)
    if resolved["excluded"] is not None:
        chosen = np.setdiff1d(chosen, artifacts.get_ids(resolved["excluded"]))
    return chosen


def trained_on(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    rest: Mapping[str, Any],
    data: Data,
    ids: Ids,
    *,
    steps: int,
    batch: int,
    seed: int,
) -> dict[str, Tensor]:
    """Train on from a snapshot on some samples; returns the average of the weights over the last fifth of the steps."""
    model.load_state_dict(dict(weights))
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.load_state_dict(rest["optimizer"])
    x, y = torch.from_numpy(data.train.x[ids]), torch.from_numpy(data.train.y[ids])
    rng = np.random.default_rng(np.random.SeedSequence([seed, 5]))
    average = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    left, count, first = np.empty(0, dtype=np.int64), 0, int((1 - TAIL) * steps)
    for step in range(steps):
        if left.size < batch:
            left = np.concatenate([left, rng.permutation(ids.size)])
        drawn, left = torch.from_numpy(left[:batch]), left[batch:]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[drawn]), y[drawn]).backward()
        optimizer.step()
        if step >= first:
            count += 1
            for name, value in model.state_dict().items():
                average[name].lerp_(value, 1 / count)
    return average


@torch.no_grad()
def _accuracy(model: nn.Module, weights: Mapping[str, Tensor], data: Data) -> float:
    model.load_state_dict(dict(weights))
    right = model(torch.from_numpy(data.test.x)).argmax(dim=1).numpy() == data.test.y
    return 100.0 * float(right.mean())
