"""Shared test settings: one thread a process, so that parallel test workers do not fight for the cores."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Set before torch is first imported: with one thread, sums have one order and a bit-identity test means what it says.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

# A shared machine stalls at random: time says nothing about a property.
settings.register_profile(
    "automode", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("automode")
