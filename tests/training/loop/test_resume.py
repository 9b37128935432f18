"""Killed with SIGKILL and resumed, and in two processes; the runs are those of `tests/support/robust_*.py`."""

import json
import os
import subprocess
import sys

import pytest
import torch
from places import ROOT, SUPPORT


def run_script(name, folder):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, str(SUPPORT / name), str(folder)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def plain_runs(tmp_path_factory):
    return run_script("robust_runs.py", tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def grpo_runs(tmp_path_factory):
    return run_script("robust_grpo_runs.py", tmp_path_factory.mktemp("grpo"))


@pytest.fixture(scope="module")
def segcompass_runs(tmp_path_factory):
    return run_script("robust_segcompass_runs.py", tmp_path_factory.mktemp("segcompass"))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return run_script("robust_two_processes.py", tmp_path_factory.mktemp("two"))


def assert_resumed_like_whole(folder, scenario, started):
    whole = torch.load(folder / "whole-run.pt")
    resumed = torch.load(folder / f"{scenario}-resumed.pt")
    assert resumed["started"] == started
    assert resumed["curve"] == whole["curve"]  # losses, gradient norms, rates, metrics: to the last bit
    assert whole["weights"].keys() == resumed["weights"].keys()
    assert all(torch.equal(tensor, resumed["weights"][name]) for name, tensor in whole["weights"].items())


@pytest.mark.parametrize(
    ("scenario", "left", "started"),
    [
        # An epoch is 5 steps, logs come every 3, checkpoints every 2 and at the last, step 15; three are kept.
        ("in_step", [4, 6, 8], 8),
        ("in_step_after_epoch", [2, 4], 4),
        ("half_written", [2, 4, 6], 6),
        ("before_rename", [6, 8, 10], 10),
        ("in_rotation", [6, 8, 10], 10),
        ("between_renames", [12, 15], 15),
    ],
)
def test_killed_run_resumes_to_the_same_weights(plain_runs, scenario, left, started):
    report = json.loads((plain_runs / "reports.json").read_text())[scenario]
    assert report["killed"] == -9
    assert sorted(int(name.split("-")[1]) for name in report["left"] if name != "_unfinished") == left
    assert report["broken"] == []
    assert ("_unfinished" in report["left"]) == (not scenario.startswith("in_step"))
    assert report["resumed"] == 0
    assert report["afterwards"] == ["checkpoint-12", "checkpoint-14", "checkpoint-15"]
    if scenario == "between_renames":  # the run had been completed once: nothing is left to train
        assert torch.load(plain_runs / f"{scenario}-resumed.pt")["started"] == started
    else:
        assert_resumed_like_whole(plain_runs, scenario, started)


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "started"), [("in_step", 3), ("half_written", 6)])
def test_killed_grpo_resumes_inside_a_generation_cycle(grpo_runs, scenario, started):
    """4 steps share their completions and make an epoch; checkpoints 3 and 6 lie inside of such a cycle."""
    assert json.loads((grpo_runs / "reports.json").read_text())[scenario]["killed"] == -9
    assert_resumed_like_whole(grpo_runs, scenario, started)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "scenario", "started"), [("full", "in_step", 3), ("lora", "half_written", 6)])
def test_killed_joint_training_resumes_inside_a_generation_cycle(segcompass_runs, kind, scenario, started):
    """As above; the reference policy of the resumed run is the first one, and a damaged image stays skipped."""
    folder = segcompass_runs / kind
    assert json.loads((folder / "reports.json").read_text())[scenario]["killed"] == -9
    assert_resumed_like_whole(folder, scenario, started)
    lines = [json.loads(line) for line in (folder / scenario / "unreadable_rows.jsonl").read_text().splitlines()]
    assert {line["sample_id"] for line in lines} == {"row-1"} and len(lines) == 2  # once per start
    assert all(line["kl"] > 0 for line in torch.load(folder / "whole-run.pt")["curve"])


@pytest.mark.slow
def test_two_processes_resume_to_the_same_weights(two_processes):
    for rank in range(2):
        whole = torch.load(two_processes / f"whole-{rank}.pt")
        resumed = torch.load(two_processes / f"killed-resumed-{rank}.pt")
        assert (whole["world_size"], whole["wrapped"]) == (2, "DistributedDataParallel")
        assert len(whole["curve"]) == 10 and resumed["curve"] == whole["curve"]
        assert all(torch.equal(tensor, resumed["weights"][name]) for name, tensor in whole["weights"].items())


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_behind_the_same_step(two_processes):
    """SIGTERM in step 4, whose checkpoint is no regular one (those are 3, 6, 9)."""
    for rank in range(2):
        stopped = torch.load(two_processes / f"stopped-{rank}.pt")
        assert (stopped["error"], len(stopped["curve"]), stopped["optimizer_steps"]) == ("143", 4, 4)
        resumed, whole = (torch.load(two_processes / f"{name}-{rank}.pt") for name in ("stopped-resumed", "whole"))
        assert resumed["curve"] == whole["curve"]
        assert all(torch.equal(tensor, resumed["weights"][name]) for name, tensor in whole["weights"].items())
    assert (two_processes / "stopped" / "checkpoint-4").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["loss", "gradient"])
def test_what_one_process_sees_all_skip(two_processes, scenario):
    whole = torch.load(two_processes / "whole-0.pt")
    first, second = (torch.load(two_processes / f"{scenario}-{rank}.pt") for rank in range(2))
    for result in (first, second):
        assert (result["nonfinite_steps"], result["optimizer_steps"], result["error"]) == (1, 9, None)
    assert all(torch.equal(tensor, second["weights"][name]) for name, tensor in first["weights"].items())
    assert not torch.equal(first["weights"]["first.weight"], whole["weights"]["first.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["fsdp", "fsdp0"])
def test_a_bad_shard_of_one_process_all_skip(two_processes, scenario):
    """FSDP2; the second run does not clip."""
    first, second = (torch.load(two_processes / f"{scenario}-{rank}.pt") for rank in range(2))
    for result in (first, second):
        assert result["sharded"] and result["world_size"] == 2
        assert (result["nonfinite_steps"], result["optimizer_steps"], result["error"]) == (1, 5, None)
    for name, tensor in first["weights"].items():
        assert tensor.isfinite().all() and torch.equal(tensor, second["weights"][name])


@pytest.mark.slow
def test_all_processes_stop_together(two_processes):
    for rank in range(2):
        result = torch.load(two_processes / f"row-{rank}.pt")
        assert result["optimizer_steps"] == 3
        assert "2 steps in a row, up to step 5" in result["error"]
    assert [path.name for path in (two_processes / "row").glob("checkpoint-*")] == ["checkpoint-3"]
