"""For PyTorch Lightning: ``from automode.lightning import AutomodeCallback``. Importing this imports Lightning."""

from __future__ import annotations

from automode.trainer.lightning_callback import AutomodeCallback

__all__ = ["AutomodeCallback"]
