"""A run killed after any batch, taken up in a new process, ends bit by bit as the run that nobody touched."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.torch

FACTORS: dict[str, tuple[Any, Any]] = {
    "workers": (0, 2),
    "dropout": (False, True),
    "per_step": (False, True),
    "accumulation": (1, 4),
    "generator": (False, True),
    "noisy": (False, True),
}

# A covering array of strength two: each column has three ones among its last five rows, no two columns the same three, so
# that any two factors meet in all four combinations.
PAIRWISE = ["000000", "111000", "110110", "101101", "011011", "000111"]


def cell_of(scripts: Any, bits: str) -> Any:
    return scripts.Cell(**{name: FACTORS[name][int(bit)] for name, bit in zip(FACTORS, bits, strict=True)})


def check(run: Any, cell: Any, folder: Path, cuts: list[int]) -> None:
    untouched = run("fitted", cell, folder / "untouched", checkpoint_every=None)["told"]
    stored = run("killed", cell, folder / "stored", cuts=cuts, keep_checkpoints=1)
    assert stored["told"] == untouched
    for cut in cuts:
        session = folder / "stored" / "cuts" / f"{cut:03d}"
        resumed = run("fitted", cell, folder, resume=str(session), checkpoint_every=None)["told"]
        assert resumed == untouched, f"cut after batch {cut}"


def test_the_pairwise_subset_covers_every_pair_of_values() -> None:
    for one, other in itertools.combinations(range(len(FACTORS)), 2):
        assert len({(bits[one], bits[other]) for bits in PAIRWISE}) == 4


@pytest.mark.parametrize("bits", PAIRWISE)
def test_a_run_killed_after_any_batch_goes_on_bit_by_bit(
    bits: str, scripts: Any, run: Any, tmp_path: Path
) -> None:
    """Each cell is cut after every fourth batch; together they are cut after every batch."""
    first = PAIRWISE.index(bits) % 4 + 1
    check(run, cell_of(scripts, bits), tmp_path, list(range(first, scripts.STEPS + 1, 4)))


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("bits", ["".join(bits) for bits in itertools.product("01", repeat=len(FACTORS))])
def test_every_cell_of_the_matrix_goes_on_bit_by_bit(
    bits: str, scripts: Any, run: Any, tmp_path: Path
) -> None:
    check(run, cell_of(scripts, bits), tmp_path, list(range(1, scripts.STEPS + 1)))
