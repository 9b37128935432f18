"""The rows of one process from two workers of a local Ray cluster, one of which dies in the middle."""

import os
import signal
import subprocess
import sys
import time

import bulk
import pytest
from places import ROOT, SUPPORT

pytest.importorskip("ray")

from segcompass_hf.bulk import predict_dataset
from segcompass_hf.bulk.output import OutputFolder

pytestmark = pytest.mark.slow
NUM_SHARDS = 10


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return bulk.save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return bulk.save_pictures(tmp_path_factory.mktemp("pictures"), NUM_SHARDS * bulk.ROWS_PER_SHARD)


def launch(checkpoint, pictures, output):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{SUPPORT}"}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, str(SUPPORT / "bulk.py"), str(checkpoint), str(pictures), str(output), "0", "ray"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_a_worker_that_dies_is_replaced_and_the_rows_are_those_of_one_process(checkpoint, pictures, tmp_path):
    process = launch(checkpoint, pictures, tmp_path / "ray")
    output, deadline = OutputFolder(str(tmp_path / "ray")), time.monotonic() + 500
    while not output.shards_there():
        assert process.poll() is None, process.stderr.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = [pid for pid, title in bulk.descendants(process.pid) if "MapWorker" in title]
    assert workers
    os.kill(workers[0], signal.SIGKILL)
    assert len(output.shards_there()) < NUM_SHARDS
    _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors[-3000:]
    alone = predict_dataset(bulk.job_of(checkpoint, pictures, tmp_path / "alone"))
    for path in sorted((tmp_path / "alone" / "data").iterdir()):
        assert path.read_bytes() == (tmp_path / "ray" / "data" / path.name).read_bytes(), path.name
    assert OutputFolder(str(tmp_path / "ray")).counts(range(NUM_SHARDS))["digest"] == alone.digest


def test_what_a_worker_refuses_is_said_here(pictures, tmp_path):
    process = launch(tmp_path / "nowhere", pictures, tmp_path / "ray")
    _, errors = process.communicate(timeout=500)
    assert process.returncode == 1
    assert errors.strip().splitlines()[-1].startswith("FileNotFoundError: there is no checkpoint folder")
