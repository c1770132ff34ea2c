"""Every argument of the Trainer is checked, and the message says what came, what was needed and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from automode.errors import PolicyError, UsageError
from automode.planner.policy import Policy
from automode.trainer.settings import Settings, device_of, policy_of
from automode.trainer.trainer import Trainer

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"max_epochs": 2, "max_steps": 3}, "give exactly one"),
    ({"max_epochs": 0}, "max_epochs must be a whole number at least 1, got 0"),
    ({"max_epochs": True}, "max_epochs must be a whole number"),
    ({"max_steps": 2.5}, "max_steps must be a whole number at least 1, got 2.5"),
    ({"automode": "observ"}, "did you mean 'observe'"),
    ({"automode": "Act"}, "did you mean 'act'"),
    ({"automode": 1}, "True \\(the same as 'act'\\)"),
    ({"policy": 3}, "policy must be a Policy, the name of a preset or the path"),
    ({"policy": "no/such/policy.yaml"}, "cannot be read"),
    ({"policy": "defualt"}, "did you mean 'default'"),
    ({"session_dir": 3}, "session_dir must be a path"),
    ({"val_every_n_epochs": -1}, "val_every_n_epochs must be a whole number at least 0"),
    ({"do_test_after": "yes"}, "do_test_after must be True or False, got 'yes'"),
    ({"device": "cudaa"}, "device='cudaa' cannot be used here"),
    ({"device": "meta"}, "holds no numbers"),
    ({"precision": "bf61"}, "did you mean 'bf16'"),
    ({"precision": 16}, "precision must be one of"),
    ({"clip_norm": 0}, "clip_norm must be a number above 0"),
    ({"clip_norm": float("nan")}, "clip_norm must be a number above 0"),
    ({"seed": -1}, "seed must be a whole number from 0 to 4294967295"),
    ({"seed": 1 << 32}, "seed must be a whole number from 0 to 4294967295"),
    (
        {"progress": "on"},
        r"progress must be one of 'auto', 'tqdm', 'rich', 'notebook', True or False; got 'on'",
    ),
    ({"scheduler_interval": "epochs"}, "did you mean 'epoch'"),
    ({"project": ""}, "project must be a string with a letter or digit"),
    ({"run_name": "///"}, "run_name must be a string with a letter or digit"),
    ({"run_name": None}, "run_name must be a string"),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=lambda part: str(part)[:40])
def test_a_wrong_argument_is_refused_with_what_was_needed(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        device_of(Trainer(**given).settings.device, [])


def test_neither_epochs_nor_steps_means_one_epoch() -> None:
    assert Settings().epochs == 1
    assert Settings(max_epochs=7).epochs == 7
    assert Settings(max_steps=7).epochs is None


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        (False, "off"),
        (True, "act"),
        ("off", "off"),
        ("observe", "observe"),
        ("propose", "propose"),
        ("act", "act"),
    ],
)
def test_true_means_act_and_false_means_off(given: Any, mode: str) -> None:
    assert Settings(automode=given).mode == mode


def test_a_policy_comes_as_itself_as_a_preset_as_a_file_or_by_default(tmp_path: Path) -> None:
    mine = Policy(name="mine")
    file = tmp_path / "careful.yaml"
    file.write_text("name: careful\npacing: {max_cards: 2}\n", encoding="utf-8")
    assert policy_of(mine) is mine
    assert policy_of(None) == Policy()
    assert policy_of(file).pacing.max_cards == 2
    assert policy_of(str(file)).name == "careful"
    assert policy_of("conservative").name == "conservative"


def test_a_file_that_is_no_policy_is_refused_with_its_name_and_the_line(tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text("name: broken\npacing: {max_cardz: 2}\n", encoding="utf-8")
    with pytest.raises(PolicyError, match=r"(?s)broken\.yaml.*line 2.*max_cardz"):
        Trainer(policy=file)


def test_auto_trains_where_the_model_is_unless_there_is_a_gpu() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert device_of("auto", [torch.zeros(1)]).type == expected
    assert device_of("auto", []).type == expected
    assert device_of("cpu", [torch.zeros(1)]).type == "cpu"
    assert device_of(torch.device("cpu"), []).type == "cpu"
