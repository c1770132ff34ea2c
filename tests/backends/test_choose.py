"""Choosing a backend by name."""

from __future__ import annotations

import pytest
from torch import nn

from automode.backends import choose
from automode.backends.choose import make_backend
from automode.backends.inline import InlineBackend
from automode.backends.stacked import SLOTS, StackedBackend
from automode.errors import UsageError
from automode.testing.scripted import ScriptedRunner

PLAIN = nn.Linear(3, 2)
NORMED = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_names_give_their_backends() -> None:
    assert isinstance(make_backend("inline", ScriptedRunner()), InlineBackend)
    stacked = make_backend("stacked", ScriptedRunner(), slots=3)
    assert isinstance(stacked, StackedBackend)
    assert stacked.slots == 3
    assert make_backend("stacked", ScriptedRunner()).slots == SLOTS


def test_auto_stacks_what_can_be_stacked() -> None:
    assert isinstance(make_backend("auto", ScriptedRunner(), model=PLAIN), StackedBackend)
    assert isinstance(make_backend("auto", ScriptedRunner(), model=NORMED), InlineBackend)
    assert isinstance(make_backend("auto", ScriptedRunner(), model=PLAIN, slots=1), InlineBackend)


def test_slots_are_as_many_as_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    size = choose.COPIES * 8 * 4  # eight float32 parameters
    for members, expected in ((0.5, 1), (5.5, 5), (1000.0, SLOTS)):
        memory = int(members * size / choose.MEMORY_SHARE)
        monkeypatch.setattr(choose, "_memory", lambda device, memory=memory: memory)
        assert choose.fitting_slots(PLAIN) == expected
    monkeypatch.setattr(choose, "_memory", lambda device: 10)
    assert isinstance(make_backend("auto", ScriptedRunner(), model=PLAIN), InlineBackend)


def test_a_system_that_does_not_tell_its_memory_gets_all_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(choose.os, "sysconf", raising=False)
    assert choose.fitting_slots(PLAIN) == SLOTS


@pytest.mark.parametrize(
    ("name", "slots", "said"),
    [
        ("stack", None, "no backend 'stack'; choose one of 'auto', 'inline', 'stacked'"),
        ("inline", 4, "one trial at a time, and slots is 4"),
    ],
)
def test_what_there_is_not_is_refused(name: str, slots: int | None, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make_backend(name, ScriptedRunner(), slots=slots)
