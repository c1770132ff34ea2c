"""Train on scikit-learn's digits in four views with automode on, and print everything that it did and why.

The views are plain, rotated by a quarter, inverted and permuted; permuted digits are rare, every tenth label is wrong,
held-out ones too, and a quarter of all samples is held out. Run it with ``make demo``; the session that it leaves can be replayed,
asked for its cards, and asked why: ``automode replay last``, ``automode cards last``, ``automode story last CARD``.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from automode import Policy, Trainer, replay
from automode.planner.events import Clustered, Scanned

VIEWS = ("plain", "rotated", "inverted", "permuted")

DEMO_POLICY = {
    "name": "demo",
    "reasons": [
        "instability_spike",
        "label_noise",
        "slice_underperformance",
        "residual_cluster",
        "loss_plateau",
        "high_loss_tail",
        "merge_cadence",
    ],
    "scan": {"share": 0.25},
    "pacing": {"exploration_share": 0.25, "total_share": 0.5},
}
"""The default policy with more rules, and more compute and time to explore with than one would give a long run."""


def digits4(
    *, seed: int = 0, noise: float = 0.1, keep_rare: float = 0.25
) -> tuple[TensorDataset, TensorDataset, np.ndarray]:
    """Return training set, held-out set, and the view of every held-out sample."""
    rng = np.random.default_rng(seed)
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8) / 16.0
    order = rng.permutation(64)
    views = [
        images,
        np.rot90(images, axes=(1, 2)).copy(),
        1.0 - images,
        images.reshape(-1, 64)[:, order].reshape(-1, 8, 8),
    ]
    x = np.concatenate(views).reshape(-1, 64).astype(np.float32)
    y = np.tile(labels, len(views)).astype(np.int64)
    view = np.repeat(np.arange(len(views)), len(labels))
    held_out = rng.random(len(y)) < 0.25
    train = ~held_out & ((view < 3) | (rng.random(len(y)) < keep_rare))
    wrong = rng.random(len(y)) < noise
    given = np.where(wrong, (y + rng.integers(1, 10, len(y))) % 10, y)

    def dataset(where: np.ndarray, targets: np.ndarray) -> TensorDataset:
        return TensorDataset(torch.from_numpy(x[where]), torch.from_numpy(targets[where]))

    return dataset(train, given), dataset(held_out, given), view[held_out]


def main() -> None:
    """Train, and tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--session-dir", default="automode-runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # so small a network is fastest on one, and adds up alike on every machine

    train, held_out, view = digits4(seed=arguments.seed)
    torch.manual_seed(arguments.seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    trainer = Trainer(
        project="digits",
        run_name="four-views",
        max_epochs=arguments.epochs,
        automode=True,
        policy=Policy.model_validate(DEMO_POLICY),
        session_dir=arguments.session_dir,
        val_every_n_epochs=2,
        seed=arguments.seed,
        progress=True,
    )
    result = trainer.fit(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01),
        loss_fn=nn.CrossEntropyLoss(),
        train_loader=DataLoader(
            train, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(arguments.seed)
        ),
        val_loader=DataLoader(held_out, batch_size=256),
        slices={name: np.flatnonzero(view == i).tolist() for i, name in enumerate(VIEWS)},
    )
    report(result, accuracy(model, held_out))


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Return the share of samples whose given label the model finds."""
    inputs, targets = data.tensors
    return float((model(inputs).argmax(dim=1) == targets).double().mean())


def report(result: object, ended_with: float) -> None:
    """Print what the session holds."""
    session = result.session  # type: ignore[attr-defined]
    print("\n== what the scans saw")
    for record in session.events():
        if record.kind == "scanned":
            scan = Scanned.model_validate(record.body)
            noise = "cannot tell" if scan.noise is None else f"{scan.noise:.1%}"
            print(f"step {scan.step}: {scan.n} samples, label noise {noise}, {scan.suspects} suspects")
        elif record.kind == "clustered":
            clusters = Clustered.model_validate(record.body)
            print(
                f"step {clusters.step}: {clusters.k} clusters, losses {[round(x, 3) for x in clusters.losses]}"
            )
    print("\n== plan cards")
    for card in session.cards():
        print(f"card {card.card_id} revision {card.rev}: {card.state}")
    print("\n== held-out evidence")
    for record in session.events(kind="verdict_given"):
        print(
            f"card {record.body['card']}: {record.body['verdict']} ({record.body['candidate']}): {record.body['why']}"
        )
    print("\n== lineage")
    for node in session.lineage():
        parents = ", ".join(node.parents) or "the start"
        print(f"{node.node:<28} {node.kind:<11} from {parents}, step {node.step}")
    print("\n== compute, in sample passes (one forward pass of one sample; training a sample is three)")
    for name, amount in result.compute.items():  # type: ignore[attr-defined]
        print(f"{name:<28} {amount:>12,}")
    print("\n== held-out accuracy, wrong labels included (automode has looked at these samples: no test)")
    history = result.history  # type: ignore[attr-defined]
    print(
        f"of the trunk's last step {history['val_metric'][-1]:.4f}, of the weights that the model ends with {ended_with:.4f}"
    )
    print(f"\nsession: {session.path}")
    found = replay(session)
    print(
        f"replayed {found.observations:,} observations and {found.decisions} decisions at {found.rate:,.0f} observations a second: "
        f"{found.differences} differences"
    )
    found.check()


if __name__ == "__main__":
    main()
