"""Write the card of photos-small from measured results, beside the checkpoint and into `model_cards/`:

    segcompass demo --output out/demo
    python benchmarks/photos_small/card.py --demo out/demo

The results are those in `benchmarks/results/photos_small`: `evaluation.json` (the `summary.json` of
`examples/evaluate.py` on the held-out photographs), `listed_N.json`, of which the last counts, and what the other
programs of this folder and `segment_cost.py` wrote. The card says of those that are missing that they were not
measured. Its text is `card.yml`.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from PIL import Image

from segcompass_hf.commands.demo import PHOTOGRAPHS, read_photographs
from segcompass_hf.hub import write_model_card
from segcompass_hf.private_text import without_folders

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "checkpoints" / "photos-small"
# Result -> its title in the card; the texts beside the results have titles of their own.
SECTIONS = {
    "goals": "Goals",
    "listed": "What the model sees",
    "slots_of_another": "Slots of another sample",
    "concepts": "Concepts",
    "segment_cost": "Time and memory",
}
NUM_EXAMPLES = 3  # for the page's header
WIDTH = 800  # pixels of the picture of answers


def details(results: Path) -> str:
    """All sections, those without a result as not measured."""
    return "\n\n".join(f"### {title}\n\n{section(results, name)}" for name, title in SECTIONS.items())


def section(results: Path, name: str) -> str:
    """A result in Markdown, without its title, its own sections one level below the card's."""
    if name == "listed":
        tries = sorted(results.glob("listed_*.json"), key=lambda path: int(path.stem.removeprefix("listed_")))
        return listed(json.loads(tries[-1].read_text(encoding="utf-8"))) if tries else "Not measured."
    path = results / f"{name}.md"
    if not path.is_file():
        return "Not measured."
    text = re.sub(r"\A# .*\n", "", path.read_text(encoding="utf-8"))
    return without_folders(re.sub(r"^(#+ )", r"##\1", text, flags=re.MULTILINE).strip())


def listed(figures: dict[str, Any]) -> str:
    """What `listed.py` measured, in a paragraph."""
    f1, precision, recall = figures["f1"], figures["precision"], figures["recall"]
    scores = [(score, name) for name, score in figures["f1_of_category"].items()]
    never = ", ".join(name for score, name in scores if score == 0) or "none"
    best = ", ".join(name for score, name in sorted(scores, reverse=True)[:8])
    return (
        f"Of one question to each of {figures['photographs']} held-out photographs: the categories that the reasoning "
        f"lists against those that are there have a micro-F1 of {f1['value']:.3f} [{f1['low']:.3f}, {f1['high']:.3f}] "
        f"(precision {precision:.3f}, recall {recall:.3f}; 95 % interval over photographs). Best: {best}. Never right "
        f"here: {never}. Most categories are in a handful of photographs only."
    )


def answers(demo: Path) -> Image.Image:
    """The demo's photographs with their answers, under one another."""
    pictures = [Image.open(path).convert("RGB") for path in sorted(demo.glob("photograph_*.png"))]
    if not pictures:
        raise SystemExit(f"{demo} holds no photograph_*.png; run `segcompass demo --output {demo}` in a clone first.")
    pictures = [
        one.resize((WIDTH, round(one.height * WIDTH / one.width)), Image.Resampling.LANCZOS) for one in pictures
    ]
    whole = Image.new("RGB", (WIDTH, sum(one.height for one in pictures)), "white")
    top = 0
    for one in pictures:
        whole.paste(one, (0, top))
        top += one.height
    return whole


def write_card(checkpoint: Path, results: Path, cards: Path, demo: Path | None = None) -> None:
    """Write the card into the checkpoint's folder and, with pictures from there, into the folder of all cards."""
    _, photographs = read_photographs(ROOT / PHOTOGRAPHS)
    right = [one for one in photographs if not one.get("failure")][:NUM_EXAMPLES]
    examples = [(ROOT / PHOTOGRAPHS).parent / one["image"] for one in right]
    (checkpoint / "examples").mkdir(exist_ok=True)
    figure = checkpoint / "examples" / "answers.jpg"
    if demo is not None:
        answers(demo).save(figure, quality=80)
    summary = results / "evaluation.json"
    write_model_card(
        checkpoint,
        str(Path(__file__).with_suffix(".yml")),
        evaluations=[json.loads(summary.read_text(encoding="utf-8"))] if summary.is_file() else [],
        examples=[(path, one["instruction"]) for path, one in zip(examples, right, strict=True)],
        figure="examples/answers.jpg" if figure.is_file() else None,
        details=details(results),
    )
    text = (checkpoint / "README.md").read_text(encoding="utf-8")
    (cards / "photos-small.md").write_text(
        text.replace("](examples/", "](../checkpoints/photos-small/examples/"), encoding="utf-8"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/photos_small")
    parser.add_argument("--demo", type=Path, help="output of `segcompass demo`, for the picture of answers")
    given = parser.parse_args()
    write_card(CHECKPOINT, given.results, ROOT / "model_cards", given.demo)
    print(CHECKPOINT / "README.md")


if __name__ == "__main__":
    main()
