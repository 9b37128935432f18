"""ImageNet's classes as words for patches: what the classifier of the vision tower says of every place of a picture.

It gives words and patches to pictures without annotations. They are guesses: good for the warm-up's word-patch pairs
(`alignment_pairs: names`), never for evaluation; rows made of them say so in `source`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText

from segcompass_hf.data.builders.rows import make_row
from segcompass_hf.data.schema import encode_mask

SURE = 0.9  # probability of a word at a place of the map from which on it counts: right on 61 % of the image tokens
FEWEST = 2  # image tokens of a word: one alone is often a mistake
SOURCE = "imagenet-words"

# Word -> indices of ImageNet-1k, `a-b` with both ends. Of the 80 categories where a class is one of them for sure,
# else a further word; classes that are neither have none.
_CLASSES = {
    "bird": "7-24 80-100 127-146",
    "dog": "151-268",
    "cat": "281-285",
    "bear": "294-297",
    "sheep": "348-349",
    "cow": "345",
    "horse": "339",
    "zebra": "340",
    "elephant": "101 385-386",
    "airplane": "404 895",
    "clock": "409 530 892",
    "backpack": "414",
    "bottle": "440 720 737 898 907",
    "car": "436 468 511 609 627 656 661 751 817",
    "train": "466 547 705 820 829",
    "truck": "555 569 675 717 864 867",
    "bus": "654 779 874",
    "boat": "472 484 554 576 625 628 724 780 814 871 914",
    "bicycle": "444 671",
    "motorcycle": "665 670",
    "bench": "703",
    "tie": "906",
    "handbag": "748",
    "umbrella": "879",
    "skis": "795",
    "sports ball": "429 430 574 722 768 805 852 890",
    "tennis racket": "752",
    "wine glass": "572",
    "cup": "504 968",
    "bowl": "659 809",
    "spoon": "910",
    "banana": "954",
    "apple": "948",
    "orange": "950",
    "broccoli": "937",
    "hot dog": "934",
    "pizza": "963",
    "sandwich": "933",
    "donut": "931",
    "chair": "423 559 765 857",
    "couch": "831",
    "bed": "564",
    "dining table": "532",
    "toilet": "861",
    "tv": "851",
    "laptop": "620 681",
    "mouse": "673",
    "remote": "761",
    "keyboard": "508",
    "cell phone": "487",
    "microwave": "651",
    "oven": "827",
    "toaster": "859",
    "sink": "896",
    "refrigerator": "760",
    "book": "917",
    "vase": "883",
    "teddy bear": "850",
    "hair drier": "589",
    "traffic light": "920",
    "parking meter": "704",
    "potted plant": "738",
    "fish": "0-6 389-397",
    "lizard": "38-48",
    "snake": "52-68",
    "turtle": "33-37",
    "frog": "30-32",
    "spider": "72-77",
    "insect": "300-320",
    "butterfly": "321-326",
    "crab": "118-121",
    "monkey": "369-384",
    "rabbit": "330-332",
    "pig": "341-342",
    "lion": "291",
    "tiger": "292",
    "fox": "277-280",
    "wolf": "269-272",
    "mushroom": "947 991-997",
    "flower": "985-986",
    "lemon": "951",
    "strawberry": "949",
    "pineapple": "953",
    "cucumber": "943",
    "plate": "923",
    "bread": "930",
    "ice cream": "928",
    "mountain": "970",
    "beach": "978",
    "lake": "975",
    "valley": "979",
    "cliff": "972",
    "church": "497",
    "castle": "483",
    "bridge": "821 839 888",
    "fence": "489 716 912",
    "lamp": "846",
    "piano": "579 881",
    "guitar": "402 546",
    "drum": "541",
    "hat": "515 808",
    "shoe": "514 630 770 774",
    "sunglasses": "836 837",
    "camera": "732 759",
    "tent": "672",
    "bathtub": "435 876",
    "desk": "526",
    "bookcase": "453",
    "pillow": "721",
    "basket": "588 790",
    "bucket": "463",
    "tractor": "866",
}


def _indices(listed: str) -> list[int]:
    ends = [[int(end) for end in part.split("-")] for part in listed.split()]
    return [index for first, *last in ends for index in range(first, (last or [first])[0] + 1)]


WORD_OF_CLASS = {index: word for word, listed in _CLASSES.items() for index in _indices(listed)}


def patch_words(class_logits: torch.Tensor, sure: float = SURE, fewest: int = FEWEST) -> dict[str, np.ndarray]:
    """The words that a classifier is sure of, with the places of its map that show them.

    Args:
        class_logits (`torch.Tensor` of shape `(1000, rows, columns)`): Of ImageNet's classes at every place.
        sure (`float`, *optional*): Probability of a word, the sum of its classes', from which on a place shows it.
        fewest (`int`, *optional*): Places that a word needs.

    Returns:
        `dict[str, np.ndarray]`: Word -> bool `(rows, columns)`; a place has at most one word (`sure` is 0.5 or more).

    Raises:
        ValueError: There are not 1,000 classes, or `sure` is below 0.5.
    """
    if class_logits.shape[0] != 1000 or sure < 0.5:
        raise ValueError(f"got {class_logits.shape[0]} classes and sure={sure}; expected 1000 classes, 0.5 or more.")
    probabilities = class_logits.float().softmax(0)
    shown = {}
    for word, listed in _CLASSES.items():
        places = probabilities[_indices(listed)].sum(0) >= sure
        if places.sum() >= fewest:
            shown[word] = places.numpy()
    return shown


@torch.no_grad()
def class_logits(vision_tower: Any, classifier: dict[str, torch.Tensor], pixel_values: torch.Tensor) -> torch.Tensor:
    """The classifier at every place of the last map, `(batch, 1000, rows, columns)`, in place of its mean.

    Args:
        classifier (`dict`): `_fc.weight` `(1000, channels)` and `_fc.bias` `(1000,)`, as published.
        pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): As the VLM's image processor makes them.
    """
    states = vision_tower(pixel_values).last_hidden_state
    return torch.einsum("bchw,kc->bkhw", states, classifier["_fc.weight"]) + classifier["_fc.bias"][:, None, None]


def words_row(image: Image.Image, path: str, shown: dict[str, np.ndarray], image_id: str) -> dict[str, Any] | None:
    """A picture's words as a row: all of them are asked for, the largest first, each with the places that show it.

    It has no reasoning: what else is there is not known, and a list of these alone would teach to leave it out. `None`
    where there are no words.
    """
    words = sorted(shown, key=lambda word: -int(shown[word].sum()))
    masks = []
    for word in words:
        whole = Image.fromarray(shown[word].astype(np.uint8) * 255).resize(image.size, Image.Resampling.NEAREST)
        masks.append(encode_mask(np.asarray(whole) > 0))
    row = {"image": path, "instruction": ", ".join(words), "masks": masks, "image_id": image_id, "split": "warmup"}
    return make_row(**row, sample_id=f"words-{image_id}", source=SOURCE, kind="words") if words else None


def words_rows(pictures: list[tuple[str, str]], vlm: Path, classifier: Path) -> Iterator[dict[str, Any]]:
    """Rows with the words of pictures.

    Args:
        pictures (`list[tuple[str, str]]`): Path and image id of each.
        vlm (`Path`): Folder of the VLM, whose vision tower looks.
        classifier (`Path`): File of the classifier's weights, as `parts.py` leaves it.
    """
    weights = load_file(classifier)
    tower = AutoModelForImageTextToText.from_pretrained(vlm).model.vision_tower.eval()
    image_processor = AutoImageProcessor.from_pretrained(vlm)
    for path, image_id in pictures:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        pixels = image_processor(image, return_tensors="pt")["pixel_values"]
        row = words_row(image, path, patch_words(class_logits(tower, weights, pixels)[0]), image_id)
        if row is not None:
            yield row
