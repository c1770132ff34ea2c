"""How fast a mixture of experts answers, beside the one network that it grew from.

    python benchmarks/moe_speed.py [--experts 4] [--repeats 15]

One CPU thread, a batch of 256 and a single sample, a small network (call overhead shows) and a wide one (arithmetic
shows). The mixture is timed soft, top-1, and soft as an exported program. Rows give microseconds a call and the ratio to
the monolith; active and total parameters stand beside them, because a mixture buys its quality with both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from automode.merges.gate import Gate
from automode.merges.moe import MixtureOfExperts

NETWORKS = {"mlp_64_128_10": (64, 128, 10), "mlp_64_1024_1024_10": (64, 1024, 1024, 10)}


def mlp(widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def random_gate(features: int, experts: int) -> Gate:
    """Return a gate that spreads its choices over the experts."""
    gate = Gate(features, min(features, 64), experts)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*gate.parameters(), gate.whitening):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return gate


def microseconds(
    answers: Mapping[str, Callable[[Tensor], Tensor]], inputs: Tensor, repeats: int
) -> dict[str, float]:
    """Time all in turns, and take each one's fastest round: what else the machine does only adds."""
    rounds: dict[str, list[float]] = {name: [] for name in answers}
    with torch.no_grad():
        for answer in answers.values():
            for _ in range(5):
                answer(inputs)
        for _, (name, answer) in itertools.product(range(repeats), answers.items()):
            calls = 20
            start = time.perf_counter()
            for _ in range(calls):
                answer(inputs)
            rounds[name].append((time.perf_counter() - start) / calls * 1e6)
    return {name: min(values) for name, values in rounds.items()}


def measure(widths: tuple[int, ...], experts: int, repeats: int) -> dict[str, object]:
    torch.manual_seed(0)
    networks = [mlp(widths).eval() for _ in range(experts)]
    gate = random_gate(widths[-2], experts)
    last = str(len(networks[0]) - 1)
    soft = MixtureOfExperts(networks, gate, feature_layer=last, task="classification")
    top1 = MixtureOfExperts(networks, gate, feature_layer=last, task="classification", top1=True)
    example = torch.randn(256, widths[0])
    dimension = torch.export.Dim("batch", min=1, max=4096)
    exported = torch.export.export(soft, (example,), dynamic_shapes=({0: dimension},)).module()
    answers = {"monolith": networks[0], "soft": soft, "top1": top1, "soft_exported": exported}
    size = sum(p.numel() for p in networks[0].parameters())
    gate_size = sum(p.numel() for p in gate.parameters())
    rows: dict[str, object] = {
        "parameters": {
            "monolith": size,
            "total": experts * size + gate_size,
            "active_top1": 2 * size + gate_size,
        }
    }
    for name, inputs in (("batch_256", example), ("single", example[:1])):
        timed = microseconds(answers, inputs, repeats)
        rows[name] = {
            key: {"us": round(value, 1), "ratio": round(value / timed["monolith"], 2)}
            for key, value in timed.items()
        }
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description="Speed of a mixture of experts beside one network.")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = {name: measure(widths, given.experts, given.repeats) for name, widths in NETWORKS.items()}
    sys.stdout.write(json.dumps({"experts": given.experts, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
