"""How much GPU memory one step of a training needs beside what is there all along, worked out from shapes alone.

What is counted is what is alive at the worst moment. Knows how layers go backwards, and nothing of weights, adapters or
devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

KEPT_TOKENS = 8192
"""Fused layers compute attention once more when a pass has more tokens than this: `fast.install.KEPT_TOKENS`, which
cannot be imported without torch."""

_HEAD_ROWS, _HEAD_COLUMNS = 4096, 32768
"""Tokens and words of one tile of logits: TRL's loss makes no larger piece of them."""

_ONE_PASS = 2**29
"""Bytes of logits that are there at once where the loss is computed in one pass (`fast.head.TILE_BYTES`)."""


@dataclass(frozen=True)
class Activations:
    """What decides the size of activations.

    `width`: bytes a number. Columns: `attention` of q, k, v and the gate, `heads` of the attention's output, `ffn` of
    the widest dense MLP. `experts`, `moe`, `chosen`: routed experts of a layer, width of one, how many a token goes to.
    `fused`: layers are (AFMoE); `recomputed`: attention runs once more in their backward pass.
    """

    tokens: int
    width: int
    layers: int
    hidden: int
    attention: int
    heads: int
    ffn: int
    experts: int
    moe: int
    chosen: int
    expert_r: int
    vocabulary: int
    fused: bool
    recomputed: bool

    @classmethod
    def of(
        cls,
        config: PretrainedConfig,
        linears: list[tuple[str, Any]],
        experts: list[tuple[str, Any]],
        tokens: int,
        width: int,
        expert_r: int,
    ) -> Activations:
        """Read off a model's configuration, its linear layers and its fused expert tensors, both by name."""
        config = config.get_text_config()
        fused = config.model_type == "afmoe"
        sizes: dict[str, int] = {}
        for name, layer in linears:
            leaf = name.rsplit(".", 1)[-1] if ".self_attn." in name else "mlp"
            sizes[leaf] = max(sizes.get(leaf, 0), layer.out_features)
        sides = next((tuple(p.shape) for name, p in experts if name.endswith("gate_up_proj")), (0, 0, 0))
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            tokens=tokens,
            width=width,
            vocabulary=config.vocab_size,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            attention=sum(rows for leaf, rows in sizes.items() if leaf not in ("o_proj", "mlp")),
            heads=heads * head_dim,
            ffn=sizes.get("mlp", 0),
            experts=sides[0],
            moe=sides[1] // 2,
            chosen=getattr(config, "num_experts_per_tok", 0) if sides[0] else 0,
            expert_r=expert_r,
            fused=fused,
            recomputed=fused and tokens > KEPT_TOKENS,
        )

    def kept(self) -> int:
        """What each layer keeps: its input; where layers are fused (AFMoE) the MLP's output and the routing, too, and
        attention's output before and after the last projection unless `recomputed`."""
        if not self.fused:
            return self.layers * self.tokens * self.hidden * self.width
        columns = 2 * self.hidden + (0 if self.recomputed else self.heads + self.hidden)
        # Five numbers a choice (32 bits for the weight, 64 for the others) and the router's logits.
        routing = 36 * self.chosen + self.experts * self.width
        return self.layers * self.tokens * (columns * self.width + routing)

    def scratch(self) -> int:
        """One layer's experts and linear layers. Rows of fused layers' experts hold those of the adapter's second
        factors as well, in whole lines of 128 bytes."""
        linears = self.attention + self.heads + 3 * self.ffn
        line = 128 // self.width
        more = -(-self.expert_r // line) * line if self.fused else 0
        weights = (3 * self.experts * self.moe + linears) * self.hidden
        return (weights + self.experts * (2 * self.moe + self.hidden) * more) * self.width

    def layer(self) -> int:
        """The worst moment of a layer's backward pass, beside four rows of the residual stream a token.

        Routed experts, a row for each token and choice: three products with the adapter's first factors, and either
        the first product with its gradient, three rows of the inner size (the gradient in two parts, and what goes
        through dropout) and two of the input's size (the gradient of the output, and the input after dropout), or the
        gradient of the first product and three rows of the input's size (the last, and its gradient in two parts).
        Attention: what goes into it and comes out of it, all of that again as gradients, and what flash attention sums
        in float32. Where attention is recomputed it is there while the experts run.
        """
        largest = max(7 * self.moe + 2 * self.hidden, 2 * self.moe + 3 * self.hidden)
        routed = self.chosen * (largest + 3 * self.expert_r)
        dense = 5 * self.ffn + 3 * self.hidden
        attention = 2 * self.attention + 11 * self.heads + 5 * self.hidden
        held = self.attention + 3 * self.heads + 2 * self.hidden if self.recomputed else 0
        return self.tokens * self.width * (max(routed + held, dense + held, attention) + 4 * self.hidden)

    def head(self) -> int:
        """A tile of logits, the hidden states that are scored and their gradient, which is summed in float32."""
        tile = min(self.tokens, _HEAD_ROWS) * min(self.vocabulary, _HEAD_COLUMNS) * self.width
        if self.fused:
            tile = min(self.tokens * self.vocabulary * self.width, _ONE_PASS)
        return tile + self.tokens * self.hidden * (2 * self.width + 4)
