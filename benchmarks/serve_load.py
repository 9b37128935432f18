# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""`segcompass serve --api` under load, with batches and without: right answers, latency, throughput, memory.

    python benchmarks/serve_load.py --requests 1000 --output benchmarks/results/serve

Each server runs in a process of its own on loopback, with the bundled scenes-tiny on the CPU. Clients send requests
one after another, a third of them malformed in eight ways. Every answer is compared with what the same request gets
alone, before the load: text, slots and masks have to be equal, scores equal to 1e-5 (sums over other numbers of rows
differ in their last digits). A client that is told to come again (503) does. Any wrong answer ends the run with exit
code 1; the figures are written in any case.
"""

import argparse
import base64
import http.client
import io
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import segcompass_hf
from segcompass_hf.data import scenes

SCORE_TOLERANCE = 1e-5
NUM_QUESTIONS = 12  # different ones
WARMUP = 36  # requests before memory is measured, or a tenth of those that count
SETTINGS = (  # of the right requests, in turn; equal ones can be answered together
    {"reasoning": "none", "mask_format": "rle"},
    {"reasoning": "none", "mask_format": "png"},
    {"reasoning": "short", "mask_format": "rle"},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000, help="per server, a third malformed (%(default)s)")
    parser.add_argument("--clients", type=int, default=32, help="that send at the same time (%(default)s)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8], help="a server for each (%(default)s)")
    parser.add_argument("--output", type=Path, help="figures go to OUTPUT.md and OUTPUT.json")
    args = parser.parse_args()
    rows = list(scenes.iterate("val", NUM_QUESTIONS, seed=0))
    good = [request_of(row, SETTINGS[index % len(SETTINGS)]) for index, row in enumerate(rows)]
    runs = []
    for batch_size in args.batch_sizes:
        runs.append(measure(batch_size, good, args.requests, args.clients))
        print(table(runs[-1:]), flush=True)
    if args.output is not None:
        write(args.output, runs)
    if wrong := sum(run["wrong"] for run in runs):
        raise SystemExit(f"{wrong} answers were wrong")


def measure(batch_size: int, good: list[bytes], requests: int, clients: int) -> dict:
    """Start a server, load it, stop it."""
    server, port = start(batch_size)
    try:
        expected = [send(port, body)[:2] for body in good]
        if any(status != 200 for status, _ in expected):
            raise SystemExit(f"a request alone is not answered: {expected}")
        load(port, good, expected, max(WARMUP, requests // 10), clients)
        before, counted = resident(server.pid), batches(port)
        figures = load(port, good, expected, requests, clients)
        after, (questions, number) = resident(server.pid), [b - a for a, b in zip(counted, batches(port), strict=True)]
        server.terminate()
        if server.wait(120) != 143:
            raise SystemExit(f"the server stopped with code {server.returncode}; expected 143 after SIGTERM")
    finally:
        server.kill()
    memory = {"megabytes_at_start": before / 1e6, "megabytes_after": after / 1e6}
    return {"batch_size": batch_size, "clients": clients} | figures | {"mean_batch": questions / number} | memory


def start(batch_size: int) -> tuple[subprocess.Popen, int]:
    """A server that is ready, and its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "segcompass_hf.cli", "serve", "--api", "--model", "scenes-tiny"]
    command += ["--port", str(port), "--batch-size", str(batch_size)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while server.poll() is None:
        try:
            if get(port, "/ready")[0] == 200:
                return server, port
        except OSError:
            pass
        time.sleep(0.5)
    raise SystemExit(f"the server stopped with code {server.returncode}; try: {shlex.join(command)}")


def load(port: int, good: list[bytes], expected: list[tuple], count: int, clients: int) -> dict:
    """Send so many requests and compare every answer."""
    plan = [None if index % 3 == 0 else index % len(good) for index in range(count)]
    bodies = [malformed(good[0], index // 3) if which is None else good[which] for index, which in enumerate(plan)]
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda body: send(port, body), bodies))
    seconds = time.perf_counter() - start
    judged = [
        is_refusal(status, answer) if which is None else status == 200 and is_same(answer, expected[which][1])
        for which, (status, answer, *_) in zip(plan, answers, strict=True)
    ]
    right = [answer for which, answer in zip(plan, answers, strict=True) if which is not None]
    latency = np.percentile([took for _, _, took, _ in right], [50, 95])
    return {
        "requests": count,
        "malformed": plan.count(None),
        "wrong": judged.count(False),
        "told_to_come_again": sum(again for *_, again in answers),
        "seconds": seconds,
        "answers_per_second": len(right) / seconds,
        "latency_p50_seconds": float(latency[0]),
        "latency_p95_seconds": float(latency[1]),
    }


def is_refusal(status: int, answer: dict) -> bool:
    return 400 <= status < 500 and answer["error"]["status"] == status and bool(answer["error"]["message"])


def is_same(answer: dict, expected: dict) -> bool:
    """Equal but for the last digits of scores."""
    if len(answer.get("segments", ())) != len(expected["segments"]):
        return False
    pairs = list(zip(answer["segments"], expected["segments"], strict=True))
    near = all(abs(one["score"] - other["score"]) <= SCORE_TOLERANCE for one, other in pairs)
    equal = all(one | {"score": 0} == other | {"score": 0} for one, other in pairs)
    return near and equal and answer | {"segments": 0} == expected | {"segments": 0}


def request_of(row: dict, parameters: dict) -> bytes:
    file = io.BytesIO()
    row["image"].save(file, "PNG")
    sample = {"image": base64.b64encode(file.getvalue()).decode(), "instruction": row["instruction"]}
    return json.dumps({"inputs": sample, "parameters": parameters}).encode()


def malformed(good: bytes, number: int) -> bytes:
    """One of eight kinds of bad request; of the last kind only the model's processor finds out."""
    request = json.loads(good)
    image = request["inputs"]["image"]
    strip = io.BytesIO()
    Image.new("L", (900, 2)).save(strip, "PNG")
    inputs = {"image": base64.b64encode(strip.getvalue()).decode(), "instruction": "red"}
    kinds = [
        lambda: good[: len(good) // 2],
        lambda: b"[" * 50_000,
        lambda: json.dumps(request | {"inputs": {"image": image}}).encode(),
        lambda: json.dumps(request | {"inputs": {"image": image[:200], "instruction": "red"}}).encode(),
        lambda: json.dumps(request | {"inputs": {"image": "http://169.254.169.254/", "instruction": "red"}}).encode(),
        lambda: json.dumps(request | {"parameters": {"max_new_tokens": 10**12}}).encode(),
        lambda: json.dumps({"inputs": {"image": "A" * 14_000_000, "instruction": "red"}}).encode(),
        lambda: json.dumps(request | {"inputs": inputs}).encode(),
    ]
    return kinds[number % len(kinds)]()


def get(port: int, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, response.read()


def batches(port: int) -> tuple[float, float]:
    """Questions and batches so far, of the server's metrics."""
    lines = dict(line.rsplit(" ", 1) for line in get(port, "/metrics")[1].decode().splitlines() if line[0] != "#")
    return tuple(float(lines[f"segcompass_batch_questions_{name}"]) for name in ("sum", "count"))


def send(port: int, body: bytes) -> tuple[int, dict, float, int]:
    """Status, answer, seconds, and how often the server said to come again."""
    start, again = time.perf_counter(), 0
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3600)
        connection.request("POST", "/", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = json.loads(response.read())
        connection.close()
        if response.status != 503:
            return response.status, answer, time.perf_counter() - start, again
        again += 1
        time.sleep(float(response.getheader("Retry-After", 1)))


def resident(pid: int) -> int:
    """Resident memory of a process in bytes."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def table(runs: list[dict]) -> str:
    lines = [
        "| batch size | mean batch | requests | malformed | wrong | answers/s | p50 s | p95 s | MB at start | after |",
        "|" + " --- |" * 10,
    ]
    for run in runs:
        counts = [run["batch_size"], f"{run['mean_batch']:.1f}", run["requests"], run["malformed"], run["wrong"]]
        seconds = [f"{run[f'latency_{name}_seconds']:.2f}" for name in ("p50", "p95")]
        memory = [f"{run[f'megabytes_{name}']:.0f}" for name in ("at_start", "after")]
        cells = [*counts, f"{run['answers_per_second']:.2f}", *seconds, *memory]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def write(output: Path, runs: list[dict]) -> None:
    command = f"python {shlex.join(sys.argv)}"
    machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "load_average": os.getloadavg()[0]}
    versions = {"torch": torch.__version__, "segcompass_hf": segcompass_hf.__version__}
    facts = {"command": command, "machine": machine, "versions": versions, "runs": runs}
    output.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
    told = (
        f"{runs[0]['clients']} clients, {machine['cores']} cores shared with other work (load average "
        f"{machine['load_average']:.0f}), torch {torch.__version__} on the CPU, {machine['threads']} thread(s). "
        f"Latency is that of the well-formed requests; memory at start is that after a warm-up."
    )
    text = f"# The server under load\n\n    {command}\n\n{told}\n\n{table(runs)}\n"
    output.with_suffix(".md").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
