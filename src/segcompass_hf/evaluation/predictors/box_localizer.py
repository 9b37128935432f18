# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""A VLM that writes boxes as JSON, and SAM that segments them: the two-stage way, with any VLM of transformers."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from PIL import Image

from ...data.vlm_texts import TextsWithImages
from ...files import weights_digest
from ...vlm_processors_segcompass import build_vlm_processor, load_vlm_parts
from ..prediction import Prediction
from .box_answers import parse_answer
from .model import _digest_of_configs, _digest_of_processor
from .sam_prompts import PromptedSam, SamPrompt

PROMPT_TEMPLATE = (
    "Find what this asks for in the image: {instruction}\n"
    "Think first, inside <think> and </think>. Then write, inside <answer> and </answer>, a JSON list with one entry "
    "per object that is meant: its box, a point on it, and its name, in {units}, for instance {example}. Write [] if "
    "nothing in the image is meant."
)
# What the prompt says about each kind of coordinates: its name, then a box and a point on it.
_UNITS = {
    "absolute": ("pixels of the image", "[10, 20, 110, 220]", "[60, 120]"),
    "resized": ("pixels of the image", "[10, 20, 110, 220]", "[60, 120]"),
    "thousand": ("thousandths of the image's width and height", "[100, 200, 350, 600]", "[225, 400]"),
    "unit": ("shares of the image's width and height from 0 to 1", "[0.1, 0.2, 0.35, 0.6]", "[0.22, 0.4]"),
}


class BoxLocalizerPredictor:
    """Asks a VLM for boxes and points as JSON, and SAM for one mask per entry of its answer.

    Args:
        vlm (`PreTrainedModel`): Any `AutoModelForImageTextToText`; is left in the mode (training or not) it is in.
        vlm_processor (`ProcessorMixin`): Its processor, with a chat template.
        sam (`PreTrainedModel`), sam_processor: See `SamBoxCentrePredictor`.
        coordinates (`str`, *optional*, defaults to `"absolute"`): What the numbers of an answer are. It is a habit of
            the VLM, learned in its training:

            - `"absolute"`: pixels of the image (after `image_size`).
            - `"resized"`: pixels of the image as the VLM's processor resized it: Qwen2.5-VL and what is trained from
              it. Read from `image_grid_thw` where the processor gives it, else from `pixel_values`.
            - `"thousand"`: 0 to 1000 along both sides: Qwen2-VL, Qwen3-VL, InternVL.
            - `"unit"`: 0 to 1 along both sides: LLaVA.
        image_size (`tuple[int, int]`, *optional*): (height, width) to which the VLM's image is resized before its
            processor sees it, as some models of this kind were trained. SAM always gets the image itself.
        prompt_template (`str`, *optional*): The user turn after the image. Holds `{instruction}`, and may hold
            `{units}` and `{example}`, which follow `coordinates`.
        max_new_tokens (`int`, *optional*, defaults to 1024): Limit of an answer.
        name (`str`, *optional*, defaults to `"box-localizer"`): What reports call it.
        generate_kwargs: For `vlm.generate`.

    Attributes:
        num_malformed (`int`): Answers of this process that could not be understood, or whose boxes and points all lie
            outside the image; they are empty predictions. In records, `is_malformed(text)` tells the first kind.
    """

    def __init__(
        self,
        vlm: Any,
        vlm_processor: Any,
        sam: Any,
        sam_processor: Any,
        coordinates: Literal["absolute", "resized", "thousand", "unit"] = "absolute",
        image_size: tuple[int, int] | None = None,
        prompt_template: str = PROMPT_TEMPLATE,
        max_new_tokens: int = 1024,
        name: str = "box-localizer",
        **generate_kwargs: Any,
    ):
        if coordinates not in _UNITS:
            raise ValueError(f"coordinates is {coordinates!r}; it must be one of {list(_UNITS)}.")
        if "{instruction}" not in prompt_template:
            raise ValueError(f"prompt_template {prompt_template!r:.80} has no {{instruction}} to be filled in.")
        if generate_kwargs.get("do_sample"):
            raise ValueError("evaluation decodes greedily: what is sampled cannot be repeated; leave do_sample out.")
        # of a SegCompassProcessor the VLM's own
        self.processor = getattr(vlm_processor, "vlm_processor", vlm_processor)
        if not getattr(self.processor, "chat_template", None):
            raise ValueError("the VLM's processor has no chat template; set processor.chat_template.")
        self._texts = TextsWithImages(self.processor)
        self.vlm, self.coordinates, self.image_size, self.name = vlm, coordinates, image_size, name
        self.generate_kwargs = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1} | generate_kwargs
        self.num_malformed, self._sam = 0, PromptedSam(sam, sam_processor)
        units, box, point = _UNITS[coordinates]
        example = f'[{{"bbox_2d": {box}, "point_2d": {point}, "label": "dog"}}]'
        self.prompt = prompt_template.replace("{units}", units).replace("{example}", example)
        if self.processor.tokenizer.pad_token is None:
            self.processor.tokenizer.pad_token = self.processor.tokenizer.eos_token

    @classmethod
    def from_pretrained(
        cls, vlm: str | os.PathLike, sam: str | os.PathLike, device: str | torch.device = "cpu", **kwargs: Any
    ) -> BoxLocalizerPredictor:
        """From the ids or folders of a VLM and a SAM; `kwargs` are those of the constructor."""
        from transformers import AutoModelForImageTextToText

        from ...loading_segcompass import load_part, load_segmenter

        image_processor, tokenizer, class_name, arguments, template = load_vlm_parts(os.fspath(vlm))
        processor = build_vlm_processor(class_name, image_processor, tokenizer, template, arguments)
        model = load_part(AutoModelForImageTextToText, vlm).to(device)
        return cls(model, processor, load_segmenter(sam, dtype="float32").to(device), os.fspath(sam), **kwargs)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the answers; of weights, configurations and the processor a digest."""
        return {
            "vlm_weights": weights_digest(self.vlm),
            "vlm_configuration": _digest_of_configs(self.vlm.config, self.vlm.generation_config),
            "vlm_processor": _digest_of_processor(self.processor, self.processor.image_processor),
            "dtype": str(self.vlm.dtype).removeprefix("torch."),
            "device": self.vlm.device.type,
            "prompt": self.prompt,
            "coordinates": self.coordinates,
            "image_size": self.image_size,
            **self.generate_kwargs,
            **self._sam.settings,
        }

    def check_row(self, row: dict[str, Any]) -> None:
        """Refuse, with a `ValueError`, a row whose instruction is missing, empty or too long for the VLM."""
        words, limit = row.get("instruction"), self._texts.max_tokens
        if not isinstance(words, str) or not words.strip():
            raise ValueError(f"the instruction is {words!r}; say what to look for in the image.")
        if limit is not None and (length := self._texts.num_tokens(self._text(words), [self._shown(row)])) > limit:
            raise ValueError(
                f"the prompt has {length} tokens, the tokenizer's model_max_length is {limit}; shorten it."
            )

    @torch.no_grad()
    def predict(self, rows: Sequence[dict[str, Any]]) -> list[Prediction]:
        """Segment a batch of rows.

        Args:
            rows (`Sequence[dict]`): In the row schema; `image` and `instruction` are read.

        Returns:
            `list[Prediction]`: one mask per entry of the answer, at the images' own sizes, with SAM's estimate of its
            IoU; `text` is the answer, `reasoning` what stands inside its think tags.
        """
        images = [row["image"] for row in rows]
        shown = [self._shown(row) for row in rows]
        inputs = self._inputs(shown, [row["instruction"] for row in rows])
        answers = self._answers(inputs)
        seen = self._sizes_seen(inputs, shown)
        prompts = [self._prompts(*columns) for columns in zip(answers, images, seen, strict=True)]
        results = self._sam.segment(images, prompts)
        return [
            Prediction(masks, scores, _reasoning(answer), answer)
            for answer, (masks, scores) in zip(answers, results, strict=True)
        ]

    def _shown(self, row: dict[str, Any]) -> Image.Image:
        return row["image"].resize(self.image_size[::-1]) if self.image_size else row["image"]

    def _text(self, words: str) -> str:
        text = self.prompt.replace("{instruction}", self._inert(words.strip()))
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        return self.processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)

    def _inputs(self, images: list[Image.Image], instructions: list[str]) -> dict[str, Any]:
        texts = [self._text(words) for words in instructions]
        bos, kwargs = self.processor.tokenizer.bos_token, {}
        if bos and texts[0].startswith(bos):  # the template wrote it; a second one must not be added
            kwargs["add_special_tokens"] = False
        inputs = self.processor(
            images=[[image] for image in images],
            text=texts,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            **kwargs,
        )
        moved = {}
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor):
                value = value.to(self.vlm.device, self.vlm.dtype if value.is_floating_point() else None)
            moved[name] = value
        return moved

    def _inert(self, words: str) -> str:
        """Control tokens in somebody's words get a space after their first character."""
        tokenizer = self.processor.tokenizer
        added = [token.content for token in tokenizer.added_tokens_decoder.values()]
        tokens = {token for token in [*added, *tokenizer.all_special_tokens] if len(token.strip()) > 1}
        if not tokens:
            return words
        pattern = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
        return re.sub(pattern, lambda match: f"{match[0][0]} {match[0][1:]}", words)

    def _answers(self, inputs: dict[str, Any]) -> list[str]:
        sequences = self.vlm.generate(**inputs, **self.generate_kwargs)
        new = sequences[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def _prompts(self, answer: str, image: Image.Image, seen: tuple[float, float]) -> list[SamPrompt]:
        locations = parse_answer(answer)
        scale, size = (image.width / seen[1], image.height / seen[0]), (image.height, image.width)
        inside = [location.to_prompt(scale, size) for location in locations or ()]
        prompts = [prompt for prompt in inside if prompt is not None]
        self.num_malformed += locations is None or (bool(locations) and not prompts)
        return prompts

    def _sizes_seen(self, inputs: dict[str, Any], images: list[Image.Image]) -> list[tuple[float, float]]:
        """(height, width) of each image in the units of the answers."""
        fixed = {"thousand": (1000.0, 1000.0), "unit": (1.0, 1.0)}.get(self.coordinates)
        if fixed:
            return [fixed] * len(images)
        if self.coordinates == "absolute":
            return [(image.height, image.width) for image in images]
        image_processor = self.processor.image_processor
        if "image_grid_thw" in inputs:  # in patches
            side = image_processor.patch_size
            return [(height * side, width * side) for _, height, width in inputs["image_grid_thw"].tolist()]
        pixels = inputs["pixel_values"]
        altered = [name for name in ("do_center_crop", "do_pad") if getattr(image_processor, name, None)]
        if altered or pixels.ndim != 4 or len(pixels) != len(images):
            raise ValueError(
                f'coordinates="resized" cannot be traced back: {type(image_processor).__name__} does more than resize '
                f"the image ({altered or f'pixel_values are {tuple(pixels.shape)} for {len(images)} images'}). Choose "
                "the coordinates that the model was trained with."
            )
        return [tuple(pixels.shape[-2:])] * len(images)


def is_malformed(text: str | None) -> bool:
    """Whether an answer, as the records of a run hold it, could not be understood."""
    return parse_answer(text or "") is None


def _reasoning(answer: str) -> str | None:
    """What stands inside the think tags, or before the closing one where a template already opened it."""
    before, tag, _ = answer.partition("</think>")
    return before.rpartition("<think>")[2].strip() if tag else None
