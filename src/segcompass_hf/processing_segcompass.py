# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Image and instruction -> inputs of the VLM and of the segmenter; the model's maps -> masks at the image's size."""

import copy
import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
from transformers import AddedToken, BatchFeature, ProcessorMixin

from .images_segcompass import check_masks, fit_objects_to_slots, to_rgb_image
from .postprocessing_segcompass import REF_TOKEN, THINK_END, THINK_START, PostProcessingMixin
from .prompts_segcompass import (
    COMPLETION_TEMPLATE,
    INSTRUCTION_TEMPLATE,
    MINIMAL_CHAT_TEMPLATE,
    PromptsMixin,
    checked_text,
)
from .segmenters_segcompass import Geometry, geometry_of, to_sam_image_processor
from .trained_words_segcompass import TrainedWordsMixin
from .vlm_calls_segcompass import VlmCallsMixin
from .vlm_processors_segcompass import is_own_folder, load_vlm_parts, on_pil_backend, own_arguments

_BUILT = ("_vlm_processor", "_control", "_handling", "_coverage", "_grids")  # attributes that are built from the rest


class SegCompassProcessor(VlmCallsMixin, PromptsMixin, TrainedWordsMixin, PostProcessingMixin, ProcessorMixin):
    r"""Prepares SegCompass's inputs and reads its outputs.

    The VLM's own inputs come from the VLM family's own processor class, built here around the same image processor and
    tokenizer (without parts for videos or audio: a video processor would need torchvision). The segmenter's come from
    one of transformers' image processors on PIL.

    Args:
        image_processor (`BaseImageProcessor`): The VLM's image processor.
        tokenizer (`PreTrainedTokenizerBase`):
            The VLM's tokenizer; `<REF_POS>`, `<think>`, `</think>` are added where missing, not as special tokens, so
            that decoding with `skip_special_tokens` keeps them.
        sam_image_processor (`BaseImageProcessor`):
            The segmenter's image processor: `size` is the canvas, `mask_size` the low-resolution maps (4 x the image
            embedding). With `"longest_edge"` images are padded to the square, with `"height"` and `"width"` stretched.
        num_slots (`int`, *optional*, defaults to 4): Slots of the model, and `<REF_POS>` tokens of a completion.
        vlm_processor_class (`str`, *optional*, defaults to `"LlavaProcessor"`): The family's class in transformers.
        vlm_processor_kwargs (`dict`, *optional*): What that class takes besides image processor and tokenizer.
        instruction_template (`str`, *optional*): User turn after the image; holds `{instruction}`, may hold
            `{num_slots}`.
        completion_template (`str`, *optional*): The reference answer; holds `{reasoning}` and `{references}`.
        chat_template (`str`, *optional*): Jinja template; the tokenizer's own, or a minimal one, where not given.
        think_tags (`str`, *optional*, defaults to `"tokens"`): `"text"` leaves `<think>` and `</think>` to be spelled
            with the tokens there are, as the original code does; answers are then written freely.
        image_token_grids (`bool`, *optional*, defaults to `False`): Say with every image where its tokens lie in it,
            which models with `heatmap_concepts` need. Measured of the family's processor for every new size of image.
        trained_words (`list[str]`, *optional*): Words that the model was trained on, see `add_trained_words`.
    """

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        sam_image_processor: Any,
        num_slots: int = 4,
        vlm_processor_class: str = "LlavaProcessor",
        vlm_processor_kwargs: dict | None = None,
        instruction_template: str = INSTRUCTION_TEMPLATE,
        completion_template: str = COMPLETION_TEMPLATE,
        chat_template: str | None = None,
        think_tags: Literal["tokens", "text"] = "tokens",
        image_token_grids: bool = False,
        trained_words: list[str] | None = None,
    ):
        if type(num_slots) is not int or num_slots < 1:  # True is an int too
            raise ValueError(f"num_slots is {num_slots!r}; expected a positive integer.")
        if think_tags not in ("tokens", "text"):
            raise ValueError(f"think_tags is {think_tags!r}; expected 'tokens' or 'text'.")
        templates = {"instruction_template": instruction_template, "completion_template": completion_template}
        for name, template in templates.items():
            if not isinstance(template, str):
                raise ValueError(f"{name} is {template!r}; expected a text.")
        if "{instruction}" not in instruction_template:
            raise ValueError(f"instruction_template {instruction_template!r} has no {{instruction}} to be filled in.")
        if "{reasoning}" not in completion_template or "{references}" not in completion_template:
            raise ValueError(
                f"completion_template {completion_template!r} must hold {{reasoning}} and {{references}}."
            )
        if trained_words is not None and not all(isinstance(word, str) for word in trained_words):
            raise ValueError(f"trained_words is {trained_words!r:.80}; expected a list of words.")
        image_processor = on_pil_backend(image_processor)
        sam_image_processor = to_sam_image_processor(sam_image_processor)
        known = tokenizer.get_vocab()
        needed = (REF_TOKEN, THINK_START, THINK_END) if think_tags == "tokens" else (REF_TOKEN,)
        missing = [token for token in needed if token not in known]
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in missing])
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"  # prompts end together, where generation starts

        self.num_slots, self.think_tags, self.image_token_grids = num_slots, think_tags, image_token_grids
        self.vlm_processor_class = vlm_processor_class
        self.vlm_processor_kwargs = dict(vlm_processor_kwargs or {})
        self.instruction_template = instruction_template
        self.completion_template = completion_template
        self.trained_words = trained_words
        self._vlm_processor = self._control = self._handling = self._coverage = self._grids = None
        chat_template = chat_template or getattr(tokenizer, "chat_template", None)
        super().__init__(image_processor, tokenizer, sam_image_processor, chat_template=chat_template)
        image_token = self.image_token  # builds the family's processor, so that a wrong class or argument shows here
        if self.chat_template is None:
            self.chat_template = MINIMAL_CHAT_TEMPLATE.replace("IMAGE_TOKEN", image_token or "")
            self._vlm_processor = None  # it was built without the template

    @classmethod
    def from_parts(
        cls, vlm_processor: Any, sam_processor: Any = 1024, num_slots: int = 4, **kwargs: Any
    ) -> "SegCompassProcessor":
        """Put a processor together from a VLM's and a segmenter's.

        Args:
            vlm_processor (`ProcessorMixin`, `str` or `os.PathLike`):
                A VLM's processor, or the id or folder of one (also where `AutoProcessor` wants a video processor). Of
                a `SegCompassProcessor` its VLM's, and the templates.
            sam_processor (`ProcessorMixin`, `BaseImageProcessor`, `PretrainedConfig`, `str`, `os.PathLike` or `int`):
                A segmenter's processor, configuration, id or folder, or the side of SAM's canvas in pixels (patches of
                16).
            num_slots (`int`, *optional*, defaults to 4): Slots of the model.
            kwargs: Further arguments of the constructor.
        """
        own = {}
        if isinstance(vlm_processor, (str, os.PathLike)) and is_own_folder(vlm_processor):
            vlm_processor = cls.from_pretrained(vlm_processor)
        if hasattr(vlm_processor, "vlm_processor_class"):  # one of ours, as the warm-up saves with a VLM
            ours = ("instruction_template", "completion_template", "image_token_grids", "trained_words")
            own = {name: getattr(vlm_processor, name) for name in ours}
            vlm_processor = vlm_processor.vlm_processor
        if isinstance(vlm_processor, (str, os.PathLike)):
            image_processor, tokenizer, class_name, class_kwargs, template = load_vlm_parts(str(vlm_processor))
        else:
            image_processor, tokenizer = vlm_processor.image_processor, vlm_processor.tokenizer
            class_name, template = type(vlm_processor).__name__, vlm_processor.chat_template
            names = own_arguments(type(vlm_processor))
            class_kwargs = {name: getattr(vlm_processor, name) for name in names if hasattr(vlm_processor, name)}
        fields = {"vlm_processor_class": class_name, "vlm_processor_kwargs": class_kwargs, "chat_template": template}
        sam_image_processor = to_sam_image_processor(sam_processor)
        return cls(image_processor, tokenizer, sam_image_processor, num_slots, **(fields | own | kwargs))

    @property
    def geometry(self) -> Geometry:
        """How images lie on the segmenter's canvas."""
        return geometry_of(self.sam_image_processor)

    @property
    def canvas_size(self) -> int:
        """Side of the segmenter's input in pixels."""
        return self.geometry.canvas

    @property
    def mask_size(self) -> int:
        """Side of the low-resolution maps in cells."""
        return self.geometry.map_size

    @property
    def model_input_names(self) -> list[str]:
        grids = ["image_token_grids"] if self.image_token_grids else []
        own = ["sam_pixel_values", "original_sizes", "reshaped_input_sizes", *grids]
        return [*self.vlm_processor.model_input_names, *own]

    # Inputs

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        instruction: str | list[str] | None = None,
        reasoning: str | list[str] | None = None,
        masks: Any = None,
        overflow: Literal["error", "merge", "drop"] = "error",
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Inputs for the model: one sample per image and instruction.

        Args:
            images: One image or a list of them, of any size (see `to_rgb_image`). One image serves all instructions.
            text (`str` or `list[str]`, *optional*):
                Rendered prompts in place of instructions: returns the VLM's own inputs only, by the family's processor
                and with its arguments (TRL calls this).
            instruction (`str` or `list[str]`, *optional*): What to look for. One instruction serves all images.
            reasoning (`str` or `list[str]`, *optional*): Appends the reference answer: think block, `<REF_POS>`
            tokens, end.
            masks (list of `(n, H, W)` bool arrays, *optional*):
                The target objects of each image, at its size after EXIF rotation; for one image also its array alone.
            overflow (`"error"`, `"merge"` or `"drop"`, *optional*, defaults to `"error"`):
                What happens to more objects than slots, see `fit_objects_to_slots`.
            return_tensors (`str`, *optional*): `"pt"`, also where not given with instructions.

        Returns:
            `BatchFeature` with `input_ids`, `attention_mask` `(B, T)`: prompts padded on the left, answers on the
            right; `pixel_values` and the family's own keys (token types and the like of the prompt alone, the model
            lets them grow over an answer); `sam_pixel_values` `(B, 3, canvas, canvas)`;
            `original_sizes`, `reshaped_input_sizes` `(B, 2)` as (height, width); where switched on
            `image_token_grids` `(B, 6)`, a [`TokenGrid`] each; with `reasoning` `completion_mask`
            and `labels` `(B, T)`, -100 outside the answer; with `masks` `mask_labels` `(B, num_slots, h, w)` in [0, 1]
            and `num_objects` `(B,)`.

        Raises:
            `ValueError`: an input is empty, unreadable, too long, or does not fit the others; the message says which.
            `FileNotFoundError`: an image file is missing.
        """
        if (text is None) == (instruction is None):
            raise ValueError(
                "pass either `instruction` (SegCompass's inputs) or `text` (the VLM's own), not both or neither."
            )
        if text is not None:
            if reasoning is not None or masks is not None:
                raise ValueError(
                    "`reasoning` and `masks` go with `instruction`; with `text` only the VLM's inputs are made."
                )
            return self._vlm_inputs(images, text, return_tensors=return_tensors, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        if kwargs:
            raise ValueError(
                f"{sorted(kwargs)} are not known; `images`, `instruction`, `reasoning`, `masks`, `overflow` are."
            )
        if return_tensors not in (None, "pt"):
            raise ValueError(f'return_tensors={return_tensors!r} is not supported; expected "pt".')

        images, instructions, reasonings = _align(images, instruction, reasoning)
        name = "image {}" if len(images) > 1 else "image"
        images = [to_rgb_image(image, name.format(index)) for index, image in enumerate(images)]
        messages = []
        for index, words in enumerate(instructions):
            messages.append(self.build_messages(checked_text(words, f"instruction {index}")))
        prompts = [self._render(message, add_generation_prompt=True) for message in messages]
        data = dict(
            self._vlm_inputs([[i] for i in images], prompts, return_tensors="pt", padding=True, padding_side="left")
        )
        if reasonings is not None:
            data |= self._append_completions(data, reasonings)
        self._check_length(data["attention_mask"])
        data |= self._sam_inputs(images)
        if masks is not None:
            data |= self._mask_targets(masks, images, overflow)
        return BatchFeature(data)

    def _check_length(self, attention_mask: torch.Tensor) -> None:
        limit = self.tokenizer.model_max_length
        for index, length in enumerate(attention_mask.sum(1).tolist()):
            if length > limit:
                raise ValueError(
                    f"instruction {index} makes a sequence of {length} tokens, image included, but the tokenizer's "
                    f"model_max_length is {limit}; shorten it by {length - limit} tokens."
                )

    def _places(self, images: list) -> dict[str, torch.Tensor]:
        """Sizes of images and, where switched on, where their tokens lie in them."""
        sizes = [(image.height, image.width) for image in images]
        resized = [self.geometry.resized_size(size) for size in sizes]
        places = {"original_sizes": torch.tensor(sizes), "reshaped_input_sizes": torch.tensor(resized)}
        if self.image_token_grids:
            places["image_token_grids"] = torch.tensor([self.token_grid(*size).as_row() for size in sizes])
        return places

    def _sam_inputs(self, images: list) -> dict:
        places = self._places(images)
        resized = [tuple(size) for size in places["reshaped_input_sizes"].tolist()]
        # SAM's processor rounds the short side of a very thin image to nothing: those are resized here, to one pixel
        thin = [1 in size for size in resized]
        images = [
            image.resize(size[::-1]) if flag else image
            for image, size, flag in zip(images, resized, thin, strict=True)
        ]
        pixels = self.sam_image_processor(images, return_tensors="pt")["pixel_values"]
        return {"sam_pixel_values": pixels, **places}

    def _mask_targets(self, masks: Any, images: list, overflow: Literal["error", "merge", "drop"]) -> dict:
        if len(images) == 1 and (_depth(masks) in (2, 3) or len(masks) == 0):
            masks = [masks]  # one image's objects, not in a list of one
        if len(masks) != len(images):
            raise ValueError(
                f"got masks for {len(masks)} images and {len(images)} images; pass one array of masks per image."
            )
        labels = torch.zeros(len(images), self.num_slots, self.mask_size, self.mask_size)
        counts = torch.zeros(len(images), dtype=torch.long)
        for index, (objects, image) in enumerate(zip(masks, images, strict=True)):
            objects = check_masks(objects, (image.height, image.width), f"masks of sample {index}")
            objects = fit_objects_to_slots(objects, self.num_slots, overflow, f"sample {index}")
            counts[index] = len(objects)
            labels[index, : len(objects)] = self.geometry.soft_mask_targets(objects)
        return {"mask_labels": labels, "num_objects": counts}

    # Saving and copying leave out what is built from the rest

    def to_dict(self) -> dict[str, Any]:
        bare = copy.copy(self)
        for name in _BUILT:
            bare.__dict__.pop(name, None)
        output = super(SegCompassProcessor, bare).to_dict()
        # by this name it loads without torchvision and without the warning that the base name gives
        output["sam_image_processor"]["image_processor_type"] = type(self.sam_image_processor).__name__
        if self.trained_words is None:
            output.pop("trained_words", None)
        for part in ("image_processor", "sam_image_processor"):
            output[part].pop("auto_map", None)  # saving as remote code notes ours in every part
        return output

    def __getstate__(self) -> dict:
        return self.__dict__ | dict.fromkeys(_BUILT)


def _depth(value: Any) -> int:
    """Number of axes of an array or nested list; -1 where there is nothing inside."""
    if hasattr(value, "ndim"):
        return value.ndim
    if isinstance(value, (list, tuple)):
        inner = _depth(value[0]) if len(value) else -1
        return inner + 1 if inner >= 0 else -1
    return -1 if value is None else 0


def _align(images: Any, instruction: Any, reasoning: Any) -> tuple[list, list, list | None]:
    """One image, instruction and reasoning per sample; a single one of them serves all."""
    if images is None:
        raise ValueError("`images` is missing; SegCompass segments an image.")
    stacked = getattr(images, "ndim", 0) == 4
    images = list(images) if stacked or _is_column(images) else images
    if isinstance(images, list) and any(isinstance(image, (list, tuple)) for image in images):
        if any(not isinstance(image, (list, tuple)) or len(image) != 1 for image in images):
            raise ValueError(
                "`images` is nested with other than one image per sample; SegCompass takes one image each."
            )
        images = [image[0] for image in images]
    columns = {"images": images, "instruction": instruction, "reasoning": reasoning}
    columns = {name: list(v) if _is_column(v) else v for name, v in columns.items() if v is not None}
    lengths = {name: len(value) for name, value in columns.items() if isinstance(value, list)}
    if any(length == 0 for length in lengths.values()) or len(set(lengths.values())) > 1:
        raise ValueError(f"the lengths differ or are 0: {lengths}; pass one image and one instruction per sample.")
    count = next(iter(lengths.values()), 1)
    columns = {name: value if isinstance(value, list) else [value] * count for name, value in columns.items()}
    return columns["images"], columns["instruction"], columns.get("reasoning")


def _is_column(value: Any) -> bool:
    """Whether it holds one value per sample: a list, a tuple, a column of a `datasets.Dataset`."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


SegCompassProcessor.register_for_auto_class("AutoProcessor")
