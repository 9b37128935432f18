# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""A new checkpoint from published parts: VLM, segmenter and, if there is one, an SAE."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import cached_file, logging

from ..configuration_segcompass import SegCompassSaeConfig, default_sae_layer, own_settings
from ..files import check_new_folder, staged_folder
from ..loading_segcompass import _cast_sam
from ..modeling_sae import SegCompassSae
from ..segmenters_segcompass import segmenter_kind
from .conversion.vlm import check_is_vlm

logger = logging.get_logger(__name__)

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class Composition:
    """What [`compose_checkpoint`] or [`swap_segmenter`] made.

    Args:
        folder (`Path`): The checkpoint, with its processor.
        vlm_type (`str`): The VLM's model type.
        num_slots (`int`): K.
        sae_layer (`int`): Index into `hidden_states` that the SAE reads.
        depth (`int`): Decoder layers of the VLM.
        d_sae (`int`): Features of the SAE.
        sae_is_new (`bool`): Whether the SAE is untrained.
        new_modules (`list[str]`): What else is untrained, by its name in the model.
        added_tokens (`list[str]`): What the VLM's tokenizer lacked.
        num_parameters (`dict[str, int]`): By part.
        notes (`list[str]`): What the user should know.
    """

    folder: Path
    vlm_type: str
    num_slots: int
    sae_layer: int
    depth: int
    d_sae: int
    sae_is_new: bool
    new_modules: list[str]
    num_parameters: dict[str, int]
    added_tokens: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, model: Any, folder: Path, **others: Any) -> Composition:
        """Of a model that is saved in `folder`; `others` are the fields that its configuration does not say."""
        config = model.config
        return cls(
            folder=folder,
            vlm_type=config.vlm_config.model_type,
            num_slots=config.num_slots,
            sae_layer=config.sae_layer,
            depth=config.get_text_config().num_hidden_layers,
            d_sae=config.sae_config.d_sae,
            num_parameters={name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()},
            **others,
        )


def compose_checkpoint(
    vlm: str | os.PathLike,
    sam: str | os.PathLike | None,
    output: str | os.PathLike,
    sae: str | os.PathLike | None = None,
    num_slots: int | None = None,
    sae_layer: int | None = None,
    d_sae: int | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    **config_kwargs: Any,
) -> Composition:
    """Compose a ready-to-train checkpoint and save it with its processor, whole or not at all.

    Configurations are read and checked first; weights are downloaded only when they fit together.

    Args:
        vlm (`str` or `os.PathLike`): Hub id or folder of a VLM (LLaVA-1.5, Qwen2.5-VL, Qwen3-VL, ...), or of a
            SegCompass checkpoint, whose VLM is taken (after its warm-up, to give it an SAE).
        sam (`str` or `os.PathLike`, *optional*): Hub id or folder of a segmenter that takes mask prompts (see
            `SEGMENTERS`), or Segment Anything's own `.pth`; may be left out where `vlm` is a SegCompass checkpoint,
            which has one.
        output (`str` or `os.PathLike`): Folder to make.
        sae (`str` or `os.PathLike`, *optional*): Hub id or folder of an SAE of ours or SAELens', or an `ep_N.pt` of
            the original code; a new, untrained one when left out.
        num_slots (`int`, *optional*): K; a SegCompass checkpoint's own, else 4, when left out.
        sae_layer (`int`, *optional*): The SAE's own when left out, else see [`SegCompassConfig`].
        d_sae (`int`, *optional*): Features of a new SAE; 65,536 when left out.
        dtype (`str`, *optional*): `float32`, `bfloat16` or `float16` for everything; the VLM's own when left out.
        max_shard_size (`int` or `str`): Of a weight file.
        config_kwargs: Further fields of [`SegCompassConfig`]; a SegCompass checkpoint's own when left out.

    Returns:
        [`Composition`]

    Raises:
        FileExistsError: `output` is not empty.
        OSError: A part cannot be found or read.
        ValueError: A part is something else, or they do not fit together.
    """
    check_new_folder(output)
    check_dtype_name(dtype)
    parts = read_parts(vlm, sam, dtype)
    vlm_config = parts.vlm_config
    num_slots = num_slots or (parts.whole_config.num_slots if parts.whole_config is not None else 4)
    config_kwargs = own_settings(parts.whole_config) | config_kwargs
    notes: list[str] = []
    loaded_sae = None if sae is None else _load_sae(_source(sae, "sae"), sae_layer)
    layer = _choose_layer(vlm_config, loaded_sae, sae_layer, notes)
    _check_fit(vlm_config, None if loaded_sae is None else loaded_sae.config, layer, d_sae, notes)
    if loaded_sae is None:
        config_kwargs["sae_config"] = {"layer": layer} | ({} if d_sae is None else {"d_sae": d_sae})
    processor, added = _make_processor(parts, num_slots)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same command makes the same heads
        model = _make_model(parts, loaded_sae, num_slots, layer, processor, dtype, config_kwargs)
    model.config.vlm_config._name_or_path = model.config.sam_config._name_or_path = ""  # may be paths of this machine
    _check_tokens(model, processor)
    with staged_folder(output) as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        processor.save_pretrained(folder)
    new = {"sae_is_new": loaded_sae is None, "new_modules": ["codebook", "slot_encoder", "slot_mapper"]}
    return Composition.of(model, Path(output).expanduser(), added_tokens=added, notes=notes, **new)


def check_dtype_name(dtype: str | None) -> None:
    """Refuse a dtype that checkpoints are not made in."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}, or leave it out.")


@dataclass
class _Parts:
    """Where VLM and SAM come from, and their configurations."""

    vlm: str
    sam: Any  # Hub id, folder, loaded model, or `None`: that of the whole checkpoint
    vlm_config: PretrainedConfig
    sam_config: PretrainedConfig
    whole_config: PretrainedConfig | None  # where `vlm` is a SegCompass checkpoint

    @property
    def pixels(self) -> Any:
        """What says how the segmenter's pixels are made: id or folder, configuration, or our processor."""
        from ..processing_segcompass import SegCompassProcessor

        if self.sam is None:
            return SegCompassProcessor.from_pretrained(self.vlm)
        return self.sam if isinstance(self.sam, str) else self.sam_config


def read_parts(vlm: str | os.PathLike, sam: str | os.PathLike | None, dtype: str | None) -> _Parts:
    """Where parts lie and what they are; a segmenter in its authors' file is loaded, in `dtype` where one is given."""
    from .conversion.segmenters import load_original_sam

    vlm, whole = _source(vlm, "vlm"), None
    vlm_config = _read_config(vlm, "vlm")
    if vlm_config.model_type == "segcompass":
        whole, vlm_config = vlm_config, vlm_config.vlm_config
    check_is_vlm(vlm_config, vlm)
    if sam is None:
        if whole is None:
            raise ValueError("sam: a bare VLM needs a SAM; name one, such as facebook/sam-vit-base.")
        return _Parts(vlm, None, vlm_config, whole.sam_config, whole)
    sam = _source(sam, "sam")
    if Path(sam).is_file():
        model = load_original_sam(sam)
        if dtype is not None:
            _cast_sam(model, getattr(torch, dtype))
        return _Parts(vlm, model, vlm_config, model.config, whole)
    sam_config = _read_config(sam, "sam")
    try:
        segmenter_kind(sam_config)
    except ValueError as error:
        raise ValueError(f"sam: {sam!r}: {error}") from error
    return _Parts(vlm, sam, vlm_config, sam_config, whole)


def _source(part: str | os.PathLike, name: str) -> str:
    """A path or Hub id as text; what looks like a path must be there."""
    text = os.fspath(part)
    expanded = Path(text).expanduser()
    if expanded.exists():
        return str(expanded)
    if text.startswith((".", "/", "~")) or text.count("/") > 1 or not isinstance(part, str):
        raise FileNotFoundError(f"{name}: there is no file or folder {text!r}; give one, or a Hub id.")
    return text


def _read_config(source: str, name: str) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(source)
    except StrictDataclassError as error:
        raise ValueError(f"{name}: the configuration of {source!r} is wrong: {error.__cause__ or error}") from error
    except (ValueError, KeyError) as error:
        raise ValueError(f"{name}: {source!r} is no model that transformers knows: {error}") from error
    except OSError as error:
        raise OSError(f"{name}: cannot read {source!r}: {error}") from error


def _load_sae(source: str, layer: int | None) -> SegCompassSae:
    """An SAE of ours, of SAELens or of the original code."""
    from ..training.sae.sae_lens import CONFIG_FILE, load_sae_lens
    from .conversion.from_original import load_original_sae

    if source.endswith(".pt") and Path(source).is_file():
        return load_original_sae(source, layer)
    if cached_file(source, CONFIG_FILE, _raise_exceptions_for_missing_entries=False) is not None:
        return load_sae_lens(source)
    config = _read_config(source, "sae")
    if config.model_type == "segcompass":
        raise ValueError(f"sae: {source!r} is a whole SegCompass checkpoint; pass its SAE alone (model.sae).")
    if config.model_type != SegCompassSaeConfig.model_type:
        raise ValueError(f"sae: {source!r} is a {config.model_type!r} model; expected an SAE of train_sae or SAELens.")
    return SegCompassSae.from_pretrained(source)


def _choose_layer(vlm_config: PretrainedConfig, sae: SegCompassSae | None, given: int | None, notes: list[str]) -> int:
    trained_on = None if sae is None else sae.config.layer
    if given is not None and trained_on is not None and given != trained_on:
        raise ValueError(
            f"sae_layer={given}, but the SAE was trained on layer {trained_on}; its features mean nothing elsewhere: "
            "leave sae_layer out, or train an SAE on that layer."
        )
    if given is None and sae is not None and trained_on is None:
        notes.append(
            f"the SAE does not say which layer it was trained on; {default_sae_layer(vlm_config)} is assumed "
            "(--sae-layer names another)."
        )
    layer = given if given is not None else trained_on
    return default_sae_layer(vlm_config) if layer is None else layer


def _check_fit(
    vlm_config: PretrainedConfig,
    sae: SegCompassSaeConfig | None,
    layer: int,
    d_sae: int | None,
    notes: list[str],
) -> None:
    """Say everything that does not fit together, at once."""
    text_config = vlm_config.get_text_config()
    depth, width, problems = text_config.num_hidden_layers, text_config.hidden_size, []
    if not 0 <= layer < depth:
        problems.append(f"layer {layer} is not in the VLM's {depth} decoder layers (0 to {depth - 1})")
    if sae is not None and sae.d_in != width:
        problems.append(f"the SAE reads states of width {sae.d_in}, the VLM's are {width} wide")
    if sae is not None and d_sae is not None and d_sae != sae.d_sae:
        problems.append(f"d_sae={d_sae} was asked for, the SAE has {sae.d_sae} features")
    if d_sae is not None and d_sae < 1:
        problems.append(f"d_sae={d_sae} is not positive")
    if problems:
        raise ValueError(f"the parts do not fit together: {'; '.join(problems)}. Use an SAE trained on this VLM.")
    if layer == 0:
        notes.append("the SAE reads the embeddings (layer 0), before any decoder layer has seen the image.")


def _make_processor(parts: _Parts, num_slots: int) -> tuple[Any, list[str]]:
    """The processor, and the tokens it added."""
    from transformers import AutoTokenizer

    from ..generation_segcompass import ADDED_TOKENS
    from ..processing_segcompass import SegCompassProcessor

    try:
        known = AutoTokenizer.from_pretrained(parts.vlm).get_vocab()
        processor = SegCompassProcessor.from_parts(parts.vlm, parts.pixels, num_slots)
    except (OSError, ValueError) as error:
        raise OSError(f"vlm: {parts.vlm!r} lacks its tokenizer or image processor: {error}") from error
    return processor, [token for token in ADDED_TOKENS.values() if token not in known]


def _make_model(
    parts: _Parts,
    sae: SegCompassSae | None,
    num_slots: int,
    layer: int,
    processor: Any,
    dtype: str | None,
    config_kwargs: dict[str, Any],
) -> Any:
    from ..modeling_segcompass import SegCompassForReasoningSegmentation

    vlm, sam = parts.vlm, parts.sam
    with model_errors(parts.vlm):
        if parts.whole_config is not None:
            load: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
            whole = SegCompassForReasoningSegmentation.from_pretrained(parts.vlm, **load)
            vlm, sam = whole.vlm, whole.sam if sam is None else sam
        if dtype is not None and sae is not None:
            sae = sae.to(getattr(torch, dtype))
        return SegCompassForReasoningSegmentation.from_pretrained_parts(
            vlm, sam, sae, num_slots, layer, processor=processor, dtype=dtype, **config_kwargs
        )


@contextmanager
def model_errors(vlm: str) -> Iterator[None]:
    """What goes wrong inside, where a model is made of parts, as a `ValueError` that says which part is wrong."""
    try:
        yield
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from error
    except SafetensorError as error:
        raise ValueError(f"a weight file of {vlm!r} or of SAM is damaged ({error}); get it again.") from error


def _check_tokens(model: Any, processor: Any) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < len(processor.tokenizer) or model.config.ref_token_id != processor.ref_token_id:
        raise ValueError(
            f"the VLM has {rows} embedding rows and the tokenizer {len(processor.tokenizer)} tokens; they are not of "
            "one model."
        )


__all__ = ["Composition", "compose_checkpoint"]
