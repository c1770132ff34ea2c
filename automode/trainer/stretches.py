"""Stretches of training steps, from one look at how things stand to the next.

On a small model what a loop costs beside PyTorch is not arithmetic but calls: each function that is entered once a step comes out
of a cold cache, and costs several times what it costs in a benchmark of its own. So the step that most runs take most of the
time stands here in one piece (:func:`quick_stretch`): default step, CPU, single precision, nothing clipped, left out or relabelled,
nobody listening. It does and records what :func:`general_stretch` does, in the same order. A stretch ends where anything may have
changed, which is wherever rows are handed over: everything is looked up anew then.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor
from torch.optim import SGD

from automode.trainer.quick_adam import update_of
from automode.trainer.quick_sgd import sgd_update_of
from automode.trainer.recording_sampler import RecordedIterator
from automode.trainer.steps import DefaultStep, Taken, paired_loss
from automode.trainer.torchs_steps import clearing_of, is_torchs

if TYPE_CHECKING:
    from automode.trainer.loop import Loop

Stretch = Generator[int, None, bool | None]
"""Yields the completed steps. Returns True: the epoch is over; False: the run is; None: look again how to go on."""


def stretch(loop: Loop, batches: Iterator[Any]) -> Stretch:
    """Train until something may have changed.

    Args:
        loop: Whose steps they are.
        batches: The rest of the epoch.
    """
    loop.anew = False
    loop.cursor.loader.order_up()
    if type(batches) is RecordedIterator:
        batches.packs = loop.probe.feed is not None
    return quick_stretch(loop, batches) if is_plain(loop) else general_stretch(loop, batches)


def general_stretch(loop: Loop, batches: Iterator[Any]) -> Stretch:
    """Train by whatever step there is; see :func:`stretch`."""
    trunk, observer, cursor, last = loop.trunk, loop.observer, loop.cursor, loop.plan.steps_per_epoch
    ids_of_batch, train = cursor.loader.ids_of_batch, loop.train
    for batch in batches:
        if trunk.step >= observer.limit or observer.stop_requested is not None:
            return False
        kept, ids = trunk.curated(batch, ids_of_batch())
        loop.phase = "forward"
        taken = train(kept, loop.epoch)
        loop.batches += 1
        loop.noted(taken, ids)
        yield trunk.step
        # At the last batch of an epoch the loader is asked once more, as a plain loop asks it.
        if (trunk.step >= observer.limit or observer.stop_requested is not None) and cursor.read != last:
            return False
        if loop.anew:
            return None
    return True


def is_plain(loop: Loop) -> bool:
    """Whether the next steps may be taken the quick way."""
    trunk, train = loop.trunk, loop.train
    return (
        type(train) is DefaultStep
        and train.plain
        and trunk.device.type == "cpu"
        and trunk.clip_norm is None
        and trunk.cap_norm is None
        and trunk.part_rows is None
        and trunk.curation is None
        and len(trunk.optimizer.param_groups) == 1
        and not loop.skipping
        and not (loop.schedule.every_step and _does_more(loop.schedule.scheduler))
        and not loop.observer.busy
        and loop.probe.clock is loop.clock
    )


def _does_more(scheduler: Any) -> bool:
    """Whether a scheduler's steps are somebody's own: they may do anything to the optimizer, as forget its moments, and not only set rates."""
    parts = getattr(scheduler, "_schedulers", ())
    return not is_torchs(getattr(scheduler, "step", None)) or any(_does_more(part) for part in parts)


def quick_stretch(loop: Loop, batches: Iterator[Any]) -> Stretch:
    """Train by the plain step; see :func:`stretch`."""
    trunk, observer, cursor, probe = loop.trunk, loop.observer, loop.cursor, loop.probe
    model, step_fn, optimizer, clock = trunk.model, trunk.step_fn, trunk.optimizer, loop.clock
    update_of_kind = sgd_update_of if type(optimizer) is SGD else update_of
    clear, update, guard, paired = clearing_of(optimizer), update_of_kind(optimizer), observer.guard, None
    stride, last, loader = observer.stride, loop.plan.steps_per_epoch, cursor.loader
    follows = loop.stepped if trunk.averages is not None or loop.schedule.every_step else None
    train, opened, feed = cast(DefaultStep, loop.train), probe.opened(1), probe.feed
    norm_of, unfit, leaps = train.norm_of(guard=guard), train.leaps.unfit, train.leaps
    take, extend, visits = probe.take, opened.values.extend, None if feed is None else feed.quick_visits
    recorded = batches if type(batches) is RecordedIterator else None
    for batch in batches if recorded is None else recorded.batches:
        positions = loader.ids_of_batch() if recorded is None else recorded.noted()
        if trunk.step >= observer.limit or observer.stop_requested is not None:
            return False
        loop.phase = "forward"
        clear()
        if paired is not None and type(batch) is list and len(batch) == 2:
            loss, targets = paired(outputs := model(batch[0]), batch[1]), batch[1]
        else:  # the first batch of a stretch is looked at with care
            loss, outputs, targets = step_fn(model, batch)
            paired = paired_loss(step_fn)
        loss.backward()  # type: ignore[no-untyped-call]
        loop.batches = done = loop.batches + 1
        value, norm = loss.item(), float(take(probe.rows) if norm_of is None else norm_of())
        if guard and not value - value + norm <= leaps.largest and (why := unfit(value, norm, trunk.step)):
            loop.noted(Taken(loss, norm, False, False, False, outputs, targets, None, why), positions)
            yield trunk.step
            return None
        step, now = trunk.step + 1, clock()
        # Read anew: a state that is loaded brings another list, and a rate may be a tensor that is written to.
        extend((step, now, value, norm, float(optimizer.param_groups[0]["lr"]), 1.0, 0.0))
        probe.rows, opened.count = probe.rows + 1, opened.count + 1
        if feed is not None and positions is not None:
            if visits is not None and type(outputs) is Tensor is type(targets):
                seen = outputs._version, targets._version  # noqa: SLF001
                visits.append((outputs.detach(), targets, positions, value, *seen))
            elif outputs is not None:
                feed.keep(outputs, targets, positions, value, loss)
                visits = feed.quick_visits
        loop.phase = "update"
        update()
        trunk.step = step
        if follows is not None:
            follows()
        cursor.read += 1
        loop.phase = "between"
        full = feed is not None and len(feed.visits) >= feed.max_visits
        if full or done % stride == 0 or now >= loop.due:
            loop.between(done % stride == 0, full)
        yield step
        # At the last batch of an epoch the loader is asked once more, as a plain loop asks it.
        if (trunk.step >= observer.limit or observer.stop_requested is not None) and cursor.read != last:
            return False
        if loop.anew:
            return None
    return True
