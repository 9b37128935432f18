"""One run of the ablation, trained and evaluated on every split:

    python benchmarks/scenes_study/ablation.py --round cold --arm both --seed 0
    python benchmarks/scenes_study/ablation.py                       # all rounds, arms and seeds, one after the other

Resumable. `--worker 0/2` and `--worker 1/2` in two shells share the list of runs. `--pilot NAME --set key=value ...`
tries other settings outside of the study. Records lie in `runs/scenes-study/arms/<round>/<arm>-<seed>`.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from latent import LatentQuerySegmentation, latent_folder
from runs import counted, write_json
from settings import ARMS, EVALUATION_SAMPLES, EVALUATION_SEED, GRPO, ROUNDS, RUNS, SPLITS, STARTS, Round
from start import folder_of

from segcompass_hf import SegCompassForReasoningSegmentation, SegCompassProcessor
from segcompass_hf.data import scenes
from segcompass_hf.data.schema import row_features
from segcompass_hf.evaluation import ModelPredictor, evaluate_dataset
from segcompass_hf.training import SegCompassGRPOConfig, SegCompassGRPOTrainer, SegmentationConfig, SegmentationTrainer

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
HEADS = ("codebook", "slot_mapper", "prompt_encoder", "mask_decoder")


def start_of(start: str, arm: str) -> Path:
    """Folder of the checkpoint that an arm starts from."""
    return (latent_folder(start) if arm == "latent" else folder_of(start)) / "segmentation"


def load(arm: str, folder: str | Path) -> SegCompassForReasoningSegmentation:
    kind = LatentQuerySegmentation if arm == "latent" else SegCompassForReasoningSegmentation
    model = kind.from_pretrained(folder, dtype=torch.float32)
    model.vlm.set_attn_implementation("eager")  # the fused kernel's backward is slow on CPUs at this size
    return model


def prompts_of(count: int, kinds: tuple[str, ...] | None, seed: int) -> Dataset:
    """So many training scenes, of these kinds."""
    if kinds is None:
        return scenes.build("train", count, seed=seed)
    every = scenes.iterate("train", 100 * count, seed=seed)
    rows = list(islice((row for row in every if row["kind"] in kinds), count))
    return Dataset.from_list(rows, features=row_features())


def train(its: Round, arm: str, seed: int, folder: Path, changes: dict[str, Any]) -> None:
    """One arm from the shared start; writes the model to `folder/model` and the curve to `folder/history.json`."""
    if (folder / "history.json").is_file():
        return
    settings = {**GRPO, **its.changes, **ARMS[arm], **changes}
    shared = {
        "output_dir": folder / "training",
        "max_steps": its.steps,
        "seed": seed,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_steps": 25,
        "save_total_limit": 1,
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
    }
    completions = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    prompts = completions // settings["num_generations"]  # of a step
    if arm == "reference":
        kept = {name: settings[name] for name in ("learning_rate", "lr_scheduler_type", "warmup_steps", "bf16")}
        frozen = {f"{part}_lr_factor": 0.0 for part in HEADS}
        weights = {"lm_loss_weight": 1.0, "seg_loss_weight": 0.0, "conf_loss_weight": 0.0}
        arguments = SegmentationConfig(per_device_train_batch_size=prompts, **shared, **kept, **frozen, **weights)
        kind = SegmentationTrainer
    else:
        arguments, kind = SegCompassGRPOConfig(**shared, **settings), SegCompassGRPOTrainer
    trainer = kind(
        load(arm, start_of(its.start, arm)),
        args=arguments,
        train_dataset=prompts_of(its.steps * prompts, its.kinds, 100 + seed),
        processing_class=SegCompassProcessor.from_pretrained(start_of(its.start, arm)),
    )
    trainer.train(resume_from_checkpoint=any((folder / "training").glob("checkpoint-*")))
    trainer.model.save_pretrained(folder / "model")
    trainer.processing_class.save_pretrained(folder / "model")
    steps_logged = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    write_json(folder / "history.json", [{k: entry.get(k) for k in ("step", *KEPT)} for entry in steps_logged])


def evaluate(arm: str, model_folder: Path, folder: Path, splits=SPLITS, samples: int = EVALUATION_SAMPLES) -> None:
    """Greedy answers on every split; one `samples.jsonl` each."""
    model = None
    for split in splits:
        if (folder / split / "samples.jsonl").is_file():
            continue
        if model is None:
            model = load(arm, model_folder).to("cuda" if torch.cuda.is_available() else "cpu").eval()
            predictor = ModelPredictor(model, SegCompassProcessor.from_pretrained(model_folder))
        rows = scenes.build(split, samples, seed=EVALUATION_SEED)
        evaluate_dataset(predictor, rows, folder / split, batch_size=32, dataset_name=split, page_samples=0)


def settings_of(its: Round, arm: str, seed: int) -> dict[str, Any]:
    shared = {"start": its.start, "arm": arm, "seed": seed, "steps": its.steps, "kinds": its.kinds}
    return {**shared, **GRPO, **its.changes, **ARMS[arm]}


def run(name: str, arm: str, seed: int) -> None:
    folder, its = RUNS / "arms" / name / f"{arm}-{seed}", ROUNDS[name]
    if (folder / "done.json").is_file():
        return
    settings = settings_of(its, arm, seed)
    with counted(folder, settings):
        train(its, arm, seed, folder, {})
        evaluate(arm, folder / "model", folder / "evaluation")
        write_json(folder / "done.json", settings)


def evaluate_start(start: str, arm: str) -> None:
    """A start before any arm, under the same protocol."""
    folder = RUNS / "arms" / start / ("start-latent" if arm == "latent" else "start")
    with counted(folder, {"start": start, "arm": arm, "steps": 0}):
        evaluate(arm, start_of(start, arm), folder / "evaluation")


def pilot(name: str, its: Round, arm: str, seed: int, changes: dict[str, Any]) -> None:
    folder = RUNS / "pilots" / name
    with counted(folder, {**settings_of(its, arm, seed), **changes}):
        train(its, arm, seed, folder, changes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--round", choices=ROUNDS, help="only this round")
    parser.add_argument("--arm", choices=ARMS, help="only this arm")
    parser.add_argument("--seed", type=int, help="only this seed")
    parser.add_argument("--evaluate-start", choices=STARTS, help="evaluate this start, as --arm begins from it")
    parser.add_argument("--worker", default="0/1", help="this process's share of the runs, as INDEX/COUNT")
    parser.add_argument("--pilot", help="name of a run outside of the study")
    parser.add_argument("--steps", type=int, default=40, help="of a pilot")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of a pilot, as JSON")
    given = parser.parse_args()
    if given.pilot:
        changes = {key: json.loads(value) for key, value in (pair.split("=", 1) for pair in given.set)}
        its = dataclasses.replace(ROUNDS[given.round or "cold"], steps=given.steps)
        pilot(given.pilot, its, given.arm or "both", given.seed or 0, changes)
        return
    if given.evaluate_start:
        evaluate_start(given.evaluate_start, given.arm or "both")
        return
    chosen = [(seed, name, arm) for name, its in ROUNDS.items() for arm, seeds in its.seeds.items() for seed in seeds]
    for position, wanted in enumerate((given.seed, given.round, given.arm)):
        chosen = [one for one in chosen if wanted in (None, one[position])]
    index, count = map(int, given.worker.split("/"))
    mine = sorted(chosen)[index::count]
    if len(mine) == 1:
        seed, name, arm = mine[0]
        run(name, arm, seed)
        return
    for seed, name, arm in mine:  # a process each: memory of one run is gone before the next
        if subprocess.call([sys.executable, __file__, "--round", name, "--arm", arm, "--seed", str(seed)]):
            sys.exit(f"{name}, {arm}, seed {seed} failed; fix what its log says and run the same command again.")


if __name__ == "__main__":
    main()
