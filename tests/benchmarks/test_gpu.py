# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The one GPU command: a part costs itself alone whatever it does, and what was measured is kept and told."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from places import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu
import gpu_parts
import gpu_report
import torch
from gpu import Part
from gpu_sizes import CPU, GPU


def stand_in(name: str, device: str, lines: Path) -> int:
    """In place of a part that measures: does what its name says."""

    def emit(**row) -> None:
        with lines.open("a") as file:
            file.write(json.dumps(row) + "\n")

    written = Path(os.environ["RESULTS"])
    before = json.loads(written.read_text())["parts"] if written.exists() else []
    emit(device="a stand-in", before=[part["name"] for part in before])
    if name == "hangs":
        emit(child=subprocess.Popen(["sleep", "100"]).pid)
        time.sleep(100)
    elif name == "fails":
        raise ValueError("a part's own words")
    elif name == "memory":
        sys.stderr.write("CUDA out of memory: tried to allocate 80 GiB\n")
        return gpu.OUT_OF_MEMORY
    elif name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif name == "torn":
        with lines.open("a") as file:
            file.write('{"what": "half a li')
        sys.exit("cut off")
    return 0


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs the command with stand-in parts; returns its exit code, the record and the page."""
    output = tmp_path / "results" / "gpu"
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("RESULTS", f"{output}.json")

    def run(parts: list[Part], *flags: str, minutes: float = 1.0):
        code = gpu.main([*flags, "--minutes", str(minutes), "--output", str(output)], tuple(parts), stand_in)
        return code, json.loads(output.with_suffix(".json").read_text()), output.with_suffix(".md").read_text()

    return run


def runs(process: int) -> bool:
    """Whether it does; one that has ended and that nobody has waited for does not."""
    try:
        return open(f"/proc/{process}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


class TestParts:
    def test_every_end_of_a_part(self, command):
        """Seven of them in half a minute, and what each leaves."""
        parts = [Part("fails", "", 50), Part("hangs", "", 10), Part("absent", "", 9, ("json", "no_such_package"))]
        parts += [Part(name, "", 30) for name in ("memory", "killed", "torn", "fine")]
        started = time.monotonic()
        code, record, page = command(parts, "--device", "cpu", minutes=0.5)
        assert time.monotonic() - started < 30
        found = {part["name"]: part for part in record["parts"]}
        assert list(found) == [part.name for part in parts]
        outcomes = {name: part["outcome"] for name, part in found.items()}
        assert outcomes == {
            "fails": "failed",
            "hangs": "cut",
            "absent": "skipped",
            "memory": "out of memory",
            "killed": "failed",
            "torn": "failed",
            "fine": "done",
        }
        assert code == 1
        assert found["fails"]["reason"] == "ValueError: a part's own words"
        assert found["absent"]["reason"] == "needs no_such_package, not installed here"
        assert found["memory"]["reason"].startswith("CUDA out of memory")
        assert "SIGKILL" in found["killed"]["reason"]
        assert [len(part["rows"]) for part in found.values()] == [1, 2, 0, 1, 1, 1, 1]
        # 10 of the 130 shares that are still to come, of what `fails` has left of the 30 s
        assert 1.5 < found["hangs"]["limit"] <= 30 * 10 / 130 < found["hangs"]["limit"] + 1
        assert found["hangs"]["seconds"] < found["hangs"]["limit"] + 2
        assert not runs(found["hangs"]["rows"][1]["child"])
        assert all(f"| {name} | {outcome} |" in page for name, outcome in outcomes.items())

    def test_results_are_written_after_every_part(self, command):
        code, record, page = command([Part(name, name.title(), 1) for name in ("one", "two", "three")])
        assert code == 0 and "in progress" not in page
        assert [part["rows"][0]["before"] for part in record["parts"]] == [[], ["one"], ["one", "two"]]

    def test_time_that_is_left_goes_to_the_parts_behind(self, command):
        _, record, _ = command([Part("one", "", 1), Part("two", "", 1), Part("three", "", 2)], minutes=1.0)
        limits = [part["limit"] for part in record["parts"]]
        # A quarter of 60 s; then a third and all of what is left of them, as no part takes long.
        assert limits == pytest.approx([15, 20, 60], abs=4)

    def test_no_part_is_started_for_nothing(self, command, monkeypatch):
        monkeypatch.setattr(gpu, "LEAST_SECONDS", 3.0)
        code, record, page = command([Part("hangs", "", 5), Part("fine", "", 4)], minutes=0.1)
        assert [part["outcome"] for part in record["parts"]] == ["cut", "not started"] and code == 0
        assert "no time was left" in page and record["seconds"] < 7

    def test_chosen_parts(self, command, monkeypatch):
        _, record, _ = command([Part("machine", "", 1), Part("segment", "", 1)], "--parts", "segment")
        assert [part["name"] for part in record["parts"]] == ["segment"]


class TestCarriedPackages:
    NEEDY = [Part("fine", "", 1, ("carried_package",))]

    def wheel(self, folder, text: str = "VALUE = 1\n"):
        folder.mkdir(parents=True)
        about = "carried_package-1.0.dist-info"
        with zipfile.ZipFile(folder / "carried_package-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr("carried_package.py", text)
            archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: carried_package\nVersion: 1.0\n")
            archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{about}/RECORD", f"carried_package.py,,\n{about}/METADATA,,\n{about}/WHEEL,,\n")
        return folder

    def test_without_them(self, command):
        assert command(self.NEEDY)[1]["parts"][0]["outcome"] == "skipped"

    @pytest.mark.parametrize("packed", [True, False])
    def test_with_them(self, command, tmp_path, packed):
        folder = self.wheel(tmp_path / "wheels")
        if not packed:
            (wheel,) = folder.glob("*.whl")
            zipfile.ZipFile(wheel).extractall(folder)
            wheel.unlink()
        code, record, _ = command(self.NEEDY, "--wheels", str(folder))
        assert record["wheels"] is None and record["parts"][0]["outcome"] == "done" and code == 0

    def test_one_that_cannot_be_installed_does_not_stop_the_others(self, command, tmp_path):
        folder = self.wheel(tmp_path / "wheels")
        (folder / "another-1.0-cp27-none-any.whl").write_text("of another Python")
        parts = [*self.NEEDY, Part("absent", "", 1, ("another",))]
        _, record, page = command(parts, "--wheels", str(folder))
        assert [part["outcome"] for part in record["parts"]] == ["done", "skipped"]
        assert "another-1.0-cp27-none-any.whl could not be installed" in record["wheels"]
        assert record["wheels"].rstrip(".") in page

    def test_a_folder_that_is_not_there(self, command, tmp_path):
        _, record, page = command(self.NEEDY, "--wheels", str(tmp_path / "nowhere"))
        assert "is no folder" in page


class TestReport:
    RECORD = {
        "command": "python benchmarks/gpu.py",
        "device_kind": "cuda",
        "minutes": 10.0,
        "seconds": 431.2,
        "versions": {"python": "3.12.3", "torch": "2.11.0", "trl": None},
        "wheels": None,
        "parts": [
            {"name": "machine", "title": "The machine", "outcome": "done", "reason": None, "seconds": 9.0,
             "limit": 20.0, "rows": [{"what": "device", "device": "NVIDIA H100", "memory_bytes": 80 * 2**30}]},
            {"name": "segment", "title": "What users wait for", "outcome": "cut", "reason": "its 60 s were over",
             "seconds": 60.1, "limit": 60.0, "rows": [
                 {"what": "scenes", "dtype": "bfloat16", "seconds": 0.123456, "peak_bytes": 3 * 2**20},
                 {"what": "scenes", "dtype": "int8", "seconds": 2.0, "peak_bytes": None},
                 {"what": "scenes", "dtype": "nf4", "left_out": "bitsandbytes is not installed here"}]},
            {"name": "tests", "title": "Tests", "outcome": "failed", "reason": "1 of 3 tests failed", "seconds": 1.0,
             "limit": 2.0, "rows": [{"test": "a", "outcome": "passed", "duration": 1.0},
                                    {"test": "b", "outcome": "failed", "duration": 1.0, "message": "1 is not 2"}]},
        ],
    }  # fmt: skip

    def test_contents(self):
        page = gpu_report.to_markdown(self.RECORD)
        for line in (
            "NVIDIA H100, 80 GiB; python 3.12.3, torch 2.11.0. Not installed: trl.",
            "| segment | cut | 60 | 60 | 3 | its 60 s were over |",
            "| dtype | seconds | peak MiB |",
            "| bfloat16 | 0.1235 | 3 |",
            "| int8 | 2 | – |",
            "- Left out: scenes dtype nf4: bitsandbytes is not installed here",
            "1 of 2 passed.",
            "| b | failed | 1 | 1 is not 2 |",
        ):
            assert line in page.splitlines(), line
        assert "431 s were used" in page and "small" not in page
        assert "Sizes are small" in gpu_report.to_markdown(self.RECORD | {"device_kind": "cpu"})


class TestMeasuring:
    def test_every_part_is_there_in_order(self):
        assert list(gpu_parts.MEASURES) == [part.name for part in gpu.PARTS]
        assert set(GPU.presets) == {"llava-7b", "qwen3-vl-8b"}

    def test_layers_are_taken_away_until_it_fits(self):
        rows, tried = [], []

        def measure(depth: int) -> dict:
            tried.append(depth)
            if depth > 9:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return {"seconds": 1.0}

        gpu_parts.attempt_depths(rows.append, {"preset": "qwen3-vl-8b"}, measure)
        assert tried == [36, 18, 9]
        assert [row["layers"] for row in rows] == ["36 of 36", "18 of 36", "9 of 36"]
        assert [row.get("left_out") for row in rows] == ["did not fit in memory"] * 2 + [None]

    def test_other_errors_are_told_at_once(self):
        rows = []

        def measure(depth: int) -> dict:
            raise RuntimeError("an illegal memory access\nmore")

        gpu_parts.attempt_depths(rows.append, {"preset": "llava-7b"}, measure)
        assert [row["left_out"] for row in rows] == ["RuntimeError: an illegal memory access"]

    def test_a_part_that_does_not_fit_ends_with_its_own_code(self, tmp_path, monkeypatch, capsys):
        def part(device, sizes, emit):
            emit({"device": device, "small": sizes is CPU})
            raise torch.OutOfMemoryError("CUDA out of memory: 80 GiB")

        monkeypatch.setitem(gpu_parts.MEASURES, "machine", part)
        lines = tmp_path / "lines"
        assert gpu_parts.measure_part("machine", "cpu", lines) == gpu.OUT_OF_MEMORY
        assert gpu.read_rows(lines) == [{"device": "cpu", "small": True}] and "80 GiB" in capsys.readouterr().err

    def test_the_machine(self):
        rows = []
        gpu_parts.machine("cpu", CPU, rows.append)
        assert [row["what"] for row in rows] == ["device", "product", "product", "product", "copy"]
        assert all(row["tflops"] > 0 for row in rows[1:4]) and rows[0]["memory_bytes"] > 2**30

    def test_concept_path(self):
        rows = []
        gpu_parts.concept_path("cpu", CPU, rows.append)
        assert [row["formulation"] for row in rows] == ["dense", "sparse"]
        assert all(row["largest_relative_difference"] < 1e-5 and row["forward_s"] > 0 for row in rows)

    def test_supervised_step(self):
        rows = []
        gpu_parts.supervised_step("cpu", CPU, rows.append)
        assert [(row["preset"], row["checkpointing"]) for row in rows] == [
            ("tiny", False), ("tiny", True), ("tiny-qwen3-vl", False), ("tiny-qwen3-vl", True),
        ]  # fmt: skip
        assert all(row["layers"] == "4 of 4" and row["tokens_per_s"] > 0 for row in rows)

    @pytest.mark.slow
    def test_segment(self):
        rows = []
        gpu_parts.segment("cpu", CPU, rows.append)
        bundled, shapes = rows[: len(CPU.segment)], rows[len(CPU.segment) :]
        assert all(row["pictures_per_second"] > 0 for row in bundled if "left_out" not in row)
        assert [row["preset"] for row in shapes] == list(CPU.presets)
        assert all(0 < row["tokens_written"] <= CPU.new_tokens for row in shapes)


@pytest.mark.slow
def test_the_command_on_a_cpu(tmp_path):
    """Two of its parts, end to end, in processes that find the package by themselves."""
    flags = [
        "--device",
        "cpu",
        "--minutes",
        "4",
        "--parts",
        "machine",
        "joint_step",
        "--output",
        str(tmp_path / "gpu"),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *flags], env=environment)
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert done.returncode == 0, record
    machine, joint = record["parts"]
    assert machine["outcome"] == joint["outcome"] == "done"
    assert [(row["preset"], row["workload"]) for row in joint["rows"]] == [
        (preset, workload) for preset in CPU.presets for workload in "ac"
    ]
    assert all(row["gradients_relative"] < 1e-5 for row in joint["rows"])
