"""MobileSAM with its real weights: against its own ONNX files, and boxes around the objects of photographs to masks:

    pip install onnx onnxruntime
    python benchmarks/real_parts/mobile_sam_check.py --samples SAMPLES

SAMPLES is a folder of photographs with annotations in the layout of gRefCOCO (`grefcoco/`, `images/`). A mask is
compared with that of the object whose annotated box was the prompt.
"""

import argparse
import statistics
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from mobile_sam import fetch, published_weights  # noqa: E402
from packages import CACHE  # noqa: E402

from segcompass_hf.data import build_grefcoco  # noqa: E402
from segcompass_hf.data.schema import decode_masks  # noqa: E402
from segcompass_hf.evaluation.predictors.sam_prompts import PromptedSam, SamPrompt  # noqa: E402
from segcompass_hf.hub import load_original_sam  # noqa: E402

CANVASES = (1024, 512)  # pixels
SPLITS = ("train", "val")
POINTS = ((500.0, 400.0), (520.0, 430.0))  # on a canvas of 1024 pixels


def differences(cache: Path) -> dict[str, float]:
    """Largest differences to the ONNX files, which are for 1024 pixels, and the mean size of what is compared."""
    import onnxruntime

    encoder, decoder = (onnxruntime.InferenceSession(str(path)) for path in fetch(cache))
    sam = load_original_sam(published_weights(cache)).eval()
    random = np.random.RandomState(0)
    pixels = random.randn(1, 3, 1024, 1024).astype(np.float32)
    prompt = 5 * random.randn(1, 1, 256, 256).astype(np.float32)
    (image,) = encoder.run(None, {"input": pixels})
    pairs = {}
    with torch.no_grad():
        pairs["embedding"] = (sam.get_image_embeddings(torch.from_numpy(pixels)).numpy(), image)
        for name, mask in (("points", None), ("points and mask", prompt)):
            output = sam(
                image_embeddings=torch.from_numpy(image),
                input_points=torch.tensor(POINTS)[None, None],
                input_masks=None if mask is None else torch.from_numpy(mask),
                multimask_output=False,
            )
            pairs[f"mask logits of {name}"] = (output.pred_masks[:, 0].numpy(), _onnx_masks(decoder, image, mask))
    found = {name: float(np.abs(ours - expected).max()) for name, (ours, expected) in pairs.items()}
    return found | {f"{name}, mean size": float(np.abs(expected).mean()) for name, (_, expected) in pairs.items()}


def _onnx_masks(session: Any, embeddings: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Low-resolution masks `(1, 1, 256, 256)`. The file wants an empty point after the others, an empty mask in place
    of none, and gives the single-mask output for two points or more, else the best of three."""
    inputs = {
        "image_embeddings": embeddings,
        "point_coords": np.array([[*POINTS, (0.0, 0.0)]], np.float32),
        "point_labels": np.array([[1] * len(POINTS) + [-1]], np.float32),
        "mask_input": np.zeros((1, 1, 256, 256), np.float32) if mask is None else mask,
        "has_mask_input": np.array([mask is not None], np.float32),
        "orig_im_size": np.array([1024, 1024], np.float32),
    }
    return session.run(["low_res_masks"], inputs)[0]


def objects(samples: Path) -> list[tuple[Any, list[np.ndarray]]]:
    """Photographs, each with the masks of its annotated objects, none twice."""
    found: dict[str, tuple[Any, dict[Any, np.ndarray]]] = {}
    for row in chain(*(build_grefcoco(samples / "grefcoco", samples / "images", split=name) for name in SPLITS)):
        _, masks = found.setdefault(row["image_id"], (row["image"], {}))
        masks.update(zip(row["instance_ids"], decode_masks(row["masks"], row["image"].size[::-1]), strict=True))
    return [(image, list(masks.values())) for image, masks in found.values()]


def box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    """`(x1, y1, x2, y2)` around the pixels of a mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def intersections_over_unions(cache: Path, canvas: int, photographs: list) -> tuple[list[float], list[float]]:
    """IoU of every object, and seconds of processor time of the image encoder per image."""
    sam = load_original_sam(published_weights(cache), {"vision_config": {"image_size": canvas}}).eval()
    prompted, seconds = PromptedSam(sam, sam.config), []
    pixels = torch.randn(1, 3, canvas, canvas)
    with torch.no_grad():
        for _ in range(4):  # the first warms up
            start = time.process_time()
            sam.get_image_embeddings(pixels)
            seconds.append(time.process_time() - start)
    ious = []
    for image, masks in photographs:
        ((found, _),) = prompted.segment([image], [[SamPrompt(box=box_of(mask)) for mask in masks]])
        ious += [float((one & mask).sum() / (one | mask).sum()) for one, mask in zip(found, masks, strict=True)]
    return ious, seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder outside the repository (%(default)s)")
    parser.add_argument("--samples", type=Path, required=True)
    args = parser.parse_args()
    cache = args.cache.expanduser()
    torch.set_num_threads(1)
    for name, value in differences(cache).items():
        print(f"{name}: {value:.3g}")
    photographs = objects(args.samples)
    for canvas in CANVASES:
        ious, seconds = intersections_over_unions(cache, canvas, photographs)
        print(
            f"canvas {canvas}: mean IoU {statistics.mean(ious):.3f} of {len(ious)} objects on {len(photographs)} "
            f"photographs; {statistics.median(seconds):.2f} s of processor time an image"
        )


if __name__ == "__main__":
    main()
