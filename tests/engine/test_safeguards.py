"""Safeguards in the fold: what goes back, what is lowered and capped, in which order, and what never is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from automode.engine import fold, healthy, story
from automode.planner.card_text import submission_from_yaml
from automode.planner.events import Envelope, Safeguarded, TrunkEnded
from automode.planner.policy import Policy

QUIET = {"reasons": [], "diagnostics": {"enabled": False}}


def policy_of(**safeguards):
    return Policy.model_validate(QUIET | {"safeguards": safeguards})


def commands(world, *kinds):
    return [
        e.body for e in world.log if isinstance(e, Envelope) and e.role == "command" and e.body.kind in kinds
    ]


def answers(world, *kinds):
    return [
        e.body for e in world.log if isinstance(e, Envelope) and e.role == "input" and e.body.kind in kinds
    ]


def learning(n, seed=0):
    rng = np.random.default_rng(seed)
    return (0.3 + 2.0 * np.exp(-np.arange(n) / 200)) * np.exp(0.1 * rng.standard_normal(n))


def level(value, n, seed=1):
    return value * np.exp(0.05 * np.random.default_rng(seed).standard_normal(n))


def started(make_world, **more):
    world = make_world(**{"policy": policy_of()} | more)
    world.start()
    return world


def skip(world, n, step):
    for _ in range(n):
        world.feed(Safeguarded(step=step, what="skipped", why="the loss is nan"))


def replayed(world):
    outcome = fold(world.log)
    assert outcome.differences == 0, outcome.shown
    return outcome


def test_a_diverged_loss_goes_back_to_before_it_rose_at_half_the_rate(make_world, to_rows):
    world = started(make_world)
    world.rows(to_rows(np.concatenate([learning(1000), level(8.0, 150)])))
    (rewind,) = commands(world, "rewind")
    assert 800 < rewind.to_step <= 1000
    assert rewind.rate_factor == 0.5
    assert "the median loss of 20 steps is" in rewind.why
    assert world.state.lineage == "trunk:1"
    assert [n.verdict for n in world.facts("lineage_grew")] == [None, "rewound"]
    assert healthy(world.state) is False or world.state.guards.level.since is None
    replayed(world)


def test_a_second_divergence_soon_after_lowers_the_rate_by_more_and_the_third_by_most(make_world, to_rows):
    world = started(make_world)
    world.rows(to_rows(np.concatenate([learning(1000), level(8.0, 300)])))
    for seed in range(6):
        wave = np.concatenate([level(0.4, 200, seed), level(9.0, 300, seed)])
        world.rows(to_rows(wave, start=world.state.step + 1))
    factors = [c.rate_factor for c in commands(world, "rewind")]
    assert factors == [0.5, 0.25, 0.125]
    assert world.state.guards.rewinds == 3  # and no fourth
    replayed(world)


@pytest.mark.parametrize("mode", ["observe", "propose"])
def test_nothing_is_done_unless_the_mode_is_act(make_world, to_rows, mode):
    world = started(make_world, mode=mode)
    world.rows(to_rows(np.concatenate([learning(1000), level(8.0, 500), np.full(100, np.nan)])))
    skip(world, 30, world.state.step)
    assert not commands(world, "rewind", "set_clip", "set_learning_rate", "stop_run")


def test_what_the_policy_turns_off_is_not_done(make_world, to_rows):
    world = started(make_world, policy=policy_of(rewind=False, clip=False))
    world.rows(to_rows(np.concatenate([learning(1000), level(8.0, 500)])))
    skip(world, 30, world.state.step)
    assert not commands(world, "rewind", "set_clip", "set_learning_rate", "stop_run")


def test_steps_left_out_in_a_row_go_back_and_single_ones_do_not(make_world, to_rows):
    world = started(make_world)
    world.rows(to_rows(learning(300)))
    for _ in range(10):  # one bad batch now and then
        skip(world, 1, world.state.step)
        world.rows(to_rows(level(0.5, 20), start=world.state.step + 1))
    assert not commands(world, "rewind")
    skip(world, 4, world.state.step)
    assert not commands(world, "rewind")
    skip(world, 1, world.state.step)
    (rewind,) = commands(world, "rewind")
    assert "5 steps in a row were left out: the loss is nan" in rewind.why
    skip(world, 4, world.state.step)  # counted anew since the run went back
    assert len(commands(world, "rewind")) == 1
    replayed(world)


def test_a_run_that_is_about_to_stop_does_not_go_back_before(make_world, to_rows):
    world = started(make_world, policy=policy_of(stop_after_nonfinite=5))
    world.rows(to_rows(learning(300)))
    skip(world, 5, world.state.step)
    assert not commands(world, "rewind")


def test_overflows_of_a_gradient_scaler_are_its_own_affair(make_world, to_rows):
    world = started(make_world)
    world.rows(to_rows(learning(300)))
    for _ in range(20):
        world.feed(Safeguarded(step=300, what="overflowed", why="the scaler lowered its scale"))
    assert not commands(world, "rewind", "stop_run")


def test_weights_that_are_not_finite_go_back_where_no_guard_keeps_steps_from_them(make_world, to_rows):
    world = started(make_world, policy=policy_of(skip_nonfinite=False))
    world.rows(to_rows(np.concatenate([learning(300), np.full(40, np.nan)])))
    assert commands(world, "rewind")
    assert "not finite" in commands(world, "rewind")[0].why


def test_a_run_that_going_back_does_not_help_is_stopped(make_world, to_rows):
    world = started(
        make_world, policy=policy_of(skip_nonfinite=False, max_rewinds=2, stop_after_nonfinite=30)
    )
    world.rows(to_rows(np.concatenate([learning(300), np.full(400, np.nan)])))
    assert len(commands(world, "rewind")) == 2
    (stop,) = commands(world, "stop_run")
    assert "going back did not help" in stop.why
    replayed(world)


def test_without_a_good_state_the_rate_is_lowered_instead(make_world, to_rows):
    world = started(make_world, good=None)
    world.rows(to_rows(np.concatenate([learning(1000), level(8.0, 150)])))
    assert [c.factor for c in commands(world, "set_learning_rate")] == [0.5]
    assert "no good state is kept" in commands(world, "set_learning_rate")[0].why
    assert not answers(world, "rewound")
    replayed(world)


def test_a_users_own_step_goes_back_for_values_that_are_not_finite_only(make_world, to_rows):
    from tests.engine.conftest import RUN

    world = started(make_world, run=RUN.model_copy(update={"own_step": True}))
    world.rows(to_rows(np.concatenate([learning(1000), level(8.0, 500)])))
    assert not commands(world, "rewind")
    skip(world, 5, world.state.step)
    assert commands(world, "rewind")


def test_a_running_card_ends_when_the_trunk_goes_back(make_world, plateau_rows, to_rows):
    policy = Policy.model_validate(
        {"reasons": ["loss_plateau"], "approval": {"ask": []}, "pacing": {"max_cards": 1}}
    )
    world = make_world(policy=policy, hold={"start_trial"})
    world.start()
    world.rows(plateau_rows[:2200])
    card = world.facts("card_proposed")[0].card
    assert world.states_of(card.id)[-1] == "running"
    skip(world, 5, world.state.step)
    assert world.states_of(card.id)[-1] == "inconclusive"
    assert any(e.body.kind == "stop_trial" for e in world.log if isinstance(e, Envelope))
    assert world.state.ledger.held == 0
    told = story(card.id, [e for e in world.log if isinstance(e, Envelope)])
    assert "the trunk went back to its state of step" in told
    replayed(world)


def test_a_waiting_card_is_stale_when_the_trunk_went_back(make_world, plateau_rows):
    policy = Policy.model_validate(
        {
            "reasons": ["loss_plateau"],
            "pacing": {"max_cards": 1},
            "approval": {"auto_risk": "low", "auto_share": 0.0},
        }
    )
    world = make_world(policy=policy)
    world.start()
    world.rows(plateau_rows[:2200])
    card = world.facts("card_proposed")[0].card
    skip(world, 5, world.state.step)
    world.rows(plateau_rows[2200:2300])
    assert world.states_of(card.id) == ["stale"]


def test_rules_do_not_look_at_a_run_that_is_going_back(make_world, to_rows):
    policy = Policy.model_validate({"reasons": ["instability_spike"], "diagnostics": {"enabled": False}})
    world = make_world(policy=policy, hold={"rewind"})
    world.start()
    world.rows(to_rows(learning(300)))
    skip(world, 5, world.state.step)
    before = len(world.facts("rule_evaluated"))
    world.rows(to_rows(np.full(100, 50.0), start=world.state.step + 1))
    assert len(world.facts("rule_evaluated")) == before


def spiky(to_rows, n, spikes, start):
    rows = to_rows(level(0.5, n), start=start)
    rows[:, 3] = np.exp(0.1 * np.random.default_rng(2).standard_normal(n))
    rows[spikes, 3] = 100.0
    return rows


def test_bursts_of_spikes_cap_the_gradient_and_calm_lifts_the_cap(make_world, to_rows):
    world = started(make_world)
    world.rows(spiky(to_rows, 400, [200, 215, 230], 1))
    first, last = commands(world, "set_clip")
    assert 1.0 < first.norm < 2.0  # median and three sigmas of what was ordinary
    assert "3 spikes within 100 steps" in first.why
    assert last.norm is None
    assert world.state.guards.cap is None
    replayed(world)


def test_a_cap_is_put_on_a_bounded_number_of_times(make_world, to_rows):
    world = started(make_world, policy=policy_of(max_clips=2))
    for _ in range(4):
        world.rows(spiky(to_rows, 400, [200, 215, 230], world.state.step + 1))
    assert [c.norm is None for c in commands(world, "set_clip")] == [False, True, False, True]


def test_after_the_last_step_nothing_goes_back(make_world, to_rows):
    world = started(make_world)
    world.rows(to_rows(learning(300)))
    world.feed(TrunkEnded(step=300, why="done"))
    skip(world, 9, 300)
    assert not commands(world, "rewind", "stop_run")


@pytest.mark.parametrize("seed", range(12))
def test_sound_losses_trigger_nothing(make_world, to_rows, seed):
    # 12 runs of 3000 steps; noise from 10 to 60 %, two drops of the rate, a bump that decays.
    rng = np.random.default_rng(seed)
    steps = np.arange(3000)
    loss = 0.2 + 2.1 * np.exp(-steps / rng.uniform(50, 400)) - 0.05 * (steps > 1500) - 0.03 * (steps > 2200)
    loss *= 1 + 3 * np.exp(-np.maximum(0, steps - 2500) / 30) * (steps > 2500)
    world = started(make_world)
    rows = to_rows(loss * np.exp(rng.uniform(0.1, 0.6) * rng.standard_normal(3000)))
    world.rows(rows, (32,))
    assert not commands(world, "rewind", "set_learning_rate", "stop_run")
    replayed(world)


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 170), min_size=1, max_size=6),
    spikes=st.lists(st.integers(100, 700), max_size=8, unique=True),
    jump=st.sampled_from([1.0, 3.5, 12.0, float("nan")]),
    start=st.integers(300, 700),
)
def test_any_split_into_blocks_gives_the_same_commands(sizes, spikes, jump, start):
    # Commands are answered between blocks, so answers are held back: only what rows alone lead to is compared.
    from tests.engine.conftest import World, rows_of

    loss = learning(800)
    loss[start:] *= jump
    values = rows_of(loss)
    values[spikes, 3] = 50.0
    logs = []
    for split in ([32], sizes):
        world = World(policy=policy_of(), hold={"rewind", "set_clip", "set_learning_rate", "stop_run"})
        world.start()
        world.rows(values, split)
        logs.append([(e.seq, e.frame_cursor, e.body) for e in world.log if isinstance(e, Envelope)])
        replayed(world)
    assert logs[0] == logs[1]


MOVES = st.one_of(
    st.tuples(
        st.just("rows"), st.sampled_from([0.3, 0.5, 2.0, 9.0, 1e30, float("nan")]), st.integers(1, 150)
    ),
    st.tuples(st.just("skip"), st.just(0.0), st.integers(1, 12)),
    st.tuples(st.just("mode"), st.sampled_from(["observe", "propose", "act"]), st.just(0)),
    st.tuples(st.just("good"), st.sampled_from([None, 0, 10**9]), st.just(0)),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(MOVES, min_size=2, max_size=20))
def test_whatever_happens_rewinds_are_few_go_back_and_replay(moves):
    from tests.engine.conftest import World, rows_of

    world = World(policy=policy_of())
    world.start()
    world.rows(rows_of(learning(200)))
    for what, value, n in moves:
        match what:
            case "rows":
                world.rows(rows_of(np.full(n, value), start=world.state.step + 1))
            case "skip":
                skip(world, n, world.state.step)
            case "mode":
                world.decide("mode", mode=value)
            case "good":
                world.good = value
    asked = [e for e in world.log if isinstance(e, Envelope) and e.body.kind == "rewind"]
    assert len(asked) <= 3
    assert all(0 <= e.body.to_step <= e.frame_cursor for e in asked)
    assert all(0.0 < e.body.rate_factor <= 0.5 for e in asked)
    assert len(commands(world, "stop_run")) <= 1
    assert not any(
        c.kind in ("rewind", "set_clip", "set_learning_rate") for c in world.state.pending.values()
    )
    replayed(world)


ANEW = """
action: fork
because: The rate has ruined the network.
training_recipe: {variants: [{name: tenth, lr_mul: 0.1, restart: true}]}
budget_steps: 20
asha: {reduction_factor: 3, max_steps: 20}
"""


def test_a_ruined_network_that_a_rollback_puts_back_has_not_diverged(make_world, to_rows):
    """Its loss is far above the restarted one's, which was another trajectory's."""
    run = make_world().run.model_copy(update={"why_no_restart": None})
    world = started(make_world, run=run)
    world.rows(to_rows(level(2.3, 400)))
    world.decide("submit", body=submission_from_yaml(ANEW))
    card = world.facts("card_proposed")[0].card
    world.decide("approve", card.id, rev=card.rev)
    world.rows(to_rows(level(2.3, 100), start=401))
    assert world.states_of(card.id)[-1] == "adopted"
    world.rows(to_rows(2.0 * learning(1000), start=501))
    world.decide("rollback", card.id)
    assert world.states_of(card.id)[-1] == "rolled_back"
    world.rows(to_rows(level(2.3, 400, seed=4), start=1501))
    assert not commands(world, "rewind", "set_learning_rate")
    replayed(world)
