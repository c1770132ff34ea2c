"""What the finish may choose from: nothing that its second metric would refuse anyway."""

from __future__ import annotations

import numpy as np

from automode.trainer.evaluation import PerSampleScores
from automode.trainer.finishing import as_often_right

N = 200


def scores(right: int) -> PerSampleScores:
    """A network that is right about so many of the samples."""
    correct = (np.arange(N) < right).astype(np.float64)
    return PerSampleScores(
        ids=np.arange(N),
        loss=1.0 - correct,
        utility=correct,
        correct=correct,
        p_true=correct,
        p_top=np.ones(N),
    )


STATES = {"raw": scores(180), "ema3": scores(178), "best:raw": scores(177), "best:ema3": scores(190)}


def test_what_the_log_score_chooses_among_is_right_as_often_within_a_point() -> None:
    assert list(as_often_right(STATES, "log_score")) == ["raw", "ema3", "best:ema3"]


def test_the_utility_sees_accuracy_itself() -> None:
    assert as_often_right(STATES, "utility") == STATES


def test_values_have_no_accuracy() -> None:
    states = {"raw": PerSampleScores(ids=np.arange(N), loss=np.ones(N), utility=-np.ones(N))}
    assert as_often_right(states, "utility") == states
