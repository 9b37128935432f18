"""Predictions of data sets: the answers of `segment`, whatever the number of processes, shares and interruptions."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import bulk
import numpy as np
import pytest
import torch
from PIL import Image
from places import ROOT, SUPPORT

pytest.importorskip("pyarrow")

from segcompass_hf.bulk import predict_dataset
from segcompass_hf.bulk.output import OutputFolder
from segcompass_hf.checkpoint import load_checkpoint
from segcompass_hf.data.schema import decode_mask
from segcompass_hf.locks import alone_with


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return bulk.save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Fourteen pictures, one of which is none."""
    folder = bulk.save_pictures(tmp_path_factory.mktemp("pictures"))
    (folder / "005.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def whole(checkpoint, pictures, tmp_path_factory):
    """What one process makes of the pictures, never interrupted: summary, folder."""
    folder = tmp_path_factory.mktemp("whole")
    return predict_dataset(bulk.job_of(checkpoint, pictures, folder, concepts=2)), folder


@pytest.fixture(scope="module")
def plain(checkpoint, pictures, tmp_path_factory):
    """The same without concepts, as the script runs it."""
    folder = tmp_path_factory.mktemp("plain")
    return predict_dataset(bulk.job_of(checkpoint, pictures, folder)), folder


def launch(*arguments, launcher=()):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{SUPPORT}"}
    command = [sys.executable, *launcher, str(SUPPORT / "bulk.py"), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def assert_same_files(first, second):
    names = sorted(path.name for path in (first / "data").iterdir())
    assert names == sorted(path.name for path in (second / "data").iterdir())
    for name in names:
        assert (first / "data" / name).read_bytes() == (second / "data" / name).read_bytes(), name


def test_every_question_is_a_row_in_order(whole):
    summary, folder = whole
    rows = bulk.rows_of(folder)
    expected = [(f"{index:03d}.png", question) for index in range(14) for question in range(2)]
    assert [(row["source"], row["question"]) for row in rows] == expected
    assert [row["instruction"] for row in rows] == list(bulk.INSTRUCTIONS) * 14
    failed = [row for row in rows if row["error"] is not None]
    assert [row["source"] for row in failed] == ["005.png"] * 2
    assert all("cannot be read as an image" in row["error"] and row["masks"] is None for row in failed)
    assert (summary.shards, summary.rows, summary.errors, summary.predicted) == (4, 28, 2, 28)
    assert summary.is_complete
    told = json.loads((folder / "summary.json").read_text())
    assert told["digest"] == summary.digest and told["rows"] == 28 and told["errors"] == 2


def test_rows_are_what_segment_answers_alone(whole, checkpoint, pictures):
    model, processor, _ = load_checkpoint(str(checkpoint))
    rows = [row for row in bulk.rows_of(whole[1]) if row["error"] is None]
    for row in rows[::5]:
        image = Image.open(pictures / row["source"])
        inputs = processor(images=image, instruction=row["instruction"], return_tensors="pt")
        output = model.segment(**inputs, output_concepts=True)
        (alone,) = processor.post_process_segmentation(
            output, inputs["original_sizes"], inputs["reshaped_input_sizes"]
        )
        assert (row["height"], row["width"]) == (image.height, image.width)
        assert (row["reasoning"], row["text"]) == (alone["reasoning"], alone["text"])
        assert row["slots"] == alone["slots"].tolist() and row["duplicates"] == alone["duplicates"]
        assert row["scores"] == pytest.approx(alone["scores"].tolist(), abs=2e-5)
        masks = np.stack([decode_mask(mask) for mask in row["masks"]])
        # Padding changes the last bits of logits: a pixel on the edge may fall on the other side.
        assert (masks != alone["masks"].numpy()).mean() < 1e-3
        dense = output.concepts.dense(model.config.sae_config.d_sae)[0]  # (tokens, d_sae)
        strongest = dense.abs().amax(0).topk(2)
        assert [concept["feature"] for concept in row["concepts"]] == strongest.indices.tolist()
        sizes = [abs(concept["activation"]) for concept in row["concepts"]]
        assert sizes == pytest.approx(strongest.values.tolist(), abs=1e-4)
        counts = (dense != 0).sum(0)
        assert [c["tokens"] for c in row["concepts"]] == counts[strongest.indices].tolist()


def test_an_image_is_encoded_once_for_all_its_questions(checkpoint, pictures, tmp_path, monkeypatch):
    from segcompass_hf import SegCompassForReasoningSegmentation

    encoded, encode = [], SegCompassForReasoningSegmentation.encode_image

    def counted(self, pixels):
        encoded.extend(pixels)
        return encode(self, pixels)

    monkeypatch.setattr(SegCompassForReasoningSegmentation, "encode_image", counted)
    instructions = tuple(f"the red circle{' or the ring' * number}" for number in range(5))  # of five lengths
    summary = predict_dataset(bulk.job_of(checkpoint, pictures, tmp_path, instructions=instructions))
    assert summary.rows == 14 * 5
    assert len(encoded) == 13  # of 14 pictures, one of which is none


def test_shares_of_several_jobs_make_one_whole(checkpoint, pictures, tmp_path, plain):
    job = bulk.job_of(checkpoint, pictures, tmp_path)
    first = predict_dataset(job, share=(1, 3))
    assert (first.shards, first.rows, first.is_complete) == (1, 8, False)
    assert not (tmp_path / "summary.json").exists()
    rest = [predict_dataset(job, share=(index, 3)) for index in (0, 2)]
    assert [summary.is_complete for summary in rest] == [False, True]
    assert json.loads((tmp_path / "summary.json").read_text())["digest"] == plain[0].digest
    assert_same_files(tmp_path, plain[1])
    with pytest.raises(ValueError, match="of 3 jobs they are 0 to 2"):
        predict_dataset(job, share=(3, 3))
    with pytest.raises(ValueError, match="cannot drop the results of all"):
        predict_dataset(job, share=(0, 3), resume=False)


@pytest.mark.slow
def test_killed_and_resumed(checkpoint, pictures, tmp_path, plain):
    process = launch(checkpoint, pictures, tmp_path, 1.0)
    deadline = time.monotonic() + 240
    while not list((tmp_path / "data").glob("part-000001-*.parquet")) if (tmp_path / "data").is_dir() else True:
        assert process.poll() is None, process.stderr.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)  # in the middle of the third shard
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    there = OutputFolder(str(tmp_path)).shards_there()
    assert {0, 1} <= there < {0, 1, 2, 3}
    kept = {
        number: (tmp_path / "data" / f"part-{number:06d}-of-000004.parquet").stat().st_mtime_ns for number in there
    }
    summary = predict_dataset(bulk.job_of(checkpoint, pictures, tmp_path))
    assert summary.predicted == 28 - 8 * len(there)
    assert summary.digest == plain[0].digest
    assert_same_files(tmp_path, plain[1])
    for number, written in kept.items():
        assert (tmp_path / "data" / f"part-{number:06d}-of-000004.parquet").stat().st_mtime_ns == written
    again = predict_dataset(bulk.job_of(checkpoint, pictures, tmp_path))
    assert (again.predicted, again.digest) == (0, plain[0].digest)


@pytest.mark.slow
def test_two_processes_give_the_rows_of_one(checkpoint, pictures, tmp_path, plain):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    process = launch(checkpoint, pictures, tmp_path, 0, launcher=launcher)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors[-3000:]
    assert json.loads((tmp_path / "summary.json").read_text())["digest"] == plain[0].digest
    assert_same_files(tmp_path, plain[1])


def test_an_output_behind_a_url(checkpoint, pictures, plain):
    import fsspec

    summary = predict_dataset(bulk.job_of(checkpoint, pictures, "memory://out/run"))
    assert summary.digest == plain[0].digest
    memory = fsspec.filesystem("memory")
    names = sorted(path.rsplit("/", 1)[-1] for path in memory.find("/out/run"))
    assert names == [*(f"part-{n:06d}-of-000004.parquet" for n in range(4)), "run.json", "summary.json"]
    assert predict_dataset(bulk.job_of(checkpoint, pictures, "memory://out/run")).predicted == 0


def test_another_run_is_refused_until_its_results_are_dropped(checkpoint, pictures, tmp_path):
    short = {"rows_per_shard": 14, "instructions": ("the ring",)}
    predict_dataset(bulk.job_of(checkpoint, pictures, tmp_path, **short))
    other = bulk.job_of(checkpoint, pictures, tmp_path, **(short | {"batch_size": 5}))
    with pytest.raises(ValueError, match="batch_size was 3, is 5"):
        predict_dataset(other)
    assert predict_dataset(other, resume=False).predicted == 14
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match="holds shards but no run.json"):
        predict_dataset(other)
    with alone_with(tmp_path / ".share-0-of-1.lock", "held"):
        with pytest.raises(FileExistsError, match="another process is writing into"):
            predict_dataset(other)


def test_a_damaged_shard_is_named(checkpoint, pictures, tmp_path):
    job = bulk.job_of(checkpoint, pictures, tmp_path, rows_per_shard=14, instructions=("the ring",))
    digest = predict_dataset(job).digest
    (part,) = (tmp_path / "data").iterdir()
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(ValueError, match="part-000000-of-000001.parquet: .*delete it"):
        predict_dataset(job)
    part.unlink()
    assert predict_dataset(job).digest == digest


def test_weights_that_are_not_finite_become_errors_not_masks(checkpoint, pictures, tmp_path):
    model, processor, _ = load_checkpoint(str(checkpoint))
    with torch.no_grad():
        next(model.slot_mapper.parameters()).fill_(float("nan"))
    model.save_pretrained(tmp_path / "broken")
    processor.save_pretrained(tmp_path / "broken")
    job = bulk.job_of(tmp_path / "broken", pictures, tmp_path / "out", instructions=("the ring",), rows_per_shard=14)
    summary = predict_dataset(job)
    assert (summary.rows, summary.errors) == (14, 14)
    told = {row["error"].split(" ")[0] for row in bulk.rows_of(tmp_path / "out") if row["source"] != "005.png"}
    assert told and all("image:" not in word for word in told)
