"""Warm-up: a VLM learns the answer's format and to reason, from reference answers; the first stage of training.

    python examples/train_warmup.py --config examples/configs/scenes_tiny_warmup.yaml

trains the VLM of the bundled checkpoint anew on Scenes, in a few minutes on a CPU. Any VLM and any data set in the row
schema:

    accelerate launch examples/train_warmup.py --vlm llava-hf/llava-1.5-7b-hf --dataset my/rows --num_eval_rows 500 \
        --output_dir runs/warmup --bf16 --gradient_checkpointing --per_device_train_batch_size 4 --lora_r 32

Flags override the file. With `--resume` the same command goes on from the last whole checkpoint.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

import segcompass_hf
from segcompass_hf.data import scenes
from segcompass_hf.evaluation.processes import Processes
from segcompass_hf.stopping import run_script
from segcompass_hf.token_rows_segcompass import add_tokens
from segcompass_hf.training.arguments import read_arguments
from segcompass_hf.training.warmup.trainer import WarmupConfig, WarmupTrainer


@dataclass
class ScriptArguments:
    vlm: str = field(default="bundled", metadata={"help": "Id or folder of a VLM or a SegCompass, or 'bundled'."})
    fresh: bool = field(default=False, metadata={"help": "Random weights of the VLM's shape in place of its own."})
    num_slots: int = field(default=4, metadata={"help": "<REF_POS> tokens per answer; a SegCompass has its own."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32", metadata={"help": "Of the weights."})
    dataset: str = field(default="scenes", metadata={"help": "'scenes', or a data set in the row schema."})
    num_samples: int = field(default=2000, metadata={"help": "Rows of Scenes that are made."})
    num_eval_rows: int = field(default=0, metadata={"help": "Rows taken off the end for evaluation."})
    lora_r: int = field(default=0, metadata={"help": "Rank of LoRA adapters; 0 trains the weights themselves."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last whole checkpoint, if there is one."})


def load_model(script: ScriptArguments):
    path = segcompass_hf.bundled_checkpoint() if script.vlm == "bundled" else script.vlm
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=getattr(torch, script.dtype))
    if hasattr(model, "vlm"):
        processor = AutoProcessor.from_pretrained(path)
    else:
        processor = segcompass_hf.SegCompassProcessor.from_parts(path, num_slots=script.num_slots)
        add_tokens(processor.tokenizer, model)
    if script.fresh:
        model = AutoModelForImageTextToText.from_config(getattr(model, "vlm", model).config)
    return model, processor


def main() -> None:
    script, arguments = read_arguments(ScriptArguments, WarmupConfig)
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
        from peft import LoraConfig

        layers = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
        adapter = LoraConfig(r=script.lora_r, lora_alpha=2 * script.lora_r, target_modules=layers)
    rows = rows.select(range(len(rows) - script.num_eval_rows))
    trainer = WarmupTrainer(model, arguments, rows, evaluation, processor, adapter)
    trainer.train(resume_from_checkpoint=script.resume)
    trainer.merge_adapters()
    trainer.save_model()
    Processes.current().finish()


if __name__ == "__main__":
    run_script(main, "--resume")
