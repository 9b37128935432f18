"""`segcompass predict --dataset`: one clear line for what is asked wrongly, and an end that can be gone on from."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import bulk
import pytest
from places import ROOT

pytest.importorskip("pyarrow")

from segcompass_hf import cli
from segcompass_hf.bulk.running import Progress
from segcompass_hf.commands.predict_dataset import ProgressLine, _in_time

ARGUMENTS = ["--rows-per-shard", "4", "--batch-size", "3", "--reasoning", "none"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return bulk.save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return bulk.save_pictures(tmp_path_factory.mktemp("pictures"), 5)


def _fails(capsys, *argv):
    """Run, expect exit code 2 and one line on stderr; return that line."""
    try:
        code = cli.main(["predict", *map(str, argv)])
    except SystemExit as stop:  # argparse leaves this way
        code = stop.code
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert code == 2 and captured.out == "" and len(lines) == 1, captured.err
    assert lines[0].startswith("segcompass predict: error: ")
    return lines[0]


def test_a_folder_of_pictures(checkpoint, pictures, tmp_path, capsys):
    argv = ["predict", "--dataset", str(pictures), "--instruction", "the ring", "--output", str(tmp_path), *ARGUMENTS]
    argv += ["--model", str(checkpoint)]
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert "5 rows in 2 shards, 0 of them errors; 5 made now" in out
    assert re.search(r"^5 of 5 rows, 0 errors", err, re.M)
    digest = re.search(r"digest of the rows: (\w{64})", out)[1]
    assert [row["source"] for row in bulk.rows_of(tmp_path)] == [f"00{index}.png" for index in range(5)]
    assert cli.main([*argv, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["digest"], told["predicted"], told["rows"], told["is_complete"]) == (digest, 0, 5, True)


def test_malformed_arguments(pictures, tmp_path, capsys):
    data = ["--dataset", pictures, "--output", tmp_path / "out"]
    assert "there is an image ('a.png') and a --dataset" in _fails(capsys, "a.png", *data)
    assert "--output is missing" in _fails(capsys, "--dataset", pictures)
    assert "--workers belongs to --engine ray" in _fails(capsys, *data, "--workers", "2")
    assert "each saying what to find" in _fails(capsys, *data, "--instruction", "  ")
    assert "--forbid belongs to one image" in _fails(capsys, *data, "--forbid", "red")
    both = ["--instruction", "x", "--instruction-column", "y"]
    assert "name one of the two" in _fails(capsys, *data, *both)
    for share in ("8/8", "1", "a/b", "-1/2", "1/0", "1/2/3"):
        assert f"{share!r} is no share; expected I/N" in _fails(capsys, *data, f"--shard={share}")
    assert "'0' is not a positive number" in _fails(capsys, *data, "--rows-per-shard", "0")
    assert "cannot drop the results of all" in _fails(capsys, *data, "--shard", "0/2", "--restart")
    assert "there is no file or folder './nowhere'" in _fails(capsys, "--dataset", "./nowhere", "--output", tmp_path)
    assert "no instructions: " in _fails(capsys, *data)
    far = ["--dataset", pictures, "--instruction", "x", "--output"]
    assert "cannot be written to: Protocol not known: gopher" in _fails(capsys, *far, "gopher://x")
    assert not (tmp_path / "out" / "data").exists()


@pytest.mark.parametrize(
    "argv",
    [["--instruction", "x"], ["--shard", "0/2"], ["--engine", "ray"], ["--concepts", "3"], ["--restart"]],
    ids=str,
)
def test_one_image_refuses_what_belongs_to_data_sets(argv, capsys):
    assert f"{argv[0]} belongs to --dataset" in _fails(capsys, "a.png", "the ring", *argv)


def test_one_image_needs_both(capsys):
    assert "required: image, instruction (or --dataset)" in _fails(capsys)


def test_ray_that_is_missing_is_named(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    argv = ["--dataset", pictures, "--instruction", "x", "--output", tmp_path, "--engine", "ray", "--model", "m"]
    assert "this needs ray, which is not installed: pip install 'segcompass_hf[ray]'" in _fails(capsys, *argv)


@pytest.mark.slow
def test_stopped_it_says_how_to_go_on(checkpoint, pictures, tmp_path):
    argv = ["predict", "--dataset", str(pictures), "--output", str(tmp_path), "--model", str(checkpoint), *ARGUMENTS]
    argv += [word for number in range(40) for word in ("--instruction", f"thing {number}")]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "segcompass_hf.cli", *argv], stderr=subprocess.PIPE, text=True, env=environment
    )
    deadline = time.monotonic() + 240
    while not (tmp_path / "run.json").is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143
    assert f"stopped by SIGTERM; this goes on: segcompass predict --dataset {pictures}" in errors
    assert not list(tmp_path.rglob("*.part"))


def test_progress(capsys, monkeypatch):
    clock = iter([0.0, 40.0, 50.0, 140.0, 150.0])  # made, then four batches; a line every 30 seconds
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    line = ProgressLine()
    for done in (10, 15, 60, 100):
        line(Progress(done, 1, 100))
    line.end()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "10 of 100 rows, 1 errors",  # its time holds the start
        "60 of 100 rows, 1 errors, 0.50 a second, 80 s left",  # 50 rows in 100 seconds; the second came too early
        "100 of 100 rows, 1 errors, 0.82 a second, 0 s left",
    ]
    clock = iter([0.0, 31.0])
    line = ProgressLine("note: x")
    line(Progress(1200, 0, None))  # a tar file: nobody knows how many
    assert capsys.readouterr().err == "note: x\n1,200 rows, 0 errors\n"
    assert [_in_time(seconds) for seconds in (59, 600, 11_100)] == ["59 s", "10 min", "3 h 05 min"]
