# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Inference Endpoint for SegCompass; lies beside a checkpoint with `handler_inputs.py`, and needs transformers only.

Request: `{"inputs": {"image": ..., "instruction": "..."}, "parameters": {...}}`; `inputs` may be a list. An image is
base64 (also as a `data:` URL), an `http(s)` URL, bytes or a PIL image. Parameters: `mask_format` (`rle`, `png`),
`reasoning` (`full`, `short`, `none`), `max_new_tokens`, `slot_logit_threshold`, `mask_logit_threshold`,
`duplicate_iou_threshold`, `forbid` and `require` (names of concepts that no mask may show, or that every mask has to),
`votes` (sample so many answers and return what they agree on).

Answer: `{"reasoning", "text", "size": [H, W], "segments": [{"slot", "score", "mask"}]}`, where something is forbidden
or required also `guardrails`, a list of what was left out or is missing and why; or
`{"error": {"status": 4xx or 5xx, "message": ...}}`; of a list a list, where one bad input leaves the others alone.
"""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor
from transformers.utils import logging

try:
    from .handler_inputs import THRESHOLDS, Limits, RequestError, check_instruction, fetch, parse_request, read_image
except ImportError:  # beside a checkpoint, in the folder that an Inference Endpoint puts on its path
    from handler_inputs import THRESHOLDS, Limits, RequestError, check_instruction, fetch, parse_request, read_image

logger = logging.get_logger(__name__)


def refusal(error: Exception, request: str = "") -> dict[str, Any]:
    """What is answered where an error is; faults of ours, with the `request`'s name, are told to the log only."""
    status, message = getattr(error, "status", 500), str(error)
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        status, message = 503, "the accelerator is out of memory; send a smaller request, or later."
    elif not isinstance(error, RequestError):
        logger.error("request %s failed", request or "without a name", exc_info=error)
        status, message = 500, "the request failed for a reason that is in the server's log."
    return {"error": {"status": status, "message": message}}


@dataclass
class Question:
    """One input, read and checked.

    Args:
        image (`PIL.Image.Image`): Upright, of a harmless size.
        instruction (`str`): What to find.
        settings (`dict`): Parameters of the model's answer; questions of equal ones can be answered together.
        mask_format (`str`): One of `MASK_FORMATS`.
        request (`str`): What the log calls the request.
    """

    image: Image.Image
    instruction: str
    settings: dict[str, Any]
    mask_format: str = "rle"
    request: str = ""

    @property
    def num_rows(self) -> int:
        """How many answers the model writes for it."""
        return self.settings.get("votes", 1)


class RequestHandler:
    """Answers requests with a SegCompass model; safe to call from many threads, and never raises.

    Args:
        model (`SegCompassForReasoningSegmentation`): In evaluation mode, where it is to compute.
        processor (`SegCompassProcessor`): Of the model.
        limits ([`Limits`], *optional*): What a request may cost.
        forbid, require (`Sequence[str]`, *optional*): Concepts that no mask of any answer may show, or has to show;
            a request can only add to them.

    Raises:
        ValueError: The checkpoint's concept dictionary does not know a concept.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        limits: Limits | None = None,
        forbid: Sequence[str] = (),
        require: Sequence[str] = (),
    ):
        self.model, self.processor, self.limits = model, processor, limits or Limits()
        self.guardrails = {"forbid": list(forbid), "require": list(require)}
        self.model.guardrails(**self.guardrails)  # an unknown name shows at the start
        self._decoding = threading.BoundedSemaphore(self.limits.decoding)
        self._fetching = threading.BoundedSemaphore(self.limits.fetching)
        # One thread computes: each thread that enters torch keeps a pool of threads and an arena of memory of its own.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="segcompass")

    def __call__(self, data: Any) -> dict[str, Any] | list[dict[str, Any]]:
        """Answer a request; see the head of this file."""
        try:
            inputs, parameters = parse_request(data, self.limits)
        except Exception as error:
            return refusal(error)
        answers = [self._answer(sample, parameters) for sample in inputs]
        return answers if isinstance(data["inputs"], list) else answers[0]

    def _answer(self, sample: Any, parameters: dict[str, Any]) -> dict[str, Any]:
        try:
            sample = self.fetch(sample)
            with self._decoding:  # bounds the images in memory; held until the answer is there
                return self.submit([self.question(sample, parameters)]).result()[0]
        except Exception as error:
            return refusal(error)

    def fetch(self, sample: dict[str, Any]) -> dict[str, Any]:
        """An input with a good instruction, and with the bytes where its image is a URL.

        Raises:
            RequestError: The instruction is missing or too long, or the URL cannot or may not be read.
        """
        check_instruction(sample, self.limits)
        source = sample.get("image")
        if isinstance(source, str) and source[:8].lower().startswith(("http://", "https://")):
            with self._fetching:
                source = fetch(source, self.limits)
        return sample | {"image": source}

    def question(self, sample: dict[str, Any], parameters: dict[str, Any], request: str = "") -> Question:
        """An input of [`fetch`] with its image decoded.

        Raises:
            RequestError: The image cannot be read or is too large.
        """
        settings = dict(parameters)
        mask_format = settings.pop("mask_format", "rle")
        image = read_image(sample["image"], self.limits)
        return Question(image, sample["instruction"], settings, mask_format, request)

    def submit(self, questions: Sequence[Question]) -> Future[list[dict[str, Any]]]:
        """Have questions of equal settings answered in one call of the model. What one of them is refused for leaves
        the others alone: their answers are what they are without it."""
        return self._worker.submit(self._answer_together, list(questions))

    def _answer_together(self, questions: list[Question]) -> list[dict[str, Any]]:
        try:
            return self._segment(questions)
        except Exception as error:
            refused = refusal(error, ", ".join(question.request for question in questions))
        if len(questions) == 1:
            return [refused]
        return [self._answer_together([question])[0] for question in questions]  # alone it shows whose fault it is

    @torch.no_grad()
    def _segment(self, questions: list[Question]) -> list[dict[str, Any]]:
        settings, processor = dict(questions[0].settings), self.processor
        thresholds = {name: settings.pop(name) for name in THRESHOLDS if name in settings}
        rules = {name: [*own, *settings.pop(name, [])] for name, own in self.guardrails.items()}
        images, instructions = [one.image for one in questions], [one.instruction for one in questions]
        try:
            inputs = processor(images=images, instruction=instructions, return_tensors="pt").to(self.model.device)
            output = self.model.segment(**inputs, **settings, **rules)
            sizes = {name: inputs[name].cpu() for name in ("original_sizes", "reshaped_input_sizes")}
            results = processor.post_process_segmentation(output, **sizes, **thresholds, output_heatmaps=False)
        except ValueError as error:
            raise RequestError(422, str(error)) from error
        return [_written(question, result) for question, result in zip(questions, results, strict=True)]


class EndpointHandler(RequestHandler):
    """What an Inference Endpoint makes of the folder that this file lies in.

    Args:
        path (`str`): Folder (or Hub id) of the checkpoint.
        device (`str`, *optional*): The GPU where there is one.
        limits, forbid, require: As for [`RequestHandler`].
    """

    def __init__(
        self,
        path: str = "",
        limits: Limits | None = None,
        device: str | None = None,
        forbid: Sequence[str] = (),
        require: Sequence[str] = (),
    ):
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        # the path is the operator's own checkpoint, and so is the code beside it
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
        dtype = {"dtype": torch.float32} if device == "cpu" else {}
        model = AutoModel.from_pretrained(path, trust_remote_code=True, **dtype)
        super().__init__(model.to(device).eval(), processor, limits, forbid, require)


def _written(question: Question, result: dict[str, Any]) -> dict[str, Any]:
    """An answer as it is sent."""
    found = zip(result["slots"].tolist(), result["scores"].tolist(), result["masks"], strict=True)
    encode = _ENCODERS[question.mask_format]
    segments = [{"slot": slot, "score": score, "mask": encode(mask.numpy())} for slot, score, mask in found]
    held = {"guardrails": result["guardrails"]} if "guardrails" in result else {}
    size = [question.image.height, question.image.width]
    return {"reasoning": result["reasoning"], "text": result["text"], "size": size, "segments": segments} | held


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """COCO's compressed run lengths of a mask `(H, W)`: column by column, each count as the difference to the count
    two before, in groups of five bits from ASCII 48 on."""
    flat = np.asarray(mask, dtype=bool).T.ravel()
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    counts = [0, *counts] if flat.size and flat[0] else counts
    text = bytearray()
    for index, count in enumerate(counts):
        value = count - counts[index - 2] if index > 2 else count
        while True:
            bits, value = value & 31, value >> 5
            last = value == (-1 if bits & 16 else 0)
            text.append((bits if last else bits | 32) + 48)
            if last:
                break
    return {"size": list(mask.shape), "counts": text.decode("ascii")}


def encode_png(mask: np.ndarray) -> str:
    """Base64 of a PNG of mode `L`, 255 inside."""
    file = io.BytesIO()
    Image.fromarray(np.asarray(mask, dtype=np.uint8) * 255).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


_ENCODERS = {"rle": encode_rle, "png": encode_png}
