"""Digits with three labels in ten wrong: a card gives suspects new labels, the trunk goes on with them, and the data stay as they are."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from automode.backends import stacking_rule
from automode.planner.events import Scan
from automode.session import Session
from automode.session.artifacts import ArtifactStore
from automode.testing.bench import identical
from automode.trainer.executing import Order, execute
from automode.trainer.fit_request import FitRequest
from automode.trainer.new_labels import NewLabels
from automode.trainer.relabelling import unpacked
from automode.trainer.settings import Settings

pytestmark = pytest.mark.torch

TRAIN, WRONG, STEPS = 600, 0.3, 260

CARD = """
schema: 1
action: fork
reason: manual
because: Three labels in ten are wrong.
training_recipe:
  replay: 0.0
  exclude: {kind: quantile, from: 0.0, to: 0.3, metric: margin, exclude_suspects: false}
  relabel: RELABEL
  variants: VARIANTS
budget_steps: 10
asha: {reduction_factor: 2, max_steps: TOP}
"""
ONE = "[{name: relabelled, labels: relabel, lr_mul: 5}]"
TWO = "[{name: pruned}, {name: relabelled, labels: relabel}]"
PREDICTED = "{kind: predicted, confidence: 0.8}"


def card(variants: str = ONE, relabel: str = PREDICTED, top: int = 40) -> str:
    return CARD.replace("RELABEL", relabel).replace("VARIANTS", variants).replace("TOP", str(top))


def digits() -> tuple[TensorDataset, TensorDataset, np.ndarray]:
    """Training data of which three labels in ten are wrong, held-out data likewise, and the true labels of the former."""
    data = load_digits()
    rng = np.random.default_rng(np.random.SeedSequence([11]))
    order = rng.permutation(len(data.target))
    inputs = torch.from_numpy((data.data[order] / 16.0).astype(np.float32))
    true = data.target[order].astype(np.int64)
    given = np.where(rng.random(true.size) < WRONG, (true + rng.integers(1, 10, true.size)) % 10, true)
    labels = torch.from_numpy(given)
    train = TensorDataset(inputs[:TRAIN], labels[:TRAIN])
    return train, TensorDataset(inputs[TRAIN:1200], labels[TRAIN:1200]), true[:TRAIN]


def arguments() -> dict[str, Any]:
    """The arguments of ``fit``, everything made anew."""
    train, held_out, _ = digits()
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    return {
        "model": model,
        "optimizer": torch.optim.Adam(model.parameters(), lr=0.002),
        "loss_fn": nn.CrossEntropyLoss(),
        "train_loader": DataLoader(
            train,
            batch_size=32,
            shuffle=True,
            generator=torch.Generator().manual_seed(6),
        ),
        "val_loader": DataLoader(held_out, batch_size=200),
        "scheduler": None,
    }


def actions(text: str, **more: Any) -> dict[int, Any]:
    asked = {110: lambda person: person.submit(text), 111: lambda person: person.approve()}
    return asked | {int(name[1:]): act for name, act in more.items()}


Play = Callable[..., Any]


def played(run: Play, folder: Path, text: str, **more: Any) -> Any:
    given = {"steps": STEPS, "fit": arguments(), "policy": {"budget": "on_top", "scan": {"share": None}}}
    return run(folder, **(given | {"actions": actions(text)} | more))


@pytest.fixture(scope="module")
def adopted(run_once: Play, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run whose card was adopted, with the ledger's counts of visits from then on."""
    visits: dict[str, Any] = {}

    def each(person: Any) -> None:
        if not person.cards or person.state() != "adopted":
            return
        ledger = person.performer.scanner.ledger()
        counts = ledger.column("count", np.arange(TRAIN, dtype=np.int64)).copy()
        visits.setdefault("first", counts)
        visits["last"] = counts

    fit = arguments()
    before = [tensor.clone() for tensor in fit["train_loader"].dataset.tensors]
    run = played(run_once, tmp_path_factory.mktemp("relabelled") / "run", card(), fit=fit, each=each)
    run.visits, run.before = visits, before
    return run


def new_labels(run: Any, *, first: bool = False) -> NewLabels:
    resolved, *others = run.bodies("resolved")
    assert first or not others
    rows = ArtifactStore(run.path / "artifacts").get_array(resolved["relabelled"])
    return unpacked(rows)[0]


def test_suspects_get_the_labels_that_they_should_have_had(adopted: Any) -> None:
    _, _, true = digits()
    labels = new_labels(adopted)
    (resolved,) = adopted.bodies("resolved")
    assert resolved["new_labels"] == labels.size > 60
    assert (labels.labels == true[labels.ids]).mean() > 0.85
    assert adopted.states()[-1] == "adopted"


def test_the_data_are_never_written_to(adopted: Any) -> None:
    now = adopted.made["train_loader"].dataset.tensors
    assert all(torch.equal(a, b) for a, b in zip(now, adopted.before, strict=True))


def test_the_trunk_goes_on_with_the_new_labels_and_the_ledger_keeps_to_those_of_the_data(
    adopted: Any,
) -> None:
    labels = new_labels(adopted)
    (told,) = adopted.bodies("adopted")
    (resolved,) = adopted.bodies("resolved")
    assert told["relabelled"] == labels.size
    assert told["left_out"] == TRAIN - resolved["pool"] - labels.size
    entered = adopted.visits["last"] - adopted.visits["first"]
    trained = np.setdiff1d(np.arange(TRAIN), labels.ids)
    assert not entered[labels.ids].any()
    assert (entered[trained] > 0).sum() == resolved["pool"]


def test_rolling_back_brings_the_old_labels_back(run_once: Play, tmp_path: Path) -> None:
    relabelled: list[int] = []

    def each(person: Any) -> None:
        if person.cards and person.state() == "adopted" and person.step == person.adopted_at + 10:
            person.ask("rollback", person.cards[-1].id)
        relabelled.append(person.performer.trunk.relabelled.size)

    run = played(run_once, tmp_path / "back", card(), each=each)
    assert run.states()[-2:] == ["adopted", "rolled_back"]
    assert max(relabelled) == new_labels(run).size
    assert relabelled[-1] == 0


def test_a_later_cards_trials_train_with_the_labels_that_the_trunk_has(
    run_once: Play, tmp_path: Path
) -> None:
    later: list[Any] = []
    scans: list[Any] = []

    def look(person: Any) -> None:
        later.append(person.data())
        scans.append(person.performer.scan(Scan(tail_from=0.85, probe=256, clusters=False), person.step)[0])

    plain = """
action: fork
training_recipe: {variants: [{name: slow, lr_mul: 0.5}]}
budget_steps: 5
asha: {max_steps: 5}
"""
    run = played(
        run_once,
        tmp_path / "later",
        "",
        actions=actions(
            card(),
            s160=lambda person: person.submit(plain),
            s161=lambda person: person.approve(),
            s163=look,
        ),
        steps=300,
    )
    (told, *_) = run.bodies("adopted")
    (data,), (scan,) = later, scans
    labels = new_labels(run, first=True)
    assert data.trunk_labels.packed().tolist() == labels.packed().tolist()
    assert np.isin(labels.ids, data.selected).all()
    assert data.selected.size == TRAIN - told["left_out"]
    # The ledger still suspects them, the next card's list does not.
    named = ArtifactStore(run.path / "artifacts").get_ids(scan.artifact)
    assert scan.left_out > labels.size // 2
    assert not np.isin(labels.ids, named).any()


@pytest.mark.parametrize("cut", [125, 190])
def test_a_run_that_is_stopped_goes_on_with_the_same_labels(
    cut: int, adopted: Any, run_once: Play, tmp_path: Path
) -> None:
    """The first cut comes while the card's trial trains, the second after its adoption."""
    kept: list[Any] = []
    (at,) = [body["step"] for body in adopted.bodies("adopted")]
    assert 125 < at < 190
    stop = {cut: lambda person: os.kill(os.getpid(), signal.SIGINT)}
    with pytest.raises(KeyboardInterrupt):
        played(run_once, tmp_path / "cut", "", actions=actions(card()) | stop, keep=kept, check=False)
    run = played(run_once, tmp_path / "cut", "", actions={}, resume=kept[0].path, check=False)
    assert run.states() == adopted.states()
    assert new_labels(run).packed().tolist() == new_labels(adopted).packed().tolist()
    assert identical(run.final, adopted.final)


def reports(run: Any) -> dict[tuple[int, int], float]:
    return {(body["trial"], body["resource"]): body["value"] for body in run.bodies("trial_reported")}


@pytest.fixture(scope="module")
def beside(run_once: Play, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Pruned and relabelled, each in a trial."""
    return played(run_once, tmp_path_factory.mktemp("beside") / "run", card(TWO, top=20))


@pytest.mark.skipif(sys.platform != "linux", reason="forks, as Linux has them")
def test_a_worker_process_trains_the_same(beside: Any, run_once: Play, tmp_path: Path) -> None:
    first = {key: value for key, value in reports(beside).items() if key[1] == 10}
    run = played(
        run_once,
        tmp_path / "process",
        card(TWO, top=20),
        backend="process",
        backend_options={"start": "fork"},
    )
    assert len(first) == 2
    assert {key: value for key, value in reports(run).items() if key[1] == 10} == first


def test_trials_with_other_labels_are_stacked_and_come_to_the_same(
    beside: Any, run_once: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacking_rule, "why_too_short", lambda m, *_, **__: None if m > 1 else "alone")
    monkeypatch.setattr(stacking_rule, "why_slower", lambda *_: None)
    run = played(run_once, tmp_path / "stacked", card(TWO, top=20), backend="stacked")
    assert not [n for n in run.bodies("noted") if "one after another" in str(n)]
    mine = reports(run)
    for key, value in reports(beside).items():
        if key[1] == 10:
            assert mine[key] == pytest.approx(value, abs=1e-3)


def test_a_card_is_run_again_with_the_labels_of_then(beside: Any, tmp_path: Path) -> None:
    settings = Settings(
        automode="propose", max_steps=STEPS, seed=3, session_dir=tmp_path, console=False, progress=False
    )
    wanted = beside.bodies("card_proposed")[0]["card"]["id"]
    done = execute(Order(session=beside.path, card=wanted), settings, FitRequest(**arguments()), None)
    assert done.same, done.text()
    assert not done.doubts


def test_a_person_gives_labels_after_a_review(run_once: Play, tmp_path: Path) -> None:
    _, _, true = digits()
    text = card(relabel=f"{{kind: given, ids: [3, 1, 2], labels: {true[[3, 1, 2]].tolist()}}}", top=10)
    run = played(run_once, tmp_path / "given", text)
    labels = new_labels(run)
    assert labels.ids.tolist() == [1, 2, 3]
    assert labels.labels.tolist() == true[[1, 2, 3]].tolist()


@pytest.mark.parametrize(
    ("relabel", "words"),
    [
        ("{kind: given, ids: [3], labels: [10]}", "the label 10 of sample 3 is no class of this run"),
        ("{kind: given, ids: [600], labels: [1]}", "sample 600, which is no training sample"),
    ],
)
def test_labels_that_cannot_be_fail_the_card_and_not_the_run(
    relabel: str, words: str, run_once: Play, tmp_path: Path
) -> None:
    run = played(run_once, tmp_path / "wrong", card(relabel=relabel, top=10), steps=200)
    assert run.states()[-1] == "failed"
    assert words in run.why()
    assert run.result.steps == 200


def test_a_run_that_abstains_lists_its_suspects_for_review(run_once: Play, tmp_path: Path) -> None:
    train, _, true = digits()
    given = train.tensors[1].numpy()
    policy = {
        "reasons": ["label_noise"],
        "scan": {"every": 80, "probe": 256, "share": None, "cost": 1.0},
        "noise": {"least_found": 1.0},  # suspects are .85 of the estimate, so that these two never fit
    }
    run = played(run_once, tmp_path / "abstains", "", actions={}, policy=policy, automode="observe")
    with Session.open(run.path) as session:
        session.verify()
        found = session.suspects()
        assert not session.cards()
    assert found.rule.startswith("silent (abstain)")
    ids = np.array(found.columns["sample_id"])
    assert 60 < ids.size < 300
    assert found.columns["margin"] == sorted(found.columns["margin"])
    assert found.columns["given_label"] == given[ids].tolist()
    wrong = given[ids] != true[ids]
    assert wrong.mean() > 0.8
    assert (np.array(found.columns["suggested_label"])[wrong] == true[ids][wrong]).mean() > 0.8
    near = np.array(found.columns["neighbour_agreement"])
    assert near.mean() < 0.3 < np.mean(found.columns["suggested_agreement"])
