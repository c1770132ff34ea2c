"""One call of ``fit``: a run made or taken up, trained to its end, and its session ended in order, whatever happens."""

from __future__ import annotations

import math
from collections.abc import Sequence

from automode.errors import ConflictError
from automode.planner.policy import Policy
from automode.session import Session
from automode.trainer.assembly import open_driver, resume_driver
from automode.trainer.batch_size import batch_size_of
from automode.trainer.callback_view import RunView
from automode.trainer.callbacks import Callbacks
from automode.trainer.captured_logs import captured
from automode.trainer.card_callbacks import CardCallback
from automode.trainer.checkpointing import CheckpointKeeper, keeper_of, run_attended, run_keeping
from automode.trainer.commanding import Commander
from automode.trainer.companions import Companions
from automode.trainer.control import Control
from automode.trainer.driver import Driver
from automode.trainer.epoch_table import EpochTable
from automode.trainer.executing import leave, ordered
from automode.trainer.fit_request import FitRequest
from automode.trainer.loggers import Loggers
from automode.trainer.loop import Loop
from automode.trainer.observer import BY_CALLBACK, Observer
from automode.trainer.random_state import forked_rng
from automode.trainer.result import FitResult
from automode.trainer.resuming import Found, find, longer_by, put_back, put_loop, tell
from automode.trainer.run_metrics import RunMetrics
from automode.trainer.run_parts import RunParts, prepare
from automode.trainer.schedule import Schedule
from automode.trainer.settings import Settings
from automode.trainer.step_choice import step_of
from automode.trainer.steps import TrainingStep
from automode.trainer.switching import Switch
from automode.trainer.test_label import labelled, next_number


def fit(
    settings: Settings,
    policy: Policy,
    request: FitRequest,
    own_step: TrainingStep | None,
    on_card: Sequence[CardCallback] = (),
    *,
    control: Control,
) -> FitResult:
    """Train to the end; see :meth:`automode.trainer.trainer.Trainer.fit`.

    Args:
        settings: The Trainer's.
        policy: What automode may do.
        request: The arguments of ``fit``.
        own_step: The user's training step, or None.
        on_card: The user's own functions that hear of every card.
        control: Where a person's orders come from.
    """
    order = ordered()
    if order is not None:
        leave(order, settings, request, own_step)
    control.open()
    try:
        found = find(settings)
        session = None if found is None else (found.session, found.seed)
        parts = prepare(settings, policy, request, own_step, session=session)
        parts.on_card = on_card
        try:
            with captured(parts):
                return _fit(parts, found, control)
        finally:
            parts.console.close()
    finally:
        control.close()


def _fit(parts: RunParts, found: Found | None, control: Control) -> FitResult:
    observer: Observer
    if found is None:
        observer, loop = _begin_afresh(parts)
    else:
        observer, loop = _take_up(parts, found)
    switch = None
    while (switch := _train(parts, observer, loop, control, found, switch)) is not None:
        found = switch.found
        loop.companions.left()
        try:
            observer, loop = _take_up(parts, found, switch.ticket.order.actor)
        except BaseException as error:
            switch.ticket.fail(error if isinstance(error, Exception) else ConflictError("the run was ended"))
            raise
    test = _test(parts, loop)
    parts.console.event(f"session: {parts.session_path}")
    return FitResult(
        model=parts.request.model,
        session=Session.open(parts.session_path),
        history=loop.history.as_dict(),
        test=test,
        reason=loop.reason,
        mode=observer.mode,
        steps=parts.trunk.step,
        compute=observer.compute,
    )


def _test(parts: RunParts, loop: Loop) -> dict[str, float] | None:
    """Read the test set where that was asked for; the last that a run's companions hear of."""
    companions, found = loop.companions, None
    try:
        if parts.settings.do_test_after and parts.test is not None:
            with labelled(next_number(parts.session_path)):
                companions.tests()
                found = companions.tested(parts.test.run(companions.see).metrics)
            parts.console.event("test: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
    finally:
        companions.finished()
    return found


def _begin_afresh(parts: RunParts) -> tuple[Driver, Loop]:
    """Open a session and make the loop."""
    driver = _open_driver(parts)
    try:
        return driver, begin(parts, driver)
    except BaseException as error:
        driver.abort(parts.trunk.step, error)
        raise


def _take_up(parts: RunParts, found: Found, actor: str | None = None) -> tuple[Driver, Loop]:
    """Put a run back to where it was cut, or to where a person wants it."""
    point, comparison = put_back(parts, found, actor)
    driver = resume_driver(parts, point)
    try:
        driver.limit += longer_by(parts, found)
        loop = begin(parts, driver)
        put_loop(parts, loop, found.rest)
        tell(parts, found, point, comparison)
    except BaseException as error:
        driver.abort(parts.trunk.step, error)
        raise
    return driver, loop


def begin(parts: RunParts, observer: Observer) -> Loop:
    """Make the loop; nothing has been trained yet.

    Args:
        parts: The run.
        observer: Hears of every step.
    """
    trunk, settings = parts.trunk, parts.settings
    schedule = Schedule(
        trunk.scheduler,
        settings.scheduler_interval,
        steps_per_epoch=parts.plan.steps_per_epoch,
        batches_per_step=settings.accumulate_grad_batches,
        charged=parts.policy.schedule == "charged" and parts.policy.budget == "within",
        advanced=lambda ticks: parts.console.event(
            f"[step {trunk.step}] the learning-rate schedule moved on by {ticks} for the compute that automode spent"
        ),
    )
    metrics = RunMetrics(settings.metrics or {}, trunk.device)
    loggers = Loggers(settings.logger, settings.log_every_n_steps, parts.session_path)
    view = RunView(parts, observer, loggers.all)
    table = EpochTable(parts, batch_size=batch_size_of(parts, unknown=math.nan))
    companions = Companions(Callbacks(settings.callbacks), view, table, parts, metrics, loggers)
    loop = Loop(
        parts.plan,
        trunk=trunk,
        cursor=parts.cursor,
        train=companions.listening(step_of(parts, observer)),
        probe=parts.probe,
        observer=observer,
        schedule=schedule,
        validation=parts.validation,
        console=parts.console,
        companions=companions,
    )
    view.know(loop)
    table.batches = lambda: loop.batches
    companions.begin()
    return loop


def _train(
    parts: RunParts,
    observer: Observer,
    loop: Loop,
    control: Control,
    found: Found | None,
    switched: Switch | None,
) -> Switch | None:
    """Run the loop and end the session in order, whatever happens; or close it for another state to go on from."""
    trunk = parts.trunk
    keeper = keeper_of(parts, loop, observer)
    if keeper is not None and found is not None:
        keeper.know(found.stored, found.rest["best"])
    commander = (
        Commander(parts, loop, observer, keeper, control, switched) if isinstance(observer, Driver) else None
    )
    try:
        parts.console.start(parts.plan.total, done=trunk.step)
        loop.companions.start()
        if commander is None:
            loop.run()
        else:
            _attended(parts, loop, keeper, commander, control)
            if commander.switch is not None:
                loop.companions.finished()
                commander.leave_for(commander.switch)
                return commander.switch
        loop.companions.end()
        with forked_rng():
            observer.finish(trunk.step, loop.reason, early=loop.reason == BY_CALLBACK)
    except BaseException as error:
        loop.companions.failed(error)
        if keeper is not None:
            keeper.rescue(error)
        try:
            loop.flush()
        except Exception as second:
            error.add_note(f"the last rows could not be recorded: {type(second).__name__}: {second}")
        observer.abort(trunk.step, error)
        raise
    finally:
        loop.close()
    if commander is not None and commander.held and commander.signals.received is not None:
        loop.companions.finished()
        commander.signals.leave(f"released at step {trunk.step}; the run is complete")
    return None


def _attended(
    parts: RunParts, loop: Loop, keeper: CheckpointKeeper | None, commander: Commander, control: Control
) -> None:
    """Train to the end under a person's orders; then keep the run, where that was asked for."""
    try:
        if keeper is None:
            run_attended(loop, commander, control)
        else:
            run_keeping(loop, keeper, commander, control)
        if commander.switch is None and parts.settings.hold and not commander.stopped:
            commander.hold()
    except BaseException:
        commander.give_way()
        raise
    finally:
        commander.close()


def _open_driver(parts: RunParts) -> Driver:
    """Open the session and whatever plans and acts in this run's mode."""
    return open_driver(parts)
