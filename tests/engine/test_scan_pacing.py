"""Scans keep to their share of the run's compute, whatever else would bring the next one forward."""

from __future__ import annotations

from typing import Any

import pytest

from automode.planner.events import Envelope
from automode.planner.policy import Policy


@pytest.mark.parametrize("cost", [0.005, 0.02, 0.1])
def test_scans_take_no_more_than_their_share_of_the_compute_and_one_scan_on_top(
    cost: float, make_world: Any, plateau_rows: Any
) -> None:
    policy = Policy.model_validate({"reasons": ["label_noise"], "scan": {"every": 20, "cost": cost}})
    world = make_world(policy=policy, mode="act", scanned={"passes": 600.0})
    world.start()
    world.rows(plateau_rows)
    state = world.state
    scans = len(state.scanned)
    budget = cost * state.step * state.passes_per_step
    assert 600.0 * (scans - 1) <= budget
    # Not much less either: rules look every 20 steps, so that a scan is up to two looks late.
    between = max(20.0, 600.0 / (cost * state.passes_per_step)) + 40.0
    assert scans >= int(state.step / between)


def test_a_short_run_is_read_through_fewer_samples_but_never_through_too_few(
    make_world: Any, plateau_rows: Any
) -> None:
    def probe(**scan: Any) -> int:
        world = make_world(policy=Policy.model_validate({"reasons": ["label_noise"], "scan": scan}))
        world.start()
        world.rows(plateau_rows)
        (size,) = {e.body.probe for e in world.log if isinstance(e, Envelope) and e.body.kind == "scan"}
        return int(size)

    assert probe(cost=1.0) == 1024
    assert probe(cost=1.0, probe=64) == 64
    assert probe(cost=1e-6) == 128
    assert (
        probe(cost=0.005) == 280
    )  # of 576,000 passes half a per cent for six scans, less the 200 held-out samples


def test_the_trunks_average_is_asked_only_where_a_card_about_labels_may_follow(
    make_world: Any, plateau_rows: Any
) -> None:
    """It takes a pass over the training data, so that it is not asked early, late, in vain, or beyond what may be spent."""

    def asked(**policy: Any) -> dict[int, float | None]:
        given = {"reasons": ["label_noise"], "scan": {"every": 50, "cost": 1.0}} | policy
        world = make_world(policy=Policy.model_validate(given), mode="act")
        world.start()
        world.rows(plateau_rows)
        return {
            e.frame_cursor: e.body.ask_from
            for e in world.log
            if isinstance(e, Envelope) and e.body.kind == "scan"
        }

    found = asked()
    assert {step for step, least in found.items() if least is not None} == {
        step for step in found if 0.25 * 6000 <= step < 6000 - 800
    }
    assert set(found.values()) == {None, 0.1}
    assert set(asked(noise={"min_noise": 0.3}).values()) == {None, 0.3}
    assert set(asked(reasons=["residual_cluster"]).values()) == {None}
    assert set(asked(pacing={"total_share": 0.002}).values()) == {None}
    assert set(asked(noise={"from": 0.9}).values()) == {None}
