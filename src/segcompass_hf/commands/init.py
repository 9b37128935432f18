# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""`segcompass init`: a ready-to-train checkpoint from a VLM, a SAM and, if there is one, an SAE; or a trained one with
another SAM."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .common import UserError, positive, user_errors

_EPILOG = """\
examples:
  segcompass init --vlm llava-hf/llava-1.5-7b-hf --sam facebook/sam-vit-huge --output runs/start
  segcompass init --vlm Qwen/Qwen2.5-VL-3B-Instruct --sam facebook/sam-vit-base --sae runs/sae \\
      --num-slots 6 --dtype bfloat16 --output runs/start
  segcompass init --from runs/grpo --sam facebook/sam2.1-hiera-large --output runs/swapped
"""
_OF_HEADS = (  # what --from keeps
    *("sae", "num_slots", "sae_layer", "d_sae", "d_slot", "concept_threshold", "heatmap_concepts"),
)


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "init",
        help="a ready-to-train checkpoint from a VLM, a SAM and an SAE",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--vlm", help="Hub id or folder of a VLM, or of a SegCompass to take it from")
    start.add_argument(
        "--from", dest="checkpoint", help="Hub id or folder of a SegCompass that keeps all but its SAM, with --sam"
    )
    parser.add_argument("--sam", help="Hub id or folder of a SAM (SAM 2, ...), or SAM's .pth (a SegCompass has one)")
    parser.add_argument("--sae", help="Hub id or folder of an SAE (ours or SAELens'), or ep_N.pt of the original code")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--num-slots", type=positive, help="objects per answer at most (4, or the SegCompass's)")
    parser.add_argument(
        "--sae-layer", type=int, help="index into hidden_states (the SAE's; else 16 LLaVA-1.5, 13 Qwen2.5-VL, half)"
    )
    parser.add_argument("--d-sae", type=positive, help="features of a new SAE (65536)")
    parser.add_argument("--d-slot", type=positive, help="width of the slots (512, or the SegCompass's)")
    parser.add_argument(
        "--concept-threshold", type=float, help="activations below it count as zero (2.0, or the SegCompass's)"
    )
    parser.add_argument(
        "--heatmap-concepts",
        action="store_true",
        default=None,
        help="let slots look at the concepts of image tokens beside the SAM's embeddings",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of all weights (the VLM's)")
    parser.add_argument("--max-shard-size", default="5GB", help="of a weight file (%(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Compose what the command line asks for."""
    from transformers.utils import logging

    from ..hub.composition import compose_checkpoint

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    if args.checkpoint is not None:
        _swap(args)
        return
    fields = {name: getattr(args, name) for name in ("d_slot", "concept_threshold", "heatmap_concepts")}
    with user_errors():
        made = compose_checkpoint(
            args.vlm,
            args.sam,
            args.output,
            sae=args.sae,
            num_slots=args.num_slots,
            sae_layer=args.sae_layer,
            d_sae=args.d_sae,
            dtype=args.dtype,
            max_shard_size=args.max_shard_size,
            **{name: value for name, value in fields.items() if value is not None},
        )
    _print(made, _next_steps(made))


def _swap(args: argparse.Namespace) -> None:
    from ..hub.segmenter_swap import swap_segmenter

    given = [f"--{name.replace('_', '-')}" for name in _OF_HEADS if getattr(args, name) is not None]
    if given:
        raise UserError(f"--from keeps SAE, slots and heads as they are: leave out {', '.join(given)}.")
    if args.sam is None:
        raise UserError("--from puts another SAM into a checkpoint: name one with --sam.")
    with user_errors():
        made = swap_segmenter(args.checkpoint, args.sam, args.output, args.dtype, args.max_shard_size)
    _print(
        made,
        [
            f"python examples/train_segmentation.py --model {made.folder} --dataset ROWS --trainable masks "
            "--slot_cache_dir runs/slots --embedding_cache_dir runs/embeddings --output_dir runs/segmentation",
            "segcompass calibrate runs/segmentation --dataset HELD_OUT_ROWS",
        ],
    )


def _print(made: Any, next_steps: list[str]) -> None:
    millions = ", ".join(f"{name} {count / 1e6:,.1f}" for name, count in made.num_parameters.items())
    print(f"{made.folder}: {made.vlm_type}, {made.num_slots} slots; millions of parameters: {millions}")
    state = "untrained" if made.sae_is_new else "as given"
    print(f"SAE: {made.d_sae} features on layer {made.sae_layer} of {made.depth}, {state}")
    print(f"new, to be trained: {', '.join(made.new_modules)}")
    if made.added_tokens:
        print(f"added to the tokenizer: {' '.join(made.added_tokens)}")
    for note in made.notes:
        print(f"note: {note}", file=sys.stderr)
    print("\nnext (docs/tutorials/train-every-stage.md says more, --help lists all settings):")
    for number, step in enumerate(next_steps, start=1):
        print(f"  {number}. {step}")


def _next_steps(made: Any) -> list[str]:
    """Commands that make the checkpoint answer; an SAE is trained after the warm-up, which changes its input."""
    start, steps = made.folder, []
    if made.sae_is_new:
        start = "runs/with_sae"
        steps += [
            f"python examples/train_warmup.py --vlm {made.folder} --dataset ROWS --output_dir runs/warmup",
            f"python examples/train_sae.py --vlm runs/warmup --dataset ROWS --output_dir runs/sae "
            f"--d_sae {made.d_sae}",
            f"segcompass init --vlm runs/warmup --sae runs/sae --output {start}",
        ]
    return [
        *steps,
        f"python examples/train_segmentation.py --model {start} --dataset ROWS --output_dir runs/segmentation",
        "python examples/train_grpo.py --model runs/segmentation --dataset ROWS --output_dir runs/grpo",
    ]
