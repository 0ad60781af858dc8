"""Problems for the tests of this room."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CODE = """import torch
import torch.nn as nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()

    def forward(self, x):
        return x * 2


def get_inputs():
    raise RuntimeError("reading must not run this")
"""

LEVEL_4 = """import torch
from transformers import AutoConfig, AutoModelForCausalLM


class Model(torch.nn.Module):
    def __init__(self, model_name, config):
        super().__init__()
        self.model_name = model_name
        self.config = config
        self.model = AutoModelForCausalLM.from_pretrained(self.model_name, config=self.config)

    def forward(self, x):
        return self.model(x).logits


model_name = "owner/lm-small"
config = AutoConfig.from_pretrained(model_name)


def get_inputs():
    return [torch.randint(0, config.vocab_size, (1, 8))]


def get_init_inputs():
    return [model_name, config]
"""


def module(forward: str, init: str = "") -> str:
    """A problem whose module computes `forward` of x, y and the layers that `init` builds."""
    setup = "".join(f"        {line}\n" for line in init.splitlines())
    lines = "".join(f"        {line}\n" for line in forward.splitlines())
    return (
        "import torch\nimport torch.nn as nn\nimport torch.nn.functional as F\n\n\nclass Model(nn.Module):\n"
        f"    def __init__(self, dim=1):\n        super().__init__()\n        self.dim = dim\n{setup}\n"
        f"    def forward(self, x, y):\n{lines}\n\n"
        "def get_inputs():\n    return [torch.rand(4, 4) @ torch.rand(4, 4), torch.rand(4)]\n"
    )


def kernelbench_row(level: int, number: int, name: str, code: str = CODE) -> dict[str, Any]:
    """A row as KernelBench's dataset has it."""
    return {"code": code, "level": level, "name": f"{number}_{name}", "problem_id": number}


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_sources(folder: Path, *names: str, code: str = CODE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{name}.py").write_text(code, encoding="utf-8")
    return folder


def cached(cache: Path, repo: str, *files: str, kind: str = "models", content: bytes = b"{}") -> Path:
    """Lay files into a Hub cache as its client does; returns the folder of the snapshot."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = cache / f"{kind}--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text(commit)
    for name in files:
        file = root / "snapshots" / commit / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return root / "snapshots" / commit
