# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Interpretation of concepts by a vision-language model that the user names: from their strongest examples to a line.

Off unless called. A line is what that model says, not a measurement; `detection_score` asks the same model whether
other examples fit it, and so tells lines that tell something from those that do not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any

import torch
from PIL import Image, ImageDraw

from ...image_files_segcompass import read_image
from ...loading_segcompass import load_part
from ...vlm_processors_segcompass import build_vlm_processor, load_vlm_parts
from .dictionary import ConceptDictionary
from .entries import ConceptEntry, PatchExample, WordExample

NUM_EXAMPLES = 6  # shown of words and of patches
MAX_PICTURES = 3
MAX_NEW_TOKENS = 40
FRAME = (255, 0, 255)  # colour of the rectangle around a patch; width in pixels
FRAME_WIDTH = 2
PROMPT = (
    "A feature of a neural network fires on words (between << and >>) and on places of pictures (framed in magenta). "
    "Say in at most eight words what they have in common. Answer with these words only.\n{words}{pictures}"
)
QUESTION = (
    "A feature of a neural network is said to fire on: {line}\nDoes it fire here? {example}\n"
    "Answer with yes or no only."
)


class Interpreter:
    """An instruction-tuned VLM that looks at examples.

    Args:
        model: Any `AutoModelForImageTextToText`, instruction-tuned; frozen, and used as it is.
        processor: Its processor, with a chat template.
        max_new_tokens (`int`, defaults to 40): Length of an answer.
    """

    def __init__(self, model: Any, processor: Any, max_new_tokens: int = MAX_NEW_TOKENS):
        if not getattr(processor, "chat_template", None):
            raise ValueError(
                f"{type(processor).__name__} has no chat template, so nothing can be asked; name an instruction-tuned "
                "VLM."
            )
        self.model, self.processor, self.max_new_tokens = model.eval(), processor, max_new_tokens

    @classmethod
    def from_pretrained(
        cls, path_or_hub_id: str | os.PathLike, device: str | torch.device = "cpu", **kwargs: Any
    ) -> Interpreter:
        """Load a VLM; `kwargs` are those of `load_part`."""
        from transformers import AutoModelForImageTextToText

        image_processor, tokenizer, class_name, arguments, template = load_vlm_parts(os.fspath(path_or_hub_id))
        processor = build_vlm_processor(class_name, image_processor, tokenizer, template, arguments)
        return cls(load_part(AutoModelForImageTextToText, path_or_hub_id, **kwargs).to(device), processor)

    @torch.no_grad()
    def ask(self, text: str, pictures: Iterable[Image.Image] = ()) -> str:
        """The model's answer, greedy, in one line."""
        pictures = list(pictures)
        content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": self._inert(text)}]
        prompt = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        shown = {"images": [pictures]} if pictures else {}
        inputs = self.processor(text=[prompt], return_tensors="pt", **shown).to(self.model.device)
        written = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        answer = written[0, inputs["input_ids"].shape[1] :]
        return " ".join(self.processor.tokenizer.decode(answer, skip_special_tokens=True).split())

    def line(self, dictionary: ConceptDictionary, entry: ConceptEntry) -> str:
        """What the examples of a feature have in common."""
        words = "".join(f"\n- {_in_context(example)}" for example in entry.top_words[:NUM_EXAMPLES])
        pictures = _pictures(dictionary, entry.top_patches[:NUM_EXAMPLES])
        shown = f"\nAnd on the framed places of {len(pictures)} pictures." if pictures else ""
        return self.ask(PROMPT.format(words=words, pictures=shown), pictures)

    def fits(self, line: str, example: WordExample) -> bool:
        """Whether the model thinks that a feature of this line fires on a word."""
        answer = self.ask(QUESTION.format(line=line, example=_in_context(example)))
        return bool(re.match(r"\W*yes\b", answer, re.IGNORECASE))

    def _inert(self, text: str) -> str:
        """Control tokens in the words of a data set get a space after their first character."""
        tokenizer = self.processor.tokenizer
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if len(token.content.strip()) > 1}
        for token in sorted(added, key=len, reverse=True):
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text


def interpret(
    dictionary: ConceptDictionary, interpreter: Interpreter, features: Iterable[int] | None = None
) -> ConceptDictionary:
    """The same dictionary with the interpreter's line on each of some features.

    Args:
        dictionary ([`ConceptDictionary`]): With examples.
        interpreter ([`Interpreter`]): Around the VLM that is asked.
        features (`Iterable[int]`, *optional*): Of which; those that fired and have no name when left out.
    """
    if features is None:
        features = [e.feature for e in dictionary.entries if e.density > 0 and dictionary.name(e.feature) is None]
    lines = {feature: interpreter.line(dictionary, dictionary[feature]) for feature in features}
    return dictionary.updated("interpretation", lines)


def detection_score(
    dictionary: ConceptDictionary, interpreter: Interpreter, feature: int, others: Iterable[int]
) -> float | None:
    """How well the interpreter tells a feature's examples on words from those of other features by its line.

    Args:
        dictionary ([`ConceptDictionary`]): With a line on the feature.
        interpreter ([`Interpreter`]): That is asked.
        feature (`int`): Which.
        others (`Iterable[int]`): Features whose first example should not fit.

    Returns:
        `float`: balanced accuracy in [0, 1], 0.5 being chance; `None` without examples of words on either side.

    Raises:
        ValueError: The feature has no line.
    """
    entry = dictionary[feature]
    if entry.interpretation is None:
        raise ValueError(f"feature {feature} has no interpretation; call interpret(dictionary, interpreter, [...]).")
    inside = entry.top_words[:NUM_EXAMPLES]
    outside = [dictionary[other].top_words[0] for other in others if dictionary[other].top_words]
    if not inside or not outside:
        return None
    right = [
        sum(interpreter.fits(entry.interpretation, example) == wanted for example in examples) / len(examples)
        for examples, wanted in ((inside, True), (outside, False))
    ]
    return sum(right) / 2


def _in_context(example: WordExample) -> str:
    return f"{example.before} <<{example.word}>> {example.after}".strip()


def _pictures(dictionary: ConceptDictionary, examples: Iterable[PatchExample]) -> list[Image.Image]:
    """Pictures that were kept, the patch of each framed."""
    found: list[Image.Image] = []
    for example in examples:
        if example.picture < 0 or example.box is None or len(found) == MAX_PICTURES:
            continue
        name = f"picture {example.picture} of the dictionary"
        picture = read_image(dictionary.pictures[example.picture], name).convert("RGB")
        scale = [shown / size for shown, size in zip(picture.size, example.size, strict=True)]
        box = [value * scale[side % 2] for side, value in enumerate(example.box)]
        ImageDraw.Draw(picture).rectangle(box, outline=FRAME, width=FRAME_WIDTH)
        found.append(picture)
    return found


__all__ = ["Interpreter", "detection_score", "interpret"]
