# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Image processors and tokenizers of VLM families, loaded without torchvision."""

import copy
import inspect
import os
from collections import Counter
from typing import Any, NamedTuple

import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, ProcessorMixin
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.17 hides it without torchvision
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import is_torchvision_available

HELD_PARTS = ("image_processor", "tokenizer")  # of a family's processor, in a `SegCompassProcessor`
MEASURED_SIDE = 224  # pixels of the picture that a family's processor is tried with: many patches, few tiles


def on_pil_backend(image_processor: Any) -> Any:
    """An image processor of transformers on its PIL backend, whose pixels are the same wherever it is loaded.

    Loading chooses the torchvision backend where torchvision is installed, which resizes differently.
    """
    name = type(image_processor).__name__.removesuffix("Fast")
    pil_class = getattr(transformers, f"{name}Pil", None)
    return image_processor if pil_class is None else pil_class.from_dict(image_processor.to_dict())


def processor_class(name: str) -> type:
    """The processor class of that name in transformers.

    Raises:
        ImportError: It needs a package that is not installed.
        ValueError: transformers has no such class.
    """
    base = getattr(transformers, name, None)
    if getattr(base, "is_dummy", False):
        raise ImportError(f"{name} needs {' and '.join(base._backends)}, not installed here; install what it needs.")
    if not (isinstance(base, type) and issubclass(base, ProcessorMixin)):
        raise ValueError(
            f"vlm_processor_class {name!r} is no processor class of transformers {transformers.__version__}."
        )
    return base


def own_arguments(processor_class: type) -> dict[str, inspect.Parameter]:
    """Constructor arguments of a VLM processor besides its parts and chat template."""
    skipped = ("self", "chat_template", "audio_tokenizer", *processor_class.get_attributes())
    parameters = inspect.signature(processor_class.__init__).parameters.items()
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: one for name, one in parameters if name not in skipped and one.kind not in variable}


class AbsentPart:
    """Stands in a family's processor for a part that images do not need (videos, audio).

    Families read settings off such parts when they are made; they get the image processor's.

    Args:
        name (`str`): Of the part, as the family's constructor calls it.
        image_processor (`BaseImageProcessor`): Answers in its place.
    """

    model_input_names: list[str] = []  # none of its own
    _auto_class = None

    def __init__(self, name: str, image_processor: Any):
        self._name, self._image_processor = name, image_processor

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # also while it is copied, when it holds nothing yet
            raise AttributeError(name)
        if not hasattr(self._image_processor, name):
            raise AttributeError(
                f"the family's processor asks its {self._name} for {name!r}. SegCompass holds no {self._name}, and "
                f"{type(self._image_processor).__name__}, which answers in its place, has no {name!r}."
            )
        return getattr(self._image_processor, name)

    def __call__(self, *args, **kwargs):
        raise ValueError(f"SegCompass reads images and text; it holds no {self._name}.")


def build_vlm_processor(
    class_name: str, image_processor: Any, tokenizer: Any, chat_template: str | None, arguments: dict[str, Any]
) -> ProcessorMixin:
    """A family's own processor for images and text, whatever else it could read.

    Args:
        class_name (`str`): Of its class in transformers.
        image_processor, tokenizer: Its parts; every other one is an [`AbsentPart`].
        chat_template (`str`, *optional*): Jinja template.
        arguments (`dict`): What the class takes besides ([`own_arguments`]).

    Raises:
        ImportError: The class needs a package that is not installed.
        ValueError: There is no such class, or it needs parts that SegCompass does not hold.
    """
    base = processor_class(class_name)
    parts = base.get_attributes()
    lacking = [name for name in HELD_PARTS if name not in parts]
    if lacking:
        raise ValueError(
            f"{class_name} takes no {' and no '.join(lacking)} (its parts: {', '.join(parts)}), so it cannot prepare "
            "an image and its text; use a VLM whose processor does."
        )
    others = [name for name in parts if name not in HELD_PARTS]
    foreign = [name for name in others if "tokenizer" in name or "image_processor" in name]
    if foreign:
        raise ValueError(
            f"{class_name} needs a {' and a '.join(foreign)} besides image processor and tokenizer, which SegCompass "
            "does not hold; use a VLM of another family."
        )
    given = {"image_processor": image_processor, "tokenizer": tokenizer, **arguments}
    given |= {name: AbsentPart(name, image_processor) for name in others}
    takes_template = "chat_template" in inspect.signature(base.__init__).parameters
    processor = (_with_absent_parts(base) if others else base)(
        **given, **({"chat_template": chat_template} if takes_template else {})
    )
    processor.chat_template = chat_template
    return processor


def _with_absent_parts(base: type) -> type:
    """A family's class that lets [`AbsentPart`]s be, under the same name."""

    def check_argument_for_proper_class(self, argument_name, argument):
        if isinstance(argument, AbsentPart):
            return AbsentPart
        return base.check_argument_for_proper_class(self, argument_name, argument)

    def to_dict(self):
        held = copy.copy(self)
        held.__dict__ = {name: value for name, value in vars(self).items() if not isinstance(value, AbsentPart)}
        return base.to_dict(held)

    methods = {"check_argument_for_proper_class": check_argument_for_proper_class, "to_dict": to_dict}
    return type(base.__name__, (base,), methods)


class ImageHandling(NamedTuple):
    """What a family's processor does with images, found out by trying.

    Args:
        nested (`bool`): It takes a list of images for every text; otherwise one list of all images.
        token_id (`int`, *optional*): Id that stands for an image patch in `input_ids`; for an image as a whole where
            the model looks at it by cross-attention. Ids around patches (rows, columns, tiles) are none: they show
            nothing of the image and are read like words. `None` where nothing stands for the image.
        asks_types (`bool`): Its models take `mm_token_type_ids`, and it gives them only when asked.
        padding_ignored (`tuple[str, ...]`): Inputs with an entry per token that it lays out as if no row were padded
            on the left (Kosmos-2.5's places of the image).
    """

    nested: bool
    token_id: int | None
    asks_types: bool
    padding_ignored: tuple[str, ...] = ()


def measure_image_handling(vlm_processor: ProcessorMixin, class_name: str, prompt: str, **kwargs) -> ImageHandling:
    """Try a family's processor with a picture.

    Args:
        vlm_processor (`ProcessorMixin`): The family's.
        class_name (`str`): Of its class.
        prompt (`str`): A rendered prompt with one image.
        kwargs: For the processor.
    """
    picture = Image.new("RGB", (MEASURED_SIDE, MEASURED_SIDE))
    made, nested = {}, True
    for images in ([[picture]], [picture]):
        try:
            made = vlm_processor(images=images, text=[prompt], return_tensors="pt", **kwargs)
        except Exception:  # whatever it raises: where both fail, the caller's own call shows why
            continue
        nested = isinstance(images[0], list)
        break
    ids = made["input_ids"][0].tolist() if "input_ids" in made else None
    plain = {name: value for name, value in kwargs.items() if name == "add_special_tokens"}
    token_id = _image_token_id(vlm_processor, ids, vlm_processor.tokenizer(prompt, **plain)["input_ids"])
    asks_types = "mm_token_type_ids" not in made and _models_take(class_name, "mm_token_type_ids")
    ignored = _padding_ignored(vlm_processor, prompt, nested, made, **kwargs)
    return ImageHandling(nested, token_id, asks_types, ignored)


def _padding_ignored(vlm_processor: Any, prompt: str, nested: bool, alone: Any, **kwargs) -> tuple[str, ...]:
    """See [`ImageHandling`]: those of the inputs made `alone` that a longer row beside them leaves where they are."""
    names = [name for name in alone if name not in ("input_ids", "attention_mask", "labels")]
    names = [name for name in names if getattr(alone[name], "shape", ())[:2] == alone["input_ids"].shape]
    if not names:
        return ()
    picture = Image.new("RGB", (MEASURED_SIDE, MEASURED_SIDE))
    images = [[picture], [picture]] if nested else [picture, picture]
    texts = [prompt, f"{prompt} and more"]
    kwargs |= {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    beside = vlm_processor(images=images, text=texts, **kwargs)
    length = alone["input_ids"].shape[1]
    pairs = {name: (alone[name][0], beside[name][0]) for name in names}
    return tuple(
        name
        for name, (one, padded) in pairs.items()
        if not torch.equal(padded[-length:], one) and torch.equal(padded[:length], one)
    )


def shift_behind_padding(inputs: Any, names: tuple[str, ...]) -> None:
    """Move what [`ImageHandling`] calls `padding_ignored` in a batch to where its rows begin, in place."""
    padding = (inputs["attention_mask"].cumsum(1) == 0).sum(1).tolist()
    for name in names:
        rows = [row.roll(count, 0) for row, count in zip(inputs[name], padding, strict=True)]
        inputs[name] = torch.stack(rows)


def heard_texts(vlm_processor: ProcessorMixin, prompt: str, nested: bool, **kwargs) -> list[tuple[str, bool]]:
    """The texts that a family's processor gives its tokenizer for a prompt and a picture.

    Args:
        vlm_processor (`ProcessorMixin`): The family's; it is left as it is.
        prompt (`str`): A rendered prompt with one image.
        nested (`bool`): See [`ImageHandling`].
        kwargs: For the processor.

    Returns:
        `list[tuple[str, bool]]`: each text, and whether the tokenizer adds special tokens to it.
    """
    heard: list[tuple[str, bool]] = []
    base = type(vlm_processor.tokenizer)

    def listen(self, text=None, *args, **options):
        texts = [text] if isinstance(text, str) else list(text or [])
        heard.extend((one, options.get("add_special_tokens", True)) for one in texts if isinstance(one, str))
        return base.__call__(self, text, *args, **options)

    listener, tokenizer = copy.copy(vlm_processor), copy.copy(vlm_processor.tokenizer)
    tokenizer.__class__ = type(base.__name__, (base,), {"__call__": listen})
    listener.tokenizer = tokenizer
    picture = Image.new("RGB", (MEASURED_SIDE, MEASURED_SIDE))
    listener(images=[[picture]] if nested else [picture], text=[prompt], return_tensors="pt", **kwargs)
    return heard


def _image_token_id(vlm_processor: ProcessorMixin, ids: list[int] | None, before: list[int]) -> int | None:
    """The id of a patch: of the ids that the family names as its image's, the most frequent in `ids`, those that its
    processor made; where none of them is there, what it put into the text `before` it most often, and repeated."""
    tokenizer = vlm_processor.tokenizer
    named = [getattr(part, "image_token_id", None) for part in (tokenizer, vlm_processor)]
    token = getattr(vlm_processor, "image_token", None)
    named.append(None if token is None else tokenizer.convert_tokens_to_ids(getattr(token, "content", token)))
    named += getattr(vlm_processor, "image_token_ids", None) or []
    named = [one for one in named if isinstance(one, int) and one != tokenizer.unk_token_id]
    if ids is None:
        return named[0] if named else None
    counts = Counter(ids)
    found = [one for one in named if counts[one]]
    if not found:
        frame = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
        found = [one for one, added in (counts - Counter(before)).items() if added > 1 and one not in frame]
    return max(found, key=lambda one: counts[one]) if found else None


def _models_take(class_name: str, argument: str) -> bool:
    """Whether the `forward` of every model that goes with a processor class has this argument."""
    types = [model_type for model_type, name in PROCESSOR_MAPPING_NAMES.items() if name == class_name]
    names = [MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type) for model_type in types]
    models = [getattr(transformers, name, None) for name in names if isinstance(name, str)]
    models = [model for model in models if model is not None and not getattr(model, "is_dummy", False)]
    return bool(models) and all(argument in inspect.signature(model.forward).parameters for model in models)


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
    own = own_arguments(processor_class(class_name))
    arguments = _arguments_of_model(config, own) | {name: fields[name] for name in own if name in fields}
    tokenizer = AutoTokenizer.from_pretrained(path)
    template = fields.get("chat_template") or tokenizer.chat_template
    return _load_image_processor(path), tokenizer, class_name, arguments, template


def _arguments_of_model(config: PretrainedConfig, own: dict[str, inspect.Parameter]) -> dict[str, Any]:
    """What a processor leaves open and its model says: the first LLaVA repositories name none of these."""
    vision = getattr(config, "vision_config", None)
    open_arguments = [name for name, parameter in own.items() if parameter.default is None]
    said = {name: getattr(config, name, getattr(vision, name, None)) for name in open_arguments}
    if "vision_feature_select_strategy" in said and said["vision_feature_select_strategy"] is None:
        said["vision_feature_select_strategy"] = "default"  # models that do not say drop the class token
    if "num_additional_image_tokens" in own and getattr(vision, "model_type", None) == "clip_vision_model":
        said["num_additional_image_tokens"] = 1  # its class token
    return {name: value for name, value in said.items() if value is not None}


def _load_image_processor(path: str) -> Any:
    """A VLM's image processor on its PIL backend; where it has none, on torchvision's.

    Raises:
        ImportError: It exists for torchvision only, which is not installed.
    """
    try:
        return AutoImageProcessor.from_pretrained(path, backend="pil")
    except (ImportError, ValueError) as error:
        if is_torchvision_available() or "torchvision" not in str(error):
            raise
        raise ImportError(
            f"the image processor of {path!r} exists only for torchvision, which is not installed; install "
            "torchvision, or use a VLM of another family."
        ) from error
