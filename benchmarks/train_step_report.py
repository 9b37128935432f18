# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The record of the training-step benchmark as tables for people."""

MIB = 2**20
TARGETS = "1.9x forward, 1.6x step, 0.5x peak memory; on (c): 4x step, 0.25x memory added by a step"
LAYOUTS = {"a": "no padding", "b": "the original's layout against ours", "c": "a group of completions of one prompt"}


def to_markdown(record: dict) -> str:
    machine, setting = record["machine"], record["setting"]
    checkpointing = "on" if setting["gradient_checkpointing"] else "off"
    load = record.get("load_average", [])
    load = f"; load average {' to '.join(f'{value:.1f}' for value in load)}" if load else ""
    lines = [
        f"# One optimizer step of joint training, {setting['preset']} preset",
        "",
        f"{machine['device']}, {machine['threads']} threads; torch {machine['torch']}, transformers "
        f"{machine['transformers']}, trl {machine['trl']}, Python {machine['python']}; {setting['dtype']}; medians of "
        f"{setting['repeats']} interleaved rounds of {setting['clock']}{load}.",
        "",
        f"Language model of width {setting['width']} with {setting['depth']} layers, vocabulary "
        f"{setting['vocabulary']:,}, SAE of {setting['d_sae']:,} features behind layer {setting['depth'] // 2}, "
        f"{setting['batch_size']} sequences; gradient checkpointing {checkpointing}. The docstring of `train_step.py` "
        "says what is measured and how; what the original does is in `train_step_formulations.py`.",
        "",
        f"Targets on (a): {TARGETS}. A gain of 2x means half the time; memory is given as a share of the naive one.",
        "",
    ]
    for workload, rows in record["workloads"].items():
        lines += _workload(record, workload, rows)
    lines += _proportions(record["proportions"])
    lines += [f"Made by `{record['command'].strip()}`."]
    return "\n".join(lines) + "\n"


def _workload(record: dict, workload: str, rows: dict[str, dict]) -> list[str]:
    shapes = record["sequence"][workload]
    tokens = " and ".join(f"{name} {shape[0]} x {shape[1]}" for name, shape in shapes.items())
    tokens += f", of which {record['shared_prompt_tokens']} are one prompt" if workload == "c" else ""
    base = next(iter(rows.values()))
    lines = [
        f"## Workload ({workload}): {LAYOUTS[workload]}",
        "",
        f"Tokens per pass: {tokens}.",
        "",
        "| formulation | forward | backward | AdamW | step | forward gain | step gain | added by a step | total |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        memory = [_memory(row[key], base[key]) for key in ("step_bytes", "total_bytes")]
        times = " | ".join(f"{row[f'{part}_s']:.2f} s" for part in ("forward", "backward", "optimizer", "step"))
        gains = f"{row['forward_gain']:.2f}x | {row['step_gain']:.2f}x"
        lines.append(f"| {name} | {times} | {gains} | {' | '.join(memory)} |")
    lines += ["", *_held(rows), *_without_kl(rows)]
    ours = rows["ours"]
    lines += [
        f"Matching slots to objects takes {ours['matching_s'] * 1e3:.1f} ms of ours, {ours['matching_share']:.2%} of "
        f"the step. By wall time the gains are {ours['wall_forward_gain']:.2f}x forward and "
        f"{ours['wall_step_gain']:.2f}x for the step.",
        "",
    ]
    if "resident_set" in record:
        sets = record["resident_set"][workload]
        lines += ["Resident set of a process of its own (Python and libraries included in the total): " + "; ".join(
            f"{name} {found['step_bytes'] / MIB:,.0f} MiB added by a step, {found['total_bytes'] / MIB:,.0f} MiB total"
            for name, found in sets.items()
        ) + ". Ours over naive: " + ", ".join(
            f"{sets['ours'][key] / sets['naive'][key]:.2f}x" for key in ("step_bytes", "total_bytes")
        ) + ".", ""]  # fmt: skip
    return lines + _differences(record["differences"][workload])


def _memory(size: int, base: int) -> str:
    return f"{size / MIB:,.0f} MiB ({size / base:.2f}x)"


def _held(rows: dict[str, dict]) -> list[str]:
    text = "; ".join(
        f"{name}: " + ", ".join(f"{part} {size / MIB:,.0f} MiB" for part, size in rows[name]["held_bytes"].items())
        for name in ("naive", "ours")
    )
    return [f"Held all the time: {text}.", ""]


def _without_kl(rows: dict[str, dict]) -> list[str]:
    if "ours without KL" not in rows:
        return []
    naive, ours = rows["naive without KL"], rows["ours without KL"]
    gains = [naive[f"{part}_s"] / ours[f"{part}_s"] for part in ("forward", "step")]
    shares = [ours[key] / naive[key] for key in ("step_bytes", "total_bytes")]
    return [
        f"Without KL, ours against naive without KL: forward {gains[0]:.2f}x, step {gains[1]:.2f}x, memory added by a "
        f"step {shares[0]:.2f}x, total {shares[1]:.2f}x.",
        "",
    ]


def _differences(found: dict[str, dict]) -> list[str]:
    lines = [
        "| against naive | loss compared | loss | log-probabilities | the reference's | gradients | relative |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        values = " | ".join(
            f"{row[key]:.1e}" for key in ("loss", "log_probs", "ref_log_probs", "gradients", "gradients_relative")
        )
        lines.append(f"| {name} | {row['compared'].replace('_', ' ')} {row['values'][0]:.6f} | {values} |")
    return [
        *lines,
        "",
        "Largest differences; gradients absolutely, and relative to the largest gradient in the same part of the "
        "model (VLM, codebook, slot encoder, slot mapper, SAM).",
        "",
    ]


def _proportions(found: dict[str, dict[str, float]]) -> list[str]:
    names = list(found)
    lines = [
        "## Proportions",
        "",
        "Floating-point operations of one sequence of (a), forward, in percent of one whole pass of the VLM:",
        "",
        f"| part | {' | '.join(names)} |",
        "|---|" + "---|" * len(names),
    ]
    for part in found[names[0]]:
        lines.append(f"| {part} | " + " | ".join(f"{100 * found[name][part]:.2f}" for name in names) + " |")
    return [*lines, ""]
