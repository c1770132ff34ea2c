"""``plan`` shows and saves what waits; ``apply`` lets exactly that run, and refuses it as soon as it is no longer that."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from automode.cli import planning
from automode.planner.card_text import from_yaml, to_yaml
from automode.planner.cards import CardState, PlanCard
from automode.planner.recipes import Base

OWN = """\
action: fork
because: I want to know.
selection: {kind: indices, ids: [3, 5, 8, 13]}
training_recipe: {variants: [{name: plain}, {name: gentle, lr_mul: 0.5}]}
budget_steps: 60
asha: {max_steps: 180}
"""


@pytest.fixture
def waiting(cli: Any, live: Any) -> str:
    """The id of a card that waits in a running session."""
    cli("submit", live.path, "-", "--as", "alice", stdin=OWN)
    (made,) = live.state.cards
    return str(made)


@pytest.fixture
def saved(cli: Any, live: Any, waiting: str, tmp_path: Path) -> Path:
    """That card, saved."""
    file = tmp_path / "card.yaml"
    cli("plan", live.path, "--out", file, code=2)
    return file


def state(live: Any, card: str) -> CardState:
    found: CardState = live.state.cards[card].state
    return found


def posted(path: Path) -> list[Path]:
    return sorted((path / "inbox").glob("*.json"))


def rewrite(file: Path, old: str, new: str) -> Path:
    text = file.read_text()
    assert text.count(old) == 1, text
    file.write_text(text.replace(old, new))
    return file


# ----------------------------------------------------------------------------------------------------------------- plan


def test_where_no_card_waits_plan_says_so_and_ends_with_0(cli: Any, live: Any) -> None:
    assert cli("plan", live.path).output == "nothing to decide: no card waits\n"


def test_a_waiting_card_is_shown_and_the_exit_code_is_2(cli: Any, live: Any, waiting: str) -> None:
    out = cli("plan", live.path, code=2).output
    assert out.startswith(f"card {waiting}, revision 1: fork for manual")
    assert f"1 to decide: automode plan {live.path} {waiting} --out card.yaml" in out
    assert "note:" not in out
    assert cli("plan", live.path, waiting[:4], code=2).output == out


def test_a_saved_card_is_the_card_itself(cli: Any, live: Any, waiting: str, tmp_path: Path) -> None:
    file = tmp_path / "card.yaml"
    out = cli("plan", live.path, waiting, "--out", file, code=2).output
    assert (
        f"saved card {waiting}, revision 1, to {file}; let it run: automode apply {file} {live.path}" in out
    )
    assert from_yaml(file.read_text()) == live.state.cards[waiting].card


def test_which_of_several_cards_to_save_has_to_be_said(
    cli: Any, live: Any, waiting: str, tmp_path: Path
) -> None:
    cli("submit", live.path, "-", "--as", "alice", stdin=OWN.replace("60", "50"))
    out = cli("plan", live.path, "--out", tmp_path / "card.yaml", code=1).output
    assert "Error: 2 cards wait (" in out
    assert not (tmp_path / "card.yaml").exists()
    cli("plan", live.path, waiting, "--out", tmp_path / "card.yaml", code=2)


def test_a_card_that_does_not_wait_is_not_saved(cli: Any, live: Any, waiting: str, tmp_path: Path) -> None:
    cli("reject", live.path, waiting, "--as", "bob")
    assert f"card {waiting} does not wait: it is refused" in cli("plan", live.path, waiting).output
    out = cli("plan", live.path, waiting, "--out", tmp_path / "card.yaml", code=1).output
    assert "nothing was saved" in out
    assert not (tmp_path / "card.yaml").exists()


def test_plan_says_what_stands_in_the_way(cli: Any, live: Any, waiting: str) -> None:
    cli("revise", live.path, waiting, "--note", "fewer variants", "--as", "bob")
    out = cli("plan", live.path, code=2).output
    assert "sent back bob: fewer variants; edit it before it can run" in out
    cli("mode", live.path, "observe", "--as", "bob")
    out = cli("plan", live.path, code=2).output
    assert f"note: the mode is observe, in which no card runs: automode mode {live.path} propose" in out
    live.store.close()
    assert "note: no run is training this session now" in cli("plan", live.path, code=2).output


def test_plan_of_no_session_is_an_error(cli: Any, tmp_path: Path) -> None:
    assert "is no session" in cli("plan", tmp_path, code=1).output


# ---------------------------------------------------------------------------------------------------------------- apply


def test_a_saved_card_is_approved_as_it_is(cli: Any, live: Any, waiting: str, saved: Path) -> None:
    out = cli("apply", saved, live.path, "--yes", "--as", "bob", "--note", "go").output
    assert "as recorded: revision 1, no changes" in out
    assert f"card {waiting} (revision 1): proposed -> approved" in out
    assert state(live, waiting) is CardState.RUNNING
    (moved,) = [m for m in live.state.cards[waiting].history if m.after is CardState.APPROVED]
    assert (moved.actor, moved.why, moved.rev) == ("bob", "go", 1)
    again = cli("apply", saved, live.path, "-y", "--as", "bob").output
    assert f"card {waiting} is running already, as it was saved" in again
    assert posted(live.path) == []


def test_an_edited_card_is_edited_and_approved(cli: Any, live: Any, waiting: str, saved: Path) -> None:
    rewrite(saved, "lr_mul: 0.5", "lr_mul: 0.25")
    out = cli("apply", saved, live.path, "--auto-approve", "--as", "bob").output
    assert "changes to revision 1, which make revision 2:" in out
    assert "  training_recipe.variants[1].lr_mul: 0.5 -> 0.25\n" in out
    assert f"card {waiting} (revision 2): proposed -> proposed" in out
    assert f"card {waiting} (revision 2): proposed -> approved" in out
    card = live.state.cards[waiting].card
    assert (card.rev, card.training_recipe.variants[1].lr_mul) == (2, 0.25)
    assert state(live, waiting) is CardState.RUNNING
    again = cli("apply", saved, live.path, "-y", "--as", "bob").output
    assert f"card {waiting} is running already, as it was saved" in again


def test_a_card_that_was_sent_back_has_to_be_edited(cli: Any, live: Any, waiting: str, saved: Path) -> None:
    cli("revise", live.path, waiting, "--note", "gentler", "--as", "carol")
    out = cli("apply", saved, live.path, "-y", "--as", "bob", code=1).output
    assert f"card {waiting} was sent back (carol: gentler): edit the file first" in out
    rewrite(saved, "lr_mul: 0.5", "lr_mul: 0.25")
    cli("apply", saved, live.path, "-y", "--as", "bob")
    assert state(live, waiting) is CardState.RUNNING


def test_what_an_edit_cannot_change_apply_cannot_change(cli: Any, live: Any, saved: Path) -> None:
    rewrite(saved, "reason: manual", "reason: loss_plateau")
    out = cli("apply", saved, live.path, "-y", "--as", "bob", code=1).output
    assert "an edit cannot change reason" in out
    assert posted(live.path) == []


def test_a_file_that_is_no_card_is_told_by_its_name(cli: Any, live: Any, saved: Path) -> None:
    rewrite(saved, "action: fork", "action: spoon")
    out = cli("apply", saved, live.path, "-y", code=1).output
    assert out.startswith(f"Error: {saved}: this plan card cannot be taken: line 8")


# ------------------------------------------------------------------------------------------------------------ the prompt


def test_without_a_terminal_nothing_is_approved_unless_it_is_said(
    cli: Any, live: Any, waiting: str, saved: Path
) -> None:
    out = cli("apply", saved, live.path, "--as", "bob", code=1).output
    assert "there is no terminal to ask on: give --yes" in out
    assert state(live, waiting) is CardState.PROPOSED


@pytest.mark.parametrize("word", ["y", "", "no", "Yes"])
def test_on_a_terminal_only_yes_is_taken(
    cli: Any, live: Any, waiting: str, saved: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    monkeypatch.setattr(planning, "_terminal", lambda: True)
    out = cli("apply", saved, live.path, "--as", "bob", code=1, stdin=f"{word}\n").output
    assert "nothing was asked of the run: you did not say yes" in out
    assert state(live, waiting) is CardState.PROPOSED
    assert posted(live.path) == []
    cli("apply", saved, live.path, "--as", "bob", stdin="yes\n")
    assert state(live, waiting) is CardState.RUNNING


# ---------------------------------------------------------------------------------------------------------------- stale


def test_a_card_of_another_session_is_refused(cli: Any, live: Any, saved: Path) -> None:
    rewrite(saved, "session: test", "session: other")
    out = cli("apply", saved, live.path, "-y", code=1).output
    assert "the card belongs to session other, and this is session test" in out


def test_a_session_is_found_by_the_cards_own_name_where_none_is_given(
    cli: Any, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = cli("apply", saved, "-y", code=1).output
    assert "no session is called test under automode-runs; give its folder" in out
    (tmp_path / "automode-runs").mkdir()
    (tmp_path / "automode-runs" / "test").symlink_to(tmp_path / "run", target_is_directory=True)
    assert "approved" in cli("apply", saved, "-y", "--as", "bob").output


def test_a_conflict_names_who_changed_what(
    cli: Any, live: Any, waiting: str, saved: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(to_yaml(live.state.cards[waiting].card).replace("budget_steps: 60 ", "budget_steps: 40 "))
    cli("edit", live.path, waiting, "--file", mine, "--as", "carol")
    out = cli("apply", saved, live.path, "-y", "--as", "bob", code=1).output
    assert "conflict: the card was saved at revision 1, and is at revision 2 by now" in out
    assert "revision 2 by carol: budget_steps 60 -> 40" in out
    assert state(live, waiting) is CardState.PROPOSED


def test_a_card_that_is_final_by_now_is_stale(cli: Any, live: Any, waiting: str, saved: Path) -> None:
    cli("reject", live.path, waiting, "--note", "too dear", "--as", "carol")
    out = cli("apply", saved, live.path, "-y", "--as", "bob", code=1).output
    assert "the card is stale: it is refused by now (carol: too dear)" in out


def test_a_card_made_under_another_policy_is_stale(
    cli: Any, told: Any, card: PlanCard, tmp_path: Path
) -> None:
    base = Base(step=100, policy="sha256:" + "ab" * 32)
    other = card.model_copy(update={"base": base})
    told.propose(other)
    (tmp_path / "card.yaml").write_text(to_yaml(other))
    out = cli("apply", tmp_path / "card.yaml", told.path, "-y", code=1).output
    assert (
        "the card is stale: it was made under policy sha256:abababababab, and the run is under sha256:" in out
    )
    assert "stale     it was made under policy" in cli("plan", told.path, code=2).output


def test_a_card_of_before_an_adoption_is_stale(cli: Any, told: Any, card: PlanCard, tmp_path: Path) -> None:
    told.node("trunk:0", role="trunk")
    told.propose(card)
    (tmp_path / "card.yaml").write_text(to_yaml(card))
    told.node("trunk:1", "trunk:0", role="trunk", card="deadbeef", step=140)
    out = cli("apply", tmp_path / "card.yaml", told.path, "-y", code=1).output
    assert (
        "it was made for trunk:0, and the run goes on as trunk:1, since card deadbeef changed the trunk at step 140"
        in out
    )


# ---------------------------------------------------------------------------------------------------------- nobody hears


def test_a_run_that_has_ended_is_asked_nothing(cli: Any, live: Any, waiting: str, saved: Path) -> None:
    live.end()
    out = cli("apply", saved, live.path, "-y", code=1).output
    assert "the card is stale: it is expired by now (planner: the run ended: all steps done)" in out
    assert posted(live.path) == []


def test_a_run_that_was_killed_is_asked_nothing(cli: Any, live: Any, waiting: str, saved: Path) -> None:
    live.store.close()
    out = cli("apply", saved, live.path, "-y", code=1).output
    assert "Error: nothing was asked: no run is training this session now" in out
    assert posted(live.path) == []


def test_a_request_that_nobody_takes_up_in_time_is_taken_back(
    cli: Any, told: Any, card: PlanCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "GRACE", 0.1)
    told.propose(card)
    (tmp_path / "card.yaml").write_text(to_yaml(card))
    out = cli(
        "apply", tmp_path / "card.yaml", told.path, "-y", "--timeout", 0.1, "--as", "bob", code=1
    ).output
    assert "the run did not answer within 0 s, and the request was taken back" in out
    assert posted(told.path) == []


def test_the_runs_own_refusal_is_told(cli: Any, live: Any, waiting: str, saved: Path) -> None:
    cli("mode", live.path, "observe", "--as", "bob")
    out = cli("apply", saved, live.path, "-y", "--as", "bob", code=1).output
    assert "Error: refused by the run: the mode is observe, in which no card runs" in out


# ---------------------------------------------------------------------------------------------------------- two at a time


def test_of_two_people_who_edit_one_card_at_once_one_gets_a_conflict(
    live: Any, waiting: str, saved: Path, tmp_path: Path
) -> None:
    """Two processes apply two edits of the same revision; the run takes one of them, and tells the other who was first."""
    code = "from automode.cli.main import main; main()"
    running = {}
    for name, factor in (("ann", "0.25"), ("ben", "0.75")):
        file = tmp_path / f"{name}.yaml"
        file.write_text(saved.read_text().replace("lr_mul: 0.5", f"lr_mul: {factor}"))
        command = [sys.executable, "-c", code, "apply", str(file), str(live.path), "-y", "--as", name]
        running[name] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    # Nothing is answered before both have asked, so that they meet whichever is the quicker.
    until = time.monotonic() + 60
    while len(posted(live.path)) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    requests = [json.loads(file.read_text()) for file in posted(live.path)]
    assert [(r["verb"], r["rev"]) for r in requests] == [("edit", 1), ("edit", 1)]
    while any(process.poll() is None for process in running.values()) and time.monotonic() < until:
        live.look()
        time.sleep(0.02)
    out = {name: process.communicate(timeout=10)[0] for name, process in running.items()}
    first, second = (r["actor"] for r in requests)
    assert running[first].returncode == 0, out
    assert running[second].returncode == 1, out
    assert "conflict: this edit is about revision 1" in out[second]
    assert f"which is at revision 2 by {first}" in out[second]
    card = live.state.cards[waiting].card
    assert (card.rev, card.training_recipe.variants[1].lr_mul) == (2, {"ann": 0.25, "ben": 0.75}[first])
    assert state(live, waiting) is CardState.RUNNING
