"""Train scenes-tiny, the bundled checkpoint, from random weights:

    python examples/train_scenes_tiny.py --output runs/scenes-tiny

On CPU two processes share the work (one thread each); on a GPU one process does it. Stop it at any time: the same
command goes on from the last checkpoint of the stage that was running. `--install` writes the result into the package.
`--start bundled` takes vision tower, language model and SAM of the bundled checkpoint and runs the stages after them.
"""

import argparse
import dataclasses
import os
import subprocess
import sys
import time

import torch

from segcompass_hf import bundled_checkpoint
from segcompass_hf.evaluation.processes import Processes
from segcompass_hf.training.scenes_recipe import STAGES, export_checkpoint, run_stage, split_checkpoint

PARALLEL = ("warmup", "words", "joint")  # the stages that are worth two processes
FIRST = ("vision", "masks")  # independent of each other: side by side on CPU


def start(stage: str, output: str, scale: float) -> subprocess.Popen:
    """Run one stage in processes of its own."""
    launcher = [sys.executable]
    if stage in PARALLEL and not torch.cuda.is_available():
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = dict(os.environ) if torch.cuda.is_available() else {**os.environ, "OMP_NUM_THREADS": "1"}
    options = ["--output", output, "--stage", stage, "--scale", str(scale)]
    return subprocess.Popen([*launcher, __file__, *options], env=environment)


def wait(*processes: subprocess.Popen) -> None:
    codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit(f"a stage failed (exit codes {codes}); fix what its log says and run the same command again.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/scenes-tiny", help="one folder per stage is made in here")
    parser.add_argument("--stage", choices=STAGES, help="only this stage, in this process")
    parser.add_argument("--scale", type=float, default=1.0, help="of the steps: 0.002 to see every stage work")
    parser.add_argument("--start", metavar="CHECKPOINT", help="whose VLM and SAM to start from, or `bundled`")
    parser.add_argument("--install", action="store_true", help="write the result into the package as the bundled one")
    arguments = parser.parse_args()
    if arguments.stage:
        stage = STAGES[arguments.stage]
        steps = max(4, round(arguments.scale * stage.steps))
        run_stage(arguments.stage, arguments.output, dataclasses.replace(stage, steps=steps))
        Processes.current().finish()
        return
    began = time.time()
    if arguments.start:
        split_checkpoint(bundled_checkpoint() if arguments.start == "bundled" else arguments.start, arguments.output)
        remaining = list(STAGES)[list(STAGES).index("warmup") + 1 :]
    else:
        wait(*[start(stage, arguments.output, arguments.scale) for stage in FIRST])
        remaining = [stage for stage in STAGES if stage not in FIRST]
    for stage in remaining:
        wait(start(stage, arguments.output, arguments.scale))
        print(f"{stage} done, {(time.time() - began) / 60:.0f} minutes since the start", flush=True)
    destination = f"{arguments.output}/checkpoint"
    print("checkpoint:", export_checkpoint(arguments.output, destination))
    if arguments.install:
        print("installed:", export_checkpoint(arguments.output))


if __name__ == "__main__":
    main()
