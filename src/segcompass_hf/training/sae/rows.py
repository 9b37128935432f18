"""Rows of an image-text data set, in an order that can be taken up again anywhere, and as inputs of a VLM."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Literal

import torch

from ...data.readable_rows import UnreadableLog, keep_images_encoded
from ...data.vlm_texts import TextsWithImages
from ...images_segcompass import to_rgb_image

MAX_SECTIONS = 16  # of a stream of files; one process reads all of them at once where it fills a cache


class RowStream:
    """The rows of one process, epoch after epoch.

    A map-style data set is shuffled anew in every epoch, from `(seed, epoch)`; an iterable one comes in its own order
    and is told the epoch (`set_epoch`) where it can be: the order must follow from the epoch alone.

    A `datasets.IterableDataset` of several files is read in sections, each some of the files, and every other data set
    as one section. A process reads sections of its own. Where there are fewer than processes, those that share one
    read it in turns, row by row, and what is left over of an epoch is dropped, so that all have the same number of
    rows; the others' rows are read past. Sections, and which rows are held out, do not depend on the number of
    processes.

    Args:
        dataset: Map-style (`len` and indices) or iterable, such as `datasets.Dataset` and `IterableDataset`.
        hold_out_every (`int`, *optional*): Every such row of the data set is held out for evaluation.
        part (`str`, defaults to `"train"`): `"train"` leaves the held-out rows out, `"held_out"` reads only them.
        rank, world_size (`int`): Which process of how many.
        seed (`int`, *optional*): Of the order; `None` keeps the data set's own order.
    """

    def __init__(
        self,
        dataset: Any,
        hold_out_every: int | None = None,
        part: Literal["train", "held_out"] = "train",
        rank: int = 0,
        world_size: int = 1,
        seed: int | None = None,
    ):
        self.dataset = keep_images_encoded(dataset)
        self.hold_out_every, self.part, self.seed = hold_out_every, part, seed
        self.rank, self.world_size = rank, world_size
        num_files = getattr(dataset, "num_shards", 1) if hasattr(dataset, "shard") and not self.is_map_style else 1
        self.num_sections = min(MAX_SECTIONS, num_files)
        if self.is_map_style and not self.rows_per_epoch:
            raise ValueError(
                f"the data set of {len(dataset)} rows has {self.num_rows} rows to read, fewer than the "
                f"{world_size} processes; every process needs at least one."
            )

    @property
    def is_map_style(self) -> bool:
        return hasattr(self.dataset, "__len__") and hasattr(self.dataset, "__getitem__")

    @property
    def num_rows(self) -> int | None:
        """Rows of all processes in one epoch, where the data set has a length."""
        if not self.is_map_style:
            return None
        length = len(self.dataset)
        held_out = 0 if self.hold_out_every is None else length // self.hold_out_every
        return held_out if self.part == "held_out" else length - held_out

    @property
    def rows_per_epoch(self) -> int | None:
        """Rows of one process in one epoch, where the data set has a length; asked for at every step."""
        return self.num_rows // self.world_size if self.is_map_style else None

    def rows(self, epoch: int, start: int = 0) -> Iterator[tuple[int, dict]]:
        """This process's rows of an epoch from its `start`-th on, each with its index in the data set.

        Of a stream in several sections the index is a number that no other row has.
        """
        sections = range(self.rank % self.num_sections, self.num_sections, self.world_size)
        sharing = range(sections[0], self.world_size, self.num_sections)  # processes that read the same section
        turn = self.rank // self.num_sections
        if self.is_map_style:
            yield from self._table_rows(epoch, slice(turn, None, len(sharing)), slice(start, self.rows_per_epoch))
            return
        chosen = itertools.chain.from_iterable(self.section_rows(section, epoch) for section in sections)
        # whole rounds only: a process that had a row more than the others would run ahead of them
        rounds = iter(lambda: list(itertools.islice(chosen, len(sharing))), [])
        for taken in itertools.islice(rounds, start, None):
            if len(taken) == len(sharing):
                yield taken[turn]

    def section_rows(
        self, section: int, epoch: int, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, dict]]:
        """Rows of a section from the `start`-th to the `stop`-th, whichever process reads them; as `rows` has them."""
        if self.is_map_style:
            yield from self._table_rows(epoch, slice(None), slice(start, stop))
            return
        files = self.dataset if self.num_sections == 1 else self.dataset.shard(self.num_sections, section)
        if hasattr(files, "set_epoch"):  # of the section itself, which begins at epoch 0 whatever the whole is told
            files.set_epoch(epoch)
        # every section holds rows out, each at other places, so that short ones together do too
        offset = section * (self.hold_out_every or 0) // self.num_sections
        chosen = ((place, row) for place, row in enumerate(files) if self._is_chosen(place + offset))
        for place, row in itertools.islice(chosen, start, stop):
            yield place * self.num_sections + section, row

    def _table_rows(self, epoch: int, turns: slice, wanted: slice) -> Iterator[tuple[int, dict]]:
        indices = torch.arange(len(self.dataset))
        indices = indices[self._is_chosen(indices)]
        if self.seed is not None:
            generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
            indices = indices[torch.randperm(len(indices), generator=generator)]
        for index in indices[turns][wanted].tolist():
            yield index, self.dataset[index]

    def _is_chosen(self, index: Any) -> Any:
        """Whether a row is read, for an index or a tensor of them."""
        if self.hold_out_every is None:
            return (index >= 0) == (self.part == "train")
        return ((index + 1) % self.hold_out_every == 0) == (self.part == "held_out")


def held_out_every(dataset: Any, every: int, processes: int) -> int:
    """Every so manieth row to hold out: `every`, or less in a small data set, so that each process evaluates on one.

    Args:
        dataset: As [`RowStream`] takes it; of a stream the first `every * processes` rows are counted.
        every (`int`): Wanted.
        processes (`int`): That share the rows.

    Raises:
        ValueError: There are not two rows for every process, one to hold out and one to train on.
    """
    if hasattr(dataset, "__len__"):
        length = len(dataset)
    else:
        length = sum(1 for _ in itertools.islice(keep_images_encoded(dataset), every * processes))
    if length < 2 * processes:
        raise ValueError(
            f"the data set has {length} rows, fewer than 2 for each of {processes} processes: one to hold out for "
            "evaluation and one to train on. Set validation_share=0, or give an eval_dataset."
        )
    return min(every, length // processes)


class UnreadableRow(ValueError):
    """A row whose image or text cannot be read; says which row and why."""


class RowEncoder(TextsWithImages):
    """Turns rows into a VLM's inputs.

    Two kinds of rows are known. In the row schema (`image`, `instruction` and, where there is one, `reasoning`) a row
    becomes the prompt and the reference answer that a [`SegCompassProcessor`] builds, or with any other processor a
    user turn and an assistant turn of its chat template. Interleaved rows, as in OBELICS, have lists `images` and
    `texts` of one length, each entry `None` where the other is not; they become one running text with images in it.
    Control tokens inside a row's own words are made inert.

    Args:
        processor: A [`SegCompassProcessor`] or a VLM's own processor.
        max_length (`int`, *optional*): Tokens of a row at most; what the tokenizer allows (`model_max_length`) when
            left out. Interleaved rows are cut between their parts and inside their last text; rows of the schema are
            unreadable, since a prompt without its end means nothing.
        unreadable_rows (`str`, defaults to `"skip"`): `"skip"` leaves rows out whose image or text cannot be read,
            warns of each and lists them in `unreadable_log`; `"error"` stops.
        unreadable_log ([`UnreadableLog`], *optional*): Where.

    Raises:
        ValueError: A row has the columns of neither kind.
        UnreadableRow: An image cannot be read, or a text is empty, missing or longer than `max_length`.
    """

    def __init__(
        self,
        processor: Any,
        max_length: int | None = None,
        unreadable_rows: Literal["skip", "error"] = "skip",
        unreadable_log: UnreadableLog | None = None,
    ):
        super().__init__(processor)
        self.max_length, self.unreadable_rows = max_length, unreadable_rows
        self.unreadable_log = unreadable_log or UnreadableLog(None, "rows")

    @property
    def max_tokens(self) -> int | None:
        return super().max_tokens if self.max_length is None else self.max_length

    def __call__(self, rows: list[tuple[int, dict]]) -> dict[str, torch.Tensor] | None:
        """Inputs of the VLM for rows with their index: `input_ids`, `attention_mask` `(rows, length)` and the rest.

        `None` where no row can be read.
        """
        found = self.with_images(rows)
        return None if found is None else found[0]

    def with_images(self, rows: list[tuple[int, dict]]) -> tuple[dict[str, torch.Tensor], list[list]] | None:
        """The same with the images of each row that can be read, `list[list[PIL.Image.Image]]`."""
        texts, images = [], []
        for index, row in rows:
            try:
                text, pictures = self.render(index, row)
            except UnreadableRow as error:
                if self.unreadable_rows == "error":
                    raise
                self.unreadable_log.add(index, row.get("sample_id"), str(error.__cause__), "skipped")
                continue
            if text:
                texts.append(text)
                images.append(pictures)
        return (self.tensors(texts, images), images) if texts else None

    def render(self, index: int, row: dict) -> tuple[str, list]:
        """Text with image placeholders, and the images, of one row."""
        place = f"row {index}" + (f" ({row['sample_id']})" if row.get("sample_id") is not None else "")
        is_sample, is_document = {"image", "instruction"} <= set(row), {"images", "texts"} <= set(row)
        try:
            if is_sample and (row["image"] is not None or not is_document):
                return self._sample(row)
            if is_document:
                return self._document(row["images"], row["texts"])
        except (ValueError, OSError, TypeError) as error:
            raise UnreadableRow(f"{place}: {error}") from error
        raise ValueError(
            f"{place} has the columns {sorted(row)}; expected `image` and `instruction` (and `reasoning`), or the "
            "lists `images` and `texts` of interleaved rows."
        )

    def _sample(self, row: dict) -> tuple[str, list]:
        for name in ("instruction", "reasoning"):
            words = row.get(name)
            if not isinstance(words, str) and (words is not None or name == "instruction"):
                raise ValueError(f"the {name} is a {type(words).__name__}; expected a text.")
        if not row["instruction"].strip():
            raise ValueError("the instruction is empty; say what to look for in the image.")
        images = [to_rgb_image(row["image"], "the image")]
        text, limit = self._conversation(row["instruction"], row.get("reasoning")), self.max_tokens
        if limit is not None and (length := self.num_tokens(text, images)) > limit:
            name = "model_max_length of the tokenizer" if self.max_length is None else "max_length"
            raise ValueError(f"it is {length} tokens long, {name} is {limit}; shorten its text, or raise the limit.")
        return text, images

    def _conversation(self, instruction: str, reasoning: str | None) -> str:
        processor = self.processor
        if hasattr(processor, "build_prompt"):
            text = processor.build_prompt(instruction)
            if reasoning:
                text += processor.build_completion(reasoning) + processor.end_of_turn_token
            return text
        if getattr(processor, "chat_template", None) is None:
            return self.image_markup + "\n".join(self._inert(words) for words in (instruction, reasoning) if words)
        place, words = {"type": "image"}, {"type": "text", "text": self._inert(instruction)}
        messages = [{"role": "user", "content": [place, words]}]
        if reasoning:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": self._inert(reasoning)}]})
        return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=not reasoning)

    def _document(self, images: Any, texts: Any) -> tuple[str, list]:
        if not isinstance(images, list) or not isinstance(texts, list):
            found = f"{type(images).__name__} and {type(texts).__name__}"
            raise ValueError(f"`images` and `texts` are {found}; interleaved rows have two lists.")
        if len(images) != len(texts) or any((i is None) == (t is None) for i, t in zip(images, texts, strict=False)):
            raise ValueError(
                f"it has {len(images)} images and {len(texts)} texts; interleaved rows have lists of one length with "
                "None in exactly one of them at every place."
            )
        parts = []
        for place, (image, text) in enumerate(zip(images, texts, strict=True)):
            if image is not None:
                parts.append(to_rgb_image(image, f"image {place}"))
            elif text:
                parts.append(self._inert(text))
        return self._fit(parts)

    def _fit(self, parts: list) -> tuple[str, list]:
        """Join texts and images, cut from the end until they are at most `max_tokens`."""
        limit = self.max_tokens
        while True:
            images = [part for part in parts if not isinstance(part, str)]
            text = "".join(part if isinstance(part, str) else self.image_markup for part in parts)
            excess = self.num_tokens(text, images) - limit if limit is not None and parts else 0
            if excess <= 0:
                return text, images
            last = parts.pop()
            if isinstance(last, str):
                offsets = self.tokenizer(last, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
                if len(offsets) > excess:
                    parts.append(last[: offsets[len(offsets) - excess][0]])

    def _inert(self, text: str) -> str:
        if hasattr(self.processor, "neutralize"):
            return self.processor.neutralize(text)
        tokens = {*self.tokenizer.all_special_tokens, getattr(self.processor, "image_token", None)} - {None}
        for token in sorted(tokens, key=len, reverse=True):
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text


def _mix(*numbers: int) -> int:
    """One seed from several numbers, such as the run's seed and an epoch, so that neighbours share no sequence."""
    import numpy as np

    return int(np.random.SeedSequence([number % 2**63 for number in numbers]).generate_state(1, np.uint64)[0] >> 1)


__all__ = ["RowEncoder", "RowStream", "UnreadableRow", "held_out_every"]
