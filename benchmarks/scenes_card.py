"""Write the card of scenes-tiny from measured results, beside the checkpoint and into `model_cards/`; and the cards of
the models that are planned:

python benchmarks/scenes_card.py --results benchmarks/results/scenes.json --evaluation benchmarks/results/evaluation

`--results` is what `scenes_evaluation.py` wrote (ablations, baselines, sources of loss), `--evaluation` holds the
`summary.json` of each split by `examples/evaluate.py`, as `scenes-SPLIT.json`. Texts and template are those of
`segcompass_hf.hub` (`hub/publishing/templates`), the ones that `segcompass push` uses. `--explain` holds what
`scenes_dictionary.py` and `explain_faithfulness.py` wrote, and beside it lies `controls/` where they were measured.
"""

import argparse
import json
from pathlib import Path

from PIL import Image
from scenes_evaluation_report import markdown_report  # the sibling file

import segcompass_hf
from segcompass_hf.data import scenes
from segcompass_hf.hub import recipe_names, render_model_card, write_model_card

ROOT = Path(__file__).parents[1]
CARDS = ROOT / "model_cards"
KINDS = ("superlative", "relation", "no-target")  # of the examples on the page
COMMAND = (
    "python examples/evaluate.py --datasets scenes:val scenes:test_combinations scenes:test_pairs \\\n"
    "    scenes:test_compositions scenes:test_crowded --num-samples {num_samples} --batch-size {batch_size} \\\n"
    "    --baselines"
)


def examples() -> list[tuple]:
    """The first scene of each kind in the validation split."""
    rows = scenes.iterate("val", 200)
    first = {}
    for row in rows:
        first.setdefault(row["kind"], row)
        if set(KINDS) <= set(first):
            break
    return [(first[kind]["image"], first[kind]["instruction"]) for kind in KINDS]


def explanation_report(folder: Path) -> str:
    """Named concepts, the faithfulness of explanations and their controls, as sections of the card."""
    concepts = (folder / "scenes_dictionary.md").read_text(encoding="utf-8")
    faithfulness = (folder / "faithfulness.md").read_text(encoding="utf-8")
    concepts = concepts.replace("# Named concepts on Scenes", "### Named concepts", 1)
    report = f"{concepts}\n### Faithfulness of explanations\n\n{faithfulness}"
    controls = folder.parent / "controls" / "controls.md"
    if controls.exists():
        report += "\n##" + controls.read_text(encoding="utf-8")  # its title becomes a section's
    return report


def write_scenes_tiny(results: Path, evaluation: Path, explain: Path) -> None:
    checkpoint = segcompass_hf.bundled_checkpoint()
    measured = json.loads(results.read_text())
    runs = [json.loads((evaluation / f"scenes-{split}.json").read_text()) for split in measured["splits"]]
    command = COMMAND.format(**{name: runs[0]["settings"][name] for name in ("num_samples", "batch_size")})
    report = markdown_report(measured).replace("\n## ", "\n#### ").replace("# Scenes, held out", "### In detail", 1)
    report += "\n" + explanation_report(explain)
    (checkpoint / "examples").mkdir(exist_ok=True)
    picture = Image.open(ROOT / "docs" / "demo.jpg")  # of `segcompass demo`
    picture.thumbnail((800, 4000))
    picture.save(checkpoint / "examples" / "answers.jpg", quality=75)
    write_model_card(
        checkpoint,
        "scenes-tiny",
        evaluations=[{"command": command, **run} for run in runs],
        examples=examples(),
        figure="examples/answers.jpg",
        details=report,
    )
    pictures = checkpoint.relative_to(ROOT).as_posix()
    text = (checkpoint / "README.md").read_text(encoding="utf-8").replace("](examples/", f"](../{pictures}/examples/")
    (CARDS / "scenes-tiny.md").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/scenes.json")
    parser.add_argument("--evaluation", type=Path, default=ROOT / "benchmarks/results/evaluation")
    parser.add_argument("--explain", type=Path, default=ROOT / "benchmarks/results/explain")
    arguments = parser.parse_args()
    CARDS.mkdir(exist_ok=True)
    write_scenes_tiny(arguments.results, arguments.evaluation, arguments.explain)
    for name in set(recipe_names()) - {"scenes-tiny", "checkpoint"}:
        render_model_card(name).save(CARDS / f"{name}.md")
    print(CARDS)


if __name__ == "__main__":
    main()
