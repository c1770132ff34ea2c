"""How often the state is stored, as a person writes it."""

from __future__ import annotations

import pytest

from automode.errors import UsageError
from automode.trainer.cadence import Cadence, cadence_of
from automode.trainer.settings import Settings


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("500 steps", 500, "steps"),
        ("1 step", 1, "steps"),
        ("1 epoch", 1, "epochs"),
        ("2epochs", 2, "epochs"),
        ("10 min", 600, "seconds"),
        (" 0.5 H ", 1800, "seconds"),
        ("30s", 30, "seconds"),
    ],
)
def test_it_reads_steps_epochs_and_times(text: str, amount: float, unit: str) -> None:
    assert cadence_of(text) == Cadence(amount, unit)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["", "500", "steps", "0 steps", "1.5 epochs", "10 fortnights", "-1 min", 500]
)
def test_anything_else_is_refused_with_examples(text: str) -> None:
    with pytest.raises(UsageError, match="checkpoint_every"):
        Settings(checkpoint_every=text)


@pytest.mark.parametrize("given", [{"keep_checkpoints": 0}, {"keep_checkpoints": 1.5}, {"resume": True}])
def test_settings_refuse_what_cannot_be_kept_or_resumed(given: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(given))):
        Settings(**given)  # type: ignore[arg-type]
