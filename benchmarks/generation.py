"""How much faster answers are generated in batches than one prompt at a time.

    python benchmarks/generation.py [--preset tiny] [--sizes 1,4,16,64] [--device auto|cpu|cuda] [--samples 1]
        [--max-new-tokens 200] [--temperature T] [--library] [--json FILE]

Asks the preset's base model for a kernel to each problem of the sample's correct traces at several batch sizes, with
`evaluation.generation.generate` as an evaluation does. A row leaves its batch at its end, so the batches shrink as in a
real evaluation. Every size has a short warm-up. Greedy answers must be the same at every size; how many are not is said
(products are rounded in another way in a batch of another size, and in bfloat16 that is seen).

--library measures transformers' own `generate` beside it, greedy, in the same batches and with the same stop at
`</triton>` (which it can only decide for itself when the last row has ended).
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

SIZES = (1, 4, 16, 64)
WANTED = 5.0
"""Times the speed of one prompt at a time that batches must reach on the tiny model."""


def sample_prompts() -> list[str]:
    """The user message of each problem of the sample traces that are labelled correct."""
    from triton_sft_pipeline.chat.prompt import user_message
    from triton_sft_pipeline.config import data_dir
    from triton_sft_pipeline.files import read_json

    records = read_json(data_dir() / "reasoning_traces.json")
    correct = [record for record in records if (record.get("result") or {}).get("correctness") is True]
    return [user_message(code) for code in dict.fromkeys(record["pytorch_code"] for record in correct)]


def measure(
    model: Any, tokenizer: Any, prompts: Sequence[str], settings: Any, library: bool
) -> tuple[dict[str, Any], list[str]]:
    """Seconds and tokens of one batch size, and the answers."""
    from triton_sft_pipeline.evaluation.generation import Request, generate
    from triton_sft_pipeline.evaluation.sampling import request_seed

    requests = [
        Request(index, sample, prompt, request_seed(settings.seed, str(index), sample))
        for index, prompt in enumerate(prompts)
        for sample in range(settings.samples)
    ]
    warm_up = settings.model_copy(update={"max_new_tokens": 4})
    generate(model, tokenizer, requests[: settings.batch_size], warm_up)
    answer = _library if library else generate
    began = time.perf_counter()
    completions = answer(model, tokenizer, requests, settings)
    seconds = time.perf_counter() - began
    tokens = sum(completion.tokens for completion in completions)
    measured = {
        "batch_size": settings.batch_size,
        "answers": len(completions),
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
    }
    return measured, [completion.text for completion in completions]


def _library(model: Any, tokenizer: Any, requests: Sequence[Any], settings: Any) -> list[Any]:
    """The same answers from transformers' own `generate`, in batches of the same rows."""
    import torch
    from transformers import StoppingCriteriaList

    from triton_sft_pipeline.evaluation.generation import Completion
    from triton_sft_pipeline.evaluation.stopping import StopAtTriton
    from triton_sft_pipeline.training.threads import suitable_threads

    def rendered(prompt: str) -> list[int]:
        turn = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    stop = StopAtTriton(tokenizer, thinking=True)
    rows = sorted(((rendered(r.prompt), r) for r in requests), key=lambda row: -len(row[0]))
    done = []
    for start in range(0, len(rows), settings.batch_size):
        batch = rows[start : start + settings.batch_size]
        width = max(len(tokens) for tokens, _ in batch)
        pad = tokenizer.pad_token_id
        padded = torch.tensor([[pad] * (width - len(t)) + t for t, _ in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t, _ in batch], device=model.device)

        def ended(ids: Any, scores: Any, width: int = width, **_: Any) -> Any:
            return torch.tensor([stop(row) for row in ids[:, width:].tolist()], device=ids.device)

        with torch.no_grad(), suitable_threads(model):
            written = model.generate(
                padded,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=settings.max_new_tokens,
                stopping_criteria=StoppingCriteriaList([ended]),
                pad_token_id=pad,
            )
        for (prompt, request), row in zip(batch, written[:, width:].tolist(), strict=True):
            tokens = [token for token in row if token != pad]
            text = tokenizer.decode(tokens)
            done.append(Completion(request.index, request.sample, text, len(prompt), len(tokens), "", 0.0))
    return sorted(done, key=lambda completion: (completion.index, completion.sample))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The measurements as lines of at most 80 columns."""
    head = f"{'batch size':>10} {'tokens':>8} {'seconds':>9} {'tokens/s':>10} {'speed':>8} {'other answers':>14}"
    lines = [
        f"{row['batch_size']:>10} {row['tokens']:>8} {row['seconds']:>9.2f} {row['tokens_per_second']:>10.1f} "
        f"{row['times_one']:>7.1f}x {row['other_answers']:>14}"
        for row in rows
    ]
    return "\n".join([head, *lines])


def run(
    model: Any, tokenizer: Any, prompts: Sequence[str], settings: Any, sizes: Sequence[int], library: bool
) -> list[dict[str, Any]]:
    """A row for each batch size, compared with the first."""
    rows: list[dict[str, Any]] = []
    first: list[str] = []
    for size in sizes:
        row, texts = measure(model, tokenizer, prompts, settings.model_copy(update={"batch_size": size}), library)
        first = first or texts
        row["times_one"] = round(row["tokens_per_second"] / (rows[0] if rows else row)["tokens_per_second"], 2)
        row["other_answers"] = sum(a != b for a, b in zip(first, texts, strict=True))
        rows.append(row)
        print(f"batch size {size}: {row['seconds']:.1f} s", file=sys.stderr)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--library", action="store_true", help="measure transformers' own generate too")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""

    import torch

    from triton_sft_pipeline.config import load_config
    from triton_sft_pipeline.evaluation.settings import EvaluationSettings
    from triton_sft_pipeline.training.model import load_model_and_tokenizer

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here")
    config = load_config(options.preset)
    settings = EvaluationSettings(
        samples=options.samples, max_new_tokens=options.max_new_tokens, temperature=options.temperature
    )
    model, tokenizer = load_model_and_tokenizer(config.model)
    prompts, sizes = sample_prompts(), [int(size) for size in options.sizes.split(",")]
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    report: dict[str, Any] = {
        "preset": options.preset,
        "device": device,
        "processors": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "problems": len(prompts),
        "samples": options.samples,
        "temperature": settings.resolved_temperature,
        "max_new_tokens": options.max_new_tokens,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "sizes": run(model, tokenizer, prompts, settings, sizes, library=False),
    }
    if options.library:
        report["library"] = run(model, tokenizer, prompts, settings, sizes, library=True)
    print(f"{options.preset} on {device}, {len(prompts)} problems, at most {options.max_new_tokens} tokens an answer")
    print(table(report["sizes"]))
    if options.library:
        print(f"transformers' own generate\n{table(report['library'])}")
    best = max(row["times_one"] for row in report["sizes"])
    print(f"best: {best:.1f} times one prompt at a time (wanted on the tiny model: {WANTED:g})")
    if options.json:
        from triton_sft_pipeline.files import write_json

        write_json(options.json, report)


if __name__ == "__main__":
    main()
