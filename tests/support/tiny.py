"""Tiny deterministic tokenizers, processors, backbones and models, built in code (no network, no files).

Every family goes through the same functions: `tiny_tokenizer`, `tiny_parts`, `tiny_vlm_config`,
`tiny_processor`, `tiny_config`, `tiny_model`. Sizes: hidden 32, 4 decoder layers, SAM canvas 64 with patches of 8 (8x8
embedding, 32x32 maps).
"""

import functools

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3")
HIDDEN_SIZE = 32
NUM_LAYERS = 4
SAM_CANVAS = 64
SAM_PATCH = 8
NUM_SLOTS = 4

# What the byte-level tokenizer is trained on: enough to keep prompts short; any other text still round-trips as bytes.
CORPUS = [
    "Find what this asks for in the image: the largest red circle left of the green square",
    "Think first, inside and: name the candidates and rule out the wrong ones. Then write 4 position tokens, each as, "
    "and nothing else.",
    "all the blue squares but not the small ring at the top right of the picture, the second from the bottom",
    "USER: ASSISTANT: User: Assistant: user assistant system",
    "there are two candidates: a red circle at b3 and a blue square at c4, the first one is larger",
]

_LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ ' ' }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_QWEN_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<start_of_image>"
    "{% elif part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
CHAT_TEMPLATES = {
    "llava": _LLAVA_TEMPLATE,
    "qwen2_5_vl": _QWEN_TEMPLATE,
    "qwen3_vl": _QWEN_TEMPLATE,
    "gemma3": _GEMMA_TEMPLATE,
}
_QWEN_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
_QWEN_TOKENS += ["<|video_pad|>"]
_QWEN_ATTRIBUTES = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
_GEMMA_ATTRIBUTES = {
    "image_token": "<image_soft_token>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
}
_SPECIALS = {
    "llava": ["<unk>", "<s>", "</s>", "<pad>", "<image>"],
    "qwen2_5_vl": _QWEN_TOKENS,
    "qwen3_vl": _QWEN_TOKENS,
    "gemma3": ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", *_GEMMA_ATTRIBUTES.values()],
}


def _check(family: str) -> str:
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; expected one of {FAMILIES}")
    return family


@functools.lru_cache
def _trained_bpe() -> str:
    """A byte-level BPE tokenizer of at most 480 entries, as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=480, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(family: str = "llava", model_max_length: int = 4096) -> PreTrainedTokenizerFast:
    """The family's tokenizer as its checkpoints ship it, without `<REF_POS>`; LLaVA and Gemma put a token in front."""
    specials = _SPECIALS[_check(family)]
    backend = Tokenizer.from_str(_trained_bpe())
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    names = {"model_max_length": model_max_length, "clean_up_tokenization_spaces": False}
    if family == "llava":
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
        names |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
        names |= {"extra_special_tokens": {"image_token": "<image>"}}
    elif family == "gemma3":
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", backend.token_to_id("<bos>"))]
        )
        names |= {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
        names |= {"extra_special_tokens": dict(_GEMMA_ATTRIBUTES)}
    else:
        names |= {
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "extra_special_tokens": dict(_QWEN_ATTRIBUTES),
        }
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **names)
    tokenizer.chat_template = CHAT_TEMPLATES[family]
    return tokenizer


def tiny_image_processor(family: str = "llava"):
    """The family's own image processor (PIL): 28x28 pixels and 4 image tokens; 4 to 16 tokens for the Qwens."""
    if _check(family) == "llava":
        from transformers import CLIPImageProcessorPil

        return CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    if family == "gemma3":
        from transformers import Gemma3ImageProcessorPil

        return Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    from transformers import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56}, patch_size=7, merge_size=2, temporal_patch_size=2
    )


def tiny_parts(family: str = "llava", **tokenizer_kwargs) -> dict:
    """What `SegCompassProcessor` takes of a VLM: image processor, tokenizer, processor class and its arguments."""
    classes = {
        "llava": "LlavaProcessor",
        "qwen2_5_vl": "Qwen2_5_VLProcessor",
        "qwen3_vl": "Qwen3VLProcessor",
        "gemma3": "Gemma3Processor",
    }
    kwargs = {
        "llava": {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        "gemma3": {"image_seq_length": 4},
    }
    return {
        "image_processor": tiny_image_processor(family),
        "tokenizer": tiny_tokenizer(family, **tokenizer_kwargs),
        "vlm_processor_class": classes[family],
        "vlm_processor_kwargs": kwargs.get(family, {}),
    }


def tiny_vlm_config(family: str = "llava", vocab_size: int | None = None, tie: bool = False, **text_overrides):
    """A VLM config: hidden 32, 4 layers; weights of std 0.1, so that states differ visibly between tokens."""
    tokenizer = tiny_processor(_check(family)).tokenizer
    ids = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": vocab_size or len(tokenizer),
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 64,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": tie,
        "initializer_range": 0.1,
    } | text_overrides
    vision = {"hidden_size": HIDDEN_SIZE, "intermediate_size": 64, "initializer_range": 0.1}
    if family == "llava":
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

        vision |= {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
        return LlavaConfig(
            vision_config=CLIPVisionConfig(projection_dim=HIDDEN_SIZE, **vision),
            text_config=LlamaConfig(**text),
            image_token_index=ids("<image>"),
            image_seq_length=4,
            vision_feature_layer=-2,
            tie_word_embeddings=tie,
        )
    if family == "gemma3":
        from transformers import Gemma3Config

        vision |= {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
        return Gemma3Config(
            vision_config=vision | {"model_type": "siglip_vision_model", "vision_use_head": False},
            text_config=text | {"eos_token_id": ids("<end_of_turn>"), "sliding_window": 64},
            mm_tokens_per_image=4,
            boi_token_index=ids("<start_of_image>"),
            eoi_token_index=ids("<end_of_image>"),
            image_token_index=ids("<image_soft_token>"),
            eos_token_id=[ids("<end_of_turn>")],
            tie_word_embeddings=tie,
        )
    common = {
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
        "tie_word_embeddings": tie,
    }
    vision |= {"depth": 2, "num_heads": 2, "out_hidden_size": HIDDEN_SIZE, "patch_size": 7, "spatial_merge_size": 2}
    vision |= {"temporal_patch_size": 2}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    if family == "qwen2_5_vl":
        from transformers import Qwen2_5_VLConfig

        text.pop("head_dim")
        return Qwen2_5_VLConfig(
            vision_config=vision | {"window_size": 28, "fullatt_block_indexes": [1]},
            text_config=text | {"rope_parameters": rope},
            **common,
        )
    from transformers import Qwen3VLConfig

    return Qwen3VLConfig(
        vision_config=vision | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
        text_config=text | {"rope_parameters": rope | {"mrope_interleaved": True}},
        **common,
    )


def tiny_sam_config(canvas: int = SAM_CANVAS, patch_size: int = SAM_PATCH, hidden_size: int = 32):
    """A SAM of hidden size 32. The default `initializer_range` of 1e-10 would give all-zero embeddings: 0.02 here."""
    from transformers import SamConfig

    return SamConfig(
        vision_config={
            "hidden_size": hidden_size,
            "output_channels": hidden_size,
            "num_pos_feats": hidden_size // 2,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": canvas,
            "patch_size": patch_size,
            "window_size": 4,
            "global_attn_indexes": [1],
            "mlp_dim": 64,
            "initializer_range": 0.02,
        },
        prompt_encoder_config={
            "hidden_size": hidden_size,
            "image_size": canvas,
            "patch_size": patch_size,
            "mask_input_channels": 8,
        },
        mask_decoder_config={
            "hidden_size": hidden_size,
            "mlp_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 32,
            "layer_norm_eps": 1e-5,
        },
        initializer_range=0.02,
    )


SEGMENTERS = ("sam", "sam_hq", "mobile_sam", "sam2", "sam3_tracker", "edgetam")


def tiny_segmenter_config(kind: str = "sam", canvas: int = SAM_CANVAS):
    """A segmenter of hidden size 32 by `model_type`: patches of 8 pixels, embedding and maps as of `tiny_sam_config`
    (EdgeTAM's backbone has patches of 16).

    EdgeTAM's backbone comes from timm: where it is missing the test is skipped.
    """
    if kind == "sam":
        return tiny_sam_config(canvas)
    from transformers import AutoConfig

    size = {"image_size": canvas, "patch_size": 16 if kind == "edgetam" else SAM_PATCH}
    decoder = {"hidden_size": 32, "mlp_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    decoder |= {"iou_head_hidden_dim": 32}
    config = tiny_sam_config(canvas).to_dict()
    if kind == "mobile_sam":
        from segcompass_hf import MobileSamConfig

        vision = {"embed_dims": [8, 16, 16, 32], "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 4]}
        vision |= {"strides": [2, 1, 1], "window_sizes": [7, 3, 4, 3], "output_channels": 32, "image_size": canvas}
        prompts = {"mask_input_channels": 8}
        return MobileSamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    if kind == "sam_hq":
        # two layers: of its features the decoder reads those of the first with global attention
        vision = config["vision_config"] | {"num_hidden_layers": 3, "global_attn_indexes": [1, 2]}
        parts = {"vision_config": vision, "prompt_encoder_config": config["prompt_encoder_config"]}
        parts["mask_decoder_config"] = decoder | {"vit_dim": 32, "layer_norm_eps": 1e-5}
        for part in parts.values():
            part.pop("model_type", None)
        return AutoConfig.for_model("sam_hq", **parts, initializer_range=0.02)
    parts = {
        "prompt_encoder_config": {"hidden_size": 32, "mask_input_channels": 8, **size},
        "mask_decoder_config": decoder,
        "vision_config": _tiny_pyramid(kind, canvas),
    }
    return AutoConfig.for_model(kind, **parts)


def _tiny_pyramid(kind: str, canvas: int) -> dict:
    """Image encoder with a feature pyramid: levels of 4, 2 and 1 cells per cell of the embedding."""
    side = canvas // SAM_PATCH
    common = {"fpn_hidden_size": 32, "backbone_feature_sizes": [[4 * side] * 2, [2 * side] * 2, [side] * 2]}
    if kind == "sam3_tracker":
        vit = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        vit |= {"image_size": canvas, "patch_size": SAM_PATCH, "window_size": 4, "global_attn_indexes": [1]}
        vit |= {"pretrain_image_size": canvas, "model_type": "sam3_vit_model"}
        return {"model_type": "sam3_vision_model", "backbone_config": vit, **common}
    if kind == "sam2":
        hiera = {
            "hidden_size": 8,
            "image_size": [canvas, canvas],
            "patch_stride": [2, 2],
            "blocks_per_stage": [1, 1, 2, 1],
        }
        hiera |= {"embed_dim_per_stage": [8, 16, 32, 64], "num_attention_heads_per_stage": [1, 1, 2, 2]}
        hiera |= {"window_size_per_stage": [8, 4, 8, 4], "global_attention_blocks": [3]}
        hiera |= {"window_positional_embedding_background_size": [4, 4], "model_type": "sam2_hiera_det_model"}
        return {
            "model_type": "sam2_vision_model",
            "backbone_config": hiera,
            "backbone_channel_list": [64, 32, 16, 8],
            **common,
        }
    if kind != "edgetam":
        raise ValueError(f"unknown segmenter {kind!r}; expected one of {SEGMENTERS}")
    import pytest
    from transformers import TimmWrapperConfig

    pytest.importorskip("timm", reason="EdgeTAM's backbone is timm's")
    arguments = {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]}
    # A cell of its levels is 4, 8, 16 or 32 pixels wide, twice those of the others here.
    common["backbone_feature_sizes"] = [[canvas // step] * 2 for step in (4, 8, 16)]
    return {
        "model_type": "edgetam_vision_model",
        "backbone_config": TimmWrapperConfig(architecture="repvit_m0_9", model_args=arguments),
        "backbone_channel_list": [384, 192, 96, 48],
        **common,
    }


def tiny_segmenter(kind: str = "sam", seed: int = 0, canvas: int = SAM_CANVAS):
    """A random segmenter in eval mode with weights of unit gain, so that masks differ visibly; see `tiny_model`."""
    from segcompass_hf.modeling_masks import segmenter_class

    config = tiny_segmenter_config(kind, canvas)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        segmenter = segmenter_class(config)(config).eval()
        unit_gain(segmenter)
    return segmenter


def unit_gain(module: torch.nn.Module) -> None:
    """Draw the matrices and kernels of a module anew, so that each keeps the scale of what it is given."""
    for name, weight in module.named_parameters():
        if weight.ndim >= 2 and "pos" not in name:
            torch.nn.init.normal_(weight, std=(weight[0].numel()) ** -0.5)
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):  # its statistics are of no data: EdgeTAM's residuals would pile up
            torch.nn.init.constant_(part.weight, 0.7)


def realign(model: torch.nn.Module) -> torch.nn.Module:
    """Copy a loaded model's weights to addresses as those of a new one. Those of a file lie where its header ends,
    and kernels for unaligned weights round otherwise, which random models make visible."""
    for tensor in model.state_dict(keep_vars=True).values():
        tensor.data = tensor.data.clone()
    return model


def tiny_sam_image_processor(canvas: int = SAM_CANVAS, patch_size: int = SAM_PATCH):
    """SAM's image processor for the canvas; `mask_size`: side of the low-resolution maps, 4 x the embedding's."""
    from transformers import SamImageProcessorPil

    side = 4 * (canvas // patch_size)
    return SamImageProcessorPil(
        size={"longest_edge": canvas},
        pad_size={"height": canvas, "width": canvas},
        mask_size={"longest_edge": side},
        mask_pad_size={"height": side, "width": side},
    )


def tiny_processor(family: str = "llava", num_slots: int = NUM_SLOTS, canvas: int = SAM_CANVAS, **kwargs):
    """A `SegCompassProcessor` for the family; further keywords go to its constructor.

    `sam_image_processor` may be a segmenter's configuration, such as `tiny_segmenter_config("sam2")`.
    """
    from segcompass_hf.processing_segcompass import SegCompassProcessor

    tokenizer_kwargs = {k: kwargs.pop(k) for k in ("model_max_length",) if k in kwargs}
    parts = tiny_parts(family, **tokenizer_kwargs)
    return SegCompassProcessor(
        **parts, **{"sam_image_processor": tiny_sam_image_processor(canvas), "num_slots": num_slots, **kwargs}
    )


def tiny_config(family: str = "llava", tie: bool = False, **overrides):
    """A `SegCompassConfig` with SAE after layer 2 and 64 features; `overrides` replace any of its fields."""
    from segcompass_hf.configuration_segcompass import SegCompassConfig

    ids = tiny_processor(family).tokenizer.convert_tokens_to_ids
    fields = {
        "vlm_config": tiny_vlm_config(family, tie=tie),
        "sam_config": tiny_sam_config(),
        "sae_config": {"d_in": HIDDEN_SIZE, "d_sae": 64, "layer": 2},
        "num_slots": NUM_SLOTS,
        "sae_layer": 2,
        "concept_threshold": 0.01,
        "d_slot": 32,
        "slot_encoder_heads": 4,
        "ref_token_id": ids("<REF_POS>"),
        "think_start_token_id": ids("<think>"),
        "think_end_token_id": ids("</think>"),
        "duplicate_iou_threshold": 2.0,  # random weights draw much the same mask for every slot: none is left out
    }
    return SegCompassConfig(**(fields | overrides))


def tiny_model(family: str = "llava", seed: int = 0, tie: bool = False, **config_overrides):
    """A random `SegCompassForReasoningSegmentation` in eval mode, the same weights for the same arguments.

    SAM and the segmentation heads get weights of unit gain: at the usual 0.02 the masks would differ from zero by
    1e-5, and every comparison of masks would hold, whatever is wrong.
    """
    from segcompass_hf.modeling_segcompass import SegCompassForReasoningSegmentation

    config = tiny_config(family, tie=tie, **config_overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SegCompassForReasoningSegmentation(config).eval()
        for part in (model.sam, model.codebook, model.slot_encoder, model.slot_mapper):
            unit_gain(part)
        return model


def follow_concepts(model):
    """Let the masks of a `tiny_model` depend on its concepts: heatmaps ten times as strong, around 0.

    Its own are close to -2 everywhere. SAM's prompt encoder normalises them, the same is left of each, and masks
    without a concept, or of another slot, are the same up to rounding.
    """
    last = model.slot_mapper.head_fuser[-1]
    with torch.no_grad():
        last.weight.mul_(10)
        last.bias.zero_()
    return model


def tiny_image(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Dark noise of `size` (width, height) with one red rectangle, as an RGB image."""
    rng = np.random.RandomState(seed)
    array = (rng.rand(size[1], size[0], 3) * 60).astype("uint8")
    top, left = size[1] // 6, size[0] // 5
    array[top : size[1] // 2 + 1, left : size[0] // 2 + 1] = (220, 30, 30)
    return Image.fromarray(array)


def tiny_mask(num_objects: int = 1, size: tuple[int, int] = (40, 30)) -> np.ndarray:
    """`num_objects` vertical stripes of equal width as a bool array of shape (num_objects, height, width)."""
    masks = np.zeros((num_objects, size[1], size[0]), dtype=bool)
    width = size[0] // max(num_objects, 1)
    for index in range(num_objects):
        masks[index, :, index * width : (index + 1) * width] = True
    return masks
