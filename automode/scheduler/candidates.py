"""Candidates from a search space, drawn one at a time by Optuna's samplers; nothing else of Optuna is used.

Every draw is a function of the space, the seed, the draw's number and what was told before it, so that a saved state
draws the same candidates as the live object. Optuna's study lives for one draw, in memory; no pruner, no file, no
database. Tree-structured Parzen estimator: Bergstra et al., Algorithms for Hyper-Parameter Optimization, NeurIPS 2011.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from automode.errors import SchedulerError, UsageError
from automode.scheduler.decisions import decode_value, encode_value
from automode.scheduler.ladder import whole
from automode.scheduler.protocol import metric
from automode.scheduler.rung import Value, is_usable
from automode.scheduler.settings import Mode
from automode.scheduler.space import Choices, Parameter, Range, Steps, parse_space

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

SamplerName = Literal["tpe", "random", "grid"]

MAX_GRID = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One drawn candidate.

    Attributes:
        trial: Its number, counted from 0 in the order of drawing, as ASHA counts its trials.
        values: A value for every parameter of the space.
    """

    trial: int
    values: dict[str, Any]


@dataclass(slots=True, kw_only=True)
class _Drawn:
    """A drawn candidate in the sampler's own terms (choices and steps by their places), and the latest that was told of it."""

    internal: dict[str, float | int]
    resource: int | None = None
    value: Value = None
    final: bool = False
    given_up: bool = False


class Candidates:
    """A seeded source of candidates with ask and tell.

    Args:
        space: Name -> ``{"low": .., "high": .., "log": bool, "step": .., "integer": bool}`` (the last three optional)
            or ``{"choices": [..]}`` with at least one value of any kind.
        sampler: ``"tpe"`` learns from what it is told, ``"random"`` does not, ``"grid"`` visits every combination once
            in a seeded order; ranges then need a ``step``.
        seed: A whole number >= 0.
        mode: ``"min"`` when smaller values are better, ``"max"`` when larger ones are.
        startup: How many candidates TPE draws at random before it learns.

    Raises:
        UsageError: The space or another argument cannot be taken; the message names the parameter.

    Example:
        >>> source = Candidates({"lr_mul": {"low": 0.1, "high": 10, "log": True}}, sampler="random", seed=1)
        >>> candidate = source.ask()
        >>> 0.1 <= candidate.values["lr_mul"] <= 10
        True
        >>> source.tell(candidate.trial, 0.42)
    """

    __slots__ = ("_drawn", "_grid", "_parameters", "_space", "mode", "sampler", "seed", "startup")

    def __init__(
        self,
        space: Mapping[str, Mapping[str, Any]],
        *,
        sampler: SamplerName = "tpe",
        seed: int = 0,
        mode: Mode = "min",
        startup: int = 10,
    ) -> None:
        self._parameters = parse_space(space)
        self._space = {name: dict(spec) for name, spec in space.items()}
        if sampler not in ("tpe", "random", "grid"):
            raise UsageError(f"sampler is {sampler!r}, but must be 'tpe', 'random' or 'grid'")
        if mode not in ("min", "max"):
            raise UsageError(f"mode is {mode!r}, but must be 'min' or 'max'")
        self.sampler = sampler
        self.seed = whole("seed", seed, least=0)
        self.mode = mode
        self.startup = whole("startup", startup, least=1)
        self._drawn: list[_Drawn] = []
        self._grid = self._lay_grid() if sampler == "grid" else None

    @property
    def size(self) -> int | None:
        """How many candidates there are in all; ``None`` when there is no end to them."""
        return None if self._grid is None else len(self._grid)

    @property
    def asked(self) -> int:
        """How many candidates were drawn."""
        return len(self._drawn)

    def ask(self) -> Candidate:
        """Draw the next candidate.

        Raises:
            SchedulerError: Every point of the grid was drawn; :attr:`size` tells how many there are.
        """
        number = len(self._drawn)
        if self._grid is None:
            internal = self._sample(number)
        elif number < len(self._grid):
            internal = self._grid_point(int(self._grid[number]))
        else:
            raise SchedulerError(
                f"the grid has {len(self._grid)} points and all of them were drawn: ask no more"
            )
        self._drawn.append(_Drawn(internal=internal))
        return self.candidate(number)

    def candidate(self, trial: int) -> Candidate:
        """Give a candidate that was drawn before.

        Raises:
            SchedulerError: It was never drawn.
        """
        internal = self._known(trial).internal
        return Candidate(
            trial=trial, values={name: p.external(internal[name]) for name, p in self._parameters.items()}
        )

    def tell(self, trial: int, value: object, *, resource: int | None = None) -> None:
        """Say how a candidate did, so that TPE can learn from it.

        Candidates told without a resource count as finished and are compared by value. With one, the latest report
        counts: candidates that reached higher resources rank before the others, as a higher rung says more.

        Args:
            trial: The candidate's number.
            value: The metric; NaN, infinite or ``None`` ranks last.
            resource: Resource at which it was measured, or ``None`` for a fully trained candidate.

        Raises:
            SchedulerError: It was never drawn.
            UsageError: An argument is not a number of its kind.
        """
        drawn = self._known(trial)
        number = metric(value)
        if resource is None:
            drawn.final, drawn.value, drawn.resource = True, number, None
        elif not drawn.final and whole("resource", resource, least=1) >= (drawn.resource or 0):
            drawn.value, drawn.resource = number, resource

    def give_up(self, trial: int) -> None:
        """Say that a candidate broke for a reason of its own machine's: TPE learns nothing from it.

        Raises:
            SchedulerError: It was never drawn.
        """
        self._known(trial).given_up = True

    def to_state(self) -> dict[str, Any]:
        """Give the whole state as plain data that strict JSON can hold, if the choices can."""
        return {
            "version": 1,
            "space": {name: dict(spec) for name, spec in self._space.items()},
            "sampler": self.sampler,
            "seed": self.seed,
            "mode": self.mode,
            "startup": self.startup,
            "drawn": [
                {
                    "internal": dict(each.internal),
                    "resource": each.resource,
                    "value": encode_value(each.value),
                    "final": each.final,
                    "given_up": each.given_up,
                }
                for each in self._drawn
            ],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Candidates:
        """Rebuild the source from :meth:`to_state`; it draws the same from there on.

        Raises:
            SchedulerError: The state is no such value, or contradicts itself.
        """
        try:
            read = _CandidatesState.model_validate(state)
            source = cls(
                read.space, sampler=read.sampler, seed=read.seed, mode=read.mode, startup=read.startup
            )
        except (ValidationError, UsageError) as error:
            raise SchedulerError(
                f"this is no candidates state that this version can read: {error}"
            ) from error
        for each in read.drawn:
            fits = each.internal.keys() == read.space.keys() and all(
                parameter.holds(each.internal[name]) for name, parameter in source._parameters.items()
            )
            if not fits:
                raise SchedulerError(
                    f"the candidates state contradicts itself: {each.internal} is not in the space"
                )
            drawn = _Drawn(
                internal=dict(each.internal),
                resource=each.resource,
                value=decode_value(each.value),
                final=each.final,
                given_up=each.given_up,
            )
            source._drawn.append(drawn)
        return source

    def _known(self, trial: int) -> _Drawn:
        number = whole("trial", trial, least=0)
        if number >= len(self._drawn):
            raise SchedulerError(
                f"candidate {number} was never drawn: {len(self._drawn)} were, counted from 0"
            )
        return self._drawn[number]

    # Drawing.

    def _lay_grid(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        # Optuna's GridSampler ends its study from within tell(), which raises outside of optimize().
        size = math.prod(parameter.grid_size(name) for name, parameter in self._parameters.items())
        if size > MAX_GRID:
            raise UsageError(
                f"the grid has {size} points, and {MAX_GRID} are the most: draw with 'tpe' or 'random'"
            )
        return np.random.default_rng(np.random.SeedSequence(self.seed)).permutation(size)

    def _grid_point(self, index: int) -> dict[str, float | int]:
        point: dict[str, float | int] = {}
        for name, parameter in self._parameters.items():
            index, point[name] = divmod(index, parameter.grid_size(name))
        return point

    def _sample(self, number: int) -> dict[str, float | int]:
        import optuna

        words = np.random.SeedSequence(self.seed, spawn_key=(number,)).generate_state(1)
        distributions = {name: _distribution(parameter) for name, parameter in self._parameters.items()}
        with _quiet():
            storage = optuna.storages.InMemoryStorage()
            direction = (
                optuna.study.StudyDirection.MINIMIZE
                if self.mode == "min"
                else optuna.study.StudyDirection.MAXIMIZE
            )
            storage.create_new_study([direction], "automode")
            sampler = self._sampler(int(words[0]))
            study = optuna.Study("automode", storage, sampler=sampler, pruner=optuna.pruners.NopPruner())
            if self.sampler == "tpe":
                study.add_trials(self._history(distributions))
            params = study.ask(fixed_distributions=distributions).params
        return {name: params[name] for name in self._parameters}

    def _sampler(self, seed: int) -> BaseSampler:
        import optuna

        if self.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=self.startup, constant_liar=True)

    def _history(self, distributions: Mapping[str, BaseDistribution]) -> Sequence[FrozenTrial]:
        from optuna.trial import TrialState, create_trial

        trials = []
        for each in self._drawn:
            told = each.final or each.resource is not None
            value: Value = None
            reached: dict[int, float] = {}
            if each.given_up:
                state = TrialState.FAIL
            elif not told:
                state = TrialState.RUNNING  # taken for a bad one, so that the next draw goes elsewhere
            elif not is_usable(each.value):
                state = TrialState.PRUNED  # without a report it ranks behind every other
            elif each.final:
                state, value = TrialState.COMPLETE, each.value
            else:
                assert each.resource is not None
                assert each.value is not None
                state, reached = TrialState.PRUNED, {each.resource: each.value}
            trials.append(
                create_trial(
                    state=state,
                    value=value,
                    params=dict(each.internal),
                    distributions=dict(distributions),
                    intermediate_values=reached,
                )
            )
        return trials


def _distribution(parameter: Parameter) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    match parameter:
        case Choices(values=values):
            return CategoricalDistribution(tuple(range(len(values))))
        case Steps():
            return IntDistribution(0, parameter.count - 1)
        case Range(integer=True):
            return IntDistribution(int(parameter.low), int(parameter.high), log=True)
        case Range():
            return FloatDistribution(parameter.low, parameter.high, log=parameter.log)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna from announcing studies and experimental options, and leave its verbosity as it was."""
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


class _DrawnState(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    internal: dict[str, int | float]
    resource: int | None
    value: float | Literal["nan", "inf", "-inf"] | None
    final: bool
    given_up: bool


class _CandidatesState(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1]
    space: dict[str, dict[str, Any]]
    sampler: SamplerName
    seed: int
    mode: Mode
    startup: int
    drawn: list[_DrawnState]
