"""Models for the training benchmark: an exact shape, random weights, made in 4 bits on the device that trains them.

What is not random is the code: the quantiser that loading uses converts the empty model, so that modules, types and
places are those of a loaded checkpoint. No expert ever exists in more than 4 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

    from triton_sft_pipeline.training.settings import LoraSettings, ModelSettings

TRINITY_MINI = "trinity-mini"
TINY = "tiny"

PARAMETERS = {TRINITY_MINI: 26_123_974_400}
"""What a model of a shape has in all layers. Another number means that another model would be measured."""

STD = 0.02
"""Standard deviation of random weights, that of the architecture's own initialisation."""

_COMMON = {
    "num_shared_experts": 1,
    "global_attn_every_n_layers": 4,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rms_norm_eps": 1e-5,
    "route_scale": 2.826,
    "mup_enabled": True,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 3,
    "pad_token_id": 12,
}
# Every number stands here, because the architecture's defaults are those of another model.
SHAPES: dict[str, dict[str, Any]] = {
    TRINITY_MINI: _COMMON
    | {
        "vocab_size": 200192,
        "hidden_size": 2048,
        "num_hidden_layers": 32,
        "num_dense_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 1024,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "sliding_window": 2048,
    },
    TINY: _COMMON
    | {
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_dense_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
    },
}


@dataclass(frozen=True)
class Work:
    """Floating-point operations of training on one token, in one forward and backward pass.

    Attributes:
        model: what the gradient needs: forward, the gradient of every input, the gradient of every adapter weight.
        executed: the same, and the layers' whole forward once more where they are checkpointed. That is what stock
            layers execute; fused ones leave some of it out.
    """

    model: float
    executed: float


def shape_config(shape: str, layers: int | None = None) -> Any:
    """The configuration of `shape`, cut to its first `layers` layers when a number is given."""
    from transformers import AfmoeConfig

    values = dict(SHAPES[shape])
    if layers is not None:
        values |= {"num_hidden_layers": layers, "num_dense_layers": min(values["num_dense_layers"], layers)}
    return AfmoeConfig(**values)


def empty_model(shape: str, layers: int | None, dtype: torch.dtype) -> Any:
    """The stock model of a shape without memory for its weights.

    Raises:
        AssertionError: this version of transformers makes a model of another size.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape_config(shape, layers), dtype=dtype, attn_implementation="sdpa")
    count = sum(parameter.numel() for parameter in model.parameters())
    if layers is None and count != PARAMETERS.get(shape, count):
        raise AssertionError(f"{shape} has {count:,} parameters here, where it should have {PARAMETERS[shape]:,}.")
    return model


def packed_model(shape: str, layers: int | None, settings: ModelSettings, device: str, seed: int = 0) -> Any:
    """The model that `load_model_and_tokenizer` would give, with random weights packed directly on `device`.

    Args:
        shape: a key of `SHAPES`.
        layers: only so many layers; None: all.
        settings: the preset's model section: data type, double quantisation, compute type.
        device: "cpu", "cuda" or "cuda:N".
        seed: of the weights.
    """
    import torch

    from triton_sft_pipeline.training.experts.module import PackedExperts
    from triton_sft_pipeline.training.experts.quantizer import PackedExpertsConfig, PackedExpertsQuantizer, register
    from triton_sft_pipeline.training.model import NOT_QUANTISED

    register()
    dtype = getattr(torch, settings.compute_dtype)
    config = PackedExpertsConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.quant_type,
        bnb_4bit_use_double_quant=settings.double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(NOT_QUANTISED),
    )
    model = empty_model(shape, layers, dtype)
    quantizer = PackedExpertsQuantizer(config, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": device})
    generator = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        if isinstance(module, PackedExperts):
            module.fill_random(generator, STD)
    return finished(model, quantizer, generator)


def finished(model: Any, quantizer: Any, generator: torch.Generator) -> Any:
    """Give a converted model weights wherever it has none, and the marks that loading leaves on it.

    Linear layers are quantised one by one by bitsandbytes; the rest is random, norms are one, biases zero.
    """
    from triton_sft_pipeline.training.model import _keep_cpu_weights_unpacked

    device = generator.device
    fill_linears(model, generator)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            _replace(model, name, _random(name, parameter, generator))
    # Its frequencies are computed when it is made; they are in no checkpoint.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    _keep_cpu_weights_unpacked(model)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise AssertionError(f"{len(left)} tensors were given no weights, the first is {left[0]}.")
    return model.eval()


def fill_linears(model: Any, generator: torch.Generator) -> None:
    """Give every empty 4-bit linear layer random weights. One of them at a time exists as floats."""
    import bitsandbytes as bnb
    import torch

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit) and module.weight.is_meta:
            empty = module.weight
            weight = torch.empty(
                (module.out_features, module.in_features), dtype=module.compute_dtype, device=generator.device
            ).normal_(0.0, STD, generator=generator)
            module.weight = bnb.nn.Params4bit(
                weight,
                requires_grad=False,
                compress_statistics=empty.compress_statistics,
                quant_type=empty.quant_type,
                quant_storage=empty.quant_storage,
                module=module,
            ).to(generator.device)


def _random(name: str, parameter: Any, generator: torch.Generator) -> Any:
    import torch

    made = torch.empty(parameter.shape, dtype=parameter.dtype, device=generator.device)
    if name.endswith("norm.weight"):
        made.fill_(1.0)
    elif name.endswith("bias"):
        made.zero_()
    else:
        made.normal_(0.0, STD, generator=generator)
    return torch.nn.Parameter(made, requires_grad=parameter.requires_grad)


def _replace(model: Any, name: str, parameter: Any) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter)


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 16 words: the trainer asks for one, for its end and padding tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"<{number}>": number for number in range(16)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<0>")),
        bos_token="<0>",
        eos_token="<3>",
        pad_token="<12>",
    )


def random_rows(count: int, length: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Token ids without any order: nothing can be learned, every token goes its own way through the experts."""
    import numpy as np

    drawn: list[list[int]] = np.random.default_rng(seed).integers(16, vocabulary, (count, length)).tolist()
    return drawn


def learnable_rows(count: int, length: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Walks among 64 token ids with four ways on from each: a loss that falls shows whether gradients are right."""
    import numpy as np

    generator = np.random.default_rng(seed)
    ids = generator.choice(np.arange(16, vocabulary), 64, replace=False)
    ways = generator.integers(0, 64, (64, 4))
    state = generator.integers(0, 64, count)
    rows = np.empty((count, length), dtype=np.int64)
    for position in range(length):
        rows[:, position] = ids[state]
        state = ways[state, generator.integers(0, 4, count)]
    walked: list[list[int]] = rows.tolist()
    return walked


def work_a_token(config: Any, lora: LoraSettings, length: int, labelled: float, checkpointing: bool) -> Work:
    """Floating-point operations of training on one token of a sequence, by counting multiplications in the shape.

    With W the frozen weights that a token meets in linear layers, router and its k experts, V the head's share for
    labelled tokens, L the adapter weights it meets and A = 4 * heads * head_dim * (mean number of tokens seen), summed
    over layers: model = 4 (W + V) + 6 L + 3 A (two a weight forward, two for the gradient of the input, and two for
    the adapter's own gradient; attention's backward is twice its forward). Recomputation adds 2 W + 2 L + A.

    Args:
        config: the model's configuration.
        lora: rank on linear layers and on experts; an adapter is counted on all seven projections.
        length: tokens of the sequence.
        labelled: share of tokens that the loss looks at, 0 to 1.
        checkpointing: whether layers are computed twice.
    """
    layers, hidden = config.num_hidden_layers, config.hidden_size
    dense = min(config.num_dense_layers, layers)
    width, narrow = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shared = config.moe_intermediate_size * config.num_shared_experts
    # (inputs, outputs) of every linear layer of one kind of layer; q, k, v, gate and o first.
    attention = [(hidden, width), (hidden, narrow), (hidden, narrow), (hidden, width), (width, hidden)]
    linears = [*attention * layers, *_mlp(hidden, config.intermediate_size) * dense]
    linears += _mlp(hidden, shared) * (layers - dense)
    chosen = (layers - dense) * config.num_experts_per_tok
    experts = [(hidden, 2 * config.moe_intermediate_size), (config.moe_intermediate_size, hidden)]
    weights = sum(inputs * outputs for inputs, outputs in linears)
    weights += chosen * sum(inputs * outputs for inputs, outputs in experts)
    weights += (layers - dense) * hidden * config.num_experts
    adapter = lora.r * sum(inputs + outputs for inputs, outputs in linears)
    adapter += (lora.expert_r or lora.r) * chosen * sum(inputs + outputs for inputs, outputs in experts)
    seen = sum(_mean_seen(length, None if "full" in kind else config.sliding_window) for kind in config.layer_types)
    scores = 4 * width * seen
    head = labelled * hidden * config.vocab_size
    model = 4 * (weights + head) + 6 * adapter + 3 * scores
    return Work(model, model + (2 * weights + 2 * adapter + scores if checkpointing else 0))


def _mlp(hidden: int, inner: int) -> list[tuple[int, int]]:
    return [(hidden, inner), (hidden, inner), (inner, hidden)]


def _mean_seen(length: int, window: int | None) -> float:
    """How many tokens one looks at, itself included, averaged over a sequence."""
    full = min(length, window or length)
    return (full * (full + 1) / 2 + (length - full) * full) / length
