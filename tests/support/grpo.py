"""Tiny rows, settings and trainers for tests of joint training."""

import numpy as np
from tiny import tiny_image, tiny_mask, tiny_model, tiny_processor

INSTRUCTIONS = ("the red box", "what stops the rain", "every cup on the table please", "nothing at all")


def tiny_rows(num_objects=(1, 0, 2, 1), size=(40, 30)):
    """`datasets.Dataset` in the row schema with as many objects per row as asked."""
    from datasets import Dataset

    from segcompass_hf.data.schema import encode_mask, row_features

    rows = []
    for index, count in enumerate(num_objects):
        masks = tiny_mask(count, size) if count else np.zeros((0, *size[::-1]))
        rows.append(
            {
                "image": tiny_image(index, size),
                "instruction": INSTRUCTIONS[index % 4],
                "masks": [encode_mask(mask) for mask in masks],
                "distractor_masks": None,
                "ignore": None,
                "instance_ids": list(range(count)),
                "sample_id": f"row-{index}",
                "image_id": f"image-{index}",
                "source": "tiny",
                "split": "train",
                "kind": None,
                "is_reasoning": False,
                "reasoning": "a box is red.",
            }
        )
    return Dataset.from_list(rows, features=row_features())


def by_length(completions, **kwargs):
    """A reward that differs within a group, whatever the random model writes."""
    return [len(set(completion[0]["content"])) / 10 for completion in completions]


def tiny_trainer(
    output_dir, family="llava", model=None, rows=None, reward_funcs=None, cls=None, processor=None, **settings
):
    from segcompass_hf.training import SegCompassGRPOConfig, SegCompassGRPOTrainer

    peft_config = settings.pop("peft_config", None)
    settings = {
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 6,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "codebook_lr_factor": 1.0,
        "slot_mapper_lr_factor": 1.0,
        "prompt_encoder_lr_factor": 1.0,
        "mask_decoder_lr_factor": 1.0,
        "disable_tqdm": True,
    } | settings
    return (cls or SegCompassGRPOTrainer)(
        tiny_model(family) if model is None else model,
        reward_funcs=[by_length] if reward_funcs is None else reward_funcs,
        args=SegCompassGRPOConfig(str(output_dir), **settings),
        train_dataset=tiny_rows() if rows is None else rows,
        processing_class=tiny_processor(family) if processor is None else processor,
        peft_config=peft_config,
    )
