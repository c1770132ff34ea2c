"""Sessions recorded once replay to the same decisions: whoever changes a decision changes ``PLANNER_VERSION`` and records anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from automode.planner.policy import PLANNER_VERSION
from automode.session import Session
from automode.session.archive import import_session
from automode.session.replaying import replay

HERE = Path(__file__).parent
SEEN = {  # what each recording holds, so that none is replaced by a run in which nothing happens
    "wrong_labels": {"scanned", "adopted", "verdict_given"},
    "rate_too_low": {"adopted", "verdict_given"},
    "rate_too_high": {"verdict_given"},
    "nan_batches": {"safeguarded"},
    "watched": {"card_proposed"},
}
SAID = (
    "see tests/golden/record.py; if the change of decisions is meant, raise PLANNER_VERSION and record anew"
)


@pytest.mark.parametrize("name", sorted(SEEN))
def test_a_recorded_session_is_decided_again_as_it_was(name: str, tmp_path: Path) -> None:
    folder = import_session(HERE / f"{name}.zip", tmp_path / name)
    with Session.open(folder) as session:
        session.verify()
        kinds = {record.kind for record in session.events()}
        assert kinds >= SEEN[name], kinds
        (began,) = session.events(kind="session_started")
        assert began.body["planner_version"] == PLANNER_VERSION, (
            f"{name} was decided by another version; {SAID}"
        )
        report = replay(session)
    assert report.decisions > 0
    assert report.differences == 0, f"{report.first}\n{SAID}"


def test_every_recording_is_named_and_none_tells_of_the_machine(tmp_path: Path) -> None:
    assert {file.stem for file in HERE.glob("*.zip")} == set(SEEN)
    for name in SEEN:
        with Session.open(import_session(HERE / f"{name}.zip", tmp_path / name)) as session:
            assert session.header["started"] is None
            assert session.header["command"] == []
