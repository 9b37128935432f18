"""Every trainer, killed at random moments and started again; the runs are those of `support/killed_trainers.py`."""

import json
import os
import signal
import subprocess
import sys

import pytest
from places import SUPPORT


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["warmup", "sae", "segmentation", "grpo"])
def test_killed_at_random_moments_ends_the_same(stage, tmp_path):
    """SEGCOMPASS_KILLS=20 for the figure in the changelog; the seed of the moments is in the report."""
    if stage == "grpo":
        pytest.importorskip("trl")
    kills = int(os.environ.get("SEGCOMPASS_KILLS", "3"))
    command = [sys.executable, str(SUPPORT / "killed_trainers.py"), str(tmp_path), stage, str(kills)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    attempts = report["attempts"]
    assert len(attempts) == kills + max(2, kills // 4)
    for attempt in attempts:
        killed = attempt["signal"] == signal.SIGKILL
        assert attempt["status"] == (-signal.SIGKILL if killed else 128 + signal.SIGTERM), attempt
        assert (attempt["restarted"], attempt["again"]) == (0, 0), (report["seed"], attempt)
        assert attempt["same"] == [True, True] and attempt["unchanged"], (report["seed"], attempt)
        assert attempt["afterwards"] == [], "nothing of the interrupted run stays"
