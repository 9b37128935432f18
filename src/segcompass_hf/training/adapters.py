# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""LoRA above the SAE layer with the heads trained whole: configuring, checking, loading and merging PEFT adapters."""

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .. import bundled_checkpoint
from ..modeling_segcompass import SegCompassForReasoningSegmentation
from ..text_stack_segcompass import decoder_layers, final_norm

logger = logging.get_logger(__name__)

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def lora_config(
    model: PreTrainedModel,
    r: int = 16,
    alpha: float = 32,
    dropout: float = 0.05,
    targets: Sequence[str] = LORA_TARGETS,
    heads: Literal["full", "none"] = "full",
    train_token_rows: Literal["head", "none", "both"] | None = None,
    **kwargs: Any,
) -> LoraConfig:
    """LoRA on the decoder layers with index >= `sae_layer`; the heads and SAM's mask path trained whole.

    Nothing that the frozen SAE reads changes: vision tower, projector and the layers below stay as they are. Tied
    embeddings have one set of rows, which learns from both sides (in joint training from the head's alone).

    Args:
        model ([`SegCompassForReasoningSegmentation`]): In full precision or quantised; not changed.
        r (`int`, defaults to 16): Rank.
        alpha (`float`, defaults to 32): The update is scaled by `alpha / r`.
        dropout (`float`, defaults to 0.05): On the input of the adapters, in [0, 1).
        targets (`Sequence[str]`): Last parts of the names of the linear layers that get an adapter.
        heads (`str`, defaults to `"full"`): `"full"` trains copies of the heads, `"none"` leaves them frozen.
        train_token_rows (`str`, *optional*): Which rows of the added tokens train, as in `freeze_for_training`;
            `config.train_token_rows` when left out. Joint training refuses `"both"`.
        kwargs: Further fields of `LoraConfig`.

    Raises:
        ValueError: No decoder layer comes after the SAE, one of them has none of the targets, or `heads` is neither.
    """
    if heads not in ("full", "none"):
        raise ValueError(f'heads must be "full" or "none", got {heads!r}.')
    prefix, layers = _decoder(model)
    endings = "|".join(re.escape(target) for target in targets)
    trained = range(model.config.sae_layer, len(layers))
    indices = "|".join(str(index) for index in trained)
    pattern = rf"{re.escape(prefix)}\.(?:{indices})\..*\.(?:{endings})"
    matched = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
    reached = {int(name[len(prefix) + 1 :].split(".")[0]) for name in matched}
    if not trained or reached != set(trained):
        raise ValueError(
            f"LoRA goes on the decoder layers from {trained.start} on, of {len(layers)}; of these "
            f"{sorted(reached) or 'none'} have a linear layer named one of {', '.join(targets)}; pass targets that "
            f"fit {type(model.vlm).__name__}."
        )
    fields = {"target_modules": pattern, "r": r, "lora_alpha": alpha, "lora_dropout": dropout}
    if heads == "full":
        fields["modules_to_save"] = head_modules(model)
    rows = _trainable_rows(model, train_token_rows or model.config.train_token_rows)
    if rows:
        fields["trainable_token_indices"] = rows
    return LoraConfig(**{**fields, **kwargs})


def head_modules(model: PreTrainedModel) -> list[str]:
    """Names of the largest modules of the heads of which every parameter trains.

    SAM's parts that mask prompts never use are left out: PEFT turns on the gradient of everything it copies, each time
    an adapter is enabled, and DistributedDataParallel would wait for theirs. So are those that take part in encoding
    images: PEFT freezes the image encoder, whatever it was before.
    """
    stage = model.mask_stage
    left_out = dict(stage.unused_parameters()) | stage.encoding_parameters()
    unused = {id(parameter) for parameter in left_out.values()}  # SAM ties two of its names
    names = []
    pending = ["sam.mask_decoder", "sam.prompt_encoder", "slot_mapper", "slot_encoder", "codebook"]
    while pending:
        name = pending.pop()
        module = model.get_submodule(name)
        parameters = {id(parameter) for parameter in module.parameters()}
        if parameters and not parameters & unused and not isinstance(module, nn.ModuleList):
            names.append(name)
        elif parameters - unused:
            pending += [f"{name}.{child}" for child, _ in module.named_children()][::-1]
    return names


def _decoder(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and module of the language model's decoder layers."""
    layers = decoder_layers(model.vlm)
    return next(name for name, module in model.named_modules() if module is layers), layers


def _trainable_rows(model: PreTrainedModel, train_token_rows: str) -> dict[str, list[int]]:
    """What `LoraConfig.trainable_token_indices` takes: module name -> rows of the added tokens."""
    ids = _added_token_ids(model)
    if train_token_rows == "none" or not ids:
        return {}
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head.bias is not None:
        raise ValueError(
            "the VLM's head has a bias, which PEFT's trainable rows would drop; pass train_token_rows='none'."
        )
    tied = head.weight is embeddings.weight  # PEFT lets the head follow the embeddings then
    modules = [embeddings] if tied else [head, embeddings] if train_token_rows == "both" else [head]
    return {name: ids for name, module in model.named_modules() if any(module is chosen for chosen in modules)}


def _added_token_ids(model: PreTrainedModel) -> list[int]:
    config = model.config
    ids = (config.ref_token_id, config.think_start_token_id, config.think_end_token_id)
    return sorted({i for i in ids if i is not None})


def check_peft_config(model: PreTrainedModel, config: PeftConfig) -> None:
    """Refuse an adapter that would change what the frozen SAE reads, or that trains what gets no gradient.

    Args:
        model ([`SegCompassForReasoningSegmentation`]): Not wrapped yet; not changed.
        config (`PeftConfig`): Of any PEFT method that adapts modules.

    Raises:
        ValueError: The adapter reaches the SAE or what comes before layer `sae_layer` (decoder layers, vision tower,
            projector, embeddings but for the rows of the added tokens), or copies parameters of SAM that mask prompts
            never use, or is a prompt-learning method.
    """
    if config.is_prompt_learning:
        raise ValueError(
            f"{config.peft_type} puts virtual tokens before the prompt, which concepts and masks know nothing of; use "
            "a method that adapts modules, such as lora_config(model)."
        )
    reached = _reached_modules(model, config)
    read_by_sae = _parameters_before_the_sae(model)
    offending = [name for name, parameters in reached.items() if parameters & read_by_sae]
    rows = _foreign_rows(model, config)
    offending += [name for name in rows if name not in offending]
    if offending:
        layer = model.config.sae_layer
        raise ValueError(
            f"the adapter reaches {len(offending)} modules that decide what the frozen SAE reads at layer {layer}: "
            f"{', '.join(offending[:3])}{', ...' if len(offending) > 3 else ''}. Concepts would drift away from their "
            f"names; adapt decoder layers from {layer} on only, as lora_config(model) does."
        )
    unused = {f"sam.{name}" for name, _ in model.mask_stage.unused_parameters()}
    wasteful = [name for name in _saved_modules(model, config) if reached[name] & unused]
    if wasteful:
        raise ValueError(
            f"modules_to_save names {', '.join(wasteful)}, parts of which mask prompts never use: they get no "
            "gradient and DistributedDataParallel would wait for it; name the parts that head_modules(model) lists."
        )
    heads = set().union(*(_parameters_under(model, name) for name in head_modules(model)))
    frozen = sorted({name.split(".")[0] for name in heads - set().union(*reached.values())})
    if frozen:
        logger.warning(
            "the adapter leaves heads frozen (%s): right for trained ones, but new ones stay random; "
            "lora_config(model) trains them.",
            ", ".join(frozen),
        )


def trained_token_rows(model: PreTrainedModel) -> Literal["head", "none", "both"]:
    """Which rows of the added tokens train in a model that is frozen already or wrapped by PEFT.

    Tied embeddings count as the head's.
    """
    head, embeddings = (
        {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
        for module in (model.get_output_embeddings(), model.get_input_embeddings())
    )
    return "both" if embeddings - head else "head" if head else "none"


def warn_of_other_settings(
    model: PreTrainedModel, train_token_rows: Literal["head", "none", "both"] | None, train_heads: bool = True
) -> None:
    """Name the settings of a trainer that an adapter, which decides what trains, does not follow.

    Args:
        model ([`SegCompassForReasoningSegmentation`]): Under the PEFT wrapper.
        train_token_rows (`str`, *optional*): As set in the trainer; `None` asks for nothing.
        train_heads (`bool`, defaults to `True`): As set in the trainer; only `False` asks for something.
    """
    ignored = []
    if train_token_rows is not None and train_token_rows != (rows := trained_token_rows(model)):
        ignored.append(f"train_token_rows={train_token_rows!r} (the adapter trains {rows!r})")
    parts = (model.codebook, model.slot_encoder, model.slot_mapper, model.sam)
    if not train_heads and any(parameter.requires_grad for part in parts for parameter in part.parameters()):
        ignored.append("train_heads=False (the adapter trains copies of the heads)")
    if ignored:
        logger.warning(
            "the adapter decides what trains, and these settings say something else: %s; pass train_token_rows and "
            "heads to lora_config instead.",
            ", ".join(ignored),
        )


def _parameters_under(model: nn.Module, name: str) -> set[str]:
    return {f"{name}.{key}" for key, _ in model.get_submodule(name).named_parameters()}


def _parameters_before_the_sae(model: PreTrainedModel) -> set[str]:
    """Parameters that the states at `sae_layer` depend on, and the SAE's own."""
    layers = decoder_layers(model.vlm)[model.config.sae_layer :]
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    after = {id(parameter) for module in (layers, final_norm(model.vlm), head) for parameter in module.parameters()}
    after -= {id(parameter) for parameter in embeddings.parameters()}  # tied ones are read first
    named = model.named_parameters()
    return {name for name, weight in named if name.startswith(("sae.", "vlm.")) and id(weight) not in after}


def _saved_modules(model: PreTrainedModel, config: PeftConfig) -> list[str]:
    endings = tuple(getattr(config, "modules_to_save", None) or ())
    return [name for name, _ in model.named_modules() if name and name.endswith(endings)] if endings else []


def _reached_modules(model: PreTrainedModel, config: PeftConfig) -> dict[str, set[str]]:
    """Modules that PEFT would adapt or copy, by its own rules -> names of their parameters."""
    config = copy.copy(config)
    names = _saved_modules(model, config)
    if getattr(config, "target_modules", None) is not None:
        config = _maybe_include_all_linear_layers(config, model)
        names += [name for name, _ in model.named_modules() if name and check_target_module_exists(config, name)]
    reached = {name: _parameters_under(model, name) for name in names}
    for ending in getattr(config, "target_parameters", None) or ():
        for name, _ in model.named_parameters():
            if name == ending or name.endswith(f".{ending}"):
                reached.setdefault(name, {name})
    return reached


def _foreign_rows(model: PreTrainedModel, config: PeftConfig) -> list[str]:
    """Modules of which `trainable_token_indices` trains input rows of other tokens than the added ones."""
    rows = getattr(config, "trainable_token_indices", None) or {}
    if not isinstance(rows, dict):
        rows = {"embed_tokens": rows}
    embeddings = model.get_input_embeddings()
    own = set(_added_token_ids(model))
    names = [name for name, module in model.named_modules() if module is embeddings]
    return [name for name in names for ending, ids in rows.items() if name.endswith(ending) and set(ids) - own]


def load_adapter(
    base: str | Path | PreTrainedModel | None, adapter: str | Path, is_trainable: bool = False, **kwargs: Any
) -> PeftModel:
    """Put a saved adapter onto its base model.

    To merge it for good, load it onto a base in full precision and call `merge_and_unload()`: merging into 4-bit
    weights rounds the sum again.

    Args:
        base (`str`, `Path` or [`SegCompassForReasoningSegmentation`], *optional*): Hub id, folder or loaded model;
            what the adapter was trained on when `None`.
        adapter (`str` or `Path`): Hub id or folder of the adapter.
        is_trainable (`bool`, defaults to `False`): Go on training it.
        kwargs: For loading the base (`dtype`, `quantization_config`, `device_map`, ...).

    Raises:
        FileNotFoundError: The adapter names a folder as its base that is not on this machine.
        ValueError: The adapter names no base, or does not fit this one (see [`check_peft_config`]).
    """
    config = PeftConfig.from_pretrained(str(adapter))
    if base is None:
        base = config.base_model_name_or_path
        if not base:
            raise ValueError(
                f"{adapter} does not say which model it was trained on (that model was never saved); pass it as base."
            )
        base = _base_on_this_machine(str(base), adapter)
    if not isinstance(base, nn.Module):
        base = SegCompassForReasoningSegmentation.from_pretrained(base, **kwargs)
    elif kwargs:
        raise ValueError(f"{', '.join(kwargs)} would load the base, which is loaded already; leave them out.")
    check_peft_config(base, config)
    return PeftModel.from_pretrained(base, str(adapter), is_trainable=is_trainable)


def _base_on_this_machine(base: str, adapter: str | Path) -> str:
    """A base that an adapter names: a Hub id or folder; the bundled checkpoint wherever this package is."""
    folder = Path(base).expanduser()
    if folder.is_dir() or not (folder.is_absolute() or base.startswith(".") or base.count("/") > 1):
        return base
    bundled = bundled_checkpoint()
    if folder.parts[-3:] == bundled.parts[-3:]:  # segcompass_hf/checkpoints/NAME
        return str(bundled)
    raise FileNotFoundError(
        f"{adapter} was trained on {base!r}, which is not on this machine; pass its new place or Hub id as base."
    )


@torch.no_grad()
def restore_head_precision(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Give the copies of the heads and the trained token rows the precision back that a QLoRA trainer took.

    TRL casts everything that trains to bf16 where the base is quantised. LoRA stands that; heads at a learning rate of
    1e-4 do not: most steps are smaller than bf16 can hold. Copies that are still those of the base get its exact
    values, others keep their rounded ones. Call it before the optimizer is made.

    Args:
        model (`PeftModel`): Changed in place, and returned.
        dtype (`torch.dtype`, defaults to `torch.float32`): Of the copies.
    """
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            source_of = dict(module.original_module.named_parameters())
            copies = [copied.named_parameters() for copied in module.modules_to_save.values()]
            pairs = [(parameter, source_of[name]) for copied in copies for name, parameter in copied]
        elif isinstance(module, TrainableTokensWrapper):
            originals = module.token_adapter.trainable_tokens_original
            pairs = [(rows, originals[name]) for name, rows in module.token_adapter.trainable_tokens_delta.items()]
        else:
            continue
        for parameter, source in pairs:
            untouched = torch.equal(parameter, source.to(parameter.dtype))
            parameter.data = (source.detach().clone() if untouched else parameter.data).to(dtype)
    return model


__all__ = [
    "LORA_TARGETS",
    "check_peft_config",
    "head_modules",
    "load_adapter",
    "lora_config",
    "restore_head_precision",
    "trained_token_rows",
    "warn_of_other_settings",
]
