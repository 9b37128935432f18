# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The endpoint under load: many requests at once, a third of them malformed; right answers, memory, latency.

    python benchmarks/endpoint_load.py --requests 200 --rounds 2 --output benchmarks/results/endpoint_load.md

The server runs in a process of its own on loopback, with the bundled checkpoint on the CPU. Every answer is compared
with the one that the same request gets alone, before the load.
"""

import argparse
import base64
import http.client
import io
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import segcompass_hf
from segcompass_hf.data import scenes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=200, help="sent at the same time (%(default)s)")
    parser.add_argument("--warmup", type=int, default=60, help="sent before memory is measured (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="of so many requests (%(default)s)")
    parser.add_argument("--port", type=int, default=8871, help="of the server (%(default)s)")
    parser.add_argument("--output", type=Path, help="Markdown file for the figures")
    args = parser.parse_args()
    rows = list(scenes.iterate("val", 12, seed=0))
    good = [request_of(row, mask_format) for row, mask_format in zip(rows, ["rle", "png"] * 6, strict=True)]
    server = start_server(args.port)
    try:
        expected = [send(args.port, body) for body in good]
        assert all(status == 200 for status, _, _ in expected), expected
        load(args.port, good, expected, args.warmup)
        memory = [resident(server.pid)]
        lines = []
        for number in range(1, args.rounds + 1):
            figures = load(args.port, good, expected, args.requests)
            memory.append(resident(server.pid))
            lines.append(row_of(number, args.requests, figures, memory))
            print(lines[-1], flush=True)
        assert server.poll() is None, "the server has stopped"
    finally:
        server.terminate()
        server.wait()
    after = f"resident memory after the warm-up of {args.warmup} requests: {memory[0] / 1e6:.0f} MB"
    report = [
        f"    python {shlex.join(sys.argv)}",
        "",
        f"{os.cpu_count()} cores, shared with other work; {after}.",
        "",
    ]
    head = "| round | requests | malformed | wrong | seconds | median s | 95 % s | resident MB | over warm-up |"
    text = "\n".join([*report, head, "|" + " --- |" * 9, *lines]) + "\n"
    if args.output is not None:
        args.output.write_text("# The endpoint under load\n\n" + text, "utf-8")


def start_server(port: int) -> subprocess.Popen:
    checkpoint = str(segcompass_hf.bundled_checkpoint())
    command = [sys.executable, "-m", "segcompass_hf.hub.endpoint.server", checkpoint, "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(600):
        try:
            if send(port, None)[0] == 200:
                return server
        except OSError:
            time.sleep(0.5)
        if server.poll() is not None:
            raise SystemExit(f"the server stopped with code {server.returncode}")
    server.terminate()
    raise SystemExit("the server does not answer")


def request_of(row: dict, mask_format: str) -> bytes:
    file = io.BytesIO()
    row["image"].save(file, "PNG")
    sample = {"image": base64.b64encode(file.getvalue()).decode(), "instruction": row["instruction"]}
    reasoning = {"rle": "none", "png": "short"}[mask_format]
    return json.dumps({"inputs": sample, "parameters": {"reasoning": reasoning, "mask_format": mask_format}}).encode()


def malformed(good: bytes, number: int) -> bytes:
    """One of eight kinds of bad request."""
    request = json.loads(good)
    image = request["inputs"]["image"]
    kinds = [
        good[: len(good) // 2],
        b"\x00\xff" * 1000,
        b"[" * 50_000,
        json.dumps(request | {"inputs": {"image": image}}).encode(),
        json.dumps(request | {"inputs": {"image": image[:200], "instruction": "red"}}).encode(),
        json.dumps(request | {"inputs": {"image": "http://169.254.169.254/", "instruction": "red"}}).encode(),
        json.dumps(request | {"parameters": {"max_new_tokens": 10**12}}).encode(),
        json.dumps({"inputs": {"image": "A" * 14_000_000, "instruction": "red"}}).encode(),
    ]
    return kinds[number % len(kinds)]


def send(port: int, body: bytes | None) -> tuple[int, dict, float]:
    """Status, answer and seconds."""
    start = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3600)
    headers = {"Content-Type": "application/json"}
    connection.request("GET", "/health") if body is None else connection.request("POST", "/", body, headers)
    response = connection.getresponse()
    return response.status, json.loads(response.read()), time.perf_counter() - start


def load(port: int, good: list[bytes], expected: list[tuple], count: int) -> dict:
    """Send `count` requests at once and compare every answer."""
    plan = [(None if i % 3 == 0 else i % len(good)) for i in range(count)]
    bodies = [malformed(good[0], i // 3) if which is None else good[which] for i, which in enumerate(plan)]
    start = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(lambda body: send(port, body), bodies))
    seconds = time.perf_counter() - start
    wrong = sum(
        not 400 <= status < 500 or not answer["error"]["message"]
        if which is None
        else (status, answer) != expected[which][:2]
        for which, (status, answer, _) in zip(plan, answers, strict=True)
    )
    latencies = sorted(took for which, (_, _, took) in zip(plan, answers, strict=True) if which is not None)
    return {"malformed": plan.count(None), "wrong": wrong, "seconds": seconds, "latencies": latencies}


def resident(pid: int) -> int:
    """Resident memory of a process in bytes."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def row_of(number: int, count: int, figures: dict, memory: list[int]) -> str:
    latencies = figures["latencies"]
    cells = [number, count, figures["malformed"], figures["wrong"], f"{figures['seconds']:.0f}"]
    cells += [f"{statistics.median(latencies):.1f}", f"{latencies[int(0.95 * (len(latencies) - 1))]:.1f}"]
    cells += [f"{memory[-1] / 1e6:.0f}", f"{100 * (memory[-1] / memory[0] - 1):+.1f} %"]
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
