"""A group of like segments on their way to a rung: warmed up alone, stacked where it pays, each ended at its own time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from automode.backends import stacking_rule
from automode.backends.base import StackableSegment
from automode.backends.graph_compiling import compiled
from automode.backends.stack import Stack
from automode.backends.stack_building import Built, build
from automode.backends.stackability import likeness
from automode.backends.stacked_gradients import Batches, CannotStackError, Graphs

MEASURED_STEPS = 5
"""First steps of a stack, the fastest of which is compared with the members' own."""

SLICE_STEPS = 8
SLICE_SECONDS = 0.02
"""Small steps are taken up to 8 at a time, as many as fit into 20 ms: forking the random states for a slice costs .2 ms."""

ALONE = "trained one after another"

Tell = Callable[[Sequence[StackableSegment], str, str], None]
"""Hears which segments something happened to, what, and why."""


@dataclass(slots=True)
class Progress:
    """What came of a slice of time.

    Attributes:
        spent: Resource steps that were taken.
        ended: Segments that reached their rung, or stopped before it.
        failed: Segments that failed, each with its error.
        alone: Segments to be carried on one after another.
    """

    spent: float = 0.0
    ended: list[StackableSegment] = field(default_factory=list)
    failed: list[tuple[StackableSegment, Exception]] = field(default_factory=list)
    alone: list[StackableSegment] = field(default_factory=list)


class StackedGroup:
    """Trains like segments together.

    Args:
        segments: At least two, of one likeness.
        graphs: Graphs made before; new ones are added.
        tell: Hears how the group is trained, and why.
        compiles: Whether a graph may be compiled where its rung is long enough.
    """

    def __init__(
        self, segments: Sequence[StackableSegment], graphs: Graphs, tell: Tell, *, compiles: bool
    ) -> None:
        self._cold = list(segments)
        self._members: list[StackableSegment] = []
        self._rows: dict[int, int] = {}
        self._graphs = graphs
        self._tell = tell
        self._compiles = compiles
        self._alone_seconds = float("inf")
        self._built: Built | None = None
        self._leader: StackableSegment = segments[0]
        self._timings: list[float] = []

    @property
    def segments(self) -> list[StackableSegment]:
        """The segments that are still in the group."""
        return [*self._cold, *self._members]

    def remove(self, segment: StackableSegment) -> None:
        """Let a segment go, as it stands."""
        if segment in self._cold:
            self._cold.remove(segment)
            return
        self._drop(segment)
        self._pass_the_lead()

    def advance(self, resource: float) -> Progress:
        """Train for at most so many resource steps; a step of all members takes one for each."""
        progress = Progress()
        self._warm_up(resource, progress)
        if self._cold or not self._members:
            return progress
        if self._built is None:
            self._prepare(progress)
        self._judge(progress)
        while self._built is not None and resource - progress.spent >= self._slice() > 0:
            self._train(resource, progress)
            self._judge(progress)
        return progress

    def _slice(self) -> int:
        """Resource steps that are worth a slice; 0 where nothing is left to train."""
        if not self._members:
            return 0
        fitting = SLICE_STEPS if not self._timings else max(1, int(SLICE_SECONDS / min(self._timings)))
        return min(fitting, SLICE_STEPS, *(s.steps_left for s in self._members)) * len(self._members)

    # Alone at first.

    def _warm_up(self, resource: float, progress: Progress) -> None:
        steps = stacking_rule.WARM_UP_STEPS
        while self._cold and resource - progress.spent >= steps:
            segment = self._cold[0]
            progress.spent += steps
            try:
                segment.advance(1.0)
                started = time.perf_counter()
                over = segment.advance(steps - 1.0)
                self._alone_seconds = min(
                    self._alone_seconds, (time.perf_counter() - started) / (steps - 1.0)
                )
            except Exception as error:
                self._cold.pop(0)
                progress.failed.append((segment, error))
                continue
            self._cold.pop(0)
            if over:
                progress.ended.append(segment)
            else:
                self._members.append(segment)

    def _prepare(self, progress: Progress) -> None:
        """Stack the members, or send them on alone."""
        members = self._members
        steps = min(segment.steps_left for segment in members)
        tensors = sum(p.requires_grad for p in members[0].model.parameters())
        why = stacking_rule.why_too_short(
            len(members), steps, self._alone_seconds, tensors, recorded=bool(self._graphs.kept)
        )
        if why is not None:
            self._part(progress, why)
            return
        self._leader = members[0]
        try:
            with self._leader.isolated():
                self._built = build(members, self._graphs, likeness(members[0]))
        except CannotStackError as error:
            self._part(progress, str(error))
        except Exception as error:  # a dataset or a network that fails will say so again, alone
            self._part(progress, f"{type(error).__name__}: {error}")
        else:
            self._rows = {id(segment): row for row, segment in enumerate(members)}
            self._timings = []
            if self._built.why_no_graph:
                self._tell(members, "stacked without a recorded graph", self._built.why_no_graph)

    # Together.

    def _train(self, resource: float, progress: Progress) -> None:
        """Take steps until the time is spent, somebody ends, or the first steps have been timed."""
        assert self._built is not None
        members = len(self._members)
        ended: list[StackableSegment] = []
        timing = len(self._timings) < MEASURED_STEPS
        try:
            with self._leader.isolated():
                while resource - progress.spent >= members and not ended:
                    started = time.perf_counter()
                    progress.spent += members
                    ended = self._step(self._built)
                    if timing:
                        self._timings.append(time.perf_counter() - started)
                        timing = len(self._timings) < MEASURED_STEPS
                        if not timing:
                            break
        except CannotStackError as error:
            self._part(progress, str(error))
        except Exception as error:
            # Whoever is at fault, a step may have been half taken: the weights are no longer anybody's to report.
            progress.failed += [(segment, error) for segment in self._members]
            self._members.clear()
            self._built = None
        for segment in ended:
            segment.share_randomness(self._leader)
            self._drop(segment)
            progress.ended.append(segment)
        self._pass_the_lead()

    def _step(self, built: Built) -> list[StackableSegment]:
        """One step of every member; returns those that are done."""
        stack, members = built.stack, self._members
        batches = self._drawn(built)
        for segment in members:
            segment.set_rates()
        losses = self._losses(built, batches)
        moving: list[StackableSegment] = []
        staying: list[int] = []
        ended: list[StackableSegment] = []
        for segment in members:
            row = self._rows[id(segment)]
            match segment.took(*losses[row]):
                case "moves":
                    moving.append(segment)
                case "stays":
                    staying.append(row)
                case "ends":
                    stack.release(row)
                    ended.append(segment)
        if moving:
            stack.move([self._rows[id(segment)] for segment in moving], staying)
        for segment in moving:
            segment.moved()
        for segment in members:
            if segment not in ended and segment.done:
                stack.release(self._rows[id(segment)])
                ended.append(segment)
        return ended

    def _losses(self, built: Built, batches: Batches) -> list[tuple[float, float]]:
        """Take everybody's gradient; nothing has moved when it fails, and alone each member will tell whose error it is."""
        if built.graph is not None and batches.shape != built.shape:
            raise CannotStackError("its batches change shape, and a recorded graph is for one shape")
        try:
            return built.stack.losses(batches)
        except Exception as error:
            raise CannotStackError(f"{type(error).__name__}: {error}") from error

    def _drawn(self, built: Built) -> Batches:
        if built.shared:
            return Batches.of([self._leader.draw()], shared=True)
        own = {self._rows[id(segment)]: segment.draw() for segment in self._members}
        spare = next(iter(own.values()))
        return Batches.of([own.get(row, spare) for row in range(built.stack.rows)], shared=False)

    # Whether it pays.

    def _judge(self, progress: Progress) -> None:
        """Take the group apart, make it anew for fewer, or compile its graph, as the measured times say."""
        built, members = self._built, len(self._members)
        if built is None or not members or len(self._timings) < MEASURED_STEPS:
            return
        stacked = min(self._timings)
        if built.graph is not None:
            built.graph.step_seconds = stacked
        steps = min(segment.steps_left for segment in self._members)
        recording = built.graph.made_in if built.graph is not None else 0.0
        rows = built.stack.rows
        if members > 1 and stacking_rule.should_restack(
            rows, members, steps, stacked, self._alone_seconds, recording
        ):
            self._release_all(built.stack)
            self._prepare(progress)
            return
        why = stacking_rule.why_slower(stacked, members, self._alone_seconds)
        if why is not None:
            self._release_all(built.stack)
            self._part(progress, why if members > 1 else "the others have ended")
            return
        self._maybe_compile(built, steps, stacked)

    def _maybe_compile(self, built: Built, steps: int, stacked: float) -> None:
        graph = built.graph
        if not self._compiles or graph is None or graph.compiled is not None:
            return
        if not stacking_rule.should_compile(len(graph.module.graph.nodes), steps, stacked):
            return
        with self._leader.isolated():
            said = compiled(graph, built.stack.gradients.inputs(self._drawn(built)))
        self._tell(self._members, "stacked", said)

    # Leaving.

    def _drop(self, segment: StackableSegment) -> None:
        self._members.remove(segment)
        self._rows.pop(id(segment), None)

    def _pass_the_lead(self) -> None:
        if self._members and self._leader not in self._members:
            self._members[0].share_randomness(self._leader)
            self._leader = self._members[0]

    def _release_all(self, stack: Stack) -> None:
        for segment in self._members:
            stack.release(self._rows[id(segment)])
            if segment is not self._leader:
                segment.share_randomness(self._leader)
        self._rows.clear()
        self._built = None

    def _part(self, progress: Progress, why: str) -> None:
        """Send the members on alone; what they hold is their own already, or is given back here."""
        if self._built is not None:
            self._release_all(self._built.stack)
        self._tell(self._members, ALONE, why)
        progress.alone += self._members
        self._members.clear()
