"""Cards that run: what is selected, the ladder, merges and the gate, the verdict, adoption and rolling back."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedules
from torch.utils.data import DataLoader, Dataset, TensorDataset

from automode import replay
from automode.planner.events import Weights
from automode.session import Session
from automode.testing.bench import identical
from automode.trainer.heldout import HeldOut

SLOW = 0.003
"""A rate at which the trunk hardly moves, so that a card has something to gain."""

THREE = "[{name: plain}, {name: fast, lr_mul: 30}, {name: slow, lr_mul: 0.1}]"


def card(
    *,
    selection: str = "{kind: all}",
    variants: str = THREE,
    rung: int = 8,
    top: int = 24,
    eta: int = 3,
    replay_share: float = 0.1,
    more: str = "",
) -> str:
    """A person's card as YAML."""
    return f"""
schema: 1
action: fork
reason: manual
because: The trunk hardly moves.
selection: {selection}
training_recipe:
  replay: {replay_share}
  variants: {variants}
budget_steps: {rung}
asha: {{reduction_factor: {eta}, max_steps: {top}}}
{more}
"""


def answered(text: str | Callable[[Any], str], at: int = 8, **more: Callable[[Any], Any]) -> dict[int, Any]:
    """What a person does: hand a card in, approve it at the next step."""

    def submit(person: Any) -> None:
        person.submit(text if isinstance(text, str) else text(person))

    return {at: submit, at + 1: lambda person: person.approve()} | {int(k[1:]): v for k, v in more.items()}


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, run_once: Callable[..., Any], scripts: Any) -> Any:
    """The same script, only observed."""
    return run_once(tmp_path_factory.mktemp("watched") / "run", automode="observe", script=scripts(rate=SLOW))


SCANNED = {
    "budget": "on_top",
    "reasons": ["high_loss_tail", "residual_cluster"],
    "scan": {"every": 5, "probe": 64},
}


def same_until(run: Any, other: Any) -> int:
    """How many steps two trunks took alike, bit by bit: the weights after each step, and its loss."""
    alike = 0
    for mine, theirs, a, b in zip(run.after, other.after, run.losses, other.losses, strict=False):
        if not identical(mine, theirs) or a != b:
            break
        alike += 1
    return alike


# Selections.


def test_every_training_sample_is_selected(play_run: Any, script: Any) -> None:
    run = play_run(script=script(rate=SLOW), policy={"budget": "on_top"}, actions=answered(card()))
    (resolved,) = run.bodies("resolved")
    assert (resolved["n"], resolved["pool"]) == (150, 150)
    assert run.states()[-1] == "adopted"


def test_ids_are_selected_as_they_were_named(play_run: Any, script: Any) -> None:
    seen: list[Any] = []
    text = card(
        selection="{kind: indices, ids: [3, 1, 4, 15, 92, 65]}", variants="[{name: plain}]", rung=4, top=4
    )
    run = play_run(
        script=script(rate=SLOW),
        policy={"budget": "on_top"},
        actions=answered(text, s10=lambda p: seen.append(p.data().selected.tolist())),
        steps=90,
    )
    assert seen == [[1, 3, 4, 15, 65, 92]]
    (resolved,) = run.bodies("resolved")
    assert (resolved["n"], resolved["pool"]) == (6, 150)
    assert run.states()[:2] == ["approved", "running"]


def test_a_quantile_selects_by_the_ledger_without_the_suspects(play_run: Any, script: Any) -> None:
    expected: list[list[int]] = []
    selected: list[list[int]] = []

    def approve(person: Any) -> None:
        person.approve()
        performer = person.performer
        ids = performer.selector.ledger().ids_in_quantile("last_loss", 0.4, 0.9)
        suspects = performer.scanner.noise.suspects
        assert np.isin(suspects, ids).any(), "nothing to leave out: the test would show nothing"
        expected.append(np.setdiff1d(ids, suspects).tolist())

    text = card(
        selection="{kind: quantile, from: 0.4, to: 0.9, metric: last_loss}",
        variants="[{name: plain}]",
        rung=4,
        top=4,
    )
    play_run(
        script=script(rate=SLOW),
        policy=SCANNED,
        actions={
            12: lambda p: p.submit(text),
            13: approve,
            14: lambda p: selected.append(p.data().selected.tolist()),
        },
        steps=90,
    )
    assert selected == expected
    assert 10 < len(selected[0]) < 80


@pytest.mark.parametrize("feature", ["embedding", "loss"])
def test_clusters_select_their_members(feature: str, play_run: Any, script: Any) -> None:
    expected: list[list[int]] = []
    selected: list[list[int]] = []

    def submit(person: Any) -> None:
        k = person.driver.state.clustered[-1].k if feature == "embedding" else 3
        chosen = f"{{kind: kmeans, feature: {feature}, k: {k}, clusters: [0]}}"
        person.submit(card(selection=chosen, variants="[{name: plain}]", rung=4, top=4))

    def approve(person: Any) -> None:
        person.approve()
        performer = person.performer
        ids = performer.selector.train_ids
        if feature == "embedding":
            features, _ = performer.scanner.embed(ids)
            expected.append(ids[performer.scanner.clusters.assign(features) == 0].tolist())
        else:
            losses = performer.selector.ledger().column("ema_loss", ids)
            mine = np.sort(person.resolvable(0))
            assert losses[np.isin(ids, mine)].max() < losses[~np.isin(ids, mine)].min()
            expected.append(mine.tolist())

    run = play_run(
        script=script(rate=SLOW),
        policy=SCANNED,
        actions={12: submit, 13: approve, 14: lambda p: selected.append(p.data().selected.tolist())},
        steps=90,
    )
    assert selected == expected
    (resolved,) = run.bodies("resolved")
    assert 0 < resolved["n"] < 150
    assert resolved["passes"] == (150 if feature == "embedding" else 0)


def test_clusters_that_no_scan_has_found_fail_the_card_alone(play_run: Any, script: Any) -> None:
    text = card(
        selection="{kind: kmeans, feature: embedding, k: 9, clusters: [0]}",
        variants="[{name: plain}]",
        rung=4,
        top=4,
    )
    run = play_run(
        script=script(rate=SLOW),
        policy=SCANNED,
        actions=answered(text, at=12),
        steps=90,
    )
    assert run.states() == ["approved", "running", "failed"]
    assert "the selection speaks of 9 clusters" in run.why()
    assert run.result.steps == 90


def test_excluded_samples_are_in_no_batch(play_run: Any, script: Any) -> None:
    data: list[Any] = []
    text = card(variants="[{name: plain}]", rung=4, top=4).replace(
        "training_recipe:", "training_recipe:\n  exclude: {kind: indices, ids: [0, 1, 2, 3, 4]}"
    )
    play_run(
        script=script(rate=SLOW),
        policy={"budget": "on_top"},
        actions=answered(text, s10=lambda p: data.append(p.data())),
        steps=90,
    )
    drawn = np.concatenate([data[0].selected, data[0].others])
    assert sorted(drawn.tolist()) == list(range(5, 150))


def test_what_an_adopted_card_left_out_stays_out_of_the_run_until_it_is_rolled_back(
    play_run: Any, script: Any
) -> None:
    text = card(variants="[{name: fast, lr_mul: 30}]", rung=24, top=24).replace(
        "training_recipe:", "training_recipe:\n  exclude: {kind: indices, ids: [0, 1, 2, 3, 4]}"
    )
    visits: dict[str, Any] = {}

    def each(person: Any) -> None:
        if not person.cards or person.state() not in ("adopted", "rolled_back"):
            return
        counts = person.performer.scanner.ledger().column("count", np.arange(10, dtype=np.int64)).copy()
        if person.state() == "adopted":
            visits.setdefault("adopted", counts)
            visits["last"] = counts
            if person.step == person.adopted_at + 25:
                person.ask("rollback", person.cards[-1].id)
        else:
            visits["end"] = counts

    run = play_run(
        script=script(rate=SLOW), policy={"budget": "on_top"}, actions=answered(text), each=each, steps=150
    )
    assert run.states()[-2:] == ["adopted", "rolled_back"]
    assert run.bodies("adopted")[0]["left_out"] == 5
    during, after = visits["last"] - visits["adopted"], visits["end"] - visits["last"]
    assert during[:5].tolist() == [0.0] * 5
    assert (during[5:] >= 3).all()
    assert (after >= 3).all()


# The ladder.


def test_three_variants_climb_the_ladder_against_the_trunk_itself(play_run: Any, script: Any) -> None:
    run = play_run(script=script(rate=SLOW), policy={"budget": "on_top"}, actions=answered(card()))
    told = [(d["decision"], d["trial"], d["resource"]) for d in run.bodies("trial_decided")]
    assert [t for t in told if t[0] == "started"] == [("started", i, 8) for i in range(3)]
    (promoted,) = [t for t in told if t[0] == "promoted"]
    assert promoted == ("promoted", 1, 24)
    assert ("finished", 1, 24) in told
    (started,) = run.bodies("card_started")
    assert started["control_at"] == started["step"] + 24
    base, control = run.bodies("snapshotted")
    assert (base["purpose"], base["step"]) == ("base", started["step"])
    assert (control["purpose"], control["step"]) == ("control", started["control_at"])
    weights, _ = run.checkpoint(control["checkpoint"])
    assert identical(weights, run.after[control["step"] - 1])  # the trunk as the loop had it, and no copy
    passes = {name.strip(): n for name, n in run.result.compute.items()}
    mine = run.bodies("card_started")[0]["card"]
    assert passes[f"card {mine}: trial 1"] > 24 * 30 * 3 > passes[f"card {mine}: trial 0"] > 8 * 30 * 3
    with Session.open(run.path) as session:
        roles = [(row.kind, row.parents) for row in session.lineage()]
    assert roles == [
        ("trunk", ()),
        ("specialist", ("trunk:0",)),
        ("trunk", ("trunk:0", f"{mine}:t1")),
    ]


def test_a_variant_that_cannot_be_trained_does_not_stop_the_others(play_run: Any, script: Any) -> None:
    class Fragile(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            if torch.is_autocast_enabled("cpu"):
                raise OSError("no kernel for bf16 here")
            return super().forward(x)

    variants = "[{name: bf16, precision: bf16}, {name: fast, lr_mul: 30}]"
    run = play_run(
        script=script(rate=SLOW, model=lambda: Fragile(*script().network())),
        policy={"budget": "on_top"},
        actions=answered(card(variants=variants, rung=12, top=24, eta=2)),
    )
    errors = run.bodies("trial_failed")
    assert {e["trial"] for e in errors} == {0}
    assert "no kernel for bf16" in errors[0]["error"]
    assert run.states()[-1] == "adopted"
    assert run.bodies("adopted")[0]["card"] == errors[0]["card"]


def test_a_model_that_cannot_be_copied_fails_its_trials_and_the_run_goes_on(
    play_run: Any, script: Any, watched: Any
) -> None:
    def locked() -> nn.Module:
        model = script().network()
        model.lock = threading.Lock()
        return model

    run = play_run(
        script=script(rate=SLOW, model=locked),
        policy={"budget": "on_top"},
        actions=answered(card(variants="[{name: plain}, {name: fast, lr_mul: 30}]", eta=2, rung=12)),
    )
    assert "cannot be copied" in run.bodies("trial_failed")[0]["error"]
    assert not any(d["decision"] == "requeued" for d in run.bodies("trial_decided"))  # it would fail again
    assert run.states()[-1] == "inconclusive"
    assert "none reached the top rung" in run.why()
    assert run.bodies("card_started")[0]["control_at"] > run.bodies("budget_released")[0]["spent"] == 0
    assert run.result.steps == 150
    assert same_until(run, watched) == 150


# Merges and the gate.


PLAIN_NETWORK = {"norm": False, "dropout": 0.0, "rate": SLOW}
TWO = "[{name: fast, lr_mul: 30}, {name: faster, lr_mul: 60}]"


def merged(play_run: Any, script: Any, recipe: str) -> tuple[Any, list[dict[str, Tensor]], dict[str, Tensor]]:
    """Run two specialists to one rung and merge them; the members' weights, control first, and the result's."""
    run = play_run(
        script=script(**PLAIN_NETWORK),
        policy={"budget": "on_top", "averages": {"enabled": False}},
        actions=answered(card(variants=TWO, rung=12, top=12, more=f"merge_recipe: {recipe}")),
    )
    (made,) = run.bodies("merged")
    assert math.isfinite(made["value"])
    (_, control) = run.bodies("snapshotted")
    reports = sorted(run.bodies("trial_reported"), key=lambda r: -r["value"])
    members = [
        run.checkpoint(control["checkpoint"])[0],
        *(run.checkpoint(r["checkpoint"])[0] for r in reports),
    ]
    assert made["members"] == ["control", "expert 1", "expert 2"]
    return run, members, run.checkpoint(made["weights"]["checkpoint"])[0]


def test_uniform_is_the_mean_of_control_and_specialists(play_run: Any, script: Any) -> None:
    _, members, result = merged(play_run, script, "{kind: uniform}")
    for name, weight in result.items():
        torch.testing.assert_close(weight, torch.stack([m[name] for m in members]).mean(0))


def test_greedy_is_no_worse_on_val_a_than_any_member(play_run: Any, script: Any) -> None:
    run, _, _ = merged(play_run, script, "{kind: greedy}")
    (made,) = run.bodies("merged")
    values = [r["value"] for r in run.bodies("trial_reported")] + [run.bodies("snapshotted")[1]["value"]]
    assert made["value"] >= max(values)


def test_interpolate_is_the_best_point_between_control_and_best_specialist(
    play_run: Any, script: Any
) -> None:
    _, members, result = merged(play_run, script, "{kind: interpolate, weights: [0.5, 0.75]}")
    points = [{k: torch.lerp(members[0][k], members[1][k], t) for k in result} for t in (0.5, 0.75)]
    distances = [max(float((point[k] - result[k]).abs().max()) for k in result) for point in points]
    assert min(distances) < 1e-6 < max(distances)


def test_fisher_soup_weighs_each_parameter_between_its_members(play_run: Any, script: Any) -> None:
    _, members, result = merged(play_run, script, "{kind: fisher_soup, samples: 64}")
    outside = 0
    for name, weight in result.items():
        stack = torch.stack([m[name] for m in members])
        outside += int(((weight < stack.min(0).values - 1e-5) | (weight > stack.max(0).values + 1e-5)).sum())
        assert not torch.allclose(weight, stack.mean(0), atol=1e-6), (
            "a plain mean knows no Fisher information"
        )
    assert outside == 0


def test_an_adopted_merge_becomes_the_trunk_and_its_averages_begin_anew(play_run: Any, script: Any) -> None:
    recipe = "merge_recipe: {kind: interpolate, weights: [0.5, 0.7, 0.8, 0.9]}"
    variants = "[{name: fast, lr_mul: 300}, {name: faster, lr_mul: 200}]"
    run = play_run(
        script=script(**PLAIN_NETWORK),
        policy={"budget": "on_top"},
        actions=answered(card(variants=variants, rung=12, top=12, more=recipe)),
        steps=300,
    )
    (verdict,) = run.bodies("verdict_given")
    assert (verdict["verdict"], verdict["candidate"]) == ("accepted", "merge:interpolate")
    (made,), (adopted,) = run.bodies("merged"), run.bodies("adopted")
    step = adopted["step"]
    assert identical(run.at[step], run.checkpoint(made["weights"]["checkpoint"])[0])
    before, after = (run.checkpoint(adopted[name])[1] for name in ("before", "checkpoint"))
    # A merge has no optimizer state of its own: the trunk's goes on.
    assert identical(before["optimizer"], after["optimizer"])
    assert before["averages"]["updates"] > 0 == after["averages"]["updates"]
    averages = run.driver.performer.trunk.averages
    assert averages.updates > 0


def test_the_finish_leaves_the_accepted_average_in_the_model_and_the_raw_trunk_in_the_session(
    play_run: Any, script: Any
) -> None:
    terms = {"reasons": ["merge_cadence"], "evidence": {"min_samples": 20}, "averages": {"z": 0.0}}
    noisy = script(rate=0.1, dropout=0.0)
    run = play_run(automode="act", script=noisy, policy=terms, steps=300)
    (adopted,) = run.bodies("adopted")
    steps = run.result.steps
    assert (adopted["step"], adopted["into"]) == (steps, "trunk")
    assert identical(run.final, run.checkpoint(adopted["checkpoint"])[0])
    plain = play_run(automode="observe", script=noisy, steps=300)
    assert identical(run.checkpoint(adopted["before"])[0], plain.after[steps - 1])
    assert run.bodies("run_ended")[0]["weights"] is not None
    assert identical(run.final, run.checkpoint(run.bodies("run_ended")[0]["weights"])[0])


TURN = 4  # the feature whose sign says which of two rules holds


class TwoRules(Dataset[Any]):
    """Two classes; which sign of the first feature is which class depends on the sign of another feature."""

    def __init__(self, n: int, seed: int, *, share: float = 0.5) -> None:
        rng = np.random.default_rng(np.random.SeedSequence([seed, n]))
        x = rng.standard_normal((n, 6)).astype(np.float32)
        x[:, TURN] = np.where(rng.random(n) < share, 2.0, -2.0)
        self.inputs = torch.from_numpy(x)
        self.targets = torch.from_numpy(((x[:, 0] > 0) ^ (x[:, TURN] > 0)).astype(np.int64))

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.inputs[i], self.targets[i]


def knows_one_rule() -> nn.Module:
    """A network that has learnt the rule of the negative side only."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 256), nn.ReLU(), nn.Linear(256, 2))
    data = TwoRules(400, 9, share=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.inputs), data.targets).backward()
        optimizer.step()
    return model


def test_a_fitted_gate_is_accepted_exported_and_can_be_rebuilt(play_run: Any, script: Any) -> None:
    training, held_out = TwoRules(150, 1), TwoRules(320, 2)
    right = torch.nonzero(training.inputs[:, TURN] > 0)[:, 0].tolist()
    text = card(
        selection=f"{{kind: indices, ids: {right}}}",
        variants="[{name: other, lr_mul: 3000}]",
        rung=40,
        top=40,
        replay_share=0.0,
        more="gate_recipe: {kind: switch_softmax, epochs: 6}",
    )
    run = play_run(
        script=script(
            rate=1e-4,
            model=knows_one_rule,
            make_val=lambda: DataLoader(held_out, batch_size=80),
        ),
        fit={
            "train_loader": DataLoader(
                training, batch_size=32, shuffle=True, generator=torch.Generator().manual_seed(6)
            )
        },
        policy={"budget": "on_top"},
        actions=answered(text, at=2),
        steps=300,
    )
    (fitted,) = run.bodies("gate_fitted")
    assert len(fitted["loads"]) == 2
    assert min(fitted["loads"]) > 0.2
    (verdict,) = run.bodies("verdict_given")
    assert (verdict["verdict"], verdict["candidate"]) == ("accepted", "mixture")
    (adopted,) = run.bodies("adopted")
    assert (adopted["into"], adopted["before"]) == ("export", None)
    assert run.states()[-1] == "adopted"
    mixture = run.driver.performer.combiner.mixture(adopted["checkpoint"]).eval()
    with torch.no_grad():
        mine = (mixture(held_out.inputs).argmax(1) == held_out.targets).double().mean()
        trunk = (run.made["model"].eval()(held_out.inputs).argmax(1) == held_out.targets).double().mean()
    (evaluated,) = run.bodies("evaluated")
    assert float(mine) > 0.8 > 0.7 > float(trunk)
    assert float(mine) == pytest.approx(evaluated["candidate_metrics"]["accuracy"], abs=0.06)
    assert run.result.steps == 300


# The verdict.


def test_an_accepted_specialist_becomes_the_trunk_exactly(play_run: Any, script: Any, watched: Any) -> None:
    run = play_run(script=script(rate=SLOW), policy={"budget": "on_top"}, actions=answered(card()))
    assert run.states() == ["approved", "running", "accepted", "adopted"]
    (verdict,) = run.bodies("verdict_given")
    assert verdict["z"] >= verdict["threshold"] >= 1.64
    (adopted,) = run.bodies("adopted")
    step = adopted["step"]
    assert same_until(run, watched) == step  # arms, scans and evaluations left the trunk alone until then

    (report,) = [r for r in run.bodies("trial_reported") if r["resource"] == 24]
    reference = Weights(checkpoint=report["checkpoint"], choice=report["choice"])
    candidate, rest = run.driver.performer.states.load(reference)
    stored, after = run.checkpoint(adopted["checkpoint"])
    found = run.at[step]
    assert identical(stored, found)
    parameters = [name for name, _ in run.made["model"].named_parameters()]
    assert all(torch.equal(found[name], candidate[name]) for name in parameters)
    assert identical(after["optimizer"]["state"], rest["optimizer"]["state"])
    assert after["optimizer"]["param_groups"][0]["lr"] == pytest.approx(30 * SLOW)
    assert identical(run.checkpoint(adopted["before"])[0], watched.after[step - 1])
    assert run.result.steps == 150


class Mislabelled(Dataset[Any]):
    """Held-out samples whose second half tells the wrong class; the split goes by the true one."""

    def __init__(self, data: Any, wrong: Callable[[int, int], int]) -> None:
        self.inputs, self.targets = data.tensors
        self._wrong = wrong
        half = HeldOut(DataLoader(self, batch_size=60), torch.device("cpu"), 3)
        self._second = set(half.ids[~half.is_a(half.ids)].tolist())

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        true = int(self.targets[i])
        second = getattr(self, "_second", ())
        return self.inputs[i], torch.tensor(self._wrong(i, true) if i in second else true)


@pytest.mark.parametrize(
    ("verdict", "wrong"),
    [("rejected", lambda i, true: (true + 1) % 3), ("inconclusive", lambda i, true: (i * 7919) % 3)],
)
def test_what_the_second_half_does_not_confirm_leaves_the_control(
    verdict: str, wrong: Any, play_run: Any, script: Any, watched: Any, held_out_samples: Any
) -> None:
    run = play_run(
        script=script(
            rate=SLOW,
            make_val=lambda: DataLoader(Mislabelled(held_out_samples(160, 2), wrong), batch_size=60),
        ),
        policy={"budget": "on_top"},
        actions=answered(card()),
    )
    (given,) = run.bodies("verdict_given")
    assert (given["verdict"], given["look"]) == (verdict, 1)
    assert run.states() == ["approved", "running", verdict]
    assert "the control is kept" in run.why()
    assert not run.bodies("adopted")
    assert same_until(run, watched) == 150
    assert identical(run.final, watched.final)


def test_no_look_is_spent_on_a_candidate_that_does_not_beat_the_control(
    play_run: Any, script: Any, watched: Any
) -> None:
    run = play_run(
        script=script(rate=SLOW),
        policy={"budget": "on_top", "averages": {"enabled": False}},
        actions=answered(card(variants="[{name: frozen, lr_mul: 0.0001}]", rung=40, top=40)),
    )
    (given,) = run.bodies("verdict_given")
    assert (given["verdict"], given["look"]) == ("inconclusive", None)
    assert not run.bodies("evaluated")
    assert same_until(run, watched) == 150


def test_a_slice_that_gets_worse_forbids_adoption(play_run: Any, script: Any, watched: Any) -> None:
    """The specialist is better on the whole, and worse on the samples of one rule."""
    training, held_out = TwoRules(150, 1, share=0.8), TwoRules(400, 2, share=0.8)
    right = torch.nonzero(training.inputs[:, TURN] > 0)[:, 0].tolist()
    run = play_run(
        script=script(rate=1e-4, model=knows_one_rule, make_val=lambda: DataLoader(held_out, batch_size=80)),
        fit={
            "train_loader": DataLoader(
                training, batch_size=32, shuffle=True, generator=torch.Generator().manual_seed(6)
            ),
            "slices": {"left": lambda x, y: x[:, TURN] < 0},
        },
        policy={"budget": "on_top"},
        actions=answered(
            card(
                selection=f"{{kind: indices, ids: {right}}}",
                variants="[{name: other, lr_mul: 3000}]",
                rung=40,
                top=40,
                replay_share=0.0,
            ),
            at=2,
        ),
    )
    (verdict,) = run.bodies("verdict_given")
    assert verdict["verdict"] == "inconclusive"
    assert verdict["mean"] > 0.1
    assert verdict["slices"]["left"] < -1.64
    assert "worse on left" in verdict["why"]
    assert not run.bodies("adopted")


# Rolling back.


def adopted_then_rolled_back(
    play_run: Any,
    script: Any,
    schedule: Any = None,
    variant: str = "{name: fast, lr_mul: 30, clip_norm: 5.0}",
) -> tuple[Any, int, int]:
    rolled: list[int] = []

    def each(person: Any) -> None:
        if (
            person.cards
            and person.state() == "adopted"
            and not rolled
            and person.step > person.adopted_at + 9
        ):
            rolled.append(person.step)
            person.ask("rollback", person.cards[-1].id)

    run = play_run(
        script=script(rate=SLOW, scheduler=schedule),
        policy={"budget": "on_top"},
        actions=answered(card(variants=f"[{variant}]", rung=24, top=24)),
        each=each,
        scheduler_interval="step",
    )
    assert run.states() == ["approved", "running", "accepted", "adopted", "rolled_back"]
    return run, run.bodies("adopted")[0]["step"], rolled[0]


def test_rolling_back_restores_the_trunk_of_before(play_run: Any, script: Any) -> None:
    run, adopted, rolled = adopted_then_rolled_back(play_run, script)
    before, rest = run.checkpoint(run.bodies("adopted")[0]["before"])
    assert identical(run.at[adopted], run.checkpoint(run.bodies("adopted")[0]["checkpoint"])[0])
    assert not identical(run.after[rolled - 1], before)
    assert identical(run.at[rolled], before)
    trunk = run.driver.performer.trunk
    assert trunk.clip_norm is None
    assert trunk.rates() == (SLOW,)
    norms = run.column("grad_norm")
    assert min(norms[adopted:rolled]) > 0.0  # clipping that came with the specialist is seen, and measured
    lineage = [b["node"] for b in run.bodies("lineage_grew") if b["role"] == "trunk"]
    assert lineage == ["trunk:0", "trunk:1", "trunk:2"]
    assert rest["optimizer"]["param_groups"][0]["lr"] == SLOW


ROLLED = {
    "none": None,
    "exponential": lambda o: schedules.ExponentialLR(o, 0.99),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 150),
    "one cycle": lambda o: schedules.OneCycleLR(o, max_lr=SLOW, total_steps=160, div_factor=1.5),
    "warm-up, then cosine": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.5, total_iters=60), schedules.CosineAnnealingLR(o, 90)], milestones=[60]
    ),
}


@pytest.mark.parametrize("name", ["cosine", "warm-up, then cosine", "one cycle"])
def test_after_rolling_back_the_rates_are_those_that_are_due(name: str, play_run: Any, script: Any) -> None:
    run, adopted, rolled = adopted_then_rolled_back(play_run, script, schedule=ROLLED[name])
    plain = play_run(
        automode="observe", script=script(rate=SLOW, scheduler=ROLLED[name]), scheduler_interval="step"
    )
    mine, theirs = np.array(run.column("lr_0")), np.array(plain.column("lr_0"))
    np.testing.assert_allclose(mine[:adopted], theirs[:adopted])
    np.testing.assert_allclose(mine[adopted:rolled], 30 * theirs[adopted:rolled], rtol=1e-6)
    np.testing.assert_allclose(mine[rolled:], theirs[rolled:], rtol=1e-6)


def test_an_adoption_that_fails_half_way_leaves_the_trunk_as_it_was(
    play_run: Any, script: Any, watched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from automode.errors import SessionError
    from automode.session.checkpoints import CheckpointStore

    save = CheckpointStore.save

    def full(self: Any, weights: Any, rest: Any, manifest: Any) -> str:
        if manifest["kind"] == "adopted":
            raise SessionError("saving a checkpoint failed: the disk is full")
        return save(self, weights, rest, manifest)

    monkeypatch.setattr(CheckpointStore, "save", full)
    run = play_run(script=script(rate=SLOW), policy={"budget": "on_top"}, actions=answered(card()))
    assert run.states() == ["approved", "running", "accepted", "failed"]
    assert "the disk is full" in run.why()
    assert same_until(run, watched) == 150
    assert identical(run.final, watched.final)


# Cancelling and refusing.


def test_cancelling_a_running_card_stops_its_trials_and_frees_its_budget(
    play_run: Any, script: Any, watched: Any
) -> None:
    run = play_run(
        script=script(rate=SLOW),
        policy={"budget": "on_top"},
        actions=answered(card(), s14=lambda p: p.ask("cancel", p.cards[-1].id)),
    )
    assert run.states() == ["approved", "running", "refused"]
    (stopped,) = run.bodies("stop_trial")
    assert stopped["card"] == run.bodies("card_started")[0]["card"]
    assert not [r for r in run.bodies("trial_reported") if r["resource"] == 24]
    assert len(run.bodies("snapshotted")) == 1  # the control is not waited for any more
    (released,) = run.bodies("budget_released")
    assert released["released"] > 0
    assert run.driver.state.ledger.held == 0
    assert same_until(run, watched) == 150


def test_after_a_cancelled_card_another_one_runs(play_run: Any, script: Any) -> None:
    run = play_run(
        script=script(rate=SLOW),
        policy={"budget": "on_top"},
        actions=answered(card(), s14=lambda p: p.ask("cancel", p.cards[-1].id)) | answered(card(), at=20),
    )
    first, second = [b["card"]["id"] for b in run.bodies("card_proposed")]
    assert run.states(first)[-1] == "refused"
    assert run.states(second)[-1] == "adopted"


def test_a_card_that_waited_for_another_is_stale_once_that_is_adopted(play_run: Any, script: Any) -> None:
    """It was made for weights that are no longer there (DECISIONS 18), also where somebody has approved it."""
    run = play_run(
        script=script(rate=SLOW),
        policy={"budget": "on_top"},
        actions=answered(card())
        | answered(card(variants="[{name: late, lr_mul: 2}]", rung=4, top=4), at=12)
        | {14: lambda p: p.submit(card(variants="[{name: later, lr_mul: 2}]", rung=4, top=4))},
        steps=200,
    )
    first, approved, waiting = [b["card"]["id"] for b in run.bodies("card_proposed")]
    assert run.states(first)[-1] == "adopted"
    assert run.states(approved) == ["approved", "stale"]
    assert run.states(waiting) == ["stale"]
    assert "it was made for trunk:0, and the run goes on as trunk:1" in run.why()
    assert len(run.bodies("card_started")) == 1


@pytest.mark.parametrize("mode", ["propose", "act"])
def test_with_every_card_refused_the_trunk_is_that_of_observe(
    mode: str, play_run: Any, script: Any, watched: Any
) -> None:
    def each(person: Any) -> None:
        if person.step == 30:
            person.submit(card(variants="[{name: plain}]", rung=4, top=4))
        if person.cards and person.state() == "proposed":
            person.refuse()

    run = play_run(
        automode=mode,
        script=script(rate=SLOW),
        policy={
            "reasons": ["merge_cadence", "high_loss_tail", "residual_cluster"],
            "averages": {"finish_at": 0.1},
            "approval": {"auto_share": 0.0},
            "scan": {"every": 10, "probe": 64},
        },
        each=each,
    )
    reasons = [b["card"]["reason"] for b in run.bodies("card_proposed")]
    assert {"merge_cadence", "manual"} <= set(reasons), run.bodies("request_refused")
    assert {m["after"] for m in run.bodies("card_moved")} == {"refused"}
    assert run.result.compute["automode"] > 0  # the scans
    assert 100 < run.result.steps < 150  # which the trunk paid for
    assert same_until(run, watched) == run.result.steps
    assert identical(run.final, watched.after[run.result.steps - 1])


class OverPositions(nn.Module):
    """Scores of three classes at each of five positions, classes second."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.outer(torch.relu(self.inner(x)))
        return scores.transpose(1, 2)


TASKS: dict[str, tuple[str, Callable[[], nn.Module], Any, Callable[[Tensor], Tensor]]] = {
    "values": (
        "regression",
        lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1)),
        nn.MSELoss,
        lambda x: x[:, :1] * x[:, 1:2],
    ),
    "yes or no": (
        "unknown",
        lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1)),
        nn.BCEWithLogitsLoss,
        lambda x: (x[:, :1] > 0).float(),
    ),
    "several labels": (
        "unknown",
        lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)),
        nn.BCEWithLogitsLoss,
        lambda x: (x[:, :3] > 0).float(),
    ),
    "sequences": ("sequence", OverPositions, nn.CrossEntropyLoss, lambda x: x[..., :3].argmax(-1)),
}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_card_runs_to_a_verdict_whatever_the_task(
    name: str, precision: str, play_run: Any, script: Any
) -> None:
    task, model, loss, target = TASKS[name]

    def data(n: int, seed: int) -> TensorDataset:
        shape = (n, 5, 6) if name == "sequences" else (n, 6)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return TensorDataset(x, target(x))

    run = play_run(
        script=script(
            rate=SLOW, model=model, loss=loss, make_val=lambda: DataLoader(data(160, 2), batch_size=80)
        ),
        fit={
            "train_loader": DataLoader(
                data(150, 1), batch_size=32, shuffle=True, generator=torch.Generator().manual_seed(6)
            )
        },
        policy={"budget": "on_top"},
        actions=answered(
            card(
                selection="{kind: quantile, from: 0.3, to: 1.0, exclude_suspects: false}",
                variants="[{name: fast, lr_mul: 30}, {name: weighted, lr_mul: 30, loss_weight: 3.0}]",
                rung=12,
                top=12,
                replay_share=0.5,
                more="merge_recipe: {kind: interpolate}",
            )
        ),
        precision=precision,
        clip_norm=10.0,
    )
    assert run.bodies("session_started")[0]["run"]["task"] == task
    (verdict,) = run.bodies("verdict_given")
    assert verdict["n"] == 80
    assert run.states()[-1] == {"accepted": "adopted"}.get(verdict["verdict"], verdict["verdict"])
    metrics = run.bodies("evaluated")[0]["candidate_metrics"]
    if task != "regression" and name != "yes or no":
        assert metrics["utility"] == pytest.approx(-metrics["loss"])  # judged by the loss itself
    assert all(torch.isfinite(weight).all() for weight in run.final.values())


def test_the_rules_card_runs_by_itself_in_act_mode(play_run: Any, script: Any) -> None:
    """A flat loss: the plateau rule proposes a sweep, the policy lets it run, the evidence decides; the draws replay."""
    run = play_run(
        automode="act",
        script=script(rate=1e-6),
        policy={
            "reasons": ["loss_plateau"],
            "trend": {"budget": 40},
            "approval": {"ask": []},
            "pacing": {"min_rung": 4, "max_cards": 1},
            "budget": "on_top",
        },
        steps=200,
    )
    (proposed,) = run.bodies("card_proposed")
    assert proposed["card"]["reason"] == "loss_plateau"
    states = run.states()
    assert states[:2] == ["approved", "running"]
    assert states[-1] in ("adopted", "rejected", "inconclusive")
    assert [d["decision"] for d in run.bodies("trial_decided")].count("started") == 3
    assert run.bodies("verdict_given")
    assert run.bodies("card_moved")[0]["actor"] == "policy"
    (resolved,) = run.bodies("resolved")
    drop, *drawn = resolved["variants"]
    assert (drop["name"], [v["name"] for v in drawn]) == ("third", ["draw0", "draw1"])
    assert len({v["lr_mul"] for v in drawn}) == 2
    assert all(0.03 <= v["lr_mul"] <= 3.0 for v in drawn)
    replay(run.path).check()


def test_a_replay_names_a_verdict_that_was_tampered_with(play_run: Any, script: Any, tamper: Any) -> None:
    run = play_run(script=script(rate=SLOW), policy={"budget": "on_top"}, actions=answered(card()))
    tamper(run.path, "verdict_given", lambda body: body | {"verdict": "rejected"})
    report = replay(run.path)
    assert report.differences == 1
    assert report.first is not None
    assert "verdict_given.verdict" in report.first


def test_a_terminal_shows_how_far_the_trials_have_come(play_run: Any, script: Any, capsys: Any) -> None:
    play_run(
        script=script(rate=SLOW),
        policy={"budget": "on_top"},
        actions=answered(card()),
        progress=True,
    )
    said = capsys.readouterr().err
    assert "0/3 at 8, 0/1 at 24" in said
    assert "3/3 at 8, 1/1 at 24; trial 1 leads with" in said
