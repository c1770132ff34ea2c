"""Answers reach the run through its inbox, are judged by it, and come back as one readable line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from automode.cli.asking import answer_to
from automode.errors import AutomodeError
from automode.planner.card_text import from_yaml, to_yaml
from automode.planner.cards import CardState
from automode.presets import preset_text
from automode.session import Session
from automode.session.inbox import Inbox, post

OWN = """\
action: fork
because: I want to know.
selection: {kind: indices, ids: [3, 5, 8, 13]}
training_recipe: {variants: [{name: plain}, {name: gentle, lr_mul: 0.5}]}
budget_steps: 60
asha: {max_steps: 180}
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A card of a person's own, as a file."""
    file = tmp_path / "own.yaml"
    file.write_text(OWN, encoding="utf-8")
    return file


@pytest.fixture
def card(cli: Any, live: Any, own: Path) -> str:  # in place of the whole card that other files want
    """The id of a card that waits in a running session."""
    cli("submit", live.path, own, "--as", "alice")
    (made,) = live.state.cards
    return str(made)


def state(live: Any, card: str) -> str:
    with Session.open(live.path) as session:
        (row,) = [r for r in session.cards() if r.card_id == card]
    assert row.state == live.state.cards[card].state
    return row.state


def posted(live: Any) -> list[dict[str, Any]]:
    """Requests that lie in the inbox, oldest first."""
    return [json.loads(file.read_text()) for file in sorted((live.path / "inbox").glob("*.json"))]


def edited(live: Any, card: str, tmp_path: Path, old: str, new: str) -> Path:
    text = to_yaml(live.state.cards[card].card)
    assert text.count(old) == 1, text
    file = tmp_path / "edited.yaml"
    file.write_text(text.replace(old, new), encoding="utf-8")
    return file


# -------------------------------------------------------------------------------------------------------------- answers


def test_a_card_of_ones_own_is_submitted_and_proposed(cli: Any, live: Any, own: Path) -> None:
    out = cli("submit", live.path, own, "--as", "alice", "--note", "try").output
    (record,) = live.state.cards.values()
    assert out == f"card {record.card.id} is proposed\n"
    assert record.card.created_by == "alice"
    assert record.card.reason == "manual"
    assert record.card.because == "I want to know."


def test_a_card_can_be_submitted_on_standard_input(cli: Any, live: Any) -> None:
    cli("submit", live.path, "-", "--as", "alice", stdin=OWN)
    assert len(live.state.cards) == 1


def test_an_approval_names_its_actor_its_note_and_the_revision_that_was_read(
    cli: Any, live: Any, card: str
) -> None:
    out = cli("approve", live.path, card, "--rev", 1, "--note", "go", "--as", "bob").output
    assert out.startswith(f"card {card}, revision 1: fork for manual")
    assert f"card {card} (revision 1): proposed -> approved" in out
    (moved,) = [m for m in live.state.cards[card].history if m.after is CardState.APPROVED]
    assert (moved.actor, moved.why, moved.rev) == ("bob", "go", 1)
    out = cli("approve", live.path, card, "--as", "bob", code=1).output
    assert f"cannot approve card {card}: it is running" in out


def test_a_rejection_is_final(cli: Any, live: Any, card: str) -> None:
    cli("reject", live.path, card, "--note", "too dear", "--as", "bob")
    assert state(live, card) == "refused"
    assert "already" in cli("reject", live.path, card, "--as", "bob").output
    out = cli("approve", live.path, card, "--as", "bob", code=1).output
    assert out == f"Error: cannot approve card {card}: it is refused, and that is final\n"


def test_a_card_is_sent_back_with_a_note_and_not_without(cli: Any, live: Any, card: str) -> None:
    assert "--note" in cli("revise", live.path, card, "--as", "bob", code=1).output
    assert "--note is empty" in cli("revise", live.path, card, "--note", " ", "--as", "bob", code=1).output
    cli("revise", live.path, card, "--note", "fewer variants", "--as", "bob")
    assert state(live, card) == "revise"
    assert live.state.cards[card].history[-1].why == "fewer variants"


def test_an_approved_card_can_be_cancelled(cli: Any, live: Any, card: str) -> None:
    cli("approve", live.path, card, "--as", "bob")
    cli("cancel", live.path, card, "--as", "bob", "--note", "enough")
    assert state(live, card) == "refused"


def test_the_mode_is_switched(cli: Any, live: Any) -> None:
    assert cli("mode", live.path, "act", "--as", "bob").output == "mode: propose -> act\n"
    assert live.state.mode == "act"
    assert "nothing left to do" in cli("mode", live.path, "act", "--as", "bob").output
    assert "'dance' is not one of" in cli("mode", live.path, "dance", code=1).output


def test_only_an_adopted_card_can_be_rolled_back(cli: Any, live: Any, card: str) -> None:
    out = cli("rollback", live.path, card, "--as", "bob", code=1).output
    assert f"cannot rollback card {card}: it is proposed" in out
    assert posted(live) == []


def test_an_adopted_cards_rollback_is_asked_for(cli: Any, told: Any) -> None:
    card = from_yaml(preset_text("cards/loss_plateau"))
    told.propose(card)
    for before, after in (
        ("proposed", "approved"),
        ("approved", "running"),
        ("running", "accepted"),
        ("accepted", "adopted"),
    ):
        told.move(card, before, after)
    out = cli("rollback", told.path, card.id, "--as", "bob", "--wait", 0).output
    assert "is posted" in out
    (request,) = posted(told)
    assert (request["verb"], request["card"], request["actor"]) == ("rollback", card.id, "bob")


def test_a_running_card_is_cancelled_and_not_rejected(cli: Any, told: Any) -> None:
    card = from_yaml(preset_text("cards/loss_plateau"))
    told.propose(card)
    told.move(card, "proposed", "approved")
    told.move(card, "approved", "running")
    assert "automode cancel stops it" in cli("reject", told.path, card.id, "--as", "bob", code=1).output
    cli("cancel", told.path, card.id, "--as", "bob", "--wait", 0)
    assert [r["verb"] for r in posted(told)] == ["cancel"]


# ------------------------------------------------------------------------------------------------------------ conflicts


def test_an_answer_to_an_older_revision_is_a_conflict(cli: Any, live: Any, card: str, tmp_path: Path) -> None:
    file = edited(live, card, tmp_path, "budget_steps: 60 ", "budget_steps: 40 ")
    cli("edit", live.path, card, "--file", file, "--as", "bob")
    out = cli("approve", live.path, card, "--rev", 1, "--as", "carol", code=1).output
    assert f"card {card} is at revision 2, and you have read 1" in out
    assert state(live, card) == "proposed"


def test_the_runs_own_judgement_is_told(cli: Any, live: Any, card: str) -> None:
    cli("mode", live.path, "observe", "--as", "bob")
    out = cli("approve", live.path, card, "--as", "bob", code=1).output
    assert "Error: refused by the run: the mode is observe, in which no card runs" in out


def test_a_run_that_has_ended_is_asked_nothing(cli: Any, live: Any, card: str) -> None:
    live.end()
    out = cli("mode", live.path, "act", "--as", "bob", code=1).output
    assert "the run ended at step 100 (all steps done); nobody answers requests any more" in out
    assert posted(live) == []


def test_a_request_that_nobody_takes_up_yet_stays_in_the_inbox(cli: Any, told: Any) -> None:
    out = cli("mode", told.path, "act", "--as", "bob", "--note", "now", "--wait", 0.1).output
    assert "is posted; the run takes it up between two steps" in out
    (request,) = posted(told)
    assert request == {
        "verb": "mode",
        "card": None,
        "rev": None,
        "actor": "bob",
        "note": "now",
        "body": None,
        "mode": "act",
    }


@pytest.mark.parametrize("name", ["", "  ", "planner"])
def test_nobody_and_the_planner_are_no_names_for_a_person(cli: Any, told: Any, name: str) -> None:
    assert "give your own name" in cli("mode", told.path, "act", "--as", name, code=1).output


def test_a_person_without_a_login_name_is_asked_for_one(
    cli: Any, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody() -> str:
        raise OSError("no name")

    monkeypatch.setattr("getpass.getuser", nobody)
    assert "give --as NAME" in cli("mode", told.path, "act", code=1).output


# ----------------------------------------------------------------------------------------------------------- submissions


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("ids:", "idz:", "line 3, column 28: selection.idz: unknown key, did you mean `ids`?"),
        ("action: fork", "action: spoon", "line 1, column 9: action: expected one of fork, merge, adjust, stop, came the text 'spoon'"),
        ("budget_steps: 60", "budget_steps: 600", "must lie between 1 and asha.max_steps (180)"),
        ("budget_steps: 60\n", "", "budget_steps: is missing"),
    ],
)  # fmt: skip
def test_a_wrong_card_is_refused_with_its_line_before_it_is_posted(
    cli: Any, live: Any, own: Path, old: str, new: str, problem: str
) -> None:
    own.write_text(OWN.replace(old, new), encoding="utf-8")
    out = cli("submit", live.path, own, "--as", "alice", code=1).output
    assert out.startswith(f"Error: {own}: this plan card cannot be taken")
    assert problem in out
    assert posted(live) == []


def test_a_card_that_the_run_cannot_carry_out_is_refused_with_its_reason(
    cli: Any, live: Any, own: Path
) -> None:
    own.write_text(OWN.replace("lr_mul: 0.5", "batch_mul: 64.0"), encoding="utf-8")
    out = cli("submit", live.path, own, "--as", "alice", code=1).output
    assert "refused by the run" in out
    assert "one of its steps costs 64 ordinary ones" in out


@pytest.mark.parametrize(
    ("content", "told_of"),
    [(b"\xff\xfe", "is no UTF-8 text"), (b"#" * 4_000_001, "4,000,000 bytes"), (None, "there is no file")],
)
def test_a_file_that_is_no_text_is_refused(
    cli: Any, live: Any, tmp_path: Path, content: bytes | None, told_of: str
) -> None:
    file = tmp_path / "file.yaml"
    if content is not None:
        file.write_bytes(content)
    assert told_of in cli("submit", live.path, file, "--as", "a", code=1).output
    assert "cannot be read" in cli("submit", live.path, tmp_path, "--as", "a", code=1).output


# ----------------------------------------------------------------------------------------------------------------- edits


def test_an_edit_is_shown_posted_and_counted_as_a_revision(
    cli: Any, live: Any, card: str, tmp_path: Path
) -> None:
    file = edited(live, card, tmp_path, "budget_steps: 60 ", "budget_steps: 40 ")
    out = cli("edit", live.path, card, "--file", file, "--as", "bob", "--note", "shorter").output
    assert "  budget_steps: 60 -> 40\n" in out
    assert f"card {card} (revision 2): proposed -> proposed" in out
    after = live.state.cards[card].card
    assert (after.rev, after.budget_steps) == (2, 40)
    with Session.open(live.path) as session:
        assert [r.rev for r in session.revisions(card)] == [1, 2]


def test_an_edit_of_an_approved_card_asks_for_approval_again(
    cli: Any, live: Any, card: str, own: Path, tmp_path: Path
) -> None:
    # The first card runs as soon as it is approved, and the second one waits for its turn.
    cli("submit", live.path, own, "--as", "alice")
    second = next(c for c in live.state.cards if c != card)
    for each in (card, second):
        cli("approve", live.path, each, "--as", "bob")
    assert state(live, second) == "approved"
    file = edited(live, second, tmp_path, "budget_steps: 60 ", "budget_steps: 40 ")
    out = cli("edit", live.path, second, "--file", file, "--as", "bob").output
    assert f"card {second} (revision 2): approved -> proposed" in out
    assert state(live, second) == "proposed"
    cli("cards", live.path, code=2)


def test_two_people_who_edit_one_card_get_a_clear_conflict(
    cli: Any, live: Any, card: str, tmp_path: Path
) -> None:
    first = edited(live, card, tmp_path, "budget_steps: 60 ", "budget_steps: 40 ").rename(tmp_path / "a.yaml")
    second = edited(live, card, tmp_path, "budget_steps: 60 ", "budget_steps: 50 ")
    cli("edit", live.path, card, "--file", first, "--as", "bob")
    out = cli("edit", live.path, card, "--file", second, "--as", "carol", code=1).output
    assert f"this edit is of revision 1, and card {card} is at revision 2" in out
    assert live.state.cards[card].card.budget_steps == 40


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("reason: manual", "reason: loss_plateau", "an edit cannot change reason"),
        ("step: 100\ncreated_by: alice", "step: 100\ncreated_by: bob", "an edit cannot change created_by"),
        ("lr_mul: 0.5", "lr_mul: fast", "training_recipe.variants[1].lr_mul: expected a number above 0"),
    ],
)
def test_an_edit_into_nonsense_is_refused_and_nothing_is_posted(
    cli: Any, live: Any, card: str, tmp_path: Path, old: str, new: str, problem: str
) -> None:
    file = edited(live, card, tmp_path, old, new)
    assert problem in cli("edit", live.path, card, "--file", file, "--as", "bob", code=1).output
    assert posted(live) == []


def test_an_edit_of_the_cost_alone_is_none_for_the_run_works_it_out(
    cli: Any, live: Any, card: str, tmp_path: Path
) -> None:
    text = to_yaml(live.state.cards[card].card)
    file = tmp_path / "edited.yaml"
    file.write_text("\n".join("cost: {sample_passes: 1, share_of_remaining: 0}" if x.startswith("cost:") else x for x in text.split("\n")))  # fmt: skip
    assert cli("edit", live.path, card, "--file", file, "--as", "bob").output == "nothing changed\n"


@pytest.fixture
def editor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An $EDITOR that replaces one text by another, as often as it is opened with one pair each."""

    def use(*pairs: tuple[str, str]) -> None:
        script, turns = tmp_path / "editor.py", tmp_path / "turns.json"
        turns.write_text(json.dumps(pairs))
        script.write_text(
            "import json, pathlib, sys, os, time\n"
            f"turns = pathlib.Path({str(turns)!r}); todo = json.loads(turns.read_text())\n"
            "file = pathlib.Path(sys.argv[-1]); text = file.read_text()\n"
            "if todo:\n"
            "    old, new = todo.pop(0); assert text.count(old) == 1, (old, text)\n"
            "    file.write_text(text.replace(old, new)); turns.write_text(json.dumps(todo))\n"
            "    os.utime(file, (time.time() + 9, time.time() + 9))\n"
        )
        monkeypatch.setenv("EDITOR", f"{sys.executable} {script}")
        monkeypatch.delenv("VISUAL", raising=False)

    return use


def test_a_card_is_edited_in_the_editor(cli: Any, live: Any, card: str, editor: Any) -> None:
    editor(("budget_steps: 60 ", "budget_steps: 40 "))
    assert "budget_steps: 60 -> 40" in cli("edit", live.path, card, "--as", "bob").output
    assert live.state.cards[card].card.budget_steps == 40


def test_an_editor_that_saves_nothing_changes_nothing(cli: Any, live: Any, card: str, editor: Any) -> None:
    editor()
    assert cli("edit", live.path, card, "--as", "bob").output == "nothing changed\n"


def test_a_mistake_in_the_editor_is_told_and_can_be_mended(
    cli: Any, live: Any, card: str, editor: Any
) -> None:
    editor(("budget_steps: 60 ", "budget_stepz: 40 "), ("budget_stepz: 40 ", "budget_steps: 40 "))
    out = cli("edit", live.path, card, "--as", "bob", stdin="y\n").output
    assert "budget_stepz: unknown key, did you mean `budget_steps`?" in out
    assert live.state.cards[card].card.budget_steps == 40


def test_a_mistake_in_the_editor_can_be_dropped(cli: Any, live: Any, card: str, editor: Any) -> None:
    editor(("budget_steps: 60 ", "budget_stepz: 40 "))
    cli("edit", live.path, card, "--as", "bob", stdin="n\n", code=1)
    assert live.state.cards[card].card.rev == 1


def test_everything_that_was_answered_replays(cli: Any, live: Any, card: str, tmp_path: Path) -> None:
    file = edited(live, card, tmp_path, "budget_steps: 60 ", "budget_steps: 40 ")
    cli("edit", live.path, card, "--file", file, "--as", "bob")
    cli("approve", live.path, card, "--as", "bob")
    cli("cancel", live.path, card, "--as", "bob")
    cli("mode", live.path, "observe", "--as", "bob")
    live.rows(50)
    live.end()
    assert cli("replay", live.path).output.endswith("0 differences\n")


def test_a_request_that_the_run_cannot_read_is_told_at_once(told: Any) -> None:
    posted = post(told.path, {"verb": "mode"})
    with Session.open(told.path) as session:
        assert answer_to(session, posted, 0) is None
        Inbox(told.path).refuse(posted, "it has no mode")
        with pytest.raises(AutomodeError, match="refused by the run: it has no mode"):
            answer_to(session, posted, 0)


@pytest.mark.parametrize("wait", ["nan", "-1", "soon"])
def test_a_time_to_wait_that_is_none_is_refused(cli: Any, told: Any, wait: str) -> None:
    assert "wait" in cli("mode", told.path, "act", "--as", "bob", "--wait", wait, code=1).output
    assert "wait" in cli("ctl", told.path, "pause", "--as", "bob", "--wait", wait, code=1).output
    assert posted(told) == []
