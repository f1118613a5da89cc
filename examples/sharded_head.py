"""An OCR head whose images are divided over some processes, and the rows of each image over others:

    torchrun --nproc-per-node 4 examples/sharded_head.py

trains it on 4 processes that have a quarter of the rows each, on GPUs or on CPUs. No process sees all pixels.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from ocr_kernels import GatherState, modules


class Head(nn.Module):
    """Pixels x `[B, C, rows, W]` and their region logits `[B, K, rows, W]` to logits, of the rows of this process."""

    def __init__(self, channels: int, key_channels: int, num_classes: int, mesh: DeviceMesh) -> None:
        super().__init__()
        self.space = mesh.get_group("space")
        # Dropout2d would have to draw the same channels in all processes of an image
        self.ocr = modules.SpatialOCR(channels, key_channels, channels, dropout=0.0)
        self.cls = nn.Conv2d(channels, num_classes, 1)
        attention = self.ocr.object_context_block
        convert = nn.SyncBatchNorm.convert_sync_batchnorm
        if mesh["data"].size() > 1:  # of regions, which are the same in all processes of an image
            attention.f_object = convert(attention.f_object, mesh.get_group("data"))
            attention.f_down = convert(attention.f_down, mesh.get_group("data"))
        attention.f_pixel, attention.f_up = convert(attention.f_pixel), convert(attention.f_up)  # of pixels: everyone's
        self.ocr.conv_bn_dropout = convert(self.ocr.conv_bn_dropout)

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        state = GatherState()
        state.update(x, logits)
        regions = state.all_reduce(self.space).result()
        out: Tensor = self.cls(self.ocr(x, regions.unsqueeze(3)))
        return out


def train(head: nn.Module, x: Tensor, logits: Tensor, labels: Tensor, pixels: int, steps: int = 5) -> list[float]:
    """The loss of each step, over all `pixels` of all processes; `x`, `logits` and `labels` are this process's own."""
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(head(x, logits), labels, reduction="sum") / pixels
        (loss * distributed.get_world_size()).backward()  # FSDP and DDP average over the processes what is a sum
        optimizer.step()
        everyones = loss.detach().clone()
        distributed.all_reduce(everyones)
        losses.append(everyones.item())
    return losses


def main(data: int = 1) -> None:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    mesh = init_device_mesh(kind, (data, distributed.get_world_size() // data), mesh_dim_names=("data", "space"))
    torch.manual_seed(0)
    x, logits, labels = torch.randn(2, 64, 32, 32), torch.randn(2, 19, 32, 32), torch.randint(19, (2, 32, 32))
    head = Head(64, 32, 19, mesh).to(kind)
    fully_shard(head, mesh=mesh)  # parameters divided over space, and replicated over data
    mine = []
    for tensor in (x, logits, labels):
        images = tensor.tensor_split(data)[mesh.get_local_rank("data")]
        rows = images.tensor_split(mesh["space"].size(), dim=-2)[mesh.get_local_rank("space")]
        mine.append(rows.to(kind))
    losses = train(head, *mine, labels.numel())
    if distributed.get_rank() == 0:
        print(", ".join(f"{loss:.6f}" for loss in losses))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
