"""Stage 6 of scenes-tiny: codebook and slots learn which object each slot is about, before any mask is asked."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .scenes_batches import ATTRIBUTES, CELLS
from .scenes_trainers import RecipeTrainer


class SlotTrainer(RecipeTrainer):
    """Slot k must tell place, color, shape and size of the k-th object of the answer to a linear head.

    Asked for masks at once, the slots stay blurred for thousands of steps: a mask says little about which of a hundred
    tokens to attend to. The head is `model.slot_words`, dropped afterwards; everything but codebook and slot encoder
    rests.
    """

    @staticmethod
    def add_head(model: nn.Module) -> None:
        sizes = [len(CELLS), *(len(values) for values in ATTRIBUTES.values())]
        model.slot_words = nn.Linear(model.config.d_slot, sum(sizes))
        model.requires_grad_(False)
        for part in (model.codebook, model.slot_encoder, model.slot_words):
            part.requires_grad_(True)

    def slots_of(self, model: nn.Module, inputs: dict) -> torch.Tensor:
        """Slots `(batch_size, num_slots, d_slot)` of a batch; gradients reach codebook and slot encoder."""
        names = ("input_ids", "attention_mask", "pixel_values")
        with torch.no_grad():
            concepts = model(**{name: inputs[name] for name in names}, output_concepts=True).concepts
        return model.encode_slots(concepts, inputs["attention_mask"]).slots

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        slots = self.slots_of(model, inputs)
        rows, columns = (inputs["targets"] > 0).nonzero(as_tuple=True)
        objects = inputs["objects"][rows, inputs["targets"][rows, columns] - 1]  # (pairs, 4): color, shape, size, cell
        scores = model.slot_words(slots[rows, columns]).float()
        parts = scores.split([len(CELLS), *(len(values) for values in ATTRIBUTES.values())], dim=-1)
        labels = objects[:, [3, 0, 1, 2]].unbind(-1)
        losses = [F.cross_entropy(part, label) for part, label in zip(parts, labels, strict=True)]
        names = ("cell", *ATTRIBUTES)
        for name, part, label in zip(names, parts, labels, strict=True):
            self.report(**{f"{name}_right": (part.argmax(-1) == label).float().mean()})
        return sum(losses)
