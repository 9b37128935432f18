# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""From parts or a folder to a model and back, without losing a weight on the way."""

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import logging

from .configuration_segcompass import SegCompassConfig
from .modeling_masks import check_segmenter, segmenter_class
from .modeling_sae import SegCompassSae
from .segmenters_segcompass import check_canvas, geometry_of, segmenter_config
from .text_stack_segcompass import decoder_layers
from .token_rows_segcompass import add_tokens
from .weight_files_segcompass import (
    check_no_layers_left,
    check_nothing_left,
    check_nothing_missing,
    check_weight_files,
    without_aliases,
)

if TYPE_CHECKING:  # never imported here, but saving copies every file that a line like this one names
    from .pipeline_segcompass import ReasoningSegmentationPipeline  # noqa: F401

logger = logging.get_logger(__name__)

# What `pipeline("reasoning-segmentation", trust_remote_code=True)` looks up in a configuration.
CUSTOM_PIPELINES = {
    "reasoning-segmentation": {
        "impl": "pipeline_segcompass.ReasoningSegmentationPipeline",
        "pt": ["AutoModelForImageTextToText"],
        "type": "multimodal",
    }
}
_HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class LoadingMixin:
    """Composing, loading and saving of [`SegCompassForReasoningSegmentation`].

    Its heir is a `PreTrainedModel` that is made as `cls(config, vlm=..., sam=..., sae=...)` and adds the heads.
    """

    config: SegCompassConfig
    sam: PreTrainedModel
    sae: PreTrainedModel
    codebook: nn.Module
    slot_encoder: nn.Module
    slot_mapper: nn.Module

    @classmethod
    def from_pretrained_parts(
        cls,
        vlm: str | PreTrainedModel,
        sam: str | PreTrainedModel,
        sae: str | PreTrainedModel | None = None,
        num_slots: int = 4,
        sae_layer: int | None = None,
        tokenizer: Any | None = None,
        processor: Any | None = None,
        dtype: torch.dtype | str | None = None,
        **config_kwargs,
    ) -> PreTrainedModel:
        """Compose a model from a VLM, a segmenter and, if there is one, an SAE; the heads between them are new.

        Args:
            vlm (`str` or `PreTrainedModel`): Hub id, folder or loaded model.
            sam (`str` or `PreTrainedModel`): The same for a segmenter that takes mask prompts, see [`SEGMENTERS`].
            sae (`str` or `PreTrainedModel`, *optional*): The same for the SAE; a new, untrained one when left out.
            num_slots (`int`, defaults to 4): K.
            sae_layer (`int`, *optional*): The SAE's own when left out, else see [`SegCompassConfig`].
            tokenizer, processor (*optional*): Gets `<REF_POS>`, `<think>` and `</think>` added, in place, and the VLM
                as many embedding rows as it has tokens. Left out and `vlm` a path: that path's tokenizer. A
                [`SegCompassProcessor`] also shows which token stands for image patches.
            dtype (`torch.dtype` or `str`, *optional*): Of everything; the checkpoints' own when left out.
            config_kwargs: Further fields of [`SegCompassConfig`]. With `heatmap_concepts` a `SegCompassProcessor` is
                told, in place, to say where image tokens lie.

        Raises:
            FileNotFoundError: A part is named by a folder that does not exist.
            UnknownPlacesError: `heatmap_concepts`, and it is not known where this VLM's image tokens lie.
            ValueError: The processor is for another number of slots or another segmenter, or `sam` is no segmenter
                that takes mask prompts, or lacks weights.
        """
        load = {} if dtype is None else {"dtype": dtype}
        if getattr(processor, "num_slots", num_slots) != num_slots:
            raise ValueError(
                f"the processor asks for {processor.num_slots} <REF_POS>, but num_slots={num_slots}; make them equal."
            )
        if tokenizer is None:
            tokenizer = getattr(processor, "tokenizer", processor)
        if _is_source(vlm, "vlm"):
            if tokenizer is None:
                tokenizer = AutoTokenizer.from_pretrained(vlm)
            vlm = load_part(AutoModelForImageTextToText, vlm, **load)
        if _is_source(sam, "sam"):
            sam = load_segmenter(sam, dtype)
        check_segmenter(sam)
        if hasattr(processor, "geometry"):
            check_canvas(processor.geometry, geometry_of(sam.config))
        if _is_source(sae, "sae"):
            sae = SegCompassSae.from_pretrained(sae, **load)
        if tokenizer is not None:
            config_kwargs = {**add_tokens(tokenizer, vlm), **config_kwargs}
        if hasattr(processor, "image_handling"):
            config_kwargs = {**_measured_image_token(processor, vlm.config), **config_kwargs}
        sae_config = sae.config if sae is not None else config_kwargs.pop("sae_config", None)
        config = SegCompassConfig(
            vlm_config=vlm.config,
            sam_config=sam.config,
            sae_config=sae_config,
            num_slots=num_slots,
            sae_layer=sae_layer,
            **config_kwargs,
        )
        if hasattr(processor, "image_token_grids"):
            processor.use_image_token_grids(config.heatmap_concepts)
        if sae is None:
            logger.warning("no SAE given: its features are random until one is trained on layer %d.", config.sae_layer)
            sae = SegCompassSae(config.sae_config)
        model = cls(config, vlm=vlm, sam=sam, sae=sae)
        head_dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
        if not isinstance(head_dtype, torch.dtype):
            head_dtype = vlm.dtype if vlm.dtype.is_floating_point else torch.float32
        for module in (model.sae, model.codebook, model.slot_encoder, model.slot_mapper):
            module.to(device=vlm.device, dtype=head_dtype)
        model.sam.to(vlm.device)
        if hasattr(getattr(vlm.config, "quantization_config", None), "llm_int8_skip_modules"):
            _hand_on_quantization(model, vlm)
        _keep_gradients_on_cpu(model)
        return model.eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """Load a checkpoint; see `PreTrainedModel.from_pretrained`.

        A bitsandbytes `quantization_config` that names no `llm_int8_skip_modules` quantises the language model's
        decoder layers only: vision tower, projector, `lm_head`, SAE, heads and SAM keep their precision.

        `heatmap_concepts=True` switches that on where the checkpoint is without: its answers stay, until it trains.

        Raises:
            FileNotFoundError: A shard of the checkpoint is missing.
            ValueError: The checkpoint lacks weights, which would be random, or holds some that its configuration has
                no place for: either way the masks would be others. Or git left pointers in place of its files.
        """
        check_weight_files(pretrained_model_name_or_path, kwargs.get("subfolder"))
        _fill_skip_list(cls, pretrained_model_name_or_path, kwargs)
        adapter = (kwargs.get("adapter_kwargs") or {}).get(
            "_adapter_model_path"
        )  # AutoModel: then the path is its base
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        _keep_gradients_on_cpu(model)
        if kwargs.get("state_dict") is None:
            source = pretrained_model_name_or_path
            source = source if adapter is None else f"the adapter {adapter} (on {source})"
            if kwargs.get("heatmap_concepts"):
                info["missing_keys"] = set(info["missing_keys"]) - {"slot_mapper.concept_proj.weight"}  # zeros
            check_nothing_missing(model, info, source)
            check_nothing_left(model, info, source)
        return (model, info) if output_loading_info else model

    @staticmethod
    def _load_pretrained_model(model, *args, **kwargs):
        """As in the parent, which reports the rows that PEFT trains of tied embeddings as missing: they have two
        names, and are stored under one."""
        info, *rest = PreTrainedModel._load_pretrained_model(model, *args, **kwargs)
        rows = {name for name in info.missing_keys if ".token_adapter." in name}
        info.missing_keys -= rows - set(without_aliases(model, rows))
        return info, *rest

    def save_pretrained(self, save_directory, save_original_format: bool = False, **kwargs):
        """Save weights, configuration and the code that loads them where this package is not installed.

        `save_original_format` is off by default: legacy names would be dropped when Trainer resumes, which loads with
        `strict=False`, and the trained VLM would be lost without an error.
        """
        auto_map = dict(getattr(self.config, "auto_map", None) or {})
        name = f"{type(self).__module__.split('.')[-1]}.{type(self).__name__}"
        # TRL picks its loader by the second entry.
        self.config.auto_map = {**auto_map, "AutoModel": name, "AutoModelForImageTextToText": name}
        self.config.custom_pipelines = copy.deepcopy(CUSTOM_PIPELINES)
        saved = super().save_pretrained(save_directory, save_original_format=save_original_format, **kwargs)
        if kwargs.get("is_main_process", True):
            _remove_stale_weights(save_directory, kwargs.get("variant"))
        return saved


def _is_source(part: Any, name: str) -> bool:
    """Whether a part is named (by a Hub id or folder) rather than given as a module; a missing folder is refused here,
    where the message can name the part."""
    if not isinstance(part, str) and not hasattr(part, "__fspath__"):
        return False
    text = str(part)
    if (text.startswith((".", "/", "~")) or not isinstance(part, str)) and not Path(text).is_dir():
        raise FileNotFoundError(f"{name} names the folder {text!r}, which does not exist; give a folder or a Hub id.")
    return True


def load_part(model_class: type, source: Any, **kwargs) -> PreTrainedModel:
    """A VLM or segmenter of its own, by `from_pretrained`, with all its layers.

    Raises:
        FileNotFoundError, ValueError: See [`check_weight_files`] and [`check_no_layers_left`].
    """
    check_weight_files(source)
    model, info = model_class.from_pretrained(source, output_loading_info=True, **kwargs)
    check_no_layers_left(model, info, source)
    return model


def load_segmenter(source: Any, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
    """A segmenter of its own by id or folder, as the class that its configuration names; see [`SEGMENTERS`].

    Of a checkpoint for videos the image part is loaded; its memory has no place there and is left out.

    Args:
        source (`str` or `os.PathLike`): Hub id or folder.
        dtype (`torch.dtype` or `str`, *optional*): Of all but the positional matrices; the checkpoint's own when left
            out.

    Raises:
        FileNotFoundError, ValueError: See [`check_weight_files`] and [`segmenter_class`]; or weights are missing or
            left over, so that masks would be random or others.
    """
    check_weight_files(source)
    config = segmenter_config(AutoConfig.from_pretrained(source))
    model, info = segmenter_class(config).from_pretrained(source, config=config, output_loading_info=True)
    check_nothing_missing(model, info, source, f"it is no whole {type(model).__name__}: complete it")
    check_no_layers_left(model, info, source)
    check_nothing_left(model, info, source)
    if dtype not in (None, "auto"):
        _cast_sam(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return model


def _cast_sam(sam: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast a segmenter but for its positional matrices, as loading a whole checkpoint does: bf16 would break them."""
    for name, tensor in sam.state_dict(keep_vars=True).items():  # buffers too: a batch norm's are as its weights
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if "positional_embedding" in name else dtype)


def _remove_stale_weights(folder: Any, variant: str | None) -> None:
    """Leave only what was saved last: transformers keeps the one file beside new shards, and would load it first."""
    folder, dot = Path(str(folder)), f".{variant}." if variant else "."
    single, index = folder / f"model{dot}safetensors", folder / f"model.safetensors.index{dot}json"
    if single.is_file() and index.is_file():
        shards = set(json.loads(index.read_text())["weight_map"].values())
        # Saving one file removes the shards of the last time, but not their index.
        stale = single if all((folder / shard).is_file() for shard in shards) else index
        stale.unlink()


def _keep_gradients_on_cpu(model: nn.Module) -> None:
    """Switch off what bitsandbytes does on CPUs with AVX512-BF16: the first evaluation repacks 4-bit weights; from
    then on products are in bf16 and pass no gradient, and training would go on without the layers below."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _fill_skip_list(cls: type, source: Any, kwargs: dict) -> None:
    """Where a bitsandbytes configuration does not say what to leave alone, put a copy that does into `kwargs`."""
    quantization = kwargs.get("quantization_config")
    if isinstance(quantization, dict):
        quantization = kwargs["quantization_config"] = AutoQuantizationConfig.from_dict(quantization)
    if getattr(quantization, "llm_int8_skip_modules", ()) is not None:
        return
    hub = {name: kwargs[name] for name in _HUB_KWARGS if name in kwargs}
    config = kwargs.get("config") or cls.config_class.from_pretrained(source, **hub)
    kwargs["quantization_config"] = copy.deepcopy(quantization)
    kwargs["quantization_config"].llm_int8_skip_modules = full_precision_modules(config, cls)


def full_precision_modules(config: SegCompassConfig, model_class: type) -> list[str]:
    """Names of the largest modules without a decoder layer of the language model: what quantising must skip.

    Args:
        config ([`SegCompassConfig`]): Of the composition.
        model_class (`type`): Its class; built without memory, on the meta device.
    """
    with torch.device("meta"):
        model = model_class(config)
    return _largest_without(model, {decoder_layers(model.vlm)})


def _largest_without(model: nn.Module, marked: set[nn.Module]) -> list[str]:
    """Names of the largest modules that neither are marked nor hold one that is."""
    names, parents = [], [("", model)]
    while parents:
        prefix, parent = parents.pop()
        for name, child in parent.named_children():
            if child not in marked and any(module in marked for module in child.modules()):
                parents.append((f"{prefix}{name}.", child))
            elif child not in marked:
                names.append(f"{prefix}{name}")
    return sorted(names)


def _hand_on_quantization(model: PreTrainedModel, vlm: PreTrainedModel) -> None:
    """Let a composition say of its quantised VLM what saving, reloading and trainers ask of the whole model."""
    quantizer = copy.copy(vlm.hf_quantizer)
    quantizer.quantization_config = copy.deepcopy(quantizer.quantization_config)
    kinds = ("Params4bit", "Int8Params")  # bitsandbytes' own, which is not imported here
    quantized = {module for module in vlm.modules() if type(getattr(module, "weight", None)).__name__ in kinds}
    parts = {name: model.get_submodule(name) for name in _largest_without(model, quantized)}
    quantizer.quantization_config.llm_int8_skip_modules = [
        name for name, part in parts.items() if any(isinstance(module, nn.Linear) for module in part.modules())
    ]
    model.hf_quantizer, model.config.quantization_config = quantizer, quantizer.quantization_config
    for name in ("is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(vlm, name):
            setattr(model, name, getattr(vlm, name))


def _measured_image_token(processor: Any, vlm_config: Any) -> dict[str, int]:
    """The id that a processor writes for image patches, as a field of the configuration; warns where the VLM replaces
    another one by image states."""
    written, replaced = processor.image_token_id, getattr(vlm_config, "image_token_id", None)
    if written is None:
        return {}
    if replaced is not None and replaced != written:
        names = [processor.tokenizer.convert_ids_to_tokens(token_id) for token_id in (written, replaced)]
        logger.warning(
            "the processor writes token %d (%s) for image patches, but the VLM's configuration says that %d (%s) is "
            "replaced by image states: they may not belong together. Take the processor that was published with "
            "the VLM.",
            *(part for pair in zip((written, replaced), names, strict=True) for part in pair),
        )
    return {"image_token_id": written}
