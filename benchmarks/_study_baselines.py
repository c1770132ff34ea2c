"""The rules that others use, re-implemented from their sources for the signals study. Each gives the rows of its alarms.

Plateau rules see one segment between two drops of the rate and give the row of their first alarm; all others see a whole run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
BLOCK = 20


def seed_plateau(loss: Array) -> int | None:
    """The first version of this planner: two absolute slopes of 1e-4, or Mann-Kendall's S over the pairs below .05, on 200 losses."""
    w = 200
    i, j = np.triu_indices(w, 1)
    mean = var = None
    for t, x in enumerate(loss.tolist()):
        if not np.isfinite(x):
            continue
        before, spread = mean, var
        mean = x if mean is None else 0.98 * mean + 0.02 * x
        var = 0.0 if var is None else 0.98 * var + 0.02 * (x - mean) ** 2
        if t < w or t % BLOCK:
            continue
        z = 0.0 if before is None or not spread else (x - before) / spread**0.5
        y = loss[t - w + 1 : t + 1]
        if z > 3.0 or not np.isfinite(y).all():
            continue
        rise = y[j] - y[i]
        slope = abs(float(np.median(rise / (j - i))))
        if (y[0] - y[-1] < 1e-4 and slope < 1e-4) or abs(float(np.sign(rise).mean())) < 0.05:
            return t
    return None


def no_trend(loss: Array, budget: int, gain: float) -> int | None:
    """No significant Mann-Kendall (5 %) and a Theil-Sen estimate below the gain, on block means of the last B."""
    w = budget // BLOCK
    i, j = np.triu_indices(w, 1)
    means = _means(loss, BLOCK)
    for k in range(w, len(means) + 1):
        y = means[k - w : k]
        slopes = (y[j] - y[i]) / (j - i)
        s = float(np.sign(slopes).sum()) / (w * (w - 1) * (2 * w + 5) / 18.0) ** 0.5
        if abs(s) < 1.96 and -float(np.median(slopes)) * w / float(np.median(y[-w // 4 :])) < gain:
            return k * BLOCK - 1
    return None


def reduce_on_plateau(loss: Array) -> int | None:
    """PyTorch's ReduceLROnPlateau with its relative threshold of 1e-4, stepped with means of 100 losses, patience 4."""
    return _patience(_means(loss, 100), 100, patience=4, relative=1e-4)


def early_stopping(loss: Array) -> int | None:
    """Keras' and Lightning's EarlyStopping, min_delta 0, on raw losses, patience 400 steps."""
    return _patience(loss, 1, patience=399, relative=0.0)


def averaged_patience(loss: Array) -> int | None:
    """The best baseline of the study that the thresholds come from: EMA (.97 of means of 20), 1 %, patience 400 steps."""
    smooth: list[float] = []
    for y in _means(loss, BLOCK).tolist():
        smooth.append(y if not smooth else 0.97 * smooth[-1] + 0.03 * y)
    return _patience(np.array(smooth), BLOCK, patience=400 // BLOCK, relative=0.01)


def _patience(values: Array, each: int, *, patience: int, relative: float) -> int | None:
    best, bad = np.inf, 0
    for k, y in enumerate(values.tolist()):
        if y < best * (1.0 - relative):
            best, bad = y, 0
        else:
            bad += 1
            if bad > patience:
                return (k + 1) * each - 1
    return None


def _means(loss: Array, width: int) -> Array:
    whole = loss[: len(loss) // width * width].reshape(-1, width)
    with np.errstate(all="ignore"):
        return np.asarray(np.nanmean(np.where(np.isfinite(whole), whole, np.nan), axis=1))


def megatron(values: Array) -> list[int]:
    """Megatron-LM's rerun state machine: at least ten times the largest of the first 100; what is not finite is passed over."""
    early = values[:100]
    bar = 10.0 * float(early[np.isfinite(early)].max())
    return [int(t) for t in np.flatnonzero(np.isfinite(values) & (values >= bar)) if t >= 100]


def kill_loss_spike(values: Array) -> list[int]:
    """llm-foundry's KillLossSpike: twice the mean of the last 100 for five in a row, or half of them above 10."""
    window: deque[float] = deque(maxlen=100)
    alarms, run = [], 0
    for t, x in enumerate(values.tolist()):
        if len(window) == 100:
            run = run + 1 if x >= 2.0 * float(np.mean(window)) else 0
            if run >= 5 or sum(v > 10.0 for v in window) >= 50:
                alarms.append(t)
        window.append(x)
    return alarms


def averaged_z(values: Array, bar: float = 3.0, keep: float = 0.98) -> list[int]:
    """The first version of this planner: z of an exponential mean and variance above 3; NaN and infinity at once."""
    alarms = []
    mean = var = None
    for t, x in enumerate(values.tolist()):
        if not np.isfinite(x):
            alarms.append(t)
            continue
        if mean is not None and var is not None and t >= 25 and var > 0 and (x - mean) / var**0.5 > bar:
            alarms.append(t)
        mean = x if mean is None else keep * mean + (1 - keep) * x
        var = 0.0 if var is None else keep * var + (1 - keep) * (x - mean) ** 2
    return alarms


def above_best(loss: Array, factor: float = 1.5) -> list[int]:
    """An exponential mean (.98) more than half above its best."""
    alarms, mean, best = [], None, np.inf
    for t, x in enumerate(loss.tolist()):
        if not np.isfinite(x):
            alarms.append(t)
            continue
        mean = x if mean is None else 0.98 * mean + 0.02 * x
        if t >= 100:
            best = min(best, mean)
            if mean > factor * best:
                alarms.append(t)
    return alarms


PLATEAU: dict[str, Callable[[Array, int, float], int | None]] = {
    "the seed's rule (200 losses)": lambda y, _b, _g: seed_plateau(y),
    "Mann-Kendall and Theil-Sen, B": no_trend,
    "ReduceLROnPlateau (means of 100)": lambda y, _b, _g: reduce_on_plateau(y),
    "EarlyStopping (raw, 400)": lambda y, _b, _g: early_stopping(y),
    "averaged patience (400, 1 %)": lambda y, _b, _g: averaged_patience(y),
}

SPIKE: dict[str, Callable[[Array, Array], list[int]]] = {
    "the seed's rule (z 3, either)": lambda y, g: averaged_z(y) + averaged_z(g),
    "Megatron, loss": lambda y, _g: megatron(y),
    "Megatron, gradient norm": lambda _y, g: megatron(g),
    "KillLossSpike, loss": lambda y, _g: kill_loss_spike(y),
    "ZClip as an alarm (z 2.5, norm)": lambda _y, g: averaged_z(g, 2.5, 0.97),
}
