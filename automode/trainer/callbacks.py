"""Callbacks of the user's: objects with Lightning's hook names, called in the training thread between steps.

Hooks are looked up once, when ``fit`` begins; a run without a callback pays nothing for them. What a callback does is the
user's own: random numbers that it draws are drawn from the run's, and an exception of its own ends the run. Lightning's
callbacks work where they ask for what :class:`automode.trainer.callback_view.RunView` offers; those that take part of Lightning's
own machinery over are refused by name.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from automode.errors import UsageError
from automode.trainer.trees import is_plain

HOOKS = (
    "setup", "teardown", "on_fit_start", "on_fit_end", "on_train_start", "on_train_end",
    "on_train_epoch_start", "on_train_epoch_end", "on_train_batch_start", "on_train_batch_end",
    "on_before_optimizer_step", "on_validation_start", "on_validation_end", "on_validation_epoch_start",
    "on_validation_epoch_end", "on_test_start", "on_test_end", "on_test_epoch_start", "on_test_epoch_end", "on_exception",
    "state_dict", "load_state_dict",
)  # fmt: skip
"""Hooks that are called."""

_NEVER = frozenset(
    name
    for part in ("predict", "sanity_check")
    for name in (
        f"on_{part}_start", f"on_{part}_end", f"on_{part}_epoch_start", f"on_{part}_epoch_end",
        f"on_{part}_batch_start", f"on_{part}_batch_end",
    )
)  # fmt: skip
"""Hooks of what never happens here."""

_REFUSED = {
    "on_before_zero_grad": "write the step yourself (@trainer.training_step)",
    "on_before_backward": "write the step yourself (@trainer.training_step)",
    "on_after_backward": "use on_before_optimizer_step, or write the step yourself (@trainer.training_step)",
    "on_validation_batch_start": "use metrics=, which sees every validation batch",
    "on_validation_batch_end": "use metrics=, which sees every validation batch",
    "on_test_batch_start": "use metrics=",
    "on_test_batch_end": "use metrics=",
    "on_save_checkpoint": "return what is to be kept from state_dict()",
    "on_load_checkpoint": "take it back in load_state_dict()",
}
"""Lightning's hooks that are not called, and what to do in their place."""

_LIGHTNING = ("lightning.", "pytorch_lightning.")
_INSTEAD = {
    "Checkpoint": "checkpoints are stored by checkpoint_every= and keep_checkpoints=, the best validation apart",
    "ProgressBar": "the bar is chosen by progress=",
    "ModelSummary": "print the model's summary before fit",
    "RichModelSummary": "print the model's summary before fit",
    "StochasticWeightAveraging": "averages are kept beside the model in automode='propose' and True (policy: averages)",
    "WeightAveraging": "averages are kept beside the model in automode='propose' and True (policy: averages)",
    "GradientAccumulationScheduler": "use accumulate_grad_batches=",
    "BatchSizeFinder": "set the loader's batch size",
    "LearningRateFinder": "the rule learning_rate_probe looks for a better rate",
    "BaseFinetuning": "freeze and thaw parameters in a callback of your own",
    "ModelPruning": "prune in a callback of your own",
    "DeviceStatsMonitor": "memory and throughput are columns of the session's stream `epochs`",
    "ThroughputMonitor": "memory and throughput are columns of the session's stream `epochs`",
    "SpikeDetection": "spikes are detected in every mode but off",
    "BasePredictionWriter": "there is no prediction loop",
}
"""Lightning's own callbacks that need Lightning's machinery, by the name of a class they stem from."""


class Callback:
    """Base of a callback of your own; override what you need. Any object with methods of these names will do as well.

    ``trainer`` is a :class:`automode.trainer.callback_view.RunView`, ``model`` the model in training.
    """

    def setup(self, trainer: Any, model: Any, stage: str) -> None:
        """``fit`` begins (``stage="fit"``); a state that was stored has not been put back yet."""

    def teardown(self, trainer: Any, model: Any, stage: str) -> None:
        """``fit`` ends, whatever happened."""

    def on_fit_start(self, trainer: Any, model: Any) -> None:
        """Everything is in its place."""

    def on_fit_end(self, trainer: Any, model: Any) -> None:
        """Training is over, and nothing failed."""

    def on_train_start(self, trainer: Any, model: Any) -> None:
        """The first step is next."""

    def on_train_end(self, trainer: Any, model: Any) -> None:
        """The last step was taken."""

    def on_train_epoch_start(self, trainer: Any, model: Any) -> None:
        """An epoch begins; not called again for one that a resumed run goes on with."""

    def on_train_epoch_end(self, trainer: Any, model: Any) -> None:
        """An epoch is over, its validation included."""

    def on_train_batch_start(self, trainer: Any, model: Any, batch: Any, batch_idx: int) -> None:
        """A batch is about to be trained on."""

    def on_train_batch_end(self, trainer: Any, model: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A batch was trained on; ``outputs["loss"]`` is its loss."""

    def on_before_optimizer_step(self, trainer: Any, model: Any, optimizer: Any) -> None:
        """The optimizer is about to step; gradients have been unscaled and clipped."""

    def on_validation_start(self, trainer: Any, model: Any) -> None:
        """The validation set is about to be read."""

    def on_validation_end(self, trainer: Any, model: Any) -> None:
        """``trainer.callback_metrics`` holds what validation came to."""

    def on_validation_epoch_start(self, trainer: Any, model: Any) -> None:
        """Called after :meth:`on_validation_start`."""

    def on_validation_epoch_end(self, trainer: Any, model: Any) -> None:
        """Called before :meth:`on_validation_end`."""

    def on_test_start(self, trainer: Any, model: Any) -> None:
        """The test set is about to be read."""

    def on_test_end(self, trainer: Any, model: Any) -> None:
        """``trainer.callback_metrics`` holds what the test came to."""

    def on_test_epoch_start(self, trainer: Any, model: Any) -> None:
        """Called after :meth:`on_test_start`."""

    def on_test_epoch_end(self, trainer: Any, model: Any) -> None:
        """Called before :meth:`on_test_end`."""

    def on_exception(self, trainer: Any, model: Any, exception: BaseException) -> None:
        """Something failed, or the run was interrupted."""

    def state_dict(self) -> dict[str, Any]:
        """What is kept with the run's checkpoints: numbers, text, tensors and containers of them."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave when the run is taken up again; called before ``on_fit_start``."""


class Callbacks:
    """The callbacks of a run, each hook bound once.

    Args:
        callbacks: As the Trainer was given them.
    """

    def __init__(self, callbacks: Sequence[Any]) -> None:
        self.all = tuple(callbacks)
        self._bound = {
            hook: tuple(getattr(one, hook) for one in self.all if _overrides(one, hook))
            for hook in HOOKS
            if hook not in ("state_dict", "load_state_dict")
        }
        self._keys = _keys(self.all)
        self._lost: list[str] = []

    def of(self, hook: str) -> tuple[Callable[..., Any], ...]:
        """The methods that override a hook, in the order of the callbacks."""
        return self._bound[hook]

    def call(self, hook: str, *given: Any) -> None:
        """Call a hook of every callback that overrides it."""
        for method in self._bound[hook]:
            method(*given)

    def state(self) -> dict[str, Any]:
        """What the callbacks keep, by key; what cannot be stored is left out and named by :meth:`lost`."""
        found = {}
        self._lost = []
        for key, one in zip(self._keys, self.all, strict=True):
            if not _overrides(one, "state_dict"):
                continue
            state = one.state_dict()
            if is_plain(state):
                found[key] = state
            else:
                self._lost.append(
                    f"the callback {key} saves itself as more than numbers, text, tensors and containers of them"
                )
        return found

    def lost(self) -> list[str]:
        """What could not be taken when :meth:`state` was called last, in words."""
        return list(self._lost)

    def load(self, state: Mapping[str, Any]) -> list[str]:
        """Put back what :meth:`state` gave; returns what could not be, in words."""
        here = dict(zip(self._keys, self.all, strict=True))
        for key, kept in state.items():
            if key in here and _overrides(here[key], "load_state_dict"):
                here[key].load_state_dict(kept)
        return [
            f"the callback {key}, which had kept something, is no longer there"
            for key in state
            if key not in here
        ]


def check_callbacks(callbacks: Any) -> tuple[Any, ...]:
    """Refuse what cannot be called as it expects; returns the callbacks.

    Raises:
        UsageError: Not a list of callbacks, one that overrides a hook that is not called, or one that needs Lightning's
            own machinery.
    """
    if callbacks is None:
        return ()
    if isinstance(callbacks, str | bytes | Mapping) or not isinstance(callbacks, Iterable):
        raise UsageError(f"callbacks must be a list of callbacks, got {type(callbacks).__name__}")
    found = tuple(callbacks)
    for one in found:
        _check(one)
    return found


def _check(one: Any) -> None:
    kind = type(one)
    if isinstance(one, type):
        raise UsageError(f"callbacks holds the class {one.__name__}; make an object of it: {one.__name__}()")
    for stem in kind.__mro__:
        if stem.__module__.startswith(_LIGHTNING) and stem.__name__ in _INSTEAD:
            raise UsageError(
                f"callbacks: {kind.__name__} needs Lightning's own trainer, and this is automode's: {_INSTEAD[stem.__name__]}"
            )
    named = [name for name in dir(one) if name.startswith("on_") and callable(getattr(one, name, None))]
    for name in named:
        if name in HOOKS or name in _NEVER or not _overrides(one, name):
            continue
        if name in _REFUSED:
            raise UsageError(
                f"callbacks: {kind.__name__}.{name} would never be called by automode's Trainer; {_REFUSED[name]}"
            )
        near = difflib.get_close_matches(name, HOOKS, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; hooks are {', '.join(HOOKS)}"
        raise UsageError(f"callbacks: {kind.__name__}.{name} is no hook{hint}")
    if not any(_overrides(one, hook) for hook in HOOKS):
        raise UsageError(f"callbacks: {kind.__name__} has none of the hooks {', '.join(HOOKS)}")


def _overrides(one: Any, hook: str) -> bool:
    """Tell whether an object has a hook of its own, and not the empty one of a base class."""
    if hook in getattr(one, "__dict__", {}):
        return True
    for stem in type(one).__mro__:
        if hook in vars(stem):
            return not _is_base(stem)
    return False


def _is_base(stem: type) -> bool:
    return stem is Callback or (stem.__name__ == "Callback" and stem.__module__.startswith(_LIGHTNING))


def _keys(callbacks: Sequence[Any]) -> list[str]:
    """Name each callback for the checkpoint; equal names are numbered in their order."""
    keys: list[str] = []
    for one in callbacks:
        key = str(getattr(one, "state_key", type(one).__qualname__))
        same = sum(1 for other in keys if other.rpartition(" #")[0] == key or other == key)
        keys.append(key if not same else f"{key} #{same + 1}")
    return keys
