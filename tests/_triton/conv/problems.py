"""Random layers on random tables, with the sums they stand for in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tests._triton.kit import random_table
from torchsparse._geometry import Geometry

# Relative and absolute, by dtype or precision. The judge has the same rounded operands.
TOLERANCES = {
    torch.float16: 1e-3,  # one rounding to 11 bits at the end, sums in float32
    torch.bfloat16: 8e-3,  # one rounding to 8 bits at the end, sums in float32
    "ieee": 1e-5,  # the same sum in another order, 24 bits
    "tf32x3": 1e-5,  # products of 22 bits or more
    "tf32": 4e-3,  # operands rounded to 11 bits; the interpreter does not round them
}


def geometry(volume: int) -> Geometry:
    """A relation of so many taps that is not symmetric."""
    return Geometry.strided((volume,), (2,), (0,), (1,), "spconv")


@dataclass(frozen=True, eq=False)
class Problem:
    table: Tensor  # [K, M] int32
    feats: Tensor  # [N, C_in]
    weight: Tensor  # [K, C_in, C_out]
    bias: Tensor  # [C_out]
    grad: Tensor  # [M, C_out]

    @staticmethod
    def of(
        device: torch.device,
        size: tuple[int, int, int],
        channels: tuple[int, int],
        dtype: torch.dtype = torch.float32,
        density: float = 0.4,
    ) -> Problem:
        volume, inputs, outputs = size
        c_in, c_out = channels
        rng = np.random.default_rng(sum(size) + sum(channels))

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.from_numpy(rng.standard_normal(shape) * scale).to(device, dtype)

        return Problem(
            random_table(device, volume, inputs, outputs, density),
            draw(inputs, c_in),
            draw(volume, c_in, c_out, scale=max(volume * c_in * density, 1) ** -0.5),
            draw(c_out),
            draw(outputs, c_out, scale=max(outputs * density, 1) ** -0.5),
        )

    def product(self, reverse: bool = False) -> Tensor:
        """out[m] = sum over k of feats[table[k, m]] @ weight[k], without bias."""
        feats, weight = self.feats.double().cpu(), self.weight.double().cpu()
        out = torch.zeros(self.table.shape[1], weight.shape[2], dtype=torch.float64)
        for row, tap in zip(self.table.cpu().long(), weight.flip(0) if reverse else weight):
            hit = row >= 0
            out[hit] += feats[row[hit]] @ tap
        return out

    def weight_grad(self) -> Tensor:
        """out[k] = sum over the pairs (i, m) of tap k of feats[i]^T grad[m]."""
        feats, grad = self.feats.double().cpu(), self.grad.double().cpu()
        rows = self.table.cpu().long()
        return torch.stack([feats[row[row >= 0]].T @ grad[row >= 0] for row in rows])


def assert_near(got: Tensor, want: Tensor, precision: torch.dtype | str = "ieee") -> None:
    if precision == torch.float32:
        precision = "ieee"
    tolerance = TOLERANCES[precision]
    torch.testing.assert_close(got.double().cpu(), want, rtol=tolerance, atol=tolerance)
