"""Averages along a live trajectory."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

from automode.errors import MergeError
from automode.merges.trajectory import NAMES, TrajectoryAverages


def walk(steps: int, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    path = torch.randn(steps, 3, generator=generator, dtype=torch.float64).cumsum(0)
    return [{"w": row} for row in path]


def followed(path: list[dict[str, Tensor]], *, planned: int, every: int) -> TrajectoryAverages:
    averages = TrajectoryAverages(path[0], planned, every=every)
    for step, parameters in enumerate(path, start=1):
        averages.update(parameters, step)
    return averages


def test_updated_every_step_the_emas_are_bias_corrected_exponential_means() -> None:
    path = walk(200)
    found = followed(path, planned=200, every=1).candidates()
    for name, horizon in (("ema3", 6.0), ("ema10", 20.0)):
        weights = (1 - 1 / horizon) ** torch.arange(199, -1, -1, dtype=torch.float64)
        expected = (torch.stack([p["w"] for p in path]) * weights[:, None]).sum(0) / weights.sum()
        torch.testing.assert_close(found[name]["w"], expected)


def test_the_tail_weighs_the_last_quarter_like_a_uniform_average() -> None:
    # fed unit vectors, an average returns its own weights
    steps = 400
    path = [{"w": row} for row in torch.eye(steps, dtype=torch.float64)]
    weights = followed(path, planned=steps, every=1).candidates()["tail"]["w"]
    age = steps - torch.arange(1, steps + 1, dtype=torch.float64)
    assert weights.sum().item() == pytest.approx(1.0)
    assert (weights * age).sum().item() == pytest.approx(steps / 8, rel=0.02)
    assert 1 / (weights**2).sum().item() == pytest.approx(steps * 13 / 49, rel=0.02)
    assert weights[: steps // 2].sum().item() < 0.01


def test_a_sparse_cadence_tracks_the_average_of_every_step() -> None:
    path = [{"w": row} for row in torch.linspace(0, 1, 2400, dtype=torch.float64)[:, None]]
    dense = followed(path, planned=2400, every=1).candidates()
    sparse = followed(path, planned=2400, every=24).candidates()
    for name in NAMES:
        assert sparse[name]["w"].item() == pytest.approx(dense[name]["w"].item(), abs=13 / 2400)


def test_the_weights_of_uneven_gaps_follow_the_gaps() -> None:
    # the same two snapshots; the second stands for a short or a long stretch of steps
    def pair(gap: int) -> float:
        averages = TrajectoryAverages({"w": torch.zeros(1)}, 1000, every=10)
        averages.update({"w": torch.zeros(1)}, 10)
        averages.update({"w": torch.ones(1)}, 10 + gap, now=True)
        return averages.candidates()["ema10"]["w"].item()

    decay = 0.99
    for gap in (3, 40):
        expected = (1 - decay**gap) / ((1 - decay**gap) + decay**gap * (1 - decay**10))
        assert pair(gap) == pytest.approx(expected, rel=1e-5)


def test_only_due_steps_are_read_and_now_reads_between_them() -> None:
    averages = TrajectoryAverages({"w": torch.zeros(1)}, 100, every=10)
    parameters = {"w": torch.ones(1)}
    assert averages.candidates() == {}
    assert [step for step in range(1, 31) if averages.update(parameters, step)] == [10, 20, 30]
    assert not averages.update(parameters, 30, now=True)
    assert averages.update(parameters, 31, now=True)
    assert averages.updates == 4


def test_averages_that_start_late_are_not_chained_to_their_first_snapshot() -> None:
    averages = TrajectoryAverages({"w": torch.zeros(1)}, 10_000, every=10)
    averages.update({"w": torch.zeros(1)}, 5_000)
    for step in range(5_010, 5_210, 10):
        averages.update({"w": torch.ones(1)}, step)
    for state in averages.candidates().values():
        assert state["w"].item() > 0.9


def test_the_model_is_only_read() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    averages = TrajectoryAverages(dict(model.named_parameters()), 100, every=1)
    random_state = torch.get_rng_state()
    averages.update(dict(model.named_parameters()), 1)
    averages.candidates(model.state_dict())
    assert torch.equal(torch.get_rng_state(), random_state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_with_a_base_the_candidate_is_a_full_state_that_loads_strictly() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    averages = TrajectoryAverages(dict(model.named_parameters()), 100, every=1)
    for step in (1, 2):
        with torch.no_grad():
            model[0].weight.fill_(float(step))
        averages.update(dict(model.named_parameters()), step)
    for state in averages.candidates(model.state_dict()).values():
        model.load_state_dict(state, strict=True)
        assert 1.0 < state["0.weight"][0, 0].item() < 2.0
        assert state["1.num_batches_tracked"].dtype == torch.int64


def test_tied_keys_follow_their_parameter() -> None:
    embed, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = embed.weight
    model = nn.ModuleDict({"embed": embed, "head": head})
    averages = TrajectoryAverages(dict(model.named_parameters()), 100, every=1)
    averages.update(dict(model.named_parameters()), 1)
    kept = embed.weight.detach().clone()
    with torch.no_grad():
        embed.weight.zero_()
    state = averages.candidates(model.state_dict())["ema3"]
    assert torch.equal(state["head.weight"], kept)
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()


def test_half_precision_is_averaged_in_single_and_given_back_in_half() -> None:
    start = {"w": torch.ones(4, dtype=torch.bfloat16)}
    averages = TrajectoryAverages(start, 100_000, every=1)
    for step in range(1, 50):
        averages.update(start, step)
    averages.update({"w": torch.full((4,), 1.0078125, dtype=torch.bfloat16)}, 50)
    moved = averages.candidates()["ema10"]["w"]
    assert moved.dtype == torch.float32
    assert moved[0].item() > 1.0, "a step this small would be lost in bfloat16"
    assert averages.candidates(start)["ema10"]["w"].dtype == torch.bfloat16


def test_integer_parameters_are_left_to_the_base() -> None:
    parameters = {"w": torch.ones(2), "codes": torch.tensor([3, 4])}
    averages = TrajectoryAverages(parameters, 10, every=1)
    averages.update(parameters, 1)
    assert set(averages.candidates()["tail"]) == {"w"}
    assert torch.equal(averages.candidates(parameters)["tail"]["codes"], parameters["codes"])


def test_a_checkpoint_goes_on_exactly_and_loads_without_unpickling_code() -> None:
    path = walk(120)
    through = followed(path, planned=120, every=5)
    half = followed(path[:60], planned=120, every=5)
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    resumed = TrajectoryAverages(path[0], 999, every=1)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step, parameters in enumerate(path[60:], start=61):
        resumed.update(parameters, step)
    assert (resumed.planned_steps, resumed.every, resumed.updates) == (120, 5, through.updates)
    for name, state in through.candidates().items():
        assert torch.equal(resumed.candidates()[name]["w"], state["w"])


def test_a_clone_goes_its_own_way() -> None:
    averages = followed(walk(50), planned=100, every=5)
    kept = averages.candidates()["ema3"]["w"]
    fork = averages.clone()
    fork.update({"w": torch.full((3,), 1e3, dtype=torch.float64)}, 60)
    assert torch.equal(averages.candidates()["ema3"]["w"], kept)
    assert not torch.equal(fork.candidates()["ema3"]["w"], kept)


def test_restarted_averages_know_nothing_of_what_was_before() -> None:
    before, after = walk(40, seed=1), walk(60, seed=2)
    averages = followed(before, planned=100, every=4)
    averages.restart()
    assert averages.candidates() == {}
    fresh = TrajectoryAverages(after[0], 100, every=4)
    for step, parameters in enumerate(after, start=1):
        averages.update(parameters, 40 + step)
        fresh.update(parameters, step)
    for name, candidate in fresh.candidates().items():
        torch.testing.assert_close(averages.candidates()[name], candidate)


def test_what_does_not_fit_is_refused() -> None:
    averages = followed(walk(10), planned=10, every=1)
    with pytest.raises(MergeError, match="'w' is no longer there"):
        averages.update({"v": torch.zeros(3)}, 99)
    with pytest.raises(MergeError, match="first at 'w'"):
        TrajectoryAverages({"w": torch.zeros(4)}, 10).load_state_dict(averages.state_dict())
    with pytest.raises(MergeError, match="version 7"):
        averages.load_state_dict({**averages.state_dict(), "version": 7})
    with pytest.raises(MergeError, match="at least 1"):
        TrajectoryAverages({"w": torch.zeros(4)}, 0)
    with pytest.raises(MergeError, match="floating point"):
        TrajectoryAverages({"w": torch.zeros(4, dtype=torch.int64)}, 10)
    with pytest.raises(MergeError, match="base state lacks"):
        averages.candidates({"v": torch.zeros(3)})
