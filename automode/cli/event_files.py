"""TensorBoard's event files, read by TensorBoard's own reader: the extra ``automode[tensorboard]``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from automode.cli.curve_table import Chooser, Column, Table
from automode.errors import NotExecutableError, UsageError
from automode.planner.yaml_text import shown


def read_events(path: Path, choose: Chooser) -> Table:
    """Read the scalars of an event file, or of all event files in a folder.

    Args:
        path: The file or folder.
        choose: Gets the tags, and returns those to keep.

    Raises:
        NotExecutableError: TensorBoard is not installed.
        UsageError: The files hold no scalars.
    """
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.util import tensor_util
    except ImportError as error:
        raise NotExecutableError(
            "event files are read by the tensorboard package, which is not installed: pip install 'automode[tensorboard]'"
        ) from error
    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    scalars, tensors = list(tags.get("scalars", ())), list(tags.get("tensors", ()))
    if not scalars and not tensors:
        raise UsageError(f"{shown(str(path), 400)} holds no scalars")
    table = Table(columns=("step", *scalars, *tensors))
    cells: list[tuple[float, int, float, str]] = []
    for tag in choose(table.columns):
        table.cells[tag] = Column()
        if tag == "step":
            continue
        for event in _events(events, tag, scalars):
            try:
                value = float(event.value if tag in scalars else tensor_util.make_ndarray(event.tensor_proto))
            except (TypeError, ValueError):
                raise UsageError(
                    f"{shown(str(path), 400)}: `{shown(tag)}` holds no numbers but text, a picture or many values at once"
                ) from None
            cells.append((event.wall_time, event.step, value, tag))
    steps = table.cells["step"] = Column()
    for _, step, value, tag in sorted(cells, key=lambda cell: cell[0]):
        steps.add(table.rows, float(step))
        table.cells[tag].add(table.rows, value)
        table.rows += 1
        table.lines.append(table.rows)
    return table


def _events(events: Any, tag: str, scalars: Sequence[str]) -> Sequence[Any]:
    found: Sequence[Any] = events.Scalars(tag) if tag in scalars else events.Tensors(tag)
    return found
