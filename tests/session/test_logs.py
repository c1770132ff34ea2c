"""Two readers of one log: people at the console, programs in the file."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from automode.errors import SessionError, UsageError
from automode.session import Session, SessionStore
from automode.session.logs import SessionLog


@pytest.fixture
def console() -> list[str]:
    return []


@pytest.fixture
def log(tmp_path: Path, console: list[str]) -> Iterator[SessionLog]:
    with SessionLog(tmp_path, console=console.append) as opened:
        yield opened


def _lines(log: SessionLog) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.path.read_text(encoding="utf-8").splitlines()]


def test_a_line_is_readable_on_the_console_and_json_in_the_file(log: SessionLog, console: list[str]) -> None:
    log.logger.info("card proposed", card="c7", step=2400)
    (line,) = _lines(log)
    assert {k: line[k] for k in ("event", "card", "step", "level")} == {
        "event": "card proposed",
        "card": "c7",
        "step": 2400,
        "level": "info",
    }
    assert line["timestamp"].endswith("Z")
    (shown,) = console
    assert "card proposed" in shown
    assert "card=c7" in shown
    assert "\x1b" not in shown


def test_the_file_gets_every_level_and_the_console_those_asked_for(
    tmp_path: Path, console: list[str]
) -> None:
    with SessionLog(tmp_path, console=console.append, level="warning") as log:
        for level in ("debug", "info", "warning", "error", "critical"):
            getattr(log.logger, level)(level)
        assert [line["event"] for line in _lines(log)] == ["debug", "info", "warning", "error", "critical"]
        assert [line.split("]")[1].strip() for line in console] == ["warning", "error", "critical"]


def test_bound_values_travel_with_the_logger(log: SessionLog) -> None:
    log.logger.bind(card="c1").info("a")
    log.logger.info("b")
    assert [line.get("card") for line in _lines(log)] == ["c1", None]


def test_values_of_every_kind_can_be_logged(log: SessionLog) -> None:
    log.logger.info(
        "x",
        nan=float("nan"),
        path=Path("p"),
        many={1, 2},
        nested={"a": (1, None)},
        text="a\nb\ud800",
        obj=object,
    )
    (line,) = _lines(log)
    assert line["nan"] == "nan"
    assert line["path"] == "p"
    assert sorted(line["many"]) == [1, 2]
    assert line["nested"] == {"a": [1, None]}
    assert line["text"].startswith("a\nb")


def test_exceptions_are_logged_with_their_trace(log: SessionLog, console: list[str]) -> None:
    try:
        raise KeyError("the key")
    except KeyError:
        log.logger.exception("failed")
    (line,) = _lines(log)
    assert "KeyError: 'the key'" in line["exception"]
    assert "KeyError: 'the key'" in console[0]


def test_the_users_own_logging_is_left_alone(tmp_path: Path, console: list[str]) -> None:
    before = structlog.get_config(), list(logging.root.handlers), logging.root.level
    structlog.configure(logger_factory=structlog.testing.CapturingLoggerFactory(), processors=[_explode])
    try:
        with SessionLog(tmp_path, console=console.append) as log:
            log.logger.info("ours")
            assert structlog.get_config()["processors"] == [_explode]
        assert (list(logging.root.handlers), logging.root.level) == before[1:]
    finally:
        structlog.reset_defaults()
    assert len(console) == 1


def _explode(*_: Any) -> Any:
    raise AssertionError("the user's processors are not ours")


def test_a_torn_last_line_spoils_no_other(store: SessionStore) -> None:
    (store.path / "log.jsonl").write_text('{"event": "whole"}\n{"event": "to', encoding="utf-8")
    with SessionLog(store.path, console=lambda _: None) as log:
        log.logger.info("next")
    with Session.open(store.path) as session:
        assert [line.get("event", line.get("unreadable")) for line in session.log()] == [
            "whole",
            '{"event": "to',
            "next",
        ]


class _FullFile:
    """A file that takes ``left`` bytes more, as a full disk does."""

    def __init__(self, file: Any, left: int) -> None:
        self.file, self.left = file, left

    def write(self, data: bytes) -> int:
        if self.left <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        part = data[: self.left]
        self.left -= len(part)
        return int(self.file.write(part))

    def close(self) -> None:
        self.file.close()


@pytest.mark.parametrize("left", [0, 10])
def test_a_full_disk_does_not_fail_the_run_and_the_file_says_what_it_missed(
    log: SessionLog, console: list[str], left: int
) -> None:
    log.logger.info("before")
    real = log._file
    log._file = _FullFile(real, left)  # type: ignore[assignment]
    for _ in range(3):
        log.logger.info("lost")
    log._file = real
    log.logger.info("after")
    assert sum("cannot be written" in line for line in console) == 1
    assert sum("lost" in line for line in console) == 3
    text = log.path.read_text(encoding="utf-8").splitlines()
    assert json.loads(text[0])["event"] == "before"
    assert [json.loads(line)["event"] for line in text[-2:]] == ["3 log lines are missing here", "after"]


def test_after_closing_only_the_console_hears(log: SessionLog, console: list[str]) -> None:
    log.close()
    log.logger.info("late")
    assert _lines(log) == []
    assert len(console) == 1


def test_an_unknown_level_and_a_missing_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="level must be one of debug, info, warning, error, got 'loud'"):
        SessionLog(tmp_path, level="loud")
    with pytest.raises(SessionError, match="opening the log"):
        SessionLog(tmp_path / "missing")


def test_without_a_console_lines_go_to_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with SessionLog(tmp_path) as log:
        log.logger.warning("watch out")
    out, err = capsys.readouterr()
    assert out == ""
    assert "watch out" in err
