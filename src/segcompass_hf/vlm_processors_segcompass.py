# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Image processors and tokenizers of VLM families, loaded without torchvision."""

import inspect
import os
from typing import Any

import transformers
from transformers import AutoConfig, AutoTokenizer, ProcessorMixin
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.17 hides it without torchvision
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

SUB_PROCESSORS = ("image_processor", "video_processor", "audio_processor", "feature_extractor", "tokenizer")


def on_pil_backend(image_processor: Any) -> Any:
    """An image processor of transformers on its PIL backend, whose pixels are the same wherever it is loaded.

    Loading chooses the torchvision backend where torchvision is installed, which resizes differently.
    """
    name = type(image_processor).__name__.removesuffix("Fast")
    pil_class = getattr(transformers, f"{name}Pil", None)
    return image_processor if pil_class is None else pil_class.from_dict(image_processor.to_dict())


def own_arguments(processor_class: type) -> list[str]:
    """Constructor arguments of a VLM processor besides its parts and chat template."""
    skipped = ("self", "chat_template", "args", "kwargs", *SUB_PROCESSORS)
    return [name for name in inspect.signature(processor_class.__init__).parameters if name not in skipped]


def processor_class(name: str) -> type:
    """The class of that name in transformers, made to do without a video processor."""
    base = getattr(transformers, name, None)
    if not (isinstance(base, type) and issubclass(base, ProcessorMixin)):
        raise ValueError(
            f"vlm_processor_class {name!r} is no processor class of transformers {transformers.__version__}."
        )
    if not any("video" in attribute for attribute in base.get_attributes()):
        return base

    def __init__(self, image_processor=None, tokenizer=None, video_processor=None, chat_template=None, **kwargs):
        base.__init__(self, image_processor, tokenizer, video_processor, chat_template=chat_template, **kwargs)

    def check_argument_for_proper_class(self, argument_name, argument):
        if argument is not None or "video" not in argument_name:
            return base.check_argument_for_proper_class(self, argument_name, argument)

    methods = {"__init__": __init__, "check_argument_for_proper_class": check_argument_for_proper_class}
    return type(f"{name}WithoutVideo", (base,), methods)


def is_own_folder(path: str | os.PathLike) -> bool:
    fields, _ = ProcessorMixin.get_processor_dict(str(path))
    return fields.get("processor_class") == "SegCompassProcessor"


def load_vlm_parts(path: str) -> tuple:
    """Image processor, tokenizer, processor class and its arguments, chat template of a VLM's id or folder.

    `AutoProcessor` cannot be asked: for the Qwens it insists on a video processor and so on torchvision.
    """
    config = AutoConfig.from_pretrained(path)
    fields, _ = ProcessorMixin.get_processor_dict(path)
    class_name = fields.get("processor_class") or PROCESSOR_MAPPING_NAMES.get(config.model_type)
    if class_name is None:
        raise ValueError(
            f"{path!r} (model type {config.model_type!r}) names no processor class; pass a processor instead."
        )
    arguments = {name: fields[name] for name in own_arguments(processor_class(class_name)) if name in fields}
    if class_name == "LlavaProcessor":  # the first LLaVA repositories leave these to the model
        arguments.setdefault("patch_size", config.vision_config.patch_size)
        arguments.setdefault("vision_feature_select_strategy", config.vision_feature_select_strategy)
        if config.vision_config.model_type == "clip_vision_model":
            arguments.setdefault("num_additional_image_tokens", 1)  # its class token
    image_processor, tokenizer = AutoImageProcessor.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    return image_processor, tokenizer, class_name, arguments, fields.get("chat_template") or tokenizer.chat_template
