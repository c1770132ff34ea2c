"""A run whose loop a person wrote: what ``watch`` was given, checked and put into the parts that every run is made of."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, get_args

import torch
from torch import Tensor, nn

from automode.errors import DataError, NotExecutableError, UsageError
from automode.planner.events import Mode
from automode.planner.policy import Policy
from automode.session.paths import new_session_folder
from automode.session.taking_up import ENVIRONMENT
from automode.trainer.card_callbacks import CardCallback
from automode.trainer.data_cursor import DataCursor
from automode.trainer.evaluation import Evaluator
from automode.trainer.fit_request import FitRequest
from automode.trainer.given_ids import GivenIds
from automode.trainer.held_function import FunctionEvaluator, HeldOutFunction, unread
from automode.trainer.heldout import HeldOut
from automode.trainer.ids import RecordedLoader
from automode.trainer.per_sample import per_sample_twin
from automode.trainer.plan import Plan
from automode.trainer.probe import Probe
from automode.trainer.progress import Console
from automode.trainer.random_state import forked_rng
from automode.trainer.run_parts import RunParts
from automode.trainer.sample_ledger import SampleLedger
from automode.trainer.settings import Automode, Settings, one_of, policy_of, whole
from automode.trainer.steps import pair_step
from automode.trainer.trunk import Trunk
from automode.trainer.validation import Validation, resolve_slices

HAND_WRITTEN = "the loop is the user's own, seen through a hook (automode.watch)"
"""Why a watched run cannot be forked, in the words that stand on a refusal."""

NO_TRAIN = "watch was not given the training loader (train=), so samples have no ids that lead back to them"

LossFn = Callable[..., Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchRequest:
    """The arguments of :func:`automode.trainer.watching.watch`; see there for each."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    mode: Automode = "observe"
    loss_fn: LossFn | None = None
    train: Iterable[Any] | None = None
    val: Any = None
    val_samples: int | None = None
    scheduler: Any = None
    slices: Mapping[str, Any] | None = None
    total_steps: int | None = None
    batch_size: int | None = None
    policy: Policy | str | os.PathLike[str] | None = None
    project: str = "default"
    run_name: str = "run"
    session_dir: str | os.PathLike[str] = "automode-runs"
    seed: int | None = None
    console: bool = True
    on_card: Sequence[CardCallback] = ()

    def parts(self) -> RunParts:
        """Check everything, then make everything; the session's folder comes last. Nothing of the user's is touched.

        Raises:
            UsageError: An argument cannot be taken.
            DataError: The held-out data cannot be read.
            PolicyError: The policy's file is no policy.
            NotExecutableError: The policy asks for what cannot be done, or the run is asked to resume.
            SessionError: The session's folder cannot be made.
        """
        self._check_kinds()
        settings, policy = self._settings(), policy_of(self.policy)
        if policy.evidence.holdout_share is not None and self.val is None:
            raise NotExecutableError(
                "policy.evidence.holdout_share holds samples out of the batches of our own loop, and this loop is yours: hold them out there, and "
                "pass them as val"
            )
        request = FitRequest(
            model=self.model,
            optimizer=self.optimizer,
            loss_fn=_unknown_loss if self.loss_fn is None else self.loss_fn,
            train_loader=Unread() if self.train is None else self.train,
            val_loader=None if self._by_function else self.val,
            scheduler=self.scheduler,
            slices=None if self._by_function else self.slices,
        )
        self._check(settings)
        request.check(settings, own_step=True)
        device = next(self.model.parameters()).device
        seed = secrets.randbits(32) if self.seed is None else self.seed
        loader = RecordedLoader(request.train_loader)
        if self.train is None:
            loader.reason = NO_TRAIN
        trunk = Trunk(
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            step_fn=_unknown_step if self.loss_fn is None else pair_step(self.loss_fn, device),
            loss_fn=request.loss_fn,
            device=device,
            loader=None,
        )
        with forked_rng():
            held_out, evaluator = self._held_out(trunk, seed)
            slices = {} if held_out is None or not self.slices else resolve_slices(self.slices, held_out)
        return RunParts(
            settings=settings,
            request=request,
            own_step=_unseen_step if self.loss_fn is None else None,
            policy=policy,
            mode=settings.mode,
            why_mode=None,
            seed=seed,
            plan=Plan(max_epochs=None, max_steps=self.total_steps, steps_per_epoch=None, validate_every=0),
            trunk=trunk,
            loader=loader,
            cursor=DataCursor(loader),
            probe=self._probe(trunk, loader, watched=settings.mode != "off"),
            held_out=held_out,
            evaluator=evaluator,
            slices=slices,
            validation=None if evaluator is None else Validation(self.model, evaluator, slices),
            test=None,
            console=Console(False, speak=self.console, description=self.run_name),
            session_path=new_session_folder(self.session_dir, self.project, self.run_name),
            on_card=tuple(self.on_card),
            hand_written=HAND_WRITTEN,
            batch=None if self.batch_size is None else float(self.batch_size),
        )

    @property
    def _by_function(self) -> bool:
        return callable(self.val) and not hasattr(self.val, "__iter__")

    def _held_out(self, trunk: Trunk, seed: int) -> tuple[HeldOut | None, Evaluator | None]:
        if self.val is None:
            return None, None
        if not self._by_function:
            held_out = HeldOut(self.val, trunk.device, seed)
            return held_out, Evaluator(
                step_fn=trunk.step_fn,
                batches=held_out.batches,
                per_sample=per_sample_twin(trunk.loss_fn),
                autocast=trunk.autocast,
            )
        assert self.val_samples is not None
        function = HeldOutFunction(self.val_samples, seed)
        evaluator = FunctionEvaluator(
            step_fn=unread,
            batches=function.batches,
            per_sample=per_sample_twin(trunk.loss_fn),
            autocast=trunk.autocast,
            losses=self.val,
            held_out=function,
            seed=seed,
        )
        evaluator.scores(trunk.model, "A")  # a mistake shows now, and not at the end of the run
        return function, evaluator

    def _settings(self) -> Settings:
        given: Any = self.optimizer
        if isinstance(given, list | tuple):
            raise UsageError(
                f"watch follows one optimizer, and {len(given)} came; watch the one that trains what you care about"
            )
        if not isinstance(self.mode, bool):
            one_of("mode", self.mode, get_args(Mode), also="True (the same as 'act') or False")
        return Settings(
            project=self.project,
            run_name=self.run_name,
            max_steps=self.total_steps,
            automode=self.mode,
            policy=self.policy,
            session_dir=self.session_dir,
            seed=self.seed,
            scheduler_interval="manual",
            progress=False,
            console=self.console,
            checkpoint_every=None,
        )

    def _check_kinds(self) -> None:
        """Refuse by the names that they have here what other rooms would name otherwise."""
        if self.total_steps is not None:
            whole("total_steps", self.total_steps, least=1)
        for name, loader in (("train", self.train), ("val", None if self._by_function else self.val)):
            if loader is not None and not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
                raise UsageError(
                    f"{name} must be a DataLoader or another iterable of batches, got {type(loader).__name__}"
                )
        if isinstance(self.val, Iterator):
            raise UsageError(
                "val is an iterator, which can be read only once, and held-out data are read again and again; give a DataLoader or a "
                "list of batches"
            )
        if not isinstance(self.on_card, Sequence) or not all(map(callable, self.on_card)):
            raise UsageError("on_card takes a list of functions of (card, handle)")

    def _check(self, settings: Settings) -> None:
        if named := os.environ.get(ENVIRONMENT):
            raise NotExecutableError(
                f"{ENVIRONMENT} asks to resume {named}, and a loop of your own cannot be resumed by automode: its place in the "
                "data is in your code; unset the variable and start the script afresh"
            )
        if self._by_function != (self.val_samples is not None):
            raise UsageError(
                "val_samples says how many samples a val that is a function of (model, ids) knows; give both, or a loader as val"
            )
        if self.val_samples is not None:
            whole("val_samples", self.val_samples, least=2)
        if self.slices and self.val is None:
            raise UsageError("slices are subsets of the held-out samples; give val too")
        if self.val is not None and not self._by_function and self.loss_fn is None:
            raise UsageError(
                "val is a loader, and how the model is judged on its batches is not known; give loss_fn too, which is called as "
                "loss_fn(outputs, targets)"
            )
        if self.batch_size is not None:
            whole("batch_size", self.batch_size, least=1)
        if settings.mode not in ("propose", "act"):
            return
        if self.total_steps is None:
            raise UsageError(
                f"mode={settings.mode!r} plans with the run's compute, so that its length has to be known; give "
                "total_steps=epochs * len(loader)"
            )
        if self.batch_size is None and self.train is None:
            raise UsageError(
                f"mode={settings.mode!r} prices what it does in samples, so that the size of a step has to be known; give "
                "batch_size=, or the training loader as train="
            )

    def _probe(self, trunk: Trunk, loader: RecordedLoader, *, watched: bool) -> Probe:
        if not watched or self.loss_fn is None:
            return Probe(trunk.parameters)
        ids = GivenIds(loader if self.train is not None else None)
        ledger = SampleLedger(loader.length, fingerprint=loader.fingerprint)
        return Probe(trunk.parameters, per_sample_twin(self.loss_fn), ids, ledger)


class Unread:
    """Stands where a training loader would: automode does not read the batches of a loop that is not its own."""

    def __iter__(self) -> Iterator[Any]:
        raise DataError("watch was not given the training loader; give it as train=")


def _unknown_loss(*_: Any, **__: Any) -> NoReturn:
    raise NotExecutableError("how the loop makes a loss of a batch is not known; give watch its loss_fn")


def _unknown_step(model: nn.Module, batch: Any) -> NoReturn:
    _unknown_loss()


def _unseen_step(batch: Any, state: dict[str, Any]) -> NoReturn:
    """Stands for the training step of a loop that shows its losses alone; it is never called."""
    raise AssertionError
