# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""`pipeline("reasoning-segmentation")`: an image and an instruction to reasoning and scored masks."""

import io
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice, zip_longest
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers.pipelines import Pipeline
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator
from transformers.utils import logging

from .images_segcompass import to_rgb_image

logger = logging.get_logger(__name__)

THRESHOLDS = ("slot_logit_threshold", "mask_logit_threshold", "duplicate_iou_threshold")


class ReasoningSegmentationPipeline(Pipeline):
    r"""Segments what an instruction asks for, and says why.

    ```python
    pipe = pipeline("reasoning-segmentation", model=path)
    pipe(image, instruction="the mug that is easiest to reach")
    pipe([{"image": first, "instruction": "..."}, {"image": second, "instruction": "..."}], batch_size=2)
    ```

    Each answer is a dictionary: `reasoning` (`str`) and `segments`, a list with, per mask kept, `score` (`float` in
    [0, 1]: of a calibrated checkpoint how likely the mask is right), `label` (`str`, the instruction that the mask
    answers), `mask` (`PIL.Image.Image` of mode `L` at the image's own size, 255 inside) and `slot` (`int`). No segment
    means that nothing in the image was found to fit; no two segments show the same object.

    Images are `PIL` images, arrays, paths, URLs, base64 or `data:` URLs. A batch gives the same answers as its samples
    one by one.
    """

    tokenizer: Any
    image_processor: Any
    _load_processor = True
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __call__(self, inputs: Any, instruction: str | list[str] | None = None, **kwargs: Any) -> Any:
        r"""Segment one image or several.

        Args:
            inputs (image, `dict`, or a list, tuple, 4-d array, data set, column of one, or other iterable of them):
                An image, or `{"image": ..., "instruction": ...}`.
            instruction (`str`, or a list, column or other iterable of them, *optional*): What to find; one for all
                images, or one per image. Not needed where every input brings its own, which then counts.
            batch_size (`int`, *optional*, defaults to 1): Samples that go through the model together.
            reasoning (`str`, *optional*): `full`, `short` or `none`; see `segment`.
            max_new_tokens (`int`, *optional*): Limit of the generated text in tokens.
            interventions (*optional*): See `segment`.
            forbid, require (`str` or `list[str]`, *optional*): Concepts that no mask may show, and that every mask has
                to; the answer then has `guardrails`, a list of what was left out or is missing, with reasons.
            votes (`int`, *optional*): Sample so many answers and return what they agree on; see `segment`.
            slot_logit_threshold (`float`, *optional*): Slots above it are kept; the model's own by default.
            mask_logit_threshold (`float`, *optional*): Pixels above it are inside; the model's own by default.
            duplicate_iou_threshold (`float`, *optional*): A mask whose IoU with a better one reaches it is the same
                object and left out, above 1 none; the model's own by default.
            generate_kwargs (`dict`, *optional*): Anything else for `segment`, for example `{"do_sample": True}`.

        Returns:
            `dict`, a list of them, or for data sets and what has no length an iterator that answers as it is read:
            see the class.
        """
        samples, instructions = _several(inputs), _several(instruction)
        if instructions is not None:
            samples, instruction = _pair([inputs] if samples is None else samples, instructions), None
        if samples is None:
            return super().__call__(inputs, instruction=instruction, **kwargs)
        if not isinstance(samples, list):
            samples = _Rows(samples) if isinstance(samples, Sized) else _Stream(samples)
        elif not samples:
            return []
        return super().__call__(samples, instruction=instruction, **kwargs)

    def _sanitize_parameters(self, instruction: Any = None, generate_kwargs: Any = None, **parameters: Any) -> Any:
        preprocess = {} if instruction is None else {"instruction": instruction}
        forward = dict(generate_kwargs or {})
        postprocess = {}
        for name, value in parameters.items():
            if name in THRESHOLDS:
                postprocess[name] = value
            elif name in ("reasoning", "max_new_tokens", "interventions", "forbid", "require", "votes"):
                forward[name] = value
            else:
                raise TypeError(
                    f"reasoning-segmentation does not take {name!r}; put options of `segment` into generate_kwargs."
                )
        return preprocess, forward, postprocess

    def get_iterator(
        self,
        inputs: Any,
        num_workers: Any,
        batch_size: Any,
        preprocess_params: Any,
        forward_params: Any,
        postprocess_params: Any,
    ) -> Any:
        """As in the parent, but whatever goes to worker processes can be sent there where they are spawned: a function
        that collates and one that loads images, without the model."""
        if isinstance(inputs, Sized):
            dataset = PipelineDataset(inputs, self.preprocess, preprocess_params)
        else:
            dataset = PipelineIterator(inputs, self.preprocess, preprocess_params)
            num_workers = min(num_workers, 1)  # each would read everything
        reads_once = isinstance(getattr(inputs, "samples", None), Iterator)
        if num_workers and reads_once and multiprocessing.get_start_method() != "fork":
            logger.warning("an iterator cannot be sent to a worker process and is read in this one.")
            num_workers = 0
        loader = DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=_collate)
        answers = PipelineIterator(loader, self.forward, forward_params, loader_batch_size=batch_size)
        return PipelineIterator(answers, self.postprocess, postprocess_params)

    @staticmethod
    def preprocess(inputs: Any, instruction: str | None = None) -> dict[str, Any]:
        """Load one sample. The processor runs on the whole batch in `_forward`: how samples are joined (left padding,
        flattened patches) differs between VLM families, and the processor knows."""
        image = inputs
        if isinstance(inputs, Mapping) and not _is_encoded_image(inputs):
            if "image" not in inputs:
                raise ValueError(
                    f'an input needs the key "image"; got {sorted(map(str, inputs))}. '
                    'Pass {"image": ..., "instruction": ...} or an image with instruction="...".'
                )
            image = inputs["image"]
            instruction = inputs.get("instruction", instruction)
        if not isinstance(instruction, str) or not instruction.strip():
            of = f" of an input with the keys {sorted(map(str, inputs))}" if image is not inputs else ""
            raise ValueError(
                f"an instruction is a non-empty string; got {instruction!r:.200}{of}. "
                'Pass instruction="...", or one {"image": ..., "instruction": ...} for each image.'
            )
        return {"image": to_rgb_image(image), "instruction": instruction}

    def _forward(self, samples: dict[str, Any], **generate_kwargs: Any) -> dict[str, Any]:
        batched = isinstance(samples["instruction"], list)
        images = samples["image"] if batched else [samples["image"]]
        instructions = samples["instruction"] if batched else [samples["instruction"]]
        inputs = self.processor(images=images, instruction=instructions, return_tensors="pt").to(self.device)
        segmentation = self.model.segment(**inputs, **generate_kwargs)
        if len(segmentation.slot_logits) != len(images):
            raise ValueError(
                f"num_return_sequences gives {len(segmentation.slot_logits)} answers for {len(images)} images, the "
                "pipeline returns one each; call model.segment for several."
            )
        thresholds = {name: torch.full((len(images),), float(getattr(segmentation, name))) for name in THRESHOLDS}
        # Flat tensors and lists with one entry per sample: what `Pipeline` can take apart again.
        return {
            "sequences": segmentation.sequences,  # (batch_size, sequence_length)
            "completion_mask": getattr(segmentation, "completion_mask", None),  # (batch_size, sequence_length)
            "slot_logits": segmentation.slot_logits.float(),  # (batch_size, num_slots)
            "slot_scores": segmentation.slot_scores,  # (batch_size, num_slots)
            "heatmap_logits": segmentation.heatmap_logits.float(),  # (batch_size, num_slots, height, width)
            "pred_masks": segmentation.pred_masks.float(),  # (batch_size, num_slots, height, width)
            "original_sizes": inputs["original_sizes"],  # (batch_size, 2)
            "reshaped_input_sizes": inputs["reshaped_input_sizes"],  # (batch_size, 2)
            **thresholds,  # (batch_size,)
            "guardrail_firing": segmentation.guardrail_firing,  # (batch_size, num_guardrails, sequence_length)
            "guardrails": [segmentation.guardrails] * len(images),
            "instruction": instructions,
        }

    def postprocess(
        self,
        outputs: dict[str, Any],
        **thresholds: float | None,
    ) -> dict[str, Any]:
        """Turn one sample's tensors into reasoning and segments."""
        instruction = outputs.pop("instruction")
        instruction = instruction[0] if isinstance(instruction, list) else instruction
        rules = outputs["guardrails"]
        outputs["guardrails"] = rules[0] if isinstance(rules, list) else rules
        for name in THRESHOLDS:
            outputs[name] = outputs[name].item()
        result = self.processor.post_process_segmentation(
            SimpleNamespace(**outputs),
            original_sizes=outputs["original_sizes"],
            reshaped_input_sizes=outputs["reshaped_input_sizes"],
            output_heatmaps=False,
            **thresholds,
        )[0]
        segments = [
            {
                "score": float(score),
                "label": instruction,
                "mask": Image.fromarray(torch.as_tensor(mask).to(torch.uint8).mul(255).numpy(), mode="L"),
                "slot": int(slot),
            }
            for score, mask, slot in zip(result["scores"], result["masks"], result["slots"], strict=True)
        ]
        held = {"guardrails": result["guardrails"]} if "guardrails" in result else {}
        return {"reasoning": result["reasoning"], "segments": segments} | held

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save model, processor and this file, loadable with `trust_remote_code=True` where the package is missing."""
        # The parts of the processor would be written on their own, and over the processor's files.
        parts = self.tokenizer, self.image_processor
        self.tokenizer = self.image_processor = None
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.tokenizer, self.image_processor = parts
        self.processor.save_pretrained(save_directory)


class _Rows(Dataset):
    """Samples that are read where they are needed; a worker process can be given them, unlike a generator."""

    def __init__(self, samples: Any, instructions: Any = None):
        self.samples, self.instructions = samples, instructions

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        sample = self.samples[index]
        return sample if self.instructions is None else _with_instruction(sample, self.instructions[index])


class _Stream(IterableDataset):
    """Samples of which nobody knows how many there are."""

    def __init__(self, samples: Iterable):
        self.samples = samples

    def __iter__(self) -> Iterator:
        return iter(self.samples)


class _PairedStream:
    """Samples and instructions that are read side by side."""

    def __init__(self, samples: Iterable, instructions: Iterable):
        self.samples, self.instructions = samples, instructions

    def __iter__(self) -> Iterator:
        nothing = object()
        for index, (sample, text) in enumerate(zip_longest(self.samples, self.instructions, fillvalue=nothing)):
            if sample is nothing or text is nothing:
                more = "instructions" if sample is nothing else "images"
                raise ValueError(f"there are {index} pairs, and then more {more}; pass one instruction per image.")
            yield _with_instruction(sample, text)


def _collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return samples[0] if len(samples) == 1 else {name: [sample[name] for sample in samples] for name in samples[0]}


def _several(inputs: Any) -> Any:
    """What holds several samples (or instructions), as a list, a sequence to be read by index, or an iterable; `None`
    for one."""
    if isinstance(inputs, (np.ndarray, torch.Tensor)):
        return list(inputs) if inputs.ndim in (1, 4) else None  # (samples,) or (samples, height, width, channels)
    if isinstance(inputs, (str, bytes, bytearray, os.PathLike, io.IOBase, Mapping, Image.Image)):
        return None
    if isinstance(inputs, (list, tuple)):
        return list(inputs)
    if isinstance(inputs, Sized):
        by_index = isinstance(inputs, (Sequence, Dataset)) or type(inputs).__module__.startswith("datasets.")
        return inputs if by_index else list(cast(Iterable, inputs))
    return inputs if isinstance(inputs, Iterable) else None


def _pair(samples: Any, instructions: Any) -> Any:
    """Every sample with its instruction, in the form of `samples`.

    Raises:
        ValueError: There are not as many of one as of the other.
    """
    if not isinstance(samples, Sized):
        pairs = _PairedStream(samples, instructions)
        return iter(pairs) if isinstance(samples, Iterator) or isinstance(instructions, Iterator) else pairs
    more = ""
    if not isinstance(instructions, Sized):
        instructions = list(islice(instructions, len(samples) + 1))
        more = " or more" if len(instructions) > len(samples) else ""
    if len(samples) != len(instructions):
        raise ValueError(
            f"got {len(samples)} images and {len(instructions)}{more} instructions; pass one instruction for all "
            "images, or as many as there are images."
        )
    if isinstance(samples, list):
        return [_with_instruction(sample, text) for sample, text in zip(samples, instructions, strict=True)]
    return _Rows(samples, instructions)


def _with_instruction(sample: Any, instruction: Any) -> Mapping:
    is_row = isinstance(sample, Mapping) and not _is_encoded_image(sample)
    return {"instruction": instruction, **(sample if is_row else {"image": sample})}


def _is_encoded_image(sample: Mapping) -> bool:
    """Whether a dictionary is an image of `datasets` that has not been decoded."""
    return "image" not in sample and ("bytes" in sample or "path" in sample)


__all__ = ["ReasoningSegmentationPipeline"]
