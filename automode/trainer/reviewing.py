"""The list of suspects that a person reviews: what the ledger, the nearest other samples and the network say of each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from automode.session.suspects import COLUMNS
from automode.trainer.noise import NEIGHBOURS, nearest, probabilities_of
from automode.trainer.sample_ledger import SampleLedger
from automode.trainer.sample_source import Ids

Floats = npt.NDArray[np.float64]
Read = Callable[[Ids], tuple[Floats, list[object], Ids | None, float]]
"""Ids to features [n, d], outputs a batch, labels, and the sample passes that reading took."""


def review(
    suspects: Ids, *, most: int, ledger: SampleLedger, probe: Ids, features: Floats, labels: Ids, read: Read
) -> tuple[Floats, float]:
    """List suspects with what is known of them.

    Args:
        suspects: Most suspect first, at least one.
        most: Of how many of them, the first, network and neighbours are asked.
        ledger: What training has shown.
        probe: Samples among which the nearest are looked for; those that are suspects themselves do not count.
        features: Of the probe, [n, d].
        labels: Of the probe.
        read: Reads samples.

    Returns:
        A row each, in the columns of :data:`automode.session.suspects.COLUMNS`, NaN where a value is not known; and the sample
        passes that were spent.
    """
    table = np.full((suspects.size, len(COLUMNS)), np.nan)
    column = {name: i for i, name in enumerate(COLUMNS)}
    table[:, column["sample_id"]] = suspects
    for name, known_as in (("margin", "margin"), ("mean_loss", "mean_loss"), ("visits", "count")):
        table[:, column[name]] = ledger.column(known_as, suspects)
    asked = suspects[:most]
    beside = ~np.isin(probe, suspects)
    if not beside.any():
        return table, 0.0
    mine, outputs, given, passes = read(asked)
    probabilities = probabilities_of(outputs)
    if given is None or probabilities is None:
        return table, passes
    around = labels[beside][nearest(features[beside], mine, NEIGHBOURS)]
    suggested = probabilities.argmax(axis=1)
    rows = slice(0, asked.size)
    table[rows, column["given_label"]] = given
    table[rows, column["neighbour_agreement"]] = (around == given[:, None]).mean(axis=1)
    table[rows, column["suggested_label"]] = suggested
    table[rows, column["suggested_agreement"]] = (around == suggested[:, None]).mean(axis=1)
    return table, passes
