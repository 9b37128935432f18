# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The parts of `gpu.py`; `python benchmarks/gpu_parts.py NAME DEVICE FILE` measures one alone.

A part calls `emit` with every row as soon as it has it: `what` is being measured, the setting, the figures; or
`left_out` with the reason in place of figures. The measurements are those of the benchmarks beside this file.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu import OUT_OF_MEMORY
from gpu_sizes import CPU, GPU, Sizes
from timing import PeakMemory, clock, device_name, median_seconds
from train_step_models import PRESETS, Preset, build_model, preset_of, prompt_inputs, supervised_inputs

Row = dict[str, Any]
Emit = Callable[[Row], None]
LEAST_DEPTH = 2  # layers of the language model, below which none are taken away


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's error, Python's, and what torch says where a CPU has none left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def attempt(setting: Row, measure: Callable[[], Row]) -> Row:
    """The setting with its figures, or with the reason why there are none."""
    try:
        return setting | measure()
    except Exception as error:
        if is_out_of_memory(error):
            return setting | {"left_out": "did not fit in memory"}
        return setting | {
            "left_out": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
        }
    finally:
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def attempt_depths(emit: Emit, setting: Row, measure: Callable[[int], Row], depth: int | None = None) -> None:
    """A row with all layers of the setting's preset, or `depth` of them, or half as many until they fit."""
    full = PRESETS[setting["preset"]].depth
    depth = depth or full
    while True:
        stated = {**setting, "layers": f"{depth} of {full}"}
        row = attempt(stated, lambda depth=depth: measure(depth))
        emit(row)
        if row.get("left_out") != "did not fit in memory" or depth // 2 < LEAST_DEPTH:
            return
        depth //= 2


def machine(device: str, sizes: Sizes, emit: Emit) -> None:
    """What the device is, and that it is as fast as its kind."""
    cuda = device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} finds no CUDA device here; pass --device cpu to try the parts.")
    memory = torch.cuda.get_device_properties(device).total_memory if cuda else None
    memory = memory or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    about = {"device": device_name(device), "memory_bytes": memory, "threads": torch.get_num_threads()}
    emit({"what": "device", **about, "cuda": torch.version.cuda if cuda else None})
    side = sizes.product

    def product(dtype: torch.dtype) -> Row:
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        return {"tflops": 2e-12 * side**3 / median_seconds(lambda: left @ right, device, repeats=5)}

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        emit(attempt({"what": "product", "dtype": str(dtype)[6:], "side": side}, lambda dtype=dtype: product(dtype)))
    source = torch.empty(side, side, device=device)
    seconds = median_seconds(lambda: source.clone(), device, repeats=5)
    emit({"what": "copy", "mebibytes": source.nbytes >> 20, "gigabytes_per_second": 2e-9 * source.nbytes / seconds})


def tests(device: str, sizes: Sizes, emit: Emit) -> None:
    """Every test is a row."""
    os.environ["SEGCOMPASS_TEST_DEVICE"] = device
    import pytest

    found: list[str] = []

    class Recorder:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when != "call" and report.passed:
                return
            found.append(report.outcome)
            row = {"test": report.nodeid.split("::", 1)[-1]}
            if report.skipped:
                reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
                emit(row | {"left_out": reason})
                return
            row |= {"outcome": report.outcome, "duration": round(report.duration, 2)}
            crash = getattr(report.longrepr, "reprcrash", None)
            emit(row | ({} if report.passed else {"message": getattr(crash, "message", str(report.longrepr))[:500]}))

    root = Path(__file__).resolve().parents[1]
    arguments = ["-q", "-p", "no:cacheprovider", "--rootdir", str(root), str(root / "tests" / "test_devices.py")]
    code = pytest.main([*arguments, *sizes.tests], plugins=[Recorder()])
    failed = found.count("failed")
    if failed or code:
        raise RuntimeError(f"{failed} of {len(found)} tests failed (pytest ended with {int(code)})")


def concept_path(device: str, sizes: Sizes, emit: Emit) -> None:
    from concept_path import compare, parse_arguments

    for batch_size, tokens, d_in, d_sae in sizes.concept_shapes:
        for dtype in dict.fromkeys(("float32", sizes.dtype)):
            shape = {"batch-size": batch_size, "tokens": tokens, "d-in": d_in, "d-sae": d_sae, "dtype": dtype}
            flags = [part for name, value in shape.items() for part in (f"--{name}", str(value))]
            record: Row = {}

            def measure(flags: list[str] = flags, record: Row = record) -> Row:
                record |= compare(parse_arguments([*flags, "--device", device]))
                worst = max(record[key]["relative"] for key in ("output_difference", "gradient_difference"))
                return {"largest_relative_difference": worst}

            difference = attempt(shape, measure)
            for name in ("dense", "sparse") if record else ():
                emit({"formulation": name, **shape, **record[name], **difference})
            if not record:
                emit(difference)


def supervised_step(device: str, sizes: Sizes, emit: Emit) -> None:
    for batch_size in sizes.batches:
        for name in sizes.presets:
            for checkpointing in (False, True):

                def measure(depth: int, name=name, batch_size=batch_size, checkpointing=checkpointing) -> Row:
                    preset = replace(preset_of(name, depth), batch_size=batch_size)
                    return _supervised_step(preset, device, sizes.dtype, checkpointing)

                setting = {"preset": name, "dtype": sizes.dtype, "rows": batch_size, "checkpointing": checkpointing}
                attempt_depths(emit, setting, measure)


def _supervised_step(preset: Preset, device: str, dtype: str, checkpointing: bool) -> Row:
    model = build_model(preset, device, getattr(torch, dtype))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameter_groups(2e-6, 0.01), lr=2e-6, fused=True)
    inputs = supervised_inputs(model, preset)

    def step() -> None:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with PeakMemory(device) as memory:
        seconds = median_seconds(step, device, repeats=3)
    tokens = inputs["input_ids"].numel()
    held = sum(parameter.nbytes for parameter in model.parameters())
    return {"step_s": seconds, "tokens_per_s": tokens / seconds, "weights_bytes": held, "step_bytes": memory.bytes}


def joint_step(device: str, sizes: Sizes, emit: Emit) -> None:
    """Both ends need a reference policy, the original's a whole one, so half of the layers are where this starts."""
    import train_step

    for name in sizes.presets:
        for workload in ("a", "c"):

            def measure(depth: int, name=name, workload=workload) -> Row:
                flags = ["--preset", name, "--depth", str(depth), "--device", device, "--dtype", sizes.dtype]
                given = train_step.parse_arguments([*flags, "--workloads", workload, "--repeats", "2"])
                with train_step.scaled_tiles(preset_of(name)):
                    record = train_step.benchmark(given)
                figures = record["workloads"][workload]
                naive, ours = figures["naive"], figures["ours"]
                return {
                    "naive_step_s": naive["step_s"],
                    "ours_step_s": ours["step_s"],
                    "forward_gain": ours["forward_gain"],
                    "step_gain": ours["step_gain"],
                    "naive_step_bytes": naive["step_bytes"],
                    "ours_step_bytes": ours["step_bytes"],
                    "gradients_relative": record["differences"][workload]["ours"]["gradients_relative"],
                }

            setting = {"preset": name, "workload": workload, "dtype": sizes.dtype}
            attempt_depths(emit, setting, measure, PRESETS[name].depth // 2)


def segment(device: str, sizes: Sizes, emit: Emit) -> None:
    from segment_cost import BITS, measure, parse_arguments

    from segcompass_hf.data import scenes

    most = 3 * max(size for _, size, _ in sizes.segment)
    made = [scenes.sample("val", number) for number in range(most)]
    rows = [{"image": scene.image, "instruction": scene.instruction.text} for scene in made]
    for dtype, size, reasoning in sizes.segment:
        setting = {"what": "bundled checkpoint, Scenes", "dtype": dtype, "batch_size": size, "reasoning": reasoning}
        if dtype in BITS and importlib.util.find_spec("bitsandbytes") is None:
            emit(setting | {"left_out": "bitsandbytes is not installed here"})
            continue
        flags = ["--device", device, "--dtype", dtype, "--reasoning", reasoning, "--batch-sizes", str(size)]
        given = parse_arguments([*flags, "--threads", str(torch.get_num_threads())])
        emit(attempt(setting, lambda given=given, size=size: measure(given, rows[: 3 * size])))
    for size in sizes.pictures:
        for name in sizes.presets:
            setting = {"what": "real layer shapes, random weights", "preset": name, "dtype": sizes.dtype}
            setting["pictures"] = size
            attempt_depths(emit, setting, lambda depth, n=name, p=size: _segment(n, depth, p, device, sizes))


def _segment(name: str, depth: int, pictures: int, device: str, sizes: Sizes) -> Row:
    """`segment` as a user waits for it, and its image encoder alone."""
    width, layers = sizes.sam
    preset = replace(preset_of(name, depth), sam_encoder_width=width, sam_encoder_depth=layers)
    model = build_model(preset, device, getattr(torch, sizes.dtype)).eval()
    inputs = prompt_inputs(model, preset, pictures)
    with PeakMemory(device) as memory, torch.no_grad():
        encoding = median_seconds(lambda: model.encode_image(inputs["sam_pixel_values"]), device, repeats=2)
        written: list[int] = []

        def answer() -> None:
            output = model.segment(**inputs, max_new_tokens=sizes.new_tokens)
            written.append(output.sequences.shape[1] - inputs["input_ids"].shape[1])

        seconds = median_seconds(answer, device, repeats=2)
    figures = {"sam_encoder": f"{width} wide, {layers} layers", "sam_encoder_s": encoding, "segment_s": seconds}
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return figures | {"tokens_written": written[-1], "weights_bytes": weights, "peak_bytes": memory.bytes}


def grpo(device: str, sizes: Sizes, emit: Emit) -> None:
    from grpo_sampling import whole_steps

    for size in sizes.grpo:
        setting = {"prompts_x_completions": size, "micro_batch": sizes.micro_batch}
        emit(attempt(setting, lambda size=size: whole_steps(size, 2, 120, device, sizes.micro_batch)))


COMPILED = {  # what is compiled -> the module, and a call of it
    "SAM's image encoder": lambda model, given: (model.sam.vision_encoder, lambda call: call(given["picture"])[0]),
    "decoder layers": lambda model, given: (
        model.base_model.language_model,
        lambda call: call(inputs_embeds=given["states"], use_cache=False).last_hidden_state,
    ),
    "whole forward": lambda model, given: (model, lambda call: call(**given["training"]).loss),
}


def torch_compile(device: str, sizes: Sizes, emit: Emit) -> None:
    for what in sizes.compiled:
        for name in sizes.presets:
            setting = {"target": what, "preset": name, "dtype": sizes.dtype}
            setting["layers"] = f"{sizes.compiled_depth} of {PRESETS[name].depth}"
            emit(attempt(setting, lambda what=what, name=name: _torch_compile(what, name, device, sizes)))
            torch.compiler.reset()


def _torch_compile(what: str, name: str, device: str, sizes: Sizes) -> Row:
    width, layers = sizes.sam
    preset = preset_of(name, sizes.compiled_depth)
    preset = replace(preset, sam_encoder_width=width, sam_encoder_depth=min(layers, sizes.compiled_depth))
    model = build_model(preset, device, getattr(torch, sizes.dtype)).eval()
    tokens = preset.prompt_tokens + preset.completion_tokens
    given = {
        "picture": prompt_inputs(model, preset, 1)["sam_pixel_values"],
        "states": torch.randn(1, tokens, preset.width, device=device, dtype=model.dtype),
        "training": supervised_inputs(model, preset),
    }
    return _compiled(*COMPILED[what](model, given), device)


@torch.no_grad()
def _compiled(module: torch.nn.Module, call: Callable[[Callable], torch.Tensor], device: str) -> Row:
    expected = call(module)
    eager = median_seconds(lambda: call(module), device, repeats=5)
    compiled = torch.compile(module)
    started = clock(device)
    found = call(compiled)
    first = clock(device) - started
    fast = median_seconds(lambda: call(compiled), device, repeats=5)
    difference = (found - expected).abs().max() / expected.abs().max()
    row = {"eager_s": eager, "compiled_s": fast, "gain": eager / fast, "first_call_s": first}
    return row | {"relative_difference": difference.item()}


PARTS = (machine, tests, concept_path, supervised_step, joint_step, segment, grpo, torch_compile)
MEASURES = {part.__name__: part for part in PARTS}


def measure_part(name: str, device: str, lines: Path) -> int:
    """Measure one part in this process; its rows go to `lines`, and the exit code is returned."""

    def emit(row: Row) -> None:
        with lines.open("a") as file:
            file.write(json.dumps(row) + "\n")

    try:
        MEASURES[name](device, GPU if device.startswith("cuda") else CPU, emit)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        print(error, file=sys.stderr)
        return OUT_OF_MEMORY
    return 0


if __name__ == "__main__":
    sys.exit(measure_part(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
