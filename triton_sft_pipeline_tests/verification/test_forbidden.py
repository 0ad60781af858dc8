"""The tables of what kernel code may name."""

from __future__ import annotations

import pytest

from triton_sft_pipeline.verification import forbidden
from triton_sft_pipeline.verification.verdict import VERDICTS


def test_every_rule_gives_a_verdict_of_the_taxonomy() -> None:
    rules = [*forbidden._REFUSED, forbidden._PRIVATE, forbidden._UNLISTED, *forbidden._ATTRIBUTES.values()]
    assert {rule.verdict for rule in rules} <= VERDICTS.keys()


def test_no_entry_is_listed_twice() -> None:
    entries = [entry for rule in forbidden._REFUSED for entry in rule.entries] + [
        *forbidden._HELPERS,
        *forbidden._PARTS,
        *forbidden._NUMPY,
        *forbidden._TORCH,
        *forbidden._TRITON,
    ]
    assert sorted(entries) == sorted(set(entries))


@pytest.mark.parametrize(
    ("path", "verdict"),
    [
        ("os", None),
        ("os.cpu_count", None),
        ("os.remove", "sandbox_violation"),
        ("os.kill", "early_exit"),
        ("osmosis_that_is_not_installed.remove", None),
        ("torch.loads_of_things", None),
        ("torch.load", "sandbox_violation"),
        ("torch.load.anything.below", "sandbox_violation"),
        ("torch.nn.modules.module.Module", None),
        ("torch.nn.modules.module.register_module_forward_hook", "harness_tamper"),
        ("torch.nn.modules.conv._ConvNd", None),
        ("torch.nn._private", "harness_tamper"),
        ("torch.__version__", None),
        ("triton.language.core._anything", None),
        ("triton.language.core.os.system", "sandbox_violation"),
        ("logging.os.environ", "sandbox_violation"),
        ("contextlib._collections_abc.sys.modules", "harness_tamper"),
        ("builtins", "harness_tamper"),
        ("builtins.print", None),
        ("builtins.open.__call__", "sandbox_violation"),
        ("yaml", "forbidden_construct"),
        ("antigravity", "forbidden_construct"),
    ],
)
def test_the_longest_entry_decides_about_a_path(path: str, verdict: str | None) -> None:
    rule = forbidden.refusal_of_path(path)
    assert (rule.verdict if rule else None) == verdict


def test_a_class_may_have_a_field_that_is_refused_elsewhere_but_no_way_to_its_insides() -> None:
    assert forbidden.refusal_of_attribute("storage") and not forbidden.refusal_of_attribute("storage", is_own=True)
    assert forbidden.refusal_of_attribute("__globals__", is_own=True)


@pytest.mark.parametrize(
    ("path", "verdict"),
    [
        ("torch.backends.cudnn.benchmark", None),
        ("torch.cuda.Event", "timing_tamper"),
        ("time.time", "timing_tamper"),
        ("torch.equal", "harness_tamper"),
    ],
)
def test_a_change_is_named_by_what_it_changes(path: str, verdict: str | None) -> None:
    rule = forbidden.refusal_of_change(path)
    assert (rule.verdict if rule else None) == verdict
