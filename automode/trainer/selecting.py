"""From a card's selection to sample ids, and from its recipe to variants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, assert_never

import numpy as np
import torch

from automode.errors import NotExecutableError
from automode.planner.cards import PlanCard
from automode.planner.inputs import ResolvedPart
from automode.planner.recipes import (
    SelectAll,
    SelectIndices,
    Selection,
    SelectKMeans,
    SelectQuantile,
    SelectSlices,
    TrainingRecipe,
    Variant,
)
from automode.planner.sharing import part_names
from automode.planner.variants import DRAWN
from automode.scheduler.candidates import Candidates
from automode.session.artifacts import ArtifactStore
from automode.trainer.clusters import Clusters
from automode.trainer.new_labels import NewLabels
from automode.trainer.one_thread import one_thread
from automode.trainer.random_state import forked_rng
from automode.trainer.relabelling import Relabeller, packed
from automode.trainer.sample_ledger import SampleLedger
from automode.trainer.sample_source import READ_BATCH, Ids, SampleSource
from automode.trainer.scanning import Scanner
from automode.trainer.validation import SliceFn


@dataclass(frozen=True, slots=True, kw_only=True)
class Selected:
    """What a card's trials will train on.

    Attributes:
        selected: Ids to specialise on, ascending.
        others: The rest of the training samples, to replay from.
        left_out: Ids that the card leaves out, ascending.
        variants: The trials' variants.
        artifact: The selected ids, unless the card itself says which they are.
        excluded: The excluded ones, likewise.
        new_labels: Labels for the variants that take new ones.
        chosen: Of these samples, the ids that belong to the selection.
        relabelled: The new labels, where there are any.
        parts: Name and ids of each cluster or slice, where each has a specialist; else empty.
        passes: Sample passes that selecting took.
    """

    selected: Ids
    others: Ids
    left_out: Ids
    variants: tuple[Variant, ...]
    artifact: str | None
    excluded: str | None
    new_labels: NewLabels
    chosen: Ids
    relabelled: str | None
    parts: tuple[tuple[str, Ids], ...]
    passes: float


@dataclass(slots=True, kw_only=True)
class Selector:
    """Resolves selections.

    Attributes:
        train_ids: Every training sample, ascending.
        ledger: Gives per-sample losses, up to date; None where they are not exact.
        scanner: The last scan; None where nothing is scanned.
        artifacts: Id lists and centroids by digest.
        slices: Slices whose members among the training samples can be found: functions of (inputs, targets).
        source: Training samples by id.
        seed: The session's seed.
        gone: Gives the ids that the trunk itself no longer trains on.
        relabeller: Finds new labels.
    """

    train_ids: Ids
    ledger: Callable[[], SampleLedger] | None
    scanner: Scanner | None
    artifacts: ArtifactStore
    slices: Mapping[str, SliceFn]
    source: SampleSource
    seed: int
    gone: Callable[[], Ids]
    relabeller: Relabeller

    def select(self, card: PlanCard) -> Selected:
        """Resolve a card.

        Raises:
            NotExecutableError: The selection needs what this run does not have, or holds no training sample.
        """
        recipe = card.training_recipe
        assert recipe is not None
        found, passes = self._parts(card.selection)
        selected = _union([ids for _, ids in found])
        excluded: Ids = np.empty(0, dtype=np.int64)
        artifact: str | None = None
        if recipe.exclude is not None:
            excluded, more = self._ids(recipe.exclude)
            excluded = np.intersect1d(self.train_ids, excluded)
            passes += more
            artifact = self._kept(recipe.exclude, excluded)
        gone = self.gone()
        allowed = np.setdiff1d(self.train_ids, np.union1d(excluded, gone))
        labels = NewLabels.none()
        if recipe.relabel is not None:
            labels, more = self.relabeller.find(recipe.relabel, np.setdiff1d(excluded, gone), allowed)
            strange = np.setdiff1d(labels.ids, self.train_ids)
            if strange.size:
                raise NotExecutableError(f"`relabel` names sample {strange[0]}, which is no training sample")
            labels = labels.without(gone)
            passes += more
        chosen = np.intersect1d(labels.ids, selected)
        selected = np.intersect1d(selected, allowed)
        if selected.size == 0:
            raise NotExecutableError(f"the selection of card {card.id} holds no training sample")
        parts = () if recipe.per_part is None else _of_their_own(found, allowed)
        return Selected(
            selected=selected,
            others=np.setdiff1d(allowed, selected),
            left_out=np.setdiff1d(excluded, gone),
            variants=tuple(recipe.variants[0].model_copy(update={"name": name}) for name, _ in parts)
            or self._variants(card, recipe),
            artifact=self._kept(card.selection, selected),
            excluded=artifact,
            new_labels=labels,
            chosen=chosen,
            relabelled=self.artifacts.put_array(packed(labels, chosen)) if labels.size else None,
            parts=parts,
            passes=passes,
        )

    def stored(self, parts: tuple[tuple[str, Ids], ...]) -> tuple[ResolvedPart, ...]:
        """Store the ids of parts: which cluster a sample is of hangs on the network as it was."""
        return tuple(
            ResolvedPart(name=name, n=int(ids.size), artifact=self.artifacts.put_ids(ids))
            for name, ids in parts
        )

    def _kept(self, selection: Selection, ids: Ids) -> str | None:
        """Store ids that a later reader could not find again, since they hang on what the run had seen by then."""
        named = isinstance(selection, SelectAll) or (
            isinstance(selection, SelectIndices) and selection.ids is not None
        )
        return None if named else self.artifacts.put_ids(ids)

    def ids_of(self, selection: Selection) -> Ids:
        """Return the samples of a selection; for those that no artifact needs to name, always the same."""
        return self._ids(selection)[0]

    def _ids(self, selection: Selection) -> tuple[Ids, float]:
        parts, passes = self._parts(selection)
        return _union([ids for _, ids in parts]), passes

    def _parts(self, selection: Selection) -> tuple[list[tuple[str, Ids]], float]:
        """Return the parts of a selection by name (a selection that has none is one, without a name), and sample passes."""
        match selection:
            case SelectAll():
                return [("", self.train_ids)], 0.0
            case SelectQuantile():
                return [("", self._quantile(selection))], 0.0
            case SelectKMeans():
                return self._clusters(selection)
            case SelectSlices():
                return [(name, self._slice(name)) for name in selection.slices], 0.0
            case SelectIndices():
                return [("", self._indices(selection))], 0.0
            case _:
                assert_never(selection)

    def _quantile(self, selection: SelectQuantile) -> Ids:
        if self.ledger is None:
            raise NotExecutableError("quantiles need exact per-sample losses, and this run has none")
        ids = self.ledger().ids_in_quantile(selection.metric, selection.from_, selection.to)
        if not selection.exclude_suspects:
            return ids
        if self.scanner is None or self.scanner.noise is None:
            raise NotExecutableError(
                "which samples are probably mislabelled is not known before the first scan"
            )
        return np.setdiff1d(ids, self.scanner.noise.suspects)

    def _clusters(self, selection: SelectKMeans) -> tuple[list[tuple[str, Ids]], float]:
        if selection.feature != "embedding":
            return self._scalar_clusters(selection), 0.0
        if self.scanner is None:
            raise NotExecutableError("clusters of embeddings need a scan, and this run is not scanned")
        if selection.artifact is not None:
            clusters = Clusters.unpacked(
                np.asarray(self.artifacts.get_array(selection.artifact), dtype=np.float64)
            )
        elif self.scanner.clusters is not None:
            clusters = self.scanner.clusters
        else:
            raise NotExecutableError("there are no clusters yet: the first scan is still to come")
        if clusters.k != selection.k:
            raise NotExecutableError(
                f"the selection speaks of {selection.k} clusters, and the scan found {clusters.k}"
            )
        features, passes = self.scanner.embed(self.train_ids)
        return _members(selection, self.train_ids, clusters.assign(features)), passes

    def _scalar_clusters(self, selection: SelectKMeans) -> list[tuple[str, Ids]]:
        """Clusters of one number a sample are ranges; they are numbered from the smallest to the largest."""
        if self.ledger is None:
            raise NotExecutableError(
                f"clusters of the {selection.feature} need exact per-sample losses, and this run has none"
            )
        from sklearn.cluster import KMeans

        ledger = self.ledger()
        ids = ledger.seen()
        name = "ema_loss" if selection.feature == "loss" else "margin"
        values = np.asarray(ledger.column(name, ids), dtype=np.float64)
        ids, values = ids[np.isfinite(values)], values[np.isfinite(values)]
        if ids.size < selection.k:
            raise NotExecutableError(
                f"{ids.size} samples have a {selection.feature}, which is fewer than {selection.k} clusters"
            )
        with one_thread():
            fitted = KMeans(n_clusters=selection.k, n_init=4, random_state=self.seed & 0x7FFFFFFF).fit(
                values[:, None]
            )
        rank = np.argsort(np.argsort(fitted.cluster_centers_[:, 0]))
        return _members(selection, ids, rank[fitted.labels_])

    def _indices(self, selection: SelectIndices) -> Ids:
        if selection.ids is not None:
            return np.asarray(selection.ids, dtype=np.int64)
        if selection.artifact is not None:
            return self.artifacts.get_ids(selection.artifact)
        assert selection.slice is not None
        return self._slice(selection.slice)

    def _slice(self, name: str) -> Ids:
        """The training samples that a slice's function marks; no model is asked."""
        if name not in self.slices:
            known = ", ".join(sorted(self.slices)) or "none"
            raise NotExecutableError(f"no slice of the training data is called {name!r}; there are: {known}")
        function, found = self.slices[name], []
        with forked_rng(), torch.no_grad():
            for start in range(0, self.train_ids.size, READ_BATCH):
                ids = self.train_ids[start : start + READ_BATCH]
                inputs, targets = self.source.batch(ids)
                mask = torch.as_tensor(function(inputs, targets)).cpu().numpy().astype(bool)
                found.append(ids[mask])
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def _variants(self, card: PlanCard, recipe: TrainingRecipe) -> tuple[Variant, ...]:
        if recipe.search is None:
            return recipe.variants
        search = recipe.search
        drawn = Candidates(
            search.as_space(), sampler=search.sampler, seed=(self.seed + card.step) & 0x7FFFFFFF
        )
        found = [
            Variant.model_validate({"name": f"{DRAWN}{i}", **drawn.ask().values}) for i in range(search.draws)
        ]
        return (*recipe.variants, *found)


def _members(selection: SelectKMeans, ids: Ids, labels: np.ndarray[Any, Any]) -> list[tuple[str, Ids]]:
    """The samples of each selected cluster, by the cluster of every sample."""
    names = part_names(selection)
    return [(name, ids[labels == cluster]) for name, cluster in zip(names, selection.clusters, strict=True)]


def _union(parts: list[Ids]) -> Ids:
    """Every sample of any of them, in the order of a lone one, else ascending."""
    return parts[0] if len(parts) == 1 else np.unique(np.concatenate(parts))


def _of_their_own(found: list[tuple[str, Ids]], allowed: Ids) -> tuple[tuple[str, Ids], ...]:
    """What each part's specialist may train on."""
    parts = tuple((name, np.intersect1d(ids, allowed)) for name, ids in found)
    empty = [name for name, ids in parts if not ids.size]
    if empty:
        raise NotExecutableError(
            f"{', '.join(empty)} hold{'' if len(empty) > 1 else 's'} no training sample, so that no specialist can be trained on it"
        )
    return parts
