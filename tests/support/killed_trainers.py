"""A trainer killed at random moments and restarted to its end: `python killed_trainers.py FOLDER STAGE KILLS`.

Half of the kills come behind the last save. Every restart must end in the weights and the log of the run that was not
interrupted, and a further start must change nothing. After the kills a few runs are stopped by SIGTERM. Imports
happen once; every start is a fork of this process. The report is `FOLDER/report.json`.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

import grpo
import sae
import supervised
from tiny import tiny_model, tiny_processor

from segcompass_hf.stopping import run_script
from segcompass_hf.training import (
    SaeTrainer,
    SegCompassGRPOTrainer,
    SegmentationConfig,
    SegmentationTrainer,
    WarmupConfig,
    WarmupTrainer,
)

STEPS = 7  # checkpoints of steps 3, 6 and 7, of which two are kept
LOOP = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 2, "logging_steps": 2}
TIMES = ("step_time",)  # in a line of the log, what no two runs share


def make_trainer(stage: str, folder: Path):
    """A trainer of a stage on a tiny model, with as much chance in it as the stage has."""
    if stage == "sae":
        return SaeTrainer(tiny_model(), sae.settings(folder, **LOOP), sae.rows(), processing_class=tiny_processor())
    if stage == "grpo":
        cycle = {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2, "beta": 0.1}
        return grpo.tiny_trainer(folder, cls=SegCompassGRPOTrainer, per_device_train_batch_size=2, **cycle, **LOOP)
    shared = {"per_device_train_batch_size": 2, "lr_scheduler_type": "cosine", **LOOP}
    if stage == "warmup":
        args = supervised.arguments(WarmupConfig, folder, alignment_weight=0.5, **shared)
        return WarmupTrainer(supervised.bare_vlm(), args, supervised.uneven_rows(), None, tiny_processor())
    chances = {"slots_alone_share": 0.5, "drop_references_share": 0.5}
    args = supervised.arguments(SegmentationConfig, folder, **chances, **shared)
    return SegmentationTrainer(tiny_model(), args, supervised.uneven_rows(), None, tiny_processor())


def work(stage: str, folder: Path, linger: bool) -> None:
    trainer = make_trainer(stage, folder)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    lines = [{name: value for name, value in line.items() if name not in TIMES} for line in lines]
    (folder / "log.json").write_text(json.dumps(lines, sort_keys=True))
    (folder / "ended").touch()
    if linger:  # to be killed
        time.sleep(600)


def start(stage: str, folder: Path, linger: bool = False) -> int:
    """A run in a fork; returns its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        run_script(lambda: work(stage, folder, linger))
        status = 0
    except SystemExit as error:
        status = error.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def finish(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_for(path: Path, child: int) -> None:
    while not path.exists():
        assert os.waitpid(child, os.WNOHANG) == (0, 0), f"ended before {path} was there"
        time.sleep(0.002)


def outcome(folder: Path) -> tuple[str, str]:
    """SHA-256 of the weights, and the log."""
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    return weights, (folder / "log.json").read_text()


def checkpoints(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.glob("checkpoint-*"))}


def ended(stage: str, folder: Path, number: int, delay: float, behind_last_save: bool) -> dict:
    """A run that a signal ends, behind the last save or anywhere; what it left."""
    child = start(stage, folder, linger=True)
    if behind_last_save:
        wait_for(folder / f"checkpoint-{STEPS}", child)
    time.sleep(delay)
    os.kill(child, number)
    status = finish(child)
    left = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    return {"signal": number, "delay": delay, "behind_last_save": behind_last_save, "status": status, "left": left}


def attempt(stage: str, folder: Path, whole: tuple[str, str], *how) -> dict:
    """End a run, start it again to its end, and once more; is all as in the run that was not interrupted?"""
    report = ended(stage, folder, *how)
    report["restarted"] = finish(start(stage, folder))
    report["same"] = [one == other for one, other in zip(outcome(folder), whole, strict=True)]
    kept = checkpoints(folder)
    report["again"] = finish(start(stage, folder))
    report["unchanged"] = kept == checkpoints(folder) and outcome(folder) == whole
    report["afterwards"] = sorted(path.name for path in folder.iterdir() if path.name.startswith(("_", ".")))
    shutil.rmtree(folder)
    return report


def main(folder: Path, stage: str, kills: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    seed = int(os.environ.get("SEGCOMPASS_KILL_SEED", random.randrange(10**6)))
    generator = random.Random(seed)
    began, child = time.monotonic(), start(stage, folder / "whole", linger=True)
    wait_for(folder / "whole" / f"checkpoint-{STEPS}", child)
    until_saved = time.monotonic() - began
    wait_for(folder / "whole" / "ended", child)
    tail = time.monotonic() - began - until_saved
    os.kill(child, signal.SIGKILL)
    finish(child)
    whole, attempts = outcome(folder / "whole"), []
    for number, count in ((signal.SIGKILL, kills), (signal.SIGTERM, max(2, kills // 4))):
        for index in range(count):
            behind = index % 2 == 1
            delay = generator.uniform(0, 1.5 * tail if behind else until_saved)
            attempts.append(attempt(stage, folder / "run", whole, number, delay, behind))
    report = {"seed": seed, "seconds": [until_saved, tail], "attempts": attempts}
    (folder / "report.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
