"""Bad input, bad disks: each ends in a clear error or a safe skip, and the session opens and replays afterwards."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from automode import Session
from automode.errors import CardError, DataError, SessionError, UsageError
from automode.planner.card_text import submission_from_yaml
from automode.testing.bench import identical

SLOW = 0.003

CARD = """
schema: 1
action: fork
reason: manual
because: A small one.
training_recipe: {variants: [{name: plain}, {name: fast, lr_mul: 30}]}
budget_steps: 12
asha: {reduction_factor: 2, max_steps: 24}
"""


class Faulty(nn.Module):
    """A network whose forward pass misbehaves at some training steps, counted from 1."""

    def __init__(self, inner: nn.Module, fault: Callable[[int, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = inner
        self.fault = fault
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        if self.training and torch.is_grad_enabled():
            self.steps += 1
            return self.fault(self.steps, out)
        return out


def faulty(script: Any, fault: Callable[[int, Tensor], Tensor], **changes: Any) -> Any:
    plain = script(**changes)
    return script(**changes, model=lambda: Faulty(plain.network(), fault))


def nan_at(*steps: int) -> Callable[[int, Tensor], Tensor]:
    return lambda step, out: out * float("nan") if step in steps else out


# Numbers that are not finite.


def test_observe_goes_on_through_losses_that_are_not_finite(play_run: Any, script: Any) -> None:
    with pytest.warns(
        RuntimeWarning, match="the training loss is not finite from step 20 on; the run goes on"
    ):
        run = play_run(automode="observe", script=faulty(script, nan_at(20)), steps=60)
    assert run.result.steps == 60
    assert [i for i, loss in enumerate(run.losses, 1) if not np.isfinite(loss)] == list(range(20, 61))
    assert not run.bodies("safeguarded")


def test_act_keeps_them_from_the_weights_and_goes_on(play_run: Any, script: Any) -> None:
    run = play_run(automode="act", script=faulty(script, nan_at(20, 21, 40)), steps=60)
    assert run.result.steps == 60
    assert len(run.losses) == 63  # rows count attempts
    assert [b["what"] for b in run.bodies("safeguarded")] == ["skipped"] * 3
    assert all(torch.isfinite(value).all() for value in run.final.values() if value.is_floating_point())


def test_act_stops_when_steps_stay_not_finite_and_says_why(play_run: Any, script: Any) -> None:
    run = play_run(
        automode="act",
        script=faulty(script, lambda step, out: out * float("nan") if step >= 20 else out),
        policy={"safeguards": {"stop_after_nonfinite": 5}},
        steps=60,
    )
    assert run.result.steps == 19
    assert run.result.reason == "5 steps in a row were not finite (the loss is nan)"
    assert [b["what"] for b in run.bodies("safeguarded")] == ["skipped"] * 5 + ["stopped"]
    assert run.bodies("run_ended")[0]["why"] == run.result.reason
    parameters = [name for name, _ in run.made["model"].named_parameters()]
    assert all(torch.equal(run.final[name], run.after[18][name]) for name in parameters)


def test_skipped_steps_that_are_not_in_a_row_stop_nothing(play_run: Any, script: Any) -> None:
    run = play_run(
        automode="act",
        script=faulty(script, lambda step, out: out * float("nan") if step % 2 else out),
        policy={"safeguards": {"stop_after_nonfinite": 2}},
        steps=30,
    )
    assert run.result.steps == 30
    assert run.result.reason == "max_steps"


def test_a_finite_loss_with_a_gradient_that_is_not_is_skipped_too(play_run: Any, script: Any) -> None:
    def spoilt(step: int, out: Tensor) -> Tensor:
        return out + (out * 0.0).abs().sqrt() if step == 20 else out  # the root's slope at 0

    run = play_run(automode="act", script=faulty(script, spoilt), steps=40)
    (skipped,) = run.bodies("safeguarded")
    assert skipped["why"] == "the gradient norm is nan"
    assert np.isfinite(run.losses).all()
    assert run.result.steps == 40


def test_with_the_guard_off_act_leaves_the_steps_to_the_user(play_run: Any, script: Any) -> None:
    with pytest.warns(RuntimeWarning, match="not finite"):
        run = play_run(
            automode="act",
            script=faulty(script, nan_at(20)),
            policy={"safeguards": {"skip_nonfinite": False, "rewind": False}},
            steps=40,
        )
    assert not run.bodies("safeguarded")
    assert not np.isfinite(run.losses[-1])


# Data.


def test_an_empty_loader_is_refused_before_anything_is_made(
    play_run: Any, script: Any, tmp_path: Any
) -> None:
    for loader in (DataLoader(TensorDataset(torch.empty(0, 6), torch.empty(0).long()), batch_size=4), []):
        with pytest.raises(DataError, match="the training loader is empty"):
            play_run(automode="act", script=script(), fit={"train_loader": loader})
    assert not list(tmp_path.rglob("session.db"))


class Stream(IterableDataset[Any]):
    """Samples without a length."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(1)
        for _ in range(self.n):
            x = torch.randn(6, generator=generator)
            yield x, x[:3].abs().argmax()


def test_a_loader_that_turns_out_to_be_empty_is_an_error_and_the_session_opens(
    play_run: Any, script: Any, failed_run: Any
) -> None:
    path = failed_run(
        DataError,
        "the training loader is empty: it gave no batch",
        automode="act",
        script=script(),
        fit={"train_loader": DataLoader(Stream(0), batch_size=8)},
        steps=20,
    )
    with Session.open(path) as session:
        assert session.rows() == 0


def test_a_dataset_without_length_trains_and_its_forks_are_refused(play_run: Any, script: Any) -> None:
    run = play_run(
        automode="act",
        script=script(),
        fit={"train_loader": DataLoader(Stream(400), batch_size=8)},
        actions={
            8: lambda p: p.submit(
                CARD.replace("training_recipe", "selection: {kind: indices, ids: [1]}\ntraining_recipe")
            )
        },
        steps=120,
    )
    assert run.result.steps == 120
    (refused,) = run.bodies("request_refused")
    assert "needs sample ids" in refused["why"]


def test_an_iterator_that_can_be_read_once_is_named_as_what_it_is(
    play_run: Any, script: Any, failed_run: Any
) -> None:
    batches = [tuple(t[:8] for t in (torch.randn(8, 6), torch.zeros(8).long())) for _ in range(4)]
    failed_run(
        DataError,
        "can be read only once",
        automode="observe",
        script=script(),
        fit={"train_loader": iter(batches)},
        steps=20,
    )


def test_held_out_data_that_can_be_read_once_are_refused_before_anything_is_made(
    play_run: Any, script: Any, tmp_path: Any
) -> None:
    with pytest.raises(UsageError, match="val_loader is an iterator, which can be read only once"):
        play_run(script=script(), fit={"val_loader": iter([])})
    assert not list(tmp_path.rglob("session.db"))


def test_a_batch_of_another_shape_is_told_with_what_to_do(
    play_run: Any, script: Any, failed_run: Any
) -> None:
    failed_run(
        DataError,
        "write the step yourself",
        automode="act",
        script=script(),
        fit={"train_loader": [{"x": torch.randn(4, 6)}] * 4},
        steps=4,
    )


# A model that fails.


@pytest.mark.parametrize("mode", ["observe", "propose", "act"])
def test_a_forward_pass_that_fails_raises_the_users_own_error(
    mode: str, script: Any, failed_run: Any
) -> None:
    class OwnError(RuntimeError):
        pass

    def fail(step: int, out: Tensor) -> Tensor:
        if step == 25:
            raise OwnError("the user's own message")
        return out

    path = failed_run(
        OwnError, "^the user's own message$", automode=mode, script=faulty(script, fail), steps=60
    )
    with Session.open(path) as session:
        assert session.rows() == 24
        last = list(session.events())[-1]
    assert (last.kind, last.body["why"]) == ("run_ended", "failed: OwnError: the user's own message")


def test_what_runs_and_waits_when_the_model_fails_comes_to_an_end(script: Any, failed_run: Any) -> None:
    def fail(step: int, out: Tensor) -> Tensor:
        if step == 25 and out.shape[0] >= 22 and watched[0]:
            raise ZeroDivisionError("in the forward pass")
        return out

    watched = [True]

    class Trunk(Faulty):
        def __deepcopy__(self, memo: Any) -> Any:
            twin = Faulty(__import__("copy").deepcopy(self.inner, memo), lambda step, out: out)
            memo[id(self)] = twin
            return twin

    path = failed_run(
        ZeroDivisionError,
        "in the forward pass",
        automode="propose",
        script=script(rate=SLOW, model=lambda: Trunk(script().network(), fail)),
        actions={
            8: lambda p: p.submit(CARD),
            9: lambda p: p.approve(),
            12: lambda p: p.submit(CARD.replace("small", "second")),
        },
        policy={"budget": "on_top"},
        steps=300,
    )
    with Session.open(path) as session:
        final = {m.body["card"]: m.body["after"] for m in session.events(kind="card_moved")}
        assert sorted(final.values()) == ["expired", "inconclusive"]
        assert session.rows() == 24


def test_an_interrupt_ends_the_session_in_order(script: Any, failed_run: Any) -> None:
    def interrupt(person: Any) -> None:
        raise KeyboardInterrupt("stop")

    path = failed_run(
        KeyboardInterrupt, "^stop$", automode="act", script=script(), actions={15: interrupt}, steps=60
    )
    with Session.open(path) as session:
        assert next(session.events(kind="run_ended")).body["why"].startswith("stopped: KeyboardInterrupt")


# Requests that make no sense.


def posted(path: Any, name: str, data: bytes) -> None:
    """Put a file into the inbox by hand."""
    target = path / "inbox" / name
    target.with_suffix(".part").write_bytes(data)
    target.with_suffix(".part").replace(target)


def request_name(number: int) -> str:
    return f"{number:020d}-{1:07d}-{number:08d}-{'a' * 8}.json"


NONSENSE = {
    "no json": b"{ this is : no json",
    "no text": b"\xff\xfe\x00\x01" * 20,
    "empty": b"",
    "a list": b"[1, 2, 3]",
    "no verb": b'{"actor": "ann"}',
    "unknown verb": b'{"verb": "explode", "actor": "ann"}',
    "unknown field": b'{"verb": "approve", "actor": "ann", "card": "c0ffee00", "rev": 1, "sudo": true}',
    "wrong type": b'{"verb": "approve", "actor": "ann", "card": 17, "rev": "one"}',
    "deep": b"[" * 40_000 + b"]" * 40_000,
    "an order with a deep card": b'{"control": "fork", "actor": "a", "arguments": {"card": %s1%s}}'
    % (b'{"a":' * 900, b"}" * 900),
    "a deep card": b'{"verb": "submit", "actor": "a", "body": {"a": %s%s}}' % (b"[" * 900, b"]" * 900),
    "half a character": b'{"verb": "mode", "mode": "observe", "actor": "a", "note": "\\ud800"}',
    "a number without end": b'{"control": "step", "actor": "a", "arguments": {"n": %s}}' % (b"9" * 4000),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_a_file_in_the_inbox_that_is_no_request_is_set_aside_with_the_reason(
    name: str, play_run: Any, script: Any
) -> None:
    run = play_run(
        script=script(),
        actions={10: lambda p: posted(p.path, request_name(10), NONSENSE[name])},
        steps=30,
    )
    assert run.result.steps == 30
    refused = run.path / "inbox" / "refused"
    assert (refused / request_name(10)).read_bytes() == NONSENSE[name]
    assert len((refused / f"{request_name(10)}.reason.txt").read_text(encoding="utf-8").strip()) > 10
    assert not run.bodies("decided")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, names of files are text")
def test_a_file_in_the_inbox_whose_name_is_no_text_is_set_aside(play_run: Any, script: Any) -> None:
    def place(watched: Any) -> None:
        Path(os.fsdecode(os.fsencode(watched.path / "inbox") + b"/\xff\xfe.json")).write_bytes(b"{}")

    run = play_run(script=script(), actions={10: place}, steps=30)
    assert run.result.steps == 30
    (reason,) = (run.path / "inbox" / "refused").glob("*.reason.txt")
    assert "not named like a request" in reason.read_text(encoding="utf-8")


WRONG_CARDS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "not a card": {"hello": "world"},
    "no variants": {
        "action": "fork",
        "training_recipe": {"variants": []},
        "budget_steps": 4,
        "asha": {"max_steps": 4},
    },
    "rate below zero": {
        "action": "fork",
        "training_recipe": {"variants": [{"name": "v", "lr_mul": -1.0}]},
        "budget_steps": 4,
        "asha": {"max_steps": 4},
    },
    "rung above the top": {
        "action": "fork",
        "training_recipe": {"variants": [{"name": "v"}]},
        "budget_steps": 40,
        "asha": {"max_steps": 4},
    },
    "ids of nobody": {
        "action": "fork",
        "selection": {"kind": "indices", "ids": []},
        "training_recipe": {"variants": [{"name": "v"}]},
        "budget_steps": 4,
        "asha": {"max_steps": 4},
    },
    "no executor": {"action": "merge", "merge_recipe": {"kind": "distill"}},
    "wrong types": {"action": 7, "training_recipe": "fast please", "budget_steps": [1], "asha": None},
}


@pytest.mark.parametrize("name", WRONG_CARDS)
def test_a_card_edited_into_nonsense_is_refused_in_words_and_the_run_goes_on(
    name: str, play_run: Any, script: Any
) -> None:
    def edit(person: Any) -> None:
        card = person.cards[-1]
        person.ask("edit", card.id, rev=card.rev, body=WRONG_CARDS[name] or {"training_recipe": None})

    run = play_run(
        script=script(rate=SLOW),
        policy={"budget": "on_top"},
        actions={
            4: lambda p: p.ask("submit", body=WRONG_CARDS[name]),
            8: lambda p: p.submit(CARD),
            9: edit,
            10: lambda p: p.refuse(),
        },
        steps=140,
    )
    submitted, edited = run.bodies("request_refused")
    assert (submitted["verb"], edited["verb"]) == ("submit", "edit")
    assert min(len(submitted["why"]), len(edited["why"])) > 20
    assert run.states() == ["refused"]
    assert len(run.bodies("card_proposed")) == 1
    assert run.result.steps == 140


def test_ids_that_do_not_exist_fail_the_card_alone(play_run: Any, script: Any) -> None:
    text = CARD.replace("training_recipe", "selection: {kind: indices, ids: [4000, 5000]}\ntraining_recipe")
    run = play_run(
        script=script(rate=SLOW),
        policy={"budget": "on_top"},
        actions={8: lambda p: p.submit(text), 9: lambda p: p.approve()},
    )
    assert run.states() == ["approved", "running", "failed"]
    assert "holds no training sample" in run.why()
    assert run.result.steps == 150


def test_a_yaml_file_of_nonsense_never_becomes_a_request() -> None:
    for text in (
        "",
        "%%%",
        "action: [",
        "a: 1\na: 2",
        CARD + "\nsudo: true",
        CARD.replace("12", "twelve"),
        "- 1",
    ):
        with pytest.raises(CardError):
            submission_from_yaml(text)


def test_editing_the_yaml_file_alone_changes_and_approves_nothing(play_run: Any, script: Any) -> None:
    def scribble(person: Any) -> None:
        path = person.path / "cards" / f"{person.cards[-1].id}.r1.yaml"
        path.write_text("state: approved\nlr_mul: 1e9\n", encoding="utf-8")

    run = play_run(
        script=script(rate=SLOW),
        policy={"budget": "on_top"},
        actions={8: lambda p: p.submit(CARD), 9: scribble, 20: lambda p: p.approve()},
    )
    assert run.bodies("card_started")[0]["step"] == 20
    assert {t["variant"]["lr_mul"] for t in run.bodies("start_trial")} == {1.0, 30.0}


def test_the_same_request_twice_is_followed_once(play_run: Any, script: Any) -> None:
    def twice(person: Any) -> None:
        name = person.submit(CARD)
        again.append((name, (person.path / "inbox" / f"{name}.json").read_bytes()))

    again: list[tuple[str, bytes]] = []
    run = play_run(
        script=script(),
        actions={8: twice, 12: lambda p: posted(p.path, f"{again[0][0]}.json", again[0][1])},
        steps=150,
    )
    assert len(run.bodies("decided")) == 2
    assert len(run.bodies("card_proposed")) == 1


def test_an_inbox_that_disappears_stops_no_training(play_run: Any, script: Any) -> None:
    def remove(person: Any) -> None:
        (person.path / "inbox").rmdir()

    run = play_run(script=script(), actions={10: remove}, steps=40)
    assert run.result.steps == 40
    with Session.open(run.path) as session:
        warnings = [line for line in session.log() if line.get("event") == "inbox_not_read"]
    assert len(warnings) == 1


# A disk that is full.


def limit_pages(person: Any, pages: int | None) -> None:
    """Let the database grow by so many pages only; None: without limit."""
    connection = person.driver._store._connection
    used = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count={1_000_000 if pages is None else used + pages}")


def durable(path: Any) -> int:
    with Session.open(path) as session:
        return int(session.last_seq())


def test_on_a_full_disk_training_goes_on_and_the_end_says_so(
    script: Any, failed_run: Any, run_once: Any, tmp_path: Any
) -> None:
    known: list[int] = []

    def fill(person: Any) -> None:
        known.append(durable(person.path))
        limit_pages(person, 0)

    trained: list[Any] = []
    path = failed_run(
        SessionError,
        "events of the session could not be written: make room on the disk; the model in memory is complete",
        automode="act",
        script=script(rate=SLOW),
        policy={"budget": "on_top", "reasons": ["high_loss_tail"], "scan": {"every": 10, "probe": 64}},
        actions={30: fill, 31: lambda p: p.submit(CARD)},
        keep=trained,
        steps=150,
    )
    run = trained[0]
    assert len(run.after) == 150
    watched = run_once(tmp_path / "watched", automode="observe", script=script(rate=SLOW))
    assert identical(run.final, watched.final)  # nothing was carried out that is not on the disk
    with Session.open(path) as session:
        kinds = [e.kind for e in session.events()]
        assert len(kinds) >= known[0]
        assert "run_ended" not in kinds
        told = [line for line in session.log() if line.get("event") == "session_not_written"]
    assert len(told) == 1  # told once, and not at every step


def test_when_there_is_room_again_nothing_is_missing(
    play_run: Any, script: Any, run_once: Any, tmp_path: Any
) -> None:
    run = play_run(
        script=script(rate=SLOW),
        policy={"budget": "on_top"},
        actions={
            10: lambda p: limit_pages(p, 0),
            12: lambda p: p.submit(CARD),
            14: lambda p: p.approve(),
            40: lambda p: limit_pages(p, None),
        },
    )
    with Session.open(run.path) as session:
        assert session.rows() == 150
        events = [line["event"] for line in session.log()]
    assert run.bodies("card_started")[0]["step"] == 40  # the snapshot waited for the disk
    assert run.states()[-1] == "adopted"
    assert "session_written_again" in events


def test_a_disk_that_fills_up_under_a_running_card_ends_it_in_order(script: Any, failed_run: Any) -> None:
    trained: list[Any] = []
    failed_run(
        SessionError,
        "could not be written",
        script=script(rate=SLOW),
        policy={"budget": "on_top"},
        actions={
            8: lambda p: p.submit(CARD),
            9: lambda p: p.approve(),
            14: lambda p: limit_pages(p, 0),
        },
        keep=trained,
    )
    assert len(trained[0].after) == 150


def test_a_disk_that_refuses_to_sync_stops_no_training(
    script: Any, failed_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if full[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    full = [False]
    monkeypatch.setattr(os, "fsync", fsync)

    def fill(person: Any) -> None:
        full[0] = True

    trained: list[Any] = []
    failed_run(
        SessionError,
        "the disk is full",
        script=script(rate=SLOW),
        policy={"budget": "on_top"},
        actions={8: lambda p: p.submit(CARD), 9: lambda p: p.approve(), 14: fill},
        keep=trained,
    )
    assert len(trained[0].after) == 150


def test_a_checkpoint_that_cannot_be_saved_fails_its_card_alone(
    play_run: Any, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from automode.session.checkpoints import CheckpointStore

    save = CheckpointStore.save

    def full(self: Any, weights: Any, rest: Any, manifest: Any) -> str:
        if manifest["kind"] in ("base", "control"):
            raise SessionError("saving a checkpoint failed: the disk is full; free some space and try again")
        return save(self, weights, rest, manifest)

    monkeypatch.setattr(CheckpointStore, "save", full)
    run = play_run(
        script=script(rate=SLOW),
        policy={"budget": "on_top"},
        actions={8: lambda p: p.submit(CARD), 9: lambda p: p.approve()},
    )
    assert run.states() == ["approved", "running", "failed"]
    assert "the disk is full" in run.why()
    assert run.result.steps == 150


def test_a_session_that_cannot_be_made_stops_the_run_before_it_begins(
    script: Any, play_run: Any, tmp_path: Any
) -> None:
    (tmp_path / "a file").write_text("not a folder", encoding="utf-8")
    with pytest.raises((SessionError, UsageError)):
        play_run(script=script(), session_dir=tmp_path / "a file", steps=10)
