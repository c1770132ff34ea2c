"""Which columns of a log are the loss, the gradient norm, the learning rate and the step."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from automode.errors import UsageError
from automode.planner.yaml_text import shown

STEPS: Final = (
    "step",
    "global_step",
    "trainer_global_step",
    "_step",
    "train_global_step",
    "iteration",
    "iter",
    "steps",
)
LOSSES: Final = (
    "loss",
    "train_loss_step",
    "train_loss",
    "training_loss",
    "loss_step",
    "loss_train",
    "train_batch_loss",
    "batch_loss",
    "step_loss",
    "train_loss_epoch",
)
NORMS: Final = (
    "grad_norm",
    "gradient_norm",
    "gnorm",
    "train_grad_norm",
    "train_gradient_norm",
    "grad_norm_step",
    "global_grad_norm",
    "total_grad_norm",
    "grad_2_0_norm_total",
    "grad_2_norm_total",
)
RATES: Final = ("lr", "learning_rate", "train_lr", "train_learning_rate")
OWN: Final = frozenset({"step", "loss", "grad_norm", "lr"})
HELD_OUT: Final = frozenset({"val", "valid", "validation", "eval", "evaluation", "test", "dev", "best"})
_SUFFIX: Final = re.compile(r"__(min|max)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """The columns of a log that are read.

    Attributes:
        loss: Of the training loss.
        step: Of the step; None: rows are counted.
        grad_norm: Of the gradient norm before clipping.
        lr: Of the learning rate.
        epoch: Of the epoch, which tells a step that counts within epochs.
        own: Whether the file has no column but ``step``, ``loss``, ``grad_norm`` and ``lr``.
    """

    loss: str
    step: str | None = None
    grad_norm: str | None = None
    lr: str | None = None
    epoch: str | None = None
    own: bool = False

    def all(self) -> tuple[str, ...]:
        """Every column that is read."""
        found = (self.step, self.loss, self.grad_norm, self.lr, self.epoch)
        return tuple(name for name in found if name is not None)


def find_columns(file: str, columns: Sequence[str], loss: str | None = None) -> Names:
    """Find the columns by their names, as Lightning, W&B, MLflow and TensorBoard write them.

    Args:
        file: The file's name, for the messages.
        columns: What there is.
        loss: The column that a person names.

    Raises:
        UsageError: There is no such column, no training loss among them, or more than one that might be it.
    """
    usable = [title for title in columns if title and not _SUFFIX.search(title)]
    chosen = _named(file, usable, loss) if loss is not None else _guessed(file, usable)
    run = chosen.rpartition(" - ")[0]
    same = [title for title in usable if title != chosen and title.rpartition(" - ")[0] in ("", run)]
    rate = _first(same, RATES) or next((t for t in same if _plain(t).startswith("lr_")), None)
    return Names(
        loss=chosen,
        step=_first(same, STEPS),
        grad_norm=_first(same, NORMS),
        lr=rate,
        epoch=_first(same, ("epoch",)),
        own=set(columns) <= OWN,
    )


def _named(file: str, columns: Sequence[str], wanted: str) -> str:
    for title in columns:
        if title == wanted:
            return title
    alike = [title for title in columns if title.lower() == wanted.lower()]
    if len(alike) == 1:
        return alike[0]
    close = difflib.get_close_matches(wanted, columns, n=1)
    guess = f"; did you mean `{shown(close[0])}`?" if close else ""
    raise UsageError(f"{file} has no column `{shown(wanted)}`{guess}\n{_listed(columns)}")


def _guessed(file: str, columns: Sequence[str]) -> str:
    for plain in LOSSES:
        found = [title for title in columns if _plain(title) == plain]
        if found:
            return _only(file, found, columns)
    rest = [
        title for title in columns if "loss" in _plain(title) and not HELD_OUT & set(_plain(title).split("_"))
    ]
    if rest:
        return _only(file, rest, columns)
    raise UsageError(
        f"{file} has no column that looks like a training loss: name it with --loss COLUMN\n{_listed(columns)}"
    )


def _only(file: str, found: Sequence[str], columns: Sequence[str]) -> str:
    if len(set(found)) == 1:
        return found[0]
    several = ", ".join(f"`{shown(title)}`" for title in found)
    raise UsageError(
        f"{file} has several columns that may be the training loss ({several}): choose one with --loss COLUMN"
    )


def _listed(columns: Sequence[str]) -> str:
    return f"its columns are {', '.join(f'`{shown(title)}`' for title in columns) or 'none'}"


def _first(columns: Sequence[str], wanted: Sequence[str]) -> str | None:
    for plain in wanted:
        for title in columns:
            if _plain(title) == plain:
                return title
    return None


def _plain(title: str) -> str:
    """A name as it is compared: the metric of "run - metric", in lower case, words joined by underscores."""
    return re.sub(r"[^0-9a-z_]+", "_", title.rpartition(" - ")[2].strip().lower())
