"""The black-box baseline: slots from an MLP on the `<REF_POS>` states, in place of concepts.

An MLP with as many parameters as codebook and slot encoder together reads the last state at each `<REF_POS>`; what it
gives takes the place of the concept slots in the slot mapper. Everything else is the same model and the same training.

    python benchmarks/scenes_study/latent.py --start cold

makes the baseline's start: the shared warm-up and SAE with a segmentation stage of its own, of the same length.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from runs import counted
from settings import RUNS, STARTS
from start import folder_of, recipe_of, rows_of
from torch import nn
from transformers import set_seed

from segcompass_hf import SegCompassForReasoningSegmentation
from segcompass_hf.training import SegmentationTrainer
from segcompass_hf.training.recipe.parts import PartLoader, Parts

# Options that teach the slots of concepts, which are not there.
OFF = {"codebook_init": "keep", "slots_alone_share": 0.0, "drop_references_share": 0.0}


class LatentQueries(nn.Module):
    """A slot mapper that makes its own slots: `s_k = W_2 GELU(W_1 LN(r_k))`, whatever slots it is given."""

    def __init__(self, mapper: nn.Module, hidden_size: int, d_slot: int, num_parameters: int):
        super().__init__()
        self.mapper = mapper
        self.norm = nn.LayerNorm(hidden_size)
        width = round(num_parameters / (hidden_size + d_slot))
        self.up, self.down = nn.Linear(hidden_size, width), nn.Linear(width, d_slot)

    def slots(self, reference_states: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(self.norm(reference_states.to(self.up.weight.dtype)))))

    def forward(self, reference_states: torch.Tensor, slots: torch.Tensor, image_embeddings: torch.Tensor):
        return self.mapper(reference_states, self.slots(reference_states), image_embeddings)


class LatentQuerySegmentation(SegCompassForReasoningSegmentation):
    """SegCompass without its concept path, which stays in place untrained so that checkpoints load."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        replaced = [*self.codebook.parameters(), *self.slot_encoder.parameters()]
        size = sum(parameter.numel() for parameter in replaced)
        self.slot_mapper = LatentQueries(self.slot_mapper, self.config.hidden_size, self.config.d_slot, size)

    def freeze_for_training(self, *args, **kwargs):
        super().freeze_for_training(*args, **kwargs)
        for part in (self.codebook, self.slot_encoder):
            part.requires_grad_(False)
        return self


def latent_folder(start: str) -> Path:
    return RUNS / f"start-{start}-latent"


def run(start: str) -> None:
    """The segmentation stage with latent queries, from its last checkpoint where there is one."""
    folder, recipe = latent_folder(start) / "segmentation", recipe_of(start)
    if (folder / "config.json").exists():
        return
    stage = next(stage for stage in recipe.stages if stage.name == "segmentation")
    rows = rows_of(STARTS[start], recipe)["segmentation"]
    stage.folder, stage.written = folder, stage.written | OFF
    arguments = stage.arguments()
    set_seed(arguments.seed)
    parts = Parts(vlm=str(folder_of(start) / "warmup"), sam=recipe.settings.sam, sae=str(folder_of(start) / "sae"))
    loader = PartLoader(recipe.settings)
    processor = loader.processor(parts)
    concepts = loader.model(parts, processor)
    model = LatentQuerySegmentation(concepts.config, concepts.vlm, concepts.sam, concepts.sae)
    trainer = SegmentationTrainer(model, arguments, rows.train, None, processor)
    trainer.train(resume_from_checkpoint=True)
    processor.save_pretrained(folder)
    trainer.save_model()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", choices=STARTS, default="cold")
    given = parser.parse_args()
    with counted(latent_folder(given.start), {"start": given.start, **OFF}):
        run(given.start)


if __name__ == "__main__":
    main()
