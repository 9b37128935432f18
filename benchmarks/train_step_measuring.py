# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Time, peak memory and results of the training-step benchmark's formulations."""

import argparse
import gc
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
import trl.trainer.utils
from timing import PeakMemory, clock, resident, synchronize
from train_step_formulations import NAIVE, OURS, UNSHARED, Formulation, References, StepInputs, run_forward
from train_step_models import Preset, build_model, let_policy_drift, preset_of
from train_step_workloads import make_inputs

from segcompass_hf import losses_segcompass
from segcompass_hf.training.memory.meter import MemoryMeter


class Bench:
    """Model, reference policies and optimizer; every step starts from the same weights."""

    def __init__(self, args: argparse.Namespace, references: list[str]):
        self.preset, self.device = preset_of(args.preset, args.depth), torch.device(args.device)
        self.model = build_model(self.preset, args.device, getattr(torch, args.dtype))
        self.references = References(self.model)
        for kind in references:
            self.references.build(kind)
        let_policy_drift(self.model)
        if args.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            # transformers 5 asks for gradients of the embeddings then, and the naive pass would go through the frozen
            # layers backwards too; the original's did not.
            self.model.disable_input_require_grads()
        self.optimizer = torch.optim.AdamW(self.model.parameter_groups(2e-6, 0.01), lr=2e-6, fused=True)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.weights = [parameter.detach().clone() for parameter in self.trained]
        for parameter in self.trained:  # AdamW's states come into being
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        for parameter, weight in zip(self.trained, self.weights, strict=True):
            parameter.copy_(weight)
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        synchronize(self.device)

    def step(self, formulation: Formulation, inputs: StepInputs) -> dict[str, float]:
        """One optimizer step; seconds of its parts and of all by `clock`, and wall seconds of forward and all."""
        self.reset()
        marks = [self._mark()]
        loss = run_forward(self.model, self.references, formulation, inputs).loss(inputs)
        marks.append(self._mark())
        loss.backward()
        marks.append(self._mark())
        self.optimizer.step()
        marks.append(self._mark())
        started, scored, differentiated, stepped = (mark[0] for mark in marks)
        return {
            "forward": scored - started,
            "backward": differentiated - scored,
            "optimizer": stepped - differentiated,
            "step": stepped - started,
            "wall_forward": marks[1][1] - marks[0][1],
            "wall_step": marks[3][1] - marks[0][1],
        }

    def _mark(self) -> tuple[float, float]:
        return clock(self.device), time.perf_counter()

    def counted_step(
        self, formulation: Formulation, inputs: StepInputs, objective: Literal["joint", "policy"] = "joint"
    ) -> tuple[int, dict]:
        """Bytes that a step adds at its fullest to what is held all the time; and what it computed, to compare.

        With the `policy` objective the segmentation losses are left out.
        """
        self.reset()
        cuda = self.device.type == "cuda"
        known = [*self.model.parameters(), *self.model.buffers(), *self._states()]
        with PeakMemory(self.device) if cuda else MemoryMeter(known) as meter:
            output = run_forward(self.model, self.references, formulation, inputs)
            loss = output.loss(inputs)
            policy_loss = loss - output.segmentation
            result = {"loss": loss.item(), "policy_loss": policy_loss.item()}
            result["log_probs"] = _real_tokens(output.log_probs, inputs)
            result["ref_log_probs"] = _real_tokens(output.ref_log_probs, inputs)
            loss = policy_loss if objective == "policy" else loss
            del output, policy_loss
            loss.backward()
            self.optimizer.step()
        peak = meter.bytes if cuda else meter.peak
        result["gradients"] = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        return peak, result

    def held(self, formulation: Formulation) -> dict[str, int]:
        """Bytes of weights, reference policy and AdamW states."""
        weights = sum(tensor.nbytes for tensor in [*self.model.parameters(), *self.model.buffers()])
        reference = self.references.bytes(formulation.reference)
        return {"weights": weights, "reference": reference, "optimizer": sum(state.nbytes for state in self._states())}

    def _states(self) -> list[torch.Tensor]:
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        return [state for state in states if isinstance(state, torch.Tensor)]


@contextmanager
def scaled_tiles(preset: Preset):
    """Lets TRL's head project the vocabulary in tiles no wider than it is.

    A tile is 32,768 words wide whatever the vocabulary: what is right for LLaVA's 32,064 would count as 29 times too
    much beside the small one of the CPU preset, although most of it is never touched.
    """
    width = trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE
    trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = min(width, preset.vocabulary)
    try:
        yield
    finally:
        trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = width


def inputs_of(bench: Bench, formulation: Formulation, workload: str) -> StepInputs:
    layout = "original" if formulation.second_pass != "none" else "ours"
    inputs = make_inputs(bench.model, bench.preset, workload, layout)
    if formulation.prompts == "each":
        inputs.targets.prompts = None
    return inputs


def check(bench: Bench, workload: str, formulations: list[Formulation]) -> tuple[dict[str, dict], dict[str, int]]:
    """Differences of formulations to the first in losses, log-probabilities and gradients; and all their peaks."""
    found, peaks, first = {}, {}, None
    for formulation in formulations:
        inputs = inputs_of(bench, formulation, workload)
        if inputs.targets.prompts is not None:  # once in a training, both ways are tried on a part
            with torch.no_grad():
                run_forward(bench.model, bench.references, formulation, inputs)
        peaks[formulation.name], result = bench.counted_step(formulation, inputs)
        if formulation.reference == "none":
            continue
        if workload == "b":  # the SAE's inputs differ by design: compare what does not come from them
            _, result = bench.counted_step(formulation, inputs, "policy")
        if first is None:
            first = result
        else:
            found[formulation.name] = _difference(result, first, workload)
        print(f"({workload}) {formulation.name}: {peaks[formulation.name] / 2**20:.0f} MiB", file=sys.stderr)
    return found, peaks


def _real_tokens(log_probs: torch.Tensor | None, inputs: StepInputs) -> torch.Tensor | None:
    """Log-probabilities of completion tokens, row by row without padding."""
    return None if log_probs is None else log_probs.detach()[inputs.completion_mask.bool()].float()


def _difference(result: dict, first: dict, workload: str) -> dict:
    compared = "policy_loss" if workload == "b" else "loss"
    own, other = result["gradients"], first["gradients"]
    if own.keys() != other.keys():
        raise RuntimeError(f"not the same parameters have gradients: {sorted(own.keys() ^ other.keys())}.")
    largest, difference = {}, {}
    for name, gradient in other.items():
        # By part of the model: some gradients are nothing but rounding (biases of attention keys).
        part = name.split(".")[0]
        largest[part] = max(largest.get(part, 0.0), gradient.abs().max().item())
        difference[part] = max(difference.get(part, 0.0), (own[name] - gradient).abs().max().item())
    return {
        "compared": compared,
        "values": [first[compared], result[compared]],
        "loss": abs(result[compared] - first[compared]),
        "log_probs": (result["log_probs"] - first["log_probs"]).abs().max().item(),
        "ref_log_probs": (result["ref_log_probs"] - first["ref_log_probs"]).abs().max().item(),
        "gradients": max(difference.values()),
        "gradients_relative": max(difference[part] / largest[part] for part in largest if largest[part]),
        "parts": {part: {"largest": largest[part], "difference": difference[part]} for part in largest},
    }


@contextmanager
def matching_clock(bench: Bench):
    """Yields a list of the seconds that every matching of slots to objects takes."""
    match_slots, seconds = losses_segcompass.match_slots, []

    def timed(*args, **kwargs):
        started = clock(bench.device)
        assignments = match_slots(*args, **kwargs)
        seconds.append(clock(bench.device) - started)
        return assignments

    losses_segcompass.match_slots = timed
    try:
        yield seconds
    finally:
        losses_segcompass.match_slots = match_slots


def measure(bench: Bench, workload: str, formulations: list[Formulation], repeats: int) -> dict[str, dict]:
    """Medians over `repeats` rounds, each of which runs every formulation once."""
    inputs = {formulation.name: inputs_of(bench, formulation, workload) for formulation in formulations}
    rounds: dict[str, list[dict]] = {formulation.name: [] for formulation in formulations}
    for number in range(repeats):
        # Back and forth, so that no formulation always follows the same one.
        for formulation in formulations if number % 2 == 0 else formulations[::-1]:
            with matching_clock(bench) as seconds:
                times = bench.step(formulation, inputs[formulation.name])
            rounds[formulation.name].append(times | {"matching": sum(seconds)})
            print(f"({workload}) {number + 1}/{repeats} {formulation.name}: {times['step']:.2f} s", file=sys.stderr)
    records = {}
    for formulation in formulations:
        runs, base = rounds[formulation.name], rounds[formulations[0].name]
        record = {f"{part}_s": statistics.median(run[part] for run in runs) for part in runs[0]}
        for part in ("forward", "step", "wall_forward", "wall_step"):
            ratios = [first[part] / run[part] for first, run in zip(base, runs, strict=True)]
            record[f"{part}_gain"] = statistics.median(ratios)
            record[f"{part}_gains"] = ratios
        record["matching_share"] = statistics.median(run["matching"] / run["step"] for run in runs)
        records[formulation.name] = record
    return records


def resident_set(args: argparse.Namespace, name: str, workload: str) -> dict[str, int]:
    """What a step adds to the resident set of this process at its fullest, and the whole set then."""
    import ctypes

    formulation = next(each for each in (NAIVE, UNSHARED, OURS) if each.name == name)
    bench = Bench(args, [formulation.reference])
    inputs = inputs_of(bench, formulation, workload)
    bench.step(formulation, inputs)
    bench.reset()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    bench.step(formulation, inputs)
    peak = resident("VmHWM")
    return {"step_bytes": peak - before, "total_bytes": peak}
