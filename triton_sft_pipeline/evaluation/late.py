"""A model that is loaded when it is first asked: a finished evaluation needs none to write its report again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from triton_sft_pipeline.evaluation.generation import Asker, Completion, OnTokens, Request
from triton_sft_pipeline.files import read_json

_WHO = ("base_model_version", "model_settings", "adapter_version")
"""Entries of a provenance that decide which weights are loaded, and how."""
_HERE = "in process"
"""What a model that was loaded here says of how it was asked; a server's answers are no answers of it."""


class LateAsker:
    """An `Asker` of which only the facts are known until it is asked.

    Args:
        models: who can be asked.
        facts: what the loaded model would say of itself.
        load: makes it.
    """

    def __init__(self, models: Sequence[str], facts: dict[str, Any], load: Callable[[], Asker]) -> None:
        self.models, self._facts, self._load = tuple(models), facts, load
        self._loaded: Asker | None = None

    def ask(
        self,
        model: str,
        requests: Sequence[Request],
        on_completion: Callable[[Completion], None],
        on_tokens: OnTokens | None = None,
    ) -> None:
        """See `Asker.ask`."""
        self._loaded = self._loaded or self._load()
        self._loaded.ask(model, requests, on_completion, on_tokens)

    def facts(self) -> dict[str, Any]:
        """See `Asker.facts`; those of the loaded model as soon as there is one."""
        return self._loaded.facts() if self._loaded else self._facts


def recorded_facts(directory: Path, provenance: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the asker of a finished evaluation said of itself, when the same weights would be loaded again.

    Args:
        directory: where the evaluation's report is, if there is one.
        provenance: of the evaluation that is about to begin, with `base_model_version`, `model_settings` and, with an
            adapter, `adapter_version`.

    Returns:
        None: there is no report, it is of other weights, or of a version that did not write all of this down.
    """
    try:
        recorded = read_json(directory / "report.json")["provenance"]
        same = all(recorded.get(name) == provenance.get(name) for name in _WHO)
        facts = recorded["asker"] if same and "model_settings" in recorded else {}
        return dict(facts) if facts.get("asked") == _HERE else None
    # Whatever is there instead of a report: the model is loaded and says it itself.
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
