"""What each epoch came to, as a stream of the session: losses, metrics, throughput, memory and the norm of the weights.

One row an epoch; nothing here runs at a step. Times and memory are of this machine, so that two equal runs differ in them.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch

from automode.trainer.gradient_norms import total_norm
from automode.trainer.run_parts import RunParts

resource: ModuleType | None
try:
    import resource
except ImportError:  # Windows
    resource = None

STREAM = "epochs"
"""The session's stream: ``session.frames("epochs")``."""


class EpochTable:
    """Collects an epoch's numbers and writes them when it is over.

    Columns: ``epoch``, ``step``, ``train_loss``, ``learning_rate``, ``val_loss``, ``val_metric`` and whatever else validation
    gives (NaN without validation), ``seconds`` (of training, with everything that automode did in between),
    ``samples_per_second``, ``weight_norm`` (Euclidean, of what is trained), ``peak_rss_mib`` (of the process since its start;
    NaN on Windows), ``peak_cuda_mib`` (only on CUDA).

    Args:
        parts: The run.
        batch_size: Mean samples of a batch; NaN where that is not known.
        clock: Seconds.

    Attributes:
        batches: Tells how many batches have been trained on.
        wrote: Called with each row that is written.
    """

    def __init__(
        self,
        parts: RunParts,
        *,
        batch_size: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._trunk = parts.trunk
        self._keep_row = parts.keep_row
        self._batch_size = batch_size
        self._clock = clock
        self._epoch = 0
        self._batches = 0
        self._began = (clock(), 0)
        self._numbers: dict[str, float] = {}
        self._waiting: dict[str, float] | None = None
        self.batches: Callable[[], int] = lambda: 0
        self.wrote: Callable[[Mapping[str, float]], None] | None = None

    def begins(self) -> None:
        """An epoch begins, or the rest of one."""
        self.write()
        self._began = (self._clock(), self.batches())
        self._numbers = {}

    def trained(self, train_loss: float) -> None:
        """Its last batch was trained on."""
        seconds = self._clock() - self._began[0]
        samples = (self.batches() - self._began[1]) * self._batch_size
        self._numbers = {
            "train_loss": train_loss,
            "seconds": seconds,
            "samples_per_second": samples / seconds if seconds > 0 else math.nan,
        }

    def note(self, numbers: Mapping[str, float]) -> None:
        """More numbers of this epoch."""
        self._numbers.update(numbers)

    def over(self, learning_rate: float) -> None:
        """The epoch is over; its row waits for the next one to begin, since a run's end may validate once more."""
        row = {"epoch": float(self._epoch), "step": float(self._trunk.step), **self._numbers}
        row |= {"learning_rate": learning_rate, "weight_norm": weight_norm(self._trunk.parameters)}
        row |= memory(self._trunk.device)
        self._epoch += 1
        self._waiting, self._numbers = row, {}

    def write(self) -> None:
        """Write the row that waits, if there is one."""
        row, self._waiting = self._waiting, None
        if row is None:
            return
        row |= self._numbers
        if self._keep_row is not None:
            self._keep_row(STREAM, tuple(row), list(row.values()))
        if self.wrote is not None:
            self.wrote(row)

    def state(self) -> dict[str, Any]:
        """The number of the epoch, and the row that waits, for :meth:`load`."""
        return {"epoch": self._epoch, "waiting": self._waiting}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self._epoch, self._waiting = int(state["epoch"]), state["waiting"]


def weight_norm(parameters: list[torch.nn.Parameter]) -> float:
    """Euclidean norm of all parameters that are trained; 0 where there are none."""
    trained = [p.detach() for p in parameters if p.requires_grad and p.numel()]
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in trained):
        trained = [p.float() for p in trained]
    return float(total_norm(torch._foreach_norm(trained))) if trained else 0.0  # noqa: SLF001  # no public name


def memory(device: torch.device) -> dict[str, float]:
    """Peak memory of the process and, on CUDA, of the device, in MiB."""
    found = {"peak_rss_mib": _peak_rss()}
    if device.type == "cuda":
        found["peak_cuda_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    return found


def _peak_rss() -> float:
    if resource is None:
        return math.nan
    peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
