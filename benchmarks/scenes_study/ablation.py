"""One run of the ablation, trained and evaluated on every split:

    python benchmarks/scenes_study/ablation.py --arm both --seed 0
    python benchmarks/scenes_study/ablation.py                       # all arms and seeds, one after the other

Resumable. `--worker 0/2` and `--worker 1/2` in two shells share the list of runs. `--pilot NAME --set key=value ...`
tries other settings outside of the study. Records lie in `runs/scenes-study/arms/<arm>-<seed>`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from latent import FOLDER as LATENT_START
from latent import LatentQuerySegmentation
from runs import counted, write_json
from settings import ARM_STEPS, ARMS, EVALUATION_SAMPLES, EVALUATION_SEED, GRPO, RUNS, SEEDS, SPLITS
from start import FOLDER as START

from segcompass_hf import SegCompassForReasoningSegmentation, SegCompassProcessor
from segcompass_hf.data import scenes
from segcompass_hf.evaluation import ModelPredictor, evaluate_dataset
from segcompass_hf.training import SegCompassGRPOConfig, SegCompassGRPOTrainer

KEPT = (
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "rewards/mask_reward/mean",
    "format_share",
    "segmentation/giou",
    "kl",
    "entropy",
    "completions/mean_length",
    "grad_norm",
    "learning_rate",
)


def start_of(arm: str) -> Path:
    """Folder of the checkpoint that an arm starts from."""
    return (LATENT_START if arm == "latent" else START) / "joint"


def load(arm: str, folder: str | Path) -> SegCompassForReasoningSegmentation:
    kind = LatentQuerySegmentation if arm == "latent" else SegCompassForReasoningSegmentation
    return kind.from_pretrained(folder, dtype=torch.float32)


def train(arm: str, seed: int, folder: Path, steps: int, changes: dict[str, Any]) -> None:
    """GRPO from the shared start; writes the model to `folder/model` and the curve to `folder/history.json`."""
    if (folder / "history.json").is_file():
        return
    arguments = SegCompassGRPOConfig(
        folder / "training",
        max_steps=steps,
        seed=seed,
        gradient_checkpointing=False,
        bf16=False,
        logging_steps=1,
        save_steps=25,
        save_total_limit=1,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        **{**GRPO, **ARMS[arm], **changes},
    )
    prompts = steps * arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    trainer = SegCompassGRPOTrainer(
        load(arm, start_of(arm)),
        args=arguments,
        train_dataset=scenes.build("train", prompts // arguments.num_generations, seed=100 + seed),
        processing_class=SegCompassProcessor.from_pretrained(start_of(arm)),
    )
    trainer.train(resume_from_checkpoint=any((folder / "training").glob("checkpoint-*")))
    trainer.model.save_pretrained(folder / "model")
    trainer.processing_class.save_pretrained(folder / "model")
    steps_logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    write_json(folder / "history.json", [{k: entry.get(k) for k in ("step", *KEPT)} for entry in steps_logged])


def evaluate(arm: str, model_folder: Path, folder: Path, splits=SPLITS, samples: int = EVALUATION_SAMPLES) -> None:
    """Greedy answers on every split; one `samples.jsonl` each."""
    model = None
    for split in splits:
        if (folder / split / "samples.jsonl").is_file():
            continue
        if model is None:
            model = load(arm, model_folder).eval()
            predictor = ModelPredictor(model, SegCompassProcessor.from_pretrained(model_folder))
        rows = scenes.build(split, samples, seed=EVALUATION_SEED)
        evaluate_dataset(predictor, rows, folder / split, batch_size=32, dataset_name=split, page_samples=0)


def run(arm: str, seed: int) -> None:
    folder = RUNS / "arms" / f"{arm}-{seed}"
    if (folder / "done.json").is_file():
        return
    settings = {"arm": arm, "seed": seed, "steps": ARM_STEPS, **GRPO, **ARMS[arm]}
    with counted(folder, settings):
        train(arm, seed, folder, ARM_STEPS, {})
        evaluate(arm, folder / "model", folder / "evaluation")
        write_json(folder / "done.json", settings)


def evaluate_start(arm: str) -> None:
    """The start before any arm, under the same protocol."""
    folder = RUNS / "arms" / ("start-latent" if arm == "latent" else "start")
    with counted(folder, {"arm": arm, "steps": 0}):
        evaluate(arm, start_of(arm), folder / "evaluation")


def pilot(name: str, arm: str, seed: int, steps: int, changes: dict[str, Any]) -> None:
    folder = RUNS / "pilots" / name
    with counted(folder, {"arm": arm, "seed": seed, "steps": steps, **GRPO, **ARMS[arm], **changes}):
        train(arm, seed, folder, steps, changes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", choices=ARMS, help="only this arm")
    parser.add_argument("--seed", type=int, help="only this seed")
    parser.add_argument("--start", action="store_true", help="evaluate the start of --arm")
    parser.add_argument("--worker", default="0/1", help="this process's share of the runs, as INDEX/COUNT")
    parser.add_argument("--pilot", help="name of a run outside of the study")
    parser.add_argument("--steps", type=int, default=40, help="of a pilot")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of a pilot, as JSON")
    given = parser.parse_args()
    if given.pilot:
        changes = {key: json.loads(value) for key, value in (pair.split("=", 1) for pair in given.set)}
        pilot(given.pilot, given.arm or "both", given.seed or 0, given.steps, changes)
        return
    if given.start:
        evaluate_start(given.arm or "both")
        return
    chosen = [(arm, seed) for arm, seeds in SEEDS.items() for seed in seeds if given.arm in (None, arm)]
    chosen = [(arm, seed) for arm, seed in sorted(chosen, key=lambda one: one[1]) if given.seed in (None, seed)]
    index, count = map(int, given.worker.split("/"))
    mine = chosen[index::count]
    if len(mine) == 1:
        run(*mine[0])
        return
    for arm, seed in mine:  # a process each: memory of one run is gone before the next
        if subprocess.call([sys.executable, __file__, "--arm", arm, "--seed", str(seed)]):
            sys.exit(f"{arm}, seed {seed} failed; fix what its log says and run the same command again.")


if __name__ == "__main__":
    main()
