"""Orders carried out between two steps, in the training thread: what it takes to pause, go on, stop and stay.

A paused run keeps its model and waits without training: it looks into the inbox five times a second, and sleeps in between. The time
does not count for anything that is decided.
"""

from __future__ import annotations

import time
from typing import Any, Final, assert_never

from automode.errors import AutomodeError, ConflictError, NotExecutableError, SessionError
from automode.planner.controls import LoadArguments, Order, StepArguments, arguments_of, verb_of
from automode.planner.events import Controlled
from automode.trainer.checkpointing import CheckpointKeeper
from automode.trainer.control import NEVER, Control, Reply, Ticket
from automode.trainer.driver import Driver
from automode.trainer.key_presses import KeyPresses
from automode.trainer.loading import checkpoint_named
from automode.trainer.loop import Loop
from automode.trainer.random_state import forked_rng
from automode.trainer.run_parts import RunParts
from automode.trainer.stop_signals import StopSignals
from automode.trainer.switching import Switch
from automode.trainer.verbs import Outcome, Verbs

LOOK_SECONDS: Final = 0.2
"""Longest time until a paused run sees what came into its inbox, and a signal."""

_HELD = b"\n%s: the held run is released\n"


class Commander:
    """Carries out orders to a run.

    Args:
        parts: The run.
        loop: Where it stands.
        driver: Its log.
        keeper: Stores its state, or None.
        control: Where orders come from.
        switched: What brought the run to the state that it begins in, or None.

    Attributes:
        paused: Whether the run waits.
        held: Whether it has ended, and waits to be released.
        switch: Another state that the run is to go on from, or None.
        signals: The signals that end a wait.
    """

    def __init__(
        self,
        parts: RunParts,
        loop: Loop,
        driver: Driver,
        keeper: CheckpointKeeper | None,
        control: Control,
        switched: Switch | None = None,
    ) -> None:
        self.paused = False
        self.held = False
        self.switch: Switch | None = None
        self.signals = StopSignals()
        self._parts = parts
        self._loop = loop
        self._driver = driver
        self._keeper = keeper
        self._control = control
        self._switched = switched
        self._verbs = Verbs(parts, loop, driver, keeper)
        self._keys = KeyPresses(control, parts.console.event)
        self._pause_at: int | None = None
        self._after: tuple[str, int] = ("", 0)
        self._unstored = False
        self._then = time.monotonic()
        self._first = loop.batches - driver.rows
        driver.requests.orders_to(self._from_the_inbox)

    def begin(self) -> bool:
        """Before training begins or goes on: answer what led here, and wait where that was asked for.

        Returns:
            Whether training goes on in this state.
        """
        wanted = self._parts.settings.keys
        if (self._parts.console.shown if wanted == "auto" else wanted) and self._keys.open():
            self._driver.requests.listen_by(self._keys.listen)
        switched = self._switched
        if switched is None:
            self.paused = self._parts.settings.start_paused
            if self.paused:
                self._note("pause", actor="start_paused")
        else:
            self.paused = switched.paused
            if switched.redo:
                self._control.put_back(switched.ticket)
            else:
                digest, step = switched.found.record.body["checkpoint"], self._parts.trunk.step
                told = f"the run is at step {step} of checkpoint {digest[:19]}"
                self._done(switched.ticket, Outcome(told, {"checkpoint": digest, "step": step}))
                if self.paused:
                    self._note("pause", actor=switched.ticket.order.actor)
        return self.attend()

    def attend(self) -> bool:
        """Carry out what is due, and wait while the run is paused.

        Returns:
            Whether training goes on in this state; False: see :attr:`switch`.
        """
        self._then = time.monotonic()
        self._loop.flush()
        self._as_before()
        self._take_orders()
        if self._pause_at is not None and self._loop.batches >= self._pause_at and self.switch is None:
            actor, steps = self._after
            self.paused, self._pause_at = True, None
            self._note("pause", actor=actor, note=f"after {steps} steps")
        if self.paused and not self._leaving:
            self._wait()
        self._stand_still()
        self._control.look_again(self._next())
        return self.switch is None

    def hold(self) -> None:
        """Keep a finished run until it is released; a signal releases it too."""
        self._then = time.monotonic()
        self._loop.flush()
        self.held = True
        self._note("hold", actor="hold")
        self._parts.console.event(
            f"finished at step {self._parts.trunk.step}, and held for tests and checks; "
            f"let it go with: automode ctl {self._parts.session_path} release"
        )
        with StopSignals(_HELD) as self.signals:
            self._wait()
        if self.signals.received is not None:
            self.give_way()

    def give_way(self) -> None:
        """Forget the state to go on from, since the run ends instead; whoever ordered it is told."""
        switch, self.switch = self.switch, None
        if switch is not None:
            switch.ticket.fail(ConflictError(f"{switch.ticket.order.control}: the run was ended meanwhile"))

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._driver.requests.listen_by(None)
        self._keys.close()

    @property
    def stopped(self) -> bool:
        """Whether a person, or automode, has ended the run before its length."""
        return self._driver.stop_requested is not None

    def leave_for(self, switch: Switch) -> None:
        """Close the session where it stands, so that it can be taken up from another state.

        Raises:
            SessionError: The log could not be written.
        """
        try:
            self._driver.detach()
        except SessionError as error:
            switch.ticket.fail(error)
            raise

    @property
    def _leaving(self) -> bool:
        stopping = self._driver.stop_requested is not None and not self.held
        return stopping or self.signals.received is not None or self.switch is not None

    def _wait(self) -> None:
        console, step = self._parts.console, self._parts.trunk.step
        how = "held" if self.held else "paused"
        console.waits(how)
        self._control.stand(how)
        if self._unstored and self._keeper is not None:
            # A person who pauses may be about to switch the machine off.
            self._keeper.save_once("pause")
        self._unstored = False
        self._take_orders()
        while (self.paused or self.held) and not self._leaving:
            self._control.wait(LOOK_SECONDS)
            self._stand_still()
            if self._driver.tick(step):
                self._loop.boundary()
            self._take_orders()
        console.waits(None)
        self._control.stand(None)

    def _stand_still(self) -> None:
        """Take the time since the last call off the run's clock: it did not train."""
        now = time.monotonic()
        self._driver.scribe.away(now - self._then)
        self._then = now

    def _next(self) -> int:
        """Batches from which on there is something to do here without being asked."""
        due = self._driver.requests.next_due
        again = NEVER if due is None else self._first + due
        return min(again, NEVER if self._pause_at is None else self._pause_at)

    def _as_before(self) -> None:
        """Do what an earlier attempt of the run did here because a person had asked for it."""
        due = self._driver.requests.next_due
        if due is None or due > self._driver.rows:
            return
        for done in self._driver.requests.orders_again(self._driver.rows):
            order = Order(
                control=verb_of(done.verb),
                actor=done.actor,
                note=done.note,
                arguments=done.arguments,
                request=done.request,
            )
            self._carry_out(Ticket(order))
        if self._driver.requests.next_due is not None and self._driver.requests.next_due <= self._driver.rows:
            self._loop.boundary()

    # Orders.

    def _from_the_inbox(self, order: Order) -> None:
        self._control.post(order)

    def _take_orders(self) -> None:
        while self.switch is None and (ticket := self._control.take()) is not None:
            self._carry_out(ticket)

    def _carry_out(self, ticket: Ticket) -> None:
        """Carry out one order; whatever goes wrong is told, and the run goes on."""
        try:
            try:
                with forked_rng():
                    outcome = self._do(ticket)
            except Exception as error:
                ours = isinstance(error, AutomodeError)
                told = error if ours else NotExecutableError(f"{type(error).__name__}: {error}")
                self._record(ticket.order, refused=str(told)[:2000])
                self._parts.console.event(f"{ticket.order.control} refused: {told}")
                ticket.fail(told)
                return
            if outcome is not None:
                self._done(ticket, outcome)
        except BaseException:
            # Whoever waits must not wait for ever, also where the answer could not be recorded.
            ticket.fail(ConflictError(f"{ticket.order.control}: the run was ended meanwhile"))
            raise

    def _done(self, ticket: Ticket, outcome: Outcome) -> None:
        order, step = ticket.order, self._parts.trunk.step
        self._record(order, outcome)
        self._parts.console.event(f"[step {step}] {order.control} by {order.actor}: {outcome.told}")
        ticket.reply(Reply(verb=order.control, step=step, told=outcome.told, result=dict(outcome.result)))

    def _do(self, ticket: Ticket) -> Outcome | None:  # noqa: C901 - one case a verb
        order = ticket.order
        match order.control:
            case "pause":
                return self._pause_now()
            case "resume":
                return self._resume()
            case "step":
                return self._train_on(order)
            case "stop":
                return self._stop(order)
            case "release":
                return self._release()
            case "load":
                self.switch = self._load(ticket)
                return None
            case "set":
                return self._set(ticket)
            case "checkpoint":
                return self._verbs.checkpoint(order, ended=self.held)
            case "test":
                return self._verbs.test(order)
            case "check":
                return self._verbs.check(order)
            case "scan":
                return self._verbs.scan(order)
            case "fork" | "merge":
                return self._verbs.card(order, ended=self.held)
            case _:
                assert_never(order.control)

    def _pause_now(self) -> Outcome:
        self._not_held("pause")
        if self.paused:
            return Outcome("it is paused already")
        self.paused, self._pause_at = True, None
        self._unstored = True
        return Outcome("paused; its state stays as it is", {"paused": True})

    def _resume(self) -> Outcome:
        self._not_held("resume")
        if not self.paused:
            told = "it is training already" if self._pause_at is None else "training on without the pause"
            self._pause_at = None
            return Outcome(told, {"paused": False})
        self.paused = False
        self._control.stand(None)
        return Outcome("training goes on", {"paused": False})

    def _train_on(self, order: Order) -> Outcome:
        self._not_held("step")
        asked: StepArguments = arguments_of("step", order.arguments)
        self.paused = False
        self._control.stand(None)
        self._pause_at = self._loop.batches + asked.n
        self._after = (order.actor, asked.n)
        return Outcome(f"training {asked.n} steps, then pausing", {"steps": asked.n})

    def _stop(self, order: Order) -> Outcome:
        if self.held:
            return self._release()
        digest = None if self._keeper is None else self._keeper.save_once("stop")
        self.paused = False
        self._driver.stopped_by = order.actor
        self._driver.stop_requested = f"stopped by {order.actor}"
        if digest is None:
            return Outcome("ending; there is no stored state to go on from")
        return Outcome(
            f"ending; go on with: automode resume {self._parts.session_path}", {"checkpoint": digest}
        )

    def _release(self) -> Outcome:
        if not self.held:
            raise ConflictError("release: this run is not held; `stop` ends it")
        self.held = False
        return Outcome("released")

    def _not_held(self, verb: str) -> None:
        if self.held:
            raise ConflictError(
                f"{verb}: the run has come to its end and is held; make it longer (set max_epochs=N), load an earlier state, or "
                "release it"
            )

    def _set(self, ticket: Ticket) -> Outcome | None:
        if not self.held:
            return self._verbs.set(ticket.order)
        # Where a run has ended, its epoch is closed: it goes on from the state before that, as one that is resumed longer does.
        digest = None if self._keeper is None else self._keeper.at_this_step
        if digest is None:
            raise SessionError("set: there is no stored state of the run's end to go on from")
        found = checkpoint_named(self._parts.session_path, digest)
        self.switch = Switch(found=found, ticket=ticket, redo=True, paused=False)
        return None

    def _load(self, ticket: Ticket) -> Switch:
        asked: LoadArguments = arguments_of("load", ticket.order.arguments)
        found = checkpoint_named(self._parts.session_path, asked.checkpoint)
        if self._driver.requests.knows(ticket.order.request):
            self._driver.requests.forget(ticket.order.request)
        return Switch(found=found, ticket=ticket, redo=False, paused=self.paused or self.held)

    # The record.

    def _note(self, verb: Any, *, actor: str, note: str = "") -> None:
        """Record what happened without an order of its own."""
        step = self._parts.trunk.step
        request = f"run-{self._driver.state.next_seq}"
        self._tell(Controlled(request=request, verb=verb, actor=actor, step=step, note=note))
        self._parts.console.event(f"[step {step}] {verb}{f' {note}' if note else ''}")

    def _record(self, order: Order, outcome: Outcome | None = None, refused: str | None = None) -> None:
        if self._driver.requests.knows(order.request):
            self._driver.requests.answered(order.request)
        self._tell(
            Controlled(
                request=order.request,
                verb=order.control,
                actor=order.actor,
                step=self._parts.trunk.step,
                note=order.note,
                arguments=order.arguments,
                refused=refused,
                told="" if outcome is None else outcome.told,
                result={} if outcome is None else dict(outcome.result),
            )
        )

    def _tell(self, body: Controlled) -> None:
        """Record it durably, with what has been fed on its way; nothing else happens between the steps for it."""
        self._driver.scribe.feed(body, effective_at=body.step)
        self._driver.scribe.write()
