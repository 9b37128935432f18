# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The concept path, sparse against dense: SAE encode -> threshold -> codebook, and the codebook's gradient.

Both formulations run in one process on the same random weights and states. The sparse one is the package's own
(`encode_concepts`, `ConceptCodebook`); the dense one encodes all tokens at once, zeroes what is below the threshold
and multiplies with the codebook, keeping the (tokens, d_sae) activations for the backward pass. Neither keeps a graph
through the frozen SAE. LLaVA-7B shapes, on a GPU and on a CPU:

    python benchmarks/concept_path.py --d-sae 65536 --tokens 1400 --d-in 4096 --device cuda --dtype bfloat16
    python benchmarks/concept_path.py --d-sae 65536 --tokens 1400 --d-in 4096

Peak memory is what a formulation adds while it runs: torch's own count on CUDA, the resident set's high-water mark on
Linux (reset before each run). Time is wall time on CUDA; on a CPU it is the CPU time of the process, which other load
hardly distorts. Exits with 1 where float32 results differ by more than 1e-5, absolutely or relative to the largest.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from timing import PeakMemory, clock, clock_name, device_name

from segcompass_hf import SegCompassSaeConfig
from segcompass_hf.modeling_concepts import ConceptCodebook, encode_concepts
from segcompass_hf.modeling_sae import SegCompassSae

TOLERANCE = 1e-5
RESULTS = Path(__file__).parent / "results"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=512, help="width of the hidden states")
    parser.add_argument("--d-sae", type=int, default=16384, help="features")
    parser.add_argument("--d-slot", type=int, default=512, help="width of the codebook")
    parser.add_argument("--tokens", type=int, default=1400, help="tokens per sample")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--active", type=float, default=64.0, help="expected features above the threshold per token")
    parser.add_argument("--threshold", type=float, default=2.0, help="concept_threshold")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each; the median is reported")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--output", type=Path, default=None, help="JSON record; a .md beside it (default: results/)")
    return parser.parse_args(arguments)


def build(args: argparse.Namespace) -> tuple[SegCompassSae, ConceptCodebook, torch.Tensor, torch.Tensor]:
    """Random SAE, codebook, hidden states and upstream gradient with about `args.active` concepts per token."""
    torch.manual_seed(0)
    config = SegCompassSaeConfig(
        d_in=args.d_in, d_sae=args.d_sae, normalize_activations="per_token", initializer_range=args.d_in**-0.5
    )
    sae = SegCompassSae(config).eval().requires_grad_(False)
    # Pre-activations are standard normal here, so the bias sets the share of features above the threshold.
    quantile = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - args.active / args.d_sae)).item()
    sae.b_enc.fill_(args.threshold - quantile)
    codebook = ConceptCodebook(args.d_sae, args.d_slot)
    torch.nn.init.normal_(codebook.weight, std=0.02)
    states = torch.randn(args.batch_size, args.tokens, args.d_in)
    # A mean over the tokens, as in a loss.
    upstream = torch.randn(args.batch_size, args.tokens, args.d_slot) / (args.batch_size * args.tokens)
    dtype = getattr(torch, args.dtype)
    return tuple(item.to(args.device, dtype) for item in (sae, codebook, states, upstream))


def sparse_path(sae: SegCompassSae, codebook: ConceptCodebook, states: torch.Tensor, threshold: float) -> torch.Tensor:
    return codebook(encode_concepts(sae, states, None, threshold))


def dense_path(sae: SegCompassSae, codebook: ConceptCodebook, states: torch.Tensor, threshold: float) -> torch.Tensor:
    with torch.no_grad():
        feature_acts = sae.encode(states)  # (batch_size, tokens, d_sae)
        feature_acts = feature_acts.masked_fill(feature_acts.abs() < threshold, 0.0)
    return codebook.dense(feature_acts)


def measure(path: Callable, args: argparse.Namespace, parts: tuple) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Time and peak memory of forward and backward, with the output and the codebook's gradient (on the CPU)."""
    sae, codebook, states, upstream = parts
    device, forward, backward, peaks = states.device, [], [], []
    warmup = 1 if device.type == "cuda" else 0
    for _ in range(warmup + args.repeats):
        codebook.weight.grad = None
        with PeakMemory(device) as memory:
            started = clock(device)
            output = path(sae, codebook, states, args.threshold)
            encoded = clock(device)
            output.backward(upstream)
            finished = clock(device)
        forward.append(encoded - started)
        backward.append(finished - encoded)
        peaks.append(memory.bytes)
        output, gradient = output.detach(), codebook.weight.grad
    record = {
        "forward_s": statistics.median(forward[warmup:]),
        "backward_s": statistics.median(backward[warmup:]),
        "peak_bytes": None if None in peaks else max(peaks[warmup:]),
    }
    codebook.weight.grad = None
    return record, output.cpu().float(), gradient.cpu().float()


def difference(ours: torch.Tensor, reference: torch.Tensor) -> dict:
    max_abs, reference_max = (ours - reference).abs().max().item(), reference.abs().max().item()
    return {"max_abs": max_abs, "relative": max_abs / reference_max, "reference_max": reference_max}


def to_markdown(record: dict) -> str:
    """The record as a table for people."""
    setting, rows = record["setting"], []
    for name in ("dense", "sparse"):
        run = record[name]
        peak = "unknown" if run["peak_bytes"] is None else f"{run['peak_bytes'] / 2**20:,.0f} MiB"
        rows.append(f"| {name} | {run['forward_s'] * 1e3:,.1f} ms | {run['backward_s'] * 1e3:,.1f} ms | {peak} |")
    lines = [
        f"# Concept path on {record['device']}",
        "",
        f"{setting['batch_size']} x {setting['tokens']} tokens, d_in {setting['d_in']:,}, d_sae {setting['d_sae']:,}, "
        f"d_slot {setting['d_slot']}, {setting['dtype']}, {record['active_per_token']:.1f} concepts per token; "
        f"torch {record['torch']}; {clock_name(setting['device'])}, median of {setting['repeats']}.",
        "",
        "| formulation | forward | backward | added peak memory |",
        "|---|---|---|---|",
        *rows,
        "",
        "Largest difference, absolute and relative to the largest value: "
        + "; ".join(
            f"{what} {record[key]['max_abs']:.1e} and {record[key]['relative']:.1e}"
            for what, key in (("output", "output_difference"), ("codebook gradient", "gradient_difference"))
        )
        + ".",
        "",
        f"Made by `{' '.join(['python benchmarks/concept_path.py', *sys.argv[1:]])}`.",
    ]
    return "\n".join(lines) + "\n"


def compare(args: argparse.Namespace) -> dict:
    """The record: both formulations' figures and how far their results are apart."""
    parts = build(args)
    # The sparse formulation first: what the dense one leaves in the allocator cannot help it.
    sparse, sparse_output, sparse_gradient = measure(sparse_path, args, parts)
    dense, dense_output, dense_gradient = measure(dense_path, args, parts)
    concepts = encode_concepts(parts[0], parts[2], None, args.threshold)
    threads = "" if args.device.startswith("cuda") else f", {torch.get_num_threads()} threads"
    return {
        "command": " ".join(sys.argv[1:]),
        "device": device_name(args.device) + threads,
        "torch": torch.__version__,
        "setting": {key: value for key, value in vars(args).items() if key != "output"},
        "active_per_token": concepts.features.numel() / (args.batch_size * args.tokens),
        "sparse": sparse,
        "dense": dense,
        "output_difference": difference(sparse_output, dense_output),
        "gradient_difference": difference(sparse_gradient, dense_gradient),
    }


def main() -> int:
    args = parse_arguments()
    record = compare(args)
    name = f"concept_path_{args.device.replace(':', '')}_{args.dtype}_{args.d_sae}.json"
    path = args.output or RESULTS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    path.with_suffix(".md").write_text(to_markdown(record))
    sys.stdout.write(to_markdown(record))
    worst = max(
        record[key][how] for key in ("output_difference", "gradient_difference") for how in ("max_abs", "relative")
    )
    if args.dtype == "float32" and worst > TOLERANCE:
        sys.stderr.write(f"sparse and dense differ by {worst:.1e}, more than {TOLERANCE:.0e}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
