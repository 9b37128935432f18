# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The server: the model's own answers, also in batches and beside malformed requests; limits; an end without loss."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the server needs the extra `serve`")
pytest.importorskip("uvicorn", reason="the server needs the extra `serve`")
pytest.importorskip("prometheus_client", reason="the server needs the extra `serve`")

from endpoint import FAST, JSON, Running, StandIn, as_base64, as_png, assert_same, directly, request, serving, until

from segcompass_hf.hub.endpoint import server as server_module
from segcompass_hf.hub.endpoint.handler import RequestHandler
from segcompass_hf.hub.endpoint.handler_inputs import Limits

SQUARE = Image.new("RGB", (8, 8), "red")


def asking(text: str) -> dict:
    return {"inputs": {"image": as_base64(SQUARE), "instruction": text}}


def send_raw(running: Running, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", running.port), timeout=60) as raw:
        raw.sendall(data)
        return raw.recv(10_000)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(32) as pool:
        yield pool


class TestAnswers:
    @pytest.fixture(scope="class")
    def running(self, handler):
        with serving(handler, batch_seconds=0.05) as running:
            yield running

    def test_a_request_alone_is_answered_as_the_model_does(self, running, handler, rows):
        status, answer, headers = running.send(request(rows[0]))
        assert (status, answer) == (200, directly(handler, rows[0]))
        assert headers["content-type"] == "application/json"

    def test_an_images_own_bytes(self, running, handler, rows):
        query, kind = "/?reasoning=none&instruction=" + quote(rows[0]["instruction"]), {"Content-Type": "image/png"}
        status, answer, _ = running.send(as_png(rows[0]["image"]), query, kind)
        assert (status, answer) == (200, directly(handler, rows[0]))
        numbers = query + "&slot_logit_threshold=1e5&max_new_tokens=40"
        status, answer, _ = running.send(as_png(rows[0]["image"]), numbers, kind)
        assert (status, answer["segments"]) == (200, [])
        status, answer, _ = running.send(b"", query + "&max_new_tokens=many", kind)
        assert status == 400 and "max_new_tokens is 'many'; expected a whole number" in answer["error"]["message"]

    def test_a_list_of_inputs(self, running, handler, rows):
        good = [request(row)["inputs"] for row in rows[:2]]
        inputs = [good[0], {"image": "AAAA", "instruction": "red"}, good[1]]
        status, answers, _ = running.send({"inputs": inputs, "parameters": FAST})
        assert status == 200 and answers[1]["error"]["status"] == 400
        for answer, row in zip([answers[0], answers[2]], rows, strict=False):
            assert_same(answer, directly(handler, row))

    def test_many_at_once_a_third_of_them_malformed(self, running, handler, rows, pool):
        expected = [directly(handler, row) for row in rows]
        bad = [b"nonsense", b'{"inputs": 1}', b"[" * 50_000, b"\xff\xfe", b"{}"]
        bad += [json.dumps({"inputs": {"image": "!", "instruction": "a"}}).encode()]
        strip = {"inputs": {"image": as_base64(Image.new("L", (900, 2))), "instruction": "a"}}
        bad += [json.dumps(strip | {"parameters": {"reasoning": "none"}}).encode()]  # fails in the model's processor
        plan = [None if index % 3 == 0 else index % len(rows) for index in range(24)]
        bodies = [
            bad[index // 3 % len(bad)] if row is None else json.dumps(request(rows[row])).encode()
            for index, row in enumerate(plan)
        ]
        batches = running.metric("segcompass_batch_questions_count")
        questions = running.metric("segcompass_batch_questions_sum")
        for row, (status, answer, _) in zip(plan, pool.map(running.send, bodies), strict=True):
            if row is None:
                assert status in (400, 422) and answer["error"]["message"]
            else:
                assert status == 200
                assert_same(answer, expected[row])
        batches = running.metric("segcompass_batch_questions_count") - batches
        questions = running.metric("segcompass_batch_questions_sum") - questions
        assert questions == 16 + 1 and batches <= 9  # 16 right ones and the strip, two and more at a time

    @pytest.mark.parametrize(
        ("body", "path", "status"),
        [(b"{", "/", 400), (b"", "/", 400), (b"[" * 100_000, "/", 400), (b"{}", "/other", 404), (None, "/other", 404)],
    )
    def test_statuses(self, running, body, path, status):
        got, answer, _ = running.send(body, path)
        assert got == status == answer["error"]["status"] and answer["error"]["message"]

    def test_other_methods_and_bytes_that_are_no_request(self, running):
        assert send_raw(running, b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n").startswith(b"HTTP/1.1 405")
        assert b"400" in send_raw(running, b"\x00\x01\x02 nonsense\r\n\r\n")
        assert b"400" in send_raw(running, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -3\r\n\r\n")


def test_a_batch_size_of_one_answers_each_alone(handler, rows, pool):
    expected = [directly(handler, row) for row in rows]
    with serving(handler, batch_size=1) as running:
        answers = list(pool.map(running.send, [request(row) for row in rows]))
        assert [answer for _, answer, _ in answers] == expected
        assert running.metric('segcompass_batch_questions_bucket{le="1.0"}') == len(rows) + 1  # and the warm-up


class TestLimits:
    def test_bodies(self):
        with serving(StandIn(), body_bytes=20_000, read_seconds=0.5) as running:
            status, answer, headers = running.send(b" " * 20_001)
            assert status == 413 and "longer than 20000 bytes" in answer["error"]["message"]
            assert headers["connection"] == "close"
            head = b"POST / HTTP/1.1\r\nHost: a\r\n"
            assert b" 413 " in send_raw(running, head + b"Content-Length: 99999999999\r\n\r\n")
            chunk = b"4e20\r\n" + b" " * 20_000 + b"\r\n"  # 20,000 bytes
            chunked = head + b"Transfer-Encoding: chunked\r\n\r\n"
            assert b" 413 " in send_raw(running, chunked + 2 * chunk + b"0\r\n\r\n")
            assert b" 408 " in send_raw(running, head + b"Content-Length: 9\r\n\r\n{")
            body = json.dumps(asking("red")).encode()
            assert b" 200 " in send_raw(running, chunked + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))

    def test_images_and_instructions(self):
        with serving(StandIn(Limits(image_pixels=63, instruction=10))) as running:
            status, answer, _ = running.send(asking("red"))
            assert status == 413 and "8 x 8; at most 63 pixels" in answer["error"]["message"]
            status, answer, _ = running.send(asking("a" * 11))
            assert status == 413 and "11 characters" in answer["error"]["message"]

    def test_who_comes_when_too_many_wait_is_told_when_to_come_again(self, pool):
        handler = StandIn()
        with serving(handler, batch_size=1, in_flight=2, waiting=1) as running:
            handler.go.clear()
            texts = [f"question {number}" for number in range(3)]
            asked = [pool.submit(running.send, asking(text)) for text in texts]
            until(lambda: running.server.service.active == 3)
            until(lambda: running.metric("segcompass_requests_waiting") == 1)
            status, answer, headers = running.send(asking("one too many"))
            assert status == 503 and "1 requests are waiting already" in answer["error"]["message"]
            assert int(headers["retry-after"]) >= 1 and headers["connection"] == "close"
            assert running.send(path="/health")[0] == 200
            handler.go.set()
            assert sorted(future.result()[1]["text"] for future in asked) == [
                f"question {number}" for number in range(3)
            ]
            assert running.send(asking("again"))[0] == 200

    def test_an_answer_that_takes_too_long(self, pool):
        handler = StandIn()
        with serving(handler, answer_seconds=0.5, batch_size=1) as running:
            handler.go.clear()
            asked = [pool.submit(running.send, asking(text)) for text in ("first", "second")]
            for future in asked:
                status, answer, headers = future.result()
                assert status == 503 and "no answer within 0.5 seconds" in answer["error"]["message"]
                assert "retry-after" in headers
            handler.go.set()
            assert running.send(asking("third"))[1]["text"] == "third"
            assert (
                len(handler.batches) == 3
            )  # the warm-up, one that had begun, and the third: nobody waited for the other

    def test_what_nobody_waits_for_is_not_asked(self, pool):
        handler = StandIn()
        with serving(handler, batch_size=1) as running:
            handler.go.clear()
            first = pool.submit(running.send, asking("first"))
            until(lambda: ["first"] in handler.batches)
            body = json.dumps(asking("gone")).encode()
            with socket.create_connection(("127.0.0.1", running.port)) as raw:
                raw.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
                until(lambda: running.server.service._batcher._queue)
            until(lambda: running.server.service.active == 1)
            handler.go.set()
            assert first.result()[0] == 200 and running.send(asking("last"))[0] == 200
            assert ["gone"] not in handler.batches
            assert running.metric('segcompass_requests_total{status="499"}') == 1

    @pytest.mark.parametrize("head", [b"", b"POST / HT"])
    def test_a_connection_without_a_request_is_closed(self, head, monkeypatch):
        monkeypatch.setattr(server_module, "HEAD_SECONDS", 0.3)
        with serving(StandIn()) as running:
            assert send_raw(running, head) == b""


def test_faults_are_told_to_the_log_by_the_requests_id(caplog, pool):
    handler = StandIn()
    with serving(handler, batch_seconds=0.3) as running, caplog.at_level("INFO", logger="segcompass_hf"):
        texts = ["red", "poison", "blue", "refuse"]
        headers = [JSON | {"X-Request-ID": f"the-{text}-one"} for text in texts]
        answers = list(pool.map(lambda text, more: running.send(asking(text), headers=more), texts, headers))
        until(lambda: caplog.text.count(": POST '/', status") == len(texts))  # an answer is sent before it is logged
    assert [status for status, _, _ in answers] == [200, 500, 200, 422]
    assert [answers[place][1]["text"] for place in (0, 2)] == ["red", "blue"]
    assert "secret" not in answers[1][1]["error"]["message"]
    assert any(len(batch) > 1 for batch in handler.batches)
    assert [headers["x-request-id"] for _, _, headers in answers] == [f"the-{text}-one" for text in texts]
    assert "request the-poison-one failed" in caplog.text and "a secret path" in caplog.text
    assert "request the-red-one: POST '/', status 200" in caplog.text
    assert "request the-refuse-one: POST '/', status 422" in caplog.text


@pytest.mark.parametrize("given", [None, "", "two words", "a" * 65, 'quote"'])
def test_requests_without_a_good_id_get_one(given):
    with serving(StandIn()) as running:
        more = {} if given is None else {"X-Request-ID": given}
        found = [running.send(asking("red"), headers=JSON | more)[2]["x-request-id"] for _ in range(2)]
    assert all(len(one) == 32 for one in found) and found[0] != found[1]


def test_metrics():
    with serving(StandIn()) as running:
        before = running.metric("segcompass_request_seconds_count")
        assert (before, running.metric("segcompass_ready")) == (0, 1)
        for body in (asking("red"), asking("blue"), b"{"):
            running.send(body)
        assert running.metric('segcompass_requests_total{status="200"}') == 2
        assert running.metric('segcompass_requests_total{status="400"}') == 1
        assert running.metric("segcompass_request_seconds_count") == 3
        assert running.metric("segcompass_batch_questions_sum") == 2 + 1  # and the warm-up
        assert running.metric("segcompass_requests_active") == running.metric("segcompass_requests_waiting") == 0
        assert running.metric("process_resident_memory_bytes") > 1e6
        assert running.send(path="/metrics")[2]["content-type"].startswith("text/plain; version=")


class TestReadiness:
    def test_only_once_the_model_has_answered(self):
        handler = StandIn()
        handler.go.clear()
        running = Running(handler)
        until(lambda: running.server.started)
        assert running.send(path="/ready")[:2] == (503, {"status": "warming up"})
        assert running.send(path="/health")[:2] == running.send(path="/")[:2] == (200, {"status": "ok"})
        handler.go.set()
        until(lambda: running.send(path="/ready")[:2] == (200, {"status": "ready"}))
        assert handler.batches == [["it"]]
        running.server.should_exit = True
        running.thread.join(30)

    def test_never_where_it_cannot(self, caplog):
        handler = StandIn()
        handler._segment = lambda questions: 1 / 0
        running = Running(handler)
        until(lambda: "the server will not be ready" in caplog.text)
        assert running.send(path="/ready")[0] == 503
        running.server.should_exit = True
        running.thread.join(30)


class TestStopping:
    def test_requests_that_were_let_in_are_answered_and_others_refused(self, pool):
        handler = StandIn()
        with serving(handler, batch_size=1, in_flight=2) as running:
            handler.go.clear()
            texts = [f"question {number}" for number in range(5)]
            asked = [pool.submit(running.send, asking(text)) for text in texts]
            until(lambda: running.server.service.active == 5)  # of these 3 wait for their turn
            running.server.handle_exit(signal.SIGTERM, None)
            status, answer, headers = running.send(asking("late"))
            assert status == 503 and "stopping" in answer["error"]["message"] and "retry-after" in headers
            assert running.send(path="/ready")[:2] == (503, {"status": "draining"})
            assert running.send(path="/health")[0] == 200 and running.metric("segcompass_ready") == 0
            assert running.thread.is_alive()
            handler.go.set()
            assert sorted(future.result()[1]["text"] for future in asked) == [
                f"question {number}" for number in range(5)
            ]
            running.thread.join(30)
            assert not running.thread.is_alive()
        with pytest.raises(OSError):
            running.send(path="/health")

    def test_a_second_signal_does_not_wait(self, pool, monkeypatch):
        handler = StandIn()
        running = Running(handler)
        running.server.config.timeout_graceful_shutdown = 0.2
        until(lambda: running.server.service.warm)
        handler.go.clear()
        asked = pool.submit(running.send, asking("red"))
        until(lambda: running.server.service.active == 1)
        for _ in range(2):
            running.server.handle_exit(signal.SIGTERM, None)
        running.thread.join(30)
        assert not running.thread.is_alive() and not handler.go.is_set()
        handler.go.set()
        assert asked.exception() is not None or asked.result()[0] >= 500

    @pytest.mark.slow
    def test_sigterm_from_the_command_line(self, rows, handler, pool):
        command = [sys.executable, "-m", "segcompass_hf.cli", "serve", "--api", "--model", "scenes-tiny", "--port"]
        listener = server_module.bind("127.0.0.1", 0)
        port = listener.getsockname()[1]
        listener.close()
        running = Running.__new__(Running)
        running.port = port
        process = subprocess.Popen(
            [*command, str(port)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
        )
        try:
            assert process.stdout.readline() == f"scenes-tiny: http://127.0.0.1:{port}\n"
            until(lambda: _is_ready(running), 120)
            data = request(rows[0], reasoning="full")
            asked = [pool.submit(running.send, data) for _ in range(4)]
            until(lambda: running.metric("segcompass_requests_active") == 4)
            process.send_signal(signal.SIGTERM)
            for future in asked:
                status, answer, _ = future.result()
                assert status == 200
                assert_same(answer, directly(handler, rows[0], "full"))
            _, log = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 128 + signal.SIGTERM
        assert log.count("POST '/', status 200") == 4 and "stopped by SIGTERM" in log and "Traceback" not in log


def _is_ready(running: Running) -> bool:
    try:
        return running.send(path="/ready")[0] == 200
    except OSError:
        time.sleep(0.2)
        return False


def test_an_address_that_is_taken():
    with server_module.bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(OSError):
            server_module.bind("127.0.0.1", taken.getsockname()[1])


def test_an_operators_guardrails_are_the_handlers(handler):
    """A name that the concept dictionary does not know shows when the server starts."""
    with pytest.raises(ValueError, match="named 'rde'. Near: red"):
        RequestHandler(handler.model, handler.processor, forbid=["rde"])
