# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What a request of the endpoint holds, read and checked: parameters, instructions, images, URLs.

Lies beside `handler.py`, here and in the folder of a checkpoint.
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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from PIL import Image, ImageOps

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


def parse_request(data: Any, limits: Limits) -> tuple[list[Any], dict[str, Any]]:
    """Inputs of a request, unread, and its checked parameters.

    Raises:
        RequestError: It is none, or a parameter is unknown or out of bounds.
    """
    if not isinstance(data, dict) or "inputs" not in data:
        raise RequestError(400, 'a request is {"inputs": {"image": ..., "instruction": ...}, "parameters": {}}.')
    parameters, inputs = _check_parameters(data.get("parameters"), limits), data["inputs"]
    instruction = parameters.pop("instruction", None)
    if isinstance(inputs, list) and not 1 <= len(inputs) <= limits.batch:
        raise RequestError(400, f"got {len(inputs)} inputs; expected 1 to {limits.batch} in a request.")
    inputs = inputs if isinstance(inputs, list) else [inputs]
    return [_with_instruction(sample, instruction) for sample in inputs], parameters


def _with_instruction(sample: Any, instruction: str | None) -> Any:
    """A bare image with the instruction of the parameters, which is how an endpoint passes on an image's own bytes."""
    if isinstance(sample, dict):
        return {"instruction": instruction, **sample} if instruction is not None else sample
    return {"image": sample, "instruction": instruction}


def check_instruction(sample: dict[str, Any], limits: Limits) -> None:
    """Check an input's instruction, and that nothing stands beside it but an image.

    Raises:
        RequestError: The instruction is missing, too long or no text, or there is another field.
    """
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


def _check_parameters(parameters: Any, limits: Limits) -> dict[str, Any]:
    if not isinstance(parameters, dict | None):
        raise RequestError(400, f"parameters is a {type(parameters).__name__}; expected an object.")
    checks, checked = _checks(limits), {}
    for name, value in (parameters or {}).items():
        if name not in checks:
            raise RequestError(400, f"the parameter {str(name)[:50]!r} is not known.")
        value = [value] if name in ("forbid", "require") and isinstance(value, str) else value
        is_right, expected = checks[name]
        if not is_right(value):
            raise RequestError(400, f"{name} is {str(value)[:50]!r}; expected {expected}.")
        checked[name] = value
    return checked


def _checks(limits: Limits) -> dict[str, tuple[Callable[[Any], bool], str]]:
    """Name of every parameter -> what it has to be, as a test and in words."""

    def whole(lowest: int, highest: int) -> tuple[Callable[[Any], bool], str]:
        is_right = lambda value: type(value) is int and lowest <= value <= highest  # noqa: E731
        return is_right, f"a whole number from {lowest} to {highest}"

    def are_names(value: Any) -> bool:
        return isinstance(value, list) and len(value) <= limits.concepts and all(isinstance(v, str) for v in value)

    names = (are_names, f"a list of at most {limits.concepts} names")
    return {
        **dict.fromkeys(THRESHOLDS, (_is_number, "a finite number")),
        "max_new_tokens": whole(1, limits.new_tokens),
        "votes": whole(2, limits.votes),
        "mask_format": (MASK_FORMATS.__contains__, f"one of {', '.join(MASK_FORMATS)}"),
        "reasoning": (REASONING.__contains__, f"one of {', '.join(REASONING)}"),
        "forbid": names,
        "require": names,
        "instruction": (lambda value: isinstance(value, str), "a text"),
    }


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e6  # NaN compares false


def read_image(image: Any, limits: Limits) -> Image.Image:
    """Decode an image: base64, the bytes of a file, or one that is open.

    Raises:
        RequestError: It cannot be read, or is too large.
    """
    if isinstance(image, str):
        image = _decode_base64(image, limits)
    if not isinstance(image, (bytes, bytearray, memoryview, Image.Image)):
        raise RequestError(
            400, f"image is a {type(image).__name__}; expected base64, a URL, or the bytes of an image file."
        )
    if not isinstance(image, Image.Image) and len(image) > limits.image_bytes:
        raise RequestError(413, f"the image has {len(image)} bytes; at most {limits.image_bytes} are read.")
    try:
        if not isinstance(image, Image.Image):
            image = Image.open(io.BytesIO(image), formats=FORMATS)
        elif image.format not in (None, "MPO", *FORMATS):  # opened elsewhere, but decoded here
            raise RequestError(400, f"the image is of format {image.format}; expected {', '.join(FORMATS)}.")
        return _checked_image(image, limits)
    except RequestError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # before we see its size
        raise RequestError(413, f"the image is too large; at most {limits.image_pixels} pixels are read.") from error
    except Exception as error:  # PIL's readers raise many kinds on damaged files
        raise RequestError(400, f"the image cannot be read; expected {', '.join(FORMATS)}.") from error


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
