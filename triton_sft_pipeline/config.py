"""One frozen configuration: a preset that ships with the package, then one optional YAML file, then overrides.

Each room declares its own settings; this file only puts them together, resolves names to places, and says for each
asset which part of it matters (`code_versions`), so that a changed setting makes stale what depends on it and nothing
else.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from triton_sft_pipeline.chat.prompt import PROMPT_VERSION
from triton_sft_pipeline.chat.settings import DatasetSettings
from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.evaluation.settings import EvaluationSettings
from triton_sft_pipeline.files import hash_json, sha256_file
from triton_sft_pipeline.problems import Problem, fingerprint, hash_problems
from triton_sft_pipeline.problems.reading import ProblemSet, every_problem, read_problems
from triton_sft_pipeline.storage import Artifact
from triton_sft_pipeline.traces.settings import FilterSettings
from triton_sft_pipeline.traces.sources import is_remote
from triton_sft_pipeline.training.merge import MergeSettings
from triton_sft_pipeline.training.settings import LoraSettings, ModelSettings, TrainingSettings
from triton_sft_pipeline.verification import JUDGE_VERSION

DEFAULT_PRESET = "tiny"

STEP_VERSIONS = {
    "filtered_traces": "2",
    "chat_dataset": "1",
    "lora_adapter": "2",
    "merged_model": "1",
    "evaluation_report": "3",
}
"""Raised by whoever changes what a step makes out of the same input."""

_BOOKKEEPING = frozenset(
    {"eval_steps", "gpus", "logging_steps", "report_to_wandb", "run_name", "save_steps", "save_total_limit"}
)
"""Training settings that decide what is written down and when, not what is learned: changing one makes nothing stale.
"""

_PACKAGE = Path(__file__).resolve().parent
_SMALL = 16 * 2**20
_TOKENIZER_FILES = ("*token*", "chat_template*", "vocab*", "merges*", "*.model")


class Config(BaseModel):
    """Everything that a run depends on beside its traces."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: str = Field(description="Name of the preset that the rest was built on.")
    held_out: Path = Field(description="Held-out problems: a folder of KernelBench-format files, or a .jsonl file.")
    note: str = Field("", description="What a reader of the report must know about this preset's base model.")
    filter: FilterSettings = FilterSettings()
    dataset: DatasetSettings = DatasetSettings()
    model: ModelSettings = ModelSettings()
    lora: LoraSettings = LoraSettings()
    training: TrainingSettings = TrainingSettings()
    merge: MergeSettings = MergeSettings()
    evaluation: EvaluationSettings = EvaluationSettings()


def load_config(
    preset: str | None = None,
    file: Path | str | None = None,
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Config:
    """The configuration in force.

    Args:
        preset: a shipped preset's name; default TRITON_SFT_PRESET, else the file's `preset`, else "tiny".
        file: YAML with any of the sections; default TRITON_SFT_CONFIG, else none.
        overrides: dotted names to values, such as {"training.learning_rate": 1e-4}; they win over everything else.

    Raises:
        PipelineError: an unknown preset, section or field, or a value out of range, with the file and the field named.
    """
    file = file or environ.get("TRITON_SFT_CONFIG") or None
    user = _read_yaml(Path(file)) if file else {}
    name = preset or environ.get("TRITON_SFT_PRESET") or user.pop("preset", None) or DEFAULT_PRESET
    user.pop("preset", None)
    values = _merge(_read_preset(str(name)), user)
    for dotted, value in (overrides or {}).items():
        if dotted == "preset":
            raise PipelineError(
                f"preset: an override cannot change what it is put on; use --preset {value} or TRITON_SFT_PRESET."
            )
        values = _merge(values, _nested(dotted, value))
    values["preset"] = name
    base = Path(file).resolve().parent if file else Path.cwd()
    return _resolved(_validated(values, _origin(file, overrides)), base)


def preset_names() -> list[str]:
    """The presets that ship with the package."""
    return sorted(p.stem for p in (_PACKAGE / "presets").glob("*.yaml"))


def parse_overrides(pairs: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """`training.epochs=2` pairs from a command line as {dotted name: YAML value}.

    Raises:
        PipelineError: a pair without `=`, or a value that is no YAML.
    """
    overrides = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator or not name.strip():
            raise PipelineError(f"--set {pair}: expected section.field=value, for example training.learning_rate=1e-4.")
        overrides[name.strip()] = _scalar(text, f"--set {pair}")
    return overrides


def data_dir() -> Path:
    """What ships: in a checkout the folder `data`, in an installed wheel the copy inside the package. Read only."""
    installed = _PACKAGE / "_data"
    return installed if installed.is_dir() else _PACKAGE.parent / "data"


def storage_root(environ: Mapping[str, str] = os.environ) -> Path:
    """What runs make: TRITON_SFT_HOME, else `storage` of the checkout, else `storage` of the current directory."""
    if home := environ.get("TRITON_SFT_HOME"):
        return Path(home).expanduser().absolute()
    checkout = _PACKAGE.parent
    return (checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()) / "storage"


TRACES_SETTING = "TRITON_SFT_TRACES"


def traces_location(environ: Mapping[str, str] = os.environ) -> str | Path:
    """Where the raw traces are: TRITON_SFT_TRACES, else the shipped sample. A dataset of the Hub, or several places, as
    it was written (see `traces.sources.resolve`).
    """
    named = environ.get(TRACES_SETTING)
    if not named:
        return data_dir() / "reasoning_traces.json"
    return named if is_remote(named) or os.pathsep in named else Path(named).expanduser().absolute()


def held_out_set(config: Config) -> ProblemSet:
    """The held-out problems that are asked, of the levels that `evaluation.levels` names, and those that cannot be.

    Raises:
        PipelineError: there are none where the configuration says.
    """
    return read_problems(config.held_out, config.evaluation.levels)


def held_out_problems(config: Config) -> list[Problem]:
    """The problems that nothing may be trained on: every one that is held out, whether or not its level is asked.

    Raises:
        PipelineError: there are none where the configuration says.
    """
    return every_problem(config.held_out)


def held_out_fingerprints(config: Config) -> dict[str, str]:
    """Fingerprint -> name of the held-out problems."""
    return {fingerprint(p.pytorch_code): p.key for p in held_out_problems(config)}


def dependencies(config: Config) -> dict[str, dict[str, Any]]:
    """For each asset that this configuration makes, what it depends on beyond its inputs, in words that a person can
    compare.
    """
    asked = held_out_set(config)
    held_out = hash_problems(held_out_problems(config))
    base = base_model_version(config.model.base_model, config.model.revision)
    dumped = config.model_dump(mode="json")
    # Where the base lies is no part of what it is: its content is, and that is hashed on its own.
    model = {k: v for k, v in dumped["model"].items() if k not in ("base_model", "revision")}
    training = {k: v for k, v in dumped["training"].items() if k not in _BOOKKEEPING}
    return {
        "filtered_traces": {"filter": dumped["filter"], "held_out": held_out},
        "chat_dataset": {
            "dataset": dumped["dataset"],
            "max_length": config.training.max_length,
            "prompt": PROMPT_VERSION,
            "tokenizer": tokenizer_version(config.model.base_model, config.model.revision),
            "held_out": held_out,
        },
        "lora_adapter": {"base": base, "model": model, "lora": dumped["lora"], "training": training},
        **({"merged_model": {"base": base}} if config.merge.enabled else {}),
        "evaluation_report": {
            "base": base,
            "model": model,
            "evaluation": dumped["evaluation"],
            "prompt": PROMPT_VERSION,
            "held_out": hash_problems(asked.problems),
            "unusable": sorted(item.key for item in asked.unusable),
            "judge": JUDGE_VERSION,
            "note": config.note,
        },
    }


def code_versions(config: Config) -> dict[str, str]:
    """Asset key -> code version: the step's own version and the hash of what it depends on beyond its inputs."""
    return {key: f"{STEP_VERSIONS[key]}-{hash_json(parts)[:12]}" for key, parts in dependencies(config).items()}


def base_model_version(base_model: str, revision: str | None = None) -> str:
    """A hash of a base model on disk, or the name and revision of one on the hub.

    Files over 16 MiB count by name, size and modification time: hashing 52 GB at every start would cost minutes.
    """
    directory = Path(base_model)
    if not directory.is_dir():
        return f"{base_model}@{revision or 'main'}"
    return _tree_version(directory.as_posix(), _stamps(directory, "*"))


def tokenizer_version(base_model: str, revision: str | None = None) -> str:
    """Like `base_model_version`, of the files that decide how text becomes tokens."""
    directory = Path(base_model)
    if not directory.is_dir():
        return f"{base_model}@{revision or 'main'}"
    stamps = {stamp for pattern in _TOKENIZER_FILES for stamp in _stamps(directory, pattern)}
    return _tree_version(directory.as_posix(), tuple(sorted(stamps)))


def _stamps(directory: Path, pattern: str) -> tuple[tuple[str, int, int], ...]:
    files = sorted(p for p in directory.glob(pattern) if p.is_file() and not p.name.startswith("."))
    return tuple((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files)


@cache
def _tree_version(directory: str, stamps: tuple[tuple[str, int, int], ...]) -> str:
    parts = [[n, size, sha256_file(Path(directory, n)) if size <= _SMALL else time] for n, size, time in stamps]
    return hash_json(parts)


def recorded_config(artifact: Artifact) -> Config:
    """The configuration that an adapter was trained with.

    Raises:
        PipelineError: it was recorded by a version of this project that had other settings.
    """
    try:
        return Config.model_validate(artifact.record["configuration"])
    except (KeyError, ValidationError) as error:
        raise PipelineError(
            f"{artifact.path}: made by another version of this project; its settings cannot be read. "
            f"Materialise {artifact.key} again."
        ) from error


def _read_preset(name: str) -> dict[str, Any]:
    path = _PACKAGE / "presets" / f"{name}.yaml"
    if name not in preset_names():
        known = ", ".join(preset_names())
        raise PipelineError(f"unknown preset {name!r}. The presets are: {known}.")
    return _read_yaml(path)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_loader())
    except (OSError, UnicodeDecodeError) as error:
        raise PipelineError(f"{path}: the configuration file cannot be read ({error}).") from error
    # ValueError: PyYAML takes 2020-13-45 for a date.
    except (yaml.YAMLError, ValueError) as error:
        raise PipelineError(f"{path}: not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise PipelineError(f"{path}: expected sections such as `training:`, found {type(values).__name__}.")
    return values


@cache
def _loader() -> type[yaml.SafeLoader]:
    """PyYAML reads `2e-4` as text, because YAML 1.1 wants a dot; everybody writes learning rates like that."""

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789."))
    return Loader


def _scalar(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_loader())
    except (yaml.YAMLError, ValueError) as error:
        raise PipelineError(f"{where}: the value is not valid YAML.") from error


def _nested(dotted: str, value: Any) -> dict[str, Any]:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if value is None and isinstance(merged.get(key), Mapping):
            continue  # A section whose every line is commented out.
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _validated(values: dict[str, Any], origin: str) -> Config:
    values = {"held_out": data_dir() / "held_out"} | {k: {} if v is None else v for k, v in values.items()}
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise PipelineError("\n".join(f"{origin}: {_sentence(item)}" for item in error.errors())) from None


def _sentence(error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] != "extra_forbidden":
        return f"{place}: {error['msg'].removeprefix('Value error, ').lower()} (found {error['input']!r})."
    *sections, field = error["loc"]
    known = _fields_of(sections)
    close = difflib.get_close_matches(str(field), known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}."
    return f"{place}: unknown field; {hint}"


def _fields_of(sections: list[Any]) -> list[str]:
    model: Any = Config
    for section in sections:
        model = model.model_fields[section].annotation
    return sorted(model.model_fields)


def _origin(file: Path | str | None, overrides: Mapping[str, Any] | None) -> str:
    if overrides:
        return f"{file or 'configuration'} with overrides"
    return str(file or "configuration")


def _resolved(config: Config, base: Path) -> Config:
    held_out = config.held_out if config.held_out.is_absolute() else base / config.held_out
    name = config.model.base_model
    places = [Path(name).expanduser(), base / name, data_dir() / name]
    found = next((p.resolve() for p in places if p.is_dir()), None)
    model = config.model.model_copy(update={"base_model": str(found)}) if found else config.model
    return config.model_copy(update={"held_out": held_out, "model": model})
