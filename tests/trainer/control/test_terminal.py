"""The terminal is as it was before whatever happens; keys order what they stand for."""

from __future__ import annotations

import codecs
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from automode.errors import ConflictError
from automode.planner.controls import Order
from automode.trainer.control import Control
from automode.trainer.key_presses import HELP, KeyPresses

pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(sys.platform == "win32", reason="a terminal there has no settings to be restored"),
]

TERMINAL = Path(__file__).parents[3] / "automode" / "trainer" / "terminal.py"
PATIENCE = 120.0

# The script's own terminal: a session of its own takes the pseudo-terminal over. Loaded by its file, terminal.py needs no torch.
BEGIN = f"""
import fcntl, importlib.util, os, signal, sys, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
spec = importlib.util.spec_from_file_location("terminal", {str(TERMINAL)!r})
terminal = importlib.util.module_from_spec(spec)
sys.modules["terminal"] = terminal
spec.loader.exec_module(terminal)
"""
TAKE = """
one = terminal.Terminal()
try:
    assert one.open()
    print("open", flush=True)
    while True:
        keys = one.read()
        if keys:
            print("keys", keys, flush=True)
        if "x" in keys:
            raise ArithmeticError
        if "e" in keys:
            break
        time.sleep(0.01)
finally:
    one.close()
"""


class Screen:
    """A process in a pseudo-terminal."""

    def __init__(self, script: str) -> None:
        import pty

        self.master, slave = pty.openpty()
        self.before = self.settings
        self.process = subprocess.Popen(
            [sys.executable, "-c", script], stdin=slave, stdout=slave, stderr=slave, start_new_session=True
        )
        os.close(slave)
        self.text = ""
        self._decode = codecs.getincrementaldecoder("utf-8")().decode

    @property
    def settings(self) -> list[Any]:
        import termios

        return termios.tcgetattr(self.master)

    def until(self, wanted: str) -> None:
        """Read until it has printed this."""
        import select

        deadline = time.monotonic() + PATIENCE
        while wanted not in self.text:
            assert time.monotonic() < deadline, self.text
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.text += self._decode(os.read(self.master, 4096))
                except OSError:
                    raise AssertionError(f"it has hung up: {self.text}") from None

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def wait_for(self, what: Any) -> None:
        deadline = time.monotonic() + PATIENCE
        while not what():
            assert time.monotonic() < deadline, self.text
            time.sleep(0.01)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE)
        os.close(self.master)


@pytest.fixture
def screen() -> Iterator[Any]:
    started: list[Screen] = []

    def start(script: str) -> Screen:
        started.append(Screen(script))
        return started[-1]

    yield start
    for each in started:
        each.close()


def taken(before: list[Any], now: list[Any]) -> bool:
    import termios

    return bool(before[3] & termios.ICANON and not now[3] & (termios.ICANON | termios.ECHO))


@pytest.mark.parametrize("key", ["e", "x"])
def test_keys_come_without_enter_and_the_terminal_is_restored_at_the_end_and_on_an_error(
    key: str, screen: Any
) -> None:
    shown = screen(BEGIN + TAKE)
    shown.until("open")
    assert taken(shown.before, shown.settings)
    shown.type("ab")
    shown.until("b")
    shown.type(key)
    assert shown.process.wait(PATIENCE) == (0 if key == "e" else 1)
    assert shown.settings == shown.before


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGALRM]
)
def test_a_signal_that_ends_the_process_restores_the_terminal_first(
    number: signal.Signals, screen: Any
) -> None:
    shown = screen(BEGIN + TAKE)
    shown.until("open")
    assert taken(shown.before, shown.settings)
    shown.process.send_signal(number)
    status = shown.process.wait(PATIENCE)
    assert status == -number  # as if nobody had caught it
    assert shown.settings == shown.before


SHELL = """
import signal, sys, os
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
child = os.fork()
if child:  # as a shell does: the job gets the terminal, and loses it while it is stopped
    os.setpgid(child, child)
    os.tcsetpgrp(0, child)
    os.waitpid(child, os.WUNTRACED)
    os.tcsetpgrp(0, os.getpgrp())
    print("stopped", flush=True)
    sys.stdin.readline()
    os.kill(child, signal.SIGCONT)
    print("in the background", flush=True)
    sys.stdin.readline()
    os.tcsetpgrp(0, child)
    os.kill(child, signal.SIGCONT)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
os.setpgid(0, 0)
while os.tcgetpgrp(0) != os.getpgrp():
    time.sleep(0.01)
"""


def test_ctrl_z_gives_the_terminal_back_and_keys_are_taken_again_in_the_foreground(screen: Any) -> None:
    shown = screen(BEGIN + SHELL + TAKE)
    shown.until("open")
    assert taken(shown.before, shown.settings)
    shown.type("\x1a")
    shown.until("stopped")
    assert shown.settings == shown.before
    shown.type("bg\n")
    shown.until("in the background")
    time.sleep(0.05)
    assert shown.settings == shown.before  # it runs, and the terminal is the shell's
    shown.type("fg\n")
    shown.wait_for(lambda: taken(shown.before, shown.settings))
    shown.type("k")
    shown.until("keys k")
    shown.type("e")
    assert shown.process.wait(PATIENCE) == 0
    assert shown.settings == shown.before


def test_a_signal_that_comes_while_keys_are_being_taken_restores_the_terminal_too(screen: Any) -> None:
    killed = """
import termios
real = termios.tcsetattr
def then_killed(*given):
    termios.tcsetattr = real
    real(*given)
    assert not termios.tcgetattr(0)[3] & termios.ICANON
    os.kill(os.getpid(), signal.SIGTERM)
termios.tcsetattr = then_killed
terminal.Terminal().open()
"""
    shown = screen(BEGIN + killed)
    assert shown.process.wait(PATIENCE) == -signal.SIGTERM
    assert shown.settings == shown.before


def test_a_handler_of_the_users_is_left_alone(screen: Any) -> None:
    mine = "signal.signal(signal.SIGTERM, lambda *_: print('mine', flush=True))\n"
    shown = screen(BEGIN + mine + TAKE)
    shown.until("open")
    shown.process.send_signal(signal.SIGTERM)
    shown.until("mine")
    shown.type("e")
    assert shown.process.wait(PATIENCE) == 0
    assert shown.settings == shown.before


def test_a_forked_child_leaves_the_terminal_alone(screen: Any) -> None:
    forked = """
one = terminal.Terminal()
assert one.open()
hears, tells = os.pipe()
child = os.fork()
if not child:
    one.close()
    os.write(tells, b".")
    while True:
        time.sleep(0.01)  # a signal just before a long sleep would be heard only after it
os.read(hears, 1)
os.kill(child, signal.SIGTERM)
print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
""" + TAKE.replace("one = terminal.Terminal()", "").replace("assert one.open()", "")
    shown = screen(BEGIN + forked)
    shown.until("child -15")
    shown.until("open")
    assert taken(shown.before, shown.settings)
    shown.type("e")
    shown.process.wait(PATIENCE)
    assert shown.settings == shown.before


def test_a_terminal_that_somebody_takes_keys_from_is_left_to_them(screen: Any) -> None:
    second = "two = terminal.Terminal()\nprint('two', two.open(), flush=True)\ntwo.close()\n"
    shown = screen(BEGIN + TAKE.replace("    while True:", f"    exec({second!r})\n    while True:"))
    shown.until("two False")
    assert taken(shown.before, shown.settings)
    shown.type("e")
    assert shown.process.wait(PATIENCE) == 0
    assert shown.settings == shown.before


def test_without_a_terminal_there_are_no_keys() -> None:
    with Path(os.devnull).open() as nothing:
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                BEGIN.replace("fcntl.ioctl(0, termios.TIOCSCTTY, 0)", "")
                + "print(terminal.Terminal().open())",
            ],
            stdin=nothing,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
    assert done.stdout.strip() == "False", done.stderr


# What keys stand for.


class Typed:
    """A terminal that hands over what a test types."""

    def __init__(self, *keys: str) -> None:
        self.keys = list(keys)

    def open(self) -> bool:
        return True

    def read(self) -> str:
        return self.keys.pop(0) if self.keys else ""

    def close(self) -> None:
        self.keys.clear()


@pytest.mark.parametrize(
    ("waits", "keys", "verbs"),
    [
        (None, "p", ["pause"]),
        ("paused", "p", ["resume"]),
        ("paused", " ", ["resume"]),
        (None, "sct", ["step", "checkpoint", "test"]),
        (None, "hq", ["check", "stop"]),
        ("held", "q", ["release"]),
        (None, "xyz\x1b[A", []),
    ],
)
def test_keys_order_what_they_stand_for_and_others_nothing(
    waits: str | None, keys: str, verbs: list[str]
) -> None:
    control = Control()
    control.open()
    control.stand(waits)
    presses = KeyPresses(control, lambda _: None, Typed(keys))  # type: ignore[arg-type]
    presses.listen()
    orders: list[Order] = []
    while (ticket := control.take()) is not None:
        orders.append(ticket.order)
    assert [order.control for order in orders] == verbs
    assert all(order.actor.endswith("(key)") for order in orders)


def test_the_keys_are_listed_at_the_beginning_and_on_demand() -> None:
    told: list[str] = []
    control = Control()
    control.open()
    presses = KeyPresses(control, told.append, Typed("?"))  # type: ignore[arg-type]
    assert presses.open()
    presses.listen()
    assert told == [HELP, HELP]


def test_an_ended_run_takes_no_orders_and_those_in_line_are_told() -> None:
    control = Control()
    control.open()
    ticket = control.post(Order(control="pause", actor="ann"))
    control.close()
    with pytest.raises(ConflictError, match="the run has ended"):
        ticket.wait(0.0)
    with pytest.raises(ConflictError, match="not training now"):
        control.post(Order(control="pause", actor="ann"))


RUN = """
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
import torch
from torch import nn
from automode import Trainer
model = nn.Linear(3, 2)
batch = (torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
trainer = Trainer(max_steps=10**7, session_dir={folder!r}, keys=True, progress=False)
trainer.fit(model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), loss_fn=nn.CrossEntropyLoss(),
            train_loader=[batch] * 50)
"""


def test_a_run_in_a_terminal_is_paused_stepped_and_stopped_by_keys(screen: Any, tmp_path: Path) -> None:
    shown = screen(RUN.format(folder=str(tmp_path)))
    shown.until("keys: p pause")
    assert taken(shown.before, shown.settings)
    shown.type("p")
    shown.until("paused; its state stays")
    shown.type("s")
    shown.until("pause after 1 steps")
    shown.process.send_signal(signal.SIGTERM)  # a first one stops it in order
    assert shown.process.wait(PATIENCE) == 143
    shown.until("whose state is stored")
    assert shown.settings == shown.before
