"""One concept space: how shared concepts are for the paper's SAE and for each option, and what the options cost.

    python benchmarks/scenes_study/concepts.py per_token --base RUN   # one option; --until sae for the SAE alone
    python benchmarks/scenes_study/concepts_report.py             # table and plot from the records

Every option is the same shortened recipe (SAE, slots, joint stage) behind the recipe's plain warm-up or its stage
`words`, which goes on from there with concept words; `concepts_settings.py` says what it changes. `--base` holds
those stages: the output of `examples/train_scenes_tiny.py`. Resumable. `runs/scenes-study/concepts/OPTION` holds
`sae.json` (joint AUC, Bridge Score, explained variance, L0) and `giou.json`.

    python benchmarks/scenes_study/concepts.py bundled            # measure the bundled checkpoint, train nothing
    python benchmarks/scenes_study/concepts.py previous --model FOLDER   # the one before: `git show 34115bb:...`
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from concepts_measure import harvest, measure
from concepts_settings import EVALUATED, FOLDER, MEASURED, OPTIONS, SEED, STAGES, WARMUPS, WHOLE
from runs import commit, counted, cpu_minutes, write_json
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText

from segcompass_hf import (
    SegCompassForReasoningSegmentation,
    SegCompassProcessor,
    SegCompassSae,
    bundled_checkpoint,
)
from segcompass_hf.data import scenes
from segcompass_hf.evaluation import ModelPredictor, evaluate_dataset, read_samples
from segcompass_hf.evaluation.records import score_of
from segcompass_hf.training.scenes_batches import SceneCollator, SceneSamples
from segcompass_hf.training.scenes_parts import build_processor
from segcompass_hf.training.scenes_recipe import LOG, SAE_LAYER, run_stage


def prepare(option: str, base: Path) -> Path:
    """The option's folder, with what its stages start from."""
    folder = FOLDER / option
    folder.mkdir(parents=True, exist_ok=True)
    for place, source in (("warmup", base / WARMUPS[OPTIONS[option][0]]), ("masks", base / "masks")):
        if not (source / LOG).exists():
            raise SystemExit(f"{source} holds no finished stage; run examples/train_scenes_tiny.py, or name --base.")
        link = folder / place
        if link.is_symlink() and link.resolve() != source.resolve():
            raise SystemExit(f"{link} leads to {link.resolve()}, not to {source}; remove {folder} to start anew.")
        if not link.exists():
            link.symlink_to(source.resolve())
    return folder


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
    return measure(sae, tokens) | {"token_accuracy": token_accuracy(vlm)}


@torch.no_grad()
def token_accuracy(vlm) -> float:
    """Share of the reference completions' tokens that the VLM puts first, teacher forced, on held-out scenes."""
    right = total = 0
    collate = SceneCollator(build_processor().tokenizer)
    for batch in DataLoader(SceneSamples(MEASURED, split="val", seed=SEED), 32, collate_fn=collate):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        target = batch["labels"][:, 1:]
        hits = vlm(**inputs).logits[:, :-1].argmax(-1) == target
        right, total = right + int(hits[target != -100].sum()), total + int((target != -100).sum())
    return right / total


def measure_checkpoint(name: str, path: Path) -> None:
    """The record of a finished checkpoint, trained with the whole recipe."""
    model = SegCompassForReasoningSegmentation.from_pretrained(path, dtype=torch.float32).eval()
    rows = scenes.iterate("val", MEASURED, seed=SEED)
    record = measure(model.sae, harvest(model.vlm, build_processor(), model.config.sae_layer, rows))
    facts = {"option": name, "commit": commit()}
    write_json(FOLDER / name / "sae.json", facts | record | {"token_accuracy": token_accuracy(model.vlm)})
    write_json(FOLDER / name / "giou.json", facts | measure_giou(path, FOLDER / name))


def measure_giou(path: Path, folder: Path) -> dict[str, Any]:
    """gIoU with the model's own greedy reasoning; paired over options by the order of the scenes."""
    model = SegCompassForReasoningSegmentation.from_pretrained(path, dtype=torch.float32)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    predictor = ModelPredictor(model, SegCompassProcessor.from_pretrained(path))
    rows = scenes.build("val", EVALUATED, seed=SEED)
    evaluate_dataset(predictor, rows, folder / "evaluation", batch_size=32, dataset_name="val", page_samples=0)
    samples = sorted(read_samples(folder / "evaluation"), key=lambda sample: sample["index"])
    return {"ious": [score_of(sample).iou for sample in samples]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("option", choices=[*OPTIONS, *WHOLE])
    parser.add_argument("--until", choices=("sae", "giou"), default="giou", help="what to measure last")
    parser.add_argument("--model", type=Path, help="of `previous`: the checkpoint's folder")
    parser.add_argument("--base", type=Path, default=Path("runs/scenes-tiny"), help="warm-ups and SAM")
    options = parser.parse_args()
    if options.option in WHOLE:
        if options.option == "previous" and options.model is None:
            parser.error("previous: name the checkpoint's folder by --model")
        with counted(FOLDER / options.option, {"option": options.option, "stage": "measure"}):
            measure_checkpoint(options.option, options.model or bundled_checkpoint())
        return
    folder = prepare(options.option, options.base)
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
        record = measure_giou(folder / "joint", folder)
    write_json(folder / "giou.json", facts | record | {"cpu_minutes": cpu_minutes(folder)})


if __name__ == "__main__":
    main()
