"""Joint training (GRPO on the reasoning, segmentation losses on the masks), the last stage of a training:

    python examples/train_grpo.py --config examples/configs/scenes_tiny_grpo.yaml

Flags override the file. On several GPUs: `accelerate launch --config_file ... examples/train_grpo.py --config ...`.
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
from segcompass_hf.training import SegCompassGRPOConfig, SegCompassGRPOTrainer
from segcompass_hf.training.arguments import read_arguments


@dataclass
class ScriptArguments:
    model: str = field(default="bundled", metadata={"help": "Id or folder of a SegCompass, or 'bundled'."})
    vlm: str | None = field(default=None, metadata={"help": "Compose a new model around this VLM instead."})
    sam: str | None = field(default=None, metadata={"help": "With a vlm: id or folder of a SAM."})
    sae: str | None = field(default=None, metadata={"help": "With a vlm: folder of an SAE trained on it."})
    num_slots: int = field(default=4, metadata={"help": "With a vlm: slots."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32", metadata={"help": "Of the weights."})
    dataset: str = field(default="scenes", metadata={"help": "'scenes', or a data set in the row schema."})
    num_samples: int = field(default=2000, metadata={"help": "Rows of Scenes that are made."})
    lora_r: int = field(default=0, metadata={"help": "Rank of LoRA adapters above the SAE; 0 trains the layers."})
    load_in_4bit: bool = field(default=False, metadata={"help": "The decoder in NF4; with a model and lora_r."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last whole checkpoint, if there is one."})


def load_model(script: ScriptArguments):
    dtype = getattr(torch, script.dtype)
    if script.vlm is not None and script.load_in_4bit:
        raise SystemExit("load_in_4bit goes with a model; compose one around this vlm first (segcompass init).")
    if script.vlm is not None:
        processor = SegCompassProcessor.from_parts(script.vlm, script.sam, num_slots=script.num_slots)
        parts = {"sae": script.sae, "num_slots": script.num_slots, "processor": processor, "dtype": dtype}
        return SegCompassForReasoningSegmentation.from_pretrained_parts(script.vlm, script.sam, **parts), processor
    path = segcompass_hf.bundled_checkpoint() if script.model == "bundled" else script.model
    options = {"dtype": dtype}
    if script.load_in_4bit:
        from segcompass_hf.training.quantization import quantization_config

        place = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        config = segcompass_hf.SegCompassConfig.from_pretrained(path)
        options |= {"quantization_config": quantization_config(config), "device_map": {"": place}}
    model = SegCompassForReasoningSegmentation.from_pretrained(path, **options)
    return model, SegCompassProcessor.from_pretrained(path)


def main() -> None:
    script, arguments = read_arguments(ScriptArguments, SegCompassGRPOConfig)
    set_seed(arguments.seed)  # before new weights are drawn
    model, processor = load_model(script)
    if script.dataset == "scenes":
        rows = scenes.build("train", script.num_samples)
    else:
        from datasets import load_dataset

        rows = load_dataset(script.dataset, split="train")
    adapter = None
    if script.lora_r:
        from segcompass_hf.training.adapters import lora_config

        heads, rows_that_train = "full" if arguments.train_heads else "none", arguments.train_token_rows
        size = {"r": script.lora_r, "alpha": 2 * script.lora_r}
        adapter = lora_config(model, **size, heads=heads, train_token_rows=rows_that_train)
    trainer = SegCompassGRPOTrainer(model, arguments, rows, None, processor, adapter)
    trainer.train(resume_from_checkpoint=script.resume)
    trainer.save_model()
    Processes.current().finish()


if __name__ == "__main__":
    run_script(main, "--resume")
