"""Per-sample losses equal the user's loss where they are given, and a reason stands where they are not."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from automode.errors import DataError
from automode.trainer.per_sample import per_sample_twin
from automode.trainer.tasks import margins, task_of

pytestmark = pytest.mark.torch

N, C, T = 12, 5, 7
WEIGHT = torch.tensor([0.2, 3.0, 1.0, 0.5, 2.0])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def classes(seed: int = 0) -> tuple[Tensor, Tensor]:
    g = generator(seed)
    return torch.randn(N, C, generator=g), torch.randint(0, C, (N,), generator=g)


def ignored(seed: int = 0) -> tuple[Tensor, Tensor]:
    scores, targets = classes(seed)
    targets[3] = -100
    return scores, targets


def sequence(seed: int = 0) -> tuple[Tensor, Tensor]:
    g = generator(seed)
    targets = torch.randint(0, C, (N, T), generator=g)
    targets[:, 4:][torch.rand(N, T - 4, generator=g) < 0.5] = -100
    return torch.randn(N, C, T, generator=g), targets


def features(seed: int = 0) -> tuple[Tensor, Tensor]:
    g = generator(seed)
    return torch.randn(N, 3, generator=g), torch.randn(N, 3, generator=g)


def binary(seed: int = 0) -> tuple[Tensor, Tensor]:
    g = generator(seed)
    return torch.randn(N, 1, generator=g), torch.randint(0, 2, (N, 1), generator=g).float()


def chances(seed: int = 0) -> tuple[Tensor, Tensor]:
    scores, targets = binary(seed)
    return scores.sigmoid(), targets


class Focal(nn.Module):
    """A user's own loss without a ``reduction``."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.tensor(2.0))

    def forward(self, scores: Tensor, targets: Tensor) -> Tensor:
        losses = F.cross_entropy(scores, targets, reduction="none")
        return ((1 - (-losses).exp()) ** self.gamma * losses).mean()


def huber_by_hand(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.where(
        (outputs - targets).abs() < 1, 0.5 * (outputs - targets) ** 2, (outputs - targets).abs() - 0.5
    ).mean()


def tokens_last(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.reshape(-1, C), targets.reshape(-1))


def own_function(outputs: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
    losses = (outputs - targets).abs().mean(1)
    return losses if reduction == "none" else losses.sum()


EXACT: dict[str, tuple[Any, Callable[[int], tuple[Tensor, Tensor]], str]] = {
    "cross entropy": (nn.CrossEntropyLoss(), classes, "module"),
    "cross entropy, sum": (nn.CrossEntropyLoss(reduction="sum"), classes, "module"),
    "cross entropy, weighted": (nn.CrossEntropyLoss(weight=WEIGHT), classes, "module"),
    "cross entropy, weighted and smoothed": (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1), classes, "module"),
    "cross entropy, an ignored target": (nn.CrossEntropyLoss(), ignored, "module"),
    "cross entropy, sequence": (nn.CrossEntropyLoss(), sequence, "module"),
    "functional": (F.cross_entropy, classes, "function"),
    "functional, partial": (functools.partial(F.cross_entropy, weight=WEIGHT, ignore_index=2), classes, "function"),
    "nll": (lambda o, y: F.nll_loss(F.log_softmax(o, 1), y), classes, "vmap"),
    "mse": (nn.MSELoss(), features, "module"),
    "mse, sum": (nn.MSELoss(reduction="sum"), features, "module"),
    "kl, batchmean": (nn.KLDivLoss(reduction="batchmean"), lambda s: (features(s)[0].log_softmax(1), features(s)[1].softmax(1)), "module"),
    "bce with logits": (nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0)), binary, "module"),
    "bce": (nn.BCELoss(), chances, "module"),
    "lambda": (lambda o, y: 1.0 * F.cross_entropy(o, y), classes, "vmap"),
    "own module with a parameter": (Focal(), classes, "vmap"),
    "own expression": (huber_by_hand, features, "vmap"),
    "own function that takes reduction": (own_function, features, "function"),
    "flattened tokens": (tokens_last, lambda s: (torch.randn(N, T, C, generator=generator(s)), torch.randint(0, C, (N, T), generator=generator(s))), "vmap"),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_each_sample_has_the_loss_that_it_has_alone(name: str) -> None:
    loss_fn, data, how = EXACT[name]
    twin = per_sample_twin(loss_fn)
    for seed in range(4):
        outputs, targets = data(seed)
        assert twin.check(outputs, targets, loss_fn(outputs, targets)), twin.reason
    assert twin.how == how
    losses = twin(outputs, targets)
    assert losses.shape == (N,)
    if "weight" in name or "partial" in name:
        return  # alone, a weighted mean divides its own weight out: see the test below
    alone = torch.stack([loss_fn(outputs[i : i + 1], targets[i : i + 1]).detach() for i in range(N)])
    if name in ("mse, sum", "kl, batchmean"):
        alone = alone / outputs.shape[1]  # several elements a sample have their mean
    torch.testing.assert_close(losses, alone, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_a_weighted_loss_keeps_its_weights_per_sample() -> None:
    outputs, targets = classes()
    loss_fn = nn.CrossEntropyLoss(weight=WEIGHT)
    twin = per_sample_twin(loss_fn)
    assert twin.check(outputs, targets, loss_fn(outputs, targets))
    expected = WEIGHT[targets] * F.cross_entropy(outputs, targets, reduction="none")
    torch.testing.assert_close(twin(outputs, targets), expected)


def test_ignored_targets_that_first_come_later_are_understood() -> None:
    loss_fn = nn.CrossEntropyLoss()
    twin = per_sample_twin(loss_fn)
    for outputs, targets in (classes(0), ignored(1), classes(2)):
        assert twin.check(outputs, targets, loss_fn(outputs, targets)), twin.reason
    losses = twin(*ignored(1))
    assert losses.isnan().tolist() == [index == 3 for index in range(N)]


def test_a_first_batch_of_one_sample_does_not_settle_mean_or_sum() -> None:
    loss_fn = nn.CrossEntropyLoss(reduction="sum")
    twin = per_sample_twin(loss_fn)
    outputs, targets = classes()
    assert twin.check(outputs[:1], targets[:1], loss_fn(outputs[:1], targets[:1]))
    assert twin.check(outputs, targets, loss_fn(outputs, targets)), twin.reason
    assert not twin.check(outputs, targets, loss_fn(outputs, targets) / N)


def drawing(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    losses = F.cross_entropy(F.dropout(outputs, 0.5), targets, reduction="none")
    return losses if reduction == "none" else losses.mean()


def drawing_python(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets) + 0 * random.random()


def drawing_numpy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets) + 0 * float(np.random.rand())  # noqa: NPY002


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs @ outputs.T, targets % outputs.shape[0])


def regularised(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets) + outputs.std()


def reading(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets) * (1.0 if outputs.sum().item() > 0 else 2.0)


@pytest.mark.parametrize(
    "loss_fn", [drawing, drawing_python, drawing_numpy, contrastive, regularised, reading]
)
def test_a_loss_without_an_exact_twin_is_refused_with_a_reason_and_leaves_the_random_states(
    loss_fn: Any,
) -> None:
    outputs, targets = classes()
    loss = loss_fn(outputs, targets)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    twin = per_sample_twin(loss_fn)
    assert not twin.check(outputs, targets, loss)
    assert twin.reason is not None
    assert "no per-sample losses" in twin.reason
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002
    with pytest.raises(DataError, match="no per-sample losses"):
        twin(outputs, targets)


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_a_loss_that_broadcasts_is_refused_although_its_mean_agrees() -> None:
    outputs, targets = torch.randn(N, 1), torch.randn(N)
    twin = per_sample_twin(nn.MSELoss())
    assert not twin.check(outputs, targets, nn.MSELoss()(outputs, targets))
    assert twin.reason is not None
    assert "broadcasts" in twin.reason


def test_a_loss_that_changes_later_is_refused_from_then_on() -> None:
    loss_fn = nn.CrossEntropyLoss()
    twin = per_sample_twin(loss_fn)
    outputs, targets = classes()
    assert twin.check(outputs, targets, loss_fn(outputs, targets))
    assert not twin.check(outputs, targets, 1.0001 * loss_fn(outputs, targets))
    assert not twin.check(outputs, targets, loss_fn(outputs, targets))
    assert twin.reason is not None
    assert "training loss" in twin.reason


def test_a_non_finite_first_loss_settles_nothing() -> None:
    twin = per_sample_twin(nn.CrossEntropyLoss())
    outputs, targets = classes()
    assert not twin.check(outputs * float("nan"), targets, float("nan"))
    assert twin.reason is None
    assert twin.check(outputs, targets, F.cross_entropy(outputs, targets))


def test_live_parameters_of_the_loss_are_followed_and_its_state_is_not_touched() -> None:
    class Counting(Focal):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, scores: Tensor, targets: Tensor) -> Tensor:
            self.calls += 1
            self.seen = self.seen + 1
            return super().forward(scores, targets)

    loss_fn = Counting()
    twin = per_sample_twin(loss_fn)
    outputs, targets = classes()
    assert twin.check(outputs, targets, loss_fn(outputs, targets))
    with torch.no_grad():
        loss_fn.gamma.fill_(0.5)
    assert twin.check(outputs, targets, loss_fn(outputs, targets)), twin.reason
    assert loss_fn.calls == 2
    assert loss_fn.seen.item() == 2


def test_the_users_module_keeps_its_reduction_and_its_hooks_are_not_called() -> None:
    loss_fn = nn.MSELoss()
    calls: list[int] = []
    loss_fn.register_forward_hook(lambda *_: calls.append(1))
    twin = per_sample_twin(loss_fn)
    outputs, targets = features()
    assert twin.check(outputs, targets, loss_fn(outputs, targets))
    assert loss_fn.reduction == "mean"
    assert len(calls) == 1


def test_low_precision_outputs_are_compared_at_their_precision() -> None:
    outputs, targets = classes()
    low = outputs.bfloat16()
    twin = per_sample_twin(nn.CrossEntropyLoss())
    assert twin.check(low, targets, F.cross_entropy(low, targets))
    assert twin(low, targets).dtype == torch.float32


def test_outputs_and_targets_may_be_structures() -> None:
    def loss_fn(outputs: dict[str, Tensor], targets: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(outputs["class"], targets[0]) + F.mse_loss(outputs["box"], targets[1])

    (scores, labels), (box, true_box) = classes(), features()
    outputs, targets = {"class": scores, "box": box}, (labels, true_box)
    twin = per_sample_twin(loss_fn)
    assert twin.check(outputs, targets, loss_fn(outputs, targets)), twin.reason
    assert task_of(outputs, targets) == "unknown"


@pytest.mark.parametrize(
    ("outputs", "targets", "task"),
    [
        (*classes(), "classification"),
        (*sequence(), "sequence"),
        (torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.long), "sequence"),
        (*binary(), "binary"),
        (torch.randn(4), torch.tensor([0, 1, 1, 0]), "binary"),
        (*features(), "regression"),
        (torch.randn(4, 1), torch.randn(4), "regression"),
        (torch.randn(4, 2), torch.randn(4), "unknown"),
        (torch.randn(4, 2), torch.randn(3), "unknown"),
        ((torch.randn(4),), torch.randn(4), "unknown"),
    ],
)
def test_the_task_is_read_off_a_batch(outputs: Any, targets: Any, task: str) -> None:
    assert task_of(outputs, targets) == task


LABELS = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("loss_fn", "targets", "task"),
    [
        (nn.MSELoss(), LABELS, "regression"),
        (F.huber_loss, LABELS, "regression"),
        (lambda outputs, targets: (outputs - targets).abs().mean(), LABELS, "regression"),
        (nn.BCEWithLogitsLoss(), LABELS, "unknown"),
        (functools.partial(F.binary_cross_entropy_with_logits, reduction="sum"), LABELS, "unknown"),
        (nn.CrossEntropyLoss(), LABELS / LABELS.sum(1, keepdim=True), "unknown"),
        (nn.PoissonNLLLoss(), LABELS, "unknown"),
        (nn.MSELoss(), LABELS[:, 0], "unknown"),
        (nn.CrossEntropyLoss(), LABELS[:, 0].long(), "classification"),
    ],
)
def test_distances_of_logits_from_their_labels_are_no_regression(
    loss_fn: Any, targets: Tensor, task: str
) -> None:
    assert per_sample_twin(loss_fn).task(torch.randn(2, 3), targets) == task


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    """A supervised contrastive loss: outputs are embeddings, and labels say which of them belong together."""
    unit = F.normalize(outputs)
    alone = torch.eye(len(unit), dtype=torch.bool)
    logs = (unit @ unit.T / 0.2).masked_fill(alone, -1e9).log_softmax(1)
    same = (targets[:, None] == targets) & ~alone
    return -(logs * same).sum(1).div(same.sum(1).clamp(min=1)).mean()


def focal(outputs: Tensor, targets: Tensor) -> Tensor:
    log_p = F.log_softmax(outputs, 1).gather(1, targets[:, None])
    return -((1 - log_p.exp()) ** 2 * log_p).mean()


def by_prototypes(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss that holds the class weights, so that outputs are features of as many numbers as there happen to be."""
    weights = torch.randn(outputs.shape[1], outputs.shape[1], generator=generator(1))
    return F.cross_entropy(F.normalize(outputs) @ weights, targets)


def shares() -> tuple[Tensor, Tensor]:
    outputs, targets = features()
    return outputs, targets.sigmoid()


def quantile(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.maximum(0.9 * (targets - outputs), -0.1 * (targets - outputs)).mean()


@pytest.mark.parametrize(
    ("loss_fn", "data", "task"),
    [
        (lambda o, t: 2.0 * F.cross_entropy(o, t), classes, "classification"),
        (lambda o, t: F.cross_entropy(o, t, label_smoothing=0.2, weight=WEIGHT), classes, "classification"),
        (focal, classes, "classification"),
        (lambda o, t: -o.gather(1, t[:, None]).log().mean(), classes, "classification"),  # of probabilities
        (lambda o, t: 2.0 * F.multi_margin_loss(o, t), classes, "classification"),
        (contrastive, classes, "unknown"),
        (by_prototypes, classes, "unknown"),
        (lambda o, t: o.pow(2).mean() + 0.0 * t.sum(), classes, "unknown"),
        (lambda o, t: F.mse_loss(o, t) + 3.0, features, "regression"),
        (lambda o, t: (o - t).cosh().log().mean(), features, "regression"),
        (lambda o, t: F.mse_loss(o, t).sqrt(), features, "regression"),
        (quantile, features, "unknown"),
        (lambda o, t: 2.0 * F.binary_cross_entropy_with_logits(o, t), shares, "unknown"),
        (lambda o, t: 2.0 * F.poisson_nll_loss(o, t), shares, "unknown"),
    ],
)
@pytest.mark.parametrize("checked", [False, True])
def test_a_loss_of_the_users_own_is_asked_what_outputs_mean(
    loss_fn: Any, data: Any, task: str, checked: bool
) -> None:
    outputs, targets = data()
    twin = per_sample_twin(loss_fn)
    if checked:
        twin.check(outputs, targets, loss_fn(outputs, targets))
    state = torch.get_rng_state()
    assert twin.task(outputs, targets) == task
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loss_is_asked_once_and_a_run_that_is_taken_up_remembers_the_answer() -> None:
    asked: list[int] = []

    def counted(outputs: Tensor, targets: Tensor) -> Tensor:
        asked.append(1)
        return contrastive(outputs, targets)

    first, again = per_sample_twin(counted), per_sample_twin(counted)
    assert first.task(*classes()) == "unknown"
    asked.clear()
    again.load(first.state())
    assert first.task(*classes(1)) == again.task(*classes(2)) == "unknown"
    assert asked == []


def test_a_loss_that_cannot_be_asked_means_what_it_looks_like_and_keeps_its_state() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            self.calls += 1
            torch.rand(1)
            if self.calls > 1:
                raise ValueError("these are no outputs of mine")
            return F.cross_entropy(outputs, targets)

    loss_fn = Picky()
    state = torch.get_rng_state()
    assert per_sample_twin(loss_fn).task(*classes()) == "classification"
    assert loss_fn.calls == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_a_margin_is_the_true_score_less_the_best_other() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [0.0, 0.0, -1.0], [1.0, 2.0, 3.0]])
    found = margins(scores, torch.tensor([0, 1, 0, -100]))
    assert found[:3].tolist() == [1.0, -2.0, 0.0]
    assert found[3].isnan()
    pair = margins(scores[:, :2], torch.tensor([0, 1, 0, -100]))
    assert pair[:3].tolist() == [2.0, -2.0, 0.0]
    assert pair[3].isnan()


def test_the_margin_of_a_single_score_counts_from_its_threshold() -> None:
    scores, targets = torch.tensor([[0.75], [0.75]]), torch.tensor([1.0, 0.0])
    assert margins(scores, targets).tolist() == [0.75, -0.75]
    assert margins(scores, targets, probabilities=True).tolist() == [0.25, -0.25]


@pytest.mark.parametrize(
    ("loss_fn", "data", "probabilities"),
    [
        (nn.BCELoss(), chances, True),
        (nn.BCEWithLogitsLoss(), binary, False),
        (lambda o, y: 1.0 * F.binary_cross_entropy(o, y), chances, True),
        (lambda o, y: 1.0 * F.binary_cross_entropy_with_logits(o, y), chances, False),
    ],
)
def test_probabilities_are_told_from_logits_by_the_loss(loss_fn: Any, data: Any, probabilities: bool) -> None:
    twin = per_sample_twin(loss_fn)
    outputs, targets = data()
    assert twin.check(outputs, targets, loss_fn(outputs, targets)), twin.reason
    assert twin.probabilities is probabilities
