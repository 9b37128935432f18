"""Supervised segmentation on reference answers (teacher forcing), with the SAE and what it reads frozen.

    python examples/train_segmentation.py --config examples/configs/scenes_tiny_segmentation.yaml

gives the VLM, SAE and SAM of the bundled checkpoint new heads and trains them on Scenes, in minutes on a CPU. Any VLM
with an SAE trained on it, any data set in the row schema:

    accelerate launch examples/train_segmentation.py --vlm runs/warmup --sae runs/sae --sam facebook/sam-vit-huge \
        --dataset my/rows --num_eval_rows 500 --output_dir runs/segmentation --bf16 --gradient_checkpointing

After `segcompass init --from` has put another segmenter into a checkpoint, `--trainable masks --slot_cache_dir FOLDER`
trains what reads it, and the VLM reads every row once.

Flags override the file. With `--resume` the same command goes on from the last whole checkpoint.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import set_seed

import segcompass_hf
from segcompass_hf import SegCompassForReasoningSegmentation, SegCompassProcessor
from segcompass_hf.data import scenes
from segcompass_hf.evaluation.processes import Processes
from segcompass_hf.stopping import run_script
from segcompass_hf.training.arguments import read_arguments
from segcompass_hf.training.segmentation.trainer import SegmentationConfig, SegmentationTrainer


@dataclass
class ScriptArguments:
    model: str = field(default="bundled", metadata={"help": "Id or folder of a SegCompass, or 'bundled'."})
    vlm: str | None = field(default=None, metadata={"help": "Compose a new model around this VLM instead."})
    sam: str | None = field(default=None, metadata={"help": "With a vlm: id or folder of a SAM."})
    sae: str | None = field(default=None, metadata={"help": "With a vlm: folder of an SAE trained on it."})
    num_slots: int = field(default=4, metadata={"help": "With a vlm: slots."})
    fresh_heads: bool = field(default=False, metadata={"help": "New codebook, slot encoder and slot mapper."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32", metadata={"help": "Of the weights."})
    dataset: str = field(default="scenes", metadata={"help": "'scenes', or a data set in the row schema."})
    num_samples: int = field(default=2000, metadata={"help": "Rows of Scenes that are made."})
    num_eval_rows: int = field(default=0, metadata={"help": "Rows taken off the end for evaluation."})
    lora_r: int = field(default=0, metadata={"help": "Rank of LoRA adapters above the SAE; 0 trains the layers."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last whole checkpoint, if there is one."})


def load_model(script: ScriptArguments):
    dtype = getattr(torch, script.dtype)
    if script.vlm is not None:
        processor = SegCompassProcessor.from_parts(script.vlm, script.sam, num_slots=script.num_slots)
        parts = {"sae": script.sae, "num_slots": script.num_slots, "processor": processor, "dtype": dtype}
        return SegCompassForReasoningSegmentation.from_pretrained_parts(script.vlm, script.sam, **parts), processor
    path = segcompass_hf.bundled_checkpoint() if script.model == "bundled" else script.model
    model = SegCompassForReasoningSegmentation.from_pretrained(path, dtype=dtype)
    if script.fresh_heads:
        heads = SegCompassForReasoningSegmentation(model.config, model.vlm, model.sam, model.sae)
        model = heads.to(dtype)
    return model, SegCompassProcessor.from_pretrained(path)


def main() -> None:
    script, arguments = read_arguments(ScriptArguments, SegmentationConfig)
    set_seed(arguments.seed)  # before new weights are drawn
    model, processor = load_model(script)
    if script.dataset == "scenes":
        rows = scenes.build("train", script.num_samples)
    else:
        from datasets import load_dataset

        rows = load_dataset(script.dataset, split="train")
    evaluation = rows.select(range(len(rows) - script.num_eval_rows, len(rows))) if script.num_eval_rows else None
    adapter = None
    if script.lora_r:
        from segcompass_hf.training.adapters import lora_config

        size = {"r": script.lora_r, "alpha": 2 * script.lora_r}
        adapter = lora_config(model, **size, train_token_rows=arguments.train_token_rows)
    rows = rows.select(range(len(rows) - script.num_eval_rows))
    trainer = SegmentationTrainer(model, arguments, rows, evaluation, processor, adapter)
    trainer.train(resume_from_checkpoint=script.resume)
    trainer.save_model()
    Processes.current().finish()


if __name__ == "__main__":
    run_script(main, "--resume")
