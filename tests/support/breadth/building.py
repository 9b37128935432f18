# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""From a row of the families' table to a tiny random VLM with its processor, and to a model of ours around them.

What differs between families is data (`families.py`). Here a family's default configuration is walked and its sizes
are replaced by name: widths, heads, layers, experts, vocabularies.
"""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, processors
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

WIDTH, TEXT_LAYERS, OTHER_LAYERS = tiny.HIDDEN_SIZE, tiny.NUM_LAYERS, 2
SIZES = {
    WIDTH: "hidden_size d_model embed_dim encoder_hidden_size out_hidden_size text_hidden_size projection_dim "
    "projector_hidden_size projection_hidden_size image_text_hidden_size word_embed_proj_dim output_channels "
    "alignment_intermediate_size hidden_size_per_layer_input adapter_in_dim adapter_out_dim "
    "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size share_expert_dim "
    "moe_hidden_size merged_hidden_size projector_input_dim projector_output_dim vision_output_dim",
    64: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim mlp_dim d_ff intermediate_size_mlp "
    "projection_intermediate_size dense_intermediate_size shared_intermediate_size sliding_window "
    "sliding_window_size attention_chunk_size",
    2: "num_attention_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads "
    "num_key_value_heads index_n_heads linear_num_key_heads linear_num_value_heads linear_num_heads "
    "swa_num_attention_heads swa_num_key_value_heads num_sliding_attention_heads num_experts_per_tok moe_k "
    "resampler_n_heads resampler_depth mamba_num_heads n_layers",
    16: "head_dim linear_key_head_dim linear_value_head_dim linear_head_dim swa_head_dim d_kv v_head_dim "
    "index_head_dim resampler_head_dim q_lora_rank kv_lora_rank pos_emb_height pos_emb_width laurel_rank",
    8: "qk_rope_head_dim qk_nope_head_dim",
    4: "resampler_n_latents num_query_tokens num_experts n_routed_experts num_local_experts moe_num_experts",
    1: "n_group topk_group n_shared_experts moe_num_shared_experts first_k_dense_replace",
    28: "image_size",
    14: "patch_size",
    0.1: "initializer_range init_std",
    0.0: "dropout attention_dropout activation_dropout hidden_dropout_prob attention_probs_dropout_prob dropout_rate "
    "resid_pdrop embd_pdrop drop_path_rate",
}
SIZE_OF = {name: size for size, names in SIZES.items() for name in names.split()}
LAYERS = ("num_hidden_layers", "depth", "num_layers", "layers", "encoder_layers", "decoder_layers")
END, PAD = "<|im_end|>", "<|endoftext|>"
INDEXES = {"global_attn_indexes": [1], "fullatt_block_indexes": [1], "deepstack_visual_indexes": [0]}
NOT_SIZES = ("transformers_version", "architectures", "dtype", "id2label", "label2id", "size_conversion")
COMMON_TOKENS = ("<unk>", "<s>", "</s>", PAD, "<|im_start|>", END, "<spare>")


@dataclass(frozen=True)
class Family:
    """How to build a tiny model of one VLM architecture of transformers.

    Args:
        placeholder (`str`): What the chat template writes for an image.
        image_token (`str`, *optional*): The token that image patches have in the ids; the placeholder when left out.
        attributes (`dict[str, str]`): Attributes of the tokenizer and their tokens.
        tokens (`tuple[str, ...]`): Further special tokens.
        unknown (`str`): The unknown token, one of the special ones.
        bos (`bool`): Whether the tokenizer puts `<s>` in front.
        image (`dict`): Arguments of the image processor.
        image_processor (`str`, *optional*): Its class, where transformers' mapping knows none.
        arguments (`dict`): Arguments of the family's processor.
        processor (`str`, *optional*): Its class, where transformers' mapping knows none.
        config (`dict`): Fields of the configuration that no rule of `shrunken_config` gives; dots lead to parts.
        ids (`dict[str, Any]`): Fields of the configuration that hold the id of a token, or a table of such.
        needs (`tuple[str, ...]`): Packages without which it cannot be built.
        vlm_class (`str`, *optional*): Its model class, where `AutoModelForImageTextToText` has none.
        note (`str`): Why it cannot work, in words for users, where that is known.
    """

    placeholder: str = "<image>"
    image_token: str | None = None
    attributes: dict[str, str] = field(default_factory=dict)
    tokens: tuple[str, ...] = ()
    unknown: str = "<unk>"
    bos: bool = False
    image: dict[str, Any] = field(default_factory=dict)
    image_processor: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    processor: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    ids: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    vlm_class: str | None = None
    note: str = ""


def build_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """The tests' byte-level tokenizer with the family's special tokens and a ChatML template."""
    backend = Tokenizer.from_str(tiny._trained_bpe())
    tokens = dict.fromkeys((*COMMON_TOKENS, family.image_token or family.placeholder, *family.attributes.values()))
    tokens |= dict.fromkeys(family.tokens)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    if family.bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        bos_token="<s>",
        eos_token=END,
        pad_token=PAD,
        unk_token=family.unknown,
        sep_token="</s>",
        extra_special_tokens=family.attributes,
    )
    tokenizer.chat_template = chat_template(family)
    return tokenizer


def chat_template(family: Family) -> str:
    """ChatML with the family's placeholder."""
    template = tiny.CHAT_TEMPLATES["qwen2_5_vl"]
    template = template.replace("<|vision_start|><|image_pad|><|vision_end|>", family.placeholder)
    return "{{ bos_token }}" + template if family.bos else template


def image_processor_class(name: str, family: Family) -> type:
    """The family's image processor on the PIL backend, or the only one there is."""
    if family.image_processor is not None:
        return getattr(transformers, family.image_processor)
    known = IMAGE_PROCESSOR_MAPPING_NAMES[name]
    return getattr(transformers, known.get("pil") or known["torchvision"])


def build_image_processor(name: str, family: Family) -> Any:
    return image_processor_class(name, family)(**copy.deepcopy(family.image))


def processor_name(name: str, family: Family) -> str:
    return family.processor or PROCESSOR_MAPPING_NAMES[name]


def shrunken_config(name: str, family: Family, tokenizer: Any) -> PreTrainedConfig:
    """The family's default configuration with everything small: width 32, 4 decoder layers, images of 28 pixels.

    Fields that hold the id of a token get that of the tokenizer's attribute of the same name, else that of a token
    which no text holds.
    """
    default = CONFIG_MAPPING[name]()
    text = type(default.get_text_config(decoder=True)).model_type
    fields = _shrink(default.to_dict(), text, len(tokenizer))
    for name in family.ids:
        fields.setdefault(name, None)
    _set_ids(fields, family, tokenizer)
    for path, value in family.config.items():
        *parents, last = path.split(".")
        part = fields
        for parent in parents:
            part = part[parent]
        part[last] = copy.deepcopy(value)
    return type(default).from_dict(fields)


def _shrink(fields: dict[str, Any], text: str, vocab_size: int) -> dict[str, Any]:
    """Replace sizes by name; lists of one entry per layer keep every kind of layer that they name."""
    is_text = fields.get("model_type") == text
    old = next((fields[name] for name in LAYERS if isinstance(fields.get(name), int)), None)
    new = TEXT_LAYERS if is_text else OTHER_LAYERS
    merges = any(name in fields for name in ("spatial_merge_size", "merge_size", "merge_kernel_size"))
    small = {}
    for name, value in fields.items():
        if name in NOT_SIZES:
            continue
        if isinstance(value, dict) and "model_type" in value:
            value = _shrink(value, text, vocab_size)
        elif isinstance(value, list) and len(value) == old:
            kinds = list(dict.fromkeys(value))
            value = [SIZE_OF.get(name, kinds[index % len(kinds)]) for index in range(new)]
        elif name in LAYERS and isinstance(value, int):
            value = new
        elif name in ("vocab_size", "vocab_size_per_layer_input"):
            value = vocab_size
        elif name == "max_position_embeddings" and is_text:
            value = 4096
        elif name == "rope_parameters" and "mrope_section" in (value or {}):
            value = value | {"mrope_section": [2, 3, 3]}
        elif name == "patch_size" and merges and isinstance(value, int):
            value = 7
        elif name in INDEXES and value:
            value = list(INDEXES[name])
        elif name in SIZE_OF and value and not isinstance(value, bool):  # what is 0 is absent and stays so
            value = [SIZE_OF[name]] * len(value) if isinstance(value, list) else SIZE_OF[name]
        small[name] = value
    if small.get("initializer_factor"):
        small.pop("initializer_range", None)
    return small


def _set_ids(fields: dict[str, Any], family: Family, tokenizer: Any) -> None:
    """Give every field that is named as a token's id one that the tokenizer has."""
    for name, value in fields.items():
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            _set_ids(value, family, tokenizer)
        stem, _, kind = name.rpartition("_")
        if not stem.endswith("_token") and not (stem in ("boi", "eoi", "boa", "eoa") or name in family.ids):
            if not (kind in ("id", "index") and stem.endswith("token")):
                continue
        if isinstance(family.ids.get(name), dict):
            fields[name] = {key: tokenizer.convert_tokens_to_ids(token) for key, token in family.ids[name].items()}
            continue
        if name in family.ids:
            token = family.ids[name]
        elif stem == "image_token":
            token = family.image_token or family.placeholder
        else:
            token = getattr(tokenizer, stem, None) or "<spare>"
        if isinstance(value, int) or name in family.ids:
            fields[name] = tokenizer.convert_tokens_to_ids(token)


@dataclass
class Parts:
    """A tiny VLM's parts, as a user has them."""

    name: str
    family: Family
    tokenizer: Any
    image_processor: Any
    config: PreTrainedConfig

    @classmethod
    def build(cls, name: str, family: Family) -> "Parts":
        tokenizer = build_tokenizer(family)
        config = shrunken_config(name, family, tokenizer)
        return cls(name, family, tokenizer, build_image_processor(name, family), config)

    @property
    def image_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.family.image_token or self.family.placeholder)

    def vlm(self) -> torch.nn.Module:
        """The VLM with random weights, the same for the same family."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if self.family.vlm_class is not None:
                vlm = getattr(transformers, self.family.vlm_class)(self.config)
            else:
                vlm = AutoModelForImageTextToText.from_config(self.config)
            _fill(vlm)
        vlm.generation_config.eos_token_id = self.tokenizer.eos_token_id
        vlm.generation_config.pad_token_id = self.tokenizer.pad_token_id
        return vlm.float().eval()

    def save(self, folder: Path) -> None:
        """The folder of a VLM's repository, as far as its processor is concerned."""
        self.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        fields = {"processor_class": processor_name(self.name, self.family), **self.family.arguments}
        (folder / "processor_config.json").write_text(json.dumps(fields))


@torch.no_grad()
def _fill(vlm: torch.nn.Module) -> None:
    """Give weights to what is left empty or at zero, as gates that are shut and padding's embedding are."""
    for weight in vlm.parameters():
        if not torch.isfinite(weight).all() or not weight.any():
            torch.nn.init.normal_(weight, std=0.1)
    for module in vlm.modules():
        if getattr(module, "padding_idx", None) is not None and hasattr(module, "num_embeddings"):
            torch.nn.init.normal_(module.weight[module.padding_idx], std=0.1)
