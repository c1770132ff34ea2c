"""Captured logs: what the process prints, logs and warns of stands in the session's log, and still where it stood before."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from automode import Callback, Trainer
from automode.errors import UsageError
from automode.trainer.captured_logs import _Tee
from automode.trainer.result import FitResult

pytestmark = pytest.mark.torch

LOGGER = logging.getLogger("mine.own")


class Talks(Callback):
    def on_train_epoch_end(self, trainer: Any, model: Any) -> None:
        print("half a", end="")  # noqa: T201
        print(" line", file=sys.stdout)  # noqa: T201
        print("old\rnew")  # noqa: T201
        for done in range(3):
            print(f"{done} of 3", end="\r")  # noqa: T201
        print()  # noqa: T201
        LOGGER.warning("rate is %.1f", 0.5)
        LOGGER.debug("too quiet")
        warnings.warn("mind this", RuntimeWarning, stacklevel=1)
        sys.stdout.write("no end of line")


def fit(folder: Path, **given: Any) -> FitResult:
    torch.manual_seed(1)
    inputs = torch.randn(20, 5)
    model = nn.Linear(5, 2)
    trainer = Trainer(callbacks=[Talks()], session_dir=folder, progress=False, **given)
    return trainer.fit(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        loss_fn=nn.CrossEntropyLoss(),
        train_loader=DataLoader(TensorDataset(inputs, (inputs[:, 0] > 0).long()), 5),
    )


@pytest.mark.filterwarnings("default:mind this")
def test_what_is_printed_logged_and_warned_of_stands_in_the_session(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, handlers, show = sys.stdout, list(logging.getLogger().handlers), warnings.showwarning
    result = fit(tmp_path, capture_logs=True)
    assert (sys.stdout, logging.getLogger().handlers, warnings.showwarning) == (out, handlers, show)
    lines = list(result.session.log())
    printed = [line["text"] for line in lines if line["event"] == "output"]
    assert printed[:3] == ["half a line", "new", "2 of 3"]
    assert printed[3].startswith("no end of line")
    assert f"session: {result.path}" not in printed  # the session's log is closed by then
    (logged,) = [line for line in lines if line["event"] == "logged" and line["logger"] == "mine.own"]
    assert (logged["at"], logged["text"]) == ("WARNING", "rate is 0.5")
    said = capsys.readouterr().out
    assert "half a line\nold\rnew\n0 of 3\r1 of 3\r2 of 3\r\nno end of line" in said
    assert f"session: {result.path}" in said


@pytest.mark.filterwarnings("default:mind this")
def test_a_warning_that_is_shown_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: shown.append(str(message)))
    result = fit(tmp_path, capture_logs=True)
    warned = [line for line in result.session.log() if line["event"] == "warned"]
    assert [(line["category"], line["text"]) for line in warned] == [("RuntimeWarning", "mind this")]
    assert shown == ["mind this"]


@pytest.mark.filterwarnings("ignore:mind this")
def test_nothing_is_captured_unless_it_was_asked_for(tmp_path: Path) -> None:
    result = fit(tmp_path)
    assert not {"output", "logged", "warned"} & {line.get("event") for line in result.session.log()}


def test_everything_is_put_back_after_an_error(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_train_epoch_end(self, trainer: Any, model: Any) -> None:
            raise ZeroDivisionError

    before = (sys.stdout, list(logging.getLogger().handlers), warnings.showwarning)
    trainer = Trainer(callbacks=[Fails()], session_dir=tmp_path, capture_logs=True, progress=False)
    model = nn.Linear(5, 2)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            loss_fn=nn.CrossEntropyLoss(),
            train_loader=[(torch.randn(4, 5), torch.zeros(4).long())],
        )
    assert (sys.stdout, logging.getLogger().handlers, warnings.showwarning) == before


def test_it_is_asked_for_by_true() -> None:
    with pytest.raises(UsageError, match="capture_logs must be True or False"):
        Trainer(capture_logs="yes")  # type: ignore[arg-type]


def test_a_line_that_is_written_over_and_over_is_not_kept_whole() -> None:
    tee = _Tee(io.StringIO(), SimpleNamespace(log=None))  # type: ignore[arg-type]
    for ends in ("\r", ""):
        for done in range(20_000):
            tee.write(f"\r{done} of 20000{ends}")
        assert len(tee._rest) < 20
    for _ in range(1000):
        tee.write("no end " * 10)
    assert len(tee._rest) <= 4000
