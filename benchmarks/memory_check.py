"""Compare the memory estimate with what the operating system counts, for a step of joint training on a CPU (Linux):

    MALLOC_MMAP_THRESHOLD_=65536 python benchmarks/memory_check.py

A random model of 8 layers, 4 sequences of 600 tokens; a line each with and without gradient checkpointing, for a SAM
and for a SAM 2. The variable lets freed memory go back at once, else the peak holds what the allocator keeps.
"""

import ctypes
import gc
import sys
from pathlib import Path

import torch
from trl.trainer.utils import add_fused_lm_head

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from joint_step import joint_inputs  # noqa: E402
from tiny import tiny_config, tiny_sam_config, tiny_segmenter_config, tiny_vlm_config  # noqa: E402

from segcompass_hf import SegCompassForReasoningSegmentation  # noqa: E402
from segcompass_hf.training.grpo.forward import add_joint_forward  # noqa: E402
from segcompass_hf.training.grpo.reference import ReferencePolicy  # noqa: E402
from segcompass_hf.training.memory.model import fake_model  # noqa: E402
from segcompass_hf.training.memory.setup import TrainingSetup  # noqa: E402
from segcompass_hf.training.memory.step import _checkpoint, training_bytes  # noqa: E402

SHAPE = {"batch_size": 4, "rollouts": 4, "prompt_tokens": 450, "completion_tokens": 150, "objects": 2}
QUANTILE = 2.2  # of the activations' standard deviation: about 57 of 4,096 random features are above


def config(segmenter: str):
    text = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "head_dim": 64}
    vlm = tiny_vlm_config("llava", **text, num_attention_heads=8, num_key_value_heads=8)
    fields = {"sae_config": {"d_in": 512, "d_sae": 4096, "layer": 2}, "d_slot": 128, "concept_threshold": 0.0}
    sam = tiny_sam_config(256, 16, 64) if segmenter == "sam" else tiny_segmenter_config(segmenter, 256)
    return tiny_config("llava", vlm_config=vlm, sam_config=sam, **fields)


def resident(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (at most since the mark was cleared), in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def compare(segmenter: str, checkpointing: bool) -> None:
    torch.manual_seed(0)
    settings = SHAPE | {"autocast": False, "gradient_checkpointing": checkpointing}
    model = SegCompassForReasoningSegmentation(config(segmenter)).freeze_for_training().train()
    reference = ReferencePolicy(model, 1.0)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    add_joint_forward(model, 1.0, False, reference)
    if checkpointing:
        _checkpoint(model)
    inputs = joint_inputs(model, TrainingSetup(**settings))

    def step() -> None:
        output = model(**inputs, fused_lm_head=True)
        (output.log_probs.sum() + output.segmentation).backward()

    encode, found = model.sae.encode, {}

    def watched(*args):
        features = encode(*args)
        found["active"] = (features >= model.config.concept_threshold).sum(-1).double().mean().item()
        found["std"] = features.pow(2).mean().mul(2).sqrt().item()  # of what the ReLU has halved
        return features

    model.sae.encode = watched
    step()
    model.config.concept_threshold = QUANTILE * found["std"]
    step()
    model.sae.encode = encode
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step()
    measured = resident("VmHWM") - before
    setup = TrainingSetup(**settings, active_concepts=round(found["active"]))
    with fake_model(config(segmenter)) as fake:
        estimated = sum(training_bytes(fake, setup))
    print(
        f"{segmenter}, checkpointing {checkpointing}: estimated {estimated / 2**20:.0f} MiB, measured "
        f"{measured / 2**20:.0f} MiB ({estimated / measured - 1:+.1%})",
        flush=True,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for segmenter in ("sam", "sam2"):
        for checkpointing in (True, False):
            compare(segmenter, checkpointing)
