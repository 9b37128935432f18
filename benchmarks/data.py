"""Rows of run-length encoded masks against nested lists of booleans: size on disk and loading time, on the same masks.

    python benchmarks/data.py

Masks are synthetic outlines at COCO's usual 640x480 and, where `--real` or `shared/data/real_samples` beside the
checkout holds them, those of photographs. Compared are JSON lines (files of annotations and of predictions), Arrow (a
data set on the local disk) and Parquet (on the Hub), each with the masks as COCO's run lengths, as in the row schema,
and as nested lists of booleans. Images are left out on both sides.

Loading ends with boolean arrays `(num_objects, height, width)` of every row, which are checked to be what was written.
Nested booleans of Arrow and Parquet are read in numpy format, the faster way for them. The two forms take turns, and
the smallest of the times counts, since other work on the machine only adds to it.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset, Features, List, Value
from PIL import Image, ImageDraw

from segcompass_hf.data import build_grefcoco, decode_masks, encode_mask, row_features

HEIGHT, WIDTH = 480, 640
BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data" / "real_samples"
TARGET = 50  # times smaller
SIZE = List(Value("int32"))
FEATURES = {
    "rle": Features({"size": SIZE, "masks": row_features()["masks"]}),
    "nested": Features({"size": SIZE, "masks": List(List(List(Value("bool"))))}),
}


def synthetic_masks(num_rows: int, seed: int = 0) -> list[np.ndarray]:
    """Per row 0 to 4 wobbly outlines, most of them small as in COCO: `(num_objects, 480, 640)` bool."""
    rng, rows = np.random.default_rng(seed), []
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    for _ in range(num_rows):
        masks = []
        for _ in range(rng.integers(0, 5)):
            radius = np.exp(rng.uniform(np.log(12), np.log(160)))  # pixels
            wobble = sum(rng.normal(0, 0.25 / n) * np.sin(n * angles + rng.uniform(0, 6.3)) for n in range(1, 9))
            distance = radius * np.clip(1 + wobble, 0.2, 2)
            x = rng.uniform(0, WIDTH) + distance * np.cos(angles)
            y = rng.uniform(0, HEIGHT) + distance * np.sin(angles) * rng.uniform(0.5, 1.5)
            canvas = Image.new("1", (WIDTH, HEIGHT))
            ImageDraw.Draw(canvas).polygon(list(zip(x.tolist(), y.tolist(), strict=True)), fill=1)
            masks.append(np.asarray(canvas, dtype=bool))
        rows.append(np.stack(masks) if masks else np.zeros((0, HEIGHT, WIDTH), dtype=bool))
    return rows


def real_masks(root: Path) -> list[np.ndarray]:
    """Those of the training part of gRefCOCO in `root`, with its photographs in `root/images`."""
    rows = build_grefcoco(root, root / "images", split="train")
    return [decode_masks(row["masks"], row["image"].size[::-1]) for row in rows]


def write_json(path: Path, rows: list[dict], form: str) -> None:
    with open(path, "w") as file:
        file.writelines(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)


def load_json(path: Path, form: str) -> list[np.ndarray]:
    with open(path) as file:
        return as_arrays(map(json.loads, file), form)


def write_arrow(path: Path, rows: list[dict], form: str) -> None:
    Dataset.from_list(rows, features=FEATURES[form]).save_to_disk(path)


def load_arrow(path: Path, form: str) -> list[np.ndarray]:
    return as_arrays(formatted(datasets.load_from_disk(path), form), form)


def write_parquet(path: Path, rows: list[dict], form: str) -> None:
    Dataset.from_list(rows, features=FEATURES[form]).to_parquet(path)


def load_parquet(path: Path, form: str) -> list[np.ndarray]:
    rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    return as_arrays(formatted(rows, form), form)


FORMATS = {
    "JSON lines": (write_json, load_json),
    "Arrow": (write_arrow, load_arrow),
    "Parquet": (write_parquet, load_parquet),
}


def formatted(rows, form: str):
    return rows.with_format("numpy") if form == "nested" else rows


def as_arrays(rows, form: str) -> list[np.ndarray]:
    if form == "rle":
        return [decode_masks(row["masks"], tuple(row["size"])) for row in rows]
    return [np.asarray(row["masks"], dtype=bool).reshape(-1, *row["size"]) for row in rows]


def size_on_disk(path: Path) -> int:
    """Of a file, or of the Arrow files of a folder."""
    return sum(file.stat().st_size for file in path.glob("*.arrow")) if path.is_dir() else path.stat().st_size


def measure(masks: list[np.ndarray], folder: Path, rounds: int) -> dict:
    """Write the masks in every format in both forms, and load them in turns."""
    forms = {"rle": lambda objects: [encode_mask(mask) for mask in objects], "nested": np.ndarray.tolist}
    result = {"rows": len(masks), "masks": sum(map(len, masks)), "formats": {}}
    for name, (write, load) in FORMATS.items():
        num_bytes, seconds = {}, {form: [] for form in forms}
        for form, encode in forms.items():
            write(folder / form, [{"size": list(of.shape[1:]), "masks": encode(of)} for of in masks], form)
            num_bytes[form] = size_on_disk(folder / form)
        for _ in range(1 + rounds):  # the first one warms up
            for form in forms:
                began = time.perf_counter()
                loaded = load(folder / form, form)
                seconds[form].append(time.perf_counter() - began)
                if not all(np.array_equal(read, of) for read, of in zip(loaded, masks, strict=True)):
                    raise AssertionError(f"{form} masks in {name} are not those that were written.")
        best = {form: min(times[1:]) for form, times in seconds.items()}
        result["formats"][name] = {
            "bytes": num_bytes,
            "seconds": {form: round(value, 5) for form, value in best.items()},
            "times_smaller": round(num_bytes["nested"] / num_bytes["rle"], 1),
            "times_faster": round(best["nested"] / best["rle"], 1),
        }
        for form in forms:
            shutil.rmtree(folder / form) if (folder / form).is_dir() else (folder / form).unlink()
    return result


def to_markdown(record: dict) -> str:
    machine = record["machine"]
    lines = [
        "# Masks of rows against nested lists of booleans",
        "",
        f"{machine['processor']}, Python {machine['python']}, datasets {machine['datasets']}; smallest of "
        f"{record['rounds']} interleaved rounds. The docstring of `data.py` says what is compared.",
        "",
        "| masks | format | run lengths | nested | smaller | loading run lengths | loading nested | faster |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, result in record["masks"].items():
        for file_format, figures in result["formats"].items():
            size, seconds = figures["bytes"], figures["seconds"]
            lines.append(
                f"| {name}: {result['masks']} in {result['rows']} rows | {file_format} | {size['rle'] / 1e3:,.1f} kB "
                f"| {size['nested'] / 1e3:,.1f} kB | {figures['times_smaller']:,.0f}x "
                f"| {1e3 * seconds['rle']:,.1f} ms | {1e3 * seconds['nested']:,.1f} ms "
                f"| {figures['times_faster']:,.1f}x |"
            )
    smallest = {
        file_format: min(result["formats"][file_format]["times_smaller"] for result in record["masks"].values())
        for file_format in FORMATS
    }
    reached = [f"{name} ({times:,.0f}x)" for name, times in smallest.items() if times >= TARGET]
    missed = [f"{name} ({times:,.0f}x)" for name, times in smallest.items() if times < TARGET]
    lines += ["", f"At least {TARGET}x smaller on every set of masks: {', '.join(reached) or 'no format'}."]
    if missed:
        lines[-1] += f" Not: {', '.join(missed)}, which compresses nested booleans by itself."
    return "\n".join([*lines, "", f"Made by `{record['command']}`."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=40, help="with synthetic masks (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of loading (%(default)s)")
    parser.add_argument("--real", type=Path, default=BESIDE, help="folder with grefcoco/ and images/")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/data.json"))
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    masks = {"synthetic, 640x480": synthetic_masks(arguments.rows)}
    if (arguments.real / "grefcoco").is_dir():
        masks["photographs (gRefCOCO)"] = real_masks(arguments.real)
    machine = {
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "datasets": datasets.__version__,
        "numpy": np.__version__,
    }
    record = {"machine": machine, "rounds": arguments.rounds, "masks": {}}
    record["command"] = shlex.join(["python", *sys.argv])
    for name, of_rows in masks.items():
        with tempfile.TemporaryDirectory() as folder:
            record["masks"][name] = measure(of_rows, Path(folder), arguments.rounds)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    text = to_markdown(record)
    arguments.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
