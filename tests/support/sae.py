# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What the tests of SAEs and their training share: SAEs worked out by hand, rows, settings."""

import torch
from tiny import tiny_image
from transformers import TrainerCallback

from segcompass_hf.configuration_segcompass import SegCompassSaeConfig
from segcompass_hf.modeling_sae import SegCompassSae
from segcompass_hf.training.sae.activations import ActivationHarvester
from segcompass_hf.training.sae.config import SaeTrainingConfig
from segcompass_hf.training.sae.rows import RowEncoder

WORDS = ["the largest red circle", "all the blue squares", "the ring", "the second square from the left of the image"]
QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}


def by_hand(**config) -> SegCompassSae:
    """Two inputs, three features: pre-activations of (x, y) are x, y and x + y, each plus its bias."""
    sae = SegCompassSae(SegCompassSaeConfig(d_in=2, d_sae=3, **config)).eval()
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]))
        sae.W_dec.copy_(torch.tensor([[3.0, 4.0], [0.0, 1.0], [1.0, 0.0]]))
        sae.b_dec.copy_(torch.tensor([0.5, -0.5]))
    return sae


def seeded(d_in=8, d_sae=32, **config) -> SegCompassSae:
    torch.manual_seed(0)
    sae = SegCompassSae(SegCompassSaeConfig(d_in=d_in, d_sae=d_sae, initializer_range=0.3, **config)).eval()
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.rand_like(parameter) if name != "b_dec" else torch.randn_like(parameter))
    return sae


def rows(count=6):
    return [
        {"image": tiny_image(i), "instruction": WORDS[i % 4], "reasoning": "two candidates" if i % 2 else None}
        for i in range(count)
    ]


def interleaved():
    first, second = tiny_image(1), tiny_image(2)
    return {"images": [None, first, None, second], "texts": ["the red circle", None, "the blue square <s>", None]}


class Stream:
    """A data set that can only be iterated."""

    def __init__(self, rows):
        self.rows, self.epoch = rows, None

    def __iter__(self):
        return iter(self.rows)

    def set_epoch(self, epoch):
        self.epoch = epoch


def harvester(model, processor, layer=2, **kwargs):
    return ActivationHarvester(model.vlm, RowEncoder(processor), layer, **kwargs)


def settings(folder, **overrides) -> SaeTrainingConfig:
    defaults = {
        "d_sae": 64,
        "k": 4,
        "learning_rate": 3e-3,
        "l1_coefficient": 0.1,
        "normalize_activations": "per_token",
        "per_device_train_batch_size": 48,
        "buffer_tokens": 96,
        "rows_per_batch": 2,
        "max_steps": 12,
        "logging_steps": 3,
        "dead_after_tokens": 100,
        "max_eval_rows": 2,
    }
    architecture = overrides.get("architecture")
    if architecture is not None and architecture not in ("topk", "batchtopk"):
        defaults.pop("k")
    return SaeTrainingConfig(output_dir=str(folder), **(QUIET | defaults | overrides))


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step
