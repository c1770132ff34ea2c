"""Which backend trains a run's specialists, made from the run's parts."""

from __future__ import annotations

from automode.backends.away import Away
from automode.backends.base import Backend
from automode.backends.choose import make_backend
from automode.backends.inline import InlineBackend
from automode.errors import NotExecutableError
from automode.planner.events import Mode
from automode.session.checkpoints import CheckpointStore
from automode.trainer.run_parts import RunParts
from automode.trainer.sample_source import FixedPass
from automode.trainer.specialists import SpecialistRunner
from automode.trainer.stackable import StackableSpecialists
from automode.trainer.user_warning import warn_user
from automode.trainer.worker_runner import CardBriefs, SpecialistFactory, specialist_factory


def backend_of(
    parts: RunParts,
    mode: Mode,
    runner: SpecialistRunner | None,
    refresh: FixedPass,
    checkpoints: CheckpointStore,
) -> Backend | None:
    """Make the backend that the Trainer was asked for.

    Where its workers cannot have what training needs (a lambda in the model, say), the person is told why, and the inline
    backend takes its place. A run that only observes starts no workers.

    Args:
        parts: The run.
        mode: The mode that it begins in.
        runner: Trains specialists; None where forks are refused, and then there is no backend.
        refresh: Training batches for norm statistics.
        checkpoints: The session's checkpoints.

    Raises:
        UsageError: There is no backend of that name.
    """
    if runner is None:
        return None
    name = parts.settings.backend
    if name == "inline" or mode in ("off", "observe"):
        return InlineBackend(runner)
    evaluator, held_out = parts.evaluator, parts.held_out
    assert evaluator is not None
    assert held_out is not None

    def factory() -> SpecialistFactory:
        return specialist_factory(
            runner, evaluator, held_out=held_out, refresh=refresh, checkpoints=checkpoints.root
        )

    options = dict(parts.settings.backend_options or {})
    slots = options.pop("slots", None)
    try:
        return make_backend(
            name,
            StackableSpecialists(runner) if name in ("stacked", "auto") else runner,
            model=parts.trunk.model,
            away=Away(
                factory=factory,
                brief=CardBriefs(runner),
                checkpoints=checkpoints,
                options=options,
            ),
            slots=slots,
        )
    except NotExecutableError as error:
        warn_user(f"backend={name!r} cannot train this run's specialists ({error}); they train inline")
        return InlineBackend(runner)
