"""Scans: what the sample ledger, the noise evidence and the clusters say at one moment, as two events and two artifacts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from automode.errors import NotExecutableError
from automode.planner.events import Clustered, Scan, Scanned, Task
from automode.session.artifacts import ArtifactStore
from automode.trainer.clusters import Clusters, agreement, fit_clusters, losses_by_cluster
from automode.trainer.embedding import embeddings
from automode.trainer.last_layer import gradient_norms
from automode.trainer.noise import (
    NEXT_SYMBOL,
    NoiseEvidence,
    neighbour_disagreement,
    noise_rate,
    probabilities_of,
    weigh,
)
from automode.trainer.per_sample import PerSampleLoss
from automode.trainer.reviewing import review
from automode.trainer.sample_ledger import SampleLedger
from automode.trainer.sample_source import READ_BATCH, Ids, SampleSource
from automode.trainer.second_look import SecondLook
from automode.trainer.symbols import foretells_symbols
from automode.trainer.trunk import Trunk

Batches = Callable[[], Iterable[Any]]
HeldOutRead = tuple[npt.NDArray[np.float64], list[Any], list[Any]]
"""Features [n, d], and the outputs and targets of each batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Details:
    """What the policy's ``scan.details`` asked for, of the samples that the last scan read.

    Attributes:
        ids: The samples, ascending.
        columns: Values by name, one a sample.
        why_not: By name, why what was asked for is not there.
    """

    ids: Ids = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    columns: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    why_not: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Scanner:
    """Reads the ledger and clusters fixed probe samples.

    Attributes:
        trunk: The run.
        ledger: Gives per-sample losses and margins of training, up to date.
        source: Training samples by id.
        train_ids: Every training sample.
        val_a: A fresh pass over val-A; None where there is none.
        artifacts: Where id lists and centroids go.
        task: What the targets are.
        seed: Of the probe's choice, the projection and the starts of k-means.
        per_sample: The loss of each sample, for gradient norms; None where it is not known.
        second_look: Asks the trunk's average where a scan finds many wrong labels; None: never.
        noise: The last verdict on label noise.
        clusters: The last clusters.
        details: What the last scan found of its samples beside their losses.
    """

    trunk: Trunk
    ledger: Callable[[], SampleLedger]
    source: SampleSource
    train_ids: Ids
    val_a: Batches | None
    artifacts: ArtifactStore
    task: Task
    seed: int
    per_sample: PerSampleLoss | None = None
    second_look: SecondLook | None = None
    noise: NoiseEvidence | None = None
    clusters: Clusters | None = None
    details: Details = field(default_factory=Details)
    _probe: Ids = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    _symbols: bool | None = None

    def scan(self, command: Scan, step: int) -> list[Scanned | Clustered]:
        """Answer a Scan command."""
        probe = self._probe_of(command.probe)
        features, outputs, labels, passes = self._read(probe)
        symbols = labels is not None and self._foretells_symbols(probe, outputs, labels)
        held = self._held_out() if (labels is not None and not symbols) or command.clusters else None
        spent = 0.0 if held is None else float(len(held[0]))
        disagreement = None if labels is None or symbols else neighbour_disagreement(features, labels)
        noise = NEXT_SYMBOL if symbols else self._weigh_noise(probe, disagreement, labels, held)
        noise, more = self._looked_again(command, noise, probe, disagreement)
        spent += more
        self.noise = noise
        self.details, more = self._detailed(command, probe, features)
        spent += more
        listed: str | None = None
        if noise.suspects.size and labels is not None:
            table, more = review(
                noise.suspects,
                most=command.probe,
                ledger=self.ledger(),
                probe=probe,
                features=features,
                labels=labels,
                read=self._read,
            )
            listed, spent = self.artifacts.put_array(table), spent + more
        found: list[Scanned | Clustered] = [self._scanned(command, step, noise, passes + spent, listed)]
        if command.clusters:
            unseen = None if held is None else held[0]
            clustered = self._cluster(step, probe, features, labels, noise, unseen)
            if clustered is not None:
                found.append(clustered)
        return found

    def embed(self, ids: Ids) -> tuple[npt.NDArray[np.float64], float]:
        """Return (features [n, d], sample passes) of any training samples, as the clusters read them."""
        features, _, _, passes = self._read(ids)
        return features, passes

    def _probe_of(self, size: int) -> Ids:
        """The same samples at every scan, so that stability compares like with like."""
        size = min(size, self.train_ids.size)
        if self._probe.size != size:
            rng = np.random.default_rng(np.random.SeedSequence([self.seed, 0x5CA]))
            self._probe = np.sort(rng.choice(self.train_ids, size=size, replace=False))
        return self._probe

    def _read(self, ids: Ids) -> tuple[npt.NDArray[np.float64], list[Any], Ids | None, float]:
        batches = (self.source.batch(ids[i : i + READ_BATCH]) for i in range(0, ids.size, READ_BATCH))
        features, outputs, targets = embeddings(self.trunk.model, self.trunk.step_fn, batches, seed=self.seed)
        labels = labels_of(targets) if self.task == "classification" else None
        return features, outputs, labels, float(ids.size)

    def _detailed(
        self, command: Scan, probe: Ids, features: npt.NDArray[np.float64]
    ) -> tuple[Details, float]:
        """Take what was asked for beside the losses; what cannot be had has a reason, and is no failure of the scan."""
        columns: dict[str, npt.NDArray[np.float64]] = {}
        if "embedding" in command.details:
            columns |= {f"embedding_{i}": features[:, i] for i in range(features.shape[1])}
        if "gradient_norm" not in command.details:
            return Details(ids=probe, columns=columns), 0.0
        why = "the loss of single samples is not known"
        if self.per_sample is not None:
            batches = (self.source.batch(probe[i : i + READ_BATCH]) for i in range(0, probe.size, READ_BATCH))
            try:
                columns["gradient_norm"] = gradient_norms(
                    self.trunk.model, self.trunk.step_fn, self.per_sample, batches
                )
                return Details(ids=probe, columns=columns), float(probe.size)
            except NotExecutableError as error:
                why = str(error)
        return Details(ids=probe, columns=columns, why_not={"gradient_norm": why}), 0.0

    def _held_out(self) -> HeldOutRead | None:
        """Features, outputs and targets of val-A; None where there is none."""
        if self.val_a is None:
            return None
        return embeddings(self.trunk.model, self.trunk.step_fn, self.val_a(), seed=self.seed)

    def _foretells_symbols(self, probe: Ids, outputs: list[Any], labels: Ids) -> bool:
        """Ask it of the first batch, once: it is a matter of the data."""
        if self._symbols is None:
            few = probe[:READ_BATCH]
            targets = torch.from_numpy(labels[: few.size])
            self._symbols = foretells_symbols(self.source.batch(few), outputs[0], targets)
        return self._symbols

    def _weigh_noise(
        self,
        probe: Ids,
        disagreement: npt.NDArray[np.float64] | None,
        labels: npt.NDArray[np.int64] | None,
        held: HeldOutRead | None,
    ) -> NoiseEvidence:
        rate = None
        if held is not None and labels is not None:
            _, outputs, targets = held
            given, probabilities = labels_of(targets), probabilities_of(outputs)
            if probabilities is not None and given is not None:
                rate = noise_rate(probabilities, given)
        ledger = self.ledger()
        seen = ledger.seen()
        margins = np.asarray(ledger.column("margin", seen), dtype=np.float64)
        return weigh(rate=rate, ids=seen, margins=margins, probe=probe, disagreement=disagreement)

    def _looked_again(
        self,
        command: Scan,
        noise: NoiseEvidence,
        probe: Ids,
        disagreement: npt.NDArray[np.float64] | None,
    ) -> tuple[NoiseEvidence, float]:
        """Name the suspects anew by what the trunk's average says, where the first look finds enough; and the passes it took."""
        least = command.ask_from
        if (
            least is None
            or noise.rate is None
            or noise.rate < least
            or disagreement is None
            or self.second_look is None
        ):
            return noise, 0.0
        ids = self.ledger().seen()
        seen = self.second_look.take(ids)
        if seen is None:
            return noise, 0.0
        known = np.asarray(self.ledger().column("margin", ids), dtype=np.float64)
        margins = known if seen.by_heart else seen.margins
        again = weigh(rate=seen.rate, ids=ids, margins=margins, probe=probe, disagreement=disagreement)
        told = (
            "which knows wrong labels by heart, and by the margins so far"
            if seen.by_heart
            else "sample by sample"
        )
        return replace(again, why=f"{again.why}, by the trunk's average, {told}"), seen.passes

    def _scanned(
        self, command: Scan, step: int, noise: NoiseEvidence, passes: float, listed: str | None
    ) -> Scanned:
        ledger = self.ledger()
        seen = ledger.n_seen
        # Those with a new label are no suspects of a further card, though the ledger, which speaks of given labels, names them.
        named = np.setdiff1d(noise.suspects, self.trunk.relabelled.ids)
        tail_mean, tail = None, np.empty(0, dtype=np.int64)
        if seen:
            tail = ledger.ids_in_quantile("ema_loss", command.tail_from, 1.0)
            tail = tail[~np.isin(tail, np.union1d(noise.suspects, self.trunk.curated_ids))]
            if tail.size:
                tail_mean = float(np.mean(ledger.column("ema_loss", tail)))
        return Scanned(
            step=step,
            n=seen,
            visits=ledger.visits / seen if seen else 0.0,
            quantiles={str(name): values for name, values in ledger.quantiles().items()},
            tail_mean=tail_mean,
            tail_n=int(tail.size),
            suspects=int(noise.suspects.size),
            left_out=int(np.isin(noise.suspects, self.trunk.curated_ids).sum()),
            noise=noise.rate,
            why=noise.why,
            review=listed,
            artifact=self.artifacts.put_ids(named) if named.size else None,
            passes=passes,
        )

    def _cluster(
        self,
        step: int,
        probe: Ids,
        features: npt.NDArray[np.float64],
        labels: npt.NDArray[np.int64] | None,
        noise: NoiseEvidence,
        held_out: npt.NDArray[np.float64] | None,
    ) -> Clustered | None:
        before = self.clusters
        fitted = fit_clusters(
            features, seed=self.seed, held_out=held_out, before=None if before is None else before.k
        )
        if fitted is None:
            return None
        self.clusters = fitted
        losses = np.asarray(self.ledger().column("ema_loss", probe), dtype=np.float64)
        suspect = np.isin(probe, noise.suspects)
        means, errors = losses_by_cluster(fitted.labels, losses, ~suspect, fitted.k)
        sizes = np.bincount(fitted.labels, minlength=fitted.k)
        return Clustered(
            step=step,
            feature="embedding",
            k=fitted.k,
            sizes=tuple(int(n) for n in sizes),
            losses=means,
            errors=errors,
            tops=_tops(fitted.labels, labels, fitted.k),
            likelihoods=dict(fitted.likelihoods),
            noise=tuple(float(suspect[fitted.labels == c].mean()) for c in range(fitted.k)),
            ari=agreement(None if before is None else before.labels, fitted.labels),
            artifact=self.artifacts.put_array(fitted.packed()),
            passes=0.0,
        )


def labels_of(targets: list[Any]) -> npt.NDArray[np.int64] | None:
    """Put the targets of several batches end to end; None where they are no whole numbers, one a sample."""
    if not targets or not all(
        isinstance(t, torch.Tensor) and t.dim() == 1 and not t.is_floating_point() for t in targets
    ):
        return None
    return np.asarray(torch.cat(targets).cpu().numpy(), dtype=np.int64)


def _tops(clusters: npt.NDArray[np.int64], labels: npt.NDArray[np.int64] | None, k: int) -> tuple[str, ...]:
    if labels is None:
        return ()
    told = []
    for cluster in range(k):
        values, counts = np.unique(labels[clusters == cluster], return_counts=True)
        top = int(counts.argmax())
        share = counts[top] / counts.sum()
        told.append(
            f"mostly class {values[top]} ({share:.0%})" if share > 0.5 else f"{values.size} classes mixed"
        )
    return tuple(told)
