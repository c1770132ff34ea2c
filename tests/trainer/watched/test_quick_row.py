"""The row that is written in one piece is the row that the general way writes."""

from __future__ import annotations

from typing import Any

import pytest

from automode.trainer import watched_loop
from automode.trainer.watched_step import quick_row

pytestmark = pytest.mark.torch


def mixed(made: Any, watch: Any) -> None:
    """Plain steps, and every few of them one that is not: metrics, two losses, no step, a number, no targets, samples asked for."""
    number = 0
    for _ in range(6):
        for x, y in watch.batches():
            number += 1
            with watch.step() as s:
                made.optimizer.zero_grad()
                outputs = made.model(x)
                loss = made.loss_fn(outputs, y)
                loss.backward()
                match number % 11:
                    case 3:
                        s.loss(loss, outputs, y, metrics={"rows": len(y)})
                    case 5:
                        s.loss(loss, outputs, y)
                        s.loss(loss, outputs, y)
                    case 7:
                        s.loss(loss, outputs, y)
                        continue
                    case 8:
                        s.loss(loss.item())
                    case 9:
                        s.loss(loss)
                    case _:
                        s.loss(loss, outputs, y)
                made.optimizer.step()
            if number % 13 == 0:
                assert watch.samples is not None
            if number == 20:
                made.optimizer.param_groups[0]["lr"] /= 2


def outcome(script: Any, watching: Any, frame: Any, soundness: Any, name: str) -> tuple[Any, ...]:
    made = script(steplr=False)
    watch = watching(made, loss_fn=made.loss_fn, train=made.loader, run_name=name)
    mixed(made, watch)
    ledger = watch.samples.state()["columns"]
    watch.close()
    columns = [frame(watch.path, column) for column in ("step", "loss", "lr_0", "applied", "finite")]
    norms = frame(watch.path, "grad_norm")
    assert columns[0]
    told = [event.kind for event in soundness(watch.path)]
    return made.state(), columns, norms, {name: column.tolist() for name, column in ledger.items()}, told


def test_rows_samples_and_weights_are_those_of_the_general_way(
    script: Any, watching: Any, frame: Any, soundness: Any, equal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[bool] = []

    def counted(loop: Any) -> Any:
        row = quick_row(loop)
        assert row is not None

        def noted() -> bool:
            written.append(row())
            return written[-1]

        return noted

    monkeypatch.setattr(watched_loop, "quick_row", counted)
    quick = outcome(script, watching, frame, soundness, "quick")
    monkeypatch.setattr(watched_loop, "quick_row", lambda loop: None)
    general = outcome(script, watching, frame, soundness, "general")
    assert equal(quick[0], general[0])
    assert quick[1] == general[1]
    assert quick[2] == pytest.approx(general[2], rel=1e-6)
    assert quick[3:] == general[3:]
    assert written.count(True) >= 20
    assert written.count(False) >= 4


def test_what_needs_the_general_way_has_it(script: Any, watching: Any) -> None:
    made = script()
    guarded = watching(made, mode="act", total_steps=100, batch_size=16)
    assert quick_row(guarded.loop) is None
    guarded.close()
    made = script()
    made.optimizer.add_param_group({"params": [made.model[0].weight.new_zeros(2).requires_grad_()]})
    assert quick_row(watching(made).loop) is None
    made = script()
    plain = watching(made)
    assert quick_row(plain.loop) is not None
    plain.loop.parts.trunk.clip_norm = 1.0
    assert quick_row(plain.loop) is None


@pytest.mark.parametrize("general", [False, True])
def test_the_inbox_is_looked_into_more_often_than_rows_are_handed_over(
    general: bool, script: Any, watching: Any, frame: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched_loop, "TICK_SECONDS", 0.0)
    monkeypatch.setattr(watched_loop, "ROWS_SECONDS", 1e9)
    if general:
        monkeypatch.setattr(watched_loop, "quick_row", lambda loop: None)
    made = script()
    watch = watching(made)
    watch.loop.hand_over()
    told: list[str] = []
    tick, block = watch.loop.driver.tick, watch.loop.driver.block
    monkeypatch.setattr(watch.loop.driver, "tick", lambda step: told.append("tick") or tick(step))
    monkeypatch.setattr(watch.loop.driver, "block", lambda rows: told.append("block") or block(rows))
    for x, y in made.loader:
        with watch.step() as s:
            made.optimizer.zero_grad()
            loss = made.loss_fn(made.model(x), y)
            loss.backward()
            s.loss(loss)
            made.optimizer.step()
    assert told == ["tick"] * len(made.loader)
    watch.close()
    assert len(frame(watch.path, "loss")) == len(made.loader)
