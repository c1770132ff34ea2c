"""The native Trainer: a plain PyTorch loop with automode watching it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from automode.backends.choose import BackendName
from automode.errors import UsageError
from automode.planner.policy import Policy
from automode.trainer.card_callbacks import CardCallback
from automode.trainer.controls import Controls
from automode.trainer.fit_request import FitRequest
from automode.trainer.key_presses import Keys
from automode.trainer.progress import Progress
from automode.trainer.result import FitResult
from automode.trainer.running import fit
from automode.trainer.schedule import Interval
from automode.trainer.settings import Automode, Settings, policy_of
from automode.trainer.steps import TrainingStep
from automode.trainer.trunk import Precision

F = TypeVar("F", bound=TrainingStep)
C = TypeVar("C", bound=CardCallback)


class Trainer(Controls):
    """Trains a model, writes a session of what happened, and lets automode act as far as it is allowed to.

    Nothing is done to the run that was not asked for: gradients are clipped, random generators seeded and the scheduler
    stepped only as the arguments say; loaders and samplers are never replaced, and the modules' ``training`` flags stay
    as they are. With ``automode="observe"`` the losses and the final weights equal those of a plain loop bit by bit.

    Args:
        project: Folder of the session.
        run_name: Begins the session's folder name.
        max_epochs: Passes over the training loader; 1 where neither this nor ``max_steps`` is given.
        max_steps: Training steps, in as many epochs as they take. Give at most one of the two. A step is a batch
            trained on, also where an own training step accumulates gradients over several.
        automode: ``False`` (``"off"``): record only. ``"observe"``: signals and rules run, cards are only recorded.
            ``"propose"``: cards wait for a person. ``True`` (``"act"``): cards within the policy run at once.
        policy: What automode may do: a :class:`Policy`, the name of a preset, or the path of a YAML file.
        session_dir: Where sessions live.
        val_every_n_epochs: Validate after every n-th epoch; 0: never.
        do_test_after: Evaluate once on ``test_loader`` when training has ended.
        device: Where to train; ``"auto"``: where the model is if that is an accelerator, else CUDA where there is one.
        precision: ``fp32``, ``bf16`` (autocast), or ``fp16`` (autocast and gradient scaling, CUDA only).
        clip_norm: Largest gradient norm; None: no clipping.
        accumulate_grad_batches: Batches whose gradients add up to one optimizer step, which is made on the mean of their
            losses. An epoch's last batch ends its group; of a loader without a length, a group goes on into the next epoch.
            Steps, ``max_steps`` included, count batches all the same.
        seed: Seeds Python, numpy and torch when ``fit`` begins; None: they are left alone. The session's own seed is this
            one, or drawn from the system and recorded.
        progress: Show a progress bar: True or ``"tqdm"``, ``"rich"`` (the extra ``automode[rich]``), ``"notebook"``; ``"auto"``: in a
            notebook or a terminal.
        scheduler_interval: When the scheduler is stepped: ``epoch``, ``step``, or ``manual`` (by the own training step).
        console: Print cards, events and where the session is.
        backend: What trains a card's specialists: ``inline`` (one after another, between the trunk's steps), ``stacked``
            (alike ones at once), ``auto`` (stacked where that pays), ``process`` (worker processes) or ``ray``.
        backend_options: For ``process`` and ``ray``: ``slots`` (trials at once, 2 unless given), ``patience``; ``start`` of
            ``process``; ``num_cpus`` and ``num_gpus`` of each actor whose card asks for nothing, ``address`` of the cluster and ``uri`` (a place that all
            nodes reach, for checkpoints) of ``ray``.
        checkpoint_every: How often the run's complete state is stored: ``"500 steps"``, ``"10 min"`` or ``"1 epoch"``; also at
            each best validation, when SIGINT or SIGTERM stops the run, when it fails and when it ends. None: never.
        keep_checkpoints: How many of those are kept, the best one apart.
        resume: Go on from the newest checkpoint of the session in this folder; ``"auto"``: of the newest unfinished session of
            this project and run name, or begin a fresh run where there is none. The environment variable ``AUTOMODE_RESUME``
            (set by ``automode resume``) names a session likewise.
        callbacks: Objects with Lightning's hook names (:class:`automode.Callback`), Lightning's own among them where they need
            none of its machinery; called in the training thread, between steps.
        metrics: By name, objects with ``update(outputs, targets)``, ``compute()`` and ``reset()`` (every torchmetrics metric):
            over each epoch of training (``train_NAME``), each validation (``val_NAME``) and the test.
        logger: Where scalars go besides the session: ``"csv"`` (``metrics.csv`` in its folder), ``"tensorboard"`` (event files
            there), any of Lightning's loggers, or a list of these. One that fails is warned of once and never ends the run.
        log_every_n_steps: Steps from one that loggers get to the next; None: every step by CSV and TensorBoard, each 50th by
            others.
        capture_logs: Keep what is printed, logged (:mod:`logging`) and warned of while ``fit`` runs in the session's log too.
        start_paused: Wait before the first step until somebody lets the run go on (:meth:`resume`, :meth:`step`).
        hold: Keep the finished run, with its model, for tests, checks and longer training until :meth:`release`,
            ``automode ctl SESSION release`` or SIGTERM; ``fit`` returns only then.
        keys: Take orders by single keys from the terminal (``?`` lists them) while ``fit`` runs in the main thread; ``"auto"``:
            where the progress bar is shown. A step of yours that reads standard input itself wants False.

    Raises:
        UsageError: An argument has a value that it cannot take.
        PolicyError: The policy's file is no policy.
    """

    def __init__(
        self,
        project: str = "default",
        run_name: str = "run",
        *,
        max_epochs: int | None = None,
        max_steps: int | None = None,
        automode: Automode = False,
        policy: Policy | str | os.PathLike[str] | None = None,
        session_dir: str | os.PathLike[str] = "automode-runs",
        val_every_n_epochs: int = 0,
        do_test_after: bool = False,
        device: str | torch.device = "auto",
        precision: Precision = "fp32",
        clip_norm: float | None = None,
        accumulate_grad_batches: int = 1,
        seed: int | None = None,
        progress: Progress = "auto",
        scheduler_interval: Interval = "epoch",
        console: bool = True,
        backend: BackendName = "inline",
        backend_options: Mapping[str, Any] | None = None,
        checkpoint_every: str | None = "10 min",
        keep_checkpoints: int = 2,
        resume: str | os.PathLike[str] | None = None,
        callbacks: Sequence[Any] = (),
        metrics: Mapping[str, Any] | None = None,
        logger: Any = None,
        log_every_n_steps: int | None = None,
        capture_logs: bool = False,
        start_paused: bool = False,
        hold: bool = False,
        keys: Keys = "auto",
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.settings = Settings(**given)  # every argument by its name
        self.policy = policy_of(policy)
        self._own_step: TrainingStep | None = None
        self._on_card: list[CardCallback] = []

    def training_step(self, function: F) -> F:
        """Train with a function of your own in place of the default step; use it as a decorator.

        The function takes ``(batch, state)`` and does all of a step itself, from ``zero_grad`` to ``optimizer.step``.
        ``state`` holds ``model``, ``optimizer``, ``loss_fn``, ``device``, ``autocast`` (a context manager), ``scaler``
        (passes everything through unless ``precision="fp16"``), ``scheduler``, ``step`` and ``epoch``; the batch is as
        the loader yields it. It returns a mapping: ``loss`` is the loss; ``outputs`` and ``targets``, where given, are
        what the loss was called with, one row a sample, and take part in per-sample signals; every other entry is a
        number that becomes a column of the session's frame.

        Returns:
            The function, unchanged.

        Raises:
            UsageError: It cannot be called.
        """
        if not callable(function):
            raise UsageError(
                f"training_step decorates a function of (batch, state), got {type(function).__name__}"
            )
        self._own_step = function
        return function

    def on_card(self, callback: C) -> C:
        """Have a function called with every plan card of the runs to come; use it as a decorator, in a notebook say.

        It is called in the training thread, between two steps, with the card and a
        :class:`automode.trainer.card_callbacks.CardHandle`: ``approve()``, ``reject(why)``, ``revise(note)`` and ``edit(...)``. Training
        waits for it; a handle that it keeps can answer later, from any thread. What it asks for is judged and recorded as every
        request is, with the actor ``callback``. Random numbers that it draws leave no trace, and an exception of its own is
        warned of and logged, and nothing more.

        Args:
            callback: A function of (card, handle).

        Returns:
            The function, unchanged.

        Raises:
            UsageError: It cannot be called.
        """
        if not callable(callback):
            raise UsageError(f"on_card takes a function of (card, handle), got {type(callback).__name__}")
        self._on_card.append(callback)
        return callback

    def fit(
        self,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Callable[..., Tensor],
        train_loader: Iterable[Any],
        val_loader: Iterable[Any] | None = None,
        test_loader: Iterable[Any] | None = None,
        scheduler: Any = None,
        slices: Mapping[str, Any] | None = None,
    ) -> FitResult:
        """Train to the end.

        Args:
            model: Trained in place; in act mode it ends on the accepted weights.
            optimizer: Of the model's parameters; one that needs a closure (LBFGS) gets it.
            loss_fn: ``loss_fn(outputs, targets)`` to a scalar.
            train_loader: Batches ``(inputs, targets)``; others need :meth:`training_step`.
            val_loader: Held-out batches; without them nothing can be proven, so act mode runs no forks, unless the policy names a share of
                the training data to hold out (``evidence.holdout_share``).
            test_loader: Batches that nothing is decided on.
            scheduler: A learning-rate scheduler of the optimizer. ``ReduceLROnPlateau`` gets the validation loss.
            slices: Named subsets of the validation set, tracked at every validation: a function of
                ``(inputs, targets)`` of a batch that gives a boolean mask over its samples, or a list of sample ids
                (positions in the dataset under every ``Subset``).

        Returns:
            The finished run.

        Raises:
            UsageError: An argument cannot be taken.
            DataError: The training loader is empty, or its batches cannot be trained on.
            SessionError: The session cannot be made, or the one to resume cannot be read.
            KeyboardInterrupt: SIGINT came; the state at the last step is stored, unless this was the second time.
            SystemExit: SIGTERM came, likewise.
        """
        request = FitRequest(
            model=model,
            optimizer=optimizer,
            loss_fn=loss_fn,
            train_loader=train_loader,
            val_loader=val_loader,
            test_loader=test_loader,
            scheduler=scheduler,
            slices=slices,
        )
        return fit(
            self.settings, self.policy, request, self._own_step, tuple(self._on_card), control=self._control
        )
