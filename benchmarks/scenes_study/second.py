"""One run of the study's second part, trained and evaluated on every split:

    python benchmarks/scenes_study/second.py --predict                   # pass@k of the starts, and which is taken
    python benchmarks/scenes_study/second.py --arm both --seed 0
    python benchmarks/scenes_study/second.py --evaluate-start
    python benchmarks/scenes_study/second.py --arm expert --completions 256000
    python benchmarks/scenes_study/second_report.py                      # tables of what is finished

Resumable at any moment. Records lie in `runs/scenes-study/second`. PROTOCOL_SECOND.md says what is counted; nothing of
it has been run yet. `--smoke` makes each of these runs with two steps from the bundled checkpoint.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from runs import counted, write_json
from second_settings import (
    ARMS,
    COUNTED,
    EXPERT,
    GRPO,
    KINDS,
    LEARNABLE_MIXED,
    LEARNABLE_PASS,
    PREDICTION_SEED,
    PROMPTS_PER_STEP,
    REFERENCE_EVERY,
    SAMPLES_AFTER,
    SEEDS,
    SMOKE,
    Size,
)
from settings import EVALUATION_SEED, SPLITS
from start import folder_of

from segcompass_hf import SegCompassForReasoningSegmentation, SegCompassProcessor, bundled_checkpoint
from segcompass_hf.data import scenes
from segcompass_hf.evaluation import ModelPredictor, SamplingPredictor, evaluate_dataset, measure_pass_at_k
from segcompass_hf.training import read_recipe, run_recipe, with_right_samples
from segcompass_hf.training.recipe.rows import StageRows

SHARED = {"save_steps": 25, "logging_steps": 1}
SUPERVISED = ("learning_rate", "lr_scheduler_type", "warmup_steps", "bf16", "gradient_checkpointing")
HEADS = ("codebook", "slot_mapper", "prompt_encoder", "mask_decoder")


def load(folder: Path) -> tuple[SegCompassForReasoningSegmentation, SegCompassProcessor]:
    model = SegCompassForReasoningSegmentation.from_pretrained(folder, dtype=torch.float32)
    model.vlm.set_attn_implementation("eager")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), SegCompassProcessor.from_pretrained(folder)


def checkpoint_of(start: str) -> Path:
    return Path(bundled_checkpoint()) if start == "bundled" else folder_of(start) / "segmentation"


def sample(checkpoint: Path, folder: Path, name: str, samples: int, ks: Sequence[int], size: Size) -> dict[str, Any]:
    """pass@k on the scenes that the prediction is of."""
    model, processor = load(checkpoint)
    return measure_pass_at_k(
        SamplingPredictor(model, processor, name, num_samples=samples),
        scenes.build("val", size.predicted, seed=PREDICTION_SEED),
        folder,
        ks,
        dataset_name=f"scenes:val:{PREDICTION_SEED}",
    )


def predict(size: Size) -> dict[str, Any]:
    """pass@k of every start, and the first that the rule takes."""
    taken = None
    for name in size.starts:
        folder = size.folder / "predictions" / name
        with counted(folder, {"start": name, "scenes": size.predicted, "k": size.ks}):
            figures = sample(checkpoint_of(name), folder, name, max(size.ks), size.ks, size)
        if taken is None and len(learnable(figures)) >= size.kinds_needed:
            taken = name
    record = {"start": taken}
    write_json(size.folder / "start.json", record)
    return record


def learnable(figures: dict[str, Any]) -> list[str]:
    """Kinds not taught in which reinforcement has something to learn from, by `prediction.json`."""
    return [
        kind
        for kind, its in figures["by_kind"].items()
        if kind in KINDS["others"]
        and its["by_k"]["16"]["pass"]["value"] >= LEARNABLE_PASS
        and its["by_k"]["8"]["mixed"]["value"] >= LEARNABLE_MIXED
    ]


def start_folder(size: Size) -> Path:
    file = size.folder / "start.json"
    name = json.loads(file.read_text())["start"] if file.is_file() else None
    if name is None:
        sys.exit("no start is chosen: run second.py --predict; if none can learn, the protocol ends there.")
    return checkpoint_of(name)


def prompts_of(arm: str, seed: int, size: Size) -> Dataset:
    """The prompts of a run: the same scenes for every arm, with the reasoning that the arm may see."""
    rows = scenes.build("train", size.prompts, seed=200 + seed)
    every = {"reference": 1, "both_guided": REFERENCE_EVERY}.get(arm)
    kept = [
        words if every is not None and index % every == 0 else None for index, words in enumerate(rows["reasoning"])
    ]
    feature, columns = rows.features["reasoning"], rows.column_names
    return rows.remove_columns("reasoning").add_column("reasoning", kept, feature=feature).select_columns(columns)


def train(folder: Path, start: Path, stage: str, settings: dict[str, Any], rows: Dataset) -> Path:
    """A recipe of one stage; returns the folder of the checkpoint."""
    recipe = {"output_dir": str(folder), "model": str(start), "attn_implementation": "eager", stage: settings}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    path = folder / "recipe.yaml"
    return run_recipe(read_recipe(path), f"second.py, {path}", print, {stage: StageRows(rows)})


def supervised(steps: int, seed: int) -> dict[str, Any]:
    """Settings of stage 3 that follow those of the arms."""
    same = {name: GRPO[name] for name in (*SUPERVISED, *(f"{part}_lr_factor" for part in HEADS))}
    weights = {name: value for name, value in GRPO.items() if name.endswith("_weight")}
    own = {"per_device_train_batch_size": PROMPTS_PER_STEP, "max_steps": steps, "num_eval_segmentations": 0}
    return {**same, **weights, **own, **SHARED, "seed": seed, "dataset": "scenes:train"}


def run_arm(arm: str, seed: int, completions: int | None, size: Size) -> None:
    folder = size.folder / f"{arm}-{seed}"
    if (folder / "done.json").is_file():
        return
    start = start_folder(size)
    settings = {"arm": arm, "seed": seed, "start": str(start), "steps": size.steps, "completions": completions}
    with counted(folder, settings):
        if arm == "expert":
            checkpoint = expert(folder, start, seed, completions or size.prompts * GRPO["num_generations"], size)
        elif arm == "reference":
            rows = prompts_of(arm, seed, size)
            checkpoint = train(folder / "run", start, "segmentation", supervised(size.steps, seed), rows)
        else:
            its = {**GRPO, **ARMS[arm], **SHARED, "max_steps": size.steps, "seed": seed, "dataset": "scenes:train"}
            checkpoint = train(folder / "run", start, "grpo", its, prompts_of(arm, seed, size))
        evaluate(checkpoint, folder, size)
        write_json(folder / "done.json", settings)


def expert(folder: Path, start: Path, seed: int, completions: int, size: Size) -> Path:
    """Rounds of sampling with the model that there is, and training it on what was right."""
    rows = prompts_of("expert", seed, size)
    prompts = completions // EXPERT["samples"] // EXPERT["rounds"]
    if prompts * EXPERT["rounds"] > len(rows):
        sys.exit(f"{completions} completions take {prompts * EXPERT['rounds']} prompts; there are {len(rows)}.")
    for number in range(EXPERT["rounds"]):
        its, where = rows.select(range(number * prompts, (number + 1) * prompts)), folder / f"round-{number}"
        model, processor = load(start)
        sampler = SamplingPredictor(model, processor, num_samples=EXPERT["samples"], seed=seed)
        measure_pass_at_k(sampler, its, where / "samples", (1, EXPERT["samples"]), dataset_name="prompts")
        steps = max(1, size.steps // EXPERT["rounds"])
        right = with_right_samples(its, where / "samples")
        start = train(where / "run", start, "segmentation", supervised(steps, seed), right)
    return start


def evaluate(checkpoint: Path, folder: Path, size: Size) -> None:
    """Greedy answers on every split, and sampled ones of the scenes of the prediction."""
    model, processor = load(checkpoint)
    for split in SPLITS:
        rows = scenes.build(split, size.evaluated, seed=EVALUATION_SEED)
        where = folder / "evaluation" / split
        evaluate_dataset(
            ModelPredictor(model, processor), rows, where, batch_size=32, dataset_name=split, page_samples=0
        )
    sample(checkpoint, folder / "samples", folder.name, SAMPLES_AFTER, (1, SAMPLES_AFTER), size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predict", action="store_true", help="measure the starts and choose one")
    parser.add_argument("--evaluate-start", action="store_true", help="evaluate the chosen start as the arms are")
    parser.add_argument("--arm", choices=SEEDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--completions", type=int, help="of expert iteration: as many as `both` sampled on average")
    parser.add_argument("--smoke", action="store_true", help="two steps from the bundled checkpoint")
    given = parser.parse_args()
    size = SMOKE if given.smoke else COUNTED
    if given.predict:
        print(predict(size))
    elif given.evaluate_start:
        start = start_folder(size)
        with counted(size.folder / "start", {"start": str(start)}):
            evaluate(start, size.folder / "start", size)
            write_json(size.folder / "start" / "done.json", {"start": str(start)})
    elif given.arm is None:
        parser.error("name an --arm, or --predict.")
    elif given.seed not in SEEDS[given.arm]:
        parser.error(f"{given.arm} is run with the seeds {SEEDS[given.arm]}.")
    else:
        run_arm(given.arm, given.seed, given.completions, size)


if __name__ == "__main__":
    main()
