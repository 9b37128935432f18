# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Our checkpoints -> the files that the original code reads."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import logging

from ...configuration_segcompass import SegCompassConfig
from ...files import check_disk_space, check_new_folder, staged_folder
from .files import StoredTensor, open_weights, shorten, write_shards
from .from_original import (
    LLM_FOLDER,
    ORIGINAL_BEHAVIOUR,
    SAM_FILE,
    SAM_SECOND_POSITIONS,
    SIDE_FILE,
    check_weights,
    empty_model,
)
from .keys import revert_to_original_state_dict
from .vlm import empty_vlm, stored_names

logger = logging.get_logger(__name__)

SAE_FILE = "ep_0.pt"
# Fields that change what the original computes from the same weights; the others are settings of training.
_COMPUTED_BY = (
    "concept_input",
    "reference_search",
    "reference_order",
    "concept_threshold",
    "slot_encoder_heads",
    "slot_logit_threshold",
    "mask_logit_threshold",
)
_SAM_PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")
_POSITIONS = "sam.shared_image_embedding.positional_embedding"


def convert_to_original_checkpoint(
    checkpoint: str | os.PathLike, output: str | os.PathLike, max_shard_size: int | str = "5GB"
) -> Path:
    """Write a checkpoint of ours as the original code's files, every weight as it is.

    `refseg_modules.pt` (with the SAE), `llm_hf` under the names the language model is published with, `sam_vit.pth`
    (the image encoder, with the prompt encoder and mask decoder of the side file) and `ep_0.pt` (the SAE once more, as
    its trainer writes it). A warning names settings that the original does not have.

    Args:
        checkpoint (`str` or `os.PathLike`): A folder that `save_pretrained` or [`convert_original_checkpoint`] wrote.
        output (`str` or `os.PathLike`): Folder to make.
        max_shard_size (`int` or `str`): Of the language model's weight files.

    Returns:
        `Path`: The folder.

    Raises:
        FileNotFoundError: The folder lacks its configuration or weights.
        FileExistsError: `output` is not empty.
        ValueError: The checkpoint holds what the original's files have no place for.
    """
    check_new_folder(output)
    checkpoint = Path(checkpoint).expanduser()
    config = _read_config(checkpoint)
    weights = open_weights(checkpoint)
    _check_expressible(config, weights)
    check_weights(empty_model(config), weights)
    vlm = {name.removeprefix("vlm."): tensor for name, tensor in weights.items() if name.startswith("vlm.")}
    published = stored_names(empty_vlm(config.vlm_config), vlm)
    rest = {name: tensor for name, tensor in weights.items() if not name.startswith("vlm.")}
    rest.setdefault(SAM_SECOND_POSITIONS, rest[_POSITIONS])  # saved once, because they are tied
    with staged_folder(output) as folder:
        check_disk_space(folder, sum(t.num_bytes for t in vlm.values()) + 2 * sum(t.num_bytes for t in rest.values()))
        _write_side_files(folder, rest)
        llm_folder = folder / LLM_FOLDER
        llm_folder.mkdir()
        config.vlm_config.save_pretrained(llm_folder)
        _copy_text_parts(checkpoint, llm_folder)
        write_shards(llm_folder, {published[name]: tensor for name, tensor in vlm.items()}, max_shard_size)
    return Path(output).expanduser()


def _read_config(checkpoint: Path) -> SegCompassConfig:
    path = checkpoint / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{checkpoint} holds no config.json; pass the folder of a SegCompass checkpoint.")
    fields = json.loads(path.read_text("utf-8"))
    if fields.get("model_type") != SegCompassConfig.model_type:
        raise ValueError(f"{checkpoint} holds a {fields.get('model_type')!r} model; expected a SegCompass checkpoint.")
    kind = (fields.get("sam_config") or {}).get("model_type", "sam")
    if kind != "sam":
        raise ValueError(f"{checkpoint} segments with a {kind!r} model; the original has a place for SAM alone.")
    if fields.get("quantization_config"):
        raise ValueError(f"{checkpoint} is quantised; the original reads floating weights only.")
    return SegCompassConfig.from_pretrained(checkpoint)


def _check_expressible(config: SegCompassConfig, weights: Mapping[str, StoredTensor]) -> None:
    """Raise on weights that the original has no place for; warn where it would compute something else."""
    known = ("vlm.", "sae.", "codebook.", "slot_encoder.", "slot_mapper.", "sam.")
    extra = sorted(name for name in weights if not name.startswith(known))
    if extra:
        raise ValueError(
            f"the checkpoint holds {len(extra)} weights that the original has no place for ({shorten(extra)}); merge "
            "adapters first."
        )
    if config.heatmap_concepts:
        raise ValueError(
            "the model has heatmap_concepts: its slots look at the concepts of image tokens, for which the original "
            "has no place."
        )
    sae = config.sae_config
    if sae.architecture == "batchtopk" or sae.normalize_activations == "per_modality":
        raise ValueError(
            f"the SAE is {sae.architecture!r} with normalize_activations={sae.normalize_activations!r}, which the "
            "original code does not know."
        )
    second = weights.get(SAM_SECOND_POSITIONS)
    if second is not None and not torch.equal(weights[_POSITIONS].read(), second.read()):
        raise ValueError(f"{_POSITIONS} and {SAM_SECOND_POSITIONS} differ, and the original has one of them.")
    differing = [
        f"{name}={getattr(config, name)!r} (original: {ORIGINAL_BEHAVIOUR[name]!r})"
        for name in _COMPUTED_BY
        if getattr(config, name) != ORIGINAL_BEHAVIOUR[name]
    ]
    if differing:
        logger.warning("the original code will answer differently from these weights: %s.", "; ".join(differing))
    logger.warning("its settings must be these: %s.", ", ".join(f"{k}={v}" for k, v in _settings(config).items()))


def _settings(config: SegCompassConfig) -> dict[str, object]:
    """What the original reads from its yaml and not from the weights."""
    sae = config.sae_config
    top_k = sae.architecture == "topk" or sae.activation == "topk"
    normalization = "constant_norm_rescale" if sae.normalize_activations == "per_token" else sae.normalize_activations
    return {
        "worker.actor.model.k_slots": config.num_slots,
        "worker.sae.hook_layer": config.sae_layer,
        "worker.sae.d_in": sae.d_in,
        "worker.sae.d_sae": sae.d_sae,
        "worker.sae.architecture": "standard" if top_k else sae.architecture,
        "worker.sae.activation_fn_str": "topk" if top_k else sae.activation,
        **({"worker.sae.activation_fn_kwargs": {"k": sae.k}} if top_k else {}),
        "worker.sae.normalize_activations": normalization,
        "worker.sae.apply_b_dec_to_input": sae.apply_b_dec_to_input,
    }


def _write_side_files(folder: Path, rest: Mapping[str, StoredTensor]) -> None:
    original = revert_to_original_state_dict({name: tensor.read().contiguous() for name, tensor in rest.items()})
    side = {name: tensor for name, tensor in original.items() if not name.startswith("image_encoder.")}
    torch.save(side, folder / SIDE_FILE)
    torch.save({n: t for n, t in original.items() if n.split(".")[0] in _SAM_PARTS}, folder / SAM_FILE)
    sae = {name.removeprefix("sae."): tensor for name, tensor in side.items() if name.startswith("sae.")}
    torch.save({"sae": sae, "optimizer": None, "scheduler": None, "epoch": 0}, folder / SAE_FILE)


def _copy_text_parts(checkpoint: Path, llm_folder: Path) -> None:
    """Tokenizer, image processor and generation settings, for `AutoProcessor` in the original code."""
    if (checkpoint / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(checkpoint).save_pretrained(llm_folder)
    if not (checkpoint / "tokenizer_config.json").is_file():
        logger.warning("%s holds no tokenizer; put the language model's own beside its weights.", checkpoint)
        return
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(llm_folder)
    AutoImageProcessor.from_pretrained(checkpoint).save_pretrained(llm_folder)


__all__ = ["convert_to_original_checkpoint"]
