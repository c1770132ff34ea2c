"""Shared test settings: one thread a process, so that parallel test workers do not fight for the cores."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Set before torch is first imported: with one thread, sums have one order and a bit-identity test means what it says.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

# A shared machine stalls at random: time says nothing about a property. Every day the examples are the same, so that nobody's change
# fails for another's bug; `make nightly` draws new ones.
settings.register_profile(
    "explore", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True, derandomize=False
)
settings.register_profile("automode", settings.get_profile("explore"), derandomize=True, database=None)
settings.load_profile("automode")

# A shell that starts the suite in the background has it ignore these, and tests that send them would wait for nothing.
if threading.current_thread() is threading.main_thread():
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("SIGQUIT", "SIGHUP"):
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
            signal.signal(getattr(signal, name), signal.SIG_DFL)


WHOLE_RUNS = ("trainer/runs", "trainer/control", "trainer/watched", "backends/stacked")


@pytest.hookimpl(tryfirst=True)  # before the order is drawn
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave tests that repeat untraced, so that coverage, which doubles what a traced test takes, costs little.

    A line counts once, however often it runs. So a test that draws many examples is not traced, nor is one that takes long, nor the
    same function on other parameters, and of whole training runs every third function of a file is. Their fixtures are, of all.
    A line that nothing traced reaches is reported as missed, never the other way round. `make coverage` traces everything.
    """
    if os.environ.get("AUTOMODE_COVERAGE") == "all":
        return
    traced: dict[Path, set[object]] = {}
    for item in items:
        function = getattr(item, "function", None)
        seen = traced.setdefault(item.path, set())
        third = item.path.parent.as_posix().endswith(WHOLE_RUNS) and len(seen) % 3 != 0
        drawn = getattr(function, "is_hypothesis_test", False)
        if function in seen or third or drawn or item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.no_cover)
        seen.add(function)


def pytest_runtest_setup() -> None:
    """What a test draws without a seed of its own would depend on the tests before it, whose order is random."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(20261122)


@pytest.fixture(autouse=True)
def _torch_begins_at_one_seed() -> None:
    """Again where a fixture of several tests has been made for this one, or for one before it."""
    pytest_runtest_setup()
