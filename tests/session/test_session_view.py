"""A session shows which run it is and what became of its cards, and escapes what people and data sets named."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from automode.session import CardRow, Session, SessionStore

BAD = "<script>alert(1)</script>"


@pytest.fixture
def shown(tmp_path: Path, record: Any) -> Session:
    """A session whose every name is hostile."""
    with SessionStore.create(
        tmp_path / "run", header={"project": BAD, "run_name": BAD, "mode": "act"}
    ) as store:
        store.write(
            [
                record(1, kind="card_proposed", role="fact", body={"card": {"id": BAD, "reason": BAD}}),
                record(2, kind="verdict_given", role="fact", body={"card": BAD, "why": f"because {BAD}"}),
                record(3, kind="run_ended", role="input", body={"step": 7, "why": BAD}),
            ],
            cards=[CardRow(card_id=BAD, rev=2, state="inconclusive", body="text", seq=1)],
            durable=False,
        )
    return Session.open(tmp_path / "run")


def test_a_session_shows_its_run_and_its_cards(shown: Session) -> None:
    with shown:
        text = shown._repr_html_()
    assert "session run" in text
    assert "3 records" in text
    assert "revision 2: inconclusive (because" in text
    assert "at step 7" in text


def test_what_was_named_is_no_markup(shown: Session) -> None:
    with shown:
        assert "<script" not in shown._repr_html_()
        out = io.StringIO()
        pytest.importorskip("rich.console").Console(width=160, color_system=None, file=out).print(shown)
    assert BAD in out.getvalue()
    assert "closed" in shown._repr_html_()


def test_a_session_without_cards_says_so(tmp_path: Path) -> None:
    SessionStore.create(tmp_path / "run", header={}).close()
    with Session.open(tmp_path / "run") as session:
        assert ">none<" in session._repr_html_()


def test_a_session_shows_how_trials_were_trained_and_only_the_latest_of_many_notes(
    tmp_path: Path, record: Any
) -> None:
    def said(seq: int) -> Any:
        fields = {"kind": "trials_noted", "card": "c", "trials": [seq], "resource": 8}
        body = fields | {"what": "trained alone", "why": f"<b>{seq}</b>"}
        return record(seq, kind="trials_noted", role="input", body=body)

    with SessionStore.create(tmp_path / "run", header={"project": "p", "run_name": "r"}) as store:
        row = CardRow(card_id="c", rev=1, state="running", body="text", seq=1)
        store.write([said(seq) for seq in range(1, 7)], cards=[row], durable=False)
    with Session.open(tmp_path / "run") as session:
        text = session._repr_html_()
    assert "trial 6 to 8: trained alone: &lt;b&gt;6&lt;/b&gt;" in text
    assert "trial 3 to 8" in text
    assert "trial 2 to 8" not in text
