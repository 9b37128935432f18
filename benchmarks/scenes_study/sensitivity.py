"""What the result is sensitive to: concept threshold, d_sae, K, L, l1 and the SAE's family, one factor at a time.

    python benchmarks/scenes_study/sensitivity.py            # run what is not done yet, then --report
    python benchmarks/scenes_study/sensitivity.py --report   # table and plot from the records

Every setting is `examples/scenes_tiny/recipe.yaml`, shortened (SAE and segmentation), from VLM and SAM of one
checkpoint, with one key changed. Resumable. The same command in a second terminal shares the work: a setting is run by
one process at a time. With more objects than K slots the smallest are united in training; gIoU compares unions, so
that no answer is out of reach. Top-k families choose by themselves and get no threshold. One seed. Layers above the
SAE and the mask decoder were trained with the checkpoint's concepts before, which may favour the default; with L = 3
the SAE reads one of those layers.
"""

import argparse
import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from concepts_settings import SHORT
from runs import commit, counted, cpu_minutes, write_json
from sensitivity_report import report
from settings import EVALUATION_SEED, RECIPE, RUNS
from transformers import AutoModel, AutoProcessor

from segcompass_hf.data import scenes
from segcompass_hf.explain.claims.measure import IMAGE_PLACES, TEXT_PLACES, measure_claims
from segcompass_hf.metrics.intervals import bootstrap_statistic
from segcompass_hf.training import read_recipe, run_recipe
from segcompass_hf.training.recipe.record import DONE
from segcompass_hf.training.recipe.settings import Recipe

FOLDER = RUNS / "sensitivity"
EVALUATED = 300  # scenes
DEFAULT = "default"
NO_THRESHOLD = "config.concept_threshold=0.0"
NO_RESAMPLING = "sae.resample_every=null"  # for `standard` alone
# factor -> value -> keys of the recipe; what is not named is the default's. The families' sparsity weights are those
# with which benchmarks/sae_architectures.py came to about the default's L0.
FACTORS: dict[str, dict[Any, tuple[str, ...]]] = {
    "d_sae": {size: (f"sae.d_sae={size}",) for size in (256, 4096)},
    "K (slots)": {number: (f"config.num_slots={number}",) for number in (2, 6)},
    "L (SAE layer)": {layer: (f"sae.sae_layer={layer}",) for layer in (1, 3)},
    "l1": {weight: (f"sae.l1_coefficient={weight}",) for weight in (0.25, 4.0)},
    "SAE family": {
        "gated": ("sae.architecture=gated", NO_RESAMPLING, "sae.l1_coefficient=1.4"),
        "jumprelu": ("sae.architecture=jumprelu", NO_RESAMPLING, "sae.l1_coefficient=0.1", "sae.k=26"),
        "topk": ("sae.architecture=topk", NO_RESAMPLING, "sae.k=13", NO_THRESHOLD),
        "batchtopk": ("sae.architecture=batchtopk", NO_RESAMPLING, "sae.k=13", NO_THRESHOLD),
    },
    "threshold, trained with": {tau: (f"config.concept_threshold={tau}",) for tau in (0.0, 1.0)},
}
DEFAULTS = {
    "d_sae": 1024,
    "K (slots)": 4,
    "L (SAE layer)": 2,
    "l1": 1.0,
    "SAE family": "standard",
    "threshold, trained with": 0.25,
    "threshold, set afterwards": 0.25,
}
THRESHOLDS = (0.0, 0.1, 0.5, 1.0, 2.0)  # set afterwards, on the default's model


def settings() -> Iterator[tuple[str, str | None, Any, tuple[str, ...]]]:
    """Name, factor, value and changed keys of every setting that is trained, the default first."""
    yield DEFAULT, None, None, ()
    for factor, values in FACTORS.items():
        for value, changes in values.items():
            yield _name(factor, value), factor, value, changes


def _name(factor: str, value: Any) -> str:
    return f"{factor}-{value}".replace(" ", "_").replace(",", "").replace("(", "").replace(")", "")


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Whether the setting is ours to run: no other process has it, and it is not done. Freed when we end."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield not (folder / "record.json").exists()


def recipe_of(folder: Path, model: str, changes: Sequence[str], scale: float = 1.0) -> Recipe:
    """The shortened recipe of a setting."""
    start = (f"output_dir={folder}", f"model={model}", "vlm=null", "sam=null", "sae.pair_loss=none")
    recipe = read_recipe(RECIPE, (*start, *SHORT, *changes))
    for stage in recipe.stages:
        stage.written["max_steps"] = max(2, round(scale * stage.written["max_steps"]))
    return recipe


def evaluate(folder: Path, num_samples: int, threshold: float | None = None) -> dict[str, Any]:
    """Held-out figures of a setting's model, reasoning by itself, greedily."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModel.from_pretrained(folder / "segmentation", dtype=torch.float32).to(device).eval()
    processor = AutoProcessor.from_pretrained(folder / "segmentation")
    if threshold is not None:
        model.config.concept_threshold = threshold
    rows = scenes.iterate("val", num_samples, seed=EVALUATION_SEED)
    records = list(measure_claims(model, processor, rows))
    ious = np.array([record.iou for record in records])
    places = (*TEXT_PLACES, *IMAGE_PLACES)
    tokens, features = (
        sum(getattr(record, name)[place] for record in records for place in places) for name in ("tokens", "features")
    )
    log = json.loads((folder / "sae" / DONE).read_text())["log"]
    return {
        "giou": bootstrap_statistic(lambda draw: ious[draw].mean(), len(ious)),
        "ious": ious.tolist(),
        "features_per_token": features / tokens,
        "sae": next(entry for entry in log if "explained_variance" in entry),
    }


def run(options: argparse.Namespace) -> None:
    for name, factor, value, changes in settings():
        if name not in (options.only or [name]):
            continue
        folder = options.runs / name
        with claimed(folder) as ours:
            if not ours:
                continue
            print(f"{name}: {', '.join(changes) or 'no change'}", flush=True)
            recipe = recipe_of(folder, options.model, changes, options.scale)
            with counted(folder, {"changes": changes}):
                run_recipe(recipe, f"sensitivity.py {name}")
                figures = evaluate(folder, options.num_samples)
            stages = {stage.name: {"steps": stage.written["max_steps"]} for stage in recipe.stages}
            record = {"factor": factor, "value": value, "stages": stages, "commit": commit(), **figures}
            write_json(folder / "record.json", record | {"cpu_minutes": cpu_minutes(folder)})
            for checkpoint in folder.glob("*/checkpoint-*"):
                shutil.rmtree(checkpoint, ignore_errors=True)
    if not (options.runs / DEFAULT / "record.json").exists():
        print("thresholds set afterwards wait for the default's model: run this again when it is done.")
        return
    for threshold in THRESHOLDS:
        folder = options.runs / _name("threshold set afterwards", threshold)
        with claimed(folder) as ours:
            if ours:
                print(folder.name, flush=True)
                with counted(folder, {"concept_threshold": threshold}):
                    figures = evaluate(options.runs / DEFAULT, options.num_samples, threshold)
                record = {"factor": "threshold, set afterwards", "value": threshold, "commit": commit(), **figures}
                write_json(folder / "record.json", record | {"cpu_minutes": cpu_minutes(folder)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only the table and the plot, of what is done")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="settings to train, as their folders are called")
    parser.add_argument("--runs", type=Path, default=FOLDER)
    parser.add_argument("--model", default="bundled", help="whose VLM and SAM: a checkpoint's folder, or `bundled`")
    parser.add_argument("--num-samples", type=int, default=EVALUATED)
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of steps, for a try")
    parser.add_argument("--output", type=Path, help="path without ending; benchmarks/results when left out")
    options = parser.parse_args()
    if not options.report:
        run(options)
    names = [name for name, *_ in settings()] + [_name("threshold set afterwards", value) for value in THRESHOLDS]
    report(options.runs, names, DEFAULTS, options.output)


if __name__ == "__main__":
    main()
