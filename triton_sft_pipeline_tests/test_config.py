"""One configuration out of preset, file and overrides; code versions that change for what they depend on alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from triton_sft_pipeline import config as config_module
from triton_sft_pipeline.config import (
    Config,
    base_model_version,
    code_versions,
    dependencies,
    held_out_fingerprints,
    held_out_problems,
    held_out_set,
    load_config,
    parse_overrides,
    preset_names,
    storage_root,
    tokenizer_version,
    traces_location,
)
from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.files import atomic_write_text
from triton_sft_pipeline.problems import fingerprint
from triton_sft_pipeline_tests.traces.records import MODULE

TINY = "model:\n  base_model: base\ntraining:\n  max_length: 640\n  epochs: 5\n"
BIG = "model:\n  base_model: somebody/big\n"


@pytest.fixture(autouse=True)
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of two presets, with held-out problems and a base model beside it."""
    atomic_write_text(tmp_path / "package" / "presets" / "tiny.yaml", TINY)
    atomic_write_text(tmp_path / "package" / "presets" / "big.yaml", BIG)
    atomic_write_text(tmp_path / "data" / "held_out" / "one.py", MODULE.format(expression="x + 1"))
    for name, text in {
        "model.safetensors": "weights",
        "config.json": "{}",
        "tokenizer.json": "{}",
        "chat_template.jinja": "t",
    }.items():
        atomic_write_text(tmp_path / "data" / "base" / name, text)
    monkeypatch.setattr(config_module, "_PACKAGE", tmp_path / "package")
    return tmp_path


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_the_default_is_the_tiny_preset_on_what_ships(house: Path) -> None:
    config = load_config()
    assert config.preset == "tiny" and config.training.max_length == 640 and config.training.epochs == 5
    assert config.held_out == house / "data" / "held_out"
    assert config.model.base_model == str(house / "data" / "base")
    assert config.training.learning_rate == 2e-4 and config.lora.r == 64


def test_a_file_wins_over_the_preset_and_overrides_over_both(house: Path) -> None:
    file = written(house / "mine.yaml", "training: {epochs: 7, learning_rate: 1.0e-3}\nfilter: {min_traces: 3}\n")
    config = load_config(file=file, overrides={"training.learning_rate": 5e-4})
    assert (config.training.max_length, config.training.epochs, config.training.learning_rate) == (640, 7, 5e-4)
    assert config.filter.min_traces == 3


def test_the_preset_is_named_by_argument_then_environment_then_file(house: Path) -> None:
    file = written(house / "mine.yaml", "preset: big\n")
    assert load_config(file=file).preset == "big"
    assert load_config(file=file, environ={"TRITON_SFT_PRESET": "tiny"}).preset == "tiny"
    assert load_config("big", file=file, environ={"TRITON_SFT_PRESET": "tiny"}).preset == "big"
    assert load_config(environ={"TRITON_SFT_PRESET": "", "TRITON_SFT_CONFIG": ""}).preset == "tiny"


def test_the_file_is_named_by_argument_or_environment(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = written(house / "one.yaml", "lora: {r: 1}\n")
    two = written(house / "two.yaml", "lora: {r: 2}\n")
    monkeypatch.setenv("TRITON_SFT_CONFIG", str(one))
    assert load_config().lora.r == 1
    assert load_config(file=str(two)).lora.r == 2


@pytest.mark.parametrize("text", ["", "# nothing\n", "training:\n  # epochs: 2\n", "lora:\n", "preset:\n"])
def test_an_empty_file_or_section_changes_nothing(house: Path, text: str) -> None:
    assert load_config(file=written(house / "mine.yaml", text)) == load_config()


@pytest.mark.parametrize("number", ["2e-4", "2E-4", "2.0e-4", "0.0002", ".2e-3", "+2e-4"])
def test_learning_rates_are_numbers_however_they_are_written(house: Path, number: str) -> None:
    assert (
        load_config(file=written(house / "mine.yaml", f"training:\n  learning_rate: {number}\n")).training.learning_rate
        == 2e-4
    )
    assert load_config(overrides=parse_overrides([f"training.learning_rate={number}"])).training.learning_rate == 2e-4


def test_text_that_looks_like_a_number_stays_text_when_it_is_quoted(house: Path) -> None:
    assert load_config(file=written(house / "mine.yaml", 'model: {revision: "12e4"}\n')).model.revision == "12e4"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"training.learning_rat": 1}, "training.learning_rat: unknown field; did you mean learning_rate?"),
        ({"trainng.epochs": 1}, "trainng: unknown field; did you mean training?"),
        ({"training.x": 1}, "training.x: unknown field; known: "),
        ({"training.epochs.x": 1}, "training.epochs: input should be a valid number (found {'x': 1})."),
        ({"training": 5}, "training: input should be a valid dictionary"),
        ({"training.epochs": "many"}, "training.epochs: input should be a valid number"),
        ({"training.epochs": 0}, "training.epochs: input should be greater than 0 (found 0)."),
        ({"training.epochs": None}, "training.epochs: input should be a valid number (found None)."),
        ({"dataset.over_budget": "cut"}, "dataset.over_budget: input should be 'drop' or 'fail' (found 'cut')."),
        ({"filter.min_traces": 2.5}, "filter.min_traces: input should be a valid integer"),
        ({"preset": "big"}, "preset: an override cannot change what it is put on; use --preset big"),
    ],
)
def test_a_wrong_override_is_refused_with_its_name_and_the_nearest_one(overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(PipelineError) as caught:
        load_config(overrides=overrides)
    assert said in str(caught.value)


def test_every_mistake_in_a_file_is_told_with_the_file(house: Path) -> None:
    file = written(house / "mine.yaml", "training: {epoch: 1}\nlora: {r: 0}\nmodle: {}\n")
    with pytest.raises(PipelineError) as caught:
        load_config(file=file)
    lines = str(caught.value).split("\n")
    assert len(lines) == 3 and all(line.startswith(f"{file}: ") for line in lines)
    assert f"{file}: training.epoch: unknown field; did you mean epochs?" in lines


@pytest.mark.parametrize("name", ["tinny", "../presets/tiny", "tiny.yaml", "5"])
def test_an_unknown_preset_is_refused_with_those_that_there_are(name: str) -> None:
    with pytest.raises(PipelineError, match=r"unknown preset .*\. The presets are: big, tiny\."):
        load_config(name)
    with pytest.raises(PipelineError, match="unknown preset"):
        load_config(environ={"TRITON_SFT_PRESET": name})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("training: [", "not valid YAML"),
        ("training: {run_name: 2020-13-45}", "not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("- training", "expected sections such as `training:`, found list"),
        ("training", "expected sections such as `training:`, found str"),
        ("5", "expected sections such as `training:`, found int"),
        ("1: 2", "1"),
        ("training: 5", "training: input should be a valid dictionary"),
        ("preset: nothing", "unknown preset 'nothing'"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(house: Path, text: str, said: str) -> None:
    file = written(house / "mine.yaml", text)
    with pytest.raises(PipelineError) as caught:
        load_config(file=file)
    assert said in str(caught.value)


@pytest.mark.parametrize("kind", ["missing", "a folder", "binary"])
def test_a_file_that_cannot_be_read_is_named(house: Path, kind: str) -> None:
    file = house / "mine.yaml"
    if kind == "a folder":
        file.mkdir()
    elif kind == "binary":
        file.write_bytes(b"\xff\xfe")
    with pytest.raises(PipelineError, match=r"mine\.yaml: the configuration file cannot be read"):
        load_config(file=file)


def test_pairs_from_a_command_line_become_overrides() -> None:
    pairs = [
        "training.epochs=2",
        "training.run_name=a=b",
        "filter.min_speedup=null",
        "lora.target_modules=[q_proj, k_proj]",
        "held_out=there",
    ]
    assert parse_overrides(pairs) == {
        "training.epochs": 2,
        "training.run_name": "a=b",
        "filter.min_speedup": None,
        "lora.target_modules": ["q_proj", "k_proj"],
        "held_out": "there",
    }
    assert parse_overrides(["training.epochs=1", "training.epochs=2"]) == {"training.epochs": 2}


@pytest.mark.parametrize("pair", ["training.epochs", "=2", "", "training.epochs=[1", "training.run_name=2020-13-45"])
def test_a_pair_that_is_none_is_refused(pair: str) -> None:
    with pytest.raises(PipelineError, match="--set"):
        parse_overrides([pair])


def test_the_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        load_config().training.epochs = 1  # type: ignore[misc]


def test_places_in_a_file_are_relative_to_the_file(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (house / "elsewhere" / "base").mkdir(parents=True)
    monkeypatch.chdir("/")
    file = written(house / "elsewhere" / "mine.yaml", "held_out: problems\n")
    config = load_config(file=file)
    assert config.held_out == house / "elsewhere" / "problems"
    assert config.model.base_model == str(house / "elsewhere" / "base")


def test_a_base_model_that_is_no_directory_is_a_name_on_the_hub() -> None:
    assert load_config("big").model.base_model == "somebody/big"
    assert base_model_version("somebody/big") == "somebody/big@main"
    assert tokenizer_version("somebody/big", "v2") == "somebody/big@v2"


def test_held_out_problems_are_known_by_what_they_compute() -> None:
    assert held_out_fingerprints(load_config()) == {fingerprint(MODULE.format(expression="(x + 1)")): "one"}


def test_levels_choose_what_is_asked_and_never_narrow_what_is_kept_out_of_training(house: Path) -> None:
    for level, expression in ((1, "x + 2"), (2, "x + 3")):
        atomic_write_text(house / "data" / "held_out" / f"level{level}" / "a.py", MODULE.format(expression=expression))
    config = load_config(overrides={"evaluation.levels": [1]})
    assert set(held_out_fingerprints(config).values()) == {"one", "level1/a", "level2/a"}
    assert [p.key for p in held_out_problems(config)] == ["one", "level1/a", "level2/a"]
    asked = held_out_set(config)
    assert ([p.key for p in asked.problems], asked.unusable) == (["one", "level1/a"], []), "one says no level"
    assert changed(code_versions(load_config()), code_versions(config)) == {"evaluation_report"}


def test_held_out_problems_without_levels_are_asked_whatever_levels_are_set() -> None:
    asked = held_out_set(load_config(overrides={"evaluation.levels": [3, 4]}))
    assert ([p.key for p in asked.problems], asked.unusable) == (["one"], [])


def test_held_out_problems_that_are_not_there_are_an_error_for_a_person(house: Path) -> None:
    with pytest.raises(PipelineError, match=r"There are no problems at .*nowhere"):
        code_versions(load_config(overrides={"held_out": str(house / "nowhere")}))


ALL = {"filtered_traces", "chat_dataset", "lora_adapter", "evaluation_report"}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    assert before.keys() == after.keys() == ALL
    return {key for key in before if before[key] != after[key]}


@pytest.mark.parametrize(
    ("override", "value", "stale"),
    [
        ("filter.require_fast_1", True, {"filtered_traces"}),
        ("filter.min_speedup", 1.2, {"filtered_traces"}),
        ("filter.min_traces", 3, {"filtered_traces"}),
        ("dataset.test_size", 0.2, {"chat_dataset"}),
        ("dataset.over_budget", "fail", {"chat_dataset"}),
        ("training.max_length", 512, {"chat_dataset", "lora_adapter"}),
        ("training.learning_rate", 1e-3, {"lora_adapter"}),
        ("training.seed", 7, {"lora_adapter"}),
        ("lora.r", 8, {"lora_adapter"}),
        ("lora.expert_r", 8, {"lora_adapter"}),
        ("model.load_in_4bit", False, {"lora_adapter", "evaluation_report"}),
        ("evaluation.judge_timeout_s", 30, {"evaluation_report"}),
        ("evaluation.max_new_tokens", 100, {"evaluation_report"}),
    ],
)
def test_a_setting_makes_stale_what_depends_on_it_and_nothing_else(override: str, value: Any, stale: set[str]) -> None:
    assert changed(code_versions(load_config()), code_versions(load_config(overrides={override: value}))) == stale


def test_a_setting_written_out_as_it_was_changes_nothing() -> None:
    same = {"training.learning_rate": 0.0002, "training.epochs": 5.0, "evaluation.judge_timeout_s": 60, "lora.r": 64}
    assert changed(code_versions(load_config()), code_versions(load_config(overrides=same))) == set()


@pytest.mark.parametrize("change", ["edited", "added", "renamed"])
def test_held_out_problems_make_stale_what_looks_at_them(house: Path, change: str) -> None:
    before = code_versions(load_config())
    folder = house / "data" / "held_out"
    if change == "renamed":
        (folder / "one.py").rename(folder / "uno.py")
    else:
        atomic_write_text(folder / ("one.py" if change == "edited" else "two.py"), MODULE.format(expression="x + 2"))
    assert changed(before, code_versions(load_config())) == {"filtered_traces", "chat_dataset", "evaluation_report"}


@pytest.mark.parametrize(
    ("file", "stale"),
    [
        ("model.safetensors", {"lora_adapter", "evaluation_report"}),
        ("config.json", {"lora_adapter", "evaluation_report"}),
        ("tokenizer.json", {"chat_dataset", "lora_adapter", "evaluation_report"}),
        ("chat_template.jinja", {"chat_dataset", "lora_adapter", "evaluation_report"}),
        ("vocab.json", {"chat_dataset", "lora_adapter", "evaluation_report"}),
        ("tokenizer.model", {"chat_dataset", "lora_adapter", "evaluation_report"}),
        (".cache", set()),
    ],
)
def test_a_file_of_the_base_model_makes_stale_what_reads_it(house: Path, file: str, stale: set[str]) -> None:
    before = code_versions(load_config())
    atomic_write_text(house / "data" / "base" / file, "changed")
    assert changed(before, code_versions(load_config())) == stale


def test_moving_and_touching_the_base_model_changes_nothing(house: Path) -> None:
    before = code_versions(load_config())
    moved = house / "models" / "tiny"
    moved.parent.mkdir()
    (house / "data" / "base").rename(moved)
    for file in moved.iterdir():
        os.utime(file, (1, 1))
    assert changed(before, code_versions(load_config(overrides={"model.base_model": str(moved)}))) == set()


def test_where_the_held_out_problems_lie_changes_nothing(house: Path) -> None:
    before = code_versions(load_config())
    (house / "data" / "held_out").rename(house / "problems")
    assert changed(before, code_versions(load_config(overrides={"held_out": str(house / "problems")}))) == set()


@pytest.mark.parametrize(
    ("name", "stale"),
    [("PROMPT_VERSION", {"chat_dataset", "evaluation_report"}), ("JUDGE_VERSION", {"evaluation_report"})],
)
def test_another_prompt_or_judge_makes_stale_what_used_it(
    monkeypatch: pytest.MonkeyPatch, name: str, stale: set[str]
) -> None:
    before = code_versions(load_config())
    monkeypatch.setattr(config_module, name, "other")
    assert changed(before, code_versions(load_config())) == stale


@pytest.mark.parametrize("key", sorted(ALL))
def test_a_step_that_works_otherwise_is_stale_itself(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    before = code_versions(load_config())
    monkeypatch.setitem(config_module.STEP_VERSIONS, key, "other")
    assert changed(before, code_versions(load_config())) == {key}


def test_large_files_of_a_base_model_count_by_size_and_time(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "_SMALL", 3)
    base = house / "data" / "base"
    before = base_model_version(str(base))
    os.utime(base / "model.safetensors", (1, 1))
    assert base_model_version(str(base)) != before


def test_dependencies_can_be_told_and_stored() -> None:
    parts = dependencies(load_config())
    assert parts.keys() == ALL
    assert parts["filtered_traces"]["filter"]["min_traces"] == 10
    assert "base_model" not in parts["lora_adapter"]["model"]


def test_a_dumped_configuration_is_read_back_as_it_was() -> None:
    config = load_config(overrides={"lora.target_modules": ["q_proj"]})
    assert Config.model_validate(config.model_dump(mode="json")) == config


def test_storage_and_traces_are_where_the_environment_says(house: Path) -> None:
    environ = {"TRITON_SFT_HOME": "~/runs", "TRITON_SFT_TRACES": "relative.json"}
    assert storage_root(environ) == Path.home() / "runs"
    assert traces_location(environ) == Path.cwd() / "relative.json"
    assert storage_root({}) == Path.cwd() / "storage"
    (house / "pyproject.toml").touch()
    assert storage_root({}) == house / "storage"
    assert traces_location({}) == house / "data" / "reasoning_traces.json"


@pytest.mark.parametrize("named", ["hf://owner/name@main/traces", "a.json:b/*.jsonl", "hf://owner/name:local.json"])
def test_a_dataset_of_the_hub_and_several_places_stay_as_they_were_written(named: str) -> None:
    assert traces_location({"TRITON_SFT_TRACES": named}) == named


def test_every_preset_that_ships_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "_PACKAGE", Path(config_module.__file__).parent)
    assert "tiny" in preset_names()
    for name in preset_names():
        assert load_config(name).preset == name
