"""The start that all arms of the ablation share: reference reasoning for three of the eight kinds of instruction.

    python benchmarks/scenes_study/start.py strict
    python benchmarks/scenes_study/start.py cold
    python benchmarks/scenes_study/start.py practised    # goes on from the warm-up of `cold`, which must be there

Stages of `examples/train_scenes_tiny.py` with fewer steps; after `vision`, which sees no instruction, only kinds of
`TAUGHT` are seen (but for what `STARTS` says). SAM, which never sees one either, is the bundled checkpoint's.
Resumable; `runs/scenes-study/start-cold` holds one folder per stage, `joint` is the start.
"""

import argparse
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import torch
from runs import counted
from settings import GOES_ON_FROM, RUNS, STARTS

from segcompass_hf import bundled_checkpoint
from segcompass_hf.evaluation.processes import Processes
from segcompass_hf.training.scenes_recipe import LOG, run_stage, split_checkpoint

IN_TWO = ("warmup", "joint")  # worth two processes on CPU


def folder_of(start: str) -> Path:
    return RUNS / f"start-{start}"


def borrow(start: str) -> None:
    """Lay down the warm-up that a start goes on from."""
    folder, source = folder_of(start), folder_of(GOES_ON_FROM[start])
    for stage in ("vision", "warmup"):
        if not (source / stage / LOG).exists():
            sys.exit(f"{source} holds no finished {stage}; run start.py {GOES_ON_FROM[start]} first.")
        if not (folder / stage).exists():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / stage).symlink_to((source / stage).resolve())


def launch(start: str, stage: str) -> None:
    """Run one stage in processes of its own."""
    launcher = [sys.executable]
    if stage in IN_TWO and not torch.cuda.is_available():
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = dict(os.environ) if torch.cuda.is_available() else {**os.environ, "OMP_NUM_THREADS": "1"}
    if subprocess.call([*launcher, __file__, start, "--stage", stage], env=environment):
        sys.exit(f"stage {stage} failed; fix what its log says and run the same command again.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start", nargs="?", choices=STARTS, default="cold")  # torchrun takes `--start` for its own
    parser.add_argument("--stage", help="only this stage, in this process")
    given = parser.parse_args()
    stages, folder = STARTS[given.start], folder_of(given.start)
    if given.stage:
        with counted(folder / given.stage, dataclasses.asdict(stages[given.stage])):
            run_stage(given.stage, folder, stages[given.stage])
        Processes.current().finish()
        return
    if given.start in GOES_ON_FROM:
        borrow(given.start)
    split_checkpoint(bundled_checkpoint(), folder, ("masks",))
    for stage in stages:
        if not (folder / stage / LOG).exists():
            launch(given.start, stage)


if __name__ == "__main__":
    main()
