"""The smallest script: a model, three loaders, and automode on.

All three loaders read one dataset, as quick first scripts do. automode notices, says that such a validation proves
nothing, and asks before it acts: its cards wait for a person. Everything it saw is in the session that is printed last.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from automode import quickstart


def main() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(4096, 28 * 28)
    targets = (inputs[:, :50].sum(dim=1) > 0).long()
    dataset = TensorDataset(inputs, targets)

    model = nn.Sequential(nn.Linear(28 * 28, 64), nn.ReLU(), nn.Linear(64, 2))
    result = quickstart(
        project="quickstart",
        run_name="baseline",
        automode=True,
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-3),
        loss_fn=nn.CrossEntropyLoss(),
        train_loader=DataLoader(dataset, batch_size=128, shuffle=True),
        val_loader=DataLoader(dataset, batch_size=256),
        test_loader=DataLoader(dataset, batch_size=256),
        max_epochs=3,
        do_test_after=True,
    )

    print(f"mode: {result.mode} (act was asked for)")
    print(f"validation loss by epoch: {[round(loss, 3) for loss in result.history['val_loss']]}")
    print(f"plan cards: {len(result.cards)}; losses recorded: {len(result.frame('loss'))}")


if __name__ == "__main__":
    main()
