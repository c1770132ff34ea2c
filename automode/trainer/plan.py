"""How long a run trains."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long to train; one of ``max_epochs`` and ``max_steps`` is None.

    Attributes:
        max_epochs: Passes over the loader.
        max_steps: Steps.
        steps_per_epoch: Batches of an epoch; None where the loader has no length.
        validate_every: Epochs between validations; 0: none.
    """

    max_epochs: int | None
    max_steps: int | None
    steps_per_epoch: int | None
    validate_every: int

    @property
    def total(self) -> int | None:
        """Steps of the whole run as asked for; None where that is not known before it ends."""
        if self.max_steps is not None:
            return self.max_steps
        if self.max_epochs is None or self.steps_per_epoch is None:
            return None
        return self.max_epochs * self.steps_per_epoch
