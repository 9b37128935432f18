# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""`segcompass convert`: checkpoints of the original code to ours, and back; published segmenters to folders."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .common import UserError, positive, user_errors

_EPILOG = """\
examples:
  segcompass convert global_step_4000/actor --sam sam_vit_h_4b8939.pth --output runs/converted
  segcompass convert --back runs/converted --output runs/original
  segcompass convert mobile_sam.pt --output runs/mobile_sam
  segcompass convert mobile_sam.pt --output runs/mobile_sam_512 --config '{"vision_config": {"image_size": 512}}'

docs/how-to/convert.md says what the original's files are called and what the result computes.
"""


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "convert",
        help="a checkpoint of the original SegCompass code to ours, or --back; or a published SAM or MobileSAM",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        help="folder with refseg_modules.pt and llm_hf; with --back a checkpoint of ours; or the published weights "
        "of a segmenter, sam_vit_*.pth or mobile_sam.pt",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--back", action="store_true", help="from ours to the original's files")
    parser.add_argument("--sam", type=Path, help="weights of SAM, for its image encoder (sam_vit.pth beside)")
    parser.add_argument("--sae", type=Path, help="ep_N.pt, where refseg_modules.pt holds no SAE")
    parser.add_argument("--llm", type=Path, help="folder of the language model (llm_hf beside)")
    parser.add_argument("--sae-layer", type=int, help="the original's hook_layer (16 LLaVA-1.5, 13 Qwen2.5-VL)")
    parser.add_argument("--ref-token-id", type=positive, help="id of <REF_POS>, where there is no tokenizer")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="cast all weights (as they are)")
    parser.add_argument("--config", type=json.loads, default={}, metavar="JSON", help="fields of the configuration")
    parser.add_argument("--max-shard-size", default="5GB", help="of a weight file (%(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Convert what the command line asks for."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    one_way = ("sam", "sae", "llm", "sae_layer", "ref_token_id", "dtype")
    of_language_model = one_way[:-1]
    with user_errors(kinds=(ValueError, OSError, ImportError, TypeError)):
        from ..hub.conversion.segmenters import convert_original_sam, is_segmenter_file

        following = 'segcompass predict IMAGE "INSTRUCTION" --model {}'
        if args.back:
            _refuse([*one_way, "config"], args, "--back writes every weight as it is")
            from ..hub.conversion.to_original import convert_to_original_checkpoint

            folder = convert_to_original_checkpoint(args.source, args.output, args.max_shard_size)
        elif is_segmenter_file(args.source):
            _refuse(of_language_model, args, f"{args.source} holds a segmenter alone")
            folder = convert_original_sam(args.source, args.output, args.dtype, args.max_shard_size, **args.config)
            following = "segcompass init --vlm VLM --sam {} --output FOLDER"
        else:
            from ..hub.conversion.from_original import convert_original_checkpoint

            given = {name: getattr(args, name) for name in one_way}
            folder = convert_original_checkpoint(
                args.source, args.output, max_shard_size=args.max_shard_size, **given, **args.config
            )
    files = [path for path in folder.rglob("*") if path.is_file()]
    print(f"{folder}: {len(files)} files, {sum(path.stat().st_size for path in files) / 1e9:.2f} GB")
    if not args.back:
        print(f"next: {following.format(folder)}")


def _refuse(names: list[str] | tuple[str, ...], args: argparse.Namespace, why: str) -> None:
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) not in (None, {})]
    if given:
        raise UserError(f"{why} and takes no {', '.join(given)}; leave it out.")


__all__ = ["add_parser", "run"]
