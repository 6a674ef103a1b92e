"""Root-mean-square norm, as a module and folded into the product that follows it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square norm with a gain, computed in float32 as Llama does (Zhang and Sennrich, 2019)."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) → the same shape and dtype."""
        if x.dtype == torch.float32 and self.weight.dtype == torch.float32:
            if x.is_cuda or torch.is_grad_enabled():
                return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
            return x * root_mean_square(x, self.eps).reciprocal() * self.weight
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * wide.to(x.dtype)


def root_mean_square(x: Tensor, eps: float) -> Tensor:
    """√(mean x² + eps) over the last dimension of (..., n) → (..., 1). √(a² + b²) spares a square, a sum and a root."""
    count = x.shape[-1]
    scaled = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * count**-0.5
    return torch.hypot(scaled, scaled.new_tensor(eps**0.5))


def fold_norm(weight: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
    """Moves all of an RMS norm but its division into the weight (out, in) of the product that follows.

    RMSNorm(x) = gain · √n · x / √(‖x‖² + n·ε).

    Returns:
        The float32 weight with gain · √n in it, and the scalar √(n·ε): divide by the hypotenuse of it and ‖x‖.
    """
    width = weight.shape[1]
    folded = weight.detach().float() * (norm.weight.detach().float() * width**0.5)
    return folded, torch.tensor((width * norm.eps) ** 0.5)


def row_size(x: Tensor, floor: Tensor) -> Tensor:
    """√(‖x‖² + floor²) over the last dimension, kept: (..., n) → (..., 1)."""
    return torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor)
