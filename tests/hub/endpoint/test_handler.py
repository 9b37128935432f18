# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The endpoint's handler: right answers, clear refusals, and nothing that stops it."""

import base64
import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from endpoint import FAST, StandIn, as_base64, as_png, assert_same, directly, request
from PIL import Image

import segcompass_hf
from segcompass_hf.data import scenes
from segcompass_hf.data.schema import decode_mask, encode_mask
from segcompass_hf.hub.endpoint import handler as handler_module
from segcompass_hf.hub.endpoint.handler import EndpointHandler, Question, encode_rle


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


def questions_of(handler, rows, **parameters) -> list[Question]:
    return [handler.question({"image": r["image"], "instruction": r["instruction"]}, FAST | parameters) for r in rows]


class TestTogether:
    def test_each_answer_is_what_it_is_alone(self, handler, rows):
        answers = handler.submit(questions_of(handler, rows)).result()
        for answer, row in zip(answers, rows, strict=True):
            assert_same(answer, directly(handler, row))

    def test_a_strip_is_refused_and_its_neighbours_are_answered(self, handler, rows):
        """The processor refuses the whole batch for it."""
        strip = {"image": Image.new("L", (900, 2)), "instruction": "a"}
        questions = questions_of(handler, [rows[0], strip, rows[1]])
        answers = handler.submit(questions).result()
        assert [answers[0], answers[2]] == [directly(handler, row) for row in rows[:2]]
        assert answers[1]["error"]["status"] == 422 and "factor of at most 200" in answers[1]["error"]["message"]

    def test_masks_in_the_form_that_each_asks_for(self, handler, rows):
        row = next(row for row in rows if directly(handler, row, "full")["segments"])
        questions = [questions_of(handler, [row], reasoning="full", mask_format=kind)[0] for kind in ("rle", "png")]
        assert questions[0].settings == questions[1].settings
        rle, png = (answer["segments"][0]["mask"] for answer in handler.submit(questions).result())
        mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))) == 255
        np.testing.assert_array_equal(mask, decode_mask(rle))

    def test_a_fault_is_told_to_the_log_by_the_name_of_its_request(self, caplog):
        handler, image = StandIn(), Image.new("RGB", (8, 8))
        asked = [("red", "one"), ("poison", "two"), ("refuse", "three"), ("blue", "four")]
        answers = handler.submit([Question(image, text, {}, request=name) for text, name in asked]).result()
        assert [answers[0]["text"], answers[3]["text"]] == ["red", "blue"]
        assert answers[1]["error"]["status"] == 500 and "secret" not in answers[1]["error"]["message"]
        assert answers[2]["error"] == {"status": 422, "message": "refused"}
        assert handler.batches == [["red", "poison", "refuse", "blue"], ["red"], ["poison"], ["refuse"], ["blue"]]
        assert "request two failed" in caplog.text and "a secret path" in caplog.text

    def test_a_batch_that_does_not_fit_in_memory_is_answered_one_by_one(self, handler, rows, monkeypatch):
        segment = handler.model.segment

        def scarce(input_ids, **inputs):
            if len(input_ids) > 1:
                raise torch.OutOfMemoryError
            return segment(input_ids, **inputs)

        monkeypatch.setattr(handler.model, "segment", scarce)
        answers = handler.submit(questions_of(handler, rows[:2])).result()
        monkeypatch.undo()
        assert answers == [directly(handler, row) for row in rows[:2]]


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


@pytest.mark.slow
def test_beside_a_checkpoint_without_this_package(rows, handler, tmp_path):
    """As an Inference Endpoint loads it, by its path and with its folder on the path of modules; neither
    `segcompass_hf` nor what the server needs can be imported."""
    from transformers import AutoModel, AutoProcessor

    folder = tmp_path / "repository"
    AutoModel.from_pretrained(segcompass_hf.bundled_checkpoint()).save_pretrained(folder)
    AutoProcessor.from_pretrained(segcompass_hf.bundled_checkpoint()).save_pretrained(folder)
    for name in ("handler.py", "handler_inputs.py"):
        (folder / name).write_bytes(Path(handler_module.__file__).with_name(name).read_bytes())
    (tmp_path / "request.json").write_text(json.dumps(request(rows[0])))
    code = (
        "import importlib.util as u, json, sys\n"
        "for name in ('segcompass_hf', 'fastapi', 'starlette', 'uvicorn', 'pydantic', 'prometheus_client'):\n"
        "    sys.modules[name] = None\n"
        "spec = u.spec_from_file_location('handler.EndpointHandler', 'repository/handler.py')\n"
        "sys.path.insert(0, 'repository')\n"
        "module = u.module_from_spec(spec); sys.modules[spec.name] = module; spec.loader.exec_module(module)\n"
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
    assert_same(json.loads((tmp_path / "answer.json").read_text()), directly(handler, rows[0]))


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
