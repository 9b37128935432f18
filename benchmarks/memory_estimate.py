"""Memory that a training configuration needs, computed from shapes alone (no weights, no GPU, no network):

    python benchmarks/memory_estimate.py --config examples/configs/qwen2_5_vl_7b_lora_4bit.yaml

What memory depends on but a configuration does not say (backbone of a checkpoint that is not there, GPUs, tokens of a
prompt) is given by flags. `docs/how-to/one-24-gb-gpu.md` says how far the figures were checked.
"""

import argparse
from collections.abc import Sequence
from importlib import import_module

import torch
import yaml
from trl import TrlParser

import segcompass_hf
from segcompass_hf import SegCompassConfig
from segcompass_hf.training.memory.estimate import MemoryEstimate, readable_memory
from segcompass_hf.training.memory.shapes import composite_config
from segcompass_hf.training.memory.stages import estimate_stage
from segcompass_hf.training.recipe.settings import STAGES


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="yaml of one of the example scripts")
    parser.add_argument("--stage", choices=STAGES, default="grpo")
    parser.add_argument("--vlm", help="Hub id of the VLM in the checkpoint that the configuration starts from")
    parser.add_argument("--sam", help="the same of SAM")
    parser.add_argument("--gpus", type=int, default=1, help="0: a CPU")
    parser.add_argument("--sharding", choices=("none", "fsdp", "zero3"), default="none")
    parser.add_argument("--prompt-tokens", type=int, default=700, help="image tokens included")
    parser.add_argument("--completion-tokens", type=int, default=512, help="where the configuration sets no limit")
    parser.add_argument("--active-concepts", type=int, default=64, help="per token")
    return parser.parse_args(arguments)


def training_arguments(stage: str, path: str):
    """The trainer's arguments in a yaml file, parsed as the scripts do; keys of the script itself are skipped."""
    module, name = STAGES[stage]
    config_class = getattr(import_module(f"segcompass_hf.training.{module}"), name)
    flags = ["--config", path] + ([] if torch.cuda.is_available() else ["--use_cpu", "true"])
    return TrlParser(config_class).parse_args_and_config(flags, fail_with_unknown_args=False)[0]


def model_config(options: argparse.Namespace, script: dict) -> SegCompassConfig:
    """Configuration of the model that a yaml file starts from or composes."""
    vlm, path = options.vlm or script.get("vlm"), script.get("model", "bundled")
    if vlm in (None, "bundled"):
        return SegCompassConfig.from_pretrained(segcompass_hf.bundled_checkpoint() if path == "bundled" else path)
    slots = {"num_slots": script["num_slots"]} if "num_slots" in script else {}
    return composite_config(vlm, options.sam or script.get("sam"), **slots)


def estimate(options: argparse.Namespace) -> MemoryEstimate:
    with open(options.config) as file:
        script = yaml.safe_load(file)
    config = model_config(options, script)
    others = {name: getattr(options, name) for name in ("gpus", "sharding", "prompt_tokens", "active_concepts")}
    return estimate_stage(
        options.stage,
        training_arguments(options.stage, options.config),
        config,
        lora_r=script.get("lora_r", 0),
        dtype=getattr(torch, script.get("dtype", script.get("vlm_dtype", "float32"))),
        load_in_4bit=bool(script.get("load_in_4bit")),
        completion_tokens=options.completion_tokens,
        **others,
    )


def main() -> None:
    result = estimate(parse())
    print(result.table())
    print(f"\nExpected memory: {readable_memory(result.peak)}")


if __name__ == "__main__":
    main()
