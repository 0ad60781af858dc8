"""Whether the adapter on disk is the one that was trained: the loss on one sample, before saving and after loading.

Knows nothing of the trainer. The sample travels as token ids inside the training log, so the comparison needs neither
data nor tokenizer.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.files import read_json
from triton_sft_pipeline.training.settings import ModelSettings

LOG_FILE = "training_log.json"
PROBE_TOKENS = 512
"""Enough to involve every layer, and cheap on a large model."""

TOLERANCE = 0.02
"""Loss. On a CPU both are equal to the bit. A GPU sums over experts in no fixed order, and a token between two experts
may then go to the other one: 0.002 was seen on an H200. An adapter that did not load is off by tenths at least.
"""


@dataclass(frozen=True)
class Reloaded:
    """The probe's loss in nats a token, as training ended with it and as it is after loading from disk."""

    recorded: float
    reloaded: float

    @property
    def agrees(self) -> bool:
        return abs(self.recorded - self.reloaded) <= TOLERANCE


def probe_loss(model: Any, input_ids: list[int]) -> float:
    """Mean negative log-likelihood (nats a token) of the first `PROBE_TOKENS` of `input_ids`, in evaluation mode."""
    import torch

    tokens = torch.tensor([input_ids[:PROBE_TOKENS]], device=model.device)
    training = model.training
    model.eval()
    with torch.no_grad():
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    model.train(training)
    return float(loss)


def reload_adapter(adapter_dir: Path, settings: ModelSettings) -> Reloaded:
    """Load the base model and the adapter from disk, as inference will, and compare the probe's loss with the recorded
    one.

    Raises:
        PipelineError: the directory holds no training log, or the adapter does not load.
    """
    import torch

    from triton_sft_pipeline.training.model import load_model_and_tokenizer

    path = Path(adapter_dir) / LOG_FILE
    if not path.is_file():
        raise PipelineError(
            f"{path} is missing: this project's training did not write the directory, so there is nothing to "
            "compare with."
        )
    probe = read_json(path)["probe"]
    model, _ = load_model_and_tokenizer(settings, adapter=Path(adapter_dir))
    reloaded = probe_loss(model, probe["input_ids"])
    # A second model in memory is more than many GPUs hold: it goes before the caller loads the next one.
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return Reloaded(recorded=probe["loss"], reloaded=reloaded)
