"""A training script that knows nothing of automode: it writes a log, and `automode signals` reads it afterwards.

    python examples/loss_curve.py my_curve.csv
    automode signals my_curve.csv

A small network learns scikit-learn's digits, an eighth of them with wrong labels. One batch of pure noise comes at step 700, and
the rate stays the same to the end, long after there is anything to gain. `loss_curve.csv` beside this script is what it wrote once.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

STEPS, BATCH, RATE, NOISE_AT = 3000, 32, 0.1, 700


def main() -> None:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "loss_curve.csv")
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    digits = load_digits()
    inputs = torch.tensor(digits.data / 16.0, dtype=torch.float32)
    wrong = rng.random(len(digits.target)) < 0.125
    labels = torch.tensor(np.where(wrong, rng.integers(0, 10, len(wrong)), digits.target))
    model = nn.Sequential(nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    with path.open("w", newline="", encoding="utf-8") as file:
        log = csv.writer(file)
        log.writerow(["step", "loss", "grad_norm", "lr"])
        for step in range(STEPS):
            chosen = torch.from_numpy(rng.choice(len(inputs), BATCH, replace=False))
            x = inputs[chosen] if step != NOISE_AT else 3.0 * torch.randn(BATCH, 64)
            loss = nn.functional.cross_entropy(model(x), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            optimizer.step()
            log.writerow([step, f"{loss.item():.5g}", f"{norm.item():.5g}", RATE])
    print(f"{STEPS} steps logged to {path}")


if __name__ == "__main__":
    main()
