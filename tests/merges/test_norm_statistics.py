"""Running statistics belong to the weights that they were computed with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from automode.errors import MergeError
from automode.merges.averages import uniform
from automode.merges.norm_statistics import recompute


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8, momentum=0.3), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2)
    )


def batches(count: int = 4, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (3 + 2 * torch.randn(size, 4, generator=generator), torch.zeros(size, dtype=torch.long))
        for _ in range(count)
    ]


def test_statistics_are_the_size_weighted_average_over_batches() -> None:
    torch.manual_seed(0)
    net = small_net()
    data = [*batches(3, 16), *batches(1, 6)]
    with torch.no_grad():
        hidden = [net[0](inputs) for inputs, _ in data]
    sizes = [len(h) for h in hidden]
    mean = sum(size * h.mean(0) for size, h in zip(sizes, hidden, strict=True)) / sum(sizes)
    variance = sum(size * h.var(0) for size, h in zip(sizes, hidden, strict=True)) / sum(sizes)
    assert recompute(net, data) == sum(sizes)
    torch.testing.assert_close(net[1].running_mean, mean)
    torch.testing.assert_close(net[1].running_var, variance)


def test_equal_batches_agree_with_torchs_update_bn_where_there_is_no_dropout() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8))
    twin = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8))
    twin.load_state_dict(net.state_dict())
    recompute(net, batches())
    torch.optim.swa_utils.update_bn(batches(), twin)
    for layer in (1, 3):
        torch.testing.assert_close(net[layer].running_mean, twin[layer].running_mean)
        torch.testing.assert_close(net[layer].running_var, twin[layer].running_var)


@pytest.mark.parametrize(("limit", "read"), [(2, 2), (16, 16), (20, 20), (33, 32), (999, 64), (None, 64)])
def test_the_limit_on_samples_is_kept(limit: int | None, read: int) -> None:
    # 33 would leave a batch of one sample, which has no variance
    assert recompute(small_net(), batches(4, 16), max_samples=limit) == read


def test_settings_flags_weights_and_random_state_are_as_before() -> None:
    net = small_net()
    net.train()
    net[0].eval()
    net[1].num_batches_tracked.fill_(17)
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    flags = [module.training for module in net.modules()]
    state = torch.get_rng_state()
    recompute(net, batches())
    assert [module.training for module in net.modules()] == flags
    assert net[1].momentum == 0.3
    assert net[1].num_batches_tracked.item() == 17
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, weights[name]) for name, p in net.named_parameters())


def test_without_norm_layers_no_batch_is_read() -> None:
    def never() -> object:
        pytest.fail("read a batch")
        yield

    assert recompute(nn.Linear(4, 2), never()) == 0  # type: ignore[arg-type]
    assert recompute(nn.BatchNorm1d(4, track_running_stats=False), never()) == 0  # type: ignore[arg-type]


def test_a_failure_leaves_the_old_statistics() -> None:
    net = small_net()
    recompute(net, batches())
    before = {key: value.clone() for key, value in net.state_dict().items()}

    def broken() -> object:
        yield 5 + torch.randn(8, 4)
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="went away"):
        recompute(net, broken())  # type: ignore[arg-type]
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert net[1].momentum == 0.3


@pytest.mark.parametrize("data", [[], [torch.zeros(1, 4)]])
def test_batches_that_give_no_variance_are_refused(data: list[Tensor]) -> None:
    net = small_net()
    with pytest.raises(MergeError, match="1 norm layers and no batch of at least 2 samples"):
        recompute(net, data)
    assert torch.equal(net[1].running_var, torch.ones(8))


def test_a_limit_below_two_is_refused() -> None:
    with pytest.raises(MergeError, match="max_samples is 1"):
        recompute(small_net(), batches(), max_samples=1)


def test_instance_norm_that_tracks_is_recomputed_too() -> None:
    net = nn.InstanceNorm1d(3, track_running_stats=True)
    recompute(net, [torch.randn(8, 3, 50, generator=torch.Generator().manual_seed(1)) + 4 for _ in range(3)])
    # the mean of 1200 unit normals per channel: 4 +- 0.03, so 0.2 is beyond six standard errors
    assert torch.allclose(net.running_mean, torch.full((3,), 4.0), atol=0.2)


def test_a_merged_net_is_right_with_its_own_statistics_and_wrong_with_a_members() -> None:
    torch.manual_seed(0)
    first, second = small_net(), small_net()
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        second[0].weight.mul_(3.0)
        second[0].bias.add_(2.0)
    for net in (first, second):
        recompute(net, batches())
    merged = small_net()
    merged.load_state_dict(uniform([first.state_dict(), second.state_dict()]))
    wrong = small_net()
    wrong.load_state_dict(
        {**merged.state_dict(), **{k: v for k, v in first.state_dict().items() if "running" in k}}
    )
    recompute(merged, batches())
    inputs = torch.cat([inputs for inputs, _ in batches()])

    def spread(net: nn.Sequential) -> Tensor:
        with torch.no_grad():
            return net.eval()[:2](inputs).std(0)

    assert torch.allclose(spread(merged), merged[1].weight.detach().abs(), atol=0.1)
    assert not torch.allclose(spread(wrong), wrong[1].weight.detach().abs(), atol=0.5)
