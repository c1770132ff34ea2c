"""What only an accelerator can show: gradient scaling over groups of batches, flat buffers and loaders there, its memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from automode import FlatAdamW, TensorLoader, Trainer
from automode.trainer.checkpointing import CheckpointKeeper

pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

COMMON: dict[str, Any] = {"progress": False, "console": False, "device": "cuda"}


def data() -> TensorDataset:
    inputs = torch.randn(80, 5, generator=torch.Generator().manual_seed(1))
    return TensorDataset(inputs, (inputs[:, 0] > 0).long())


def script(optimizer: Any = torch.optim.AdamW, loader: Any = DataLoader) -> dict[str, Any]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2)).cuda()
    return {
        "model": model,
        "optimizer": optimizer(model.parameters(), lr=1e-2),
        "loss_fn": nn.CrossEntropyLoss(),
        "train_loader": loader(data(), batch_size=8),
    }


def weights(made: dict[str, Any]) -> list[Tensor]:
    return [p.detach().cpu() for p in made["model"].parameters()]


def test_accumulated_batches_under_gradient_scaling_are_a_loop_written_by_hand(tmp_path: Path) -> None:
    made, other = script(), script()
    result = Trainer(
        max_epochs=2,
        precision="fp16",
        accumulate_grad_batches=4,
        clip_norm=0.5,
        session_dir=tmp_path,
        **COMMON,
    ).fit(**made)
    scaler = torch.amp.GradScaler("cuda")
    for _ in range(2):
        for i, (x, y) in enumerate(other["train_loader"]):
            with torch.autocast("cuda", torch.float16):
                loss = other["loss_fn"](other["model"](x.cuda()), y.cuda())
            scaler.scale(loss / 4).backward()
            if i in (3, 7, 9):
                scaler.unscale_(other["optimizer"])
                nn.utils.clip_grad_norm_(other["model"].parameters(), 0.5)
                scaler.step(other["optimizer"])
                scaler.update()
                other["optimizer"].zero_grad()
    assert result.steps == 20
    for mine, theirs in zip(weights(made), weights(other), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_flat_buffers_and_the_loader_of_tensors_train_as_torchs_own(precision: Any, tmp_path: Path) -> None:
    made, other = script(FlatAdamW, TensorLoader), script()
    for each in (made, other):
        Trainer(max_epochs=3, precision=precision, session_dir=tmp_path, **COMMON).fit(**each)
    for mine, theirs in zip(weights(made), weights(other), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    again = torch.optim.AdamW(other["model"].parameters())
    again.load_state_dict(made["optimizer"].state_dict())
    other["model"](torch.ones(2, 5).cuda()).sum().backward()
    again.step()


def test_tensors_on_the_device_are_gathered_there() -> None:
    dataset = data()
    there = TensorDataset(*(part.cuda() for part in dataset.tensors))
    told = []
    for kind, of in ((DataLoader, dataset), (TensorLoader, there)):
        torch.manual_seed(3)
        told.append([part.cpu().tolist() for batch in kind(of, batch_size=8, shuffle=True) for part in batch])
    assert told[0] == told[1]


def test_a_cut_does_not_show_and_the_devices_memory_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cut(Exception):
        pass

    def after_step(keeper: CheckpointKeeper) -> None:
        if keeper._loop.batches == 13:
            assert keeper.save("periodic") is not None
            raise Cut

    def fit(folder: Path, **given: Any) -> Any:
        return Trainer(
            max_epochs=2, accumulate_grad_batches=2, precision="fp16", session_dir=folder, **given, **COMMON
        ).fit(**script(FlatAdamW, TensorLoader))

    whole = fit(tmp_path / "whole")
    assert (whole.session.frame("peak_cuda_mib", "epochs") > 0).all()
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointKeeper, "after_step", after_step)
        patch.setattr(CheckpointKeeper, "rescue", lambda *_: None)
        with pytest.raises(Cut):
            fit(tmp_path)
    resumed = fit(tmp_path, resume="auto")
    assert resumed.frame("loss").tolist() == whole.frame("loss").tolist()
