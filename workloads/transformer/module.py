"""The transformer as an ordinary PyTorch module, built from the same spec as the closed form in `operators.py`.

`Transformer(spec)(ids, targets)` returns the loss. Its parts `embedding`, `blocks` and `head` are the layers of the workload, with
parameters of the same names in the same order. Every sample fills its sequence: there is no padding and no padding mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  (the usual name)
from torch import Tensor, nn

from workloads.transformer.attention_module import Attention, AttentionForm, LatentAttention, make_attention, make_norm
from workloads.transformer.feed_forward_module import GroupedExperts, MixtureOfExperts, make_feed_forward
from workloads.transformer.spec import TransformerSpec


class PreNormBlock(nn.Module):
    """Norms before attention and feed-forward part (GPT, Llama)."""

    def __init__(self, spec: TransformerSpec, form: AttentionForm, has_experts: bool) -> None:
        super().__init__()
        self.norm_1 = make_norm(spec)
        self.attention = make_attention(spec, form)
        self.norm_2 = make_norm(spec)
        self.mlp = MixtureOfExperts(spec) if has_experts else make_feed_forward(spec, spec.ffn_width)
        self.dropout = _make_dropout(spec)

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
        self.dropout = _make_dropout(spec)

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
        self.dropout = _make_dropout(spec)

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


def _make_dropout(spec: TransformerSpec) -> nn.Module:
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
