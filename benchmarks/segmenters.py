"""What segmenters cost beside one another: loading, image encoding, decoding of four slots, memory. Random weights.

    python benchmarks/segmenters.py --threads 2 --rounds 5 --output benchmarks/results/segmenters

Each segmenter lives in a process of its own. The processes take turns, one image at a time, so that other work on the
machine meets all of them alike. Writes OUTPUT.md and OUTPUT.json.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import logging

from segcompass_hf.loading_segcompass import load_segmenter
from segcompass_hf.modeling_masks import MaskStage
from segcompass_hf.pages import markdown_table
from segcompass_hf.segmenters_segcompass import segmenter_class
from segcompass_hf.training.memory.shapes import SAM_SHAPES, sam_config

NUM_SLOTS = 4
ENTRIES = {  # shown name -> Hub id of the shape, canvas in pixels
    "MobileSAM, 512 pixels": ("mobile_sam", 512),
    "MobileSAM": ("mobile_sam", 1024),
    "SAM ViT-B": ("facebook/sam-vit-base", 1024),
    "SAM 2.1 Hiera-T": ("facebook/sam2.1-hiera-tiny", 1024),
}
HEADERS = ["segmenter", "parameters", "of these encoder", "load s", "encode ms", "decode ms", "loaded MiB", "peak MiB"]


def configuration(shape: str, canvas: int) -> PretrainedConfig:
    """Of a shape at a canvas; weights are drawn so wide that no activation is a denormal number, which is slow."""
    config = sam_config(shape) if shape in SAM_SHAPES else AutoConfig.for_model(shape)
    if config.model_type == "mobile_sam":
        config.vision_config.image_size = canvas
        config.share_canvas()
    config.vision_config.initializer_range = config.initializer_range = 0.02
    return config


def resident(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (at most so far) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def write(shape: str, canvas: int, folder: Path) -> None:
    """A segmenter of random weights, as a checkpoint."""
    config = configuration(shape, canvas)
    torch.manual_seed(0)
    segmenter_class(config)(config).save_pretrained(folder)


def answer(folder: str, threads: int) -> None:
    """Load a segmenter, and answer every line of the standard input with one measurement, in JSON."""
    torch.set_num_threads(threads)
    before, start = resident("VmRSS"), time.perf_counter()
    segmenter = load_segmenter(folder).eval()
    stage, load = MaskStage(segmenter), time.perf_counter() - start
    parameters = {"all": segmenter, "encoder": segmenter.vision_encoder}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parameters.items()}
    print(json.dumps({"load": load, "loaded": resident("VmRSS") - before, "parameters": counts}), flush=True)
    pixels = torch.randn(1, 3, stage.canvas, stage.canvas)
    heatmaps = torch.randn(1, NUM_SLOTS, stage.map_size, stage.map_size)
    for _ in sys.stdin:
        with torch.inference_mode():
            times = [time.perf_counter()]
            features = stage.encode_image(pixels)
            times.append(time.perf_counter())
            stage.decode(features, heatmaps)
            times.append(time.perf_counter())
        encode, decode = (1000 * (after - before) for before, after in zip(times, times[1:], strict=False))
        print(json.dumps({"encode": encode, "decode": decode, "peak": resident("VmHWM") - before}), flush=True)


def measure(threads: int, rounds: int, names: list[str]) -> dict[str, dict]:
    """Name -> figures of loading, and a list of measurements; the first image of each only warms up."""
    found, processes = {}, {}
    with tempfile.TemporaryDirectory() as root:
        for number, name in enumerate(names):
            folder = Path(root) / str(number)
            own = [sys.executable, __file__, "--threads", str(threads), "--folder", str(folder)]
            subprocess.run([*own, "--write", name], check=True)
            process = subprocess.Popen(own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            processes[name], found[name] = process, json.loads(process.stdout.readline()) | {"images": []}
        for turn in range(rounds + 1):
            for name, process in processes.items():
                process.stdin.write("\n")
                process.stdin.flush()
                line = process.stdout.readline()
                if turn:
                    found[name]["images"].append(json.loads(line))
        for process in processes.values():
            process.stdin.close()
            process.wait()
    return found


def row_of(name: str, found: dict) -> list[str]:
    def shown(values: list[float]) -> str:
        return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"

    whole, encoder = (f"{found['parameters'][part] / 1e6:.1f} M" for part in ("all", "encoder"))
    images = found["images"]
    memory = (found["loaded"], max(image["peak"] for image in images))
    times = (shown([image[part] for image in images]) for part in ("encode", "decode"))
    return [name, whole, encoder, f"{found['load']:.1f}", *times, *(f"{size / 2**20:,.0f}" for size in memory)]


def report(found: dict[str, dict], threads: int, rounds: int) -> str:
    lines = ["# Segmenters beside one another", "", f"    python {shlex.join(sys.argv)}", ""]
    lines += [
        f"Random weights, float32, {threads} threads on {os.cpu_count()} CPU cores ({platform.machine()}), torch "
        f"{torch.__version__}; medians (and extremes) of {rounds} images, the segmenters in turn, a process each. "
        f"Canvas 1024 pixels where none is named. Encoding: one image; decoding: {NUM_SLOTS} slots of it. Load: a "
        "folder of safetensors, read before. Memory: resident, over that of the process before loading. Load average "
        f"at the end: {os.getloadavg()[0]:.1f}.",
        "",
        markdown_table(HEADERS, [row_of(name, one) for name, one in found.items()]),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of torch, per process (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="images per segmenter (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=ENTRIES, default=list(ENTRIES), metavar="NAME", help="of these")
    parser.add_argument("--output", type=Path, help="path of the results without ending; printed when left out")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", choices=ENTRIES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if given.write:
        write(*ENTRIES[given.write], given.folder)
    elif given.folder:
        answer(str(given.folder), given.threads)
    else:
        found = measure(given.threads, given.rounds, given.only)
        text = report(found, given.threads, given.rounds)
        print(text)
        if given.output is not None:
            given.output.with_suffix(".md").write_text(text)
            given.output.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
