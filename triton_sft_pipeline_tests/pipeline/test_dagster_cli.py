"""`dagster asset materialize` as CI runs it: one step a process, with and without a Dagster home."""

import os
from pathlib import Path

import dagster as dg
import pytest

from triton_sft_pipeline.definitions import defs
from triton_sft_pipeline.refresh import release_dead_runs
from triton_sft_pipeline.storage import CURRENT
from triton_sft_pipeline.traces import read_kept
from triton_sft_pipeline_tests.pipeline.processes import Workplace, finish, good_traces, kill_group

pytestmark = pytest.mark.slow

IN_ONE_PROCESS = ("--config-json", '{"execution": {"config": {"in_process": {}}}}')
"""Steps run in the process that was started: it costs no second start, and they are gone for good when it is. Steps in
processes of their own, which is what CI gets, are what the tests without it are about.
"""


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


def visible(workplace: Workplace, key: str) -> set[str]:
    """What a reader can find of an asset: versions, and the pointer to the current one."""
    return {path.name for path in (workplace.store.root / key).iterdir() if not path.name.startswith(".")}


def drafts(workplace: Workplace, key: str) -> list[Path]:
    return list((workplace.store.root / key).glob(".building-*"))


def test_a_step_finds_what_the_step_before_made_in_another_process_without_a_dagster_home(workplace: Workplace) -> None:
    code, said = workplace.materialise("filtered_traces", *IN_ONE_PROCESS, home=False)
    assert code == 0, said
    filtered = workplace.store.require("filtered_traces")
    code, said = workplace.materialise("chat_dataset", home=False)
    assert code == 0, said
    assert workplace.store.require("chat_dataset").inputs == {"filtered_traces": filtered.data_version}


def test_two_processes_that_filter_at_once_both_end_well_and_the_next_step_goes_on_from_there(
    workplace: Workplace,
) -> None:
    # Two processes that create a Dagster home at once can spoil it for good: its SQLite is not made for that.
    with workplace.instance() as instance:
        assert instance.get_runs_count() == 0
    processes = [workplace.start_materialising("filtered_traces", *IN_ONE_PROCESS) for _ in range(2)]
    for code, said in map(finish, processes):
        assert code == 0, said
    filtered = workplace.store.require("filtered_traces")
    assert visible(workplace, "filtered_traces") == {CURRENT, filtered.path.name}
    assert drafts(workplace, "filtered_traces") == []
    with workplace.instance() as instance:
        assert instance.get_runs_count() == 2
        workplace.make_here("chat_dataset", instance)
    assert workplace.store.require("chat_dataset").inputs == {"filtered_traces": filtered.data_version}


def test_a_step_without_its_input_says_what_to_materialise_first(workplace: Workplace) -> None:
    code, said = workplace.materialise("chat_dataset", home=False)
    assert code == 1
    assert "there is no current filtered_traces. Materialise it first" in said


def test_a_failed_gate_is_exit_code_1_names_itself_and_leaves_what_was_current(workplace: Workplace) -> None:
    workplace.make_here("filtered_traces")
    before = workplace.store.require("filtered_traces")
    workplace.write(good_traces(1))
    code, said = workplace.materialise("filtered_traces", *IN_ONE_PROCESS)
    assert code == 1
    assert "not promoted, the previous version stays. min_traces: 1 traces are kept, at least 3 are wanted." in said
    assert workplace.store.require("filtered_traces") == before
    assert drafts(workplace, "filtered_traces") == []


@pytest.mark.timeout(120)
def test_a_killed_step_leaves_nothing_that_a_reader_can_see_and_the_next_one_tidies_up(workplace: Workplace) -> None:
    workplace.make_here("filtered_traces")
    before = workplace.store.require("filtered_traces")
    workplace.traces.unlink()
    os.mkfifo(workplace.traces)
    process = workplace.start_materialising("filtered_traces", *IN_ONE_PROCESS)
    # A pipe opens for writing when somebody opens it for reading: now the step is at work, and can get no further.
    with workplace.traces.open("w"):
        (draft,) = drafts(workplace, "filtered_traces")
        kill_group(process)
    assert draft.is_dir()
    with workplace.instance() as instance:
        (run,) = instance.get_runs()
        assert run.status == dg.DagsterRunStatus.STARTED
        release_dead_runs(instance, print)
        assert instance.get_run_by_id(run.run_id).status == dg.DagsterRunStatus.FAILURE
    assert visible(workplace, "filtered_traces") == {CURRENT, before.path.name}
    assert workplace.store.require("filtered_traces") == before

    workplace.traces.unlink()
    workplace.write(good_traces(5))
    workplace.make_here("filtered_traces")
    assert drafts(workplace, "filtered_traces") == []
    assert len(read_kept(workplace.store.require("filtered_traces").path)) == 5


@pytest.mark.parametrize(
    ("selection", "selected"),
    [
        ("filtered_traces", "filtered_traces"),
        ("filtered_traces,chat_dataset", "filtered_traces chat_dataset"),
        ("chat_dataset*", "chat_dataset lora_adapter evaluation_report"),
        ('key:"chat_dataset"+', "chat_dataset lora_adapter evaluation_report"),
        ("*lora_adapter", "filtered_traces chat_dataset lora_adapter"),
        ("*", "filtered_traces chat_dataset lora_adapter evaluation_report"),
    ],
)
def test_what_a_selection_selects(selection: str, selected: str) -> None:
    graph = defs.get_repository_def().asset_graph
    found = dg.AssetSelection.from_coercible(selection.split(",")).resolve(graph)
    assert {key.to_user_string() for key in found} == set(selected.split())


@pytest.mark.parametrize(
    "selection", ["filtered_trace", "filtered_trace*", "*lora_adaptor", "chat_dataset,lora_adaptor"]
)
def test_a_misspelt_key_is_refused(selection: str) -> None:
    """Why `chat_dataset*` is better: a misspelt `key:"..."` selects nothing, which the command line takes for all."""
    graph = defs.get_repository_def().asset_graph
    with pytest.raises(dg.DagsterInvalidSubsetError):
        dg.AssetSelection.from_coercible(selection.split(",")).resolve(graph)
