"""A recipe run whole, and again with SIGKILL at random moments: `python recipe_runs.py FOLDER NUM_KILLS [PROCESSES]`.

Imports happen once; every attempt is a fork of this process, with several PROCESSES the command `segcompass train`.
What was killed where, and the SHA-256 of both runs' weights, go to `FOLDER/report.json`.
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

import yaml
from tiny import tiny_model, tiny_processor

import segcompass_hf.training.grpo.trainer  # noqa: F401 - so that no fork has to
import segcompass_hf.training.warmup.trainer  # noqa: F401
from segcompass_hf.training import read_recipe, run_recipe

EVERY_STEP = {"save_steps": 1, "logging_steps": 1, "disable_tqdm": True, "use_cpu": True}
SHORT = {"max_steps": 3, "batch_size": 2, **EVERY_STEP}
STAGES = {
    "warmup": {**SHORT, "learning_rate": 1e-3},
    "sae": {
        **SHORT,
        "num_samples": 8,
        "d_sae": 32,
        "batch_size": 32,
        "buffer_tokens": 128,
        "normalize_activations": "per_token",
    },
    "segmentation": {**SHORT, "learning_rate": 1e-3, "slots_alone_share": 0.5, "drop_references_share": 0.5},
    "grpo": {**SHORT, "max_steps": 2, "num_generations": 2, "max_completion_length": 8},
}


def write_recipe(folder: Path, stages: dict | None = None, **settings) -> Path:
    """A recipe from a tiny SegCompass of random weights, which is written beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "start").exists():
        tiny_model().save_pretrained(folder / "start")
        tiny_processor().save_pretrained(folder / "start")
    shared = {"output_dir": str(folder / "out"), "model": str(folder / "start"), "dataset": "scenes:val:3"}
    content = shared | settings | (STAGES if stages is None else stages)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "recipe.yaml"


def start(recipe: Path, output: Path) -> int:
    """Run the recipe in a fork, or as a command of several processes; returns its process id."""
    if yaml.safe_load(recipe.read_text()).get("processes"):
        command = [sys.executable, "-m", "segcompass_hf.cli", "train", str(recipe), "--set", f"output_dir={output}"]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
        return os.spawnve(os.P_NOWAIT, sys.executable, command, environment)
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        run_recipe(read_recipe(recipe, [f"output_dir={output}"]))
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def finish(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def digest(output: Path) -> str:
    return hashlib.sha256((output / "checkpoint" / "model.safetensors").read_bytes()).hexdigest()


def wait_for_processes(recipe: Path) -> None:
    """Processes of a killed command end with it.

    Raises:
        AssertionError: One of them lives on.
    """
    give_up = time.monotonic() + 20
    while alive := [path for path in Path("/proc").glob("[0-9]*") if str(recipe).encode() in _command_line(path)]:
        assert time.monotonic() < give_up, alive
        time.sleep(0.05)


def _command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def killed_at_random(recipe: Path, output: Path, num_kills: int, duration: float, generator: random.Random) -> dict:
    """Start the run and kill it until it was killed so often; a run that ends before is removed and started anew."""
    places, finished = [], 0
    while len(places) < num_kills:
        child = start(recipe, output)
        time.sleep(generator.uniform(0.05, 0.6 * duration))
        os.kill(child, signal.SIGKILL)
        ended = finish(child)
        wait_for_processes(recipe)
        if ended == 0:
            finished += 1
            shutil.rmtree(output)
            continue
        begun = [stage for stage in STAGES if (output / stage / "stage_begun.json").exists()]
        done = [stage for stage in STAGES if (output / stage / "stage_done.json").exists()]
        places.append({"begun": begun, "done": done})
    return {"killed": places, "finished": finished, "last": finish(start(recipe, output)), "digest": digest(output)}


def main(folder: Path, num_kills: int, processes: int = 1) -> None:
    few = {name: STAGES[name] for name in ("sae", "segmentation")}  # starting the command takes longer than they do
    recipe = write_recipe(folder) if processes == 1 else write_recipe(folder, few, processes=processes)
    began = time.monotonic()
    assert finish(start(recipe, folder / "whole")) == 0
    report = {"seconds": time.monotonic() - began, "whole": digest(folder / "whole")}
    report["seed"] = int(os.environ.get("SEGCOMPASS_KILL_SEED", random.randrange(10**6)))
    generator = random.Random(report["seed"])
    report |= killed_at_random(recipe, folder / "killed", num_kills, report["seconds"], generator)
    (folder / "report.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
