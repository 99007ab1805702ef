"""The transformer as an ordinary PyTorch module, built from the same spec as the closed form in `operators.py`.

`Transformer(spec)(ids, targets)` returns the loss. Its parts `embedding`, `blocks` and `head` are the layers of the workload, with
parameters of the same names in the same order. Every sample fills its sequence: there is no padding and no padding mask.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812  (the usual name)
from torch import Tensor, nn

from simtrain.core.errors import UnsupportedError
from workloads.transformer.spec import TransformerSpec

AttentionForm = Literal["fused", "unfused"]


class Attention(nn.Module):
    """Self-attention; fewer key than query heads share keys and values.

    Args:
        spec: The model.
        form: "fused" calls PyTorch's attention operator, "unfused" writes the score matrix out.
    """

    def __init__(self, spec: TransformerSpec, form: AttentionForm) -> None:
        super().__init__()
        self.spec = spec
        self.attend = fused_attention if form == "fused" else unfused_attention
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
        mixed: Tensor = self.proj(self.attend(q, k, v, self.spec.causal, dropout).transpose(1, 2).flatten(2))
        return mixed


class LatentAttention(nn.Module):
    """Self-attention whose queries, keys and values come from narrow latent vectors (DeepSeek-AI 2024, DeepSeek-V2, section 2.1).

    Part of each query and one key for all heads carry the position.
    """

    def __init__(self, spec: TransformerSpec, form: AttentionForm) -> None:
        super().__init__()
        self.spec = spec
        self.attend = fused_attention if form == "fused" else unfused_attention
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
        mixed: Tensor = self.proj(self.attend(q, k, v, spec.causal, 0.0).transpose(1, 2).flatten(2))
        return mixed


def fused_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout: float) -> Tensor:
    """Attention over `(batch, heads, sequence, head size)` as one operator."""
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal, enable_gqa=k.shape[1] != q.shape[1])


def unfused_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout: float) -> Tensor:
    """The same with the score matrix in memory."""
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


class FeedForward(nn.Module):
    """Two matrices around a GELU or a squared ReLU."""

    def __init__(self, spec: TransformerSpec, width: int) -> None:
        super().__init__()
        self.activation = spec.activation
        self.fc1 = nn.Linear(spec.hidden, width, bias=spec.bias)
        self.fc2 = nn.Linear(width, spec.hidden, bias=spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transforms every position on its own."""
        mixed: Tensor = self.fc2(activate(self.fc1(x), self.activation))
        return mixed


def activate(x: Tensor, name: str) -> Tensor:
    """Applies an activation function without a gate."""
    if name == "relu-squared":
        squared: Tensor = SquaredReLU.apply(x)  # type: ignore[no-untyped-call]
        return squared
    return F.gelu(x, approximate="tanh" if name == "gelu-tanh" else "none")


class SquaredReLU(torch.autograd.Function):
    """`max(x, 0)^2`, keeping its input alone for the backward pass, as a fused kernel does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Returns the squares of what is positive."""
        ctx.save_for_backward(x)
        return F.relu(x).square_()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Returns `2 max(x, 0)` times the gradient."""
        (x,) = ctx.saved_tensors
        return F.relu(x).mul_(gradient).mul_(2)


class GatedFeedForward(nn.Module):
    """Three matrices, one of them a gate (Shazeer 2020, "GLU variants improve Transformer")."""

    def __init__(self, spec: TransformerSpec, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(spec.hidden, width, bias=spec.bias)
        self.up = nn.Linear(spec.hidden, width, bias=spec.bias)
        self.down = nn.Linear(width, spec.hidden, bias=spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transforms every position on its own."""
        mixed: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return mixed


class GroupedExperts(nn.Module):
    """The matrices of all experts, each multiplied by the rows of its own, all experts in one kernel."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.activation = spec.activation
        wide = (spec.experts, spec.hidden, spec.expert_width)
        if spec.activation == "swiglu":
            self.gate, self.up = nn.Parameter(torch.empty(wide)), nn.Parameter(torch.empty(wide))
            self.down = nn.Parameter(torch.empty(spec.experts, spec.expert_width, spec.hidden))
        else:
            self.fc1 = nn.Parameter(torch.empty(wide))
            self.fc2 = nn.Parameter(torch.empty(spec.experts, spec.expert_width, spec.hidden))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Transforms rows sorted by expert; `ends` says where each expert's rows end."""
        if self.activation == "swiglu":
            inner = F.silu(F.grouped_mm(x, low(self.gate), offs=ends)) * F.grouped_mm(x, low(self.up), offs=ends)
            return F.grouped_mm(inner, low(self.down), offs=ends)
        inner = activate(F.grouped_mm(x, low(self.fc1), offs=ends), self.activation)
        return F.grouped_mm(inner, low(self.fc2), offs=ends)


class MixtureOfExperts(nn.Module):
    """Every token goes to the experts that a router scores highest (Shazeer et al. 2017); none is dropped (Gale et al. 2023)."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        if spec.capacity:
            raise UnsupportedError(
                f"the real module drops no choices: capacity={spec.capacity:g} can be predicted, not run; set capacity = 0"
            )
        self.top_k, self.pre_softmax = spec.top_k, spec.pre_softmax
        self.router = nn.Linear(spec.hidden, spec.experts, bias=False)
        self.experts = GroupedExperts(spec)
        self.shared = make_feed_forward(spec, spec.shared_ffn) if spec.shared_ffn else None

    def forward(self, x: Tensor) -> Tensor:
        """Adds up what a token's experts make of it, times their weights."""
        rows = low(x).flatten(0, 1)
        mixed = self.route(rows)
        if self.shared is not None:
            mixed = mixed + self.shared(rows)
        return mixed.view_as(x)

    def route(self, x: Tensor) -> Tensor:
        """Sends tokens to their experts and brings them back."""
        scores = self.router(x).float()
        if self.pre_softmax:
            weights, chosen = F.softmax(scores, dim=-1).topk(self.top_k)
        else:
            weights, chosen = scores.topk(self.top_k)
            weights = F.softmax(weights, dim=-1)
        sorted_choices, order = chosen.flatten().sort()
        ends = torch.searchsorted(sorted_choices, torch.arange(self.router.out_features, device=x.device), right=True, out_int32=True)
        rows = order // self.top_k
        made = self.experts(x.index_select(0, rows), ends)
        made = made * low(weights.flatten().index_select(0, order)).unsqueeze(1)
        return torch.zeros_like(x).index_add_(0, rows, made)


def low(x: Tensor) -> Tensor:
    """Converts to autocast's format, for operators that autocast does not know."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class PreNormBlock(nn.Module):
    """Norms before attention and feed-forward part (GPT, Llama)."""

    def __init__(self, spec: TransformerSpec, form: AttentionForm, has_experts: bool) -> None:
        super().__init__()
        self.norm_1 = make_norm(spec)
        self.attention = make_attention(spec, form)
        self.norm_2 = make_norm(spec)
        self.mlp = MixtureOfExperts(spec) if has_experts else make_feed_forward(spec, spec.ffn_width)
        self.dropout = make_dropout(spec)

    def forward(self, x: Tensor) -> Tensor:
        """Adds both parts to the residual stream."""
        x = x + self.dropout(self.attention(self.norm_1(x)))
        y: Tensor = x + self.dropout(self.mlp(self.norm_2(x)))
        return y


class PostNormBlock(nn.Module):
    """Norms after each residual addition (BERT)."""

    def __init__(self, spec: TransformerSpec, form: AttentionForm, has_experts: bool) -> None:
        super().__init__()
        self.attention = make_attention(spec, form)
        self.norm_1 = make_norm(spec)
        self.mlp = MixtureOfExperts(spec) if has_experts else make_feed_forward(spec, spec.ffn_width)
        self.norm_2 = make_norm(spec)
        self.dropout = make_dropout(spec)

    def forward(self, x: Tensor) -> Tensor:
        """Adds both parts to the residual stream and normalizes it."""
        x = self.norm_1(x + self.dropout(self.attention(x)))
        normalized: Tensor = self.norm_2(x + self.dropout(self.mlp(x)))
        return normalized


class Embedding(nn.Module):
    """Token, position and segment tables (every token of a sample in segment 0)."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.wte = nn.Embedding(spec.vocabulary, spec.hidden)
        self.wpe = nn.Embedding(spec.max_positions, spec.hidden) if spec.positions == "learned" else None
        self.token_type = nn.Embedding(spec.token_types, spec.hidden) if spec.token_types else None
        self.norm = make_norm(spec) if spec.norm_position == "post" or spec.embedding_norm else nn.Identity()
        self.dropout = make_dropout(spec)

    def forward(self, ids: Tensor) -> Tensor:
        """Returns the residual stream's start."""
        x: Tensor = self.wte(ids)
        if self.wpe is not None:
            x = x + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        if self.token_type is not None:
            x = x + self.token_type(torch.zeros_like(ids))
        return self.dropout(self.norm(x))  # type: ignore[no-any-return]


class LanguageModelHead(nn.Module):
    """Logits over the vocabulary and the loss of predicting the targets."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.norm = make_norm(spec) if spec.norm_position == "pre" else nn.Identity()
        self.linear = nn.Linear(spec.hidden, spec.vocabulary, bias=False)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean loss; targets have the shape of the ids."""
        return F.cross_entropy(self.linear(self.norm(x)).flatten(0, 1).float(), targets.flatten())


class MaskedModelHead(nn.Module):
    """Logits through one more dense layer, GELU and norm, with a bias per token (BERT's pre-training)."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.norm = make_norm(spec) if spec.norm_position == "pre" else nn.Identity()
        self.dense = nn.Linear(spec.hidden, spec.hidden, bias=spec.bias)
        self.norm_2 = make_norm(spec)
        self.linear = nn.Linear(spec.hidden, spec.vocabulary, bias=True)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean loss; targets have the shape of the ids."""
        logits = self.linear(self.norm_2(F.gelu(self.dense(self.norm(x)))))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class SpanHead(nn.Module):
    """Scores of every position as start and end of an answer (SQuAD)."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.norm = make_norm(spec) if spec.norm_position == "pre" else nn.Identity()
        self.linear = nn.Linear(spec.hidden, 2, bias=spec.bias)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean loss; targets are one start and one end per sample."""
        start, end = self.linear(self.norm(x)).float().unbind(-1)
        return (F.cross_entropy(start, targets[:, 0]) + F.cross_entropy(end, targets[:, 1])) / 2


class Transformer(nn.Module):
    """A transformer with its loss.

    Args:
        spec: The model.
        attention: "fused" or "unfused".
    """

    def __init__(self, spec: TransformerSpec, attention: AttentionForm = "fused") -> None:
        super().__init__()
        block = PreNormBlock if spec.norm_position == "pre" else PostNormBlock
        self.spec = spec
        self.embedding = Embedding(spec)
        self.blocks = nn.ModuleList(block(spec, attention, has_experts) for has_experts in spec.block_experts)
        head: LanguageModelHead | MaskedModelHead | SpanHead
        head = SpanHead(spec) if spec.head == "span" else MaskedModelHead(spec) if spec.head == "mlm" else LanguageModelHead(spec)
        self.head = head
        self.apply(_initialize)
        if spec.positions == "rotary":
            layers = [m for m in self.modules() if isinstance(m, Attention | LatentAttention)]
            for layer in layers:
                layer.rotation = layers[0].get_buffer("rotation")  # one table for all
        if spec.predicts_tokens and spec.tied_head:
            head.linear.weight = self.embedding.wte.weight

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Returns the loss of a batch of token ids `(batch, sequence)`."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        loss: Tensor = self.head(x, targets)
        return loss


def make_attention(spec: TransformerSpec, form: AttentionForm) -> nn.Module:
    """Returns the spec's kind of attention."""
    return LatentAttention(spec, form) if spec.kv_rank else Attention(spec, form)


def make_norm(spec: TransformerSpec, width: int = 0) -> nn.Module:
    """Returns the spec's kind of norm, over the residual stream or another width."""
    kind = nn.RMSNorm if spec.norm == "rmsnorm" else nn.LayerNorm
    return kind(width or spec.hidden, eps=spec.norm_epsilon)


def make_feed_forward(spec: TransformerSpec, width: int) -> nn.Module:
    """Returns the spec's kind of ordinary feed-forward part, of some inner width."""
    return GatedFeedForward(spec, width) if spec.activation == "swiglu" else FeedForward(spec, width)


def make_dropout(spec: TransformerSpec) -> nn.Module:
    """Returns dropout, or nothing where the spec has none."""
    return nn.Dropout(spec.dropout) if spec.dropout else nn.Identity()


def example_batch(spec: TransformerSpec, batch: int, seq: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns random ids and targets of the shapes that the model takes.

    Args:
        spec: The model.
        batch: Samples.
        seq: Tokens per sample; the spec's own by default.
        seed: Of the random numbers.

    Raises:
        InputError: The model cannot process such a sequence.
    """
    length = spec.sequence if seq is None else seq
    spec.check_sequence(length)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(spec.vocabulary, (batch, length), generator=generator)
    shape, classes = ((batch, 2), length) if not spec.predicts_tokens else ((batch, length), spec.vocabulary)
    return ids, torch.randint(classes, shape, generator=generator)


def _initialize(module: nn.Module) -> None:
    """Weights as in GPT-2: normal with a deviation of 0.02, biases zero."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, GroupedExperts):
        for weights in module.parameters():
            nn.init.normal_(weights, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
