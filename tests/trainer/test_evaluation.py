"""Scores are each sample's own, on the scale that acceptance needs, and leave no trace in model or random state."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from automode.errors import DataError, UsageError
from automode.planner.metrics import log_likelihood
from automode.trainer.evaluation import Evaluator
from automode.trainer.heldout import HeldOut
from automode.trainer.per_sample import per_sample_twin
from automode.trainer.steps import pair_step

pytestmark = pytest.mark.torch

CPU = torch.device("cpu")
N, C = 50, 4


def evaluator(dataset: TensorDataset, loss_fn: Any) -> Evaluator:
    held = HeldOut(DataLoader(dataset, batch_size=16, shuffle=True), CPU, 0)
    return Evaluator(
        step_fn=pair_step(loss_fn, CPU),
        batches=held.batches,
        per_sample=per_sample_twin(loss_fn),
        autocast=contextlib.nullcontext,
    )


class Net(nn.Module):
    """Dropout, batch norm and a part that the user keeps in evaluation mode while training."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.frozen = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).eval()
        self.head = nn.Linear(8, outputs)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            raise RuntimeError("no forward today")
        return self.head(self.frozen(self.body(x)))


def classes() -> TensorDataset:
    torch.manual_seed(0)
    return TensorDataset(torch.randn(N, 6), torch.randint(0, C, (N,)))


def flags(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def plain_outputs(model: nn.Module, x: Tensor) -> Tensor:
    before = flags(model)
    model.eval()
    with torch.no_grad():
        outputs = model(x)
    for module, flag in zip(model.modules(), before, strict=True):
        module.training = flag
    return outputs


@pytest.mark.parametrize("part", ["A", "B", None])
def test_each_class_sample_has_its_own_loss_probability_and_utility(part: Any) -> None:
    data = classes()
    model = Net(C)
    scores = evaluator(data, nn.CrossEntropyLoss()).scores(model, part)
    x, y = data[torch.from_numpy(scores.ids)]
    outputs = plain_outputs(model, x)
    p = outputs.softmax(1)
    right = (p.argmax(1) == y).double()
    true = p[torch.arange(len(y)), y]
    np.testing.assert_allclose(scores.loss, F.cross_entropy(outputs, y, reduction="none"), rtol=1e-5)
    np.testing.assert_allclose(scores.p_true, true, rtol=1e-5)
    np.testing.assert_array_equal(scores.correct, right)
    np.testing.assert_allclose(scores.utility, 0.8 * right + 0.2 * true, rtol=1e-5)
    assert scores.n == (N if part is None else N // 2)


def test_scores_can_be_cut_to_a_slice() -> None:
    scores = evaluator(classes(), nn.CrossEntropyLoss()).scores(Net(C), None)
    part = scores.where(scores.ids < 10)
    assert part.ids.tolist() == list(range(10))
    assert part.correct is not None
    assert len(part.utility) == len(part.correct) == len(part.loss) == 10


def test_values_are_judged_by_a_huber_loss_whose_scale_stays_as_first_seen() -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(N, 6), 100 * torch.randn(N, 1))
    judge = evaluator(data, nn.MSELoss())
    model = Net(1)
    scores = judge.scores(model, None)
    outputs, targets = plain_outputs(model, data.tensors[0]), data.tensors[1]
    assert judge.delta == pytest.approx(float(targets[:16].double().std()))
    expected = F.huber_loss(outputs.double(), targets.double(), reduction="none", delta=judge.delta)
    np.testing.assert_allclose(scores.utility, -expected[:, 0], rtol=1e-5)
    np.testing.assert_allclose(scores.loss, F.mse_loss(outputs, targets, reduction="none")[:, 0], rtol=1e-4)
    assert scores.correct is None
    before = judge.delta
    data.tensors[1].mul_(10)
    judge.scores(model, None)
    assert judge.delta == before


def test_squared_errors_on_zeros_and_ones_are_a_regression() -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(N, 6), torch.randint(0, 2, (N, 1)).float())
    for loss_fn in (nn.MSELoss(), lambda o, y: ((o - y) ** 2).mean()):
        judge = evaluator(data, loss_fn)
        assert judge.scores(Net(1), None).correct is None
        assert judge.task == "regression"


@pytest.mark.parametrize("probabilities", [False, True])
def test_single_scores_are_read_as_the_loss_reads_them(probabilities: bool) -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(N, 6), torch.randint(0, 2, (N, 1)).float())
    model = nn.Sequential(nn.Linear(6, 1), nn.Sigmoid()) if probabilities else nn.Linear(6, 1)
    scores = evaluator(data, nn.BCELoss() if probabilities else nn.BCEWithLogitsLoss()).scores(model, None)
    outputs = plain_outputs(model, data.tensors[0])
    one = outputs if probabilities else outputs.sigmoid()
    true = torch.where(data.tensors[1] > 0.5, one, 1 - one)[:, 0]
    np.testing.assert_allclose(scores.p_true, true, rtol=1e-5)
    np.testing.assert_array_equal(scores.correct, (true > 0.5).double())


def test_sequences_are_judged_by_their_likelihood() -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.randint(0, 9, (N, 7)), torch.randint(0, C, (N, 7)))
    model = nn.Embedding(9, C)

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.transpose(1, 2), targets)

    judge = evaluator(data, loss_fn)
    scores = judge.scores(model, None)
    expected = F.cross_entropy(
        model(data.tensors[0]).transpose(1, 2), data.tensors[1], reduction="none"
    ).mean(1)
    np.testing.assert_allclose(scores.utility, -expected.detach(), rtol=1e-5)
    assert judge.task == "sequence"


@pytest.mark.parametrize("fails", [False, True])
def test_a_look_leaves_flags_statistics_gradients_and_random_states(fails: bool) -> None:
    model = Net(C)
    model.fails = fails
    judge = evaluator(classes(), nn.CrossEntropyLoss())
    model.train()
    model.frozen.eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = flags(model), {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no forward") if fails else contextlib.nullcontext():
        judge.scores(model, None)
    assert flags(model) == before[0]
    assert not model.frozen.training
    assert model.body.training
    assert all(torch.equal(value, before[1][name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before[2])
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters() if p.grad is not None)


def test_a_part_without_samples_is_refused() -> None:
    def nothing(_: Any) -> Iterator[Any]:
        return iter(())

    judge = evaluator(classes(), nn.CrossEntropyLoss())
    judge.batches = nothing
    with pytest.raises(DataError, match="val-B holds no sample"):
        judge.scores(Net(C), "B")


def test_a_loss_without_per_sample_values_gives_each_sample_its_batch_mean() -> None:
    data = classes()
    model = Net(C)

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) + outputs.std()

    scores = evaluator(data, loss_fn).scores(model, None)
    first = loss_fn(plain_outputs(model, data.tensors[0][:16]), data.tensors[1][:16])
    np.testing.assert_allclose(scores.loss[:16], float(first.detach()), rtol=1e-5)
    assert scores.correct is not None


def test_each_metric_is_of_the_sample_itself_and_higher_where_the_model_is_better() -> None:
    data = classes()
    model = Net(C)
    scores = evaluator(data, nn.CrossEntropyLoss(label_smoothing=0.3)).scores(model, "A")
    x, y = data[torch.from_numpy(scores.ids)]
    outputs = plain_outputs(model, x)
    np.testing.assert_allclose(scores.by("nll"), -F.cross_entropy(outputs, y, reduction="none"), rtol=1e-5)
    np.testing.assert_array_equal(scores.by("accuracy"), outputs.argmax(1) == y)
    np.testing.assert_array_equal(scores.by("utility"), scores.utility)
    for metric in ("huber", "mse"):
        with pytest.raises(UsageError, match="of values, and these samples have none"):
            scores.by(metric)


def test_samples_of_a_class_count_as_the_loss_weighs_it() -> None:
    dataset, weight = classes(), torch.tensor([1.0, 20.0, 0.0, 3.0])
    model = Net(C)
    plain = evaluator(dataset, nn.CrossEntropyLoss()).scores(model, "A")
    for loss_fn in (nn.CrossEntropyLoss(weight=weight), functools.partial(F.cross_entropy, weight=weight)):
        found = evaluator(dataset, loss_fn).scores(model, "A")
        assert found.correct is not None
        assert np.array_equal(found.correct, plain.by("accuracy"))  # what is known of a sample stays as it is
        weights = weight[dataset.tensors[1][found.ids]].double().numpy()
        for metric in ("accuracy", "utility", "log_score", "nll"):
            expected = np.average(plain.by(metric), weights=weights)
            assert found.by(metric).mean() == pytest.approx(expected)
            assert not np.isclose(expected, plain.by(metric).mean(), rtol=1e-3)
        some = found.ids % 2 == 0
        assert found.where(some).weight is not None
        expected = np.average(plain.utility[some], weights=weights[some])
        assert found.where(some).by("utility").mean() == pytest.approx(expected)


def test_classes_that_all_weigh_alike_or_nothing_change_no_score() -> None:
    dataset, model = classes(), Net(C)
    plain = evaluator(dataset, nn.CrossEntropyLoss()).scores(model, None)
    assert plain.weight is None
    for weight in (torch.ones(C), torch.zeros(C)):
        found = evaluator(dataset, nn.CrossEntropyLoss(weight=weight)).scores(model, None)
        assert np.array_equal(found.by("utility"), plain.by("utility"))


def test_positives_count_as_their_weight_says() -> None:
    torch.manual_seed(0)
    dataset = TensorDataset(torch.randn(N, 6), torch.randint(0, 2, (N, 1)).float())
    model = Net(1)
    plain = evaluator(dataset, nn.BCEWithLogitsLoss()).scores(model, None)
    found = evaluator(dataset, nn.BCEWithLogitsLoss(pos_weight=torch.tensor([9.0]))).scores(model, None)
    weights = 1.0 + 8.0 * dataset.tensors[1][found.ids, 0].numpy()
    expected = np.average(plain.by("utility"), weights=weights)
    assert found.by("utility").mean() == pytest.approx(expected)
    assert plain.weight is None


@pytest.mark.parametrize("outputs", [1, 3])
def test_values_have_a_squared_and_a_huber_error(outputs: int) -> None:
    torch.manual_seed(2)
    data = TensorDataset(torch.randn(N, 6), torch.randn(N, outputs) * 5)
    model = Net(outputs)
    scores = evaluator(data, nn.L1Loss()).scores(model, "B")
    x, y = data[torch.from_numpy(scores.ids)]
    squared = ((plain_outputs(model, x).double() - y.double()) ** 2).mean(dim=1)
    np.testing.assert_allclose(scores.by("mse"), -squared, rtol=1e-5)
    np.testing.assert_array_equal(scores.by("huber"), scores.utility)
    np.testing.assert_array_equal(
        scores.where(scores.ids % 2 == 0).by("mse"), scores.by("mse")[scores.ids % 2 == 0]
    )
    for metric in ("accuracy", "nll", "log_score"):
        with pytest.raises(UsageError, match="of classes, and these samples have none"):
            scores.by(metric)


def test_one_sample_cannot_make_the_log_likelihood_infinite() -> None:
    found = log_likelihood([0.0, 1e-300, 0.5, 1.0 + 1e-9, float("nan")])
    np.testing.assert_allclose(found[:4], [np.log(1e-12), np.log(1e-12), np.log(0.5), 0.0])
    assert np.isnan(found[4])
