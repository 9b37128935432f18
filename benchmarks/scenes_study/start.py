"""The start that all arms of the ablation share: reference reasoning for three of the eight kinds of instruction.

    python examples/scenes_tiny/pretrain.py                      # VLM and SAM, which see no instruction
    python benchmarks/scenes_study/start.py strict
    python benchmarks/scenes_study/start.py cold
    python benchmarks/scenes_study/start.py practised    # goes on from the warm-up of `cold`, which must be there

`examples/scenes_tiny/recipe.yaml` with fewer steps and rows of the kinds that `STARTS` says. Resumable;
`runs/scenes-study/start-cold` holds one folder per stage, `segmentation` is the start.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runs import counted
from settings import PRETRAINED, RECIPE, RUNS, START_STEPS, STARTS, Start

from segcompass_hf.data import scenes
from segcompass_hf.data.scenes.dataset import to_row
from segcompass_hf.training import read_recipe, run_recipe
from segcompass_hf.training.recipe.record import DONE
from segcompass_hf.training.recipe.rows import StageRows
from segcompass_hf.training.recipe.settings import Recipe


class RowsOfKinds(Sequence):
    """Training scenes whose instructions are of some kinds, but for every `any_kind_every`-th; made when asked for."""

    def __init__(self, count: int, seed: int, kinds: tuple[str, ...] | None, any_kind_every: int | None = None):
        self.count, self.seed, self.kinds, self.any_kind_every = count, seed, kinds, any_kind_every

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        free = self.any_kind_every is not None and index % self.any_kind_every == 0
        scene = scenes.sample("train", index, self.seed, None if free else self.kinds)
        return to_row(scene, f"scenes-train-{self.seed}-{index:06d}", "train")


def folder_of(start: str) -> Path:
    return RUNS / f"start-{start}"


def recipe_of(start: str) -> Recipe:
    """The recipe with a start's steps and seeds, from the VLM that it goes on from."""
    its, vlm = STARTS[start], PRETRAINED / "vision"
    if its.goes_on_from is not None:
        vlm = folder_of(its.goes_on_from) / "warmup"
        if not (vlm / DONE).exists():
            sys.exit(f"{vlm} is not finished; run start.py {its.goes_on_from} first.")
    steps = {"warmup": its.warmup_steps, **START_STEPS}
    changes = [f"output_dir={folder_of(start)}", f"vlm={vlm}", f"sam={PRETRAINED / 'masks'}", f"seed={its.seed}"]
    changes += [f"{stage}.max_steps={count}" for stage, count in steps.items()]
    changes += [f"{stage}.lr_scheduler_kwargs.num_decay_steps={int(0.6 * steps[stage])}" for stage in DECAYING]
    return read_recipe(RECIPE, changes)


DECAYING = ("warmup", "segmentation")


def rows_of(its: Start, recipe: Recipe) -> dict[str, StageRows]:
    """Rows of every stage, each of its own scenes."""
    rows = {}
    for number, stage in enumerate(recipe.stages):
        count = stage.own.num_samples or stage.written["max_steps"] * stage.own.batch_size
        every = its.any_kind_every if stage.name == "warmup" else None
        rows[stage.name] = StageRows(RowsOfKinds(count, its.seed + number, its.kinds, every))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start", nargs="?", choices=STARTS, default="cold")
    given = parser.parse_args()
    its, recipe = STARTS[given.start], recipe_of(given.start)
    with counted(folder_of(given.start), dataclasses.asdict(its)):
        run_recipe(recipe, f"start.py {given.start}", print, rows=rows_of(its, recipe))


if __name__ == "__main__":
    main()
