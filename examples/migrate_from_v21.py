"""A program in the style of TorchSparse 2.1, unchanged: it runs here, on a CPU or a GPU.

Nothing in `train` knows of this library's own names. What may need another line is listed in
docs/migration.md.
"""

import argparse

import numpy as np
import torch
import torch.nn as nn

import torchsparse
import torchsparse.nn as spnn
import torchsparse.nn.functional as F
from torchsparse import SparseTensor
from torchsparse.backbones.modules import SparseConvBlock, SparseResBlock
from torchsparse.utils.collate import sparse_collate_fn
from torchsparse.utils.quantize import sparse_quantize


class RandomDataset(torch.utils.data.Dataset):
    """Random voxels with the label of their half of the room."""

    def __init__(self, input_size, voxel_size):
        self.input_size = input_size
        self.voxel_size = voxel_size

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        inputs = rng.uniform(-4, 4, (self.input_size, 4)).astype(np.float32)
        coords, feats = inputs[:, :3], inputs
        coords = coords - np.min(coords, axis=0, keepdims=True)
        coords, indices = sparse_quantize(coords, self.voxel_size, return_index=True)
        feats = torch.tensor(feats[indices], dtype=torch.float)
        labels = (feats[:, 0] > 0).long()
        coords = torch.tensor(coords, dtype=torch.int)
        return {
            "input": SparseTensor(coords=coords, feats=feats),
            "label": SparseTensor(coords=coords, feats=labels),
        }

    def __len__(self):
        return 64


class Net(nn.Module):
    """Down once, up once, with a skip connection."""

    def __init__(self):
        super().__init__()
        self.stem = SparseConvBlock(4, 16, 3)
        self.down = spnn.Conv3d(16, 32, kernel_size=2, stride=2)
        self.middle = SparseResBlock(32, 32, 3)
        self.up = spnn.Conv3d(32, 16, kernel_size=2, stride=2, transposed=True)
        self.head = spnn.Conv3d(32, 2, kernel_size=1, bias=True)

    def forward(self, x):
        skip = self.stem(x)
        y = self.up(self.middle(self.down(skip)))
        return self.head(torchsparse.cat([y, skip]))


def train(device="cpu", steps=12, amp=False):
    """Losses and accuracies of a few steps."""
    F.set_kmap_mode("hashmap_on_the_fly")
    F.set_conv_mode(1)
    torchsparse.backends.allow_tf32 = False
    torch.manual_seed(0)

    loader = torch.utils.data.DataLoader(
        RandomDataset(1500, 0.4), batch_size=2, collate_fn=sparse_collate_fn
    )
    model = Net().to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    history = []
    for _, feed_dict in zip(range(steps), loader):
        inputs = feed_dict["input"].to(device=device)
        labels = feed_dict["label"].to(device=device)
        with torch.autocast(torch.device(device).type, enabled=amp, dtype=torch.bfloat16):
            outputs = model(inputs)
            loss = criterion(outputs.feats.float(), labels.feats)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        accuracy = (outputs.feats.argmax(1) == labels.feats).float().mean().item()
        history.append((loss.item(), accuracy))
    return history


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--amp", action="store_true")
    options = parser.parse_args(argv)
    history = train(options.device, options.steps, options.amp)
    for step, (loss, accuracy) in enumerate(history):
        print(f"[step {step + 1}] loss = {loss:.3f}, accuracy = {accuracy:.0%}")
    return history


if __name__ == "__main__":
    main()
