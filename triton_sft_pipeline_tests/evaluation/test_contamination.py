"""What an adapter was trained on is found where it is recorded, and problems that it touches are set apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from triton_sft_pipeline.chat.dataset import write_dataset
from triton_sft_pipeline.chat.examples import ChatDataset
from triton_sft_pipeline.chat.prompt import user_message
from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.evaluation.contamination import TrainedOn, split_touched, training_problems
from triton_sft_pipeline.files import sha256_file
from triton_sft_pipeline.problems import Problem
from triton_sft_pipeline.storage import ArtifactStore
from triton_sft_pipeline_tests.chat.examples import example
from triton_sft_pipeline_tests.problems.test_likeness import NORMS, SOFTSIGN, SOFTSIGN_IN_DISGUISE

RELU = SOFTSIGN.replace("x / (1.0 + torch.abs(x))", "torch.relu(x) + 3.0")
TANH = SOFTSIGN.replace("x / (1.0 + torch.abs(x))", "torch.tanh(x)")
NEAR_NORMS = NORMS.replace("eps=1e-6", "eps=1e-3")


def dataset(folder: Path, train: dict[str, str], test: dict[str, str] | None = None, form: str = "messages") -> Path:
    """A chat dataset whose rows are asked for these modules: sample key -> PyTorch code."""
    rows = [
        example(split=split, sample_key=key, prompt=[{"role": "user", "content": user_message(code)}])
        for split, codes in (("train", train), ("test", test or {}))
        for key, code in codes.items()
    ]
    write_dataset(ChatDataset(rows, []), folder, form)  # type: ignore[arg-type]
    return folder


def store_with_adapter(root: Path, train: dict[str, str]) -> Path:
    """A store with a chat dataset and an adapter that records it; returns the adapter's directory."""
    store = ArtifactStore(root)
    with store.building("chat_dataset") as draft:
        dataset(draft.path, train)
        made = draft.promote("d", "c")
    with store.building("lora_adapter") as draft:
        (draft.path / "adapter_config.json").write_text("{}")
        return draft.promote("a", "c", record={"dataset": made.path.name}).path


def keys_of(found: TrainedOn | None) -> dict[str, str]:
    assert found is not None
    return {problem.key: problem.pytorch_code for problem in found.problems}


def problems(**codes: str) -> list[Problem]:
    return [Problem(key=key, pytorch_code=code) for key, code in codes.items()]


@pytest.mark.parametrize("form", ["messages", "prompt_completion"])
def test_the_train_split_is_what_was_trained_on_each_module_once(tmp_path: Path, form: str) -> None:
    folder = dataset(tmp_path / "d", {"a": SOFTSIGN, "b": RELU, "c": SOFTSIGN}, {"t": TANH}, form)
    found = training_problems(None, None, folder)
    assert keys_of(found) == {"a": SOFTSIGN.strip(), "b": RELU.strip()}
    assert found is not None
    assert (found.dataset, found.sha256) == (folder, sha256_file(folder / "train.parquet"))
    assert split_touched(problems(tanh=TANH), found) == (problems(tanh=TANH), [])


def test_a_version_of_the_store_records_its_dataset_also_through_links(tmp_path: Path) -> None:
    adapter = store_with_adapter(tmp_path / "store", {"old": SOFTSIGN})
    store_with_adapter(tmp_path / "store", {"new": RELU})
    assert list(keys_of(training_problems(adapter, None, None))) == ["old"]
    assert list(keys_of(training_problems(adapter.parent / "current", None, None))) == ["new"]
    (tmp_path / "link").symlink_to(adapter)
    assert list(keys_of(training_problems(tmp_path / "link", None, None))) == ["old"]


def test_an_adapter_that_was_copied_out_of_its_store_finds_its_dataset_in_the_stores_root(tmp_path: Path) -> None:
    adapter = store_with_adapter(tmp_path / "store", {"a": SOFTSIGN})
    copied = tmp_path / "elsewhere" / "adapter"
    copied.parent.mkdir()
    adapter.rename(copied)
    assert list(keys_of(training_problems(copied, tmp_path / "store", None))) == ["a"]


def test_what_train_wrote_beside_the_adapter_is_what_it_was_trained_on(tmp_path: Path) -> None:
    dataset(tmp_path / "dataset", {"a": SOFTSIGN})
    assert list(keys_of(training_problems(tmp_path, tmp_path / "store", None))) == ["a"]


def test_the_training_log_goes_before_what_lies_beside_the_adapter(tmp_path: Path) -> None:
    dataset(tmp_path / "out" / "dataset", {"stale": RELU})
    used = dataset(tmp_path / "used", {"a": SOFTSIGN})
    log = {"dataset": {"path": "../used", "train_sha256": sha256_file(used / "train.parquet")}}
    (tmp_path / "out" / "training_log.json").write_text(json.dumps(log))
    assert list(keys_of(training_problems(tmp_path / "out", None, None))) == ["a"]


def test_who_names_the_dataset_is_believed_more_than_any_record(tmp_path: Path) -> None:
    adapter = store_with_adapter(tmp_path / "store", {"recorded": RELU})
    named = dataset(tmp_path / "named", {"named": SOFTSIGN})
    assert list(keys_of(training_problems(adapter, tmp_path / "store", named))) == ["named"]


def test_nothing_is_known_of_an_adapter_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "training_log.json").write_text('{"steps": 3}')
    assert training_problems(tmp_path, tmp_path, None) is None
    assert training_problems(None, tmp_path, None) is None


def gone_from_store(root: Path) -> Path:
    adapter = store_with_adapter(root / "store", {"a": SOFTSIGN})
    (root / "store" / "chat_dataset").rename(root / "gone")
    return adapter


def damaged_manifest(root: Path) -> Path:
    (root / "artifact.json").write_text("[")
    return root


def damaged_log(root: Path) -> Path:
    (root / "training_log.json").write_text('{"dataset": {"path": 3}}')
    return root


def gone_from_disk(root: Path) -> Path:
    (root / "training_log.json").write_text('{"dataset": {"path": "/none", "train_sha256": "x"}}')
    return root


def changed_since(root: Path) -> Path:
    dataset(root / "used", {"a": SOFTSIGN})
    (root / "training_log.json").write_text('{"dataset": {"path": "used", "train_sha256": "x"}}')
    return root


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (gone_from_store, "holds no more"),
        (damaged_manifest, r"artifact\.json: damaged"),
        (damaged_log, r"training_log\.json: damaged"),
        (gone_from_disk, "/none, which is gone"),
        (changed_since, "not what the adapter was trained on any more"),
    ],
)
def test_a_record_that_leads_nowhere_is_an_error_that_says_what_to_do(
    tmp_path: Path, make: Callable[[Path], Path], said: str
) -> None:
    adapter = make(tmp_path)
    with pytest.raises(PipelineError, match=f"{said}.*--trained-on DIR"):
        training_problems(adapter, None, None)


def test_what_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="not readable as a chat dataset"):
        training_problems(None, None, tmp_path)


def test_touched_problems_are_set_apart_with_the_training_problem_and_how_alike_they_are(tmp_path: Path) -> None:
    folder = dataset(tmp_path, {"one": SOFTSIGN_IN_DISGUISE, "two": RELU, "three": NEAR_NORMS})
    asked = problems(tanh=TANH, norms=NORMS, relu=RELU + "\n# again\n", softsign=SOFTSIGN)
    clean, touched = split_touched(asked, training_problems(None, None, folder))
    assert [p.key for p in clean] == ["tanh"]
    assert [p.key for p, _ in touched] == ["norms", "relu", "softsign"]
    norms, relu, softsign = (said for _, said in touched)
    assert norms.endswith("% of it is in the training problem three") and 90 < int(norms.split("%")[0]) < 100
    assert relu == "the same module as the training problem two"
    assert softsign == "the same module as the training problem one, but for names and layout"


def test_the_nearest_training_problem_is_named_and_every_problem_that_it_touches_is_set_apart(tmp_path: Path) -> None:
    folder = dataset(tmp_path, {"near": NEAR_NORMS, "same": NORMS})
    _, touched = split_touched(problems(a=NORMS, b=NORMS), training_problems(None, None, folder))
    same = "the same module as the training problem same"
    assert [(p.key, said) for p, said in touched] == [("a", same), ("b", same)]
    _, of_near = split_touched(problems(a=NORMS), training_problems(None, None, folder), overlap=1.0)
    assert [said for _, said in of_near] == [same]


def test_without_a_record_every_problem_is_clean() -> None:
    assert split_touched(problems(a=NORMS), None) == (problems(a=NORMS), [])


def test_a_prompt_of_somebody_elses_is_read_by_its_fence(tmp_path: Path) -> None:
    turn = f"Write a kernel for:\n```python\n{NORMS}```\nas `forward`.\n```\nshort\n```"
    row = example(split="train", sample_key="own", prompt=[{"role": "user", "content": turn}])
    write_dataset(ChatDataset([row], []), tmp_path, "messages")
    _, touched = split_touched(problems(a=NORMS), training_problems(None, None, tmp_path))
    assert [said for _, said in touched] == ["the same module as the training problem own"]
