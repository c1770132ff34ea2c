"""The probe reads what a plain loop would have read, disturbs nothing, and says why where it cannot read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from automode.errors import DataError
from automode.trainer.gradient_norms import HeldGradients, grad_norms
from automode.trainer.ids import RecordedLoader
from automode.trainer.per_sample import PerSampleLoss, per_sample_twin
from automode.trainer.probe import Probe
from automode.trainer.sample_ledger import SampleLedger

pytestmark = pytest.mark.torch

N, D, C = 60, 6, 3


class Run:
    """A small training run with a probe, and beside it what a plain loop with ``.item()`` reads."""

    def __init__(
        self,
        *,
        last: nn.Module | None = None,
        loss_fn: Callable[..., Any] | None = None,
        batch_size: int = 16,
        in_place_reset: bool = False,
        **options: Any,
    ) -> None:
        torch.manual_seed(1)
        self.data = TensorDataset(torch.randn(N, D), torch.randint(0, C, (N,)))
        self.model = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, C), *([last] if last else []))
        self.loss_fn = loss_fn or nn.CrossEntropyLoss()
        self.loader = RecordedLoader(DataLoader(self.data, batch_size=batch_size, shuffle=True))
        self.twin: PerSampleLoss = per_sample_twin(self.loss_fn)
        self.truth = SampleLedger(N)
        self.probe = Probe(self.model.parameters(), self.twin, self.loader, SampleLedger(N), **options)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.in_place_reset = in_place_reset
        self.plain: list[tuple[float, float]] = []
        self.step = 0

    def epoch(self, spoil: Callable[[Tensor, Tensor], None] | None = None, **also: Any) -> None:
        for x, y in self.loader:
            self.optimizer.zero_grad(set_to_none=not self.in_place_reset)
            outputs = self.model(x)
            loss = self.loss_fn(outputs, y)
            loss.backward()
            self.step += 1
            norm = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in self.model.parameters()))
            self.plain.append((loss.item(), norm))
            ids = np.array(self.loader.ids_of_batch())
            scores = outputs.detach()
            losses = F.cross_entropy(scores, y, reduction="none").numpy()
            gap = scores.gather(1, y[:, None])[:, 0] - scores.scatter(1, y[:, None], -math.inf).amax(1)
            self.truth.update(ids, losses, gap.numpy(), (gap > 0).numpy())
            args = {"outputs": outputs, "targets": y, "ids": self.loader.ids_of_batch(), **also}
            self.probe.record(self.step, loss, None, (0.1,), True, **args)
            self.optimizer.step()
            if spoil:
                spoil(outputs, y)


def assert_same_ledger(found: SampleLedger | None, expected: SampleLedger) -> None:
    assert found is not None
    for name in ("count", "flips", "forgetting", "last_correct"):
        np.testing.assert_array_equal(found.column(name), expected.column(name), err_msg=name)
    for name in ("mean_loss", "last_loss", "ema_loss", "margin"):
        np.testing.assert_allclose(
            found.column(name), expected.column(name), rtol=1e-5, atol=1e-6, err_msg=name
        )


def test_rows_hold_what_a_plain_loop_reads() -> None:
    run = Run(clock=iter(range(1000)).__next__)
    run.epoch()
    run.epoch()
    blocks = run.probe.drain()
    assert [block.first_row for block in blocks] == [0]
    assert blocks[0].names == ("step", "time", "loss", "grad_norm", "lr_0", "applied", "finite")
    rows = blocks[0].rows
    assert rows.dtype == np.float64
    assert rows[:, 0].tolist() == list(range(1, 9))
    np.testing.assert_allclose(rows[:, 2:4], run.plain, rtol=1e-6)
    assert rows[:, 4:].tolist() == [[0.1, 1.0, 1.0]] * 8
    assert blocks[0].first_step == 1
    assert run.probe.drain() == []


def test_the_ledger_holds_what_a_step_by_step_reading_gives() -> None:
    run = Run()
    for _ in range(5):
        run.epoch()
        run.probe.drain()
    assert run.probe.reason is None
    assert_same_ledger(run.probe.ledger, run.truth)
    run.epoch()
    assert_same_ledger(run.probe.ledger, run.truth)


@pytest.mark.parametrize("capacity", [1, 3, 100])
def test_rows_do_not_depend_on_where_blocks_end(capacity: int) -> None:
    run = Run(capacity=capacity)
    run.epoch()
    run.epoch()
    rows = np.concatenate([block.rows for block in run.probe.drain()])
    np.testing.assert_allclose(rows[:, 2:4], run.plain, rtol=1e-6)


def test_a_last_layer_that_works_in_place_is_read_right() -> None:
    run = Run(last=nn.ReLU(inplace=True))
    for _ in range(3):
        run.epoch()
    assert_same_ledger(run.probe.ledger, run.truth)
    assert run.probe.overwritten == 0


def test_outputs_written_to_afterwards_are_left_out_and_then_copied() -> None:
    run = Run()
    run.epoch(spoil=lambda outputs, _: outputs.detach().zero_())
    ledger = run.probe.ledger
    assert run.probe.overwritten == N
    assert ledger is not None
    assert ledger.visits == 0
    run.truth = SampleLedger(N)
    run.epoch(spoil=lambda outputs, _: outputs.detach().zero_())
    assert_same_ledger(run.probe.ledger, run.truth)
    assert run.probe.reason is None


def test_targets_written_to_afterwards_are_left_out_too() -> None:
    run = Run()
    run.epoch(spoil=lambda _, targets: targets.fill_(0))
    assert run.probe.ledger is not None
    assert run.probe.overwritten == N


def test_a_model_that_returns_one_buffer_is_noticed_though_no_version_tells() -> None:
    buffer = torch.zeros(4, C)
    targets = torch.arange(4) % C
    loader = RecordedLoader(DataLoader(TensorDataset(torch.arange(4)), batch_size=4))
    probe = Probe([], per_sample_twin(nn.CrossEntropyLoss()), loader, SampleLedger(4))
    shared = np.from_dlpack(buffer)
    last = 0.0
    for turn in range(6):
        for _ in loader:
            np.copyto(shared, np.arange(4 * C).reshape(4, C) % (turn + 2))  # unseen by the version counter
            loss = F.cross_entropy(buffer, targets)
            last = loss.item()
            probe.record(turn, loss, 1.0, (), True, buffer, targets, loader.ids_of_batch())
        if turn == 2:
            probe.drain()
            assert probe.ledger is not None
            assert probe.overwritten == 8
    assert probe.ledger is not None
    assert probe.reason is None
    assert probe.ledger.visits == 4 * 4
    assert probe.ledger.column("last_loss").mean() == pytest.approx(last)


def test_gradients_reset_in_place_are_read_at_once() -> None:
    run = Run(in_place_reset=True)
    run.epoch()
    run.epoch()
    np.testing.assert_allclose(run.probe.drain()[0].rows[:, 3], [norm for _, norm in run.plain], rtol=1e-6)


def test_a_held_gradient_that_is_written_to_is_not_reported() -> None:
    parameter = nn.Parameter(torch.ones(4))
    held = HeldGradients([parameter])
    found: dict[int, float] = {}
    for row in range(8):
        parameter.grad = torch.full((4,), float(row))
        norm = held.take(row)
        if row == 6:
            parameter.grad.zero_()
        assert isinstance(norm, float)
        found[row] = norm
    assert [math.isnan(norm) for norm in found.values()] == [False] * 4 + [True] * 4
    closed = held.close()
    assert closed[5] == 10.0
    assert math.isnan(closed[6])
    assert held.take(8) == 14.0  # holding is over


def test_a_parameter_that_is_thawed_on_the_way_counts_from_then_on() -> None:
    always, later = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(9), requires_grad=False)
    held = HeldGradients([later, always])
    found: dict[int, float] = {}
    for row in range(12):
        later.requires_grad_(row >= 6)
        always.grad = torch.full((4,), 2.0)
        later.grad = torch.full((9,), 1.0) if row >= 6 else None
        norm = held.take(row)
        assert isinstance(norm, float)
        found[row] = norm
    found |= held.close()
    np.testing.assert_allclose(list(found.values()), [4.0] * 6 + [5.0] * 6)


def test_held_gradients_of_which_some_are_missing_are_each_read_right() -> None:
    short, long = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(9))
    held = HeldGradients([short, long])
    found: dict[int, float] = {}
    for row in range(12):
        short.grad = None if row == 7 else torch.full((4,), 2.0)
        long.grad = None if row == 9 else torch.full((9,), 1.0)
        norm = held.take(row)
        assert isinstance(norm, float)
        found[row] = norm
    closed = held.close()
    assert sorted(closed) == [row for row, norm in found.items() if math.isnan(norm)]
    found |= closed
    np.testing.assert_allclose(list(found.values()), [5.0] * 7 + [3.0, 5.0, 4.0, 5.0, 5.0])


@pytest.mark.parametrize("missing", [False, True])
def test_norms_of_sparse_low_precision_and_missing_gradients(missing: bool) -> None:
    table = nn.Embedding(5, 3, sparse=True)
    half = nn.Parameter(torch.full((70000,), 200.0, dtype=torch.float16))
    unused = nn.Parameter(torch.ones(2))
    (table(torch.tensor([1, 1, 4])).sum() + (half * (0 if missing else 1)).float().sum()).backward()
    norms = [norm.item() for norm in grad_norms([*table.parameters(), half, unused])]
    assert norms == pytest.approx([math.sqrt(3 * 4 + 3 * 1), 0.0 if missing else math.sqrt(70000)], rel=1e-5)


def test_a_non_finite_step_is_flagged_and_kept_out_of_the_ledger() -> None:
    run = Run()
    run.epoch()
    visits = run.truth.visits
    with torch.no_grad():
        run.model[0].weight[0, 0] = math.nan
    run.epoch()
    rows = run.probe.drain()[0].rows
    assert rows[:, 6].tolist() == [1.0] * 4 + [0.0] * 4
    assert run.probe.ledger is not None
    assert run.probe.ledger.visits == visits
    assert run.probe.ledger.skipped == N
    assert run.probe.reason is None


def test_metrics_are_columns_and_other_names_start_another_block() -> None:
    run = Run()
    run.epoch(metrics={"accuracy": torch.tensor(0.5), "count": 3})
    run.epoch()
    first, second = run.probe.drain()
    assert first.names[-2:] == ("accuracy", "count")
    assert first.rows[:, -2:].tolist() == [[0.5, 3.0]] * 4
    assert first.rows[:, 6].tolist() == [1.0] * 4
    assert second.names[-1] == "finite"
    assert second.first_row == 4
    np.testing.assert_allclose(
        np.concatenate([first.rows[:, 2], second.rows[:, 2]]), [x for x, _ in run.plain], rtol=1e-6
    )


@pytest.mark.parametrize("value", ["high", torch.ones(2), None])
def test_a_metric_that_is_no_number_is_refused_by_name(value: Any) -> None:
    with pytest.raises(DataError, match="metric 'note' is"):
        Probe([]).record(1, 0.5, 1.0, (0.1,), True, metrics={"note": value})


def test_a_block_is_full_by_rows_and_by_bytes() -> None:
    probe = Probe([], capacity=3)
    assert [probe.record(i, 0.5, 1.0, (), True) for i in range(4)] == [False, False, True, True]
    probe.drain()
    assert not probe.record(4, 0.5, 1.0, (), True)
    run = Run(max_bytes=1000)
    run.epoch()
    assert len(run.probe._feed.visits) >= run.probe._feed.max_visits == 3  # 16 rows of 20 bytes each


def test_a_loss_without_a_twin_ends_the_ledger_and_not_the_run() -> None:
    run = Run(loss_fn=lambda outputs, y: F.cross_entropy(outputs, y) + outputs.std())
    run.epoch()
    rows = run.probe.drain()[0].rows
    np.testing.assert_allclose(rows[:, 2], [loss for loss, _ in run.plain], rtol=1e-6)
    assert run.probe.reason is not None
    assert "no per-sample losses" in run.probe.reason
    assert run.probe.ledger is not None
    assert run.probe.ledger.visits == 0


def test_a_loss_that_changes_in_mid_run_ends_the_ledger_where_it_changed() -> None:
    run = Run()
    run.epoch()
    assert run.probe.ledger is not None
    assert run.probe.ledger.visits == N
    run.loss_fn = lambda outputs, y: F.cross_entropy(outputs, y) * 0.5
    run.epoch()
    assert run.probe.ledger.visits == N
    assert run.probe.reason is not None


def test_outputs_of_other_samples_than_the_batch_end_the_ledger() -> None:
    run = Run()
    run.epoch(ids=[1, 2])
    assert run.probe.ledger is not None
    assert run.probe.reason is not None
    assert "a row for each of the 2 samples" in run.probe.reason


def test_sequences_of_several_lengths_are_entered() -> None:
    loader = RecordedLoader(DataLoader(TensorDataset(torch.arange(8)), batch_size=4))
    loss_fn = nn.CrossEntropyLoss()
    probe = Probe([], per_sample_twin(loss_fn), loader, SampleLedger(8))
    expected = []
    for length in (3, 3, 5):
        for _ in loader:
            outputs, targets = torch.randn(4, C, length), torch.randint(0, C, (4, length))
            expected.append(F.cross_entropy(outputs, targets, reduction="none").mean(1))
            probe.record(1, loss_fn(outputs, targets), 1.0, (), True, outputs, targets, loader.ids_of_batch())
    assert probe.ledger is not None
    assert probe.reason is None
    np.testing.assert_allclose(probe.ledger.column("last_loss"), torch.cat(expected[-2:]), rtol=1e-5)
    assert probe.ledger.visits == 24


def test_observing_changes_no_weight_and_no_random_number() -> None:
    def train(*, observed: bool) -> tuple[list[Tensor], Tensor]:
        run = Run(last=nn.Dropout(0.2))
        for _ in range(3):
            for x, y in run.loader if observed else run.loader.loader:
                run.optimizer.zero_grad()
                outputs = run.model(x)
                loss = run.loss_fn(outputs, y)
                loss.backward()
                if observed and run.probe.record(
                    1, loss, None, (0.1,), True, outputs, y, run.loader.ids_of_batch()
                ):
                    run.probe.drain()
                run.optimizer.step()
        return [p.detach().clone() for p in run.model.parameters()], torch.get_rng_state()

    (plain, plain_state), (observed, observed_state) = train(observed=False), train(observed=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, observed, strict=True))
    assert torch.equal(plain_state, observed_state)
