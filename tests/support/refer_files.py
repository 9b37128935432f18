"""Tiny benchmarks in the REFER layout, written to a folder; every part can be replaced by a broken one."""

import json
import pickle
from pathlib import Path
from typing import Any

from PIL import Image

HEIGHT, WIDTH = 30, 40


def square(x: int, y: int, side: int) -> list[list[float]]:
    """Polygons of a square of `side * side` pixels whose first pixel is (x, y)."""
    return [[x, y, x + side, y, x + side, y + side, x, y + side]]


def image(image_id: int, height: int = HEIGHT, width: int = WIDTH) -> dict[str, Any]:
    name = f"COCO_train2014_{image_id:012d}.jpg"
    return {"id": image_id, "file_name": name, "height": height, "width": width}


def annotation(number: int, image_id: int, segmentation: Any = None, **fields) -> dict[str, Any]:
    segmentation = square(2, 3, 5) if segmentation is None else segmentation
    entry = {"id": number, "image_id": image_id, "segmentation": segmentation, "iscrowd": 0, "category_id": 1}
    return entry | fields


def ref(ref_id: int, image_id: int, ann_id: Any, texts: list[str], split: str = "train", **fields) -> dict[str, Any]:
    """A ref whose sentences have the ids `10 * ref_id`, `10 * ref_id + 1`, ..."""
    sentences = [
        {"sent_id": 10 * ref_id + place, "sent": text, "raw": text.upper(), "tokens": text.split()}
        for place, text in enumerate(texts)
    ]
    entry = {"ref_id": ref_id, "image_id": image_id, "ann_id": ann_id, "split": split, "sentences": sentences}
    return entry | {"sent_ids": [sentence["sent_id"] for sentence in sentences]} | fields


def write(
    root: Path, refs: Any, annotations: Any, images: list, name: str = "refcoco", split_by: str = "unc"
) -> tuple[Path, Path]:
    """Write a benchmark below `root` and its photographs.

    Args:
        root (`Path`): gets `name/` and `train2014/`.
        refs, annotations, images: entries as made above.
        name, split_by (`str`): of the benchmark.

    Returns:
        `tuple[Path, Path]`: `root` and the folder of the photographs.
    """
    folder, photographs = root / name, root / "train2014"
    folder.mkdir(parents=True, exist_ok=True)
    photographs.mkdir(exist_ok=True)
    if name == "grefcoco":
        (folder / f"grefs({split_by}).json").write_text(json.dumps(refs))
    else:
        (folder / f"refs({split_by}).p").write_bytes(pickle.dumps(refs, protocol=2))
    (folder / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    for entry in images:
        path = photographs / image(entry["id"])["file_name"]
        if not path.exists():
            Image.new("RGB", (entry["width"], entry["height"]), (90, 120, 60)).save(path)
    return root, photographs


def python2_pickle(value: Any) -> bytes:
    """Protocol 0 as Python 2 wrote it: `bytes` stand for its byte strings, `str` for its unicode texts."""
    return _python2(value) + b"."


def _python2(value: Any) -> bytes:
    if isinstance(value, dict):
        return b"(d" + b"".join(_python2(key) + _python2(item) + b"s" for key, item in value.items())
    if isinstance(value, list):
        return b"(l" + b"".join(_python2(item) + b"a" for item in value)
    if isinstance(value, bytes):
        return b"S" + repr(value)[1:].encode("ascii") + b"\n"
    if isinstance(value, str):
        return b"V" + value.encode("raw_unicode_escape") + b"\n"
    return b"L%dL\n" % value if value > 2**31 else b"I%d\n" % value
