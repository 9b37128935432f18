"""scenes-tiny moved to another segmenter: gIoU with its own SAM, right after the swap, and after fitting.

    python benchmarks/segmenter_swap.py --num-samples 500 --steps 300

A tiny SAM 2 that saw Scenes (`examples/scenes_tiny/pretrain.py --segmenter sam2`) takes the place of the bundled
checkpoint's SAM (`segcompass init --from`). Then `examples/train_segmentation.py --trainable masks` trains what reads
the new segmenter, on slots and reference states that the VLM read once. All answers are the model's own, greedy; the
VLM's part is the same in all three. Goes on where it was stopped; writes `benchmarks/results/segmenter_swap.md` and
`.json`.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from transformers import AutoModel, AutoProcessor

import segcompass_hf
from segcompass_hf.evaluation import ModelPredictor, evaluate_dataset, load_dataset_of
from segcompass_hf.evaluation.report import figure_cell
from segcompass_hf.files import write_whole
from segcompass_hf.pages import markdown_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/segmenter_swap"
METRICS = ("gIoU", "cIoU", "N-acc", "T-acc")
# The settings of the recipe's last stage, as far as they concern what trains here.
FIT = """--per_device_train_batch_size 32 --optimizer muon --learning_rate 1e-3 --slot_mapper_lr_factor 8
--prompt_encoder_lr_factor 0.5 --mask_decoder_lr_factor 0.5 --lr_scheduler_type cosine --warmup_steps 20
--weight_decay 0.02 --use_cpu true --save_steps 100 --save_total_limit 1 --logging_steps 20 --report_to none"""


def run(command: list[str], done: Path, log: Path) -> None:
    """Run a command and note its seconds beside its log; it is left out where what it makes is there."""
    if done.exists():
        return
    start = time.perf_counter()
    with log.open("a") as file:
        subprocess.run([sys.executable, *command], check=True, cwd=ROOT, stdout=file, stderr=file)
    log.with_suffix(".seconds").write_text(f"{time.perf_counter() - start:.0f}")


def make(folder: Path, given: argparse.Namespace) -> dict[str, Path]:
    """The three checkpoints, by what is to be said of them."""
    bundled, swapped, fitted = Path(segcompass_hf.bundled_checkpoint()), folder / "swapped", folder / "fitted"
    pretrain = ["examples/scenes_tiny/pretrain.py", "--segmenter", "sam2", "--stage", "masks"]
    pretrain += ["--output", str(folder), "--scale", str(given.scale)]
    run(pretrain, folder / "masks/preprocessor_config.json", folder / "pretrain.log")
    swap = ["-m", "segcompass_hf.cli", "init", "--from", str(bundled), "--sam", str(folder / "masks")]
    run([*swap, "--output", str(swapped)], swapped, folder / "init.log")
    fit = ["examples/train_segmentation.py", "--model", str(swapped), "--output_dir", str(fitted), "--resume", "true"]
    fit += ["--trainable", "masks", "--slot_cache_dir", str(folder / "slots")]
    fit += ["--embedding_cache_dir", str(folder / "embeddings"), "--num_samples", str(given.rows)]
    fit += ["--max_steps", str(given.steps), *shlex.split(FIT)]
    run(fit, fitted / "config.json", folder / "fit.log")
    return {
        "the bundled checkpoint, its own SAM": bundled,
        "SAM 2 in its place, new parts untrained": swapped,
        f"the same after {given.steps} steps on {given.rows:,} rows": fitted,
    }


def evaluated(name: str, checkpoint: Path, folder: Path, num_samples: int) -> dict:
    """Figures on held-out scenes."""
    model, processor = AutoModel.from_pretrained(checkpoint).eval(), AutoProcessor.from_pretrained(checkpoint)
    named = load_dataset_of("scenes:val", num_samples)
    summary = evaluate_dataset(
        ModelPredictor(model, processor, name=checkpoint.name),
        named.dataset,
        folder / "evaluation" / checkpoint.name,
        batch_size=32,
        num_samples=num_samples,
        dataset_name=named.name,
        notes=named.notes(),
    )
    return {"segmenter": type(model.sam).__name__, **summary.figures}


def report(found: dict[str, dict], given: argparse.Namespace, seconds: str) -> str:
    rows = []
    for name, figures in found.items():
        cells = [figure_cell(figures["metrics"][metric]) for metric in METRICS]
        rows.append([name, figures["segmenter"], *cells])
    command = f"    python benchmarks/segmenter_swap.py --num-samples {given.num_samples} --steps {given.steps}"
    command += f" --rows {given.rows} --scale {given.scale}"
    lines = ["# Another segmenter for scenes-tiny", "", command, ""]
    lines += [
        f"{given.num_samples} held-out scenes (`scenes:val`), greedy, own reasoning, slots chosen by confidence; 95 % "
        "bootstrap intervals over scenes. One run. VLM, SAE, codebook and slot encoder are those of the bundled "
        "checkpoint in all rows, and so are reasoning and slots; confidences are in the second, and then train with "
        f"the slot mapper. SAM 2 saw Scenes for {round(1000 * given.scale):,} steps.",
        "",
        f"Fitting took {seconds} s on shared CPU cores; what the caches held already was not computed again.",
        "",
        markdown_table(["checkpoint", "segmenter", *METRICS], rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/segmenter-swap"), help="checkpoints and caches")
    parser.add_argument("--num-samples", type=int, default=500, help="held-out scenes (%(default)s)")
    parser.add_argument("--rows", type=int, default=2000, help="scenes to fit on (%(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="of fitting, 32 rows each (%(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="of SAM 2's 1,000 steps of pretraining")
    given = parser.parse_args()
    folder = given.output.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = make(folder, given)
    found = {name: evaluated(name, path, folder, given.num_samples) for name, path in checkpoints.items()}
    text = report(found, given, (folder / "fit.seconds").read_text())
    write_whole(RESULTS.with_suffix(".json"), json.dumps(found, indent=1) + "\n")
    write_whole(RESULTS.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
