"""What the modules of the command line share: the options that choose a configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from triton_sft_pipeline.config import Config, load_config, parse_overrides

PATH = click.Path(path_type=Path)


def configured(command: Callable[..., Any]) -> Callable[..., Any]:
    """The three options that choose a configuration."""
    command = click.option(
        "--set", "sets", multiple=True, metavar="SECTION.FIELD=VALUE", help="Override one setting; may be repeated."
    )(command)
    command = click.option(
        "--config", "config_file", type=PATH, help="YAML file of settings (default: TRITON_SFT_CONFIG)."
    )(command)
    return click.option("--preset", help="Preset to build on (default: TRITON_SFT_PRESET, else tiny).")(command)


def chosen_config(preset: str | None, config_file: Path | None, sets: tuple[str, ...]) -> Config:
    """The configuration that those options choose."""
    return load_config(preset=preset, file=config_file, overrides=parse_overrides(sets))
