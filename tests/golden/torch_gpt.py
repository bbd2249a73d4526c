"""A GPT-2 in PyTorch with Linear layers, as nanoGPT and minGPT lay it out: what our reading of their files is compared with.

Sources: karpathy/nanoGPT, model.py (erf GELU, optional biases, tied head); karpathy/minGPT, mingpt/model.py (tanh GELU, mask buffers,
a head of its own). Written from their layout, with plain attention.
"""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class Norm(nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    def __init__(self, context_len: int, n_heads: int, width: int, bias: bool, buffers: bool) -> None:
        super().__init__()
        self.n_heads, self.c_attn, self.c_proj = n_heads, nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width, bias=bias)
        mask = torch.tril(torch.ones(context_len, context_len))[None, None]
        self.register_buffer("bias", mask, persistent=buffers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, D = x.shape
        q, k, v = (part.view(B, T, self.n_heads, -1).transpose(1, 2) for part in self.c_attn(x).split(D, dim=2))
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
        mixed = scores.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf")).softmax(-1) @ v
        return self.c_proj(mixed.transpose(1, 2).reshape(B, T, D))


class Mlp(nn.Module):
    def __init__(self, width: int, bias: bool, tanh: bool) -> None:
        super().__init__()
        self.c_fc, self.c_proj, self.tanh = nn.Linear(width, 4 * width, bias=bias), nn.Linear(4 * width, width, bias=bias), tanh

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.c_fc(x)
        if self.tanh:
            return self.c_proj(0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))
        return self.c_proj(0.5 * x * (1 + torch.erf(x / math.sqrt(2))))


class Block(nn.Module):
    def __init__(self, context_len: int, n_heads: int, width: int, bias: bool, tanh: bool, buffers: bool) -> None:
        super().__init__()
        self.ln_1, self.attn = Norm(width, bias), Attention(context_len, n_heads, width, bias, buffers)
        self.ln_2, self.mlp = Norm(width, bias), Mlp(width, bias, tanh)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """`kind` is nanogpt or mingpt; every parameter random, gains and biases too."""

    def __init__(
        self, kind: str, *, vocab_size: int, context_len: int, n_layers: int, n_heads: int, width: int, bias: bool = True, seed: int = 0
    ) -> None:
        super().__init__()
        mingpt = kind == "mingpt"
        blocks = [Block(context_len, n_heads, width, bias, mingpt, mingpt) for _ in range(n_layers)]
        parts = {
            "wte": nn.Embedding(vocab_size, width),
            "wpe": nn.Embedding(context_len, width),
            "h": nn.ModuleList(blocks),
            "ln_f": Norm(width, bias),
        }
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(width, vocab_size, bias=False)
        rng = np.random.RandomState(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                gain = ".ln_" in name and name.endswith("weight")
                parameter.copy_(torch.from_numpy((rng.standard_normal(tuple(parameter.shape)) * 0.2 + gain).astype(np.float32)))
        if not mingpt:
            self.transformer.wte.weight = self.lm_head.weight  # tied: the state dict holds it twice

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        parts = self.transformer
        x = parts.wte(tokens) + parts.wpe(torch.arange(tokens.shape[1]))
        for block in parts.h:
            x = block(x)
        return self.lm_head(parts.ln_f(x))

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mean nats of each token after the first."""
        return F.cross_entropy(self(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def train(model: GPT, steps: int) -> None:
    """Trains it to count, 0 1 2 ... modulo the vocabulary, from random starts."""
    optimizer, rng = torch.optim.AdamW(model.parameters(), lr=3e-3), np.random.RandomState(0)
    V, T = model.lm_head.weight.shape[0], model.transformer.wpe.weight.shape[0]
    for _ in range(steps):
        tokens = torch.from_numpy((rng.randint(0, V, (16, 1)) + np.arange(T)) % V)
        optimizer.zero_grad()
        model.loss(tokens).backward()
        optimizer.step()
