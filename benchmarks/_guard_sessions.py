"""Sessions that decide often, and what their decisions were worth on a test set that they never saw.

Nothing of the engine is replaced: cards are handed in by a callback, as a person would, and everything is read afterwards from
the session: which states a look at val-B compared (the command ``evaluate``), what came of it (the fact ``verdict_given``), and
the states themselves, which are durable checkpoints.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from _guard_tasks import BATCH, CARDS, EPOCHS, TASKS, Data, Plan, Task, plan
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from automode import Trainer
from automode.merges.gate import Gate
from automode.merges.moe import MixtureOfExperts
from automode.merges.trajectory import TrajectoryAverages
from automode.planner.policy import Policy
from automode.session import Session
from automode.session.checkpoints import CheckpointStore
from automode.trainer.evaluation import Evaluator, PerSampleScores
from automode.trainer.per_sample import per_sample_twin
from automode.trainer.steps import pair_step

AT_ONCE = 20_000


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One look at val-B, and what it was worth on the test set; differences are candidate minus control.

    Attributes:
        kind: Of the card, and of the candidate on it.
        metric: What acceptance compared.
        gain: Difference of its test mean.
        gain_se: Its standard error, paired by sample.
        error: Relative change of the test error (classes: share of wrong answers; regression: mean square), above 0: worse.
        loss: Relative change of the test loss.
        points: Difference of the test accuracy in points; NaN where there are no classes.
    """

    task: str
    seed: int
    own_cards: bool
    kind: str
    candidate: str
    look: int
    metric: str
    verdict: str
    z: float
    n: int
    gain: float
    gain_se: float
    error: float
    loss: float
    points: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One session: its decisions, how every card ended, and why cards that were handed in were refused."""

    decisions: list[Decision]
    cards: list[str]
    refused: list[str]


class HandIn:
    """A callback that hands in cards when a share of the run has been trained."""

    def __init__(self, plan: Plan, steps: int, group: list[int]) -> None:
        self.trainer: Trainer | None = None
        self._due = {
            max(1, round(at * steps)): made(kind, round(ladder * steps), group)
            for at, (kind, ladder) in plan.cards.items()
        }

    def on_train_batch_end(self, trainer: Any, model: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Hand in what is due."""
        card = self._due.pop(trainer.global_step, None)
        if card is not None:
            assert self.trainer is not None
            verb = self.trainer.merge if card["action"] == "merge" else self.trainer.fork
            verb(card=card, actor="guard")


def made(kind: str, top: int, group: list[int]) -> dict[str, Any]:
    """A card of a kind, with its ladder; specialists are for a group of training samples."""
    card = CARDS[kind] | {"because": kind, "cooldown_steps": 0}
    if card["action"] == "fork":
        whole = len(card["training_recipe"]["variants"]) == 1 or "merge_recipe" in card
        first = max(1, top // (1 if whole else 3))
        card |= {
            "budget_steps": first,
            "asha": {"reduction_factor": 3, "max_steps": first * (1 if whole else 3)},
        }
        if card["selection"]["kind"] == "indices":
            card["selection"] = {"kind": "indices", "ids": group}
    return card


def policy_of(plan: Plan) -> Policy:
    """The default policy; where cards are handed in, with compute for all of them and no cards of its own but the finish."""
    policy = Policy()
    if not plan.cards:
        return policy
    pacing = policy.pacing.model_copy(update={"exploration_share": 1.0, "total_share": 1.0})
    return policy.model_copy(update={"reasons": ("merge_cadence",), "budget": "on_top", "pacing": pacing})


def decided(task_name: str, seed: int, *, own_cards: bool) -> Outcome:
    """Run one session, and judge its decisions."""
    task = TASKS[task_name]
    drawn = plan(task_name, seed, own_cards=own_cards)
    data = task.make(seed)
    torch.manual_seed(seed)
    model = task.network()
    if drawn.sgd:
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            model.parameters(), lr=10 * drawn.rate, momentum=0.9, weight_decay=1e-4
        )
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=drawn.rate, weight_decay=0.01)
    steps = EPOCHS * -(-len(data.train[0]) // BATCH)
    hand_in = HandIn(drawn, steps, data.group)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            project="guard",
            max_epochs=EPOCHS,
            automode=True,
            policy=policy_of(drawn),
            session_dir=folder,
            val_every_n_epochs=2,
            scheduler_interval="step",
            seed=seed,
            progress=False,
            console=False,
            checkpoint_every=None,
            callbacks=[hand_in],
        )
        hand_in.trainer = trainer
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = trainer.fit(
                model=model,
                optimizer=optimizer,
                loss_fn=task.loss,
                train_loader=DataLoader(
                    TensorDataset(*data.train),
                    batch_size=BATCH,
                    shuffle=True,
                    generator=torch.Generator().manual_seed(seed),
                ),
                val_loader=DataLoader(TensorDataset(*data.val), batch_size=512),
                scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
                if drawn.cosine
                else None,
                slices=data.slices or None,
            )
        with result.session as session:
            return _read(session, Judge(task, data, session, steps), drawn)


class Judge:
    """Scores states of a session on its task's test set."""

    def __init__(self, task: Task, data: Data, session: Session, steps: int) -> None:
        self._model = task.network()
        self._checkpoints = CheckpointStore(session.path / "checkpoints")
        self._steps = steps
        self._known: dict[str, PerSampleScores] = {}
        self._x, self._y = data.test
        self._evaluator = Evaluator(
            step_fn=pair_step(task.loss, torch.device("cpu")),
            batches=self._batches,
            per_sample=per_sample_twin(task.loss),
            autocast=contextlib.nullcontext,
        )

    def _batches(self, part: Any) -> Iterator[tuple[Any, Any]]:
        for start in range(0, len(self._x), AT_ONCE):
            rows = slice(start, start + AT_ONCE)
            yield (self._x[rows], self._y[rows]), np.arange(start, start + len(self._x[rows]))

    def scores(self, reference: Mapping[str, Any], *, mixture: bool) -> PerSampleScores:
        """Score the state that a look at val-B compared."""
        key = f"{reference['checkpoint']}/{reference['choice']}/{mixture}"
        if key not in self._known:
            model = self._mixture(reference) if mixture else self._network(reference)
            self._known[key] = self._evaluator.scores(model, None)
        return self._known[key]

    def _network(self, reference: Mapping[str, Any]) -> nn.Module:
        model = copy.deepcopy(self._model)
        model.load_state_dict(self._state(reference))
        return model

    def _state(self, reference: Mapping[str, Any]) -> Mapping[str, Tensor]:
        weights, rest, _ = self._checkpoints.load(reference["checkpoint"])
        match reference["choice"]:
            case "raw":
                return weights
            case "ema" if "ema" in rest:
                return weights | rest["ema"]
            case choice:
                averages = TrajectoryAverages(dict(self._model.named_parameters()), self._steps)
                averages.load_state_dict(rest["averages"])
                return averages.candidates(weights)[choice]

    def _mixture(self, reference: Mapping[str, Any]) -> nn.Module:
        weights, _, manifest = self._checkpoints.load(reference["checkpoint"])
        about = manifest.get("manifest", manifest)
        gate = Gate(**about["gate"])
        gate.load_state_dict(weights)
        experts = [self._network(expert) for expert in about["experts"]]
        return MixtureOfExperts(
            experts, gate, feature_layer=about["layer"], task=about["task"], top1=about["top1"]
        )

    def decision(
        self, plan: Plan, kind: str, look: Mapping[str, Any], verdict: Mapping[str, Any]
    ) -> Decision:
        """Say what a look at val-B was worth."""
        mixture = look["candidate"] == "mixture"
        candidate = self.scores(look["weights"], mixture=mixture)
        control = self.scores(look["control"], mixture=False)
        difference = candidate.by(look["metric"]) - control.by(look["metric"])
        errors = [self._error(scores) for scores in (candidate, control)]
        losses = [float(scores.loss.mean()) for scores in (candidate, control)]
        classes = candidate.correct is not None
        return Decision(
            task=plan.task,
            seed=plan.seed,
            own_cards=bool(plan.cards),
            kind=kind,
            candidate=look["candidate"],
            look=look["look"],
            metric=look["metric"],
            verdict=verdict["verdict"],
            z=verdict["z"],
            n=verdict["n"],
            gain=float(difference.mean()),
            gain_se=float(difference.std(ddof=1) / np.sqrt(difference.size)),
            error=errors[0] / errors[1] - 1.0,
            loss=losses[0] / losses[1] - 1.0,
            points=100.0 * (errors[1] - errors[0]) if classes else float("nan"),
        )

    @staticmethod
    def _error(scores: PerSampleScores) -> float:
        return float(scores.loss.mean() if scores.correct is None else 1.0 - scores.correct.mean())


def _read(session: Session, judge: Judge, plan: Plan) -> Outcome:
    cards = {r.body["card"]["id"]: r.body["card"] for r in session.events(kind="card_proposed")}
    verdicts = {r.body["card"]: r.body for r in session.events(kind="verdict_given")}
    decisions = []
    for record in session.events(kind="evaluate"):
        look = record.body
        if look["card"] in verdicts:
            kind = kind_of(cards[look["card"]], look["candidate"])
            decisions.append(judge.decision(plan, kind, look, verdicts[look["card"]]))
    orders = session.events(kind="controlled")
    return Outcome(
        decisions=decisions,
        cards=[f"{_kind_of_card(cards[row.card_id])}: {row.state}" for row in session.cards()],
        refused=[str(r.body["refused"]) for r in orders if r.body["refused"]],
    )


def kind_of(card: Mapping[str, Any], candidate: str) -> str:
    """What a candidate is: an average of the trunk, a mixture, a merge of specialists, or a specialist, by its card."""
    if card["action"] != "fork":
        return "averages, finish" if card["created_by"] == "planner" else "averages, underway"
    if candidate == "mixture" or candidate.startswith("merge:"):
        return candidate
    return _kind_of_card(card) if card["reason"] != "manual" else candidate.partition(":")[2]


def _kind_of_card(card: Mapping[str, Any]) -> str:
    return str(card["because"] if card["reason"] == "manual" else card["reason"])


def as_plain(decision: Decision) -> dict[str, Any]:
    """A decision as JSON data."""
    return asdict(decision)
