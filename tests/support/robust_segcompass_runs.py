"""The runs of `robust_runs` with SegCompassGRPOTrainer: `python robust_segcompass_runs.py FOLDER`.

KL to the reference, the weight switch, a one-cycle schedule, LoRA with dropout in one scenario, and a damaged image.
"""

import sys
from pathlib import Path

from datasets import Dataset
from grpo import tiny_rows, tiny_trainer
from robust_runs import KillableMixin, main
from tiny import tiny_model

from segcompass_hf.data.schema import row_features
from segcompass_hf.training import SegCompassGRPOTrainer
from segcompass_hf.training.adapters import lora_config


class KillableTrainer(KillableMixin, SegCompassGRPOTrainer):
    pass


def rows():
    """Six rows; the image of the second is cut short."""
    undamaged = tiny_rows((1, 2, 0, 2, 1, 1)).with_format("arrow")[:].to_pylist()
    undamaged[1]["image"]["bytes"] = undamaged[1]["image"]["bytes"][:100]
    return Dataset.from_list(undamaged, features=row_features())


def segcompass_trainer(folder):
    """A cycle of generation is 8 micro-steps, 4 optimizer steps; checkpoints every 3 fall inside it."""
    model = tiny_model("llava")
    return tiny_trainer(
        folder,
        model=model,
        rows=rows(),
        cls=KillableTrainer,
        peft_config=lora_config(model, r=4, dropout=0.2) if "lora" in str(folder) else None,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        steps_per_generation=4,
        num_iterations=2,
        max_steps=10,
        beta=0.1,
        logging_steps=2,
        save_strategy="steps",
        save_steps=3,
        lr_schedule="one_cycle",
        loss_weight_switch_step=5,
        switched_loss_weights={"mask_focal_weight": 3.0},
    )


if __name__ == "__main__":
    main(Path(sys.argv[1], "full"), segcompass_trainer, {"in_step": ("in_step", 5)})
    main(Path(sys.argv[1], "lora"), segcompass_trainer, {"half_written": ("half_written", 9)})
