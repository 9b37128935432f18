# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Calls of the VLM family's own processor: built around our parts, measured once, and asked for the VLM's inputs."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from .images_segcompass import to_rgb_image
from .threads_segcompass import tokenizer_lock
from .token_grids_segcompass import TRIAL_SIZE, TokenGrid, UnknownPlacesError, measure_token_grid
from .vlm_processors_segcompass import (
    ImageHandling,
    build_vlm_processor,
    heard_texts,
    measure_image_handling,
    shift_behind_padding,
)

KEPT_GRIDS = 4096  # sizes of images whose token grids are remembered


class VlmCallsMixin:
    """The VLM's side of [`SegCompassProcessor`]; needs of its heir the parts, the family's class with its arguments,
    and a prompt with one image."""

    image_processor: Any
    tokenizer: PreTrainedTokenizerBase
    vlm_processor_class: str
    vlm_processor_kwargs: dict[str, Any]
    _vlm_processor: ProcessorMixin | None
    _handling: ImageHandling | None
    _grids: dict[tuple[int, int], TokenGrid] | None
    _picture_prompt: Callable[[], str]

    @property
    def vlm_processor(self) -> ProcessorMixin:
        """The family's own processor around our image processor and tokenizer; rebuilt when either is replaced."""
        inner = self._vlm_processor
        if inner is None or inner.tokenizer is not self.tokenizer or inner.image_processor is not self.image_processor:
            template, arguments = getattr(self, "chat_template", None), self.vlm_processor_kwargs
            inner = build_vlm_processor(
                self.vlm_processor_class, self.image_processor, self.tokenizer, template, arguments
            )
            self._vlm_processor, self._handling, self._grids = inner, None, None
        return inner

    @property
    def image_handling(self) -> ImageHandling:
        """How the family's processor wants images, and what stands for them in the ids; found out at first use."""
        inner = self.vlm_processor
        if self._handling is None:
            prompt = self._picture_prompt()
            with tokenizer_lock:
                self._handling = measure_image_handling(
                    inner, self.vlm_processor_class, prompt, **self._special_tokens([prompt])
                )
        return self._handling

    @property
    def image_token(self) -> str | None:
        """The VLM's image placeholder in texts; `None` where the family has none."""
        token = getattr(self.vlm_processor, "image_token", None) or getattr(self.tokenizer, "image_token", None)
        return getattr(token, "content", token)

    @property
    def image_token_id(self) -> int | None:
        """Id that stands for image patches in `input_ids`, as measured: families may write another token in the text.
        `None` where the ids hold nothing for an image."""
        return self.image_handling.token_id

    def picture_inputs(self, picture: Any, **image_options) -> BatchFeature:
        """The VLM's inputs for one picture in a short prompt, as the family's processor makes them of any image.

        Args:
            picture: See `to_rgb_image`.
            image_options: For the family's image processor.
        """
        return self._vlm_inputs([[picture]], [self._picture_prompt()], return_tensors="pt", **image_options)

    def token_grid(self, height: int, width: int) -> TokenGrid:
        """Where the image tokens of an image of `height` x `width` pixels lie in it; measured once per size.

        Raises:
            UnknownPlacesError: The family cuts images into tokens in a way that is not known here.
        """
        _ = self.vlm_processor  # forgets what was measured of another
        grids = self._grids = {} if self._grids is None or len(self._grids) >= KEPT_GRIDS else self._grids
        if (height, width) not in grids:
            try:
                ids = self.picture_inputs(Image.new("RGB", (width, height)))["input_ids"].tolist()[0]
                grids[height, width] = measure_token_grid(self, height, width, ids.count(self.image_token_id))
            except UnknownPlacesError as error:
                raise UnknownPlacesError(
                    f"{error} heatmap_concepts needs these places; compose the model without (heatmap_concepts=False)."
                ) from error
        return grids[height, width]

    def use_image_token_grids(self, use: bool) -> None:
        """Set `image_token_grids`, tried on one picture.

        Raises:
            UnknownPlacesError: As `token_grid`.
        """
        if use:
            self.token_grid(*TRIAL_SIZE)
        self.image_token_grids = use

    def text_for_tokenizer(self, prompt: str) -> tuple[str, bool]:
        """What the family's processor makes of a rendered prompt with one image before it is tokenized.

        Families write into it what they need: a token per patch, line ends, separators, a second `<s>`.

        Returns:
            `tuple[str, bool]`: the text, with the patches of a small picture, and whether the tokenizer adds special
            tokens to it. The prompt itself where the family does not pass its tokenizer a text.
        """
        options = self._special_tokens([prompt])
        with tokenizer_lock:
            heard = heard_texts(self.vlm_processor, prompt, nested=self.image_handling.nested, **options)
        written = (prompt, options.get("add_special_tokens", True))
        return max(heard, key=lambda text: len(text[0]), default=written)

    def _vlm_inputs(self, images: Any, text: str | list[str], **kwargs) -> BatchFeature:
        """What the family's own processor returns, but for labels."""
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        kwargs = self._special_tokens([text] if isinstance(text, str) else text) | kwargs
        images = _map_images(images)
        if images is not None:
            if not self.image_handling.nested:
                images = _flat(images)
            if self.image_handling.asks_types:
                kwargs.setdefault("return_mm_token_type_ids", True)
        with tokenizer_lock:
            inputs = self.vlm_processor(images=images, text=text, **kwargs)
        inputs.pop("labels", None)  # PaliGemma's mark answers that it was not given
        if images is not None and torch.is_tensor(inputs.get("attention_mask")):
            shift_behind_padding(inputs, self.image_handling.padding_ignored)
        return inputs

    def _special_tokens(self, texts: list[str]) -> dict[str, bool]:
        """A template that writes `<s>` itself must not get a second one."""
        bos = self.tokenizer.bos_token
        has_bos = bos and all(isinstance(words, str) and words.startswith(bos) for words in texts)
        return {"add_special_tokens": False} if has_bos else {}


def _map_images(images: Any) -> Any:
    """`to_rgb_image` on every image of a nested list."""
    if images is None:
        return None
    if isinstance(images, (list, tuple)):
        return [_map_images(image) for image in images]
    return to_rgb_image(images)


def _flat(images: Any) -> Any:
    """One list of all images of a nested one."""
    if not isinstance(images, list) or not any(isinstance(image, list) for image in images):
        return images
    return [one for image in images for one in (image if isinstance(image, list) else [image])]


__all__ = ["VlmCallsMixin"]
