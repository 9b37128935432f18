# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What the tests of the endpoint share: requests, what the model itself answers, and a running server."""

import base64
import contextlib
import http.client
import io
import json
import threading
import time
from types import SimpleNamespace

import pytest

from segcompass_hf.data.schema import encode_mask
from segcompass_hf.hub.endpoint.handler import RequestHandler
from segcompass_hf.hub.endpoint.handler_inputs import RequestError

FAST = {"reasoning": "none"}
JSON = {"Content-Type": "application/json"}


def as_png(image, size=None) -> bytes:
    file = io.BytesIO()
    (image if size is None else image.resize(size)).save(file, "PNG")
    return file.getvalue()


def as_base64(image) -> str:
    return base64.b64encode(as_png(image)).decode()


def request(row, **parameters) -> dict:
    sample = {"image": as_base64(row["image"]), "instruction": row["instruction"]}
    return {"inputs": sample, "parameters": FAST | parameters}


def directly(handler, row, reasoning="none") -> dict:
    """What the model itself answers, with the package's own run lengths."""
    inputs = handler.processor(images=row["image"], instruction=row["instruction"], return_tensors="pt")
    answer = handler.model.segment(**inputs, reasoning=reasoning)
    sizes = {name: inputs[name] for name in ("original_sizes", "reshaped_input_sizes")}
    result = handler.processor.post_process_segmentation(answer, **sizes)[0]
    masks = [encode_mask(mask.numpy()) for mask in result["masks"]]
    found = zip(result["slots"].tolist(), result["scores"].tolist(), masks, strict=True)
    segments = [{"slot": slot, "score": score, "mask": mask} for slot, score, mask in found]
    size = list(row["image"].size[::-1])
    return {"reasoning": result["reasoning"], "text": result["text"], "size": size, "segments": segments}


def assert_same(answer: dict, expected: dict) -> None:
    """Equal, but for the last digits of scores: sums depend on how many rows are computed at a time."""
    scores = [[segment["score"] for segment in one["segments"]] for one in (answer, expected)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    without = [
        one | {"segments": [segment | {"score": 0} for segment in one["segments"]]} for one in (answer, expected)
    ]
    assert without[0] == without[1]


class StandIn(RequestHandler):
    """Answers with the instruction, of batches that it notes; while `go` is not set the model computes.

    An instruction of `poison` fails, one of `refuse` is refused, either with its whole batch.
    """

    def __init__(self, limits=None):
        super().__init__(SimpleNamespace(guardrails=lambda **rules: ()), None, limits)
        self.batches: list[list[str]] = []
        self.go = threading.Event()
        self.go.set()

    def _segment(self, questions):
        instructions = [question.instruction for question in questions]
        self.batches.append(instructions)
        assert self.go.wait(60)
        if "poison" in instructions:
            raise RuntimeError("a secret path")
        if "refuse" in instructions:
            raise RequestError(422, "refused")
        return [{"reasoning": "", "text": text, "size": [8, 8], "segments": []} for text in instructions]


class Running:
    """A server in a thread, on a free port of loopback."""

    def __init__(self, handler, **limits):
        from segcompass_hf.hub.endpoint.server import Server, bind
        from segcompass_hf.hub.endpoint.service import ServerLimits

        self.listener = bind("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        self.server = Server(handler, ServerLimits(**limits))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True)
        self.thread.start()

    def send(self, body=None, path="/", headers=None) -> tuple[int, dict, dict]:
        """Status, answer and headers, those in lower case; GET without a body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            method = "GET" if body is None else "POST"
            body = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, body, headers or JSON)
            response = connection.getresponse()
            content = response.read()
            found = {name.lower(): value for name, value in response.getheaders()}
            is_json = found.get("content-type", "").startswith("application/json")
            return response.status, json.loads(content) if is_json else content.decode(), found

    def metric(self, line: str) -> float:
        """The value of a line of the metrics, such as `segcompass_ready`; 0 where there is none."""
        values = dict(text.rsplit(" ", 1) for text in self.send(path="/metrics")[1].splitlines() if text[0] != "#")
        return float(values.get(line, 0))


@contextlib.contextmanager
def serving(handler, **limits):
    """A [`Running`] server that is ready."""
    running = Running(handler, **limits)
    try:
        until(lambda: running.server.service.warm)
        yield running
    finally:
        running.server.should_exit = True
        running.thread.join(30)
        assert not running.thread.is_alive()


def until(is_so, seconds: float = 60) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not come to be so"
        time.sleep(0.01)
