"""Folder names from whatever people call their runs."""

from __future__ import annotations

import errno
import os
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from automode.errors import SessionError, UsageError
from automode.session.paths import MAX_NAME, new_session_folder, slug

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@given(st.text(st.characters(exclude_categories=())))
def test_a_name_never_leaves_its_folder_and_is_good_on_every_system(text: str) -> None:
    try:
        name = slug(text, what="project")
    except UsageError:
        return
    assert Path(name).name == name
    assert 0 < len(name) <= MAX_NAME + 1
    assert len(name.encode()) < 220
    assert name[0] not in ".-"
    assert name[-1] not in ".-_"
    assert ".." not in name
    assert not set(name) & set('/\\:*?"<>|\0\n ')
    assert slug(name, what="project").lstrip("_") == name.lstrip("_")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("digits", "digits"),
        ("My run #3 (lr=1e-3)", "My-run-3-lr-1e-3"),
        ("../../etc/passwd", "etc-passwd"),
        ("C:\\Windows\\x", "C-Windows-x"),
        ("Größe 日本", "Größe-日本"),
        ("v1.2..3", "v1.2.3"),
        ("con", "_con"),
        ("NUL.txt", "_NUL.txt"),
        ("x" * 100, "x" * 48),
        (" .hidden. ", "hidden"),
        ("ﬁne", "fine"),
    ],
)
def test_names_stay_readable(text: str, name: str) -> None:
    assert slug(text, what="project") == name


@pytest.mark.parametrize("text", ["", "..", "///", "   ", "\0", "___", "🙂"])
def test_a_name_without_letter_or_digit_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="run_name needs at least one letter or digit"):
        slug(text, what="run_name")


def test_a_name_that_is_no_text_is_refused() -> None:
    with pytest.raises(UsageError, match="project must be a string, got NoneType"):
        slug(None, what="project")  # type: ignore[arg-type]


def test_the_folder_is_fresh_and_named_after_project_run_and_time(tmp_path: Path) -> None:
    folder = new_session_folder(tmp_path / "runs", "My project", "first", now=NOW)
    assert folder.is_dir()
    assert folder.parent == tmp_path / "runs" / "My-project"
    assert folder.name.startswith("first-20260102-030405-")
    assert (
        len(
            {
                folder,
                *(new_session_folder(tmp_path / "runs", "My project", "first", now=NOW) for _ in range(20)),
            }
        )
        == 21
    )


def test_an_existing_folder_is_never_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = iter(["aaaaaa", "aaaaaa", "bbbbbb"])
    monkeypatch.setattr(secrets, "token_hex", lambda _: next(tokens))
    first = new_session_folder(tmp_path, "p", "r", now=NOW)
    (first / "kept").touch()
    second = new_session_folder(tmp_path, "p", "r", now=NOW)
    assert second.name.endswith("bbbbbb")
    assert (first / "kept").exists()
    monkeypatch.setattr(secrets, "token_hex", lambda _: "aaaaaa")
    with pytest.raises(SessionError, match="no free name"):
        new_session_folder(tmp_path, "p", "r", now=NOW)


def test_the_home_folder_may_be_written_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert new_session_folder("~/runs", "p", "r", now=NOW).is_relative_to(tmp_path / "runs")


def test_without_a_time_the_present_is_taken(tmp_path: Path) -> None:
    before = datetime.now(UTC).strftime("%Y%m%d")
    name = new_session_folder(tmp_path, "p", "r").name
    assert name.split("-")[1] in (before, datetime.now(UTC).strftime("%Y%m%d"))


def test_a_folder_that_cannot_be_made_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(SessionError, match=r"making the session folder .* permissions"):
        new_session_folder(tmp_path, "p", "r", now=NOW)
    monkeypatch.undo()
    (tmp_path / "p").write_text("a file in the way")
    with pytest.raises(SessionError, match="making the session folder"):
        new_session_folder(tmp_path, "p", "r", now=NOW)
