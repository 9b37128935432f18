"""The start that all arms of the ablation share: reference reasoning for three of the eight kinds of instruction.

    python benchmarks/scenes_study/start.py

Six stages as in `examples/train_scenes_tiny.py`, with fewer steps; from the third on only kinds of `TAUGHT` are seen.
Resumable; `runs/scenes-study/start` holds one folder per stage, `joint` is the start.
"""

import argparse
import dataclasses
import os
import subprocess
import sys

import torch
from runs import counted
from settings import RUNS, START

from segcompass_hf.training.scenes_recipe import LOG, run_stage

FOLDER = RUNS / "start"
IN_TWO = ("warmup", "joint")  # worth two processes on CPU


def launch(stage: str) -> None:
    """Run one stage in processes of its own."""
    launcher = [sys.executable]
    if stage in IN_TWO and not torch.cuda.is_available():
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = dict(os.environ) if torch.cuda.is_available() else {**os.environ, "OMP_NUM_THREADS": "1"}
    if subprocess.call([*launcher, __file__, "--stage", stage], env=environment):
        sys.exit(f"stage {stage} failed; fix what its log says and run the same command again.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=START, help="only this stage, in this process")
    stage = parser.parse_args().stage
    if stage:
        with counted(FOLDER / stage, dataclasses.asdict(START[stage])):
            run_stage(stage, FOLDER, START[stage])
        return
    for stage in START:
        if not (FOLDER / stage / LOG).exists():
            launch(stage)


if __name__ == "__main__":
    main()
