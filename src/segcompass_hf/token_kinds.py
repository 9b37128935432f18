# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What every token of an answer is: word of the question or the reasoning, image patch (and where), or neither."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from .threads_segcompass import tokenizer_lock
from .token_grids_segcompass import UnknownPlacesError
from .token_places import Box, patch_boxes

TokenKind = Literal["special", "question", "image", "reasoning", "reference"]

_MARK = "\u2603"  # stands for the instruction when the prompt is looked through


class TokenKinds(NamedTuple):
    """One entry per position of a sequence.

    Args:
        kinds (`list[str | None]`): `"image"`, `"question"` (the user's own words), `"reasoning"` (what the model wrote
            between the think tags), `"reference"` (`<REF_POS>` in the answer), `"special"` (control tokens, and the
            fixed words that the prompt puts around the question); `None` on padding.
        patches (`list[tuple[int, int, int, int] | None]`): `(x0, y0, x1, y1)` of image tokens, pixels of the original
            image, ends not included; `None` elsewhere, where the patch shows padding only, without a size, and for all
            where the family's tiles have no known place.
    """

    kinds: list[TokenKind | None]
    patches: list[Box | None]

    def positions(self, kind: TokenKind) -> list[int]:
        """Positions of a kind, in order."""
        return [position for position, found in enumerate(self.kinds) if found == kind]


def token_kinds(
    processor: Any, output: Any, instruction: str, row: int = 0, image_size: tuple[int, int] | None = None
) -> TokenKinds:
    """Tell the tokens of one row of `segment`'s output apart.

    Args:
        processor (`SegCompassProcessor`): That made the inputs.
        output (`SegCompassSegmentationOutput`): `sequences`, `attention_mask` and `completion_mask` are read.
        instruction (`str`): The row's.
        row (`int`, defaults to 0): Which row.
        image_size (`tuple[int, int]`, *optional*): (height, width) of the row's image in pixels, for `patches`.

    Returns:
        [`TokenKinds`], an entry per position of the sequence, padding included.

    Raises:
        ValueError: the sequence was not made from this instruction by this processor, or the tokenizer knows no places
            in the text.
    """
    ids = output.sequences[row].tolist()
    present, written = output.attention_mask[row].bool().tolist(), output.completion_mask[row].bool().tolist()
    control = {index for index, token in processor.tokenizer.added_tokens_decoder.items() if token.special}
    control |= {processor.think_start_token_id, processor.think_end_token_id, processor.end_of_turn_token_id}
    kinds: list[TokenKind | None] = [None] * len(ids)
    prompt = [position for position in range(len(ids)) if present[position] and not written[position]]
    for position, token in enumerate(ids):
        if not present[position]:
            continue
        if token == processor.image_token_id:
            kinds[position] = "image"
        elif not written[position] or token in control:
            kinds[position] = "special"
        else:
            kinds[position] = "reference" if token == processor.ref_token_id else "reasoning"
    for index in _question_places(processor, [ids[position] for position in prompt], instruction):
        kinds[prompt[index]] = "question"
    patches: list[Box | None] = [None] * len(ids)
    places = [position for position in prompt if kinds[position] == "image"]
    if image_size is not None and places:
        try:
            boxes = patch_boxes(processor, image_size, len(places))
        except UnknownPlacesError:
            boxes = [None] * len(places)
        for position, box in zip(places, boxes, strict=True):
            patches[position] = box
    return TokenKinds(kinds, patches)


def _question_places(processor: Any, ids: list[int], instruction: str) -> list[int]:
    """Which tokens of a prompt `ids` (image placeholders expanded) are words of the instruction.

    The text that the family's processor makes of the prompt is tokenized once more, with places. It may hold another
    number of image tokens than `ids`, so each mention of the instruction is looked for from both ends, with the token
    before and behind it: a part of the instruction alone is another instruction.
    """
    tokenizer = processor.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} does not say where in the text its tokens stand; load the fast tokenizer "
            "(use_fast=True)."
        )
    text, special = processor.text_for_tokenizer(processor.build_prompt(instruction))
    around = processor.text_for_tokenizer(processor.build_prompt(_MARK))[0].split(_MARK)  # each mention
    length = (len(text) - sum(map(len, around))) // (len(around) - 1)
    with tokenizer_lock:
        encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=special)
    bare, offsets = encoding["input_ids"], encoding["offset_mapping"]
    head, tail = _common_prefix(bare, ids), _common_prefix(bare[::-1], ids[::-1])
    places, start = [], 0
    for piece in around[:-1]:
        start += len(piece)
        mention = [index for index, (left, right) in enumerate(offsets) if left < start + length and start < right]
        start += length
        if mention and (bare == ids or mention[0] > len(bare) - tail):
            places += [index + len(ids) - len(bare) for index in mention]
        elif mention and mention[-1] + 1 < head:
            places += mention
        else:
            raise ValueError(
                f"the sequence does not hold the instruction {instruction!r} as this processor writes it; pass the "
                "instruction and the processor that its inputs were made with."
            )
    return places


def _common_prefix(first: list[int], second: list[int]) -> int:
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    return length


__all__ = ["TokenKind", "TokenKinds", "token_kinds"]
