# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""How much `gpu_parts.py` measures: on a GPU, and on a CPU to try it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """How much of everything is measured.

    Args:
        presets (`tuple[str, ...]`): Keys of `PRESETS`.
        dtype (`str`): Of models at real layer shapes.
        product (`int`): Side of the matrices of `machine`.
        tests (`tuple[str, ...]`): Further arguments of pytest.
        concept_shapes (`tuple`): Per line: samples, tokens of each, `d_in`, `d_sae`.
        batches (`tuple[int, ...]`): Rows of a supervised step.
        segment (`tuple`): Per line: dtype, pictures at once and reasoning, of the bundled checkpoint.
        pictures (`tuple[int, ...]`): At once, at real layer shapes, of which `new_tokens` are written.
        sam (`tuple[int, int]`): Width and depth of SAM's image encoder.
        grpo (`tuple[str, ...]`): Prompts x completions of one step of joint training, `micro_batch` at a time.
        compiled (`tuple[str, ...]`): What is compiled, keys of `gpu_parts.COMPILED`; a whole forward takes minutes.
        compiled_depth (`int`): Layers of the language model that are compiled.
    """

    presets: tuple[str, ...]
    dtype: str
    product: int
    tests: tuple[str, ...]
    concept_shapes: tuple[tuple[int, int, int, int], ...]
    batches: tuple[int, ...]
    segment: tuple[tuple[str, int, str], ...]
    pictures: tuple[int, ...]
    new_tokens: int
    sam: tuple[int, int]
    grpo: tuple[str, ...]
    micro_batch: int
    compiled: tuple[str, ...]
    compiled_depth: int


GPU = Sizes(
    presets=("llava-7b", "qwen3-vl-8b"),
    dtype="bfloat16",
    product=8192,
    tests=(),
    concept_shapes=((1, 1400, 4096, 65536), (8, 926, 4096, 65536), (8, 926, 4096, 16384)),
    batches=(2, 8),
    segment=(
        ("float32", 1, "full"), ("bfloat16", 1, "full"), ("bfloat16", 32, "full"), ("bfloat16", 32, "none"),
        ("nf4", 32, "full"), ("int8", 32, "full"), ("bfloat16", 128, "full"), ("float32", 32, "full"),
        ("float16", 32, "full"), ("bfloat16", 8, "full"), ("bfloat16", 32, "short"),
    ),
    pictures=(1, 8),
    new_tokens=64,
    sam=(1280, 32),
    grpo=("32x16", "64x16", "128x16"),
    micro_batch=128,
    compiled=("SAM's image encoder", "decoder layers", "whole forward"),
    compiled_depth=4,
)  # fmt: skip
CPU = Sizes(
    presets=("tiny", "tiny-qwen3-vl"),
    dtype="float32",
    product=256,
    tests=("-k", "TestForward and llava or sparse or training_step and llava"),
    concept_shapes=((1, 64, 64, 512),),
    batches=(2,),
    segment=(("float32", 1, "none"), ("bfloat16", 1, "none"), ("nf4", 2, "none")),
    pictures=(1,),
    new_tokens=20,
    sam=(32, 1),
    grpo=("2x2",),
    micro_batch=4,
    compiled=("SAM's image encoder", "decoder layers"),
    compiled_depth=2,
)
