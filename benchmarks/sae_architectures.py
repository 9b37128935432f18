"""Every SAE architecture on the same states for the same number of steps, at about the same L0:

    python benchmarks/sae_architectures.py

The states are those of the bundled checkpoint's VLM at its SAE layer, on Scenes (`train` for training, `val` for the
table), harvested once into an activation cache. Where a weight and not a `k` sets the sparsity, a controller moves it
until L0 is that of the others. Writes benchmarks/results/sae_architectures.{json,md}.
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

import segcompass_hf
from segcompass_hf import SegCompassForReasoningSegmentation, SegCompassProcessor
from segcompass_hf.data import scenes
from segcompass_hf.modeling_sae import SegCompassSae
from segcompass_hf.training.sae.config import SaeTrainingConfig
from segcompass_hf.training.sae.trainer import SaeTrainer

L0 = 16
ARCHITECTURES = {  # with the sparsity weight that the controller starts from
    "standard": {"l1_coefficient": 3.0},
    "gated": {"l1_coefficient": 3.0},
    "jumprelu": {"l1_coefficient": 0.5, "k": 2 * L0},
    "topk": {"k": L0},
    "batchtopk": {"k": L0},
}
COLUMNS = ("explained_variance", "explained_variance_text", "explained_variance_image", "l0", "dead_features")
COLUMNS += ("ce_recovered", "seconds")


class HoldL0(TrainerCallback):
    """After every log line, multiply the sparsity weight by a root of how far L0 is off."""

    def __init__(self, sae: SegCompassSae):
        self.sae = sae

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "l0" in logs:
            weight = self.sae.config.l1_coefficient * (logs["l0"] / L0) ** 0.3
            self.sae.config.l1_coefficient = min(10.0, max(0.1, weight))


def settings(arguments: argparse.Namespace, folder: str, **architecture) -> SaeTrainingConfig:
    return SaeTrainingConfig(
        output_dir=f"{folder}/run",
        cache_dir=f"{folder}/cache",
        cache_dtype="float32",
        d_sae=1024,
        normalize_activations="per_token",
        learning_rate=2e-3,
        per_device_train_batch_size=1024,
        buffer_tokens=65_536,
        rows_per_batch=16,
        max_steps=arguments.steps,
        dead_after_tokens=100_000,
        max_eval_rows=None,
        per_device_eval_batch_size=16,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        seed=arguments.seed,
        use_cpu=True,
        disable_tqdm=True,
        **architecture,
    )


def measure(trainer: SaeTrainer, train: bool = True) -> dict[str, float]:
    trainer.remove_callback(PrinterCallback)
    if train and not trainer.model.takes_top_k:
        trainer.add_callback(HoldL0(trainer.model))
    start = time.process_time()
    if train:
        trainer.train()
    seconds = time.process_time() - start
    metrics = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    if train:  # silent for 100,000 tokens of training; the evaluation set is too small to call a feature dead
        logged = [line for line in trainer.state.log_history if "dead_features" in line]
        metrics["dead_features"] = logged[-1]["dead_features"]
    return {name: metrics[name] for name in COLUMNS if name in metrics} | {"seconds": seconds}


def table(rows: dict[str, dict[str, float]]) -> str:
    lines = [
        "| SAE | sparsity weight | explained variance | text | image | L0 | dead | CE recovered | CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        values = [f"{row[column]:.3f}" for column in COLUMNS[:3]] + [f"{row['l0']:.1f}", f"{row['dead_features']:.1%}"]
        values += [f"{row['ce_recovered']:.3f}", f"{row['seconds']:.0f}" if row["seconds"] else ""]
        lines.append(f"| {name} | {row['weight']} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="of 1,024 tokens")
    parser.add_argument("--num-train", type=int, default=800, help="scenes to harvest")
    parser.add_argument("--num-eval", type=int, default=100, help="scenes to evaluate on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "sae_architectures")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    model = SegCompassForReasoningSegmentation.from_pretrained(segcompass_hf.bundled_checkpoint())
    processor = SegCompassProcessor.from_pretrained(segcompass_hf.bundled_checkpoint())
    data = scenes.build("train", arguments.num_train, seed=7), scenes.build("val", arguments.num_eval)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only:
            args = settings(arguments, folder, architecture=name, **ARCHITECTURES[name])
            trainer = SaeTrainer(model, args, *data, processor)
            row, weight = measure(trainer), trainer.model.config.l1_coefficient
            rows[name] = {"weight": f"k = {L0}" if name.endswith("topk") else f"{weight:.2g}"} | row
            print(name, rows[name], flush=True)
        args = settings(arguments, folder)
        row = measure(SaeTrainer(model, args, *data, processor, model.sae), train=False)
        rows["bundled (standard, own recipe)"] = {"weight": f"{model.config.sae_config.l1_coefficient:g}"}
        rows["bundled (standard, own recipe)"] |= row | {"seconds": 0.0}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    command = f"python benchmarks/sae_architectures.py --steps {arguments.steps} --num-train {arguments.num_train}"
    command += f" --num-eval {arguments.num_eval} --seed {arguments.seed}"
    report = {"command": command, "seed": arguments.seed, "threads": torch.get_num_threads(), "versions": versions}
    arguments.output.with_suffix(".json").write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n")
    print(table(rows))
    notes = (
        "SAE architectures on the states of the bundled checkpoint at its SAE layer (d_in 128, d_sae 1,024, "
        f"`per_token`), Scenes `train` for {arguments.steps:,} steps of 1,024 tokens, measured on "
        f"{arguments.num_eval} scenes of `val`. Dead: silent for the last 100,000 tokens of training (of the bundled "
        f"SAE: on `val`). The sparsity weights are those at which a controller ended that moved them towards L0 {L0}; "
        "the seconds are CPU time of training.\n\n"
        "Not a ranking of the architectures: one seed, one short budget, one layer."
    )
    used = f"`{command}`, {torch.get_num_threads()} thread(s), {', '.join(f'{k} {v}' for k, v in versions.items())}"
    arguments.output.with_suffix(".md").write_text(f"{notes}\n\n{table(rows)}\n\n{used}\n")


if __name__ == "__main__":
    main()
