r"""A run of the recipe of scenes-tiny beside another checkpoint, on the same held-out samples:

    make checkpoint                                     # into runs/scenes-tiny
    python examples/evaluate.py --model runs/scenes-tiny/checkpoint --baselines --output runs/scenes-tiny/evaluation \
        --num-samples 500 --batch-size 32 --datasets scenes:val scenes:test_combinations scenes:test_pairs \
        scenes:test_compositions scenes:test_crowded
    python examples/evaluate.py --model FOLDER --output out/evaluation ...    # the other one, the same options
    python benchmarks/scenes_recipe.py --run runs/scenes-tiny --other out/evaluation

Writes `scenes_recipe.md` and `.json` to `benchmarks/results`, and the curve of every stage to `scenes_recipe` there.
What is recorded there holds the run that made the bundled checkpoint against the one bundled before it, which the
former recipe made (commit 4d0a3a0: its folder `src/segcompass_hf/checkpoints/scenes-tiny`).
"""

import argparse
import json
from pathlib import Path

import numpy as np

from segcompass_hf.data.scenes.dataset import SPLITS
from segcompass_hf.evaluation import read_samples
from segcompass_hf.evaluation.records import score_of
from segcompass_hf.metrics.intervals import bootstrap_statistic
from segcompass_hf.training.recipe.record import DONE
from segcompass_hf.training.recipe.settings import STAGES

RESULTS = Path(__file__).parent / "results"
COMMANDS = [line[4:] for line in __doc__.split("\n\n")[1].splitlines()]


def evaluated(folder: Path, split: str) -> Path:
    """The only evaluation of a model on a split below `folder`; baselines have no configuration."""
    found = folder.glob(f"scenes-{split}/*/summary.json")
    found = [path.parent for path in found if "configuration" in json.loads(path.read_text())["settings"]["predictor"]]
    if len(found) != 1:
        raise SystemExit(f"{folder} holds {len(found)} evaluations of scenes-{split}; one is needed.")
    return found[0]


def compared(run: Path, other: Path, split: str) -> dict:
    """gIoU of both, and their difference over the same samples."""
    records = [read_samples(evaluated(folder, split)) for folder in (run / "evaluation", other)]
    names = [[record["sample_id"] for record in of] for of in records]
    if names[0] != names[1]:
        raise SystemExit(f"{split}: the two evaluations are of different samples; run both with the same options.")
    ours, theirs = (np.array([score_of(record).iou for record in of]) for of in records)
    values = {"recipe": ours, "other": theirs, "difference": ours - theirs}
    figures = {name: bootstrap_statistic(lambda draw, of=of: of[draw].mean(), len(of)) for name, of in values.items()}
    commit = json.loads((evaluated(run / "evaluation", split) / "summary.json").read_text())["commit"]
    return {"samples": len(ours), "commit": commit, **figures}


def curves_of(run: Path) -> dict[str, list[dict]]:
    """Stage -> what its trainer logged, of the recipe and of the two stages before it."""
    before = {name: run / name / "trainer_state.json" for name in ("vision", "masks")}
    curves = {name: json.loads(path.read_text())["log_history"] for name, path in before.items()}
    return curves | {
        name: json.loads((run / name / DONE).read_text())["log"] for name in STAGES if (run / name).exists()
    }


def _shown(figure: dict, form: str) -> str:
    return f"{figure['value']:{form}} [{figure['low']:{form}}, {figure['high']:{form}}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/scenes-tiny"), help="output of make checkpoint")
    parser.add_argument("--other", type=Path, default=Path("out/evaluation"), help="evaluation of the other one")
    given = parser.parse_args()
    figures = {split: compared(given.run, given.other, split) for split in SPLITS if split != "train"}
    (RESULTS / "scenes_recipe").mkdir(exist_ok=True)
    for name, log in curves_of(given.run).items():
        lines = "".join(json.dumps(line) + "\n" for line in log)
        (RESULTS / "scenes_recipe" / f"{name}.jsonl").write_text(lines)
    (RESULTS / "scenes_recipe.json").write_text(json.dumps(figures, indent=1) + "\n")
    lines = ["# The recipe of scenes-tiny, run from nothing", "", "```", *COMMANDS, "```", ""]
    samples = " and ".join(sorted({str(of["samples"]) for of in figures.values()}))
    lines += [
        f"gIoU on {samples} samples per split, greedy, own reasoning; 95 % intervals over samples, of the difference "
        "over the same samples. One run: how far a second one would be is not in the brackets. Curves: "
        "`scenes_recipe/STAGE.jsonl`. This run made the bundled checkpoint; the checkpoint before it is the former "
        "recipe's (curves: `scenes_tiny_training`).",
        "",
        "| split | this run | the checkpoint before | difference |",
        "|---|---|---|---|",
    ]
    for split, of in figures.items():
        forms = {"recipe": ".3f", "other": ".3f", "difference": "+.3f"}
        lines.append(f"| {split} | " + " | ".join(_shown(of[name], form) for name, form in forms.items()) + " |")
    (RESULTS / "scenes_recipe.md").write_text("\n".join([*lines, ""]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
