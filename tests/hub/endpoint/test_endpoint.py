# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The endpoint: right answers, clear refusals, no way inside by URL, and nothing that stops it."""

import base64
import http.client
import io
import json
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import segcompass_hf
from segcompass_hf.data import scenes
from segcompass_hf.data.schema import decode_mask, encode_mask
from segcompass_hf.hub.endpoint import handler as endpoint
from segcompass_hf.hub.endpoint.handler import EndpointHandler, Limits, RequestError, encode_rle, fetch, is_public
from segcompass_hf.hub.endpoint.server import EndpointServer

FAST = {"reasoning": "none"}


@pytest.fixture(scope="module")
def rows():
    return list(scenes.iterate("val", 4, seed=0))


@pytest.fixture(scope="module")
def handler():
    return EndpointHandler(str(segcompass_hf.bundled_checkpoint()), device="cpu")


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


class TestMasks:
    def test_run_lengths_are_cocos(self):
        random = np.random.default_rng(0)
        cases = [np.zeros((3, 5)), np.ones((3, 5)), np.eye(4), np.tri(300, 200), random.random((70, 50)) > 0.5]
        cases += [np.indices((900, 700)).sum(0) > 800]  # counts beyond one and two groups of five bits, and negative
        for mask in cases:
            assert encode_rle(mask) == encode_mask(mask.astype(bool))
            np.testing.assert_array_equal(decode_mask(encode_rle(mask)), mask.astype(bool))


class TestAnswers:
    def test_same_as_the_model_itself(self, handler, rows):
        answers = [handler(request(row, reasoning="full")) for row in rows]
        assert answers == [directly(handler, row, "full") for row in rows]
        assert handler(request(rows[0])) == directly(handler, rows[0])
        assert sum(len(answer["segments"]) for answer in answers) >= 3
        json.dumps(answers, allow_nan=False)

    def test_every_way_to_send_an_image(self, handler, rows):
        row, data = rows[0], as_png(rows[0]["image"])
        expected, encoded = handler(request(row)), base64.b64encode(data).decode()
        for image in (data, row["image"], f"data:image/png;base64,{encoded}", bytearray(data)):
            sample = {"image": image, "instruction": row["instruction"]}
            assert handler({"inputs": sample, "parameters": FAST}) == expected
        # as an endpoint passes on a request whose body is the image
        assert handler({"inputs": data, "parameters": FAST | {"instruction": row["instruction"]}}) == expected

    def test_grey_images_of_16_bits_are_those_of_8(self, handler, rows):
        row = next(row for row in rows if directly(handler, row, "full")["segments"])
        grey = np.asarray(row["image"].convert("L"))
        answers = []
        for image in (grey, grey.astype(np.uint16) * 257, grey.astype(np.int32) * 257):
            image = Image.fromarray(image)
            for sent in (image, as_base64(image)):
                sample = {"image": sent, "instruction": row["instruction"]}
                answers.append(handler({"inputs": sample, "parameters": {"slot_logit_threshold": -100}}))
        assert answers[0]["segments"] and all(answer == answers[0] for answer in answers)

    def test_transparent_and_turned_images(self, handler, rows):
        image, instruction = rows[0]["image"], rows[0]["instruction"]
        orientation = Image.Exif()
        orientation[0x0112] = 6  # stored on its side; to be turned clockwise
        turned = io.BytesIO()
        image.transpose(Image.Transpose.ROTATE_90).save(turned, "PNG", exif=orientation)
        clear = image.convert("RGBA")
        clear.paste((9, 9, 9, 0), (0, 0, 20, 20))
        white = image.copy()
        white.paste((255, 255, 255), (0, 0, 20, 20))
        for sent, expected in ((turned.getvalue(), image), (as_png(clear), white)):
            answer = handler({"inputs": {"image": sent, "instruction": instruction}, "parameters": FAST})
            assert answer == directly(handler, {"image": expected, "instruction": instruction})

    @pytest.mark.parametrize("way", ["lines", "a newline", "for urls", "unpadded", "data url in lines"])
    def test_base64_as_tools_write_it(self, handler, way):
        limits = Limits(image_bytes=3001)
        data = bytes(range(256)) * 11 + bytes(185)  # 3001 bytes: the last two groups of base64 are padding
        text = base64.b64encode(data).decode()
        sent = {
            "lines": base64.encodebytes(data).decode().replace("\n", "\r\n"),
            "a newline": text + "\n",
            "for urls": base64.urlsafe_b64encode(data).decode(),
            "unpadded": text.rstrip("="),
            "data url in lines": "data:image/png;base64," + base64.encodebytes(data).decode(),
        }[way]
        assert sent != text and len(text) - len(text.rstrip("=")) == 2
        assert endpoint._decode_base64(sent, limits) == data
        with pytest.raises(RequestError, match="at most 1000 are read") as caught:
            endpoint._decode_base64(sent, Limits(image_bytes=1000))
        assert caught.value.status == 413

    def test_png_masks_and_thresholds(self, handler, rows):
        row = next(row for row in rows if directly(handler, row, "full")["segments"])
        thinking = {"reasoning": "full"}
        found = handler(request(row, mask_format="png", **thinking))["segments"]
        for segment, expected in zip(found, directly(handler, row, "full")["segments"], strict=True):
            mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(segment["mask"])))) == 255
            np.testing.assert_array_equal(mask, decode_mask(expected["mask"]))
        every = {"slot_logit_threshold": -1e5, "duplicate_iou_threshold": 2.0}
        assert len(handler(request(row, **every))["segments"]) == handler.processor.num_slots
        assert handler(request(row, slot_logit_threshold=1e5))["segments"] == []
        small = handler(request(row, mask_logit_threshold=5, **thinking))["segments"][0]["mask"]
        assert decode_mask(small).sum() < decode_mask(directly(handler, row, "full")["segments"][0]["mask"]).sum()

    def test_one_bad_input_leaves_the_others_alone(self, handler, rows):
        good = [request(row)["inputs"] for row in rows[:2]]
        bad = {"image": "AAAA", "instruction": "red"}
        answers = handler({"inputs": [good[0], bad, good[1]], "parameters": FAST})
        assert [answers[0], answers[2]] == [directly(handler, row) for row in rows[:2]]
        assert answers[1]["error"]["status"] == 400


def as_header(width: int, height: int) -> bytes:
    """A PNG that says it is so large."""
    data = bytearray(as_png(Image.new("1", (1, 1))))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


PIXEL = base64.b64encode(as_png(Image.new("RGB", (8, 8)))).decode()
BAD = {
    "no object": ([], 400, "a request is"),
    "nothing": ({}, 400, "a request is"),
    "no instruction": ({"inputs": {"image": PIXEL}}, 400, "instruction is missing"),
    "an empty one": ({"inputs": {"image": PIXEL, "instruction": " "}}, 400, "instruction is missing"),
    "a long one": ({"inputs": {"image": PIXEL, "instruction": "a" * 2001}}, 413, "2001 characters"),
    "half a character": ({"inputs": {"image": PIXEL, "instruction": "\ud800"}}, 400, "not valid Unicode"),
    "another field": ({"inputs": {"image": PIXEL, "instruction": "a", "x": 1}}, 400, "got also x"),
    "no image": ({"inputs": {"instruction": "red"}}, 400, "image is a NoneType"),
    "a number": ({"inputs": {"image": 3, "instruction": "red"}}, 400, "image is a int"),
    "no base64": ({"inputs": {"image": "/etc/passwd.", "instruction": "red"}}, 400, "neither base64 nor"),
    "an open file of another format": (
        {
            "inputs": {
                "image": Image.open(io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")),
                "instruction": "a",
            }
        },
        400,
        "of format EPS; expected PNG",
    ),
    "an open file that is cut": (
        {
            "inputs": {
                "image": Image.open(io.BytesIO(as_png(Image.effect_noise((99, 99), 9))[:900])),
                "instruction": "a",
            }
        },
        400,
        "cannot be read",
    ),
    "no picture": ({"inputs": {"image": "AAAA", "instruction": "red"}}, 400, "cannot be read; expected PNG"),
    "a cut picture": ({"inputs": {"image": PIXEL[:60], "instruction": "red"}}, 400, "cannot be read"),
    "a bare data url": ({"inputs": {"image": "data:image/png,x", "instruction": "a"}}, 400, "must be base64"),
    "a file": ({"inputs": {"image": "file:///etc/passwd", "instruction": "a"}}, 400, "neither base64 nor"),
    "many": ({"inputs": [{}] * 9}, 400, "got 9 inputs"),
    "none": ({"inputs": []}, 400, "got 0 inputs"),
    "parameters": ({"inputs": PIXEL, "parameters": [1]}, 400, "parameters is a list"),
    "unknown": ({"inputs": PIXEL, "parameters": {"temperature": 1}}, 400, "'temperature' is not known"),
    "a format": ({"inputs": PIXEL, "parameters": {"mask_format": "svg"}}, 400, "one of rle, png"),
    "a list": ({"inputs": PIXEL, "parameters": {"reasoning": ["full"]}}, 400, "one of full, short, none"),
    "tokens": ({"inputs": PIXEL, "parameters": {"max_new_tokens": 10**9}}, 400, "from 1 to 1024"),
    "a bool": ({"inputs": PIXEL, "parameters": {"max_new_tokens": True}}, 400, "from 1 to 1024"),
    "nan": ({"inputs": PIXEL, "parameters": {"slot_logit_threshold": float("nan")}}, 400, "a finite number"),
    "few tokens": ({"inputs": {"image": PIXEL, "instruction": "a"}, "parameters": {"max_new_tokens": 1}}, 422, ""),
    "a strip": (
        {"inputs": {"image": as_png(Image.new("L", (900, 2))), "instruction": "a"}},
        422,
        "factor of at most 200",
    ),
    "large": ({"inputs": {"image": as_png(Image.new("1", (4000, 3001))), "instruction": "a"}}, 413, "4000 x 3001"),
    "very large": ({"inputs": {"image": as_header(10_000, 10_000), "instruction": "a"}}, 413, "at most 12000000"),
    "a bomb": ({"inputs": {"image": as_header(20_000, 20_000), "instruction": "a"}}, 413, "at most 12000000"),
    "heavy": ({"inputs": {"image": b"x" * 10_000_001, "instruction": "a"}}, 413, "10000001 bytes"),
    "heavy base64": ({"inputs": {"image": "A" * 13_400_000, "instruction": "a"}}, 413, "10050000 bytes"),
}


class TestRefusals:
    @pytest.mark.parametrize("case", BAD)
    def test_says_whose_fault_it_is(self, handler, case):
        data, status, message = BAD[case]
        error = handler(data)["error"]
        assert error["status"] == status and message in error["message"]

    def test_own_faults_stay_in_the_log(self, handler, rows, monkeypatch):
        def broken(*args, **kwargs):
            raise RuntimeError("a secret path")

        monkeypatch.setattr(handler.model, "segment", broken)
        error = handler(request(rows[0]))["error"]
        assert error["status"] == 500 and "secret" not in error["message"]
        monkeypatch.setattr(handler.model, "segment", lambda **_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
        assert handler(request(rows[0]))["error"]["status"] == 503
        monkeypatch.undo()
        assert handler(request(rows[0])) == directly(handler, rows[0])


class TestAddresses:
    @pytest.mark.parametrize("address", ["93.184.215.14", "8.8.8.8", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"])
    def test_public(self, address):
        assert is_public(address)

    @pytest.mark.parametrize(
        "address",
        ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"]
        + ["224.0.0.1", "255.255.255.255", "198.18.0.1", "192.0.2.1", "168.63.129.16", "::1", "::", "fe80::1%eth0"]
        + ["fc00::1", "fec0::1", "ff02::1", "2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1"]
        + ["64:ff9b::7f00:1", "64:ff9b:1::7f00:1", "2002:7f00:1::", "2002:a9fe:a9fe::1"],
    )
    def test_inside(self, address):
        assert not is_public(address)

    @pytest.mark.parametrize(
        "url,message",
        [
            ("http://127.0.0.1/a.png", "not on the public internet"),
            ("http://localhost/a.png", "not on the public internet"),
            ("http://2130706433/", "not on the public internet"),  # 127.0.0.1 as one number
            ("http://0x7f.1/", "not on the public internet"),
            ("http://0177.0.0.1/", "not on the public internet"),
            ("http://[::1]/", "not on the public internet"),
            ("http://[::ffff:169.254.169.254]/", "not on the public internet"),
            ("http://user:pw@example.com/", "without user name"),
            ("http://example.com:22/", "names port 22"),
            ("http://example.com:99999/", "cannot be read"),
            ("http:///a.png", "a URL is http"),
            ("http://[::1/", "cannot be read"),
            ("http://a..b/", "cannot be"),
        ],
    )
    def test_urls_that_lead_inside(self, url, message):
        with pytest.raises(RequestError, match=message) as caught:
            fetch(url, Limits())
        assert caught.value.status == 400

    def test_all_addresses_of_a_name_count(self, monkeypatch):
        two = [(2, 1, 6, "", ("93.184.215.14", 80)), (2, 1, 6, "", ("10.0.0.1", 80))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: two)
        with pytest.raises(RequestError, match="not on the public internet"):
            fetch("http://example.com/", Limits())

    def test_connects_to_the_address_that_was_checked(self, monkeypatch):
        """A name that stands for another address at its second look-up is looked up once."""
        answers = iter(["93.184.215.14", "127.0.0.1"])
        monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: [(2, 1, 6, "", (next(answers), 80))])
        connected = []

        def connect(address, timeout):
            connected.append(address)
            raise OSError

        monkeypatch.setattr(socket, "create_connection", connect)
        with pytest.raises(RequestError, match="cannot be read"):
            fetch("http://example.com/", Limits())
        assert connected == [("93.184.215.14", 80)]


class _Site(BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.path
        if path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", path[4:])
            self.end_headers()
        elif path == "/drip":
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.1)
        elif path in ("/a.png", "/large"):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.server.image if path == "/a.png" else b"x" * 3_000_000)
        else:
            self.send_error(404)

    def log_message(self, *args):
        pass


@pytest.fixture
def site(rows, monkeypatch):
    """A web site on loopback, under the public-looking name `site.example`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Site)
    server.image, server.daemon_threads, server.handle_error = as_png(rows[0]["image"]), True, lambda *a: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    real = endpoint.resolve
    monkeypatch.setattr(
        endpoint, "resolve", lambda host, port: "127.0.0.1" if host == "site.example" else real(host, port)
    )
    yield f"http://site.example:{server.server_port}", Limits(ports=(80, server.server_port), image_bytes=2_000_000)
    server.shutdown()


class TestFetching:
    def test_an_image_and_a_redirect_to_it(self, site, handler, rows, monkeypatch):
        url, limits = site
        monkeypatch.setattr(handler, "limits", limits)
        for path in ("/a.png", "/to//a.png"):
            sample = {"image": url + path, "instruction": rows[0]["instruction"]}
            assert handler({"inputs": sample, "parameters": FAST}) == directly(handler, rows[0])

    @pytest.mark.parametrize(
        "path,status,message",
        [
            ("/to/http://127.0.0.1/", 400, "not on the public internet"),
            ("/to/http://[::1]:80/", 400, "not on the public internet"),
            ("/to/file:///etc/passwd", 400, "a URL is http"),
            ("/to//to//to//to//a.png", 400, "redirects more than 3 times"),
            *((f"/to/http://{host}/a.png", 400, "cannot be read") for host in ("[::1", "[x]", "a:b", "a:99999")),
            ("/to///[/a.png", 400, "cannot be read"),
            ("/nothing", 400, "status 404"),
            ("/large", 413, "more than 2000000 bytes"),
        ],
    )
    def test_refused(self, site, path, status, message):
        with pytest.raises(RequestError, match=message) as caught:
            fetch(site[0] + path, site[1])
        assert caught.value.status == status

    def test_one_byte_at_a_time(self, site):
        url, limits = site
        limits.fetch_seconds, start = 0.5, time.monotonic()
        with pytest.raises(RequestError, match="took more than 0.5 seconds"):
            fetch(url + "/drip", limits)
        assert time.monotonic() - start < 5


@pytest.fixture(scope="module")
def server(handler):
    server = EndpointServer(handler, in_flight=4, max_body=2_000_000, read_seconds=1.0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def send(server, body: bytes, headers: dict | None = None, path: str = "/") -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=120)
    connection.request("POST", path, body, headers or {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def send_raw(server, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as raw:
        raw.sendall(data)
        return raw.recv(10_000)


class TestServer:
    def test_statuses(self, server, handler, rows):
        assert send(server, json.dumps(request(rows[0])).encode()) == (200, directly(handler, rows[0]))
        assert send(server, b"{")[0] == 400
        assert send(server, b"[" * 100_000)[0] == 400
        assert send(server, b"\xff\xfe")[0] == 400
        assert send(server, b"{}")[0] == 400
        assert send(server, b"{}", path="/other")[0] == 404
        assert send(server, b" " * 10, {"Content-Length": "2000001"})[0] == 413
        assert send_raw(server, b"POST / HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.0 411")
        assert send_raw(server, b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n{").startswith(b"HTTP/1.0 408")
        assert b"400" in send_raw(server, b"\x00\x01\x02 nonsense\r\n\r\n")
        query = "/?reasoning=none&instruction=" + rows[0]["instruction"].replace(" ", "%20")
        status, answer = send(server, as_png(rows[0]["image"]), {"Content-Type": "image/png"}, query)
        assert (status, answer) == (200, directly(handler, rows[0]))
        numbers = query + "&slot_logit_threshold=1e5&max_new_tokens=40"
        status, answer = send(server, as_png(rows[0]["image"]), {"Content-Type": "image/png"}, numbers)
        assert (status, answer["segments"]) == (200, [])
        status, answer = send(server, b"", {"Content-Type": "image/png"}, query + "&max_new_tokens=many")
        assert status == 400 and "max_new_tokens is 'many'; expected a whole number" in answer["error"]["message"]

    def test_many_at_once_a_third_of_them_malformed(self, server, handler, rows):
        expected = {row["instruction"]: directly(handler, row) for row in rows}
        bodies = []
        for index in range(24):
            row = rows[index % len(rows)]
            bad = [b"nonsense", b'{"inputs": 1}', json.dumps({"inputs": {"image": "!", "instruction": "a"}}).encode()]
            good = json.dumps(request(row)).encode()
            bodies.append((None, bad[index % 9 // 3]) if index % 3 == 0 else (row["instruction"], good))
        with ThreadPoolExecutor(24) as pool:
            answers = list(pool.map(lambda body: send(server, body[1]), bodies))
        for (instruction, _), (status, answer) in zip(bodies, answers, strict=True):
            if instruction is None:
                assert status == 400 and answer["error"]["message"]
            else:
                assert status == 200 and answer == expected[instruction]


@pytest.mark.slow
def test_beside_a_checkpoint_without_this_package(rows, handler, tmp_path):
    """`handler.py` as remote code: loaded by its path, in a process that cannot import `segcompass_hf`."""
    from transformers import AutoModel, AutoProcessor

    folder = tmp_path / "repository"
    AutoModel.from_pretrained(segcompass_hf.bundled_checkpoint()).save_pretrained(folder)
    AutoProcessor.from_pretrained(segcompass_hf.bundled_checkpoint()).save_pretrained(folder)
    (folder / "handler.py").write_bytes(Path(endpoint.__file__).read_bytes())
    (tmp_path / "request.json").write_text(json.dumps(request(rows[0])))
    code = (
        "import importlib.util as u, json, sys\n"
        "sys.modules['segcompass_hf'] = None\n"
        "spec = u.spec_from_file_location('handler', 'repository/handler.py')\n"
        "module = u.module_from_spec(spec); sys.modules['handler'] = module; spec.loader.exec_module(module)\n"
        "answer = module.EndpointHandler('repository', device='cpu')(json.load(open('request.json')))\n"
        "json.dump(answer, open('answer.json', 'w'))\n"
    )
    environment = {
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
        "PATH": "",
        "HOME": str(tmp_path),
    }
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads((tmp_path / "answer.json").read_text()), directly(handler, rows[0])
    scores = [[segment.pop("score") for segment in answer["segments"]] for answer in answers]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)  # another process may sum with another number of threads
    assert answers[0] == answers[1]


@pytest.fixture(scope="module")
def red_row():
    """A scene whose answer is red."""
    rows = (row for row in scenes.iterate("val", 200, seed=77) if row["kind"] == "attribute")
    return next(row for row in rows if "red" in row["instruction"].split() and row["masks"])


def test_guardrails_and_votes_of_a_request(handler, red_row):
    full = {"reasoning": "full"}
    plain = handler(request(red_row, **full))
    assert plain["segments"] and "guardrails" not in plain
    held = handler(request(red_row, forbid=["red"], **full))
    assert len(held["segments"]) < len(plain["segments"])
    assert all(entry["concept"] == "red" and "forbidden" in entry["reason"] for entry in held["guardrails"])
    assert len(held["guardrails"]) == len(plain["segments"]) - len(held["segments"])
    json.dumps(held)
    assert handler(request(red_row, require="red", **full))["segments"] == plain["segments"]
    voted = handler(request(red_row, votes=2, **full))
    assert voted["segments"] and all(0.5 < segment["score"] <= 1 for segment in voted["segments"])


@pytest.mark.parametrize(
    ("parameters", "status", "message"),
    [
        ({"forbid": ["rde"]}, 422, "named 'rde'. Near: red"),
        ({"forbid": 7}, 400, "forbid is '7'; expected a list of at most 32 names"),
        ({"require": ["red", None]}, 400, "expected a list of at most 32 names"),
        ({"forbid": ["red"] * 33}, 400, "expected a list of at most 32 names"),
        ({"forbid": "red", "require": "red"}, 422, "both forbidden and required"),
        ({"votes": 1}, 400, "votes is '1'; expected a whole number from 2 to 8"),
        ({"votes": 9}, 400, "votes is '9'"),
        ({"votes": True}, 400, "votes is 'True'"),
    ],
)
def test_refused_guardrails_and_votes(handler, rows, parameters, status, message):
    error = handler(request(rows[0], **parameters))["error"]
    assert error["status"] == status and message in error["message"]


def test_an_operators_guardrails_hold_for_every_request(handler, red_row, monkeypatch):
    """A request can add to them and not take them away; an unknown name shows when the endpoint starts."""
    monkeypatch.setattr(handler, "guardrails", {"forbid": ["red"], "require": []})
    for parameters in ({}, {"forbid": []}, {"forbid": ["blue"]}):
        assert any(
            entry["concept"] == "red"
            for entry in handler(request(red_row, reasoning="full", **parameters))["guardrails"]
        )
    assert handler(request(red_row, require=["red"]))["error"]["status"] == 422
    with pytest.raises(ValueError, match="named 'rde'. Near: red"):
        EndpointHandler(str(segcompass_hf.bundled_checkpoint()), device="cpu", forbid=["rde"])


def test_names_in_an_address():
    from segcompass_hf.hub.endpoint.server import _from_query

    assert _from_query({"forbid": "red, blue", "votes": "3", "require": "ring"}) == {
        "forbid": ["red", "blue"],
        "votes": 3,
        "require": ["ring"],
    }
