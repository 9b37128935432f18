"""The checkpoints that controls need: slots trained on a frozen random SAE, and on an SAE of another seed.

    python benchmarks/controls/checkpoints.py --run runs/scenes-tiny --output runs/controls

Both are `examples/scenes_tiny/recipe.yaml` from the warmed-up VLM and the SAM of a run of it (`make checkpoint`), with
keys that any recipe has; README.md beside this file says which and why. The segmentation stage is the recipe's own:
same scenes, seed and steps. Resumable, as recipes are.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModel, AutoProcessor

from segcompass_hf.data import scenes

NAMES = ("random_sae", "reseeded_sae")
RECIPE = Path("examples/scenes_tiny/recipe.yaml")
COUNTED = 200  # scenes of `val` on which active concepts are counted
SEED = 7  # of these
OTHER_SEED = 1  # of the reseeded SAE; the recipe's own is 0


@torch.no_grad()
def active_per_token(checkpoint: Path, num_samples: int = COUNTED) -> float:
    """L0 of a checkpoint as its slots see it: active concepts per token, reference reasoning included."""
    model = AutoModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    active = tokens = 0
    for row in scenes.iterate("val", num_samples, seed=SEED):
        inputs = processor(images=row["image"], instruction=row["instruction"], reasoning=row["reasoning"])
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values", "completion_mask")}
        active += len(model(**inputs, slots_alone=True, output_concepts=True).concepts.values)
        tokens += int(inputs["attention_mask"].sum())
    return active / tokens


def random_sae(l0: int) -> tuple[str, ...]:
    """Keys of a frozen random SAE: JumpReLU's thresholds start where every feature fires on a share `k / d_sae` of the
    tokens, and a learning rate of 0 leaves random directions and thresholds as they are."""
    keys = ("architecture=jumprelu", f"k={l0}", "learning_rate=0.0", "max_steps=1", "lr_scheduler_type=constant")
    keys += ("lr_scheduler_kwargs=null", "warmup_steps=0", "pair_loss=none", "resample_every=null")
    return (*(f"sae.{key}" for key in keys), "config.concept_threshold=0.0")


def recipe_changes(name: str, run: Path, output: Path, l0: int) -> Sequence[str]:
    """Keys set over the recipe's for one of the two checkpoints."""
    start = (f"output_dir={output / name}", f"vlm={run / 'warmup'}", f"sam={run / 'masks'}", "warmup=null")
    cache = (f"sae.cache_dir={run / 'activations'}",)
    return (*start, *cache, *(random_sae(l0) if name == "random_sae" else (f"sae.seed={OTHER_SEED}",)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/scenes-tiny"), help="of the recipe")
    parser.add_argument("--output", type=Path, default=Path("runs/controls"))
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="one of them")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="further keys, for a try")
    parser.add_argument("--dry-run", action="store_true", help="only check the recipes")
    options = parser.parse_args()
    l0 = max(1, round(active_per_token(options.run / "checkpoint")))
    for name in options.only:
        changes = [*recipe_changes(name, options.run, options.output, l0), *options.set]
        command = [sys.executable, "-m", "segcompass_hf.cli", "train", str(RECIPE)]
        command += [word for change in changes for word in ("--set", change)]
        print(shlex.join(command), flush=True)
        subprocess.run([*command, *(["--dry-run"] if options.dry_run else [])], check=True)


if __name__ == "__main__":
    main()
