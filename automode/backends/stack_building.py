"""Making a stack: members examined, a graph found or recorded, and its numbers checked before anything moves."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from automode.backends.base import StackableSegment
from automode.backends.stack import Reference, Stack, reference_of
from automode.backends.stacked_gradients import Batches, CannotStackError, Graph, Graphs
from automode.backends.stacking_rule import pads
from automode.session.rng_state import pack_rng, unpack_rng


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A stack that is ready to train.

    Attributes:
        stack: The stack.
        shared: Whether all members train on one batch.
        shape: What its graph is fixed to in a batch.
        graph: The graph that it runs; None where torch could not record one.
        why_no_graph: Why not; empty where there is one.
    """

    stack: Stack
    shared: bool
    shape: Hashable
    graph: Graph | None
    why_no_graph: str


@contextmanager
def no_chance_spent() -> Iterator[None]:
    """Put every global random state back."""
    before = pack_rng()
    try:
        yield
    finally:
        unpack_rng(before)


def build(segments: Sequence[StackableSegment], graphs: Graphs, likeness: Hashable) -> Built:
    """Stack members, with a graph where torch can record one; call it within a member's own random states.

    Args:
        segments: The members, of one likeness, each between two steps.
        graphs: Those made before; a new one is added.
        likeness: What the members agree in.

    Raises:
        CannotStackError: They cannot be trained together; they are left as they were.
    """
    with no_chance_spent():
        shared = len({segment.batch_key for segment in segments}) == 1
        drawn = [segments[0].draw()] if shared else [segment.draw() for segment in segments]
        references = {
            row: reference_of(segments[row], drawn[0 if shared else row])
            for row in sorted({0, len(segments) - 1})
        }
        for row in references:
            segments[row].charge(1)
        return _Building(segments, drawn, shared, references, graphs, likeness).built()


class _Building:
    """What the steps of making a stack share."""

    def __init__(
        self,
        segments: Sequence[StackableSegment],
        drawn: list[Any],
        shared: bool,
        references: Mapping[int, Reference],
        graphs: Graphs,
        likeness: Hashable,
    ) -> None:
        self._segments = segments
        self._shared = shared
        self._references = references
        self._graphs = graphs
        self._unused = _unused(references)
        self._batches = Batches.of(drawn, shared=shared)
        self._stack = Stack(segments, len(segments), self._unused)
        self._key = (likeness, self._stack.gradients.kind, Batches.of(drawn[:1], shared=True).shape, shared)

    def built(self) -> Built:
        try:
            kept = self._kept()
            if kept is not None:
                return kept
            graph, why = self._recorded()
            if graph is None:
                self._check_eager()
            else:
                self._graphs.keep(self._key, graph)
            return self._result(graph, why)
        except BaseException:
            self._stack.dissolve()
            raise

    def _kept(self) -> Built | None:
        """A stack on a graph that was made before, filled up with idle rows where that is cheaper than a new one."""
        members = len(self._segments)
        steps = max(segment.steps_left for segment in self._segments)
        for graph in self._graphs.find(self._key, members):
            if not pads(graph, members, steps) or (graph.rows > members and not self._shared):
                continue
            if graph.rows > members:
                self._stack.dissolve()
                self._stack = Stack(self._segments, graph.rows, self._unused)
            if self._passes(graph) is None:
                return self._result(graph, "")
        if self._stack.rows > members:
            self._stack.dissolve()
            self._stack = Stack(self._segments, members, self._unused)
        return None

    def _result(self, graph: Graph | None, why: str) -> Built:
        return Built(
            stack=self._stack, shared=self._shared, shape=self._batches.shape, graph=graph, why_no_graph=why
        )

    def _recorded(self) -> tuple[Graph | None, str]:
        """A new graph, or why there is none."""
        if not self._batches.traceable:
            return None, "its batches hold objects that a recording would take as fixed"
        self._charge()
        try:
            graph = self._stack.gradients.trace(self._batches)
        except Exception as error:  # whatever torch raises here is a reason
            return None, _said(error)
        if any(graph.random != reference.random for reference in self._references.values()):
            return None, "the recording does not draw the random numbers that the network draws"
        why = self._passes(graph)
        if why is not None:
            self._stack.gradients.use(None)
            return None, why
        return graph, ""

    def _passes(self, graph: Graph) -> str | None:
        """Run a graph, and tell what is wrong with its numbers."""
        self._stack.gradients.use(graph)
        self._charge()
        try:
            self._stack.check(self._batches, self._references)
        except Exception as error:  # a graph that cannot run is as good as none
            return _said(error)
        return None

    def _check_eager(self) -> None:
        self._charge()
        try:
            self._stack.check(self._batches, self._references)
        except CannotStackError:
            raise
        except Exception as error:
            raise CannotStackError(f"torch cannot vectorise it: {_said(error)}") from error

    def _charge(self) -> None:
        for segment in self._segments:
            segment.charge(1)


def _unused(references: Mapping[int, Reference]) -> frozenset[str]:
    """Parameters that the loss does not reach, which optimizers leave alone."""
    found = {
        frozenset(name for name, gradient in reference.gradients.items() if gradient is None)
        for reference in references.values()
    }
    if len(found) > 1:
        raise CannotStackError("the loss reaches other parameters in one member than in another")
    return found.pop()


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return (
        f"{type(error).__name__}: {lines[0][:200]}" if not isinstance(error, CannotStackError) else lines[0]
    )
