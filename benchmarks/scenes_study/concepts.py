"""One concept space: how shared concepts are for the paper's SAE and for each option, and what the options cost.

    python benchmarks/scenes_study/concepts.py per_token              # one option; --until sae for the SAE alone
    python benchmarks/scenes_study/concepts_report.py             # table and plot from the records

Every option is `examples/scenes_tiny/recipe.yaml`, shortened, behind its warm-up or one without the alignment of words
and patches; `concepts_settings.py` says what it changes and where these warm-ups lie (`--base`: elsewhere). Resumable.
`runs/scenes-study/concepts/OPTION` holds `sae.json` (joint AUC, Bridge Score, explained variance, L0) and `giou.json`.

    python benchmarks/scenes_study/concepts.py bundled            # measure the bundled checkpoint, train nothing
    python benchmarks/scenes_study/concepts.py previous --model FOLDER   # the one before: `git show 34115bb:...`
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from concepts_measure import harvest, measure
from concepts_settings import EVALUATED, FOLDER, MEASURED, OPTIONS, SEED, SHORT, WARMUPS, WHOLE
from runs import commit, counted, cpu_minutes, write_json
from settings import PRETRAINED, RECIPE
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText

from segcompass_hf import (
    SegCompassForReasoningSegmentation,
    SegCompassProcessor,
    SegCompassSae,
    bundled_checkpoint,
)
from segcompass_hf.data import scenes
from segcompass_hf.data.collator import SegmentationCollator
from segcompass_hf.evaluation import ModelPredictor, evaluate_dataset, read_samples
from segcompass_hf.evaluation.records import score_of
from segcompass_hf.training import read_recipe, run_recipe


def train(option: str, base: Path, until: str) -> Path:
    """The option's stages, its CPU time recorded; returns its folder."""
    folder, changes = FOLDER / option, OPTIONS[option][1]
    changes = (f"output_dir={folder}", f"vlm={base / 'warmup'}", f"sam={PRETRAINED / 'masks'}", *SHORT, *changes)
    if until == "sae":
        changes += ("segmentation=null",)
    with counted(folder, {"option": option, "until": until, "changes": changes}):
        run_recipe(read_recipe(RECIPE, changes), f"concepts.py {option}", print)
    return folder


def measure_sae(folder: Path, base: Path) -> dict[str, Any]:
    """The record of the option's SAE."""
    processor = SegCompassProcessor.from_pretrained(base / "warmup")
    vlm = AutoModelForImageTextToText.from_pretrained(base / "warmup", dtype=torch.float32).eval()
    sae = SegCompassSae.from_pretrained(folder / "sae", dtype=torch.float32).eval()
    tokens = harvest(vlm, processor, sae.config.layer, scenes.iterate("val", MEASURED, seed=SEED))
    return measure(sae, tokens) | {"token_accuracy": token_accuracy(vlm, processor)}


@torch.no_grad()
def token_accuracy(vlm, processor) -> float:
    """Share of the reference completions' tokens that the VLM puts first, teacher forced, on held-out scenes."""
    right = total = 0
    collate = SegmentationCollator(processor, inputs="language", with_masks=False)
    for batch in DataLoader(scenes.SceneRows("val", MEASURED, SEED), 32, collate_fn=collate):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        target = batch["labels"][:, 1:]
        hits = vlm(**inputs).logits[:, :-1].argmax(-1) == target
        right, total = right + int(hits[target != -100].sum()), total + int((target != -100).sum())
    return right / total


def measure_checkpoint(name: str, path: Path) -> None:
    """The record of a finished checkpoint, trained with the whole recipe."""
    model = SegCompassForReasoningSegmentation.from_pretrained(path, dtype=torch.float32).eval()
    processor, rows = SegCompassProcessor.from_pretrained(path), scenes.iterate("val", MEASURED, seed=SEED)
    record = measure(model.sae, harvest(model.vlm, processor, model.config.sae_layer, rows))
    facts = {"option": name, "commit": commit()}
    write_json(FOLDER / name / "sae.json", facts | record | {"token_accuracy": token_accuracy(model.vlm, processor)})
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
    parser.add_argument("--base", type=Path, help="run whose warm-up is started from, in place of the option's")
    options = parser.parse_args()
    if options.option in WHOLE:
        if options.option == "previous" and options.model is None:
            parser.error("previous: name the checkpoint's folder by --model")
        with counted(FOLDER / options.option, {"option": options.option, "stage": "measure"}):
            measure_checkpoint(options.option, options.model or bundled_checkpoint())
        return
    warmup, changes = OPTIONS[options.option]
    base, folder = options.base or WARMUPS[warmup], FOLDER / options.option
    facts = {"option": options.option, "warmup": warmup, "settings": changes, "commit": commit()}
    if not (folder / "sae.json").exists():
        train(options.option, base, "sae")
        with counted(folder, {"option": options.option, "stage": "measure"}):
            record = measure_sae(folder, base)
        write_json(folder / "sae.json", facts | record)
        print(f"{options.option}: {record['at_least_0.8']} of 13 concepts at 0.8 or more", flush=True)
    if options.until == "sae" or (folder / "giou.json").exists():
        return
    train(options.option, base, "giou")
    with counted(folder, {"option": options.option, "stage": "evaluate"}):
        record = measure_giou(folder / "segmentation", folder)
    write_json(folder / "giou.json", facts | record | {"cpu_minutes": cpu_minutes(folder)})


if __name__ == "__main__":
    main()
