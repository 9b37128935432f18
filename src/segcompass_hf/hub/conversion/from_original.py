# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of the original code -> ours, and back.

The original writes `refseg_modules.pt` (SAE, query book, heatmap head, SAM's prompt encoder and mask decoder) and
`llm_hf` (the language model), and reads SAM's image encoder from the published `.pth`. Weights go from file to file
without a model in between: memory holds the side file and one shard.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, PretrainedConfig
from transformers.utils import logging

from ...configuration_segcompass import SegCompassConfig, SegCompassSaeConfig
from ...files import check_disk_space, check_new_folder, staged_folder
from ...generation_segcompass import ADDED_TOKENS
from ...modeling_sae import SegCompassSae
from .files import StoredTensor, check_state_dict, open_weights, read_torch_file, shorten, write_shards
from .keys import convert_original_state_dict
from .sizes import head_fields, sae_fields, sam_config_of
from .vlm import empty_vlm, module_names, read_vlm_config

logger = logging.get_logger(__name__)

SIDE_FILE, LLM_FOLDER, SAM_FILE = "refseg_modules.pt", "llm_hf", "sam_vit.pth"
SAM_SECOND_POSITIONS = "sam.prompt_encoder.shared_embedding.positional_embedding"
# What the original does where we decided otherwise, and its code's default weights of the losses.
ORIGINAL_BEHAVIOUR = {
    "concept_input": "duplicated",
    "reference_search": "sequence",
    "reference_order": "latest_first",
    "concept_threshold": 2.0,
    "slot_encoder_heads": 8,
    "slot_init_std": 0.02,
    "slot_logit_threshold": 0.5,
    "mask_logit_threshold": 0.0,
    "match_confidence_weight": 0.0,
    "valid_area_only": False,
    "empty_samples": "zero",
    "train_token_rows": "none",
    "seg_loss_weight": 0.3,
    "conf_loss_weight": 0.2,
    "mask_dice_weight": 0.8,
    "heatmap_dice_weight": 0.8,
    "mask_focal_weight": 0.0,
}


def convert_original_checkpoint(
    source: str | os.PathLike,
    output: str | os.PathLike,
    sam: str | os.PathLike | None = None,
    sae: str | os.PathLike | None = None,
    llm: str | os.PathLike | None = None,
    sae_layer: int | None = None,
    ref_token_id: int | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    **config_kwargs: Any,
) -> Path:
    """Convert a checkpoint of the original code; the result does what the original does, quirks included.

    Args:
        source (`str` or `os.PathLike`): Folder of a saved step, or its `refseg_modules.pt`.
        output (`str` or `os.PathLike`): Folder to make.
        sam (`str` or `os.PathLike`, *optional*): Segment Anything's `.pth` (`sam_vit_h_4b8939.pth`), for the image
            encoder; `sam_vit.pth` beside the side file when left out.
        sae (`str` or `os.PathLike`, *optional*): `ep_N.pt`, or a folder of them (the last is read), where the side
            file holds no SAE.
        llm (`str` or `os.PathLike`, *optional*): Folder of the language model; `llm_hf` beside the side file.
        sae_layer (`int`, *optional*): The original's `hook_layer`; 16 for LLaVA-1.5 and 13 for Qwen2.5-VL when left
            out.
        ref_token_id (`int`, *optional*): Id of `<REF_POS>`; read off the tokenizer when left out.
        dtype (`torch.dtype` or `str`, *optional*): Cast all weights but SAM's positional matrices; as they are when
            left out, and then the way back is exact.
        max_shard_size (`int` or `str`): Of a weight file.
        config_kwargs: Fields of [`SegCompassConfig`] that weights do not show or that should differ from the original
            (`concept_input="once"`); `sae_config` and `sam_config` as dicts of the fields to replace.

    Returns:
        `Path`: The folder, for `from_pretrained`; with the processor where the language model's folder has one.

    Raises:
        FileNotFoundError: A part is missing.
        FileExistsError: `output` is not empty.
        ValueError: A file is damaged, of something else, or lacks weights; or parts do not fit together.
    """
    check_new_folder(output)
    files = _find_parts(Path(source).expanduser(), sam, sae, llm)
    side = _read_side_file(files)
    llm_folder = files["llm"]
    stored = open_weights(llm_folder)
    vlm_config = read_vlm_config(llm_folder)
    tokenizer = _tokenizer_of(llm_folder)
    config_kwargs = _token_ids(ref_token_id, tokenizer, llm_folder) | config_kwargs
    _name_padding(vlm_config, tokenizer)
    config = _original_config(side, vlm_config, sae_layer, config_kwargs)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    config.dtype = dtype or vlm_config.dtype or _main_dtype(stored)

    weights = {f"vlm.{new}": stored[old] for old, new in module_names(empty_vlm(vlm_config), stored).items()}
    for name, tensor in convert_original_state_dict(side).items():
        if name != SAM_SECOND_POSITIONS:  # the same matrix once more, tied when loaded
            weights[name] = StoredTensor.of(tensor, files["side"].name)
    model = empty_model(config)
    check_weights(model, weights)
    weights = {name: t if "positional_embedding" in name else t.cast(dtype) for name, t in weights.items()}
    with staged_folder(output) as folder:
        check_disk_space(folder, sum(tensor.num_bytes for tensor in weights.values()))
        _save_configuration(model, folder)
        if (llm_folder / "generation_config.json").is_file():
            shutil.copyfile(llm_folder / "generation_config.json", folder / "generation_config.json")
        if tokenizer is not None:
            _save_processor(llm_folder, config, folder)
        write_shards(folder, weights, max_shard_size)
    return Path(output).expanduser()


def load_original_sae(
    path: str | os.PathLike, layer: int | None = None, config: Mapping[str, Any] | None = None
) -> SegCompassSae:
    """An SAE that the original's trainer saved.

    Args:
        path (`str` or `os.PathLike`): `ep_N.pt`, or a folder of them, of which the last is read.
        layer (`int`, *optional*): Index into `hidden_states` it was trained on; the file does not say.
        config (`Mapping`, *optional*): Fields of [`SegCompassSaeConfig`] that the weights do not show.
    """
    weights = _read_sae_file(Path(path).expanduser())
    sae = SegCompassSae(SegCompassSaeConfig(**{**sae_fields(weights), "layer": layer, **(config or {})}))
    sae.to(weights["W_enc"].dtype).load_state_dict(weights)
    return sae.eval()


def _find_parts(source: Path, sam: Any, sae: Any, llm: Any) -> dict[str, Path | None]:
    """Paths of `side`, `llm`, `sam` and `sae`; the last is `None` where the side file should hold it."""
    side = source / SIDE_FILE if source.is_dir() else source
    if not side.is_file():
        there = sorted(path.name for path in source.iterdir()) if source.is_dir() else []
        raise FileNotFoundError(
            f"there is no {side}{f' (the folder holds {shorten(there)})' if there else ''}; pass the folder that the "
            f"original's training saved a step in, or its {SIDE_FILE}."
        )
    folder = Path(llm).expanduser() if llm is not None else side.parent / LLM_FOLDER
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} of the language model; name it with llm=.")
    try:
        open_weights(folder)
    except FileNotFoundError as error:
        shards = sorted(side.parent.glob("model_world_size_*.pt"))
        if not shards or "holds no weights" not in str(error):
            raise
        raise FileNotFoundError(
            f"{folder} holds the configuration of the language model but no weights: the step was saved in "
            f"{len(shards)} FSDP shards ({shards[0].name}, ...) only. Save it with save_llm_hf=True in the original "
            "code, or pass a folder with its weights as llm=."
        ) from error
    sam = Path(sam).expanduser() if sam is not None else side.parent / SAM_FILE
    if not sam.is_file():
        raise FileNotFoundError(
            f"there is no {sam}: the side file lacks SAM's image encoder, which the original reads from the published "
            "weights; pass them with sam= (sam_vit_h_4b8939.pth for the original's own runs)."
        )
    return {"side": side, "llm": folder, "sam": sam, "sae": None if sae is None else Path(sae).expanduser()}


def _read_side_file(files: Mapping[str, Path | None]) -> dict[str, torch.Tensor]:
    """Everything but the language model under the original's names, the SAE and SAM's image encoder included."""
    side = check_state_dict(read_torch_file(files["side"]), files["side"])
    side = {name.removeprefix("refseg."): tensor for name, tensor in side.items()}
    if any(name.startswith("image_encoder.") for name in side):
        raise ValueError(f"{files['side']} holds an image encoder; pass the {SIDE_FILE} of a training run.")
    has_sae = any(name.startswith("sae.") for name in side)
    if has_sae and files["sae"] is not None:
        raise ValueError(f"{files['side']} holds an SAE already; leave sae= ({files['sae']}) out.")
    if not has_sae:
        if files["sae"] is None:
            raise FileNotFoundError(f"{files['side']} holds no SAE; pass the ep_N.pt it was trained with as sae=.")
        side |= {f"sae.{name}": tensor for name, tensor in _read_sae_file(files["sae"]).items()}
    published = check_state_dict(read_torch_file(files["sam"]), files["sam"])
    encoder = {name: tensor for name, tensor in published.items() if name.startswith("image_encoder.")}
    if not encoder:
        raise ValueError(
            f"{files['sam']} holds no image_encoder.* ({len(published)} weights: {shorten(sorted(published))}); pass "
            "the published weights of Segment Anything."
        )
    return side | encoder


def _read_sae_file(path: Path) -> dict[str, torch.Tensor]:
    if path.is_dir():
        epochs = {int(m[1]): p for p in path.glob("ep_*.pt") if (m := re.fullmatch(r"ep_(\d+)\.pt", p.name))}
        if not epochs:
            raise FileNotFoundError(f"{path} holds no ep_N.pt; pass the file or folder that SAE training wrote.")
        path = epochs[max(epochs)]
    content = read_torch_file(path)
    if not isinstance(content, Mapping) or "sae" not in content:
        found = shorten(sorted(map(str, content))) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"{path} holds {found}; expected 'sae', 'optimizer', 'scheduler' and 'epoch' of ep_N.pt.")
    return check_state_dict(content["sae"], f"{path} ('sae')")


def _tokenizer_of(folder: Path) -> Any:
    """The tokenizer in a folder, or `None`."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return None
    return AutoTokenizer.from_pretrained(folder)


def _token_ids(given: int | None, tokenizer: Any, folder: Path) -> dict[str, int]:
    """Ids of the format's tokens. The original adds `<REF_POS>` only; its think tags are spelled out."""
    vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
    ids = {name: vocabulary[token] for name, token in ADDED_TOKENS.items() if token in vocabulary}
    known = ids.pop("ref_token_id", None)
    if given is None and known is None:
        what = "no tokenizer" if tokenizer is None else "a tokenizer without <REF_POS>"
        raise ValueError(f"{folder} holds {what}; pass ref_token_id=, the id that <REF_POS> was trained with.")
    if given is not None and known is not None and given != known:
        raise ValueError(f"ref_token_id={given}, but <REF_POS> is {known} in {folder}'s tokenizer; leave it out.")
    return {"ref_token_id": known if given is None else given, **(ids if len(ids) == 2 else {})}


def _name_padding(vlm_config: PretrainedConfig, tokenizer: Any) -> None:
    """Note the padding token where the VLM does not: the original fills the SAE's input with the tokenizer's."""
    text_config = vlm_config.get_text_config()
    if tokenizer is not None and getattr(text_config, "pad_token_id", None) is None:
        text_config.pad_token_id = tokenizer.pad_token_id


def _original_config(
    side: Mapping[str, torch.Tensor], vlm_config: PretrainedConfig, sae_layer: int | None, given: Mapping[str, Any]
) -> SegCompassConfig:
    given = dict(given)
    overrides = {name: given.pop(name, None) or {} for name in ("sae_config", "sam_config")}
    sae = {name.removeprefix("sae."): tensor for name, tensor in side.items() if name.startswith("sae.")}
    fields = {
        "vlm_config": vlm_config,
        "sam_config": sam_config_of(side, overrides["sam_config"]),
        "sae_config": {**sae_fields(sae), **overrides["sae_config"]},
        **head_fields(side),
        **ORIGINAL_BEHAVIOUR,
        **given,
    }
    try:
        config = SegCompassConfig(**fields, sae_layer=sae_layer)
    except StrictDataclassError as error:
        raise ValueError(f"the parts do not fit together: {error.__cause__ or error}") from error
    config.sae_config.layer = config.sae_layer
    return config


def empty_model(config: SegCompassConfig) -> Any:
    """The composition without memory for its weights."""
    from ...modeling_segcompass import SegCompassForReasoningSegmentation

    with torch.device("meta"):
        model = SegCompassForReasoningSegmentation(config)
    return model if config.dtype is None else model.to(config.dtype)  # saving notes the dtype of the weights


def check_weights(model: Any, weights: Mapping[str, StoredTensor]) -> None:
    """Raise unless the weights are exactly those of the model; second names of tied ones may be missing."""
    state = model.state_dict()
    missing = sorted(state.keys() - weights.keys() - set(model.all_tied_weights_keys))
    extra = sorted(weights.keys() - state.keys())
    shapes = [
        f"{name} {weights[name].shape} instead of {tuple(tensor.shape)}"
        for name, tensor in state.items()
        if name in weights and tuple(tensor.shape) != weights[name].shape
    ]
    problems = [
        f"{len(missing)} weights are missing ({shorten(missing)})" if missing else "",
        f"{len(extra)} have no place ({shorten(extra)})" if extra else "",
        f"{len(shapes)} have another shape ({shorten(shapes)})" if shapes else "",
    ]
    if any(problems):
        raise ValueError(
            f"the parts do not make up a {type(model).__name__}: {'; '.join(p for p in problems if p)}. Check that "
            "all files are of one training run."
        )


def _main_dtype(stored: Mapping[str, StoredTensor]) -> torch.dtype:
    """The floating dtype of most numbers."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in stored.values():
        if tensor.dtype.is_floating_point:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.num_bytes
    return max(sizes, key=sizes.get, default=torch.float32)


def _save_configuration(model: Any, folder: Path) -> None:
    """What `save_pretrained` writes, but for the weights: they are not in the model."""
    model.save_pretrained(folder, state_dict={})
    for path in folder.glob("*.safetensors*"):
        path.unlink()


def _save_processor(llm_folder: Path, config: SegCompassConfig, folder: Path) -> None:
    from ...processing_segcompass import SegCompassProcessor

    tags = "text" if config.think_start_token_id is None else "tokens"
    try:
        processor = SegCompassProcessor.from_parts(llm_folder, config.sam_config, config.num_slots, think_tags=tags)
    except (OSError, ValueError) as error:
        logger.warning("no processor is saved: %s has a tokenizer, but %s", llm_folder, error)
        return
    processor.save_pretrained(folder)


__all__ = [
    "ORIGINAL_BEHAVIOUR",
    "convert_original_checkpoint",
    "load_original_sae",
]
