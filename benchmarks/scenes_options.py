"""What each option of the public trainers does to gIoU: the recipe of scenes-tiny, shortened, with one left out.

    python benchmarks/scenes_options.py --run runs/scenes-tiny             # what is not done yet; then the table
    python benchmarks/scenes_options.py --run runs/scenes-tiny --report    # the table alone

Options of the segmentation stage are left out with new heads on the finished VLM, SAE and SAM of the run; those of the
warm-up and the SAE in a short run of all three stages from the run's `vision` and `masks`. One seed. gIoU on held-out
scenes of `val`, with the reference reasoning and with the model's own, 95 % intervals over scenes of the difference to
the run with every option. Resumable.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scenes_evaluation import ScenesEvaluator  # the sibling file
from transformers import AutoModel, AutoProcessor

from segcompass_hf.data import scenes
from segcompass_hf.files import write_whole
from segcompass_hf.metrics.intervals import bootstrap_interval
from segcompass_hf.pages import markdown_table
from segcompass_hf.training import read_recipe, run_recipe

RECIPE = Path("examples/scenes_tiny/recipe.yaml")
OUTPUT = Path("benchmarks/results/scenes_options")
SEED = 11  # of the held-out scenes
SHORT_SEGMENTATION = ("segmentation.max_steps=400", "segmentation.lr_scheduler_kwargs.num_decay_steps=240")
SHORT = (
    "warmup.max_steps=800",
    "warmup.lr_scheduler_kwargs.num_decay_steps=480",
    "sae.max_steps=800",
    "sae.num_samples=2000",
    *SHORT_SEGMENTATION,
)
KINDS = ("reference reasoning", "own reasoning")
# option -> keys of the recipe without it
OF_SEGMENTATION = {
    "every option": (),
    "slot pull": ("segmentation.slot_pull_weight=0", "segmentation.slots_first_share=0"),
    "slots first": ("segmentation.slots_first_share=0",),
    "heads only": ("segmentation.heads_only_share=0.25",),  # the share of slots first
    "codebook from the SAE": ("segmentation.codebook_init=keep",),
    "references dropped": ("segmentation.drop_references_share=0",),
    "Muon": ("segmentation.optimizer=trainer", "segmentation.learning_rate=2.0e-4"),
    "reasoning in the rows": ("segmentation.without=[reasoning]",),
}
OF_ALL_STAGES = {
    "every option": (),
    "reading loss": ("warmup.reading_weight=0",),
    "alignment at the SAE's layer": ("warmup.alignment_weight=0",),
    "alignment before the first layer": ("warmup.embedding_alignment_weight=0",),
    "shared top-k of pairs": ("sae.pair_loss=none",),
}


def trained(folder: Path, keys: tuple[str, ...]) -> Path:
    """Run the recipe with these keys, or what of it is not done; the checkpoint's folder."""
    recipe = read_recipe(RECIPE, (f"output_dir={folder}", *keys))
    return Path(run_recipe(recipe, f"scenes_options.py {folder.name}"))


@torch.inference_mode()
def scores(checkpoint: Path, num_samples: int) -> dict[str, list[float]]:
    """IoU of every held-out scene, with the reference reasoning and with the model's own."""
    model = AutoModel.from_pretrained(checkpoint, dtype=torch.float32)
    evaluator = ScenesEvaluator(model, AutoProcessor.from_pretrained(checkpoint))
    records = evaluator.evaluate_records(list(scenes.iterate("val", num_samples, seed=SEED)))
    return {name: [record["scores"][name].iou for record in records] for name in KINDS}


def measured(folder: Path, keys: tuple[str, ...], num_samples: int) -> None:
    record = folder / "scores.json"
    if not record.exists():
        found = scores(trained(folder, keys), num_samples)
        write_whole(record, json.dumps({"keys": keys, **found}))


def rows_of(runs: Path, names: Any) -> list[list[str]]:
    """A row per option: gIoU without it, and the difference to the run with all of them."""
    found = {name: runs / name.replace(" ", "_") / "scores.json" for name in names}
    found = {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}
    whole, rows = found.get("every option"), []
    for name, record in found.items():
        cells = []
        for kind in KINDS:
            ious = np.array(record[kind])
            change, low, high = bootstrap_interval(ious - np.array(whole[kind]))
            lost = "" if name == "every option" else f" ({change:+.3f} [{low:+.3f}, {high:+.3f}])"
            cells.append(f"{ious.mean():.3f}{lost}")
        rows.append([name, *cells])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/scenes-tiny"), help="a finished run of the recipe")
    parser.add_argument("--runs", type=Path, default=Path("runs/scenes-options"))
    parser.add_argument("--num-samples", type=int, default=200)
    parser.add_argument("--report", action="store_true", help="only the table")
    options = parser.parse_args()
    model = (f"model={options.run / 'checkpoint'}", "vlm=null", "sam=null", "warmup=null", "sae=null")
    groups = {
        "segmentation": (OF_SEGMENTATION, (*model, "segmentation.new_weights=true", *SHORT_SEGMENTATION)),
        "all": (OF_ALL_STAGES, (f"vlm={options.run / 'vision'}", f"sam={options.run / 'masks'}", *SHORT)),
    }
    title, _, *rest = __doc__.splitlines()
    text = [f"# {title}", "", "```", *rest[:2], "```", *rest[2:]]
    for group, (variants, keys) in groups.items():
        for name, changes in variants.items():
            if not options.report:
                measured(options.runs / group / name.replace(" ", "_"), (*keys, *changes), options.num_samples)
        table = rows_of(options.runs / group, variants)
        head = ["left out", *(f"gIoU, {kind}" for kind in KINDS)]
        text += ["", f"## Options of {'the segmentation stage' if group == 'segmentation' else 'warm-up and SAE'}", ""]
        text += [markdown_table(head, table)]
    write_whole(OUTPUT.with_suffix(".md"), "\n".join(text) + "\n")


if __name__ == "__main__":
    main()
