"""Slices under FSDP2: the base is sharded over processes, nothing of it moves, deltas agree.

Gradient masks fail here in silence: hooks on a parameter never run once it is sharded.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from circuitune.components import Head
from circuitune.models import Model, load
from circuitune.slices import attached, head_slices, trainable
from tests.test_ranks import launch

HEADS = [Head(1, 0), Head(2, 1), Head(2, 3)]
STEPS = 5
BATCH = [[1, 5, 9, 2], [7, 3, 8, 6], [4, 4, 2, 1], [9, 8, 7, 5]]


def whole(value: Tensor) -> Tensor:
    """All of a tensor that may be sharded."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def step(model: Model, parameters: list[nn.Parameter], rows: list[list[int]]) -> None:
    """Gradients of the mean loss of some texts."""
    tokens = torch.tensor(rows)
    model.hf(tokens, labels=tokens, use_cache=False).loss.backward()
    assert all(parameter.grad is not None for parameter in parameters)


def tune(model: Model, rows: list[list[int]], *, sharded: bool) -> dict[str, Tensor]:
    """AdamW with decay and clipping; every parameter afterwards, by its name while attached."""
    with attached(model, head_slices(model, HEADS, "qkvo")):
        if sharded:
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for index in range(model.layers):
                fully_shard(model.layer(index), mesh=mesh)
            fully_shard(model.hf, mesh=mesh)
            weight = model.layer(0).mlp.up_proj.weight
            assert isinstance(weight, DTensor)
            assert weight.to_local().shape[0] < weight.shape[0]  # the base really is sharded
        parameters = trainable(model)
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
        for _ in range(STEPS):
            step(model, parameters, rows)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return {name: whole(value) for name, value in model.hf.named_parameters()}


def train_sharded(folder: Path, out: Path) -> None:
    """One process of two, with its half of the batch; the first one saves."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = tune(load(str(folder), device="cpu"), BATCH[rank::2], sharded=True)
    if rank == 0:
        torch.save(found, out)
    dist.barrier()
    dist.destroy_process_group()


def test_the_outside_stays_equal_and_the_slices_are_those_of_one_process(
    tiny_folder: Path, tmp_path: Path
) -> None:
    model = load(str(tiny_folder), device="cpu")
    before = {name: value.clone() for name, value in model.hf.named_parameters()}
    alone = tune(model, BATCH, sharded=False)
    launch(2, "-m", __name__, tiny_folder, tmp_path / "found.pt")
    found = torch.load(tmp_path / "found.pt")
    assert found.keys() == alone.keys()
    deltas = [name for name in found if name.endswith(".delta")]
    assert len(deltas) == len(found) - len(before) > 0
    for name, value in found.items():
        if name in deltas:
            torch.testing.assert_close(value, alone[name], rtol=0, atol=1e-6)
            assert value.abs().max() > 1e-3
        else:
            assert torch.equal(value, before[name.replace(".base.", ".")]), name


if __name__ == "__main__":
    train_sharded(*map(Path, sys.argv[1:]))
