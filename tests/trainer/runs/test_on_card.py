"""A user's own function hears of every card, may answer it, and can do the run no harm."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from automode import Trainer, replay
from automode.engine import State
from automode.errors import CardError, UsageError
from automode.planner.approval import Lifetime, propose
from automode.planner.card_text import from_yaml
from automode.planner.cards import CardState
from automode.planner.policy import Policy
from automode.planner.recipes import MergeInterpolate
from automode.presets import preset_text
from automode.session import Session, SessionStore
from automode.session.inbox import Inbox
from automode.trainer.card_callbacks import CardCallbacks, CardHandle

POLICY = {
    "reasons": ["merge_cadence"],
    "budget": "on_top",
    "pacing": {"exploration_share": 1.0, "total_share": 1.0, "warmup_steps": 0},
    "evidence": {"min_samples": 20},
    "approval": {"expire_steps": 4},
    "averages": {"finish_at": 0.3},
}
PLATEAU = POLICY | {"reasons": ["loss_plateau"], "trend": {"budget": 40}}
PLATEAU["approval"] = POLICY["approval"] | {"ask": []}
PLATEAU["pacing"] = POLICY["pacing"] | {"min_rung": 4, "max_cards": 1}


def fit(
    folder: Path,
    script: Any,
    *callbacks: Any,
    automode: str = "propose",
    policy: Any = POLICY,
    steps: int = 50,
) -> Any:
    """A run that makes one card."""
    trainer = Trainer(
        automode=automode,
        policy=Policy.model_validate(policy),
        max_steps=steps,
        seed=3,
        console=False,
        session_dir=folder,
    )
    for callback in callbacks:
        assert trainer.on_card(callback) is callback
    made = script.build()
    result = trainer.fit(**made)
    result.session.close()
    replay(result.path).check()
    with Session.open(result.path) as session:
        moves = [r.body for r in session.events(kind="card_moved")]
        asked = [r.body for r in session.events(kind="decided")]
        refused = [r.body for r in session.events(kind="request_refused")]
        text = result.path.joinpath("log.jsonl").read_text()
    weights = {name: value.clone() for name, value in made["model"].state_dict().items()}
    return {
        "moves": moves,
        "asked": asked,
        "refused": refused,
        "log": text,
        "weights": weights,
        "path": result.path,
    }


@pytest.fixture
def script(scripts: Any) -> Any:
    return scripts(rate=0.003, held_out=80)


def test_a_callback_approves_and_the_record_says_so(tmp_path: Path, script: Any) -> None:
    seen = []

    def callback(card: Any, handle: CardHandle) -> None:
        seen.append((card.reason, card.created_by, handle.waits))
        handle.approve("looks good")

    run = fit(tmp_path, script, callback)
    assert seen == [("merge_cadence", "planner", True)]
    first = run["moves"][0]
    assert (first["after"], first["actor"], first["why"]) == ("approved", "callback", "looks good")
    assert [m["after"] for m in run["moves"]][:2] == ["approved", "running"]
    (asked,) = run["asked"]
    assert (asked["actor"], asked["verb"], asked["rev"]) == ("callback", "approve", 1)
    assert not list((run["path"] / "inbox").glob("*.json"))


def test_a_callback_rejects_with_its_reason(tmp_path: Path, script: Any) -> None:
    run = fit(tmp_path, script, lambda _, handle: handle.reject("not now"))
    (move,) = run["moves"]
    assert (move["after"], move["actor"], move["why"]) == ("refused", "callback", "not now")


def test_a_callback_edits_and_approves_what_it_made(tmp_path: Path, script: Any) -> None:
    def callback(card: Any, handle: CardHandle) -> None:
        assert handle.edit() is card
        edited = handle.edit(cooldown_steps=7, note="shorter")
        assert (edited.rev, handle.card.cooldown_steps) == (2, 7)
        handle.approve()

    run = fit(tmp_path, script, callback)
    edit, approval = run["moves"][:2]
    assert (edit["after"], edit["rev"], edit["actor"], edit["why"]) == ("proposed", 2, "callback", "shorter")
    assert edit["difference"]["cooldown_steps"][1] == 7
    assert (approval["after"], approval["rev"]) == ("approved", 2)


def test_what_the_run_refuses_is_recorded_and_does_no_harm(tmp_path: Path, script: Any) -> None:
    def callback(_: Any, handle: CardHandle) -> None:
        handle.edit(merge_recipe=MergeInterpolate())  # no merge card can do that
        handle.approve()

    run = fit(tmp_path, script, callback)
    assert [r["verb"] for r in run["refused"]] == ["edit", "approve"]
    assert "cannot run" in run["refused"][0]["why"]
    assert run["moves"][-1]["after"] == "expired"


def test_an_exception_in_a_callback_is_warned_of_and_logged_and_nothing_more(
    tmp_path: Path, script: Any
) -> None:
    called = []

    def broken(_: Any, handle: CardHandle) -> None:
        handle.approve()
        raise ZeroDivisionError("oops")

    def sound(card: Any, handle: CardHandle) -> None:
        called.append(card.id)

    with pytest.warns(RuntimeWarning, match=r"the callback on card \w+ failed \(ZeroDivisionError: oops\)"):
        run = fit(tmp_path, script, broken, sound)
    assert "callback_failed" in run["log"]
    assert len(called) == 1
    assert run["asked"] == []
    assert [m["after"] for m in run["moves"]] == ["expired"]


def test_where_warnings_are_errors_a_broken_callback_still_ends_nothing(tmp_path: Path, script: Any) -> None:
    # pytest makes errors of warnings here, as everywhere in this suite.
    run = fit(tmp_path, script, lambda card, handle: card.no_such_field)
    assert "callback_failed" in run["log"]


def test_what_a_callback_draws_leaves_no_trace(tmp_path: Path, script: Any) -> None:
    def draws(_: Any, handle: CardHandle) -> None:
        random.seed(1)
        np.random.seed(2)  # noqa: NPY002
        torch.manual_seed(3)
        torch.rand(5)

    plain = fit(tmp_path / "plain", script)
    drawn = fit(tmp_path / "drawn", script, draws)
    assert all(torch.equal(value, drawn["weights"][name]) for name, value in plain["weights"].items())


def test_in_observe_mode_a_callback_hears_and_its_answer_is_refused(tmp_path: Path, scripts: Any) -> None:
    flat = scripts(rate=1e-6, held_out=80)
    approve = fit(
        tmp_path, flat, lambda _, handle: handle.approve(), automode="observe", policy=PLATEAU, steps=200
    )
    (refused,) = approve["refused"]
    assert "the mode is observe" in refused["why"]


def test_in_act_mode_a_callback_can_stop_what_runs_already(tmp_path: Path, script: Any) -> None:
    states = []

    def veto(_: Any, handle: CardHandle) -> None:
        states.append(handle.state)
        handle.reject("not mine")

    run = fit(tmp_path, script, veto, automode="act")
    assert states == [CardState.RUNNING]
    assert [(m["after"], m["actor"]) for m in run["moves"]][-1] == ("refused", "callback")


def test_only_what_can_be_called_is_taken() -> None:
    with pytest.raises(UsageError, match=r"on_card takes a function of \(card, handle\), got str"):
        Trainer(console=False).on_card("print")  # type: ignore[type-var]


def test_an_edit_that_makes_no_card_is_told_at_once(tmp_path: Path) -> None:
    handle = CardHandle(from_yaml(preset_text("cards/merge_cadence")), CardState.PROPOSED, tmp_path)
    with pytest.raises(
        CardError, match="makes no card: cooldown_steps: Input should be greater than or equal to 0"
    ):
        handle.edit(cooldown_steps=-1)
    with pytest.raises(CardError, match="Extra inputs"):
        handle.edit(cool=1)
    assert handle._taken() == []


def test_a_handle_that_is_kept_posts_to_the_inbox_afterwards(tmp_path: Path) -> None:
    with SessionStore.create(tmp_path / "run", header={}) as store:
        handle = CardHandle(from_yaml(preset_text("cards/merge_cadence")), CardState.PROPOSED, store.path)
        handle.approve()
        (decided,) = handle._taken()
        inbox = Inbox(store.path)
        inbox.done(decided.request)  # its id is one that the inbox knows
        assert inbox.poll(0.0) == []
        handle.revise("later")
        ((_, request),) = inbox.poll(1.0)
    assert (request["verb"], request["actor"], request["note"], request["rev"]) == (
        "revise",
        "callback",
        "later",
        1,
    )


def test_a_run_that_is_taken_up_again_follows_what_was_decided_and_asks_no_second_time(
    tmp_path: Path,
) -> None:
    calls = []
    card = from_yaml(preset_text("cards/merge_cadence"))
    state = State()
    callbacks = CardCallbacks([lambda made, handle: calls.append(made.id)], state, tmp_path, None)
    handle = CardHandle(card, CardState.PROPOSED, tmp_path)
    handle.approve("then")
    (decided,) = handle._taken()
    person = decided.model_copy(
        update={"request": "01795274193540443692-0000792-00000000-3ac8b10f", "actor": "ann"}
    )
    assert callbacks.again([(3, decided), (4, person), (3, decided)]) == [(4, person)]
    assert callbacks.decided(state) == []
    for made in (card, card.model_copy(update={"id": "0" * 8})):
        state.cards[made.id] = propose(made, step=1, time=0.0, lifetime=Lifetime())
    assert callbacks.decided(state) == [decided]
    assert calls == ["0" * 8]
    assert callbacks.decided(state) == []
