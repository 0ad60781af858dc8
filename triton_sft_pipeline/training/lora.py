"""The adapter: which layers get one, how it is attached, and the form in which any PEFT installation can load it.

Knows nothing of data or of the trainer. Most of this module is about mixture-of-experts models whose routed experts are
fused into 3-D parameters (`...experts.gate_up_proj`, `...experts.down_proj`; AFMoE is one). There PEFT rewrites a
config that names gate_proj, up_proj or down_proj: it points these names at the fused experts, drops every linear layer
of the same name (attention's gate, shared experts, dense MLPs) without a word, and then refuses dropout. So one adapter
has two forms here:

* the training form: PEFT wraps the linear layers and nothing else; the fused experts, in 4 bits or float, get this
  project's own adapter (`experts.adapter`), whose weights have the names and shapes that PEFT's would have. Dropout
  holds for both;
* the stock form, which is written to `adapter_config.json`: linear layers of those three names are listed as parameters
  (`gate_proj.weight`), a spelling that the rewrite leaves alone, and dropout is 0, because PEFT has none on parameters.
  Names and shapes of the weights are the same in both.

Models without fused experts take neither: PEFT does the right thing there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triton_sft_pipeline.errors import PipelineError, StepError
from triton_sft_pipeline.training.settings import LoraSettings

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

FUSED_EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Each fused expert parameter, and the projections it holds."""

REWRITTEN = frozenset(name for names in FUSED_EXPERTS.values() for name in names)
"""Target names that PEFT redirects from linear layers to fused experts."""

_ADAPTER = "default"
_PINNED = "This PEFT treats the architecture differently; use the pinned version."


def create_lora_config(settings: LoraSettings | None = None) -> LoraConfig:
    """The PEFT config with exactly `settings`; without any: r 64, alpha 128, dropout 0.05 on the seven projections."""
    from peft import LoraConfig

    settings = settings or LoraSettings()
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )
    if settings.expert_r is not None and settings.expert_r != settings.r:
        for parameter in FUSED_EXPERTS:
            key = rf"experts\.{parameter}"
            config.rank_pattern[key] = settings.expert_r
            # alpha / rank stays what it is elsewhere, so a lower rank on the experts is no higher or lower learning
            # rate.
            config.alpha_pattern[key] = settings.alpha * settings.expert_r / settings.r
    return config


def attach_lora(model: Any, config: LoraConfig) -> PeftModel:
    """Put a new adapter on `model`, on every linear layer and every fused expert that `config.target_modules` names.

    Fused experts get one adapter of rank `config.r` (or what `rank_pattern` says of `experts.gate_up_proj`) per tensor
    and expert. `config` is left as it is.

    Raises:
        PipelineError: a target names nothing in this model, or names one half of a fused pair, or the experts of this
            architecture are not known.
        StepError: PEFT attached another number of adapters than the targets call for, or none.
    """
    import copy

    from peft import get_peft_model

    config = copy.deepcopy(config)
    expected = expected_adapters(model, config)
    if not _fused_experts(model):
        return _counted(get_peft_model(model, config), expected)
    dropout, stock = config.lora_dropout, stock_form(config, model)
    config.lora_dropout = 0.0
    if on_experts := [name for name in stock.target_parameters if not name.endswith(".weight")]:
        _require_packed_experts(model)
    try:
        with _targets_left_alone(model):
            peft_model = get_peft_model(model, config)
    except (AttributeError, ValueError) as error:
        # What becomes of the rewrite when it gets past us: it points PEFT at experts that it cannot wrap.
        raise StepError(f"PEFT cannot put an adapter on {_name_of(model)} ({error}). {_PINNED}") from error
    if on_experts:
        # Imported here: experts/ is made of torch's classes.
        from triton_sft_pipeline.training.experts.adapter import wrap_experts

        config.target_parameters = on_experts
        wrap_experts(peft_model, config, _ADAPTER)
    _set_dropout(peft_model, dropout)
    # From here on the config only says what is written to disk: every checkpoint is loadable as it lies.
    peft_model.peft_config[_ADAPTER] = stock
    return _counted(peft_model, expected)


def load_adapter(model: Any, directory: Path) -> PeftModel:
    """Put a saved adapter on `model`, quantised or not, in the types it was saved in.

    Raises:
        PipelineError: no adapter there, or one that was made for another model.
    """
    from peft import PeftConfig

    directory = Path(directory)
    if not (directory / "adapter_config.json").is_file():
        raise PipelineError(
            f"{directory} holds no adapter (no adapter_config.json): name a directory that training wrote."
        )
    config: Any = PeftConfig.from_pretrained(str(directory))
    if config.target_parameters and not _fused_experts(model):
        raise PipelineError(
            f"{directory} was trained on a mixture of experts, which {_name_of(model)} is not: "
            "load it on its own base model."
        )
    config.target_modules = _named_modules_of(config)
    config.target_parameters = None
    config.inference_mode = False
    peft_model = attach_lora(model, config)
    load_adapter_weights(peft_model, directory)
    peft_model.requires_grad_(False)
    return peft_model


def load_adapter_weights(peft_model: PeftModel, directory: Path) -> None:
    """Overwrite the adapter's weights with the saved ones, bit for bit.

    PEFT's own loaders turn a bfloat16 adapter into float32, which changes every logit; here the saved type wins.

    Raises:
        PipelineError: the file is missing, or its tensors are not those of this adapter.
    """
    import torch
    from safetensors.torch import load_file

    path = Path(directory) / "adapter_model.safetensors"
    if not path.is_file():
        raise PipelineError(f"{path} is missing: the adapter is incomplete, train it again.")
    saved = load_file(str(path))
    parameters = {
        name.replace(f".{_ADAPTER}.", "."): value for name, value in peft_model.named_parameters() if ".lora_" in name
    }
    if different := sorted(saved.keys() ^ parameters.keys()):
        raise PipelineError(
            f"{path} does not fit the base model: {len(different)} adapter tensors are on one side only, the first is "
            f"{different[0]}. Load it on the base model it was trained on."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != saved[name].shape:
                raise PipelineError(
                    f"{path}: {name} is {tuple(saved[name].shape)}, the base model needs {tuple(parameter.shape)}."
                )
            if parameter.dtype == saved[name].dtype:
                # In place: an optimiser may hold the very memory.
                parameter.copy_(saved[name])
            else:
                parameter.data = saved[name].to(parameter.device)


def stock_form(config: LoraConfig, model: Any) -> LoraConfig:
    """The config to save: the one with which any PEFT, without this project, puts the same adapter on the unquantised
    base model."""
    import copy

    fused = _fused_experts(model)
    stock = copy.deepcopy(config)
    if not fused:
        return stock
    targets = _target_names(config)
    linears = {name.rsplit(".", 1)[-1] for name in _target_linears(model, targets)}
    rewritten = [name for name in targets if name in REWRITTEN]
    # PEFT has no dropout on parameters. It plays no part at inference; training_log.json keeps the value that training
    # used.
    stock.lora_dropout = 0.0
    stock.target_modules = {name for name in targets if name not in REWRITTEN}
    stock.target_parameters = [f"{name}.weight" for name in rewritten if name in linears]
    stock.target_parameters += [
        f"experts.{name}" for name in sorted({name.rsplit(".", 1)[-1] for name in _target_experts(model, targets)})
    ]
    return stock


def expected_adapters(model: Any, config: LoraConfig) -> int:
    """How many adapters `config` calls for on `model`: one a linear layer, one a fused expert tensor."""
    targets = _target_names(config)
    linears, experts = _target_linears(model, targets), _target_experts(model, targets)
    named = {name.rsplit(".", 1)[-1] for name in linears} | {
        part for name in experts for part in FUSED_EXPERTS[name.rsplit(".", 1)[-1]]
    }
    if unknown := [name for name in targets if name not in named]:
        raise PipelineError(
            f"lora.target_modules names {unknown[0]}, but {_name_of(model)} has no linear layer or expert of that name."
        )
    return len(linears) + len(experts)


def count_adapters(peft_model: Any) -> int:
    """How many layers and fused expert tensors carry an adapter."""
    from peft.tuners.lora import LoraLayer

    return sum(1 for module in peft_model.modules() if isinstance(module, LoraLayer) and _ADAPTER in module.lora_A)


def _counted(peft_model: PeftModel, expected: int) -> PeftModel:
    if (found := count_adapters(peft_model)) != expected:
        raise StepError(
            f"PEFT attached {found} adapters to {_name_of(peft_model)} where lora.target_modules calls for {expected}: "
            f"training would leave layers out. {_PINNED}"
        )
    return peft_model


def _fused_experts(model: Any) -> list[str]:
    """Names of the 3-D parameters that hold routed experts, in the order of the model."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and name.rsplit(".", 1)[-1] in FUSED_EXPERTS and ".experts." in name
    ]


def _target_names(config: LoraConfig) -> list[str]:
    if not config.target_modules or isinstance(config.target_modules, str):
        raise PipelineError(
            "lora.target_modules must be a list of projection names such as q_proj; patterns are not supported."
        )
    return sorted(config.target_modules)


def _target_linears(model: Any, targets: list[str]) -> list[str]:
    from torch import nn

    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in targets
    ]


def _target_experts(model: Any, targets: list[str]) -> list[str]:
    found = []
    for name in _fused_experts(model):
        parts = FUSED_EXPERTS[name.rsplit(".", 1)[-1]]
        chosen = [part for part in parts if part in targets]
        if chosen and len(chosen) < len(parts):
            raise PipelineError(
                f"lora.target_modules names {chosen[0]} without {' and '.join(set(parts) - set(chosen))}: "
                f"they are one tensor in {name}."
            )
        if chosen:
            found.append(name)
    return found


def _named_modules_of(config: LoraConfig) -> list[str]:
    """The projection names that a saved config of either form stands for."""
    names = set(config.target_modules or ())
    for parameter in config.target_parameters or ():
        leaf = parameter.removesuffix(".weight").rsplit(".", 1)[-1]
        names.update(FUSED_EXPERTS.get(leaf, (leaf,)) if not parameter.endswith(".weight") else (leaf,))
    return sorted(names)


def _require_packed_experts(model: Any) -> None:
    """Replace the experts modules of the architecture by this project's, where loading has not done so: they share the
    weights, and only they can have an adapter with dropout."""
    from triton_sft_pipeline.training.experts.layouts import known_layout
    from triton_sft_pipeline.training.experts.module import ExpertStorage, PackedExperts, replace_experts

    names = _fused_experts(model)
    foreign = [name for name in names if not isinstance(model.get_submodule(name.rsplit(".", 1)[0]), PackedExperts)]
    if not foreign:
        return
    layout = known_layout(model.config)
    if layout is None or not replace_experts(model, layout, ExpertStorage(compute_dtype=model.dtype)):
        raise PipelineError(
            f"{_name_of(model)} keeps its routed experts in {foreign[0]}, an architecture "
            f"({model.config.model_type}) whose experts this project cannot adapt: leave "
            f"{', '.join(sorted(REWRITTEN))} out of lora.target_modules."
        )


def _set_dropout(peft_model: PeftModel, dropout: float) -> None:
    """Give every adapter its dropout. Told in the config, PEFT would stop at a rewrite that it should not have made
    with a word about dropout, not about the layers that it drops."""
    from peft.tuners.lora import LoraLayer
    from torch import nn

    if not dropout:
        return
    for module in peft_model.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout[_ADAPTER] = nn.Dropout(p=dropout).train(module.training)


@contextmanager
def _targets_left_alone(model: Any) -> Iterator[None]:
    """Keep PEFT from rewriting the targets while an adapter is attached (its table is private; the count that follows
    tells if it moved)."""
    from peft.utils import transformers_weight_conversion as conversion

    table, model_type = conversion._MODEL_TO_CONVERSION_PATTERN, model.config.model_type
    missing = object()
    entry = table.pop(model_type, missing)
    try:
        yield
    finally:
        if entry is not missing:
            table[model_type] = entry


def _name_of(model: Any) -> str:
    return getattr(model.config, "name_or_path", "") or type(model).__name__
