"""Rows of an image-text data set, in an order that can be taken up again anywhere, and as inputs of a VLM."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Literal

import torch

from ...data.readable_rows import UnreadableLog, keep_images_encoded
from ...images_segcompass import to_rgb_image

_SENTINEL = "\u2603"  # stands for the words when a chat template is looked through


class RowStream:
    """The rows of one process, epoch after epoch.

    A map-style data set is shuffled anew in every epoch, from `(seed, epoch)`; an iterable one comes in its own order
    and is told the epoch (`set_epoch`) where it can be: the order must follow from the epoch alone. Of the rows that
    are not held out, process `rank` of `world_size` gets every `world_size`-th, and an epoch drops what is left over,
    so that all processes have the same number of rows.

    Every process reads a whole stream and keeps its own rows; what it takes up again it reads past. Beside a VLM's
    passes both cost little.

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
        if self.is_map_style and len(self._indices()) < world_size:
            raise ValueError(
                f"the data set of {len(dataset)} rows has {len(self._indices())} rows to read, fewer than the "
                f"{world_size} processes; every process needs at least one."
            )

    @property
    def is_map_style(self) -> bool:
        return hasattr(self.dataset, "__len__") and hasattr(self.dataset, "__getitem__")

    @property
    def rows_per_epoch(self) -> int | None:
        """Rows of one process in one epoch, where the data set has a length."""
        return len(self._indices()) // self.world_size if self.is_map_style else None

    def rows(self, epoch: int, start: int = 0) -> Iterator[tuple[int, dict]]:
        """This process's rows of an epoch from its `start`-th on, each with its index in the data set."""
        if self.is_map_style:
            indices = self._indices()
            if self.seed is not None:
                generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
                indices = [indices[i] for i in torch.randperm(len(indices), generator=generator).tolist()]
            for index in indices[self.rank :: self.world_size][start : self.rows_per_epoch]:
                yield index, self.dataset[index]
            return
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        chosen = (item for item in enumerate(self.dataset) if self._is_chosen(item[0]))
        # whole rounds only: a process that had a row more than the others would run ahead of them
        rounds = iter(lambda: list(itertools.islice(chosen, self.world_size)), [])
        for taken in itertools.islice(rounds, start, None):
            if len(taken) == self.world_size:
                yield taken[self.rank]

    def _is_chosen(self, index: int) -> bool:
        held_out = self.hold_out_every is not None and (index + 1) % self.hold_out_every == 0
        return held_out == (self.part == "held_out")

    def _indices(self) -> list[int]:
        return [index for index in range(len(self.dataset)) if self._is_chosen(index)]


class UnreadableImage(ValueError):
    """An image of a row that cannot be read; says which row and why."""


class RowEncoder:
    """Turns rows into a VLM's inputs.

    Two kinds of rows are known. In the row schema (`image`, `instruction` and, where there is one, `reasoning`) a row
    becomes the prompt and the reference answer that a [`SegCompassProcessor`] builds, or with any other processor a
    user turn and an assistant turn of its chat template. Interleaved rows, as in OBELICS, have lists `images` and
    `texts` of one length, each entry `None` where the other is not; they become one running text with images in it.
    Control tokens inside a row's own words are made inert.

    Args:
        processor: A [`SegCompassProcessor`] or a VLM's own processor.
        max_length (`int`, *optional*): Tokens of a row at most. Interleaved rows are cut between their parts and
            inside their last text; rows of the schema are refused, since a prompt without its end means nothing.
        unreadable_rows (`str`, defaults to `"skip"`): `"skip"` leaves rows with an image that cannot be read out,
            warns of each and lists them in `unreadable_log`; `"error"` stops.
        unreadable_log ([`UnreadableLog`], *optional*): Where.

    Raises:
        ValueError: A row is of neither kind, or longer than `max_length`.
        UnreadableImage: An image cannot be read.
    """

    def __init__(
        self,
        processor: Any,
        max_length: int | None = None,
        unreadable_rows: Literal["skip", "error"] = "skip",
        unreadable_log: UnreadableLog | None = None,
    ):
        self.processor, self.max_length, self.unreadable_rows = processor, max_length, unreadable_rows
        self.unreadable_log = unreadable_log or UnreadableLog(None, "rows")
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self._image_markup: str | None = None
        self._image_frame: int | None = None

    def __call__(self, rows: list[tuple[int, dict]]) -> dict[str, torch.Tensor] | None:
        """Inputs of the VLM for rows with their index: `input_ids`, `attention_mask` `(rows, length)` and the rest.

        `None` where no row can be read.
        """
        texts, images = [], []
        for index, row in rows:
            try:
                text, pictures = self.render(index, row)
            except UnreadableImage as error:
                if self.unreadable_rows == "error":
                    raise
                self.unreadable_log.add(index, row.get("sample_id"), str(error), "skipped")
                continue
            if text:
                texts.append(text)
                images.append(pictures)
        return self._tensors(texts, images) if texts else None

    def render(self, index: int, row: dict) -> tuple[str, list]:
        """Text with image placeholders, and the images, of one row."""
        if row.get("instruction") is not None and row.get("image") is not None:
            images = [_read_image(row["image"], f"the image of row {index}")]
            text = self._conversation(row["instruction"], row.get("reasoning"))
            length = self._length(text, images) if self.max_length is not None else 0
            if self.max_length is not None and length > self.max_length:
                raise ValueError(f"row {index} is {length} tokens long, max_length is {self.max_length}; raise it.")
            return text, images
        if isinstance(row.get("images"), list) and isinstance(row.get("texts"), list):
            return self._document(index, row["images"], row["texts"])
        raise ValueError(
            f"row {index} has the columns {sorted(row)}; expected `image` and `instruction` (and `reasoning`), or the "
            "lists `images` and `texts` of interleaved rows."
        )

    def _tensors(self, texts: list[str], images: list[list]) -> dict[str, torch.Tensor]:
        kwargs = {"images": images} if any(images) else {}
        bos = self.tokenizer.bos_token
        if bos and all(text.startswith(bos) for text in texts):  # a template that writes it must not get a second one
            kwargs["add_special_tokens"] = False
        inputs = self.processor(text=texts, return_tensors="pt", padding=True, **kwargs)
        return {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}

    def _length(self, text: str, images: list) -> int:
        """Tokens of one row, without processing its images where the family can count their tokens by size."""
        count = getattr(getattr(self.processor, "vlm_processor", self.processor), "_get_num_multimodal_tokens", None)
        if count is None or not images:
            return int(self._tensors([text], [images])["attention_mask"].sum())

        def estimate(text, images):
            tokens = count(image_sizes=[(image.height, image.width) for image in images]).num_image_tokens
            return len(self.tokenizer(text)["input_ids"]) - len(images) + sum(tokens)

        if self._image_frame is None:  # what the family puts around an image that its template does not show
            alone = self.image_markup, images[:1]
            exact = int(self._tensors([alone[0]], [alone[1]])["attention_mask"].sum())
            self._image_frame = exact - estimate(*alone)
        return estimate(text, images) + self._image_frame * len(images)

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

    def _document(self, index: int, images: list, texts: list) -> tuple[str, list]:
        if len(images) != len(texts) or any((i is None) == (t is None) for i, t in zip(images, texts, strict=False)):
            raise ValueError(
                f"row {index} has {len(images)} images and {len(texts)} texts; interleaved rows have lists of one "
                "length with None in exactly one of them at every place."
            )
        parts = []
        for place, (image, text) in enumerate(zip(images, texts, strict=True)):
            if image is not None:
                parts.append(_read_image(image, f"image {place} of row {index}"))
            elif text:
                parts.append(self._inert(text))
        return self._fit(parts)

    def _fit(self, parts: list) -> tuple[str, list]:
        """Join texts and images, cut from the end until they are at most `max_length` tokens."""
        while True:
            images = [part for part in parts if not isinstance(part, str)]
            text = "".join(part if isinstance(part, str) else self.image_markup for part in parts)
            excess = self._length(text, images) - self.max_length if self.max_length is not None and parts else 0
            if excess <= 0:
                return text, images
            last = parts.pop()
            if isinstance(last, str):
                offsets = self.tokenizer(last, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
                if len(offsets) > excess:
                    parts.append(last[: offsets[len(offsets) - excess][0]])

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

    def _inert(self, text: str) -> str:
        if hasattr(self.processor, "neutralize"):
            return self.processor.neutralize(text)
        tokens = {*self.tokenizer.all_special_tokens, getattr(self.processor, "image_token", None)} - {None}
        for token in sorted(tokens, key=len, reverse=True):
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text


def _read_image(image: Any, name: str):
    try:
        return to_rgb_image(image, name)
    except (ValueError, OSError) as error:
        raise UnreadableImage(str(error)) from error


def _mix(*numbers: int) -> int:
    """One seed from several numbers, such as the run's seed and an epoch, so that neighbours share no sequence."""
    import numpy as np

    return int(np.random.SeedSequence([number % 2**63 for number in numbers]).generate_state(1, np.uint64)[0] >> 1)


__all__ = ["RowEncoder", "RowStream", "UnreadableImage"]
