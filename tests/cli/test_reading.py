"""What the reading commands print of a session, and how they end."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from automode.cli.sessions import newest
from automode.planner.card_text import from_yaml, to_yaml
from automode.planner.cards import PlanCard
from automode.planner.events import ReadingChanged, TrialDecided, TrialsNoted
from automode.planner.recipes import Variant
from automode.session import SessionStore


def other(card: PlanCard, card_id: str) -> PlanCard:
    return card.model_copy(update={"id": card_id})


# --------------------------------------------------------------------------------------------------------------- cards


def test_no_cards_is_said_and_is_fine(cli: Any, told: Any) -> None:
    first, second = cli("cards", told.path).output.splitlines()
    assert first == "no cards"
    command = second.partition(": automode ")[2]
    assert command == f"log {told.path} --kind rule_evaluated"


def test_cards_stand_in_a_table_and_a_waiting_one_ends_in_code_2(cli: Any, told: Any, card: PlanCard) -> None:
    told.propose(card)
    told.propose(other(card, "d0000001"))
    told.move(card, "proposed", "refused")
    lines = cli("cards", told.path, code=2).output.splitlines()
    assert lines[0].split() == ["CARD", "REV", "STATE", "REASON", "STEP", "COST", "AGE"]
    assert lines[1].split()[:7] == ["c7f3a1e0", "1", "refused", "loss_plateau", "100", "31,000", "(11.0%)"]
    assert lines[2].split()[:3] == ["d0000001", "1", "proposed"]
    assert f"1 waiting: automode show {told.path} d0000001" in lines[-1]


@pytest.mark.parametrize("state", ["approved", "refused", "expired", "stale"])
def test_cards_that_wait_for_nobody_end_in_code_0(cli: Any, told: Any, card: PlanCard, state: str) -> None:
    told.propose(card)
    told.move(card, "proposed", state)
    assert state in cli("cards", told.path).output


def test_a_card_sent_back_waits_for_a_person_too(cli: Any, told: Any, card: PlanCard) -> None:
    told.propose(card)
    told.move(card, "proposed", "revise")
    cli("cards", told.path, code=2)


# ---------------------------------------------------------------------------------------------------------------- show


def test_show_prints_the_card_as_yaml_and_every_move_with_actor_revision_reason_and_difference(
    cli: Any, told: Any, card: PlanCard
) -> None:
    edited = card.revised(budget_steps=40)
    told.propose(card)
    told.move(
        edited, "proposed", "proposed", why="longer", edited=edited, difference={"budget_steps": (20, 40)}
    )
    told.move(edited, "proposed", "approved", actor="bob")
    out = cli("show", told.path, card.id).output
    assert out.startswith(to_yaml(edited))
    assert "State: approved (revision 2)" in out
    assert "proposed by planner" in out
    assert "proposed -> proposed by alice, revision 2: longer" in out
    assert "budget_steps: 20 -> 40" in out
    assert "proposed -> approved by bob, revision 2: looks fine" in out


def test_show_prints_an_older_revision_when_asked(cli: Any, told: Any, card: PlanCard) -> None:
    edited = card.revised(budget_steps=40)
    told.propose(card)
    told.move(edited, "proposed", "proposed", edited=edited)
    assert from_yaml(cli("show", told.path, card.id, "--rev", 1).output.split("\n\n")[0]) == card
    assert "no revision 3; it has 1, 2" in cli("show", told.path, card.id, "--rev", 3, code=1).output


def test_the_beginning_of_an_id_is_enough_where_only_one_card_fits(
    cli: Any, told: Any, card: PlanCard
) -> None:
    told.propose(card)
    told.propose(other(card, "c7000000"))
    assert "id: c7f3a1e0" in cli("show", told.path, "c7f").output
    assert "2 cards begin with 'c7': c7f3a1e0, c7000000" in cli("show", told.path, "c7", code=1).output


def test_an_unknown_card_is_refused_with_the_nearest(cli: Any, told: Any, card: PlanCard) -> None:
    assert "this session has none" in cli("show", told.path, "c7f3a1e1", code=1).output
    told.propose(card)
    assert "did you mean c7f3a1e0?" in cli("show", told.path, "c7f3a1e1", code=1).output
    assert "there is no card ''" in cli("show", told.path, "", code=1).output


def test_what_a_person_typed_cannot_play_with_the_terminal(cli: Any, told: Any, card: PlanCard) -> None:
    nasty = "\x1b[2J\x1b]0;owned\x07 \u202e"
    card = card.model_copy(update={"because": nasty, "created_by": nasty, "session": nasty})
    told.propose(card)
    told.move(card, "proposed", "refused", actor=nasty, why=nasty)
    for command in ("show", "story"):
        out = cli(command, told.path, card.id).output
        assert all(c.isprintable() or c == "\n" for c in out), command
    assert all(c.isprintable() or c == "\n" for c in cli("log", told.path).output)


# ----------------------------------------------------------------------------------------------- story, log, lineage, trials


def test_a_story_tells_what_led_to_a_card_and_what_became_of_it(cli: Any, told: Any, card: PlanCard) -> None:
    told.propose(card)
    told.move(card, "proposed", "refused", why="too dear")
    out = cli("story", told.path, "c7f").output
    assert "The story of card c7f3a1e0" in out
    assert "proposed -> refused by alice: too dear" in out


def test_the_log_is_printed_in_order_filtered_and_as_json(cli: Any, told: Any, card: PlanCard) -> None:
    told.tell(ReadingChanged(step=3, name="loss_z", state="high", value=float("nan")))
    told.propose(card)
    told.move(card, "proposed", "refused", why="too dear")
    lines = cli("log", told.path).output.splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", "3", "4"]
    assert "c7f3a1e0 fork loss_plateau: The loss is flat." in lines[2]
    assert lines[3].endswith("after refused, actor alice: too dear")
    assert len(cli("log", told.path, "--kind", "card_moved").output.splitlines()) == 1
    assert len(cli("log", told.path, "--role", "input").output.splitlines()) == 1
    objects = [json.loads(line) for line in cli("log", told.path, "--json").output.splitlines()]
    assert [o["seq"] for o in objects] == [1, 2, 3, 4]
    assert objects[1]["body"]["value"] == "NaN"
    assert (
        "no events of kind card_moves; there are: card_moved, card_"
        in cli("log", told.path, "--kind", "card_moves").output
    )
    assert objects[2]["body"]["card"]["id"] == "c7f3a1e0"


def test_a_lineage_is_a_tree_with_every_parent_named(cli: Any, told: Any) -> None:
    assert cli("lineage", told.path).output == "no lineage yet\n"
    told.node("trunk:0", role="trunk", checkpoint="sha256:" + "ab" * 32)
    told.node("s0", "trunk:0", role="specialist", card="c7f3a1e0", step=100)
    told.node("s1", "trunk:0", role="specialist", card="c7f3a1e0", step=100)
    told.node("m0", "s0", "s1", role="merge", card="c7f3a1e0", step=160, verdict="accepted")
    told.node("trunk:1", "m0", role="trunk", step=161)
    assert cli("lineage", told.path).output.splitlines() == [
        "trunk:0  (trunk at step 0; sha256:abababab)",
        "|-- s0  (specialist at step 100; card c7f3a1e0)",
        "|   `-- m0  (merge at step 160; card c7f3a1e0; with s1; accepted)",
        "|       `-- trunk:1  (trunk at step 161)",
        "`-- s1  (specialist at step 100; card c7f3a1e0)",
    ]


def test_a_lineage_of_a_thousand_generations_is_drawn(cli: Any, told: Any) -> None:
    told.node("n0", role="trunk")
    for i in range(1, 1001):
        told.node(f"n{i}", f"n{i - 1}", role="trunk")
    assert len(cli("lineage", told.path).output.splitlines()) == 1001


def test_trials_show_the_ladder_who_was_promoted_and_why(cli: Any, told: Any, card: PlanCard) -> None:
    assert cli("trials", told.path).output == "no trials\n"
    told.propose(card)
    plain, gentle = Variant(name="plain"), Variant(name="gentle", lr_mul=0.5)
    told.trial(card.id, 0, plain, 20, 0.5, decision="paused", rank=2, why="second of two")
    told.trial(card.id, 1, gentle, 20, 0.75, decision="promoted", rank=1, why="first of two")
    told.trial(card.id, 1, gentle, 60, float("nan"), decision="diverged", why="not finite")
    lines = cli("trials", told.path).output.splitlines()
    assert lines[0] == "card c7f3a1e0 (loss_plateau)"
    assert lines[1].split() == ["TRIAL", "VARIANT", "RUNG", "VALUE", "WEIGHTS", "DECISION", "RANK", "WHY"]
    assert [line.split(None, 7) for line in lines[2:]] == [
        ["0", "plain", "20", "0.5000", "ema3", "paused", "2", "second of two"],
        ["1", "gentle", "20", "0.7500", "ema3", "promoted", "1", "first of two"],
        ["1", "gentle", "60", "nan", "ema3", "diverged", "-", "not finite"],
    ]


def test_a_trial_has_its_variants_name_from_its_first_decision_on(
    cli: Any, told: Any, card: PlanCard
) -> None:
    told.propose(card)
    told.tell(TrialDecided(card=card.id, trial=0, resource=20, decision="started", why="a free slot"))
    told.trial(card.id, 0, Variant(name="plain"), 20, 0.5, decision="paused", rank=2, why="second of two")
    lines = cli("trials", told.path).output.splitlines()
    assert [line.split()[1:6:4] for line in lines[2:]] == [["plain", "started"], ["plain", "paused"]]


def test_what_was_said_of_trials_stands_under_the_card_and_under_its_ladder(
    cli: Any, told: Any, card: PlanCard
) -> None:
    told.propose(card)
    told.trial(card.id, 0, Variant(name="plain"), 20, 0.5, decision="paused", rank=2, why="second of two")
    assert "How its trials were trained" not in cli("show", told.path, card.id).output
    fields = {"resource": 20, "what": "trained one after another"}
    told.tell(TrialsNoted(card=card.id, trials=(0, 2), why="no \x1b[2Jother", **fields), role="input")
    told.tell(TrialsNoted(card="d0000001", trials=(1,), why="another card", **fields), role="input")
    said = "  trials 0, 2 to 20: trained one after another: no \\u{1b}[2Jother"
    assert cli("show", told.path, card.id).output.splitlines()[-2:] == ["How its trials were trained:", said]
    assert cli("trials", told.path).output.splitlines()[-1] == said


# -------------------------------------------------------------------------------------------------------------- replay


def test_a_faithful_session_replays_with_zero_differences(cli: Any, live: Any) -> None:
    live.end()
    out = cli("replay", live.path).output
    assert "100 observations" in out
    assert "observations/s" in out
    assert out.endswith("\n0 differences\n")


def test_a_decision_that_does_not_replay_ends_in_code_1_and_is_told(
    cli: Any, told: Any, card: PlanCard
) -> None:
    told.propose(card)
    out = cli("replay", told.path, code=1).output
    assert "the first:" in out
    assert "event 2" in out
    assert "The story of card c7f3a1e0" in out


# ------------------------------------------------------------------------------------------------------ which session


def test_last_means_the_session_that_was_written_last(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "there is no session under automode-runs" in cli("cards", "last", code=1).output
    for age, name in ((300, "p/old"), (100, "q/new"), (200, "direct")):
        folder = tmp_path / "automode-runs" / name
        SessionStore.create(folder, header={"name": name}).close()
        os.utime(folder / "session.db", (1e9 - age, 1e9 - age))
    assert newest(Path("automode-runs")) == Path("automode-runs/q/new")
    assert cli("cards", "last").output.startswith("no cards\n")
    with SessionStore.open(tmp_path / "automode-runs" / "p" / "old"):
        # What a run has just written stands beside the database first.
        os.utime(tmp_path / "automode-runs" / "p" / "old" / "session.db-wal", (2e9, 2e9))
        assert newest(Path("automode-runs")) == Path("automode-runs/p/old")


@pytest.mark.parametrize(
    "command", ["cards", "show", "story", "log", "lineage", "trials", "replay", "approve", "mode"]
)
def test_a_folder_that_is_no_session_is_one_message(cli: Any, tmp_path: Path, command: str) -> None:
    more = {"show": ["c7"], "story": ["c7"], "approve": ["c7"], "mode": ["act"]}.get(command, [])
    out = cli(command, tmp_path, *more, code=1).output
    assert out.startswith("Error: ")
    assert "is no session" in out
    assert len(out.splitlines()) == 1


def test_a_damaged_database_is_one_message(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "session.db").write_bytes(b"SQLite format 3\x00" + b"\xff" * 4096)
    out = cli("cards", tmp_path, code=1).output
    assert out.startswith("Error: ")
    assert "Traceback" not in out
