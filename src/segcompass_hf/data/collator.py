# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Rows of any data set in the row schema -> inputs of the model, for training and for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.data import get_worker_info
from transformers import BatchFeature

from ..images_segcompass import to_rgb_image
from ..processing_segcompass import REF_TOKEN, THINK_END
from .schema import decode_mask, decode_masks
from .vlm_texts import RowTextCheck, reasoning_of

_MARK = "\u2603"  # stands for the reasoning when a completion is taken apart
MAX_WORKERS = 64  # data loader workers that count apart; beyond that two share a counter


@dataclass
class SegmentationCollator:
    """Collates rows for `model.forward`, or with `with_reasoning=False` for `model.segment`.

    Images may be PIL images, paths, arrays, or what `datasets.Image(decode=False)` gives (`{"bytes", "path"}`).

    A row without reference reasoning (real referring data has none) still gets an answer, with an empty think block,
    so that its `<REF_POS>` states and masks can be trained. `missing_reasoning` says what its language loss sees:

    - `"format"`: the opening tag, the `<REF_POS>` tokens and the end, but not the closing tag, however it is spelled.
      Predicting it right behind the opening tag is what would teach the model not to think.
    - `"empty"`: all of it; the model learns to answer such data without thinking.
    - `"skip"`: nothing of that row.

    For evaluation (`with_reasoning=False`) the batch also holds `references`: per row a `dict` with `sample_id`,
    `kind`, `source`, `masks` `(n, H, W)` bool of all objects at the image's size, and `ignore` `(H, W)` or `None`.
    Take it out before calling the model.

    Args:
        processor (`SegCompassProcessor`): Makes the inputs.
        overflow (`str`, defaults to `"drop"`): More objects than slots: `"drop"` the smallest, and count them;
            `"merge"` the smallest into one mask (evaluation, where every pixel counts); `"error"`.
        missing_reasoning (`str`, defaults to `"format"`): See above.
        inputs (`str`, defaults to `"segmentation"`): `"language"` leaves out SAM's image (warm-up).
        with_reasoning (`bool`, defaults to `True`): Append the reference answers, with `labels`.
        with_masks (`bool`, defaults to `True`): Add `mask_labels` and `num_objects`.
        embedding_cache ([`EmbeddingCache`], *optional*): Gives `image_embeddings` in place of `sam_pixel_values`.
        slot_cache ([`SlotCache`], *optional*): Gives `slots` and `reference_states` in place of the VLM's inputs
            and of `labels`.
        extra (`Callable`, *optional*): Called with the rows, their images and the batch; returns further entries.

    Example:

    ```python
    >>> collator = SegmentationCollator(processor)  # doctest: +SKIP
    >>> model(**collator(rows)).loss  # doctest: +SKIP
    ```
    """

    processor: Any
    overflow: Literal["drop", "merge", "error"] = "drop"
    missing_reasoning: Literal["format", "empty", "skip"] = "format"
    inputs: Literal["segmentation", "language"] = "segmentation"
    with_reasoning: bool = True
    with_masks: bool = True
    embedding_cache: Any = None
    slot_cache: Any = None
    extra: Callable[[Sequence[dict], list, BatchFeature], dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        choices = {
            "overflow": ("drop", "merge", "error"),
            "missing_reasoning": ("format", "empty", "skip"),
            "inputs": ("segmentation", "language"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; expected one of {known}.")
        # Shared memory: what data loader workers count, each in a row of its own, the main process can read.
        self._dropped = torch.zeros(1 + MAX_WORKERS, 2, dtype=torch.long).share_memory_()

    @classmethod
    def for_evaluation(cls, processor: Any, **kwargs: Any) -> SegmentationCollator:
        """Prompts for `model.segment`, and `references` with every object of every row."""
        settings: dict[str, Any] = {"overflow": "merge", "with_reasoning": False, "with_masks": False}
        return cls(processor, **(settings | kwargs))

    @property
    def dropped_objects(self) -> int:
        """Objects left out because their row has more than the model has slots, in all rows collated so far."""
        return int(self._dropped[:, 0].sum())

    @property
    def overfull_rows(self) -> int:
        """Rows with such objects. Rows that are collated again (epochs, batches skipped on resume) count again."""
        return int(self._dropped[:, 1].sum())

    def __call__(self, rows: Sequence[dict[str, Any]]) -> BatchFeature:
        """Collate.

        Args:
            rows (`Sequence[dict]`): In the row schema; `image` and `instruction` are needed, `masks` with
                `with_masks` and in evaluation.

        Returns:
            `BatchFeature`: what `SegCompassProcessor` returns, see there.

        Raises:
            ValueError: an image or mask cannot be read, a text is empty or too long, or a row has too many objects
                with `overflow="error"`; the message starts with the row's `sample_id`.
        """
        if not rows:
            raise ValueError("there are no rows to collate.")
        images = [_of_row(row, to_rgb_image, row["image"]) for row in rows]
        needs_masks = self.with_masks or not self.with_reasoning
        sizes = [(image.height, image.width) for image in images]
        masks: list[Any] = []
        if needs_masks:
            masks = [_of_row(row, decode_masks, row["masks"], size) for row, size in zip(rows, sizes, strict=True)]
        if self.with_masks:
            for row, objects in zip(rows, masks, strict=True):
                self._count_overflow(row, len(objects))
        batch = self._inputs(rows, images, masks if self.with_masks else None)
        if self.with_reasoning and "labels" in batch:
            self._mask_missing_reasoning(rows, batch)
        elif not self.with_reasoning:
            batch["references"] = [_reference(row, objects) for row, objects in zip(rows, masks, strict=True)]
        if self.extra is not None:
            batch.update(self.extra(rows, images, batch))
        return batch

    def _inputs(self, rows: Sequence[dict[str, Any]], images: list, masks: list | None) -> BatchFeature:
        reasonings = [_of_row(row, reasoning_of, row) for row in rows] if self.with_reasoning else None
        instructions = [row.get("instruction") for row in rows]
        try:
            if self.inputs == "segmentation":
                cache = self.embedding_cache
                processor = self.processor if cache is None else cache.caching_processor(self.processor)
                if self.slot_cache is not None:
                    batch = self.slot_cache.states_of(rows, images) | processor._sam_inputs(images)
                    batch |= {} if masks is None else processor._mask_targets(masks, images, self.overflow)
                    return BatchFeature(batch)
                return processor(
                    images=images, instruction=instructions, reasoning=reasonings, masks=masks, overflow=self.overflow
                )
            batch = language_inputs(self.processor, images, instructions, reasonings)
            self.processor._check_length(batch["attention_mask"])
            return batch
        except ValueError:
            check = RowTextCheck(self.processor, self.with_reasoning)
            for row in rows:  # the processor counts within the batch; alone it is known which row it is
                _of_row(row, check, row)
            raise

    def _count_overflow(self, row: dict[str, Any], num_objects: int) -> None:
        extra = num_objects - self.processor.num_slots
        if extra <= 0:
            return
        if self.overflow == "error":
            raise ValueError(
                f"sample {row.get('sample_id')!r} has {num_objects} target objects but the model has "
                f'{self.processor.num_slots} slots; pass overflow="drop" or "merge", or use a model with more slots.'
            )
        if self.overflow == "drop":
            worker = get_worker_info()
            self._dropped[0 if worker is None else 1 + worker.id % MAX_WORKERS] += torch.tensor([extra, 1])

    def _mask_missing_reasoning(self, rows: Sequence[dict[str, Any]], batch: BatchFeature) -> None:
        if self.missing_reasoning == "empty":
            return
        for index, row in enumerate(rows):
            if reasoning_of(row):
                continue
            labels = batch["labels"][index]
            if self.missing_reasoning == "skip":
                labels[:] = -100
                continue
            answer = (labels != -100).nonzero()[:, 0]  # places of the answer's tokens
            labels[answer[self._end_of_an_empty_thought(labels[answer].tolist())]] = -100

    def _end_of_an_empty_thought(self, answer: list[int]) -> slice:
        """Where the tokens of an answer without reasoning end its thought.

        The tags may be spelled with several tokens, and `></` be one of them: what counts is which tokens differ from
        those of the text before the reasoning and of the text behind the closing tag.
        """
        processor = self.processor
        opening, _, closing = processor.build_completion(_MARK).partition(_MARK)
        _, tag, rest = closing.partition(THINK_END)
        if not tag:  # a template of other words: all of them up to the references
            rest = "".join(closing.partition(REF_TOKEN)[1:])
        before, after = (
            processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (opening, rest + processor.end_of_turn_token)
        )
        return slice(_num_equal(answer, before), len(answer) - _num_equal(answer[::-1], after[::-1]))


def _num_equal(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of what two sequences begin with in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (one, two) in pairs if one != two), min(len(first), len(second)))


def language_inputs(
    processor: Any, images: list, instructions: list[Any], reasonings: list[str] | None = None
) -> BatchFeature:
    """The VLM's own inputs, with reference answers if given, without the work of SAM's image processor.

    Args:
        processor (`SegCompassProcessor`): Makes them.
        images (`list`): One per row.
        instructions (`list[str]`): One per row.
        reasonings (`list[str]`, *optional*): Append the answers: adds `completion_mask` and `labels`.
    """
    prompts = [processor.build_prompt(instruction) for instruction in instructions]
    batch = processor(
        images=[[image] for image in images], text=prompts, return_tensors="pt", padding=True, padding_side="left"
    )
    if reasonings is not None:
        batch.update(processor._append_completions(batch, reasonings))
    return batch


def _reference(row: dict[str, Any], masks: Any) -> dict[str, Any]:
    ignore = row.get("ignore")
    reference = {name: row.get(name) for name in ("sample_id", "kind", "source")}
    return {**reference, "masks": masks, "ignore": None if ignore is None else _of_row(row, decode_mask, ignore)}


def _of_row(row: dict[str, Any], function: Callable, *args: Any) -> Any:
    """`function(*args)`, whose errors name the row."""
    try:
        return function(*args)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"sample {row.get('sample_id')!r}: {error}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"sample {row.get('sample_id')!r}: {error!s:.300}") from error
