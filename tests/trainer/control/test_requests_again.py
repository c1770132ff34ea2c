"""What an earlier attempt of a run was asked from within its process is followed again, though it never was a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from automode.planner.events import Decided
from automode.session.inbox import post
from automode.trainer.requests_desk import RequestsDesk


class Silent:
    """A log that nothing is to be told."""

    def warning(self, *said: Any, **more: Any) -> None:
        raise AssertionError((said, more))


@pytest.mark.parametrize("ending", ["", "+card", "+approval"])
def test_an_orders_own_card_is_followed_again_without_a_file(ending: str, tmp_path: Path) -> None:
    (tmp_path / "session.db").touch()
    from_outside = post(tmp_path, {"n": 1})
    desk = RequestsDesk(tmp_path, Silent())
    asked = [
        Decided(request=f"{name}{ending}", verb="approve", actor="ann", card="c0ffee00", rev=1)
        for name in (from_outside, "call-00000018-2a60e45c")
    ]
    desk.again([(3, body) for body in asked])
    assert desk.take(2) == []
    assert desk.take(3) == asked
    desk.clear()
    assert bool(list((tmp_path / "inbox").glob("*.json"))) == bool(ending)
