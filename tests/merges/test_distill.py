"""Distillation: many networks into one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from automode.errors import MergeError
from automode.merges.distill import distance, distill, ensemble
from automode.merges.moe import Task


def net(seed: int, outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, outputs))


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        yield torch.randn(32, 5, generator=generator), torch.zeros(32)


INPUTS = torch.randn(64, 5, generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("task", ["classification", "binary", "regression"])
def test_a_student_comes_closer_to_its_teachers_on_inputs_it_never_saw(task: Task) -> None:
    teachers = [net(seed) for seed in (1, 2)]
    teacher, student = ensemble(teachers, task=task), net(9)

    def gap() -> float:
        with torch.no_grad():
            return float(distance(student.eval()(INPUTS), teacher(INPUTS), task=task, temperature=1.0))

    before = gap()
    report = distill(
        student,
        teacher,
        batches,
        steps=150,
        teacher_passes=2,
        task=task,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
    )
    assert gap() < 0.5 * before
    assert report.last_loss < report.first_loss
    assert (report.steps, report.samples, report.passes) == (150, 150 * 32, 150 * 32 * 5)


def test_distances_are_the_divergences_of_the_textbook() -> None:
    student, teacher = torch.randn(6, 4), torch.randn(6, 4)
    p, q = (teacher / 3).softmax(1), (student / 3).softmax(1)
    expected = 9 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(distance(student, teacher, task="classification", temperature=3.0), expected)
    p, q = (teacher / 3).sigmoid(), (student / 3).sigmoid()
    expected = 9 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    torch.testing.assert_close(
        distance(student, teacher, task="binary", temperature=3.0), expected, rtol=1e-4, atol=1e-5
    )
    for task in ("classification", "binary", "regression"):
        assert distance(teacher, teacher, task=task, temperature=2.0).abs().item() < 1e-6  # type: ignore[arg-type]


def test_log_probabilities_teach_like_logits() -> None:
    student, logits = torch.randn(6, 4), torch.randn(6, 4) + 7
    for temperature in (1.0, 4.0):
        torch.testing.assert_close(
            distance(student, logits.log_softmax(1), task="classification", temperature=temperature),
            distance(student, logits, task="classification", temperature=temperature),
        )


def test_an_ensemble_averages_what_the_task_calls_for() -> None:
    models = [net(seed).eval() for seed in (1, 2, 3)]
    outputs = torch.stack([model(INPUTS) for model in models])
    for task, back, expected in (
        ("classification", torch.exp, outputs.softmax(-1).mean(0)),
        ("binary", torch.sigmoid, outputs.sigmoid().mean(0)),
        ("regression", torch.clone, outputs.mean(0)),
    ):
        torch.testing.assert_close(back(ensemble(models, task=task)((INPUTS, None))), expected)  # type: ignore[arg-type]


def test_the_global_random_state_the_teachers_and_the_flags_are_left_alone() -> None:
    teachers, student = [net(1).train()], net(2)
    student[0].eval()
    weights = {key: value.clone() for key, value in teachers[0].state_dict().items()}
    flags = [module.training for module in student.modules()]
    state = torch.get_rng_state()
    distill(student, ensemble(teachers, task="classification"), batches, steps=3, teacher_passes=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[key]) for key, value in teachers[0].state_dict().items())
    assert teachers[0].training
    assert [module.training for module in student.modules()] == flags
    assert all(parameter.grad is None for parameter in student.parameters())


def test_the_same_seed_gives_the_same_student() -> None:
    students = [net(2), net(2), net(2)]
    teacher = ensemble([net(1)], task="classification")
    for student, seed in zip(students, (5, 5, 6), strict=True):
        distill(student, teacher, batches, steps=4, teacher_passes=1, seed=seed)
    assert torch.equal(students[0][0].weight, students[1][0].weight)
    assert not torch.equal(students[0][0].weight, students[2][0].weight), "dropout derives from the seed"


def test_frozen_parameters_stay() -> None:
    student = net(2)
    student[0].requires_grad_(False)
    before = student[0].weight.clone()
    distill(student, ensemble([net(1)], task="classification"), batches, steps=3, teacher_passes=1)
    assert torch.equal(student[0].weight, before)


def test_what_cannot_be_distilled_is_refused() -> None:
    teacher = ensemble([net(1)], task="classification")
    for settings, what in (
        ({"steps": 0}, "0 distillation steps"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"teacher_passes": -1}, "teacher's passes"),
        ({"batches": list}, "no batch came"),
        ({"student": net(2).requires_grad_(False)}, "nothing to train"),
        ({"student": net(2, outputs=4)}, "they must agree"),
        ({"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=float("inf"))}, "learning rate"),
        (
            {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=float("inf")), "steps": 1},
            "last step",
        ),
    ):
        given = {"student": net(2), "batches": batches, "steps": 5, "teacher_passes": 1, **settings}
        with pytest.raises(MergeError, match=what):
            distill(given.pop("student"), teacher, given.pop("batches"), **given)  # type: ignore[arg-type]
    with pytest.raises(MergeError, match="0 models"):
        ensemble([], task="regression")
