"""A SegCompass model of real parts: EfficientNet-lite2 sees, SmolLM2 speaks, MobileSAM segments. What joins them (the
VLM's projector, SAE and heads) is new.
"""

from pathlib import Path
from typing import Any

import torch
from efficientnet_lite2 import STRIDE, efficientnet_image_processor, efficientnet_lite2
from mobile_sam import published_weights
from packages import CACHE
from smollm2 import smollm2, smollm2_tokenizer
from transformers import FastVlmConfig, FastVlmForConditionalGeneration, LlavaProcessor, PreTrainedModel

from segcompass_hf import SegCompassForReasoningSegmentation, SegCompassProcessor
from segcompass_hf.hub import load_original_sam

IMAGE_TOKEN = "<image>"
CHAT_TEMPLATE = (  # that of SmolLM2, without its system turn and with pictures
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def vlm_of_parts(num_layers: int, image_size: int, cache: Path = CACHE) -> tuple[PreTrainedModel, Any]:
    """A VLM in transformers' FastVLM class, whose vision tower may give maps, and its processor.

    Args:
        num_layers (`int`): Of SmolLM2's 30 decoder layers, from below.
        image_size (`int`): Pixels of the square that an image is resized to, a multiple of 32; a token each 32 x 32.
    """
    tower, _ = efficientnet_lite2(image_size, cache)
    language_model, tokenizer = smollm2(num_layers, cache), smollm2_tokenizer(cache)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # its row is never read
    config = FastVlmConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(image_size // STRIDE) ** 2,
    )
    vlm = FastVlmForConditionalGeneration(config)
    vlm.model.vision_tower.load_state_dict(tower.state_dict())
    vlm.model.language_model.load_state_dict(language_model.model.state_dict())
    vlm.tie_weights()
    vlm.generation_config.eos_token_id = tokenizer.eos_token_id
    vlm.generation_config.pad_token_id = tokenizer.pad_token_id
    image_processor = efficientnet_image_processor(image_size)
    processor = LlavaProcessor(
        image_processor, tokenizer, STRIDE, vision_feature_select_strategy="full", chat_template=CHAT_TEMPLATE
    )
    return vlm.eval(), processor


def mobile_sam(canvas: int, cache: Path = CACHE) -> PreTrainedModel:
    """MobileSAM for a canvas of so many pixels; it was trained on 1024."""
    return load_original_sam(published_weights(cache), {"vision_config": {"image_size": canvas}}).eval()


def model_of_parts(
    num_layers: int = 4, image_size: int = 256, canvas: int = 512, num_slots: int = 4, cache: Path = CACHE, **config
) -> tuple[PreTrainedModel, SegCompassProcessor]:
    """The whole model and its processor; new weights by seed 0.

    Args:
        num_layers, image_size, canvas (`int`): See [`vlm_of_parts`] and [`mobile_sam`].
        num_slots (`int`, defaults to 4): K.
        config: Further fields of [`SegCompassConfig`].
    """
    torch.manual_seed(0)
    vlm, vlm_processor = vlm_of_parts(num_layers, image_size, cache)
    sam = mobile_sam(canvas, cache)
    processor = SegCompassProcessor.from_parts(vlm_processor, sam.config, num_slots)
    model = SegCompassForReasoningSegmentation.from_pretrained_parts(
        vlm, sam, num_slots=num_slots, processor=processor, **config
    )
    return model, processor
