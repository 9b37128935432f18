# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Inference Endpoint for SegCompass. This one file lies beside a checkpoint and needs transformers only.

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
import binascii
import http.client
import io
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoModel, AutoProcessor
from transformers.utils import logging

logger = logging.get_logger(__name__)

_KEPT = "/%:=&?~+!$,;'@()*[]"  # characters of a URL that are sent as they are
_PLAIN_ALPHABET = bytes.maketrans(b"-_", b"+/")  # of base64 for URLs
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MASK_FORMATS, REASONING = ("rle", "png"), ("full", "short", "none")
THRESHOLDS = ("slot_logit_threshold", "mask_logit_threshold", "duplicate_iou_threshold")
_NAT64, _UNICAST = ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("2000::/3")
_CLOUD_SERVICES = ("168.63.129.16",)  # Azure's, on a public address that only its machines reach


@dataclass
class Limits:
    """What one request may cost.

    Args:
        image_bytes (`int`): Of an image file.
        image_pixels (`int`): Width times height; 12 million are a 4,000 x 3,000 photograph.
        batch (`int`): Inputs of a request.
        instruction (`int`): Characters.
        new_tokens (`int`): Of an answer.
        concepts (`int`): That a request may forbid, and require.
        votes (`int`): Answers that a request may have sampled.
        fetch_seconds (`float`): For one URL, redirects included.
        redirects (`int`): Of one URL.
        ports (`tuple[int, ...]`): That a URL may name.
        decoding (`int`): Images in memory at the same time; further requests wait.
        fetching (`int`): URLs read at the same time.
    """

    image_bytes: int = 10_000_000
    image_pixels: int = 12_000_000
    batch: int = 8
    instruction: int = 2_000
    new_tokens: int = 1_024
    concepts: int = 32
    votes: int = 8
    fetch_seconds: float = 10.0
    redirects: int = 3
    ports: tuple[int, ...] = (80, 443)
    decoding: int = 4
    fetching: int = 16


class RequestError(Exception):
    """A request that cannot be answered, and whose fault it is (`status`, as of HTTP)."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status

    def to_dict(self) -> dict[str, Any]:
        return {"error": {"status": self.status, "message": str(self)}}


class EndpointHandler:
    """Answers requests with a SegCompass checkpoint; safe to call from many threads, and never raises.

    Args:
        path (`str`): Folder (or Hub id) of the checkpoint.
        limits ([`Limits`], *optional*): What a request may cost.
        device (`str`, *optional*): The GPU where there is one.
        forbid, require (`Sequence[str]`, *optional*): Concepts that no mask of any answer may show, or has to show;
            a request can only add to them.

    Raises:
        ValueError: The checkpoint's concept dictionary does not know a concept.
    """

    def __init__(
        self,
        path: str = "",
        limits: Limits | None = None,
        device: str | None = None,
        forbid: Sequence[str] = (),
        require: Sequence[str] = (),
    ):
        self.guardrails = {"forbid": list(forbid), "require": list(require)}
        self.limits = limits or Limits()
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        # the path is the operator's own checkpoint, and so is the code beside it
        self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
        model = AutoModel.from_pretrained(
            path, trust_remote_code=True, **({"dtype": torch.float32} if self.device == "cpu" else {})
        )
        self.model = model.to(self.device).eval()
        self.model.guardrails(**self.guardrails)  # an unknown name shows at the start
        self._decoding = threading.BoundedSemaphore(self.limits.decoding)
        self._fetching = threading.BoundedSemaphore(self.limits.fetching)
        # One thread computes: each thread that enters torch keeps a pool of threads and an arena of memory of its own.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="segcompass")

    def __call__(self, data: Any) -> dict[str, Any] | list[dict[str, Any]]:
        """Answer a request; see the head of this file."""
        try:
            inputs, parameters = self._parse(data)
        except RequestError as error:
            return error.to_dict()
        except Exception:
            logger.exception("a request could not be read")
            return RequestError(500, "the request could not be read").to_dict()
        if isinstance(inputs, list):
            return [self._answer(sample, parameters) for sample in inputs]
        return self._answer(inputs, parameters)

    def _parse(self, data: Any) -> tuple[Any, dict[str, Any]]:
        if not isinstance(data, dict) or "inputs" not in data:
            raise RequestError(400, 'a request is {"inputs": {"image": ..., "instruction": ...}, "parameters": {}}.')
        parameters = _check_parameters(data.get("parameters"), self.limits)
        inputs, instruction = data["inputs"], parameters.pop("instruction", None)
        if isinstance(inputs, list):
            if not 1 <= len(inputs) <= self.limits.batch:
                raise RequestError(400, f"got {len(inputs)} inputs; expected 1 to {self.limits.batch} in a request.")
            return [_with_instruction(sample, instruction) for sample in inputs], parameters
        return _with_instruction(inputs, instruction), parameters

    def _answer(self, sample: Any, parameters: dict[str, Any]) -> dict[str, Any]:
        try:
            instruction = _check_instruction(sample, self.limits)
            source = sample.get("image")
            if isinstance(source, str) and source[:8].lower().startswith(("http://", "https://")):
                with self._fetching:
                    source = fetch(source, self.limits)
            with self._decoding:  # bounds the images in memory; held until the answer is there
                image = self._read_image(source)
                return self._worker.submit(self._segment, image, instruction, dict(parameters)).result()
        except RequestError as error:
            return error.to_dict()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return RequestError(503, "the accelerator is out of memory; send a smaller request, or later.").to_dict()
        except Exception:
            logger.exception("a request failed")
            return RequestError(500, "the request failed for a reason that is in the server's log.").to_dict()

    def _read_image(self, image: Any) -> Image.Image:
        if isinstance(image, str):
            image = _decode_base64(image, self.limits)
        if not isinstance(image, (bytes, bytearray, memoryview, Image.Image)):
            raise RequestError(
                400, f"image is a {type(image).__name__}; expected base64, a URL, or the bytes of an image file."
            )
        if not isinstance(image, Image.Image) and len(image) > self.limits.image_bytes:
            raise RequestError(413, f"the image has {len(image)} bytes; at most {self.limits.image_bytes} are read.")
        try:
            if not isinstance(image, Image.Image):
                image = Image.open(io.BytesIO(image), formats=FORMATS)
            elif image.format not in (None, "MPO", *FORMATS):  # opened elsewhere, but decoded here
                raise RequestError(400, f"the image is of format {image.format}; expected {', '.join(FORMATS)}.")
            return _checked_image(image, self.limits)
        except RequestError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # before we see its size
            limit = self.limits.image_pixels
            raise RequestError(413, f"the image is too large; at most {limit} pixels are read.") from error
        except Exception as error:  # PIL's readers raise many kinds on damaged files
            raise RequestError(400, f"the image cannot be read; expected {', '.join(FORMATS)}.") from error

    @torch.no_grad()
    def _segment(self, image: Image.Image, instruction: str, parameters: dict[str, Any]) -> dict[str, Any]:
        mask_format = parameters.pop("mask_format", "rle")
        thresholds = {name: parameters.pop(name) for name in THRESHOLDS if name in parameters}
        rules = {name: [*own, *parameters.pop(name, [])] for name, own in self.guardrails.items()}
        try:
            inputs = self.processor(images=image, instruction=instruction, return_tensors="pt").to(self.device)
            answer = self.model.segment(**inputs, **parameters, **rules)
            sizes = {name: inputs[name].cpu() for name in ("original_sizes", "reshaped_input_sizes")}
            kept = self.processor.post_process_segmentation(answer, **sizes, **thresholds, output_heatmaps=False)[0]
        except ValueError as error:
            raise RequestError(422, str(error)) from error
        segments = [
            {"slot": slot, "score": score, "mask": _ENCODERS[mask_format](mask.numpy())}
            for slot, score, mask in zip(kept["slots"].tolist(), kept["scores"].tolist(), kept["masks"], strict=True)
        ]
        size = [image.height, image.width]
        held = {"guardrails": kept["guardrails"]} if "guardrails" in kept else {}
        return {"reasoning": kept["reasoning"], "text": kept["text"], "size": size, "segments": segments} | held


def _with_instruction(sample: Any, instruction: str | None) -> Any:
    """A bare image with the instruction of the parameters, which is how an endpoint passes on an image's own bytes."""
    if isinstance(sample, dict):
        return {"instruction": instruction, **sample} if instruction is not None else sample
    return {"image": sample, "instruction": instruction}


def _check_instruction(sample: dict[str, Any], limits: Limits) -> str:
    instruction = sample.get("instruction")
    if not isinstance(instruction, str) or not instruction.strip():
        raise RequestError(400, "the instruction is missing; say in words what to find.")
    if len(instruction) > limits.instruction:
        raise RequestError(413, f"the instruction has {len(instruction)} characters; at most {limits.instruction}.")
    try:
        instruction.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        raise RequestError(400, "the instruction is not valid Unicode.") from error
    if unknown := sorted(map(str, sample.keys() - {"image", "instruction"})):
        raise RequestError(400, f"an input has an image and an instruction; got also {', '.join(unknown)[:100]}.")
    return instruction


def _check_parameters(parameters: Any, limits: Limits) -> dict[str, Any]:
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise RequestError(400, f"parameters is a {type(parameters).__name__}; expected an object.")
    checked = {}
    for name, value in parameters.items():
        if name in THRESHOLDS:
            ok, expected = _is_number(value), "a finite number"
        elif name == "max_new_tokens":
            ok = type(value) is int and 1 <= value <= limits.new_tokens
            expected = f"a whole number from 1 to {limits.new_tokens}"
        elif name in ("mask_format", "reasoning"):
            choices = MASK_FORMATS if name == "mask_format" else REASONING
            ok, expected = value in choices, f"one of {', '.join(choices)}"
        elif name == "votes":
            ok = type(value) is int and 2 <= value <= limits.votes
            expected = f"a whole number from 2 to {limits.votes}"
        elif name in ("forbid", "require"):
            value = [value] if isinstance(value, str) else value
            ok = isinstance(value, list) and len(value) <= limits.concepts and all(isinstance(v, str) for v in value)
            expected = f"a list of at most {limits.concepts} names"
        elif name == "instruction":
            ok, expected = isinstance(value, str), "a text"
        else:
            raise RequestError(400, f"the parameter {str(name)[:50]!r} is not known.")
        if not ok:
            raise RequestError(400, f"{name} is {str(value)[:50]!r}; expected {expected}.")
        checked[name] = value
    return checked


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e6  # NaN compares false


def _decode_base64(text: str, limits: Limits) -> bytes:
    """Base64 as tools write it: in lines or one, in the alphabet for files or for URLs, padded or not."""
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise RequestError(400, "a data URL must be base64: data:image/png;base64,....")
    try:
        data = text.encode("ascii").translate(_PLAIN_ALPHABET, b" \t\r\n")
        if len(data) > limits.image_bytes * 4 // 3 + 4:
            size = len(data) * 3 // 4
            raise RequestError(413, f"the image has {size} bytes; at most {limits.image_bytes} are read.")
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(400, "the image is neither base64 nor an http(s) URL.") from error


def _checked_image(image: Image.Image, limits: Limits) -> Image.Image:
    """The image upright, once its size is known to be harmless; the processor makes RGB of it."""
    width, height = image.size
    if width * height > limits.image_pixels or min(width, height) == 0:
        raise RequestError(413, f"the image is {width} x {height}; at most {limits.image_pixels} pixels are read.")
    image.load()
    return ImageOps.exif_transpose(image)


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


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, also when it is wrapped in another."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            inner = ipaddress.ip_address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip not in _UNICAST:
            return False
    return ip.is_global and not ip.is_multicast and str(ip) not in _CLOUD_SERVICES


def resolve(host: str, port: int) -> str:
    """One address of a host, if all of them are public; the connection goes to it and not to the name, which could
    stand for another address a moment later."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise RequestError(400, "the URL's host cannot be found.") from error
    addresses = [entry[4][0] for entry in found]
    if not addresses or not all(is_public(address) for address in addresses):
        raise RequestError(400, "the URL's host is not on the public internet.")
    return addresses[0]


def fetch(url: str, limits: Limits) -> bytes:
    """Read a URL of the public internet: addresses, redirects, time and size are checked."""
    deadline = time.monotonic() + limits.fetch_seconds
    for _ in range(limits.redirects + 1):
        try:
            target, content = _fetch_once(url, limits, deadline)
            url = urljoin(url, target or "")  # a redirect may name what is no URL
        except (OSError, http.client.HTTPException, ValueError) as error:  # ssl.SSLError is an OSError
            late = time.monotonic() >= deadline
            reason = f"took more than {limits.fetch_seconds:g} seconds" if late else "cannot be read"
            raise RequestError(400, f"the URL {reason}.") from error
        if target is None:
            return content
    raise RequestError(400, f"the URL redirects more than {limits.redirects} times.")


def _fetch_once(url: str, limits: Limits, deadline: float) -> tuple[str | None, bytes]:
    """Where a URL redirects to, or its content."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
        raise RequestError(400, "a URL is http(s)://host/path, without user name.")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if port not in limits.ports:
        raise RequestError(400, f"the URL names port {port}; only {', '.join(map(str, limits.ports))} are read.")
    connection = http.client.HTTPConnection(parts.hostname, port)
    left = max(0.1, deadline - time.monotonic())
    opened = [socket.create_connection((resolve(parts.hostname, port), port), left)]
    watchdog = threading.Timer(max(0.1, deadline - time.monotonic()), _shut, (opened,))  # against a byte at a time
    watchdog.daemon = True
    watchdog.start()
    try:
        if parts.scheme == "https":
            context, raw = ssl.create_default_context(), opened[0]
            opened[0] = context.wrap_socket(raw, server_hostname=parts.hostname, do_handshake_on_connect=False)
            opened[0].do_handshake()
        connection.sock = opened[0]
        return _read_response(connection, parts, limits, deadline)
    finally:
        watchdog.cancel()
        connection.close()
        opened[0].close()


def _read_response(
    connection: http.client.HTTPConnection, parts: SplitResult, limits: Limits, deadline: float
) -> tuple[str | None, bytes]:
    host = parts.hostname.encode("idna").decode("ascii") if not parts.hostname.isascii() else parts.hostname
    host = f"[{host}]" if ":" in host else host
    path = quote(parts.path or "/", safe=_KEPT) + (f"?{quote(parts.query, safe=_KEPT)}" if parts.query else "")
    headers = {"Host": host if parts.port is None else f"{host}:{parts.port}", "Accept": "image/*"}
    connection.request("GET", path, headers=headers | {"User-Agent": "segcompass-endpoint", "Connection": "close"})
    response = connection.getresponse()
    if response.status in (301, 302, 303, 307, 308) and response.getheader("Location"):
        return response.getheader("Location"), b""
    if response.status != 200:
        raise RequestError(400, f"the URL answers with status {response.status}.")
    content = response.read(limits.image_bytes + 1)
    if len(content) > limits.image_bytes:
        raise RequestError(413, f"the URL's image has more than {limits.image_bytes} bytes.")
    if time.monotonic() >= deadline:
        raise TimeoutError
    return None, content


def _shut(opened: list[socket.socket]) -> None:
    """End a connection that another thread is reading."""
    try:
        socket.socket.shutdown(opened[0], socket.SHUT_RDWR)  # below TLS, whose own would wait for its lock
    except OSError:
        pass  # closed already
