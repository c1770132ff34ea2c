"""Linear algebra on one thread, so that sums and what follows from them do not depend on the machine's load."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any

from threadpoolctl import ThreadpoolController


@functools.cache
def _controller() -> ThreadpoolController:
    """Libraries are looked for once: that goes through every file that the process has mapped, for 4 to 16 ms."""
    return ThreadpoolController()


def one_thread() -> AbstractContextManager[Any]:
    """Bound the threads of the libraries that were loaded when this was first called; numpy's and scikit-learn's must have been."""
    bound: AbstractContextManager[Any] = _controller().limit(limits=1)
    return bound
