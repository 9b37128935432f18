# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""One optimizer step of joint training (forward, backward, AdamW; KL on), ours against the original's formulation.

Both run in one process on the same random weights and tokens, one after the other in turn, and must give the same loss
and gradients. `train_step_formulations.py` says what the original does and what each saving changes. On a CPU, and at
LLaVA-1.5-7B's shapes on a GPU:

    OMP_NUM_THREADS=1 python benchmarks/train_step.py --ladder --rss
    OMP_NUM_THREADS=1 python benchmarks/train_step.py --workloads a --ladder --name train_step_ladder
    OMP_NUM_THREADS=1 python benchmarks/train_step.py --gradient-checkpointing --name train_step_checkpointing
    OMP_NUM_THREADS=1 python benchmarks/train_step.py --workloads c --name train_step_groups
    python benchmarks/train_step.py --preset llava-7b --device cuda --ladder

Workload (a): rows of 576 image tokens, 100 words of prompt and 250 of completion, no padding. Workload (b): rows of
differing length in the original's layout (fixed widths, padding computed; the second pass reads the completion twice
with its padding as tokens, and the SAE all of it) against ours (padded to the longest row, read once). There the SAE's
input differs by design, so that log-probabilities and the gradients of the policy loss are compared. The original
pads to 1,400 + 2,000 tokens, and so does the `llava-7b` preset; the CPU preset pads to 1,024 + 512. Workload (c): one
prompt of 1,200 tokens and a group of 8 completions of 250, which ours computes once; "ours without sharing" computes
it for each of them. The original's side needs 7 GB there; `--preset cpu-shallow`, a third as deep, needs 2.5.

The CPU preset is LLaVA-1.5-7B with 3/32 of the width and 3/8 of the depth, frozen below the middle like it. The head
(vocabulary / (depth x width)), the SAE (d_sae / (depth x width)) and the vision tower keep their share of a VLM pass:
the table beside the results counts floating-point operations at both sizes. What cannot be kept: attention weighs more
(its cost grows with tokens, not with width), in every pass of every formulation alike; SAM's decoder (24 x 24 x 96 for
64 x 64 x 256) is nearer to its share of memory than of arithmetic, as it is bound by memory. Two sequences are the
micro-batch of the original's scripts. The policy's trained layers are 5 % off the reference's, so that the KL term is
not zero. Gradient checkpointing is off on both sides unless asked for (`--gradient-checkpointing`). The original's
scripts turn it on, at which little is left for its second pass to keep.

Time is wall time on CUDA; on a CPU it is the CPU time of the process, which other load hardly distorts (with one
thread; wall time is recorded too). Gains are medians over rounds of the ratio within a round.
Peak memory is exact: on CUDA the allocator's, elsewhere every tensor that torch makes is counted from birth to death
(`segcompass_hf.training.memory.meter`), in a step that is not timed. "Step" is what a step adds to what is held all
the time (weights, reference, AdamW states), gradients included; "total" is both. `--rss` repeats it for the two ends
in processes of their own by the resident set's high-water mark (Linux).
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
import transformers
import trl
from timing import clock_name, device_name
from train_step_formulations import LADDER, NAIVE, OURS, UNSHARED, WITHOUT_KL
from train_step_measuring import Bench, check, inputs_of, measure, resident_set, scaled_tiles
from train_step_models import PRESETS, preset_of, proportions
from train_step_report import to_markdown

TOLERANCE = 1e-5
RESULTS = Path(__file__).parent / "results"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="cpu")
    parser.add_argument("--depth", type=int, default=None, help="layers of the language model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=None, help="bfloat16 on CUDA by default")
    parser.add_argument("--workloads", nargs="+", choices=["a", "b", "c"], default=["a", "b"])
    parser.add_argument("--ladder", action="store_true", help="every saving in turn, and both ends without KL, on (a)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; every formulation runs once in each")
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", help="on both sides, as a setting of training"
    )
    parser.add_argument("--rss", action="store_true", help="also the resident set, in processes of their own")
    parser.add_argument("--name", default=None, help="of the record (.json, .md) in benchmarks/results")
    parser.add_argument("--output", type=Path, default=None, help="the record's path, where it goes elsewhere")
    parser.add_argument("--rss-of", nargs=2, metavar=("NAME", "WORKLOAD"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    return args


def resident_sets(args: argparse.Namespace) -> dict[str, dict]:
    """[`resident_set`] of both ends on every workload, each in a process of its own."""
    found: dict[str, dict] = {}
    for workload in args.workloads:
        for formulation in (NAIVE, UNSHARED, OURS) if workload == "c" else (NAIVE, OURS):
            command = [sys.executable, __file__, "--preset", args.preset, "--rss-of", formulation.name, workload]
            command += ["--gradient-checkpointing"] if args.gradient_checkpointing else []
            command += [] if args.depth is None else ["--depth", str(args.depth)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found.setdefault(workload, {})[formulation.name] = json.loads(output.splitlines()[-1])
    return found


def machine(device: str) -> dict:
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "python": platform.python_version(),
    }


def _without_output(arguments: list[str]) -> list[str]:
    """The command line but for where the record goes."""
    at = arguments.index("--output") if "--output" in arguments else len(arguments)
    return arguments[:at] + arguments[at + 2 :]


def benchmark(args: argparse.Namespace) -> dict:
    """The whole record."""
    load = [os.getloadavg()[0]] if hasattr(os, "getloadavg") else []
    bench = Bench(args, ["whole", "shared"])
    record = {
        "command": " ".join(["python benchmarks/train_step.py", *_without_output(sys.argv[1:])]),
        "machine": machine(args.device),
        "setting": {
            "preset": args.preset,
            "dtype": args.dtype,
            "repeats": args.repeats,
            "gradient_checkpointing": args.gradient_checkpointing,
            "clock": clock_name(bench.device),
            **vars(bench.preset),
        },
        "shared_prompt_tokens": bench.preset.group_prompt_tokens,
        "sequence": {},
        "differences": {},
        "workloads": {},
    }
    for workload in args.workloads:
        ends = [NAIVE, UNSHARED, OURS] if workload == "c" else [NAIVE, OURS]
        rows = [*LADDER, OURS, *WITHOUT_KL] if args.ladder and workload == "a" else ends
        record["sequence"][workload] = {
            end.name: list(inputs_of(bench, end, workload).vlm["input_ids"].shape) for end in ends
        }
        record["differences"][workload], peaks = check(bench, workload, rows)  # and a warm-up
        measured = measure(bench, workload, rows, args.repeats)
        for row in rows:
            held = bench.held(row)
            total = peaks[row.name] + sum(held.values())
            measured[row.name] |= {"held_bytes": held, "step_bytes": peaks[row.name], "total_bytes": total}
        record["workloads"][workload] = measured
    if load:
        record["load_average"] = [*load, os.getloadavg()[0]]
    del bench
    if args.rss:
        record["resident_set"] = resident_sets(args)
    return record


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    with scaled_tiles(preset_of(args.preset)):
        if args.rss_of:
            print(json.dumps(resident_set(args, *args.rss_of)))
            return 0
        record = benchmark(args)
        presets = {"llava-7b": PRESETS["llava-7b"], args.preset: preset_of(args.preset, args.depth)}
        record["proportions"] = {
            name: proportions(preset) for name, preset in presets.items() if preset.family == "llava"
        }
    name = "train_step" if args.preset == "cpu" else f"train_step_{args.preset}_{args.device.replace(':', '')}"
    path = args.output or RESULTS / f"{args.name or name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    path.with_suffix(".md").write_text(to_markdown(record))
    print(to_markdown(record))
    differences = [found[key] for part in record["differences"].values() for found in part.values()
                   for key in ("loss", "log_probs", "ref_log_probs", "gradients_relative")]  # fmt: skip
    if args.dtype == "float32" and max(differences) > TOLERANCE:
        print(f"formulations differ by {max(differences):.1e}, more than {TOLERANCE:.0e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
