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
from segcompass_hf.modeling_masks import MaskStage, segmenter_class
from segcompass_hf.pages import markdown_table
from segcompass_hf.segmenters_segcompass import segmenter_config
from segcompass_hf.training.memory.shapes import SAM_SHAPES, sam_config

NUM_SLOTS = 4
ENTRIES = {  # shown name -> Hub id of the shape, canvas in pixels
    "MobileSAM, 512 pixels": ("mobile_sam", 512),
    "MobileSAM": ("mobile_sam", 1024),
    "SAM ViT-B": ("facebook/sam-vit-base", 1024),
    "SAM 2.1 Hiera-T": ("facebook/sam2.1-hiera-tiny", 1024),
}
HEADERS = [
    "segmenter",
    "parameters",
    "of these encoder",
    "load ms",
    "encode ms",
    "decode ms",
    "loaded MiB",
    "peak MiB",
]


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
    """Answer every line of the standard input with a measurement, in JSON: load, encode an image, decode its slots."""
    torch.set_num_threads(threads)
    segmenter_class(segmenter_config(AutoConfig.from_pretrained(folder)))  # imports it
    before = resident("VmRSS")
    print("{}", flush=True)
    for _ in sys.stdin:
        segmenter = None  # the last one goes before the next comes
        with torch.inference_mode():
            times = [time.perf_counter()]
            segmenter = load_segmenter(folder).eval()
            for weight in segmenter.parameters():
                weight.sum()  # files are mapped into memory and read when they are used
            times.append(time.perf_counter())
            loaded, stage = resident("VmRSS") - before, MaskStage(segmenter)
            pixels = torch.randn(1, 3, stage.canvas, stage.canvas)
            heatmaps = torch.randn(1, NUM_SLOTS, stage.map_size, stage.map_size)
            times.append(time.perf_counter())
            features = stage.encode_image(pixels)
            times.append(time.perf_counter())
            stage.decode(features, heatmaps)
            times.append(time.perf_counter())
        load, _, encode, decode = (1000 * (end - start) for start, end in zip(times, times[1:], strict=False))
        parts = {"parameters": segmenter, "encoder": segmenter.vision_encoder}
        found = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
        found |= {"load": load, "encode": encode, "decode": decode, "loaded": loaded}
        print(json.dumps(found | {"peak": resident("VmHWM") - before}), flush=True)


def measure(threads: int, rounds: int, names: list[str]) -> dict[str, list[dict]]:
    """Name -> measurements; the first of each only warms up."""
    found, processes = {name: [] for name in names}, {}
    with tempfile.TemporaryDirectory() as root:
        for number, name in enumerate(names):
            own = [sys.executable, __file__, "--threads", str(threads), "--folder", str(Path(root) / str(number))]
            subprocess.run([*own, "--write", name], check=True)
            processes[name] = subprocess.Popen(own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            processes[name].stdout.readline()  # it is ready
        for turn in range(rounds + 1):
            for name, process in processes.items():
                process.stdin.write("\n")
                process.stdin.flush()
                line = process.stdout.readline()
                if turn:
                    found[name].append(json.loads(line))
        for process in processes.values():
            process.stdin.close()
            process.wait()
    return found


def row_of(name: str, turns: list[dict]) -> list[str]:
    def shown(part: str) -> str:
        values = [turn[part] for turn in turns]
        return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"

    counts = (f"{turns[0][part] / 1e6:.1f} M" for part in ("parameters", "encoder"))
    times = (shown(part) for part in ("load", "encode", "decode"))
    memory = (f"{max(turn[part] for turn in turns) / 2**20:,.0f}" for part in ("loaded", "peak"))
    return [name, *counts, *times, *memory]


def report(found: dict[str, list[dict]], threads: int, rounds: int) -> str:
    lines = ["# Segmenters beside one another", "", f"    python {shlex.join(sys.argv)}", ""]
    lines += [
        f"Random weights, float32, {threads} threads on {os.cpu_count()} CPU cores ({platform.machine()}), torch "
        f"{torch.__version__}; medians (and extremes) of {rounds} turns, the segmenters one after another in each, a "
        f"process each. Canvas 1024 pixels where none is named. Encoding: one image; decoding: {NUM_SLOTS} slots. "
        "Loading: until every weight is in memory, from files that the system has cached. Memory: resident, over that "
        f"of the process before. Load average at the end: {os.getloadavg()[0]:.1f}.",
        "",
        markdown_table(HEADERS, [row_of(name, one) for name, one in found.items()]),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of torch, per process (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each segmenter (%(default)s)")
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
