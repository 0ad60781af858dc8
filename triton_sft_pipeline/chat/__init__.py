"""What a training example is: a prompt, a completion, and where they came from."""

from triton_sft_pipeline.chat.dataset import build_dataset, read_examples, write_dataset
from triton_sft_pipeline.chat.examples import ChatDataset, Example
from triton_sft_pipeline.chat.prompt import assistant_message, parse_answer, user_message
from triton_sft_pipeline.chat.settings import DatasetSettings

__all__ = [
    "ChatDataset",
    "DatasetSettings",
    "Example",
    "assistant_message",
    "build_dataset",
    "parse_answer",
    "read_examples",
    "user_message",
    "write_dataset",
]
