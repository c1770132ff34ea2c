"""Adapters: nothing at the start, their delta afterwards, and fusing is that delta exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from automode.errors import MergeError
from automode.merges.adapter_fuse import fuse, merged_state
from automode.merges.lora import LoRALinear, LowRank, adapter_of, attach, base_state


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 4))


def trained(seed: int, *, rank: int = 2, alpha: float = 8.0) -> nn.Sequential:
    model = net()
    attach(model, rank=rank, alpha=alpha, seed=seed)
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def plain(state: dict[str, Tensor]) -> nn.Sequential:
    model = net()
    model.load_state_dict(state, strict=True)
    return model.eval()


INPUTS = torch.randn(5, 6, generator=torch.Generator().manual_seed(9))


def test_a_fresh_adapter_changes_nothing_and_only_it_is_trained() -> None:
    model = net().eval()
    before = model(INPUTS)
    assert attach(model, rank=2, alpha=4.0) == ["0", "3"]
    assert torch.equal(model(INPUTS), before)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{layer}.lora_{factor}" for layer in (0, 3) for factor in "ab"
    }


def test_attaching_leaves_the_global_random_state_alone() -> None:
    model, state = net(), torch.get_rng_state()
    attach(model, rank=2, alpha=4.0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (2, 8.0), (4, 0.5)])
def test_one_adapter_with_weight_one_is_the_model_that_was_trained(rank: int, alpha: float) -> None:
    model = trained(3, rank=rank, alpha=alpha)
    fused = fuse(net().state_dict(), [adapter_of(model)], [1.0])
    torch.testing.assert_close(plain(fused)(INPUTS), model(INPUTS), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, fused[key]) for key, value in merged_state(model).items())


def test_a_rank_stabilised_scale_is_taken_as_stored() -> None:
    a, b = torch.randn(4, 6), torch.randn(8, 4)
    parent = {"layer.weight": torch.zeros(8, 6)}
    fused = fuse(parent, [{"layer": LowRank(a=a, b=b, scale=16 / 4**0.5)}], [1.0])
    torch.testing.assert_close(fused["layer.weight"], 8.0 * b @ a, rtol=1e-5, atol=1e-5)


def test_deltas_are_summed_not_factors_whatever_the_ranks_and_the_order() -> None:
    parent = net().state_dict()
    one, two = adapter_of(trained(1, rank=2)), adapter_of(trained(2, rank=3))
    fused = fuse(parent, [one, two], [0.25, -0.5])
    for layer in ("0", "3"):
        expected = parent[f"{layer}.weight"] + (0.25 * one[layer].delta() - 0.5 * two[layer].delta()).float()
        torch.testing.assert_close(fused[f"{layer}.weight"], expected, rtol=1e-5, atol=1e-6)
    other = fuse(parent, [two, one], [-0.5, 0.25])
    assert all(torch.allclose(fused[key], other[key]) for key in fused)


def test_weight_zero_and_the_untouched_layers_are_the_parent_bit_by_bit() -> None:
    parent = net().state_dict()
    fused = fuse(parent, [adapter_of(trained(1))], [0.0])
    assert all(torch.equal(fused[key], value) for key, value in parent.items())
    assert all(fused[key].data_ptr() != value.data_ptr() for key, value in parent.items())


def test_the_base_state_has_the_original_keys_and_values() -> None:
    model = trained(1)
    state = base_state(model)
    assert list(state) == list(net().state_dict())
    assert all(torch.equal(state[key], value) for key, value in net().state_dict().items())


def test_torchs_fused_encoder_computes_with_the_adapter() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    attach(layer, rank=2, alpha=4.0)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_()
    x = torch.randn(3, 5, 8)
    slow = layer.train()(x)
    with torch.no_grad():
        fast = layer.eval()(x)
    torch.testing.assert_close(fast, slow.detach(), rtol=1e-4, atol=1e-4)


def test_chosen_layers_only() -> None:
    model = net()
    assert attach(model, rank=1, alpha=1.0, targets=["3"]) == ["3"]
    assert isinstance(model[3], LoRALinear)
    assert isinstance(model[0], nn.Linear)
    assert (model[3].in_features, model[3].out_features) == (8, 4)


def test_without_adapters_fusion_is_refused() -> None:
    parent = net().state_dict()
    for adapters in ([], [{}], [adapter_of(net())]):
        with pytest.raises(MergeError, match="low-rank adapters"):
            fuse(parent, adapters, [1.0] * len(adapters))
    with pytest.raises(MergeError, match="low-rank adapters"):
        merged_state(net())


def test_adapters_of_another_model_or_of_tied_weights_are_refused() -> None:
    parent, adapter = net().state_dict(), adapter_of(trained(1))
    with pytest.raises(MergeError, match=r"'9\.weight', which the parent lacks"):
        fuse(parent, [{"9": adapter["0"]}], [1.0])
    with pytest.raises(MergeError, match=r"'3\.weight' as 8 x 6"):
        fuse(parent, [{"3": adapter["0"]}], [1.0])
    shared = torch.zeros(8, 6)
    with pytest.raises(MergeError, match="tied to"):
        fuse({"0.weight": shared, "embed.weight": shared}, [{"0": adapter["0"]}], [1.0])
    with pytest.raises(MergeError, match="one finite weight for each"):
        fuse(parent, [adapter], [float("nan")])


def test_ties_elsewhere_in_the_parent_survive() -> None:
    shared = torch.ones(3)
    parent = {"0.weight": torch.zeros(8, 6), "x": shared, "y": shared}
    fused = fuse(parent, [{"0": adapter_of(trained(1))["0"]}], [1.0])
    assert fused["x"].data_ptr() == fused["y"].data_ptr() != shared.data_ptr()


def test_what_cannot_be_attached_is_refused() -> None:
    with pytest.raises(MergeError, match="no linear layer of the model"):
        attach(net(), rank=1, alpha=1.0, targets=["2"])
    with pytest.raises(MergeError, match="rank 7"):
        attach(net(), rank=7, alpha=1.0, targets=["0"])
    with pytest.raises(MergeError, match="smaller rank"):
        attach(net(), rank=50, alpha=1.0)
    with pytest.raises(MergeError, match="already attached"):
        attach(trained(1), rank=1, alpha=1.0)
    with pytest.raises(MergeError, match="scale is nan"):
        LowRank(a=torch.zeros(2, 3), b=torch.zeros(4, 2), scale=float("nan"))
    with pytest.raises(MergeError, match=r"\[r, in\]"):
        LowRank(a=torch.zeros(2, 3), b=torch.zeros(4, 5), scale=1.0)
