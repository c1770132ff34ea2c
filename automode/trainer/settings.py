"""The Trainer's settings: every argument is checked here, before anything is touched."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

import torch

from automode.backends.away import check_options
from automode.backends.choose import BackendName
from automode.errors import PolicyError, UsageError
from automode.planner.card_text import policy_from_yaml
from automode.planner.events import Mode
from automode.planner.policy import Policy
from automode.presets import preset_names, preset_text
from automode.trainer.cadence import cadence_of
from automode.trainer.callbacks import check_callbacks
from automode.trainer.key_presses import Keys
from automode.trainer.logger_choice import check_loggers
from automode.trainer.progress import Progress
from automode.trainer.run_metrics import check_metrics
from automode.trainer.schedule import Interval
from automode.trainer.trunk import Precision

Automode = bool | Literal["off", "observe", "propose", "act"]

MAX_SEED = (1 << 32) - 1
"""Largest seed that numpy's global generator takes."""

_YAML = (".yaml", ".yml")

S = TypeVar("S", bound=str)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to train, and what automode may do; see :class:`automode.trainer.trainer.Trainer` for each."""

    project: str = "default"
    run_name: str = "run"
    max_epochs: int | None = None
    max_steps: int | None = None
    automode: Automode = False
    policy: Policy | str | os.PathLike[str] | None = None
    session_dir: str | os.PathLike[str] = "automode-runs"
    val_every_n_epochs: int = 0
    do_test_after: bool = False
    device: str | torch.device = "auto"
    precision: Precision = "fp32"
    clip_norm: float | None = None
    accumulate_grad_batches: int = 1
    seed: int | None = None
    progress: Progress = "auto"
    scheduler_interval: Interval = "epoch"
    console: bool = True
    backend: BackendName = "inline"
    backend_options: Mapping[str, Any] | None = None
    checkpoint_every: str | None = "10 min"
    keep_checkpoints: int = 2
    resume: str | os.PathLike[str] | None = None
    callbacks: Sequence[Any] = ()
    metrics: Mapping[str, Any] | None = None
    logger: Any = None
    log_every_n_steps: int | None = None
    capture_logs: bool = False
    start_paused: bool = False
    hold: bool = False
    keys: Keys = "auto"

    def __post_init__(self) -> None:
        for name in ("project", "run_name"):
            _text(name, getattr(self, name))
        if self.max_epochs is not None and self.max_steps is not None:
            raise UsageError(
                f"max_epochs={self.max_epochs} and max_steps={self.max_steps} were both given; give exactly one"
            )
        for name in ("max_epochs", "max_steps"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), least=1)
        if not isinstance(self.automode, bool):
            one_of("automode", self.automode, get_args(Mode), also="True (the same as 'act') or False")
        if not isinstance(self.session_dir, str | os.PathLike):
            raise UsageError(f"session_dir must be a path, got {type(self.session_dir).__name__}")
        whole("val_every_n_epochs", self.val_every_n_epochs, least=0)
        one_of("precision", self.precision, get_args(Precision))
        one_of("backend", self.backend, get_args(BackendName))
        self._check_backend_options()
        one_of("scheduler_interval", self.scheduler_interval, get_args(Interval))
        self._check_flags()
        if self.clip_norm is not None and not (_number(self.clip_norm) and 0 < self.clip_norm < math.inf):
            raise UsageError(f"clip_norm must be a number above 0 or None, got {self.clip_norm!r}")
        whole("accumulate_grad_batches", self.accumulate_grad_batches, least=1)
        if self.log_every_n_steps is not None:
            whole("log_every_n_steps", self.log_every_n_steps, least=1)
        object.__setattr__(self, "callbacks", check_callbacks(self.callbacks))
        object.__setattr__(self, "metrics", check_metrics(self.metrics))
        object.__setattr__(self, "logger", check_loggers(self.logger))
        self._check_resuming()
        if self.seed is not None:
            whole("seed", self.seed, least=0, most=MAX_SEED)

    def _check_flags(self) -> None:
        if not isinstance(self.progress, bool):
            one_of("progress", self.progress, ("auto", "tqdm", "rich", "notebook"), also="True or False")
        if self.keys != "auto":
            _flag("keys", self.keys, also='"auto"')
        for name in ("do_test_after", "console", "capture_logs", "start_paused", "hold"):
            _flag(name, getattr(self, name))

    def _check_backend_options(self) -> None:
        options = self.backend_options
        if options is None:
            return
        if not isinstance(options, Mapping):
            raise UsageError(
                f"backend_options must be a mapping of names to values, got {type(options).__name__}"
            )
        check_options(self.backend, {name: value for name, value in options.items() if name != "slots"})
        if "slots" in options:
            whole("slots", options["slots"], least=1)

    def _check_resuming(self) -> None:
        if self.checkpoint_every is not None:
            cadence_of(self.checkpoint_every)
        whole("keep_checkpoints", self.keep_checkpoints, least=1)
        if self.resume is not None and not isinstance(self.resume, str | os.PathLike):
            raise UsageError(
                f'resume must be the folder of a session, "auto" or None, got {type(self.resume).__name__}'
            )

    @property
    def mode(self) -> Mode:
        """The mode asked for."""
        if isinstance(self.automode, bool):
            return "act" if self.automode else "off"
        return self.automode

    @property
    def epochs(self) -> int | None:
        """Epochs to train: as given, one where nothing was given, None where steps count."""
        return 1 if self.max_epochs is None and self.max_steps is None else self.max_epochs


def policy_of(given: Policy | str | os.PathLike[str] | None) -> Policy:
    """Give the policy that a user names.

    Args:
        given: A policy; the name of a preset; the path of a YAML file; or None for the defaults.

    Raises:
        UsageError: There is no such preset or file.
        PolicyError: The file is no policy.
    """
    return given if isinstance(given, Policy) else _read_policy(given)


def _read_policy(given: str | os.PathLike[str] | None) -> Policy:
    if given is None:
        return Policy()
    if not isinstance(given, str | os.PathLike):
        raise UsageError(
            f"policy must be a Policy, the name of a preset or the path of a YAML file, got {type(given).__name__}"
        )
    path = Path(given)
    if isinstance(given, str) and given in preset_names():
        text = preset_text(given)
    elif isinstance(given, os.PathLike) or path.suffix in _YAML or path.is_file():
        try:
            text = path.expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the policy file {given} cannot be read: {error}") from error
    else:
        text = preset_text(given)
    try:
        return policy_from_yaml(text)
    except PolicyError as error:
        raise PolicyError(f"policy {str(given)!r}: {error}") from error


def device_of(given: str | torch.device, parameters: Sequence[torch.Tensor]) -> torch.device:
    """Give the device to train on.

    Args:
        given: ``"auto"``: where the model is if that is an accelerator, else CUDA where there is one, else the CPU;
            or a device.
        parameters: The model's.

    Raises:
        UsageError: No such device here.
    """
    if isinstance(given, str) and given == "auto":
        home = parameters[0].device if parameters else torch.device("cpu")
        return torch.device("cuda") if home.type == "cpu" and torch.cuda.is_available() else home
    try:
        device = torch.device(given)
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"device={given!r} cannot be used here: {said}") from error
    if device.type == "meta":
        raise UsageError('device="meta" holds no numbers, so nothing can be trained there')
    return device


def one_of(name: str, value: object, allowed: Sequence[S], *, also: str = "") -> S:
    """Check that a value is one of a few words.

    Raises:
        UsageError: It is not; the message names the nearest.
    """
    if isinstance(value, str) and value in allowed:
        return cast(S, value)
    near = difflib.get_close_matches(value.lower(), allowed, n=1) if isinstance(value, str) else []
    hint = f"; did you mean {near[0]!r}?" if near else ""
    words = ", ".join(map(repr, allowed)) + (f", {also}" if also else "")
    raise UsageError(f"{name} must be one of {words}; got {value!r}{hint}")


def _text(name: str, value: object) -> None:
    if not isinstance(value, str) or not any(character.isalnum() for character in value):
        raise UsageError(f"{name} must be a string with a letter or digit in it, got {value!r}")


def whole(name: str, value: object, *, least: int, most: int | None = None) -> None:
    """Check that a value is a whole number within bounds.

    Raises:
        UsageError: It is not.
    """
    bounds = f"at least {least}" if most is None else f"from {least} to {most}"
    if (
        not isinstance(value, int)
        or isinstance(value, bool)
        or value < least
        or (most is not None and value > most)
    ):
        raise UsageError(f"{name} must be a whole number {bounds}, got {value!r}")


def _flag(name: str, value: Any, *, also: str = "") -> None:
    if not isinstance(value, bool):
        raise UsageError(f"{name} must be True or False{f' or {also}' if also else ''}, got {value!r}")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
