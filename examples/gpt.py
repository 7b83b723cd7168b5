"""A byte-level GPT of about 10 million parameters, small enough for two CPU cores.

One thing is unusual, and on purpose: dropout belongs to the *sample*, not to the rank. Every sample of the
global batch brings a seed, and its masks come from a generator with that seed. So a training step means the same
arithmetic on every parallel layout, up to the order of summation, with dropout on; and because the seeds are drawn
from torch's global generator, a resume that forgot the RNG state would be seen at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class GPTConfig:
    """The shape of the model."""

    vocabulary: int = 256
    context: int = 48
    width: int = 384
    depth: int = 6
    heads: int = 6
    dropout: float = 0.1


class Block(nn.Module):
    """Pre-norm attention and MLP; the caller brings the dropout masks."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, masks: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + masks[:, 0] * self.proj(attended.transpose(1, 2).reshape(batch, length, width))
        return x + masks[:, 1] * self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """The model; its forward returns the mean cross entropy of the next byte."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.apply(_initialise)

    def forward(self, tokens: Tensor, targets: Tensor, seeds: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block, masks in zip(self.blocks, self._masks(seeds), strict=True):
            x = block(x, masks)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def _masks(self, seeds: Tensor) -> Tensor:
        """Dropout masks of whole channels, indexed [block, sample, site, 1, channel], drawn sample by sample."""
        keep = 1.0 - self.config.dropout
        shape = (self.config.depth, 2, 1, self.config.width)
        drawn = [torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < keep for seed in seeds.tolist()]
        return torch.stack(drawn, dim=1).float() / keep


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
