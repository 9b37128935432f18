"""Stage 7 of scenes-tiny: supervised SegCompass training, SAE and layers below it frozen, teacher-forced reasoning."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..images_segcompass import fit_objects_to_slots
from .scenes_batches import SceneCollator
from .scenes_trainers import RecipeTrainer

MAP_STRIDE = 2  # 112-pixel canvas -> 56 x 56 maps


class JointCollator(SceneCollator):
    """Adds SAM's pixels and soft mask targets `(batch, num_slots, 56, 56)` to the text of `SceneCollator`.

    With more objects than slots the smallest are united.
    """

    def __call__(self, samples):
        batch = super().__call__(samples)
        targets = batch.pop("targets")
        ids = batch.pop("ids")
        full = (ids[:, None] == targets[..., None, None]) & (targets > 0)[..., None, None]
        for row, sample in enumerate(samples):
            if len(sample["targets"]) > self.num_slots:
                objects = ids[row] == torch.tensor(sample["targets"])[:, None, None] + 1
                full[row] = fit_objects_to_slots(objects, self.num_slots, "merge", f"scene {row}")
        batch.pop("objects")
        batch["mask_labels"] = F.avg_pool2d(full.float(), MAP_STRIDE)
        batch["num_objects"] = (targets > 0).sum(-1)
        batch["sam_pixel_values"] = batch["pixel_values"]
        return batch


class JointTrainer(RecipeTrainer):
    """Language, segmentation and confidence losses of the model's own forward; reports their parts.

    The reference states are dropped (zeroed): all of them for the first part of the training, then those of a share of
    the samples. Without this the language model's last layers learn to point at places by themselves, before the slots
    have found out what to attend to, and the concept path stays unused.

    Args:
        slots_alone (`float`): fraction of the steps in which slots are all there is.
        drop_references (`float`): share of the samples without reference states after that.
    """

    def __init__(self, *args, slots_alone: float = 0.6, drop_references: float = 0.5, **kwargs):
        super().__init__(*args, **kwargs)
        self.slots_alone, self.drop_references = slots_alone, drop_references
        self.model.slot_mapper.register_forward_pre_hook(self._drop_references)

    def _drop_references(self, slot_mapper, inputs):
        if not slot_mapper.training:
            return None
        states, *others = inputs
        alone = self.state.global_step < self.slots_alone * self.state.max_steps
        keep = torch.rand(len(states), 1, 1, device=states.device) >= (1.0 if alone else self.drop_references)
        return states * keep, *others

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = model(**inputs)
        losses = output.losses
        self.report(
            language=output.language_loss,
            heatmap_bce=losses.heatmap_bce,
            heatmap_dice=losses.heatmap_dice,
            mask_dice=losses.mask_dice,
            confidence=losses.confidence_loss,
            slots_right=self._slots_right(output, inputs["num_objects"]),
        )
        return (output.loss, output) if return_outputs else output.loss

    @torch.no_grad()
    def _slots_right(self, output, num_objects: torch.Tensor) -> torch.Tensor:
        """Share of samples in which as many slots are confident as there are objects."""
        kept = (output.slot_logits > output_threshold(self.model)).sum(-1)
        return (kept == num_objects).float().mean()


def output_threshold(model: nn.Module) -> float:
    return float(model.config.slot_logit_threshold)
