# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""A step of joint training, for comparing the memory estimate with what is measured."""

import torch

from segcompass_hf.reading_segcompass import MaskTargets
from segcompass_hf.token_grids_segcompass import EDGE_UNITS
from segcompass_hf.training.grpo.forward import JointTargets
from segcompass_hf.training.memory.setup import TrainingSetup


def joint_inputs(model, setup: TrainingSetup) -> dict:
    """Inputs of the joint forward, of random tokens: prompts, completions and two objects on 256 x 256 pixels."""
    batch_size, completion = setup.batch_size, setup.completion_tokens
    tokens = setup.prompt_tokens + completion
    ids = torch.randint(10, 300, (batch_size, tokens))
    ids[:, 5:9], ids[:, -5:-1] = model.config.image_token_id, model.config.ref_token_id
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-completion] = -100
    with torch.no_grad():
        embeddings = model.encode_image(torch.randn(batch_size, 3, 256, 256))
    masks = torch.zeros(batch_size, 4, model.mask_stage.map_size, model.mask_stage.map_size)
    masks[:, 0, :9, :9] = masks[:, 1, 20:, 20:] = 1
    segmentation = JointTargets(
        completion_mask=torch.ones(batch_size, completion, dtype=torch.long),
        image_embeddings=embeddings,
        reshaped_input_sizes=torch.full((batch_size, 2), 256),
        masks=MaskTargets(masks, torch.full((batch_size,), 2), decode="matched"),
        image_token_grids=torch.tensor([[2, 2, 0, EDGE_UNITS, 0, EDGE_UNITS]]).expand(batch_size, -1),
    )
    vlm = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(batch_size, 3, 28, 28)}
    return {**vlm, "labels": labels, "segmentation": segmentation}
