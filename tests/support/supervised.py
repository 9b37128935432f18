"""What the tests of warm-up and supervised segmentation share: rows, trainers on tiny models, a two-process worker.

`torchrun --nproc_per_node 2 tests/support/supervised.py FOLDER` writes the gradients of one step.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from tiny import tiny_image, tiny_mask, tiny_model, tiny_processor, tiny_vlm_config

from segcompass_hf.data.schema import encode_mask
from segcompass_hf.evaluation.processes import Processes

# Objects of eight samples: a first half almost without targets, so that means of means would be wrong.
UNEVEN = (0, 0, 1, 0, 2, 1, 3, 1)
REASONINGS = ("the red one", None, "two candidates: a circle, a square, the first is larger", "the small ring")


def tiny_row(index: int = 0, num_objects: int = 1, reasoning: str | None = "the red one", **columns) -> dict:
    """A row in the row schema: `num_objects` stripes on a 40 x 30 picture."""
    masks = tiny_mask(num_objects) if num_objects else []
    return {
        "image": tiny_image(index),
        "instruction": "the red circle",
        "masks": [encode_mask(mask) for mask in masks],
        "sample_id": f"sample-{index}",
        "kind": None,
        "source": "tiny",
        "reasoning": reasoning,
    } | columns


def uneven_rows() -> list[dict]:
    """Eight rows, unevenly filled with objects and words of reasoning."""
    rows = []
    for index, count in enumerate(UNEVEN):
        rows.append(tiny_row(index, count, REASONINGS[index // 2], instruction="the red circle " * (1 + index % 3)))
    return rows


def bare_vlm(family: str = "llava", **overrides):
    """A tiny VLM of random weights, the same for the same arguments."""
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(tiny_vlm_config(family, **overrides))


def arguments(config_class, output_dir, **settings):
    """Quiet settings for one CPU process; no clipping, so that gradients can be compared."""
    defaults = {
        "output_dir": str(output_dir),
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }
    return config_class(**(defaults | settings))


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step."""

    def __init__(self):
        self.values: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.values:
            named = model.named_parameters()
            self.values = {n.removeprefix("module."): p.grad.clone() for n, p in named if p.grad is not None}


class InOrder:
    """Rows in the order of the data set, so that every layout of batches sees the same window."""

    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)


def one_step(stage: str, family: str, output_dir, **settings) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one optimizer step on the eight uneven rows."""
    gradients = Gradients()
    trainer = make_trainer(stage, family, output_dir, uneven_rows(), callbacks=[gradients], **settings)
    trainer.train()
    return trainer.state.log_history[0]["loss"], gradients.values


def make_trainer(stage: str, family: str, output_dir, rows, eval_rows=None, callbacks=None, model=None, **settings):
    """A trainer of a stage, `"segmentation"` or `"warmup"` (with alignment and reading), on a tiny model."""
    if stage == "segmentation":
        from segcompass_hf.training.segmentation.config import SegmentationConfig as Config
        from segcompass_hf.training.segmentation.trainer import SegmentationTrainer as Trainer
    else:
        from segcompass_hf.training.warmup.config import WarmupConfig as Config
        from segcompass_hf.training.warmup.trainer import WarmupTrainer as Trainer

        weights = {"alignment_weight": 0.5, "embedding_alignment_weight": 0.25, "reading_weight": 0.25}
        settings = weights | settings
    ordered = type("Ordered", (InOrder, Trainer), {})
    peft_config = settings.pop("peft_config", None)
    return ordered(
        model=tiny_model(family) if model is None else model,
        args=arguments(Config, output_dir, **settings),
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=tiny_processor(family),
        callbacks=callbacks,
        peft_config=peft_config,
    )


def main() -> None:
    """One step of each stage and layout in each of two processes; the first one writes what came out."""
    folder, results = Path(sys.argv[1]), {}
    for stage in ("segmentation", "warmup"):
        for batch_size, accumulation in ((4, 1), (2, 2)):
            layout = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
            # With it, DistributedDataParallel waits for a gradient of everything that trains.
            layout["gradient_checkpointing"] = accumulation == 2
            loss, gradients = one_step(stage, "llava", folder / "out", **layout)
            results[f"{stage}-{batch_size}x{accumulation}"] = loss
            if os.environ["RANK"] == "0":
                torch.save(gradients, folder / f"{stage}-{batch_size}x{accumulation}.pt")
        for time in ("first", "again"):
            loss, gradients = one_step(stage, "llava", folder / "out", embedding_cache_dir=folder / "cache", **layout)
            results[f"{stage}-{time}"] = loss
            if os.environ["RANK"] == "0":
                torch.save(gradients, folder / f"{stage}-{time}.pt")
    results["world_size"] = torch.distributed.get_world_size()
    if os.environ["RANK"] == "0":
        (folder / "results.json").write_text(json.dumps(results))
    Processes.current().finish()


if __name__ == "__main__":
    main()
