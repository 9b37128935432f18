# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What a stage starts from: where its model or the model's parts lie, and these loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig

from ...checkpoint import bundled_folder
from ...configuration_segcompass import SegCompassConfig, SegCompassSaeConfig, own_settings
from ...loading_segcompass import load_part, load_segmenter
from ...modeling_sae import SegCompassSae
from ...modeling_segcompass import SegCompassForReasoningSegmentation
from ...processing_segcompass import SegCompassProcessor
from ...segmenters_segcompass import segmenter_kind
from ...token_rows_segcompass import add_tokens
from ..sae.start import DEFAULT_K
from .settings import RecipeError, RecipeSettings

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


@dataclass(frozen=True)
class Parts:
    """Where a model comes from: a whole SegCompass, parts, or a whole one some of whose parts are replaced.

    Args:
        model, vlm, sam, sae (`str`, *optional*): Hub ids or folders.
    """

    model: str | None = None
    vlm: str | None = None
    sam: str | None = None
    sae: str | None = None

    @classmethod
    def of(cls, settings: RecipeSettings) -> Parts:
        """What a recipe names, folders checked to be there.

        Raises:
            RecipeError: A folder is not there, or nothing to start from is named.
        """
        found = cls(**{name: _source(name, getattr(settings, name)) for name in ("model", "vlm", "sam", "sae")})
        if found.model is None and found.vlm is None:
            raise RecipeError("the recipe names nothing to start from; it needs model or vlm.")
        return found

    def after(self, stage: str, folder: Path) -> Parts:
        """What the next stage starts from."""
        if stage == "sae":
            return replace(self, sae=str(folder))
        if stage == "warmup" and self.vlm is not None:
            return replace(self, vlm=str(folder))
        return replace(self, model=str(folder)) if stage == "warmup" else Parts(model=str(folder))

    @property
    def is_whole(self) -> bool:
        """Whether the heads are the model's own; they are new where a part is replaced."""
        return self.model is not None and not (self.vlm or self.sam or self.sae)

    def used_by(self, stage: str) -> dict[str, str]:
        """Part -> where it lies, of those that a stage reads."""
        if stage in ("warmup", "sae"):
            names = ("vlm",) if self.vlm else ("model",)
            names += ("sae",) if stage == "sae" and self.sae else ()
        else:
            names = ("model", "vlm", "sam", "sae")
        return {name: value for name, value in asdict(self).items() if value is not None and name in names}


def _source(name: str, value: str | None) -> str | None:
    if value is None:
        return None
    try:
        path = Path(bundled_folder(value)).expanduser()
    except FileNotFoundError as error:
        raise RecipeError(f"{name}: {error}") from error
    if path.exists():
        return str(path)
    if value.startswith((".", "/", "~")) or value.count("/") != 1 or (path.parent.is_dir() and path.parent != Path()):
        raise RecipeError(f"{name}: there is no folder {value!r}; give one, or a Hub id.")
    return value


class PartLoader:
    """Loads parts as a recipe's settings say.

    Args:
        settings ([`RecipeSettings`]): `dtype`, `attn_implementation`, `config`, `processor`, `load_in_4bit`.
    """

    def __init__(self, settings: RecipeSettings):
        if settings.dtype not in DTYPES:
            raise RecipeError(f"dtype is {settings.dtype!r}; choose one of {', '.join(DTYPES)}.")
        unknown = sorted(set(settings.config) - set(SegCompassConfig.__annotations__))
        if unknown:
            raise RecipeError(f"config names {unknown}; SegCompassConfig has no such fields.")
        self.settings, self.dtype = settings, DTYPES[settings.dtype]

    def configuration(self, parts: Parts, sae_settings: Any = None) -> SegCompassConfig:
        """Configuration of the whole model, read without weights.

        Args:
            parts ([`Parts`]): What it is made of; without a `sam` that of the model, or transformers' default.
            sae_settings ([`SaeTrainingConfig`], *optional*): Of a stage that makes a new SAE.

        Raises:
            RecipeError: The parts do not fit: the SAE reads states of another width or a layer that is not there.
        """
        whole = None if parts.model is None else SegCompassConfig.from_pretrained(parts.model, **self._switches)
        if parts.is_whole and sae_settings is None:
            return whole
        vlm = whole.vlm_config if parts.vlm is None else AutoConfig.from_pretrained(parts.vlm)
        vlm = getattr(vlm, "vlm_config", vlm)
        sam = getattr(whole, "sam_config", None) if parts.sam is None else _segmenter_config(parts.sam)
        sae = getattr(whole, "sae_config", None)
        if parts.sae is not None:
            sae = SegCompassSaeConfig.from_pretrained(parts.sae)
        elif sae_settings is not None:
            names = ("d_sae", "architecture", "normalize_activations", "apply_b_dec_to_input", "l1_coefficient")
            sae = {name: getattr(sae_settings, name) for name in names} | {"layer": sae_settings.sae_layer}
            sae["k"] = (sae_settings.k or DEFAULT_K) if "topk" in sae_settings.architecture else None
        try:
            nested = {"vlm_config": vlm, "sam_config": sam, "sae_config": sae}
            return SegCompassConfig(**(own_settings(whole) | self.settings.config | nested))
        except (ValueError, TypeError, StrictDataclassError) as error:
            raise RecipeError(f"the parts do not fit each other: {error.__cause__ or error}") from error

    def processor(self, parts: Parts) -> SegCompassProcessor:
        """Of the whole model, as far as its parts are named."""
        changes = dict(self.settings.processor)
        num_slots = self.settings.config.get("num_slots")
        own = None if parts.model is None else SegCompassProcessor.from_pretrained(parts.model)
        if own is not None and parts.vlm is None and parts.sam is None and not changes:
            own.num_slots = num_slots or own.num_slots
            return own
        sam = 1024 if own is None else own.sam_image_processor
        if parts.sam is not None:
            _segmenter_config(parts.sam)  # refuses what is none
            sam = parts.sam
        slots = num_slots or getattr(own, "num_slots", 4)
        return SegCompassProcessor.from_parts(parts.vlm or own, sam, num_slots=slots, **changes)

    def vlm(self, parts: Parts, processor: SegCompassProcessor, new_weights: bool = False) -> nn.Module:
        """The VLM, or the whole model that holds it, with the processor's tokens."""
        source = parts.vlm or parts.model
        loaded = load_part(AutoModelForImageTextToText, source, **self._options())
        model = loaded.vlm if parts.vlm is not None and hasattr(loaded, "vlm") else loaded
        if new_weights:
            fresh = AutoModelForImageTextToText.from_config(getattr(model, "vlm", model).config, dtype=self.dtype)
            if not hasattr(model, "vlm"):
                model = fresh
            else:
                model.vlm.load_state_dict(fresh.state_dict())
        if not hasattr(model, "vlm"):
            add_tokens(processor.tokenizer, model)
        return self._with_attention(model)

    def sae(self, parts: Parts) -> SegCompassSae | None:
        return None if parts.sae is None else SegCompassSae.from_pretrained(parts.sae, dtype=self.dtype)

    def model(self, parts: Parts, processor: SegCompassProcessor, new_heads: bool = False) -> nn.Module:
        """The whole model; its heads are new where a part was replaced, or `new_heads` asks for it."""
        if parts.is_whole:
            options = self._options() | self._switches
            model = SegCompassForReasoningSegmentation.from_pretrained(parts.model, **options)
            if new_heads:
                fields = own_settings(model.config) | self.settings.config | {"num_slots": processor.num_slots}
                model = SegCompassForReasoningSegmentation.from_pretrained_parts(
                    model.vlm, model.sam, model.sae, processor=processor, dtype=self.dtype, **fields
                )
            return self._with_attention(model)
        whole = None
        if parts.model is not None:
            whole = SegCompassForReasoningSegmentation.from_pretrained(parts.model, dtype=self.dtype)
        vlm = whole.vlm if parts.vlm is None else self.vlm(replace(parts, model=None), processor)
        if parts.sam is None and whole is None:
            raise RecipeError("the recipe names no SAM; segmentation needs one: sam.")
        sam = whole.sam if parts.sam is None else load_segmenter(parts.sam, dtype=self.dtype)
        sae = self.sae(parts) if parts.sae is not None else getattr(whole, "sae", None)
        fields = (
            own_settings(getattr(whole, "config", None)) | self.settings.config | {"num_slots": processor.num_slots}
        )
        model = SegCompassForReasoningSegmentation.from_pretrained_parts(
            vlm, sam, sae, processor=processor, dtype=self.dtype, **fields
        )
        return self._with_attention(model)

    @property
    def _switches(self) -> dict[str, Any]:
        """What a recipe changes in a whole model too: its answers stay what they were."""
        return {name: self.settings.config[name] for name in ("heatmap_concepts",) if name in self.settings.config}

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"dtype": self.dtype}
        if self.settings.load_in_4bit:
            from ..quantization import quantization_config

            config = AutoConfig.from_pretrained(_source("model", self.settings.model))
            place = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
            options |= {"quantization_config": quantization_config(config), "device_map": {"": place}}
        return options

    def _with_attention(self, model: nn.Module) -> nn.Module:
        if self.settings.attn_implementation is not None:
            getattr(model, "vlm", model).set_attn_implementation(self.settings.attn_implementation)
        return model


def _segmenter_config(source: str) -> PretrainedConfig:
    config = AutoConfig.from_pretrained(source)
    try:
        segmenter_kind(config)
    except ValueError as error:
        raise RecipeError(f"sam: {source!r}: {error}") from error
    return config


__all__ = ["DTYPES", "PartLoader", "Parts"]
