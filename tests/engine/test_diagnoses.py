"""When diagnostics are asked for, what they cost, and how they come to stand on a card."""

from __future__ import annotations

import pytest

from automode.engine import fold
from automode.planner.diagnostics import cost_of
from automode.planner.events import Diagnosed, Envelope, UpdateSize
from automode.planner.policy import Policy
from tests.engine.conftest import RUN


def asked(world):
    return [
        (e.frame_cursor, e.body)
        for e in world.log
        if isinstance(e, Envelope) and e.role == "command" and e.body.kind == "diagnose"
    ]


def answer(world, **more):
    """Answer the diagnosis that is asked for."""
    (command_id,) = [i for i, c in world.state.pending.items() if c.kind == "diagnose"]
    passes = cost_of(world.policy.diagnostics) if world.state.pending[command_id].probe else 0.0
    size = UpdateSize(rms=0.3, ratio=1e-3)
    world.feed(Diagnosed(step=world.state.step, updates=(size,), passes=passes, **more), command_id)


def test_the_whole_is_read_as_often_as_its_share_of_the_compute_allows(make_world, plateau_rows):
    policy = Policy.model_validate({"reasons": [], "diagnostics": {"every": 100, "share": 0.05}})
    world = make_world(policy=policy, hold={"diagnose"}, mode="observe")
    world.start()
    for start in range(0, 6000, 100):
        world.rows(plateau_rows[start : start + 100])
        if world.state.pending:
            answer(world)
    whole = [row for row, command in asked(world) if command.probe]
    cost = cost_of(policy.diagnostics)
    assert len(whole) == pytest.approx(0.05 * 6000 * 96 / cost, abs=1.5)
    assert all(len([w for w in whole if w <= row]) * cost <= 0.05 * row * 96 for row in whole)
    assert len(asked(world)) > 2 * len(whole)  # between them only what costs no pass
    assert world.state.ledger.automode == len(whole) * cost
    assert fold(world.log).differences == 0


def test_a_wait_for_the_clocks_share_puts_off_the_next_and_the_scans(make_world, plateau_rows):
    policy = Policy.model_validate({"reasons": [], "diagnostics": {"every": 100, "share": 1.0}})
    world = make_world(policy=policy, hold={"diagnose"}, mode="observe")
    world.start()
    world.rows(plateau_rows[:200])
    scan = world.state.next_scan
    answer(world, rest=1000)
    assert world.state.next_scan == scan + 1000
    world.rows(plateau_rows[200:2000])
    assert [row for row, _ in asked(world)] == [asked(world)[0][0], pytest.approx(1200, abs=30)]


@pytest.mark.parametrize(
    "change", [{"policy": {"diagnostics": {"enabled": False}}}, {"mode": "off"}], ids=["disabled", "off"]
)
def test_nothing_is_read_where_nothing_is_asked_for(make_world, plateau_rows, change):
    policy = Policy.model_validate({"reasons": []} | change.get("policy", {}))
    world = make_world(policy=policy, mode=change.get("mode", "observe"))
    world.start()
    world.rows(plateau_rows[:3000])
    assert asked(world) == []


def test_a_run_without_anything_to_read_is_asked_once(make_world, plateau_rows):
    run = RUN.model_copy(update={"own_step": True})
    world = make_world(policy=Policy.model_validate({"reasons": []}), run=run, mode="observe")
    world.start()
    world.rows(plateau_rows[:5000])
    assert [command.probe for _, command in asked(world)] == [0]


def test_the_latest_reading_stands_on_the_card(make_world, plateau_rows):
    policy = Policy.model_validate({"reasons": ["loss_plateau"], "diagnostics": {"every": 300, "share": 1.0}})
    world = make_world(policy=policy, hold={"diagnose"}, mode="observe")
    world.start()
    for start in range(0, 3000, 100):
        world.rows(plateau_rows[start : start + 100])
        if any(c.kind == "diagnose" for c in world.state.pending.values()):
            answer(
                world, gradient_variance=50.0, gradient_square=2.0, examples=128, sharpness=9.0, residual=0.1
            )
    card = world.facts("card_proposed")[0].card
    assert card.diagnostics["sharpness"] == 9.0
    assert card.diagnostics["noise_scale"] == pytest.approx(25.0)
    assert card.diagnostics["update_rms"] == (0.3,)
    assert 0 < card.step - card.diagnostics["diagnosed_at"] <= 400
    assert fold(world.log).differences == 0
