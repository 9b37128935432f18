"""How much of a gradient is signal: the policy gradient against that of reference reasoning, 8 prompts each.

    python benchmarks/scenes_study/signal_share.py --start cold
    python benchmarks/scenes_study/signal_share.py --start practised --scale-rewards batch

Gradients of the layers that train, of a start of the ablation, from independent batches: `g = s + n` with a common
`s`. The mean cosine of two of them estimates `rho = |s|^2 / (|s|^2 + E|n|^2)`, and `8 (1 - rho) / rho` prompts are
needed for as much signal as noise in one step. Nothing is trained. Writes `signal.md` and `signal.json`, where other
starts stay as they are; `--report` makes the first from the second.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from ablation import load, start_of
from datasets import Dataset
from runs import commit, counted, write_json
from settings import ARMS, GRPO, OTHERS, RESULTS, RUNS, STARTS, TAUGHT

from segcompass_hf import SegCompassProcessor
from segcompass_hf.data import scenes
from segcompass_hf.data.collator import SegmentationCollator
from segcompass_hf.data.schema import row_features
from segcompass_hf.training import SegCompassGRPOConfig, SegCompassGRPOTrainer

PROMPTS = 8
SEED = 900
KINDS = {"all kinds": None, "taught kinds": TAUGHT, "other kinds": OTHERS}


def _rows(kinds, count: int) -> list[dict]:
    every = scenes.iterate("train", 10 * count, seed=SEED)
    return list(islice((row for row in every if not kinds or row["kind"] in kinds), count))


def of_policy(path: Path, kinds, batches: int, scale_rewards: str) -> torch.Tensor:
    """Policy gradients, `(batches, parameters)`: one step of the arm "RL only" each, at a learning rate of 0."""
    model, processor = load("rl_only", path), SegCompassProcessor.from_pretrained(path)
    rows = _rows(kinds, PROMPTS * batches)
    with tempfile.TemporaryDirectory() as folder:
        settings = {**GRPO, **ARMS["rl_only"], "learning_rate": 0.0, "beta": 0.0, "max_grad_norm": 1e9}
        settings["scale_rewards"] = scale_rewards
        arguments = SegCompassGRPOConfig(
            folder,
            max_steps=batches,
            seed=0,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            **settings,
        )
        trainer = SegCompassGRPOTrainer(
            model,
            args=arguments,
            train_dataset=Dataset.from_list(rows, features=row_features()),
            processing_class=processor,
        )
        found, optimizer = [], trainer.create_optimizer()
        optimizer.register_step_pre_hook(lambda *_: found.append(_flat(trainer.core)))
        trainer.train()
    return torch.stack(found)


def of_reference(path: Path, kinds, batches: int) -> torch.Tensor:
    """Gradients of the language loss on reference reasoning, `(batches, parameters)`, for as many prompts."""
    model, processor = load("rl_only", path), SegCompassProcessor.from_pretrained(path)
    model.freeze_for_training()
    collate = SegmentationCollator(processor, inputs="language", with_masks=False)
    rows, found = _rows(kinds, PROMPTS * batches), []
    for first in range(0, len(rows), PROMPTS):
        batch = collate(rows[first : first + PROMPTS])
        names = ("input_ids", "attention_mask", "pixel_values", "labels")
        model.zero_grad()
        model.vlm(**{name: batch[name] for name in names}).loss.backward()
        found.append(_flat(model))
    return torch.stack(found)


def _flat(model) -> torch.Tensor:
    """The gradients of the VLM's layers, `(parameters,)`."""
    return torch.cat([p.grad.flatten() for p in model.base_model.parameters() if p.grad is not None]).clone()


def share_of_signal(gradients: torch.Tensor) -> dict[str, float]:
    """`rho` and its standard error (jackknife over batches)."""
    unit = torch.nn.functional.normalize(gradients.double(), dim=1)
    cosines = (unit @ unit.T).numpy()

    def mean(keep: np.ndarray) -> float:
        inside = cosines[np.ix_(keep, keep)]
        return float((inside.sum() - np.trace(inside)) / (len(keep) * (len(keep) - 1)))

    every = np.arange(len(cosines))
    without = np.array([mean(np.delete(every, index)) for index in every])
    error = np.sqrt((len(every) - 1) * ((without - without.mean()) ** 2).mean())
    return {"rho": mean(every), "standard_error": float(error)}


def rows_of(record: dict) -> Iterator[str]:
    for name, cell in record.items():
        rho, error = cell["rho"], cell["standard_error"]
        low, high = rho - 1.96 * error, rho + 1.96 * error
        prompts = f"{PROMPTS * (1 - rho) / rho:,.0f}" if low > 0 else f"more than {PROMPTS * (1 - high) / high:,.0f}"
        yield f"| {name} | {rho:.4f} [{low:.4f}, {high:.4f}] | {prompts} |"


def sections(record: dict) -> Iterator[str]:
    for title, its in record.items():
        options = f"--start {its['start']} --scale-rewards {its['scale_rewards']} --batches {its['batches']}"
        yield f"## {title}"
        yield ""
        yield (
            f"`python benchmarks/scenes_study/signal_share.py {options}`, commit {its['commit']}, {PROMPTS} prompts "
            "per batch. 95 %, jackknife over batches."
        )
        yield ""
        yield "| gradient | mean cosine of two batches | prompts per step for as much signal as noise |"
        yield "|---|---|---|"
        yield from rows_of(its["gradients"])
        yield ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", choices=STARTS, default="cold")
    parser.add_argument("--scale-rewards", choices=("group", "batch"), default="group", help="TRL's option")
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--report", action="store_true", help="only the table, of what is recorded")
    given = parser.parse_args()
    file = RESULTS / "signal.json"
    if not given.report:
        record = json.loads(file.read_text()) if file.is_file() else {}
        title = f"Start {given.start}, rewards scaled by the {given.scale_rewards}"
        write_json(file, record | {title: run(given)})
    record = json.loads(file.read_text())
    (RESULTS / "signal.md").write_text("\n".join(["# How much of a gradient is signal", "", *sections(record)]))


def run(given: argparse.Namespace) -> dict:
    """The record of one start and scaling."""
    path, cells = start_of(given.start, "both"), {}
    options = {name: getattr(given, name) for name in ("start", "scale_rewards", "batches")}
    with counted(RUNS / "signal", options):
        for name, kinds in KINDS.items():
            gradients = of_policy(path, kinds, given.batches, given.scale_rewards)
            cells[f"policy gradient, {name}"] = share_of_signal(gradients)
            cells[f"reference reasoning, {name}"] = share_of_signal(of_reference(path, kinds, given.batches))
            print(name, cells, flush=True)
    return {"commit": commit(), **options, "gradients": cells}


if __name__ == "__main__":
    main()
