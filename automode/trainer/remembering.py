"""What those who carry commands out have in memory, as plain data: it goes into a checkpoint, and back.

The log says what was decided, not what it was decided on: the ids that a running card trains on, the latest verdict on label
noise, the latest clusters, the good states that the run may go back to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from automode.errors import NotExecutableError
from automode.planner.cards import PlanCard
from automode.planner.events import Resolved
from automode.trainer.card_data import CardData
from automode.trainer.clusters import Clusters
from automode.trainer.new_labels import NewLabels
from automode.trainer.noise import NoiseEvidence
from automode.trainer.performer import Performer, entropy_of
from automode.trainer.relabelling import packed, unpacked
from automode.trainer.scanning import Scanner

_SELECTED, _OTHERS, _LEFT_OUT = 1, 2, 3


def remembered(performer: Performer) -> dict[str, Any]:
    """Take what a run's performer has in memory: plain data and tensors."""
    runner, scanner, selector = performer.runner, performer.scanner, performer.selector
    found: dict[str, Any] = {
        "cards": {},
        "good": performer.good.state(),
        "best": performer.best.state(),
        "direction": performer.diagnoser.state(),
    }
    if runner is not None and selector is not None:
        for card, data in runner.cards.items():
            part = np.zeros(selector.train_ids.size, dtype=np.uint8)
            part[np.isin(selector.train_ids, data.selected)] = _SELECTED
            part[np.isin(selector.train_ids, data.others)] = _OTHERS
            part[np.isin(selector.train_ids, data.left_out)] = _LEFT_OUT
            found["cards"][card] = {
                "part": torch.from_numpy(part),
                "step": data.step,
                "trunk_labels": _tensor(data.trunk_labels.packed()),
                "new_labels": _tensor(packed(data.new_labels, data.chosen)),
                "parts": [_tensor(ids) for ids in data.parts],
            }
        if runner.per_sample is not None:
            found["per_sample"] = runner.per_sample.state()
    if scanner is not None:
        found["scanner"] = _of_scanner(scanner)
    return found


def remind(performer: Performer, kept: Mapping[str, Any]) -> None:
    """Put back what :func:`remembered` took, but the running cards' samples.

    Args:
        performer: Of the run that is taken up.
        kept: What was taken.
    """
    performer.good.load(kept["good"])
    if "best" in kept:  # a checkpoint of an earlier version has none
        performer.best.load(kept["best"])
    performer.diagnoser.load(kept["direction"])
    if performer.runner is not None and performer.runner.per_sample is not None and "per_sample" in kept:
        performer.runner.per_sample.load(kept["per_sample"])
    scanner, stored = performer.scanner, kept.get("scanner")
    if scanner is None or stored is None:
        return
    if stored["noise"] is not None:
        noise = stored["noise"]
        scanner.noise = NoiseEvidence(
            rate=noise["rate"], suspects=noise["suspects"].numpy(), why=noise["why"]
        )
    if stored["clusters"] is not None:
        scanner.clusters = Clusters(**{name: value.numpy() for name, value in stored["clusters"].items()})


def remind_card(
    performer: Performer, card: PlanCard, kept: Mapping[str, Any], resolved: Resolved | None
) -> None:
    """Give a running card its samples back: as they were kept, else by choosing them again.

    Args:
        performer: Of the run that is taken up.
        card: The card.
        kept: What :func:`remembered` took.
        resolved: What was chosen when the card began; None where that is still to come.

    Raises:
        NotExecutableError: What is chosen now is not what was chosen then.
    """
    if resolved is None or card.action != "fork":
        return
    runner, selector = performer.runner, performer.selector
    if runner is None or selector is None or card.training_recipe is None:
        raise NotExecutableError("this run trains no specialists any more, so that the card cannot go on")
    stored = kept.get("cards", {}).get(card.id)
    if stored is not None and len(stored["part"]) == selector.train_ids.size:
        part = stored["part"].numpy()
        selected, others = (selector.train_ids[part == which] for which in (_SELECTED, _OTHERS))
        if (selected.size, selected.size + others.size) == (resolved.n, resolved.pool):
            labels, chosen = unpacked(stored["new_labels"].numpy())
            runner.cards[card.id] = CardData(
                recipe=card.training_recipe,
                selected=selected,
                others=others,
                entropy=entropy_of(performer.seed, card),
                step=int(stored["step"]),
                left_out=selector.train_ids[part == _LEFT_OUT],
                trunk_labels=NewLabels.unpacked(stored["trunk_labels"].numpy()),
                new_labels=labels,
                chosen=chosen,
                metric=card.acceptance.metric,
                parts=tuple(ids.numpy() for ids in stored.get("parts", ())),
            )
            return
    again = performer.resolve(card, performer.trunk.step)
    for name in ("n", "pool", "artifact", "relabelled", "variants", "parts"):
        then, now = getattr(resolved, name), getattr(again, name)
        if then != now:
            performer.forget(card.id)
            raise NotExecutableError(
                f"its selection is not what it was when its trials began ({name} was {then}, and is {now}), and the checkpoint "
                "that the run goes on from does not hold it"
            )


def _of_scanner(scanner: Scanner) -> dict[str, Any]:
    noise, clusters = scanner.noise, scanner.clusters
    return {
        "noise": None
        if noise is None
        else {"rate": noise.rate, "suspects": _tensor(noise.suspects), "why": noise.why},
        "clusters": None
        if clusters is None
        else {name: _tensor(getattr(clusters, name)) for name in ("centroids", "mean", "scale", "labels")},
    }


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
