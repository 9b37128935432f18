# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Texts with images as a VLM reads them: their tokens counted, and rows refused whose texts it cannot read."""

from __future__ import annotations

from typing import Any

import torch

from ..images_segcompass import to_rgb_image

_SENTINEL = "\u2603"  # stands for the words when a chat template is looked through
_NO_LIMIT = 10**18  # a `model_max_length` beyond it stands for a tokenizer that names none


class TextsWithImages:
    """Texts that hold placeholders of images, and what a VLM's processor makes of them.

    Args:
        processor: A [`SegCompassProcessor`] or a VLM's own processor.
    """

    def __init__(self, processor: Any):
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self._image_markup: str | None = None
        self._image_frame: int | None = None

    @property
    def max_tokens(self) -> int | None:
        """Tokens of a sequence at most, by the tokenizer's `model_max_length`; `None` where it names no limit."""
        limit = getattr(self.tokenizer, "model_max_length", None)
        return None if limit is None or limit > _NO_LIMIT else int(limit)

    def tensors(self, texts: list[str], images: list[list]) -> dict[str, torch.Tensor]:
        """The VLM's inputs for texts and the images of each."""
        kwargs = {"images": images} if any(images) else {}
        kwargs |= self._special_tokens(texts)
        inputs = self.processor(text=texts, return_tensors="pt", padding=True, **kwargs)
        return {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}

    def _special_tokens(self, texts: list[str]) -> dict[str, bool]:
        """A template that writes the token of the beginning must not get a second one."""
        bos = self.tokenizer.bos_token
        return {"add_special_tokens": False} if bos and all(text.startswith(bos) for text in texts) else {}

    def num_tokens(self, text: str, images: list) -> int:
        """Tokens of one text, without processing its images where the family can count their tokens by size."""
        count = getattr(getattr(self.processor, "vlm_processor", self.processor), "_get_num_multimodal_tokens", None)
        if count is None or not images:
            return int(self.tensors([text], [images])["attention_mask"].sum())

        def estimate(text: str, images: list) -> int:
            tokens = count(image_sizes=[(image.height, image.width) for image in images]).num_image_tokens
            ids = self.tokenizer(text, **self._special_tokens([text]))["input_ids"]
            return len(ids) - len(images) + sum(tokens)

        if self._image_frame is None:  # what the family puts around an image that its template does not show
            alone = self.image_markup, images[:1]
            exact = int(self.tensors([alone[0]], [alone[1]])["attention_mask"].sum())
            self._image_frame = exact - estimate(*alone)
        return estimate(text, images) + self._image_frame * len(images)

    @property
    def image_markup(self) -> str:
        """What the chat template writes for an image: the family's placeholder with what belongs around it."""
        if self._image_markup is None:
            words = {"type": "text", "text": _SENTINEL}
            if getattr(self.processor, "chat_template", None) is None:
                self._image_markup = self.processor.image_token
            else:
                with_image, without = (
                    self.processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
                    for content in ([{"type": "image"}, words], [words])
                )
                end = len(without) - without.index(_SENTINEL)
                before = without[: without.index(_SENTINEL)]
                self._image_markup = with_image[len(before) : len(with_image) - end]
        return self._image_markup


class RowTextCheck:
    """Refuses rows in the row schema whose texts the model cannot read: empty, no text, or too long.

    Args:
        processor ([`SegCompassProcessor`]): Builds prompts and answers; its tokenizer names the longest sequence.
        with_reasoning (`bool`, defaults to `True`): Whether the reference answer stands behind the prompt.
    """

    def __init__(self, processor: Any, with_reasoning: bool = True):
        self.texts, self.with_reasoning = TextsWithImages(processor), with_reasoning

    def __call__(self, row: dict[str, Any]) -> None:
        """Check one row.

        Raises:
            ValueError: With what is wrong.
        """
        text, answer = self._prompt(row), self._answer(row)
        if self.texts.max_tokens is not None:
            self._count(row, text, answer)

    def num_tokens(self, row: dict[str, Any]) -> int:
        """Check one row, and count the tokens of its prompt, image included.

        Raises:
            ValueError: With what is wrong.
        """
        return self._count(row, self._prompt(row), self._answer(row))

    def _prompt(self, row: dict[str, Any]) -> str:
        prompt = row.get("prompt")
        return self.texts.processor.build_prompt(row.get("instruction")) if prompt is None else self._rendered(prompt)

    def _answer(self, row: dict[str, Any]) -> str:
        if not self.with_reasoning:
            return ""
        processor = self.texts.processor
        return processor.build_completion(reasoning_of(row)) + processor.end_of_turn_token

    def _count(self, row: dict[str, Any], text: str, answer: str) -> int:
        """Tokens of a prompt, which with its answer must not be longer than the tokenizer's limit."""
        tokenizer, limit = self.texts.processor.tokenizer, self.texts.max_tokens
        asked = self.texts.num_tokens(text, [to_rgb_image(row["image"])])
        answered = len(tokenizer(answer, add_special_tokens=False)["input_ids"]) if answer else 0
        if limit is not None and asked + answered > limit:
            parts = f"a prompt of {asked} tokens, image included"
            parts += f", and a reference answer of {answered}" if answer else ""
            raise ValueError(
                f"the row makes {parts}, but the tokenizer's model_max_length is {limit}; shorten its text by "
                f"{asked + answered - limit} tokens."
            )
        return asked

    def _rendered(self, prompt: Any) -> str:
        """A conversation of a row's own, its image before the first words as TRL puts it."""
        if not isinstance(prompt, list) or not prompt or not all(_words(message).strip() for message in prompt):
            raise ValueError(f"the prompt is {prompt!r:.80}; expected a conversation whose messages have words.")
        place, messages = [{"type": "image"}], []
        for message in prompt:
            mine = place if message["role"] == "user" else []
            messages.append({"role": message["role"], "content": [*mine, {"type": "text", "text": _words(message)}]})
            place = [] if mine else place
        return self.texts.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def _words(message: Any) -> str:
    """The words of a message of a conversation; empty where it is none."""
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        return " ".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def reasoning_of(row: dict[str, Any]) -> str:
    """A row's reference reasoning; empty where it has none.

    Raises:
        ValueError: It is no text.
    """
    words = row.get("reasoning")
    if words is not None and not isinstance(words, str):
        raise ValueError(f"the reasoning is a {type(words).__name__}; expected a text, or None.")
    return words if words is not None and words.strip() else ""


__all__ = ["RowTextCheck", "TextsWithImages", "reasoning_of"]
