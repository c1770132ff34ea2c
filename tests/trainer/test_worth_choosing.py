"""An earlier state that is a little less sure of itself is no better than the last one that is right more often."""

from __future__ import annotations

import numpy as np

from automode.trainer.evaluation import PerSampleScores
from automode.trainer.finishing import worth_choosing


def scores(p: float, *, right: int, n: int = 100) -> PerSampleScores:
    """The label has probability p in the first ``right`` answers, which are right, and 1 - p in the others."""
    correct = (np.arange(n) < right).astype(np.float64)
    p_true = np.where(correct > 0, p, 1.0 - p)
    return PerSampleScores(
        ids=np.arange(n),
        loss=-np.log(p_true),
        utility=0.8 * correct + 0.2 * p_true,
        correct=correct,
        p_true=p_true,
        p_top=np.full(n, p),
    )


def left(**found: PerSampleScores) -> set[str]:
    named = {name.replace("best_", "best:"): of for name, of in found.items()}
    values = {name: float(of.by("log_score").mean()) for name, of in named.items()}
    return set(worth_choosing(values, named, "log_score"))


def test_only_earlier_states_that_cost_more_than_they_bring_are_left_out() -> None:
    raw, ema = scores(0.9999, right=90), scores(0.995, right=92)
    slight, large = scores(0.99, right=91), scores(0.9, right=91)
    assert left(raw=raw, ema10=ema, best_raw=slight) == {"raw", "ema10"}
    assert left(raw=raw, ema10=ema, best_raw=large) == {"raw", "ema10", "best:raw"}
    assert left(raw=raw, ema10=ema, best_raw=scores(0.99, right=93)) == {"raw", "ema10", "best:raw"}


def test_by_utility_every_candidate_stands() -> None:
    named = {"raw": scores(0.98, right=92), "best:raw": scores(0.97, right=91)}
    values = {name: float(of.utility.mean()) for name, of in named.items()}
    assert worth_choosing(values, named, "utility") == values
