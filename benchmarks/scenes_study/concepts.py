"""One concept space: how shared concepts are for the paper's SAE and for each option, and what the options cost.

    python benchmarks/scenes_study/concepts.py per_token          # one option; --until sae for the SAE alone
    python benchmarks/scenes_study/concepts_report.py             # table and plot from the records

Every option is the same shortened recipe (SAE, slots, joint stage) behind a plain warm-up or one that went on with
concept words for 300 steps; `concepts_settings.py` says what it changes. Needs the vision tower and SAM of `start.py`;
the warm-ups are trained where no finished ones are given. Resumable. `runs/scenes-study/concepts/OPTION` holds
`sae.json` (joint AUC, Bridge Score, explained variance, L0) and `giou.json`.

    python benchmarks/scenes_study/concepts.py bundled            # measure the bundled checkpoint, train nothing
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from concepts_measure import harvest, measure
from concepts_settings import EVALUATED, FOLDER, MEASURED, OPTIONS, SEED, STAGES, WARMUPS
from runs import commit, counted, cpu_minutes, write_json
from settings import RUNS
from transformers import AutoModelForImageTextToText

from segcompass_hf import (
    SegCompassForReasoningSegmentation,
    SegCompassProcessor,
    SegCompassSae,
    bundled_checkpoint,
)
from segcompass_hf.data import scenes
from segcompass_hf.evaluation import ModelPredictor, evaluate_dataset
from segcompass_hf.training.scenes_parts import build_processor
from segcompass_hf.training.scenes_recipe import LOG, SAE_LAYER, run_stage


def prepare(option: str, start: Path, finished: dict[str, Path]) -> Path:
    """The option's folder, with what its stages start from: SAM, and a warm-up that is trained where it is missing."""
    folder = FOLDER / option
    folder.mkdir(parents=True, exist_ok=True)
    _link(folder / "warmup", _warmup(OPTIONS[option][0], start, finished))
    _link(folder / "masks", start / "masks")
    return folder


def _warmup(name: str, start: Path, finished: dict[str, Path]) -> Path:
    """Folder of one of the two warm-ups. That with concept words starts where the plain one ended."""
    if name in finished:
        return finished[name]
    folder = FOLDER / f"warmup-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "warmup" / LOG).exists():
        _link(folder / "vision", start / "vision" if name == "plain" else _warmup("plain", start, finished))
        with counted(folder, dataclasses.asdict(WARMUPS[name])):
            run_stage("warmup", folder, WARMUPS[name])
    return folder / "warmup"


def _link(place: Path, source: Path) -> None:
    if not (source / LOG).exists():
        raise SystemExit(f"{source} holds no finished stage; run benchmarks/scenes_study/start.py first.")
    if not place.exists():
        place.symlink_to(source.resolve())


def run(stage: str, option: str, folder: Path) -> None:
    """One stage, its CPU time recorded."""
    settings = dataclasses.replace(STAGES[stage], options=OPTIONS[option][1].get(stage))
    with counted(folder, {"option": option, "stage": stage} | dataclasses.asdict(settings)):
        run_stage(stage, folder, settings)


def measure_sae(folder: Path) -> dict[str, Any]:
    """The record of the option's SAE."""
    vlm = AutoModelForImageTextToText.from_pretrained(folder / "warmup", dtype=torch.float32).eval()
    sae = SegCompassSae.from_pretrained(folder / "sae", dtype=torch.float32).eval()
    tokens = harvest(vlm, build_processor(), SAE_LAYER, scenes.iterate("val", MEASURED, seed=SEED))
    log = [json.loads(line) for line in (folder / "warmup" / LOG).read_text().splitlines()]
    accuracy = [entry["token_accuracy"] for entry in log if "token_accuracy" in entry]
    return measure(sae, tokens) | {"token_accuracy": accuracy[-1]}


def measure_bundled() -> None:
    """The record of the checkpoint that ships with the package, whatever it was trained with."""
    model = SegCompassForReasoningSegmentation.from_pretrained(bundled_checkpoint(), dtype=torch.float32).eval()
    rows = scenes.iterate("val", MEASURED, seed=SEED)
    record = measure(model.sae, harvest(model.vlm, build_processor(), model.config.sae_layer, rows))
    write_json(FOLDER / "bundled" / "sae.json", {"option": "bundled", "commit": commit()} | record)


def measure_giou(folder: Path) -> dict[str, Any]:
    """gIoU with the model's own greedy reasoning; paired over options by the order of the scenes."""
    model = SegCompassForReasoningSegmentation.from_pretrained(folder / "joint", dtype=torch.float32).eval()
    predictor = ModelPredictor(model, SegCompassProcessor.from_pretrained(folder / "joint"))
    rows = scenes.build("val", EVALUATED, seed=SEED)
    evaluate_dataset(predictor, rows, folder / "evaluation", batch_size=32, dataset_name="val", page_samples=0)
    samples = [json.loads(line) for line in (folder / "evaluation" / "samples.jsonl").read_text().splitlines()]
    return {"ious": [sample["iou"] for sample in sorted(samples, key=lambda sample: sample["index"])]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("option", choices=[*OPTIONS, "bundled"])
    parser.add_argument("--until", choices=("sae", "giou"), default="giou", help="what to measure last")
    parser.add_argument("--start", type=Path, default=RUNS / "start", help="of start.py: its vision tower and SAM")
    parser.add_argument("--plain", type=Path, help="a finished plain warm-up, in place of training it")
    parser.add_argument("--concept-words", type=Path, help="a finished warm-up with concept words, likewise")
    options = parser.parse_args()
    if options.option == "bundled":
        measure_bundled()
        return
    finished = {"plain": options.plain, "concept_words": options.concept_words}
    folder = prepare(options.option, options.start, {name: path for name, path in finished.items() if path})
    warmup, changes = OPTIONS[options.option]
    facts = {"option": options.option, "warmup": warmup, "settings": changes, "commit": commit()}
    if not (folder / "sae.json").exists():
        run("sae", options.option, folder)
        with counted(folder, {"option": options.option, "stage": "measure"}):
            record = measure_sae(folder)
        write_json(folder / "sae.json", facts | record)
        print(f"{options.option}: {record['at_least_0.8']} of 13 concepts at 0.8 or more", flush=True)
    if options.until == "sae" or (folder / "giou.json").exists():
        return
    for stage in ("slots", "joint"):
        run(stage, options.option, folder)
    with counted(folder, {"option": options.option, "stage": "evaluate"}):
        record = measure_giou(folder)
    write_json(folder / "giou.json", facts | record | {"cpu_minutes": cpu_minutes(folder)})


if __name__ == "__main__":
    main()
