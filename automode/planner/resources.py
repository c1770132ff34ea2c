"""What a trial may ask of the machines that train it."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from automode.planner.parts import Part


class Resources(Part):
    """What the worker of each trial is given, and holds for as long as it lives."""

    cpus: float = Field(default=1.0, ge=0.0, le=4096.0, description="CPU cores; a fraction shares one")
    gpus: float = Field(
        default=0.0, ge=0.0, le=1024.0, description="GPUs; a fraction shares one, and above 1 they are whole"
    )

    @field_validator("cpus", "gpus")
    @classmethod
    def _in_steps(cls, value: float) -> float:
        # What is finer than this a cluster rounds to nothing.
        if abs(round(value * 1e4) - value * 1e4) > 1e-6:
            raise ValueError(f"{value:g} is finer than a ten-thousandth")
        return value

    @model_validator(mode="after")
    def _whole(self) -> Resources:
        if self.gpus > 1.0 and not self.gpus.is_integer():
            raise ValueError(f"`gpus` ({self.gpus:g}) is above 1, where only whole GPUs can be had")
        return self

    @property
    def text(self) -> str:
        """In words."""
        cores, gpus = (
            f"{n:g} {what}{'' if n == 1.0 else 's'}" for n, what in ((self.cpus, "core"), (self.gpus, "GPU"))
        )
        return f"{cores} and {gpus}"
