"""Joint training (GRPO on the reasoning, segmentation losses on the masks), last of the stages in docs/training.md:

    python examples/train_grpo.py --config examples/configs/scenes_tiny_grpo.yaml

Flags override the file. On several GPUs: `accelerate launch --config_file ... examples/train_grpo.py --config ...`.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from trl import TrlParser

import segcompass_hf
from segcompass_hf import SegCompassForReasoningSegmentation, SegCompassProcessor
from segcompass_hf.training import SegCompassGRPOConfig, SegCompassGRPOTrainer


@dataclass
class ScriptArguments:
    model: str | None = field(default=None, metadata={"help": "SegCompass checkpoint: folder, Hub id or 'bundled'."})
    vlm: str | None = field(default=None, metadata={"help": "Without a model: id or folder of a VLM."})
    sam: str | None = field(default=None, metadata={"help": "Without a model: id or folder of a SAM."})
    sae: str | None = field(default=None, metadata={"help": "Without a model: folder of an SAE trained on that VLM."})
    num_slots: int = field(default=4, metadata={"help": "Without a model: slots of the new one."})
    dtype: str = field(default="float32", metadata={"help": "What weights are loaded in."})
    dataset: str = field(default="scenes", metadata={"help": "'scenes', or a data set in the row schema."})
    split: str = field(default="train", metadata={"help": "Of the data set."})
    num_samples: int = field(default=2000, metadata={"help": "Rows of Scenes that are made."})
    lora: bool = field(default=False, metadata={"help": "Train adapters above the SAE layer in place of the layers."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: float = field(default=32.0, metadata={"help": "Their scale times their rank."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Load the decoder in NF4; needs a model and lora."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in output_dir."})


def load_rows(script: ScriptArguments):
    if script.dataset == "scenes":
        from segcompass_hf.data import scenes

        return scenes.build(script.split, script.num_samples)
    from datasets import load_dataset, load_from_disk

    if (Path(script.dataset) / "state.json").is_file():
        return load_from_disk(script.dataset)
    return load_dataset(script.dataset, split=script.split)


def load_model(script: ScriptArguments):
    dtype = getattr(torch, script.dtype)
    if script.model is None:
        processor = SegCompassProcessor.from_parts(script.vlm, script.sam, num_slots=script.num_slots)
        parts = {"sae": script.sae, "num_slots": script.num_slots, "processor": processor, "dtype": dtype}
        return SegCompassForReasoningSegmentation.from_pretrained_parts(script.vlm, script.sam, **parts), processor
    path = segcompass_hf.bundled_checkpoint() if script.model == "bundled" else script.model
    options = {"dtype": dtype}
    if script.load_in_4bit:
        from segcompass_hf.training.quantization import quantization_config

        config = segcompass_hf.SegCompassConfig.from_pretrained(path)
        place = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        options |= {"quantization_config": quantization_config(config), "device_map": {"": place}}
    model = SegCompassForReasoningSegmentation.from_pretrained(path, **options)
    return model, SegCompassProcessor.from_pretrained(path)


def main() -> None:
    script, arguments = TrlParser((ScriptArguments, SegCompassGRPOConfig)).parse_args_and_config()
    model, processor = load_model(script)
    adapter = None
    if script.lora:
        from segcompass_hf.training.adapters import lora_config

        adapter = lora_config(model, r=script.lora_r, alpha=script.lora_alpha)
    trainer = SegCompassGRPOTrainer(
        model, args=arguments, train_dataset=load_rows(script), processing_class=processor, peft_config=adapter
    )
    trainer.train(resume_from_checkpoint=script.resume)
    trainer.save_model()


if __name__ == "__main__":
    main()
