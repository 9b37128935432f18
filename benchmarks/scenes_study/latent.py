"""The black-box baseline: slots from an MLP on the `<REF_POS>` states, in place of concepts.

An MLP with as many parameters as codebook and slot encoder together reads the last state at each `<REF_POS>`; what it
gives takes the place of the concept slots in the slot mapper. Everything else is the same model and the same training.

    python benchmarks/scenes_study/latent.py --start cold

makes the baseline's start: the shared warm-up with its own slot and joint stages of the shared start's lengths.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from runs import counted
from settings import RUNS, STARTS
from start import folder_of
from torch import nn
from transformers import set_seed

from segcompass_hf import SegCompassForReasoningSegmentation
from segcompass_hf.training import scenes_recipe as recipe
from segcompass_hf.training.scenes_batches import SceneCollator
from segcompass_hf.training.scenes_joint import JointCollator, JointTrainer
from segcompass_hf.training.scenes_slots import SlotTrainer

STAGES = ("slots", "joint")


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


class LatentSlotTrainer(SlotTrainer):
    """The slot stage with latent queries: what is taught is the same."""

    def slots_of(self, model, inputs):
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        with torch.no_grad():
            last = model.base_model(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"])[0]
        return model.slot_mapper.slots(model.find_reference_states(last, ids, mask, inputs["completion_mask"]))


def latent_folder(start: str) -> Path:
    return RUNS / f"start-{start}-latent"


def _slots(start, stage, arguments):
    """The shared start's model before its slot stage, with latent queries."""
    concepts, trainer = recipe._slots(folder_of(start), stage, arguments)
    model = LatentQuerySegmentation(concepts.config, concepts.vlm, concepts.sam, concepts.sae)
    model.slot_words = concepts.slot_words
    model.requires_grad_(False)
    for part in (model.slot_mapper.norm, model.slot_mapper.up, model.slot_mapper.down, model.slot_words):
        part.requires_grad_(True)
    collator = SceneCollator(recipe.build_processor().tokenizer)
    trainer = LatentSlotTrainer(
        model=model, args=arguments, train_dataset=trainer.train_dataset, data_collator=collator, adamw_ratio=0.5
    )
    return model, trainer


def _joint(start, stage, arguments):
    model = LatentQuerySegmentation.from_pretrained(latent_folder(start) / "slots", dtype=torch.float32)
    model.vlm.set_attn_implementation("eager")
    model.freeze_for_training()
    return model, JointTrainer(
        model=model,
        args=arguments,
        train_dataset=recipe._scenes(stage),
        data_collator=JointCollator(recipe.build_processor().tokenizer),
        part_learning_rates={"vlm": 0.2, "sam": 0.1},
        adamw_ratio=0.5,
        slots_alone=0.0,  # the reference states are all that this model has
        drop_references=0.0,
    )


def run_stage(start: str, name: str) -> None:
    """One of the two stages, from its last checkpoint where there is one."""
    folder, stage = latent_folder(start) / name, STARTS[start][name]
    if (folder / recipe.LOG).exists():
        return
    set_seed(stage.seed)
    arguments = recipe._arguments(name, stage, folder)
    model, trainer = {"slots": _slots, "joint": _joint}[name](start, stage, arguments)
    trainer.train(resume_from_checkpoint=recipe.last_checkpoint(folder))
    if name == "slots":
        del model.slot_words
    else:
        recipe.build_processor().save_pretrained(folder)
    model.save_pretrained(folder)
    (folder / recipe.LOG).write_text("".join(json.dumps(entry) + "\n" for entry in trainer.state.log_history))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", choices=STARTS, default="cold")
    parser.add_argument("--stage", choices=STAGES, help="only this stage, in this process")
    given = parser.parse_args()
    if given.stage:
        with counted(latent_folder(given.start) / given.stage, dataclasses.asdict(STARTS[given.start][given.stage])):
            run_stage(given.start, given.stage)
        return
    environment = dict(os.environ) if torch.cuda.is_available() else {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in STAGES:
        if not (latent_folder(given.start) / name / recipe.LOG).exists():
            if subprocess.call([sys.executable, __file__, "--start", given.start, "--stage", name], env=environment):
                sys.exit(f"stage {name} failed; fix what its log says and run the same command again.")


if __name__ == "__main__":
    main()
