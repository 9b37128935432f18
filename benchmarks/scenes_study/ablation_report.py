"""Tables and curves of the ablation, from its records:

    python benchmarks/scenes_study/ablation_report.py

Writes `ablation.md`, `ablation.json` and `ablation.png` to `benchmarks/results/scenes_study`. Intervals are percentile
bootstraps over scenes, the same scenes for every arm, and over seeds where an arm has several.
"""

import json
from collections.abc import Sequence

import numpy as np
from runs import attempts, cpu_minutes, write_json
from settings import ARMS, EVALUATION_SAMPLES, EVALUATION_SEED, GRPO, RESULTS, ROUNDS, RUNS, SPLITS, TAUGHT

from segcompass_hf.evaluation import read_samples
from segcompass_hf.evaluation.records import score_of

NAMES = {
    "start": "shared start",
    "start-latent": "latent queries, start",
    "rl_only": "RL only (heads frozen)",
    "seg_only": "segmentation losses only",
    "both": "both",
    "both_better": "both, masks from the better half",
    "latent": "latent queries, both losses",
    "reference": "reference reasoning of the same prompts",
}
COMPARED = (
    ("both", "start"),
    ("rl_only", "start"),
    ("seg_only", "start"),
    ("reference", "start"),
    ("rl_only", "reference"),
    ("both", "reference"),
    ("latent", "start-latent"),
    ("both", "seg_only"),
    ("both", "rl_only"),
    ("seg_only", "rl_only"),
    ("both", "latent"),
    ("both_better", "start"),
    ("both_better", "seg_only"),
    ("both_better", "both"),
)
CURVES = {
    "reward": "reward",
    "segmentation/giou": "gIoU of samples (low resolution)",
    "kl": "KL to the start",
    "completions/mean_length": "tokens per completion",
    "frac_reward_zero_std": "groups without reward variance",
    "entropy": "entropy per token",
}
COLORS = {
    "rl_only": "#7A8190",
    "seg_only": "#2A9DF4",
    "both": "#E8910C",
    "both_better": "#16A34A",
    "latent": "#8B5CF6",
    "reference": "#111827",
}
RESAMPLES = 2000


class Scores:
    """IoU of every sample: `values[split]` is (seeds, samples); `kinds[split]` names each sample's kind."""

    def __init__(self, folders: Sequence):
        self.values, self.kinds = {}, {}
        for split in SPLITS:
            records = [read_samples(folder / "evaluation" / split) for folder in folders]
            self.values[split] = np.array([[score_of(record).iou for record in seed] for seed in records])
            self.kinds[split] = np.array([record["kind"] for record in records[0]])

    def of(self, split: str | None, kinds: Sequence[str] | None) -> list[np.ndarray]:
        """One (seeds, samples) array per split asked for (`None`: all), of the kinds asked for."""
        splits = SPLITS if split is None else (split,)
        keep = {s: np.isin(self.kinds[s], kinds) if kinds else np.ones(len(self.kinds[s]), bool) for s in splits}
        return [self.values[s][:, keep[s]] for s in splits]


def _mean(arrays: Sequence[np.ndarray]) -> float:
    """Mean over seeds of the mean over splits."""
    return float(np.mean([array.mean() for array in arrays]))


def interval(first: Sequence[np.ndarray], second: Sequence[np.ndarray] | None, seed: int = 0) -> list[float]:
    """95 % of the mean, or of the difference first - second: scenes paired, seeds of each arm drawn apart."""
    rng, means = np.random.default_rng(seed), []
    for _ in range(RESAMPLES):
        arms = [arm for arm in (first, second) if arm is not None]
        rows = [rng.integers(len(arm[0]), size=len(arm[0])) for arm in arms]
        draws = [rng.integers(array.shape[1], size=array.shape[1]) for array in first]
        found = [
            _mean([array[r][:, d] for array, d in zip(arm, draws, strict=True)])
            for arm, r in zip(arms, rows, strict=True)
        ]
        means.append(found[0] - (found[1] if second is not None else 0.0))
    return [float(np.quantile(means, q)) for q in (0.025, 0.975)]


def load(name: str) -> tuple[dict[str, Scores], dict[str, list]]:
    """Scores of every finished arm of a round and of its start, and the curves of those that trained."""
    arms, curves, its = {}, {}, ROUNDS[name]
    for arm in NAMES:
        if arm in ARMS:
            folders = [RUNS / "arms" / name / f"{arm}-{seed}" for seed in its.seeds.get(arm, ())]
        else:
            folders = [RUNS / "arms" / its.start / arm]
        done = [f for f in folders if all((f / "evaluation" / split / "samples.jsonl").is_file() for split in SPLITS)]
        if not done:
            continue
        arms[arm] = Scores(done)
        if arm in ARMS:
            curves[arm] = [json.loads((folder / "history.json").read_text()) for folder in done]
    return arms, curves


def _cell(value: float, bounds: Sequence[float]) -> str:
    return f"{value:.3f} [{bounds[0]:.3f}, {bounds[1]:.3f}]"


def _difference(value: float, bounds: Sequence[float]) -> str:
    return f"{value:+.3f} [{bounds[0]:+.3f}, {bounds[1]:+.3f}]"


def tables(arms: dict[str, Scores]) -> tuple[list[str], dict]:
    kinds = sorted(
        set(np.concatenate(list(next(iter(arms.values())).kinds.values()))), key=lambda k: (k not in TAUGHT, k)
    )
    groups = {"all kinds": None, "taught kinds": TAUGHT, "other kinds": tuple(k for k in kinds if k not in TAUGHT)}
    lines, record = ["### gIoU", ""], {"gIoU": {}, "differences": {}, "kinds": {}, "seeds": {}}
    lines += ["| arm | " + " | ".join((*SPLITS, "mean")) + " |", "|---" * (len(SPLITS) + 2) + "|"]
    for arm, scores in arms.items():
        cells = {}
        for split in (*SPLITS, None):
            arrays = scores.of(split, None)
            cells[split or "mean"] = (_mean(arrays), interval(arrays, None))
        record["gIoU"][arm] = cells
        lines.append(f"| {NAMES[arm]} | " + " | ".join(_cell(*cell) for cell in cells.values()) + " |")
    lines += ["", "### Differences, mean of the splits (scenes paired)", ""]
    lines += ["| arms | " + " | ".join(groups) + " |", "|---" * (len(groups) + 1) + "|"]
    for first, second in COMPARED:
        if first not in arms or second not in arms:
            continue
        cells = {}
        for name, group in groups.items():
            one, other = arms[first].of(None, group), arms[second].of(None, group)
            cells[name] = (_mean(one) - _mean(other), interval(one, other))
        record["differences"][f"{first} - {second}"] = cells
        row = " | ".join(_difference(*cell) for cell in cells.values())
        lines.append(f"| {NAMES[first]} - {NAMES[second]} | {row} |")
    lines += ["", "### gIoU by kind, mean of the splits", "", f"Taught: {', '.join(TAUGHT)}.", ""]
    lines += ["| arm | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for arm, scores in arms.items():
        # a split without a kind (no form of `count` is held out) has no mean of it
        values = {k: _mean([array for array in scores.of(None, [k]) if array.size]) for k in kinds}
        record["kinds"][arm] = values
        lines.append(f"| {NAMES[arm]} | " + " | ".join(f"{value:.3f}" for value in values.values()) + " |")
    lines += ["", "### Every seed: gIoU, mean of the splits", "", "| arm | seeds |", "|---|---|"]
    for arm, scores in arms.items():
        values = np.mean([array.mean(1) for array in scores.of(None, None)], axis=0).tolist()
        record["seeds"][arm] = values
        lines.append(f"| {NAMES[arm]} | " + ", ".join(f"{value:.3f}" for value in values) + " |")
    return lines, record


def plot(name: str, curves: dict[str, list]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), sharex=True)
    for arm, seeds in curves.items():
        for index, history in enumerate(seeds):
            steps = [entry["step"] for entry in history]
            for axis, key in zip(axes.flat, CURVES, strict=True):
                values = np.array([np.nan if entry[key] is None else entry[key] for entry in history], float)
                if np.isnan(values).all():  # no KL where there is no reference
                    continue
                smooth = [np.nanmean(values[max(0, i - 9) : i + 1]) for i in range(len(values))]
                label = NAMES[arm] if index == 0 else None
                axis.plot(steps, smooth, color=COLORS[arm], alpha=0.8, lw=1.2, label=label)
    for axis, title in zip(axes.flat, CURVES.values(), strict=True):
        axis.set_title(title)
    for axis in axes[1]:
        axis.set_xlabel("optimizer step (mean of the last 10)")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    RESULTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(RESULTS / f"ablation_{name}.png", dpi=80)


def commands() -> list[str]:
    starts = sorted({its.start for its in ROUNDS.values()})  # "practised" goes on from "cold"
    latent = sorted({its.start for its in ROUNDS.values() if "latent" in its.seeds})
    lines = [f"start.py {start}" for start in starts] + [f"latent.py --start {start}" for start in latent]
    lines += [f"ablation.py --evaluate-start {start}" for start in starts]
    lines += [f"ablation.py --evaluate-start {start} --arm latent" for start in latent]
    return [f"python benchmarks/scenes_study/{line}" for line in (*lines, "ablation.py", "ablation_report.py")]


def main() -> None:
    record, sections, runs = {"settings": {**GRPO, "arms": ARMS}}, [], {}
    for name, its in ROUNDS.items():
        arms, curves = load(name)
        if not arms:
            continue
        lines, record[name] = tables(arms)
        record[name]["settings"] = {"start": its.start, "steps": its.steps, "kinds": its.kinds, **its.changes}
        sections += [f"## Round {name}: {its.title}", ""]
        sections += [f"{its.steps} optimizer steps of 8 prompts x 8 completions.", "", *lines, ""]
        if curves:
            plot(name, curves)
            sections += [f"![curves](ablation_{name}.png)", ""]
        for folder in sorted((RUNS / "arms" / name).glob("*-[0-9]")):
            commits = sorted({attempt["commit"] for attempt in attempts(folder)})
            runs[f"{name}/{folder.name}"] = {"cpu_minutes": round(cpu_minutes(folder), 1), "commits": commits}
    record["runs"] = runs
    minutes = sum(run["cpu_minutes"] for run in runs.values())
    commits = ", ".join(sorted({commit for run in runs.values() for commit in run["commits"]}))
    head = ["# Ablation: what reinforcement and the segmentation losses add", "", "```", *commands(), "```", ""]
    head += [
        f"{EVALUATION_SAMPLES} scenes per split (seed {EVALUATION_SEED}), greedy. {len(runs)} runs, {minutes:.0f} CPU "
        f"minutes with evaluation, commits {commits}. Brackets: 95 %, bootstrap over scenes and seeds. Protocol: "
        "`scenes_study/PROTOCOL.md`.",
        "",
    ]
    write_json(RESULTS / "ablation.json", record)
    (RESULTS / "ablation.md").write_text("\n".join([*head, *sections]))


if __name__ == "__main__":
    main()
