"""Candidates that are made of others: the fitted gate, the merges, and the one look at val-B."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from automode.errors import NotExecutableError
from automode.merges.averages import interpolate, uniform
from automode.merges.batches import device_of
from automode.merges.fisher import Categorical, Gaussian, Likelihood, diagonal_fisher
from automode.merges.gate import fit_gate
from automode.merges.gate_evidence import GateEvidence, gather_evidence
from automode.merges.moe import MixtureOfExperts, last_layer
from automode.merges.soups import fisher_average, greedy
from automode.planner.cards import PlanCard
from automode.planner.events import Evaluate, Evaluated, FitGate, GateFitted, Merge, Merged, Task, Weights
from automode.planner.recipes import (
    MergeAdapterFuse,
    MergeDistill,
    MergeFisherSoup,
    MergeInterpolate,
    MergeSwa,
)
from automode.trainer.adapting import best_fused
from automode.trainer.distilling import Distiller
from automode.trainer.evaluation import Part, PerSampleScores
from automode.trainer.evidence import EVERYTHING, Evidence, metrics_of
from automode.trainer.random_state import seeded_rng
from automode.trainer.states import REFRESH_SEED, States
from automode.trainer.stored_states import Checkpoints

Batches = Callable[[], Iterable[Any]]


class Combiner:
    """Fits gates, merges, and compares on the second held-out half.

    Args:
        evidence: Held-out scores.
        states: Loads candidates.
        checkpoints: Durable states.
        val_a: A fresh pass over val-A's batches.
        training: A fresh pass over some training batches, for Fisher information.
        task: What the targets are.
        seed: The session's seed.

    Attributes:
        distiller: Trains students; None where no specialist can be trained.
    """

    distiller: Distiller | None = None

    def __init__(
        self,
        *,
        evidence: Evidence,
        states: States,
        checkpoints: Checkpoints,
        val_a: Batches,
        training: Batches,
        task: Task,
        seed: int,
    ) -> None:
        self._evidence = evidence
        self._states = states
        self._checkpoints = checkpoints
        self._val_a = val_a
        self._training = training
        self._task = task
        self._seed = seed

    # The gate.

    def fit_gate(self, card: PlanCard, command: FitGate) -> GateFitted:
        """Fit a router over the control and the specialists on val-A; its value is cross-fitted over two halves of it.

        Raises:
            NotExecutableError: The task is none that a mixture can answer.
        """
        recipe = card.gate_recipe
        assert recipe is not None
        if self._task not in ("classification", "regression"):
            raise NotExecutableError(f"a gate mixes classes or values, and this run's task is {self._task}")
        references = (command.control, *command.experts)
        models, passes = [], 0.0
        for reference in references:
            model, _, spent = self._states.model(reference)
            models.append(model)
            passes += spent
        layer = last_layer(models[0])
        seen = gather_evidence(models, self._val_a(), feature_layer=layer, task=self._task)
        seed = (self._seed + card.step) & 0x7FFFFFFF
        value, judged = self._cross_fitted(models, seen, card, layer, seed)
        gate, report = fit_gate(
            seen.features,
            seen.log_lik,
            temperature=recipe.temperature,
            load_balance=recipe.load_balance,
            epochs=recipe.epochs,
            seed=seed,
        )
        digest = self._checkpoints.save(
            gate.state_dict(),
            {},
            {
                "kind": "mixture",
                "card": card.id,
                "gate": gate.config(),
                "layer": layer,
                "task": self._task,
                "top1": recipe.top1,
                "experts": [reference.model_dump(mode="json") for reference in references],
            },
        )
        share = sum(p.numel() for p in gate.parameters()) / max(
            1, sum(p.numel() for p in models[0].parameters())
        )
        training = 3.0 * 2.0 * recipe.epochs * seen.samples * share
        return GateFitted(
            card=card.id,
            value=value,
            metric=card.acceptance.metric,
            loads=report.loads,
            entropy=report.entropy,
            experts=("control", *(command.names or (f"expert {i}" for i in range(1, len(references))))),
            checkpoint=digest,
            passes=passes + seen.passes + judged + math.ceil(training),
        )

    def _cross_fitted(
        self, models: list[nn.Module], seen: GateEvidence, card: PlanCard, layer: str, seed: int
    ) -> tuple[float, float]:
        """Return (mean of the card's metric, sample passes) on val-A where each half is answered by the router fitted on the other.

        The experts' outputs are mixed again for each half by the mixture itself, so that value and candidate are the same thing.
        """
        recipe = card.gate_recipe
        assert recipe is not None
        order = np.random.default_rng(np.random.SeedSequence([seed, 2])).permutation(seen.features.shape[0])
        halves = (order[: order.size // 2], order[order.size // 2 :])
        utility: Tensor | None = None
        passes = 0.0
        for fit_on, judge_on in (halves, halves[::-1]):
            index = torch.from_numpy(fit_on.copy())
            gate, _ = fit_gate(
                seen.features[index],
                seen.log_lik[index],
                temperature=recipe.temperature,
                load_balance=recipe.load_balance,
                epochs=recipe.epochs,
                seed=seed,
            )
            mixture = MixtureOfExperts(
                models, gate, feature_layer=layer, task=self._mixture_task, top1=recipe.top1
            ).to(device_of(models[0]))
            scores = self._evidence.scores(mixture, "A")
            passes += scores.n * len(models)
            values = torch.from_numpy(np.asarray(scores.by(card.acceptance.metric), dtype=np.float64))
            utility = torch.zeros_like(values) if utility is None else utility
            utility[torch.from_numpy(judge_on.copy())] = values[torch.from_numpy(judge_on.copy())]
            passes += float(scores.n * len(models))
        assert utility is not None
        return float(utility.mean()), passes

    @property
    def _mixture_task(self) -> Any:
        return self._task

    def mixture(self, digest: str) -> MixtureOfExperts:
        """Rebuild a fitted mixture from its checkpoint."""
        from automode.merges.gate import Gate

        weights, _, manifest = self._checkpoints.load(digest)
        about = manifest.get("manifest", manifest)
        gate = Gate(**about["gate"])
        gate.load_state_dict(weights)
        models = [self._states.model(Weights.model_validate(reference))[0] for reference in about["experts"]]
        return MixtureOfExperts(
            models, gate, feature_layer=about["layer"], task=about["task"], top1=about["top1"]
        ).to(device_of(models[0]))

    # Merges.

    def merge(self, card: PlanCard, command: Merge, step: int) -> Merged:
        """Merge the control and the specialists as the card says, score the result on val-A, and make it durable."""
        assert command.control is not None
        recipe = card.merge_recipe
        if isinstance(recipe, MergeDistill):
            return self._distil(card, command, step)
        references = (command.control, *command.members)
        states = [self._states.load(reference)[0] for reference in references]
        model = self._states.shell()
        passes, why = 0.0, ""

        def score(state: Mapping[str, Tensor]) -> float:
            nonlocal passes
            passes += self._states.put(model, state, averaged=True)
            value, spent = self._evidence.value(model, metric=card.acceptance.metric)
            passes += spent
            return value

        match recipe.kind if recipe is not None else None:
            case "uniform":
                merged = uniform(states)
                value = score(merged)
            case "greedy":
                soup = greedy(states, score)
                merged, value = soup.state, soup.score
            case "interpolate":
                assert isinstance(recipe, MergeInterpolate)
                tried = [
                    (score(state), state)
                    for t in recipe.weights
                    for state in [interpolate(states[0], states[1], t)]
                ]
                value, merged = max(tried, key=lambda pair: pair[0])
            case "fisher_soup":
                assert isinstance(recipe, MergeFisherSoup)
                merged, spent = self._fisher(states, recipe)
                passes += spent
                value = score(merged)
            case "adapter_fuse":
                assert isinstance(recipe, MergeAdapterFuse)
                onto = states[0] if recipe.onto == "control" else None
                adapted = [self._checkpoints.load(member.checkpoint)[:2] for member in command.members]
                value, merged, why = best_fused(onto, adapted, recipe.weights, score)
            case method:
                raise NotExecutableError(f"this version cannot merge specialists by {method!r}")
        passes += self._states.put(model, merged, averaged=True)
        digest = self._checkpoints.save(
            model.state_dict(), {}, {"kind": "merge", "card": card.id, "method": command.method, "step": step}
        )
        return Merged(
            card=card.id,
            method=command.method,
            members=("control", *(f"expert {i}" for i in range(1, len(references)))),
            weights=Weights(checkpoint=digest),
            value=value,
            metric=card.acceptance.metric,
            why=why,
            step=step,
            passes=passes,
        )

    def _distil(self, card: PlanCard, command: Merge, step: int) -> Merged:
        if self.distiller is None:
            raise NotExecutableError("this run gives no training samples by id, so no student can be trained")
        mixture = None if command.gate is None else self.mixture(command.gate)
        return self.distiller.distil(card, command, step, mixture)

    def _fisher(
        self, states: list[dict[str, Tensor]], recipe: MergeFisherSoup
    ) -> tuple[dict[str, Tensor], float]:
        likelihood: Likelihood = Categorical() if self._task == "classification" else Gaussian()
        fishers, passes = [], 0.0
        model = self._states.shell()
        for state in states:
            model.load_state_dict(state)
            with seeded_rng(REFRESH_SEED):
                estimate = diagonal_fisher(
                    model,
                    self._training(),
                    likelihood=likelihood,
                    max_samples=recipe.samples,
                    seed=self._seed & 0x7FFFFFFF,
                )
            fishers.append(estimate.diagonal)
            passes += estimate.passes
        return fisher_average(states, fishers, floor=recipe.floor), passes

    # The evidence.

    def evaluate(self, card: PlanCard, command: Evaluate) -> Evaluated:
        """Compare candidate and control on a held-out half; for a run that is stopped, on all held-out data."""
        part: Part | None = EVERYTHING if card.action == "stop" else command.half
        control, passes = self._scored(command.control, part)
        if command.candidate == "mixture":
            model: nn.Module = self.mixture(command.weights.checkpoint)
            candidate = self._evidence.scores(model, part)
            passes += candidate.n * (len(model.experts) if isinstance(model, MixtureOfExperts) else 1)
        else:
            candidate, spent = self._scored(command.weights, part)
            passes += spent
        overall, slices = self._evidence.paired(candidate, control, command.metric)
        asked = card.acceptance.metric != "utility"  # who names a metric is judged by that alone
        own = card.action == "merge" and isinstance(card.merge_recipe, MergeSwa) and not asked
        guard = self._evidence.otherwise(candidate, control, command.metric) if own else None
        return Evaluated(
            card=card.id,
            candidate=command.candidate,
            overall=overall,
            slices=slices,
            metric=command.metric,
            half=command.half,
            guard=guard,
            candidate_metrics=metrics_of(candidate),
            control_metrics=metrics_of(control),
            passes=passes,
        )

    def _scored(self, reference: Weights, part: Part | None) -> tuple[PerSampleScores, float]:
        model, _, passes = self._states.model(reference)
        scores = self._evidence.scores(model, part)
        return scores, float(passes + scores.n)
