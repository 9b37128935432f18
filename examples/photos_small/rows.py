"""The rows of photos-small, from photographs with COCO's annotations:

    python examples/photos_small/rows.py --photos PHOTOS --output runs/photos-small

PHOTOS holds `things` and `people`, each with `images/` and `instances.json`: of `things` every object of the 80
categories is annotated, of `people` persons alone; what else is in those comes from `people.json` of `guesses.py` in
the output folder, and without it they are left out. 120 photographs of `things` are held out before anything else, by
the hashes of their file names; whatever looks like one of them is not trained on. The output gets the folder `rows`
with the splits `train` and `held_out`, and the pictures; the split `choosing` holds again what `train` asks about
whole photographs of `things`, for thresholds. For photographs that are all to be evaluated on there is
`--all-held-out`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from questions import Question, questions, reasoning
from seen import Seen, read_seen
from views import views

from segcompass_hf.data import BuildReport
from segcompass_hf.data.builders.coco_instances import CocoInstances
from segcompass_hf.data.builders.own_masks import union_of
from segcompass_hf.data.builders.photographs import Photographs
from segcompass_hf.data.builders.rows import dataset_from_rows, make_row
from segcompass_hf.images_segcompass import to_rgb_image

HELD_OUT = 120  # photographs of `things`
VIEWS = {"things": 4, "people": 1}  # of every training photograph, itself included
JPEG_QUALITY = 92
SAME_PICTURE = 8  # of 64 bits: photographs whose difference hashes differ in fewer show the same


def held_out_names(names: list[str], count: int = HELD_OUT) -> set[str]:
    """Files that are held out: those with the smallest hashes of their names. More pictures move only few."""
    return set(sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())[:count])


def look(image: Image.Image) -> int:
    """A difference hash, 64 bits: whether each of 8 x 8 cells is brighter than the one to its left."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=int)
    return int("".join("01"[bit] for bit in (grey[:, 1:] > grey[:, :-1]).ravel().astype(int)), 2)


def alike(one: int, others: list[int]) -> bool:
    return any((one ^ other).bit_count() < SAME_PICTURE for other in others)


class Folder:
    """Photographs with COCO's annotations.

    Args:
        root (`Path`): With the pictures in `images/`.
        annotations (`Path`, *optional*): A file of `guesses.py`; `instances.json` of the root when left out.
    """

    def __init__(self, root: Path, report: BuildReport, annotations: Path | None = None):
        self.root, self.source, self.guessed = root, root.name, annotations is not None
        path = annotations or root / "instances.json"
        photographs = Photographs(root / "images")
        self.instances = CocoInstances(path, report, photographs, renumber=True)
        self.names = {entry["id"]: entry["name"] for entry in self.instances.categories}
        self.files, self.looks = {}, {}
        for image_id, entry in self.instances.images.items():
            try:
                self.looks[image_id] = look(self.open(image_id))
            except ValueError as problem:  # it is not there, damaged, or of another size than its masks
                report.add(getattr(problem, "kind", "unreadable_image"), entry.get("file_name"), str(problem))
            else:
                self.files[image_id] = entry["file_name"]

    def open(self, image_id: Any) -> Image.Image:
        return to_rgb_image(self.instances.photograph(image_id))

    def seen(self, image_id: Any) -> Seen | None:
        return read_seen(self.instances, image_id, self.names)


def split(things: Folder, people: Folder | None, count: int | None = HELD_OUT) -> dict[str, list[tuple[Folder, Any]]]:
    """Photographs of the splits, `count` or all of `things` held out; `left_out` look like a held-out one."""
    names = list(things.files.values())
    chosen = set(names) if count is None else held_out_names(names, count)
    held_out = [(things, image_id) for image_id, name in things.files.items() if name in chosen]
    looks = [folder.looks[image_id] for folder, image_id in held_out]
    everything = [(folder, image_id) for folder in (things, people) if folder for image_id in folder.files]
    others = [(folder, i) for folder, i in everything if folder is people or folder.files[i] not in chosen]
    parts: dict[str, list] = {"train": [], "held_out": held_out, "left_out": []}
    for folder, image_id in others:
        parts["left_out" if alike(folder.looks[image_id], looks) else "train"].append((folder, image_id))
    return parts


def rows_of(
    folder: Folder, image_id: Any, split_name: str, image_path: Path, num_views: int = 1, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """The rows of a photograph and of further views of it, in the row schema; none where an object has no mask.

    Args:
        image_path (`Path`): Where the photograph lies; further views are written beside it.
        num_views (`int`, *optional*): Of the photograph, itself included.
    """
    seen = folder.seen(image_id)
    if seen is None:
        return
    dice, image = random.Random(f"{seed}-{folder.source}-{image_id}"), folder.open(image_id)
    for which, (view, shown) in enumerate(views(seen, image.size, num_views, dice)):
        part, path = view.of_image(image), image_path
        if which:
            path = image_path.with_stem(f"{image_path.stem}-{which}")
            part.save(path, quality=JPEG_QUALITY)
        for number, question in enumerate(questions(shown, part, dice, folder.guessed)):
            row = row_of(shown, question, part.size)
            place = {"image": str(path), "image_id": path.name, "split": split_name}
            named = {"sample_id": f"{folder.source}-{path.stem}-{number}", "source": f"photos-{folder.source}"}
            yield make_row(**row, **place, **named)


def row_of(seen: Seen, question: Question, size: tuple[int, int]) -> dict[str, Any]:
    """What the question adds to a row; `size` is (width, height) of the picture in pixels."""
    numbers = {id(thing): place for place, thing in enumerate(seen.things, start=1)}
    targets = [numbers[id(thing)] for thing in question.targets]
    others = [thing.rle for thing in seen.things if numbers[id(thing)] not in targets]
    crowds = [crowd.rle for crowd in seen.crowds if crowd.category == question.ignored]
    return {
        "instruction": question.instruction,
        "masks": [thing.rle for thing in question.targets],
        "distractor_masks": others,
        "ignore": union_of(crowds, size[::-1]),
        "instance_ids": targets,
        "kind": question.kind,
        "is_reasoning": question.kind in ("use", "no use", "group", "no group", "count", "except"),
        "reasoning": reasoning(seen, question),
    }


def build(photos: Path, output: Path, count: int | None = HELD_OUT, seed: int = 0) -> dict[str, Any]:
    """Write the splits; returns how many photographs and rows of each kind they have.

    Raises:
        ValueError: A photograph is in both, or looks as if it were.
    """
    report = BuildReport()
    guesses = output / "people.json"
    people = Folder(photos / "people", report, guesses) if guesses.is_file() else None
    parts, figures = split(Folder(photos / "things", report), people, count), {"left out": 0}
    figures["left out"] = len(parts.pop("left_out"))
    check_apart(parts["train"], parts["held_out"])
    target = output / "rows"
    parts, splits = {name: pictures for name, pictures in parts.items() if pictures}, {}
    for name, pictures in parts.items():
        rows = []
        for folder, image_id in pictures:
            path = target / "images" / folder.source / folder.files[image_id]
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder.root / "images" / folder.files[image_id], path)
            num_views = VIEWS[folder.source] if name == "train" else 1
            rows += rows_of(folder, image_id, name, path.resolve(), num_views, seed)
        random.Random(seed).shuffle(rows)
        splits[name] = rows
        if name == "train":
            whole = {("photos-things", folder.files[image_id]) for folder, image_id in pictures}
            again = [row | {"split": "choosing"} for row in rows if (row["source"], row["image_id"]) in whole]
            splits |= {"choosing": again} if again else {}
    for name, rows in splits.items():
        kinds = Counter(row["kind"] for row in rows)
        figures[name] = {"photographs": len({row["image_id"] for row in rows}), "rows": len(rows), "kinds": kinds}
        dataset_from_rows(rows, f"photos-{name}", report).save_to_disk(target / name)
    (target / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    (target / "figures.json").write_text(json.dumps(figures, indent=2))
    return figures


def check_apart(train: list[tuple[Folder, Any]], held_out: list[tuple[Folder, Any]]) -> None:
    """Make sure that no photograph of one is in the other, by file name or by look."""
    names = {folder.files[i] for folder, i in held_out}
    looks = [folder.looks[i] for folder, i in held_out]
    both = [folder.files[i] for folder, i in train if folder.files[i] in names or alike(folder.looks[i], looks)]
    if both:
        raise ValueError(f"{len(both)} photographs are in both splits, {both[0]} the first; the split is wrong.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/photos-small"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all-held-out", action="store_true", help="train on none of `things`")
    given = parser.parse_args()
    count = None if given.all_held_out else HELD_OUT
    print(json.dumps(build(given.photos, given.output, count, given.seed), indent=2))


if __name__ == "__main__":
    main()
