# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""A tiny checkpoint and pictures for predictions of data sets; as a script, such a prediction that can be killed.

python bulk.py CHECKPOINT PICTURES OUTPUT SECONDS_PER_BATCH [ray]
"""

import io
import sys
import tarfile
import time
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import tiny

ROWS_PER_SHARD, BATCH_SIZE = 4, 3
INSTRUCTIONS = ("the red circle", "all the blue squares but not the small ring")
# Random weights rarely pass the threshold, and write until they are stopped.
SETTINGS = {"slot_logit_threshold": -100.0, "max_reasoning_tokens": 6}


def save_checkpoint(folder):
    """A tiny LLaVA that keeps every slot, and its processor."""
    tiny.tiny_model("llava", **SETTINGS).save_pretrained(folder)
    tiny.tiny_processor("llava").save_pretrained(folder)
    return folder


def save_pictures(folder, count=14, sizes=((60, 45), (33, 80))):
    """PNG files of two sizes, by number."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        tiny.tiny_image(index, sizes[index % len(sizes)]).save(folder / f"{index:03d}.png")
    return folder


def save_tar(path, samples):
    """A tar file of `(name, content)` pairs."""
    with tarfile.open(path, "w") as archive:
        for name, content in samples:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def rows_of(output):
    """All rows of a folder of results, in order."""
    return [row for path in sorted(Path(output, "data").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def job_of(checkpoint, dataset, output, **kwargs):
    from segcompass_hf.bulk import PredictionJob

    defaults = {"instructions": INSTRUCTIONS, "batch_size": BATCH_SIZE, "rows_per_shard": ROWS_PER_SHARD}
    return PredictionJob(str(dataset), str(output), model=str(checkpoint), **(defaults | kwargs))


def descendants(pid):
    """Processes that a process has started, and those that they have: `(pid, title)`."""
    children = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(status.parent.name))
    found, left = [], [pid]
    while left:
        for child in children.get(left.pop(), []):
            left.append(child)
            with suppress(OSError):
                found.append((child, Path(f"/proc/{child}/cmdline").read_bytes().decode(errors="replace")))
    return found


class Slow:
    """Sleeps after each batch, so that a test can kill the process between two."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __call__(self, progress):
        time.sleep(self.seconds)


if __name__ == "__main__":
    from segcompass_hf.bulk import predict_dataset, predict_dataset_with_ray
    from segcompass_hf.evaluation.processes import Processes

    job = job_of(*sys.argv[1:4])
    if "ray" in sys.argv[5:]:
        import ray

        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False)
        predict_dataset_with_ray(job, workers=2)
    else:
        predict_dataset(job, on_progress=Slow(float(sys.argv[4])))
        Processes.current().finish()
