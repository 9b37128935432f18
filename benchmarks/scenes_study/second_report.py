"""Tables of the study's second part, of the runs that are finished:

    python benchmarks/scenes_study/second_report.py
    python benchmarks/scenes_study/second_report.py --smoke              # beside the smoke runs

Writes `second.md` and `second.json` to `benchmarks/results/scenes_study`. PROTOCOL_SECOND.md says what the tables are
to answer. Intervals are percentile bootstraps over scenes, the same ones for every arm, and over seeds where an arm
has several.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ablation_report import Scores, cell, difference, each_seed, interval, mean_of
from runs import attempts, cpu_minutes, write_json
from second_settings import BUDGET_CPU_HOURS, COUNTED, GROUP, PROMPTS_PER_STEP, SAMPLES_AFTER, SEEDS, SMOKE, Size
from settings import OTHERS, RESULTS, SPLITS, TAUGHT

from segcompass_hf.evaluation import read_samples
from segcompass_hf.evaluation.pass_at_k import read_prompts
from segcompass_hf.evaluation.records import choice_score_of, score_of
from segcompass_hf.metrics import pass_at_k
from segcompass_hf.pages import markdown_table
from segcompass_hf.training.recipe.record import DONE

NAMES = {
    "start": "start",
    "rl_only": "RL only",
    "seg_only": "segmentation only",
    "both": "both",
    "both_guided": "both, guided",
    "expert": "expert iteration",
    "reference": "reference",
}
COMPARED = (
    *((arm, "start") for arm in SEEDS),
    ("both", "seg_only"),
    ("seg_only", "rl_only"),
    ("both", "rl_only"),
    ("both", "expert"),
    ("both_guided", "both"),
    ("both", "reference"),
)
KINDS = (*TAUGHT, *OTHERS)
GROUPS = {"all kinds": KINDS, "first three kinds": TAUGHT, "other kinds": OTHERS}
CURVES = ("answers_right", "groups/dropped")  # of the log of a run
MEASURES = {"right": "Answers right", "iou": "gIoU"}
ONE_OF_FIVE = 0.99  # confidence for each of the five kinds not taught, 95 % for all of them together (Bonferroni)


def read_run(folder: Path, seed: int | None) -> dict[str, Any]:
    """What a finished run came to, as [`Scores`] reads it, and what it took."""
    samples = {split: read_samples(folder / "evaluation" / split) for split in SPLITS}
    log = [line for done in folder.rglob(DONE) for line in json.loads(done.read_text())["log"] if "reward" in line]
    rounds = [read_prompts(where) for where in folder.glob("round-*/samples")]
    steps = [PROMPTS_PER_STEP * GROUP / (1 - line.get("groups/dropped", 0.0)) for line in log]  # one line per step
    return {
        "seed": seed,
        "scenes": {split: [sample["sample_id"] for sample in of] for split, of in samples.items()},
        "kinds": {split: [sample["kind"] for sample in of] for split, of in samples.items()},
        "iou": {split: [score_of(sample).iou for sample in of] for split, of in samples.items()},
        "right": {split: [int(choice_score_of(sample).iou == 1) for sample in of] for split, of in samples.items()},
        "sampled": read_prompts(folder / "samples"),
        "curves": {name: [line[name] for line in log if name in line] for name in CURVES},
        "completions": round(sum(steps)) + sum(len(prompt["right"]) for prompts in rounds for prompt in prompts),
        "cpu_minutes": round(cpu_minutes(folder), 1),
        "commits": sorted({attempt["commit"] for attempt in attempts(folder)}),
    }


def finished(size: Size) -> dict[str, list[dict[str, Any]]]:
    """Finished runs by arm, the start among them."""
    places = {"start": {None: size.folder / "start"}}
    places |= {arm: {seed: size.folder / f"{arm}-{seed}" for seed in seeds} for arm, seeds in SEEDS.items()}
    found = {
        arm: [read_run(folder, seed) for seed, folder in its.items() if (folder / "done.json").is_file()]
        for arm, its in places.items()
    }
    found = {arm: runs for arm, runs in found.items() if runs}
    if "start" not in found:
        sys.exit("the start is not evaluated: run second.py --evaluate-start first.")
    for arm, runs in found.items():
        if any(run["scenes"] != found["start"][0]["scenes"] for run in runs):
            sys.exit(f"{arm} was evaluated on other scenes than the start, so that nothing is paired: run it again.")
    return found


def of_kinds(scores: Scores, kinds: Sequence[str]) -> list[np.ndarray]:
    """One (seeds, samples) array per split that has such kinds."""
    return [array for array in scores.of(None, kinds) if array.size]


def kind_tables(arms: dict[str, Scores], title: str) -> tuple[list[str], dict[str, Any]]:
    """A measure by kind, and what of it is more than the start's."""
    shown, gained = {}, {}
    for arm, scores in arms.items():
        for name, kinds in {"all kinds": KINDS, "other kinds": OTHERS, **{kind: (kind,) for kind in KINDS}}.items():
            own, start = of_kinds(scores, kinds), of_kinds(arms["start"], kinds)
            if not own:
                continue
            shown.setdefault(name, {})[arm] = mean_of(own), interval(own, None)
            if arm != "start":
                confidence = ONE_OF_FIVE if name in OTHERS else 0.95
                less = mean_of(own) - mean_of(start), interval(own, start, confidence=confidence)
                gained.setdefault(name, {})[arm] = less
    head = [NAMES[arm] for arm in arms]
    rows = [[name, *(cell(*its) for its in of.values())] for name, of in shown.items()]
    lines = [f"## {title}, mean of the splits", markdown_table(["kind", *head], rows)]
    if gained:
        lines.append(
            f"Less the start's, scenes paired. Kinds without reference reasoning: {ONE_OF_FIVE:.0%} intervals, since "
            "there are five of them."
        )
        rows = [[name, *(difference(*its) for its in of.values())] for name, of in gained.items()]
        lines.append(markdown_table(["kind", *head[1:]], rows))
    return lines, {"by_kind": shown, "less_the_start": gained}


def comparison_table(arms: dict[str, Scores]) -> tuple[list[str], dict[str, Any]]:
    """Arms compared with each other."""
    record, rows = {}, []
    for first, second in COMPARED:
        if first not in arms or second not in arms:
            continue
        cells = {}
        for name, kinds in GROUPS.items():
            one, other = of_kinds(arms[first], kinds), of_kinds(arms[second], kinds)
            cells[name] = mean_of(one) - mean_of(other), interval(one, other)
        seeds = each_seed(arms[first], arms[second])
        record[f"{first} - {second}"] = {**cells, "each seed": seeds}
        apart = ", ".join(f"{value:+.3f}" for value in seeds)
        rows.append([f"{NAMES[first]} - {NAMES[second]}", *(difference(*its) for its in cells.values()), apart])
    return ([markdown_table(["arms", *GROUPS, "each seed"], rows)] if rows else []), record


def prediction_table(runs: dict[str, list[dict[str, Any]]], before: list[dict[str, Any]]) -> tuple[list[str], dict]:
    """pass@k of the start beside pass@1 of every arm, on the same scenes."""
    ks = [k for k in (1, 8, 16) if k <= len(before[0]["right"])]
    record = {}
    for name, kinds in {"all kinds": KINDS, **{kind: (kind,) for kind in KINDS}}.items():
        asked = [prompt for prompt in before if prompt["kind"] in kinds]
        if not asked:
            continue
        its = record[name] = {
            f"start, pass@{k}": np.mean([pass_at_k(sum(one["right"]), len(one["right"]), k) for one in asked])
            for k in ks
        }
        for arm, of in runs.items():
            if arm != "start":
                right = [[np.mean(one["right"]) for one in run["sampled"] if one["kind"] in kinds] for run in of]
                its[f"{NAMES[arm]}, pass@1"] = [np.mean(right), *interval([np.array(right)], None)]
    head = list(record["all kinds"])
    rows = [
        [name, *(cell(value[0], value[1:]) if isinstance(value, list) else f"{value:.3f}" for value in its.values())]
        for name, its in record.items()
    ]
    return [markdown_table(["kind", *head], rows)], record


def cost_table(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """What every run took, and where its curves began and ended."""
    rows = []
    for arm, of in runs.items():
        for run in of if arm != "start" else ():
            curve, dropped = (run["curves"][name] for name in CURVES)
            tenth = max(1, len(curve) // 10)
            ends = f"{np.mean(curve[:tenth]):.3f} to {np.mean(curve[-tenth:]):.3f}" if curve else "-"
            share = f"{np.mean(dropped):.2f}" if dropped else "-"
            taken = run["completions"], f"{run['cpu_minutes'] / 60:.2f}", ", ".join(run["commits"])
            rows.append([f"{NAMES[arm]}, seed {run['seed']}", ends, share, *taken])
    head = "run", "answers right, first to last tenth", "groups dropped", "completions sampled", "CPU hours", "commit"
    return ["## Runs", markdown_table(head, rows)]


def report(size: Size) -> tuple[str, dict[str, Any]]:
    """The page, and its figures."""
    runs = finished(size)
    start = json.loads((size.folder / "start.json").read_text())["start"]
    record: dict[str, Any] = {"start": start, "measures": {}}
    missing = [f"{arm}-{seed}" for arm, seeds in SEEDS.items() for seed in seeds]
    missing = sorted(set(missing) - {f"{arm}-{run['seed']}" for arm, of in runs.items() for run in of})
    hours = sum(cpu_minutes(folder.parent) for folder in size.folder.rglob("attempts")) / 60
    lines = [
        "# Second part: what reinforcement adds to a start that can learn",
        f"{size.steps} steps of {PROMPTS_PER_STEP} prompts from the start `{start}`. Greedy answers to "
        f"{size.evaluated} scenes of each split. "
        "An answer is right where it chose the objects asked for and no others. Brackets: 95 %, "
        "percentile bootstrap over scenes and, where an arm has several, over seeds. Protocol: "
        "`scenes_study/PROTOCOL_SECOND.md`.",
        f"Not finished: {', '.join(missing) or 'none'}. "
        f"{hours:.1f} of {BUDGET_CPU_HOURS:.0f} CPU hours, starts aside.",
    ]
    for measure, title in MEASURES.items():
        arms = {arm: Scores(of, measure) for arm, of in runs.items()}
        by_kind, figures = kind_tables(arms, title)
        compared, figures["differences"] = comparison_table(arms)
        record["measures"][measure] = figures
        lines += [*by_kind, *compared]
    predicted, record["prediction"] = prediction_table(runs, read_prompts(size.folder / "predictions" / start))
    lines += [
        "## What was predicted",
        f"Answers sampled to the same {size.predicted} scenes of `val`: of the start before training, and "
        f"{SAMPLES_AFTER} of every arm's model after it.",
        *predicted,
        *cost_table(runs),
    ]
    left_out = "scenes", "kinds", "sampled"
    record["runs"] = {
        f"{arm}-{run['seed']}": {name: value for name, value in run.items() if name not in left_out}
        for arm, of in runs.items()
        for run in of
    }
    return "\n\n".join(lines) + "\n", record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="of the smoke runs")
    size = SMOKE if parser.parse_args().smoke else COUNTED
    page, record = report(size)
    folder = size.folder if size is SMOKE else RESULTS
    write_json(folder / "second.json", record)
    (folder / "second.md").write_text(page)


if __name__ == "__main__":
    main()
