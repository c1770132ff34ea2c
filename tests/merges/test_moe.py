"""The unified model: mixes rightly, exports, and survives the disk."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from automode.errors import MergeError
from automode.merges.gate import Gate, fit_gate
from automode.merges.gate_evidence import gather_evidence
from automode.merges.moe import MixtureOfExperts, Task, features_and_outputs, last_layer
from automode.merges.moe_files import load, save


def mlp(seed: int = 0, outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, outputs)
    )


def random_gate(features: int = 8, experts: int = 3) -> Gate:
    gate = Gate(features, 5, experts)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for tensor in (*gate.parameters(), *gate.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        gate.mean.fill_(0.4)
        gate.outer.bias.zero_()
    return gate


def mixture(task: Task = "classification", *, outputs: int = 3, top1: bool = False) -> MixtureOfExperts:
    experts = [mlp(seed, outputs) for seed in range(3)]
    return MixtureOfExperts(experts, random_gate(), feature_layer="4", task=task, top1=top1, parent=1)


INPUTS = torch.randn(16, 4, generator=torch.Generator().manual_seed(2))


def test_classification_mixes_probabilities_and_returns_their_logarithm() -> None:
    moe = mixture()
    weights = moe.weights(INPUTS)
    each = torch.stack([expert(INPUTS).softmax(dim=1) for expert in moe.experts], dim=1)
    expected = (weights[:, :, None] * each).sum(1)
    found = moe(INPUTS)
    torch.testing.assert_close(found.exp(), expected)
    torch.testing.assert_close(found.log_softmax(dim=1), found, rtol=1e-5, atol=1e-6)
    labels = torch.arange(16) % 3
    torch.testing.assert_close(
        nn.functional.cross_entropy(found, labels), nn.functional.nll_loss(found, labels)
    )


def test_binary_mixes_probabilities_and_returns_a_logit() -> None:
    moe = mixture("binary", outputs=2)
    each = torch.stack([expert(INPUTS).sigmoid() for expert in moe.experts], dim=1)
    torch.testing.assert_close(moe(INPUTS).sigmoid(), (moe.weights(INPUTS)[:, :, None] * each).sum(1))


def test_regression_mixes_means_with_or_without_an_output_dimension() -> None:
    moe = mixture("regression", outputs=1)
    each = torch.stack([expert(INPUTS) for expert in moe.experts], dim=1)
    expected = (moe.weights(INPUTS)[:, :, None] * each).sum(1)
    torch.testing.assert_close(moe(INPUTS), expected)

    class Squeezed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, inputs: Tensor) -> Tensor:
            outputs: Tensor = self.inner(inputs)
            return outputs.squeeze(-1)

    flat = MixtureOfExperts(
        [Squeezed(expert) for expert in moe.experts],
        moe.gate,
        feature_layer="inner.4",
        task="regression",
        parent=1,
    )
    torch.testing.assert_close(flat(INPUTS), expected.squeeze(-1))


@pytest.mark.parametrize("task", ["classification", "binary", "regression"])
def test_top1_answers_with_the_first_choice_alone(task: Task) -> None:
    moe = mixture(task, top1=True)
    chosen = moe.weights(INPUTS).argmax(dim=1)
    assert len(set(chosen.tolist())) > 1, "the case must exercise more than one expert"
    each = torch.stack([expert(INPUTS) for expert in moe.experts], dim=1)
    if task == "classification":
        each = each.log_softmax(dim=-1)
    torch.testing.assert_close(moe(INPUTS), each[torch.arange(16), chosen])


def test_every_token_is_routed_by_its_own_features() -> None:
    torch.manual_seed(0)
    experts = [nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)) for _ in range(2)]
    for top1 in (False, True):
        moe = MixtureOfExperts(
            experts, random_gate(6, 2), feature_layer="2", task="classification", top1=top1
        )
        tokens = torch.randn(3, 7, 4)
        whole = moe(tokens)
        assert whole.shape == (3, 7, 5)
        changed = tokens.clone()
        changed[:, -1] += 5.0
        torch.testing.assert_close(moe(changed)[:, :-1], whole[:, :-1])


def test_the_parts_are_copies_that_are_frozen_and_evaluating() -> None:
    experts = [mlp(seed).train() for seed in range(3)]
    moe = MixtureOfExperts(experts, random_gate(), feature_layer="4", task="classification")
    before = moe(INPUTS)
    with torch.no_grad():
        experts[0][0].weight.add_(1.0)
    assert experts[0].training
    assert experts[0][0].weight.requires_grad
    assert not any(parameter.requires_grad for parameter in moe.parameters())
    assert torch.equal(moe(INPUTS), before)


def test_features_are_the_input_of_the_named_layer_from_the_same_pass() -> None:
    model = mlp().eval()
    outputs, features = features_and_outputs(model, "4", INPUTS)
    torch.testing.assert_close(features, model[:4](INPUTS))
    torch.testing.assert_close(outputs, model(INPUTS))
    assert last_layer(model) == "4"
    assert not model[4]._forward_pre_hooks


@pytest.mark.parametrize("top1", [False, True])
@pytest.mark.parametrize("task", ["classification", "binary", "regression"])
def test_it_exports_and_runs_at_other_batch_sizes(task: Task, top1: bool) -> None:
    moe = mixture(task, top1=top1)
    batch = torch.export.Dim("batch", min=2, max=1024)
    program = torch.export.export(moe, (INPUTS,), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    for inputs in (INPUTS, INPUTS[:5]):
        torch.testing.assert_close(again(inputs), moe(inputs))


def test_a_saved_mixture_loads_to_the_same_answers_and_holds_no_pickle(tmp_path: Path) -> None:
    moe = mixture(top1=False)
    save(moe, tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"weights.safetensors", "moe.json"}
    loaded = load(tmp_path / "out", lambda: mlp(seed=77))
    assert torch.equal(loaded(INPUTS), moe(INPUTS))
    assert loaded.config() == moe.config()
    assert not loaded.training


def test_shared_and_tied_weights_survive_the_disk(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(6, 4)
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            outputs: Tensor = self.head(self.embed(ids))
            return outputs

    torch.manual_seed(1)
    one = Tied()
    moe = MixtureOfExperts([one, one], random_gate(4, 2), feature_layer="head", task="classification")
    save(moe, tmp_path)
    assert len((tmp_path / "weights.safetensors").read_bytes()) < 6 * 4 * 4 * 2 + 2000
    ids = torch.arange(6)
    loaded = load(tmp_path, Tied)
    assert torch.equal(loaded(ids), moe(ids))
    assert loaded.experts[0].head.weight is loaded.experts[0].embed.weight


def test_loading_needs_neither_trainer_nor_session(tmp_path: Path) -> None:
    save(mixture(), tmp_path)
    script = (
        "import sys, torch\nfrom torch import nn\nfrom automode.merges.moe_files import load\n"
        "build = lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))\n"
        f"assert load({str(tmp_path)!r}, build)(torch.zeros(2, 4)).shape == (2, 3)\n"
        "rooms = ('automode.trainer', 'automode.session', 'automode.engine', 'lightning')\n"
        "assert not [room for room in rooms if room in sys.modules]\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_damaged_or_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="holds no mixture"):
        load(tmp_path, mlp)
    save(mixture(), tmp_path)
    with pytest.raises(MergeError, match="already holds"):
        save(mixture(), tmp_path)
    with pytest.raises(MergeError, match="not what build_model builds"):
        load(tmp_path, lambda: mlp(outputs=9))
    manifest, weights = tmp_path / "moe.json", tmp_path / "weights.safetensors"
    good_manifest, good_weights = manifest.read_text(), weights.read_bytes()
    weights.write_bytes(good_weights[:-1] + bytes([good_weights[-1] ^ 1]))
    with pytest.raises(MergeError, match="digest"):
        load(tmp_path, mlp)
    weights.unlink()
    with pytest.raises(MergeError, match="missing"):
        load(tmp_path, mlp)
    weights.write_bytes(good_weights)
    manifest.write_text(json.dumps({**json.loads(good_manifest), "surprise": 1}))
    with pytest.raises(MergeError, match="surprise"):
        load(tmp_path, mlp)
    manifest.write_text(good_manifest[:40])
    with pytest.raises(MergeError, match="not JSON"):
        load(tmp_path, mlp)


def test_parts_that_do_not_fit_are_refused() -> None:
    experts = [mlp(seed) for seed in range(3)]
    for change, what in (
        ({"experts": experts[:2]}, "2 experts came with a gate over 3"),
        ({"parent": 3}, "must be one of 0 to 2"),
        ({"task": "ranking"}, "classification, binary, regression"),
        ({"feature_layer": "9"}, "no inner module '9'"),
    ):
        settings = {"experts": experts, "feature_layer": "4", "task": "classification", **change}
        with pytest.raises(MergeError, match=what):
            MixtureOfExperts(settings.pop("experts"), random_gate(), **settings)  # type: ignore[arg-type]
    convolutions = [nn.Sequential(nn.Conv1d(2, 3, 1), nn.Flatten()) for _ in range(2)]
    moe = MixtureOfExperts(convolutions, random_gate(5, 2), feature_layer="0", task="classification")
    with pytest.raises(MergeError, match="all dimensions but the last must agree"):
        moe(torch.zeros(3, 2, 5))


def test_features_that_cannot_be_taken_are_refused() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            outputs: Tensor = self.used(x)
            return outputs

    with pytest.raises(MergeError, match="was not called"):
        features_and_outputs(Unused(), "idle", INPUTS)
    with pytest.raises(MergeError, match="no inner layer with parameters"):
        last_layer(nn.Linear(2, 2))


def test_top1_dispatch_reads_inputs_of_any_structure() -> None:
    class FromDict(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            outputs: Tensor = self.inner(batch["x"])
            return outputs

    plain = mixture(top1=True)
    wrapped = MixtureOfExperts(
        [FromDict(expert) for expert in plain.experts],
        plain.gate,
        feature_layer="inner.4",
        task="classification",
        parent=1,
        top1=True,
    )
    torch.testing.assert_close(wrapped({"x": INPUTS}), plain(INPUTS))


def test_specialists_and_gate_together_solve_what_neither_expert_does() -> None:
    # the label is the sign of x1, flipped where x0 < 0; each expert knows one half
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(800, 2, generator=generator)
    y = ((x[:, 1] > 0) ^ (x[:, 0] < 0)).long()

    def expert(sign: float) -> nn.Sequential:
        model = nn.Sequential(nn.Identity(), nn.Linear(2, 2))
        with torch.no_grad():
            model[1].weight.copy_(torch.tensor([[0.0, -5.0 * sign], [0.0, 5.0 * sign]]))
            model[1].bias.zero_()
        return model

    experts = [expert(1.0), expert(-1.0)]
    found = gather_evidence(experts, [(x[:400], y[:400])], feature_layer="1", task="classification")
    assert (found.samples, found.passes) == (400, 800)
    gate, _ = fit_gate(found.features, found.log_lik, epochs=40)
    moe = MixtureOfExperts(experts, gate, feature_layer="1", task="classification")

    def accuracy(model: nn.Module) -> float:
        return float((model(x[400:]).argmax(dim=1) == y[400:]).float().mean())

    # either expert is right for about half of the samples; the boundary between them costs the gate a little
    assert max(accuracy(one) for one in experts) < 0.65
    assert accuracy(moe) > 0.9


def test_evidence_scores_are_the_losses_by_task() -> None:
    experts = [mlp(seed).eval() for seed in range(2)]
    labels = torch.arange(16) % 3
    found = gather_evidence(
        experts,
        [(INPUTS[:10], labels[:10]), (INPUTS[10:], labels[10:])],
        feature_layer="4",
        task="classification",
    )
    expected = torch.stack(
        [-nn.functional.cross_entropy(e(INPUTS), labels, reduction="none") for e in experts], dim=1
    )
    torch.testing.assert_close(found.log_lik, expected.detach())
    targets = torch.randn(16, 3)
    found = gather_evidence(experts, [(INPUTS, targets)], feature_layer="4", task="regression")
    errors = torch.stack([(e(INPUTS) - targets).square().sum(1) for e in experts], dim=1).detach()
    difference = (found.log_lik[:, 0] - found.log_lik[:, 1]) * errors.mean(0).min() / 3 * -2
    torch.testing.assert_close(difference, errors[:, 0] - errors[:, 1], rtol=1e-3, atol=1e-3)
    bits = (targets > 0).long()
    found = gather_evidence(experts, [(INPUTS, bits)], feature_layer="4", task="binary")
    loss = nn.functional.binary_cross_entropy_with_logits(
        experts[0](INPUTS), bits.float(), reduction="none"
    ).sum(1)
    torch.testing.assert_close(found.log_lik[:, 0], -loss.detach())


def test_ignored_positions_of_sequences_are_left_out_of_the_evidence() -> None:
    torch.manual_seed(0)
    experts = [nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5)) for _ in range(2)]
    targets = torch.randint(0, 5, (3, 7))
    targets[:, :2] = -100
    found = gather_evidence(
        experts, [(torch.randn(3, 7, 4), targets)], feature_layer="1", task="classification"
    )
    assert found.features.shape == (15, 6)
    assert found.log_lik.shape == (15, 2)
    assert found.samples == 3


def test_evidence_that_does_not_line_up_is_refused() -> None:
    experts = [mlp(seed) for seed in range(2)]
    for batches, task, what in (
        ([], "classification", "no sample came"),
        ([INPUTS], "classification", r"\(inputs, targets\)"),
        ([(INPUTS, torch.zeros(16, 3))], "classification", "one class index"),
        ([(INPUTS, torch.zeros(16))], "regression", "a target for each output"),
    ):
        with pytest.raises(MergeError, match=what):
            gather_evidence(experts, batches, feature_layer="4", task=task)  # type: ignore[arg-type]
    with pytest.raises(MergeError, match="parent 2"):
        gather_evidence(experts, [], feature_layer="4", task="classification", parent=2)
