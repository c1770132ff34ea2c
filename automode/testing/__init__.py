"""Conformance suites for third parties: inherit one in your own tests, and pytest runs it against your implementation.

This room may look at every other room, and no room looks at it. :mod:`automode.testing.backends` needs no torch;
:mod:`automode.testing.training` trains small models.
"""

from __future__ import annotations

from automode.testing.backends import BackendConformance

__all__ = ["BackendConformance"]
