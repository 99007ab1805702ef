"""Self-attention of the transformer as PyTorch modules: with heads of its own, shared ones, or from latent vectors."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812  (the usual name)
from torch import Tensor, nn

from workloads.transformer.spec import TransformerSpec

AttentionForm = Literal["fused", "unfused"]


def make_norm(spec: TransformerSpec, width: int = 0) -> nn.Module:
    """Returns the spec's kind of norm, over the residual stream or another width."""
    kind = nn.RMSNorm if spec.norm == "rmsnorm" else nn.LayerNorm
    return kind(width or spec.hidden, eps=spec.norm_epsilon)


def make_attention(spec: TransformerSpec, form: AttentionForm) -> nn.Module:
    """Returns the spec's kind of attention."""
    return LatentAttention(spec, form) if spec.kv_rank else Attention(spec, form)


class Attention(nn.Module):
    """Self-attention; fewer key than query heads share keys and values.

    Args:
        spec: The model.
        form: "fused" calls PyTorch's attention operator, "unfused" writes the score matrix out.
    """

    def __init__(self, spec: TransformerSpec, form: AttentionForm) -> None:
        super().__init__()
        self.spec = spec
        self.core_attention = fused_attention if form == "fused" else UnfusedAttention()
        self.widths = [spec.query_width, spec.kv_width, spec.kv_width]
        if spec.fused_qkv:
            self.qkv = nn.Linear(spec.hidden, sum(self.widths), bias=spec.bias)
        else:
            self.q, self.k, self.v = (nn.Linear(spec.hidden, width, bias=spec.bias) for width in self.widths)
        self.q_norm = make_norm(spec, spec.size_of_head) if spec.qk_norm else nn.Identity()
        self.k_norm = make_norm(spec, spec.size_of_head) if spec.qk_norm else nn.Identity()
        self.proj = nn.Linear(spec.query_width, spec.hidden, bias=spec.bias)
        if spec.positions == "rotary":
            self.register_buffer("rotation", rotation_table(spec), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns what every position gathers from the others."""
        if self.spec.fused_qkv:
            q, k, v = self.qkv(x).split(self.widths, dim=-1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        q, k, v = (t.view(*t.shape[:2], -1, self.spec.size_of_head) for t in (q, k, v))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.spec.positions == "rotary":
            q = rotate(q, self.get_buffer("rotation"))
            k = rotate(k, self.get_buffer("rotation"))
        dropout = self.spec.dropout if self.training else 0.0
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mixed: Tensor = self.proj(self.core_attention(q, k, v, self.spec.causal, dropout).transpose(1, 2).flatten(2))
        return mixed


class LatentAttention(nn.Module):
    """Self-attention whose queries, keys and values come from narrow latent vectors (DeepSeek-AI 2024, DeepSeek-V2, section 2.1).

    Part of each query and one key for all heads carry the position.
    """

    def __init__(self, spec: TransformerSpec, form: AttentionForm) -> None:
        super().__init__()
        self.spec = spec
        self.core_attention = fused_attention if form == "fused" else UnfusedAttention()
        self.q_down = nn.Linear(spec.hidden, spec.query_rank, bias=False)
        self.q_norm = make_norm(spec, spec.query_rank)
        self.q_up = nn.Linear(spec.query_rank, spec.query_width + spec.rotary_width, bias=False)
        self.kv_down = nn.Linear(spec.hidden, spec.kv_rank, bias=False)
        self.kv_norm = make_norm(spec, spec.kv_rank)
        self.k_rotary = nn.Linear(spec.hidden, spec.rotary_head, bias=False)
        self.k_up = nn.Linear(spec.kv_rank, spec.query_width, bias=False)
        self.v_up = nn.Linear(spec.kv_rank, spec.query_width, bias=False)
        self.proj = nn.Linear(spec.query_width, spec.hidden, bias=False)
        self.register_buffer("rotation", rotation_table(spec), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns what every position gathers from the others."""
        spec, table = self.spec, self.get_buffer("rotation")
        q = self.q_up(self.q_norm(self.q_down(x))).view(*x.shape[:2], spec.heads, -1)
        plain, turned = q.split([spec.size_of_head, spec.rotary_head], dim=-1)
        q = torch.cat([plain, rotate(turned, table)], dim=-1)
        latent = self.kv_norm(self.kv_down(x))
        shared = rotate(self.k_rotary(x)[:, :, None], table).expand(-1, -1, spec.heads, -1)
        k = torch.cat([self.k_up(latent).view(*x.shape[:2], spec.heads, -1), shared], dim=-1)
        v = self.v_up(latent).view(*x.shape[:2], spec.heads, -1)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mixed: Tensor = self.proj(self.core_attention(q, k, v, spec.causal, 0.0).transpose(1, 2).flatten(2))
        return mixed


def fused_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout: float) -> Tensor:
    """Attention over `(batch, heads, sequence, head size)` as one operator."""
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal, enable_gqa=k.shape[1] != q.shape[1])


class UnfusedAttention(nn.Module):
    """The same with the score matrix in memory: a module of its own, so that it can be recomputed on its own."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout: float) -> Tensor:
        """Writes scores, hides what lies ahead, and mixes values by the probabilities."""
        if k.shape[1] != q.shape[1]:
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]))
        if causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(hidden, -math.inf)
        return F.dropout(F.softmax(scores, dim=-1), dropout) @ v


def rotation_table(spec: TransformerSpec) -> Tensor:
    """One rotation per position and pair of neighbours, as bits, which survive a change of the model's number format."""
    width = spec.rotary_head or spec.size_of_head
    frequencies = spec.rotary_base ** -(torch.arange(0, width, 2) / width)
    angles = torch.outer(torch.arange(spec.max_positions), frequencies)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).view(torch.int32)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turns pairs of neighbours in `(batch, sequence, heads, head size)` by an angle that grows with the position (Su et al. 2021)."""
    turns = torch.view_as_complex(table[: x.shape[1], None].view(torch.float32))
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(-2).type_as(x)
