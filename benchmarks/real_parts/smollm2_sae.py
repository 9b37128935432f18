"""An SAE on the residual stream of SmolLM2, and one on that of a model of its shape with random weights:

    pip install gguf
    python benchmarks/real_parts/smollm2_sae.py

Text are the docstrings of Python's standard library. Both SAEs are trained by `SaeTrainer` with the same settings and
evaluated on every twentieth docstring, which they were not trained on. Writes
benchmarks/results/real_parts/smollm2_sae.md.
"""

import argparse
import ast
import inspect
import platform
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from smollm2 import smollm2, smollm2_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.trainer_callback import PrinterCallback

from segcompass_hf.text_stack_segcompass import HiddenStateCapture
from segcompass_hf.training.sae.config import SaeTrainingConfig
from segcompass_hf.training.sae.trainer import SaeTrainer

SHORTEST_TEXT = 300  # characters
MASSIVE = 10.0  # times the median norm
RESULTS = Path(__file__).parents[1] / "results" / "real_parts" / "smollm2_sae.md"
COLUMNS = ("explained_variance", "l0", "dead_features", "ce_clean", "ce_spliced", "ce_zero", "ce_recovered")


def docstrings(number: int) -> Iterator[dict[str, list]]:
    """The first so many longer docstrings of the standard library, as interleaved rows without pictures."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in files:
        for node in ast.walk(ast.parse(file.read_bytes())):
            text = ast.get_docstring(node) if isinstance(node, documented) else None
            if text and len(text) >= SHORTEST_TEXT:
                if number == 0:
                    return
                number -= 1
                yield {"images": [None], "texts": [inspect.cleandoc(text)]}


def random_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same configuration, new."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(model.config).eval()


@torch.no_grad()
def massive_activations(model: PreTrainedModel, tokenizer: Any, layer: int, rows: list[dict]) -> dict[str, float]:
    """Norms of the states of one layer, over the median norm, and the largest of all entries over the median entry.

    Returns:
        `dict`: `first_token` and `others` (largest norm of a row's first token and of the others), `share` of the
        others that are `MASSIVE`, and `entry`.
    """
    first, others, entries = [], [], []
    for row in rows:
        with HiddenStateCapture(model, layer, stop=True) as capture:
            model(**tokenizer(row["texts"][0], return_tensors="pt", truncation=True, max_length=256))
        states = capture.layer_states[0][0]  # (length, d_in)
        first.append(states[:1].norm(dim=-1))
        others.append(states[1:].norm(dim=-1))
        entries.append(states.abs().flatten())
    first, others, entries = (torch.cat(parts) for parts in (first, others, entries))
    median = others.median()
    return {
        "first_token": float(first.max() / median),
        "others": float(others.max() / median),
        "share": float((others > MASSIVE * median).float().mean()),
        "entry": float(entries.max() / entries.median()),
    }


def settings(folder: str | Path, steps: int, layer: int, d_sae: int, **others: Any) -> SaeTrainingConfig:
    """Of the SAE and its training; the text has few tokens, so the learning rate is high."""
    fields = {
        "output_dir": str(folder),
        "architecture": "batchtopk",
        "k": 32,
        "d_sae": d_sae,
        "sae_layer": layer,
        "normalize_activations": "per_token",
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 512,
        "max_steps": steps,
        "buffer_tokens": 32_768,
        "max_length": 256,
        "rows_per_batch": 8,
        "dead_after_tokens": 50_000,
        "max_eval_rows": 32,
        "logging_steps": max(1, steps // 10),
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return SaeTrainingConfig(**(fields | others))


def train(model: PreTrainedModel, tokenizer: Any, rows: list[dict], arguments: SaeTrainingConfig) -> SaeTrainer:
    """An SAE on states of a language model, trained."""
    trainer = SaeTrainer(model, arguments, rows, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def measure(trainer: SaeTrainer) -> dict[str, float]:
    """What evaluation says of an SAE; dead are features that were silent for `dead_after_tokens` of training."""
    metrics = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    metrics["dead_features"] = next(
        line["dead_features"] for line in reversed(trainer.state.log_history) if "dead_features" in line
    )
    return {name: metrics[name] for name in COLUMNS}


def report(rows: dict[str, dict[str, float]], massive: dict[str, dict[str, float]]) -> str:
    """Both tables, in Markdown."""
    names = "explained variance | L0 | dead | cross-entropy | spliced | zeros | recovered | seconds"
    lines = [f"| weights | {names} |", "|---" * 9 + "|"]
    for name, row in rows.items():
        values = [f"{row['explained_variance']:.3f}", f"{row['l0']:.1f}", f"{row['dead_features']:.1%}"]
        values += [f"{row[column]:.3f}" for column in COLUMNS[3:]] + [f"{row['seconds']:.0f}"]
        lines.append(f"| {name} | {' | '.join(values)} |")
    lines += ["", f"| weights | first token | others | others above {MASSIVE:g} | largest entry |", "|---" * 5 + "|"]
    for name, row in massive.items():
        values = [f"{row['first_token']:.1f}", f"{row['others']:.1f}", f"{row['share']:.2%}", f"{row['entry']:.0f}"]
        lines.append(f"| {name} | {' | '.join(values)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of 512 tokens (%(default)s)")
    parser.add_argument("--num-rows", type=int, default=800, help="docstrings (%(default)s)")
    parser.add_argument("--layer", type=int, default=10, help="index into hidden_states, 1 to 30 (%(default)s)")
    parser.add_argument("--d-sae", type=int, default=4096, help="features (%(default)s)")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    texts, real, tokenizer = list(docstrings(args.num_rows)), smollm2(), smollm2_tokenizer()
    rows, massive = {}, {}
    for name, model in (("SmolLM2", real), ("random", random_weights(real))):
        massive[name] = massive_activations(model, tokenizer, args.layer, texts[:16])
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            trainer = train(model, tokenizer, texts, settings(folder, args.steps, args.layer, args.d_sae))
            seconds = time.process_time() - start
            rows[name] = measure(trainer) | {"seconds": seconds}
        print(name, rows[name], massive[name], flush=True)
    command = f"python benchmarks/real_parts/smollm2_sae.py --steps {args.steps} --num-rows {args.num_rows}"
    command += f" --layer {args.layer} --d-sae {args.d_sae}"
    versions = (
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    notes = (
        "# An SAE on SmolLM2's residual stream\n\n"
        f"A `batchtopk` SAE (k 32, {args.d_sae:,} features, `per_token`) on the states of layer {args.layer} of 30, "
        f"width 576, {args.steps:,} steps of 512 tokens of docstrings of the standard library, and the same on a "
        "model of that shape with random weights. Measured on 32 docstrings that were held out. Dead: silent for the "
        "last 50,000 tokens of training. Cross-entropy in nats a token: as it is, with the reconstruction in place of "
        "the layer's states, and with zeros there. Seconds of processor time, with the harvest of the states.\n\n"
        "The second table has norms of states over the median norm, and the largest entry of a state over the median "
        "entry: massive activations. The first token of a text is left out of training by default."
    )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        f"{notes}\n\n{report(rows, massive)}\n\n`{command}`, {versions}, {torch.get_num_threads()} thread(s), CPU\n"
    )


if __name__ == "__main__":
    main()
