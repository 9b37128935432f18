"""Tables and curves of the ablation, from its records:

    python benchmarks/scenes_study/ablation_report.py

Writes `ablation.md`, `ablation.json` and one `ablation_<round>.png` each to `benchmarks/results/scenes_study`.
Intervals are percentile bootstraps over scenes, the same ones for every arm, and over seeds where an arm has several.

What the tables rest on (IoU and answer of every scene, curves, settings) is kept beside them, in
`ablation_records.json.gz`: runs that are not on this machine are read from there.
"""

from collections.abc import Sequence

import numpy as np
from ablation_records import collect
from runs import write_json
from settings import ARMS, EVALUATION_SAMPLES, EVALUATION_SEED, GRPO, RESULTS, ROUNDS, SPLITS, TAUGHT

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
    """One measure of every sample: `values[split]` is (seeds, samples); `kinds[split]` names each sample's kind."""

    def __init__(self, runs: Sequence[dict], measure: str = "iou"):
        self.seeds = [run["seed"] for run in runs]
        self.values = {split: np.array([run[measure][split] for run in runs], float) for split in SPLITS}
        self.kinds = {split: np.array(runs[0]["kinds"][split]) for split in SPLITS}

    def of(self, split: str | None, kinds: Sequence[str] | None) -> list[np.ndarray]:
        """One (seeds, samples) array per split asked for (`None`: all), of the kinds asked for."""
        splits = SPLITS if split is None else (split,)
        keep = {s: np.isin(self.kinds[s], kinds) if kinds else np.ones(len(self.kinds[s]), bool) for s in splits}
        return [self.values[s][:, keep[s]] for s in splits]


def mean_of(arrays: Sequence[np.ndarray]) -> float:
    """Mean over seeds of the mean over splits."""
    return float(np.mean([array.mean() for array in arrays]))


def interval(
    first: Sequence[np.ndarray], second: Sequence[np.ndarray] | None, seed: int = 0, confidence: float = 0.95
) -> list[float]:
    """Of the mean, or of the difference first - second: scenes paired, seeds of each arm drawn apart."""
    rng, means = np.random.default_rng(seed), []
    for _ in range(RESAMPLES):
        arms = [arm for arm in (first, second) if arm is not None]
        rows = [rng.integers(len(arm[0]), size=len(arm[0])) for arm in arms]
        draws = [rng.integers(array.shape[1], size=array.shape[1]) for array in first]
        found = [
            mean_of([array[r][:, d] for array, d in zip(arm, draws, strict=True)])
            for arm, r in zip(arms, rows, strict=True)
        ]
        means.append(found[0] - (found[1] if second is not None else 0.0))
    tail = (1 - confidence) / 2
    return [float(np.quantile(means, q)) for q in (tail, 1 - tail)]


def each_seed(first: Scores, second: Scores, kinds: Sequence[str] | None = None) -> list[float]:
    """first - second of each seed that both have; a start has none and is compared with every one."""
    means = [np.mean([array.mean(1) for array in arm.of(None, kinds)], axis=0) for arm in (first, second)]
    if second.seeds == [None]:
        return (means[0] - means[1]).tolist()
    pairs = [(first.seeds.index(seed), second.seeds.index(seed)) for seed in first.seeds if seed in second.seeds]
    return [float(means[0][i] - means[1][j]) for i, j in pairs]


def cell(value: float, bounds: Sequence[float]) -> str:
    return f"{value:.3f} [{bounds[0]:.3f}, {bounds[1]:.3f}]"


def difference(value: float, bounds: Sequence[float]) -> str:
    return f"{value:+.3f} [{bounds[0]:+.3f}, {bounds[1]:+.3f}]"


def _shown(arm: str, scores: Scores) -> str:
    return NAMES[arm] + (f" ({len(scores.seeds)} seeds)" if len(scores.seeds) > 1 else "")


def tables(arms: dict[str, Scores], answers: dict[str, Scores]) -> tuple[list[str], dict]:
    kinds = sorted(
        set(np.concatenate(list(next(iter(arms.values())).kinds.values()))), key=lambda k: (k not in TAUGHT, k)
    )
    others = tuple(kind for kind in kinds if kind not in TAUGHT)
    groups = {"all kinds": None, "first three kinds": TAUGHT, "other kinds": others}
    lines, record = ["### gIoU", ""], {"gIoU": {}, "differences": {}, "kinds": {}, "seeds": {}, "answers right": {}}
    lines += ["| arm | " + " | ".join((*SPLITS, "mean")) + " |", "|---" * (len(SPLITS) + 2) + "|"]
    for arm, scores in arms.items():
        cells = {}
        for split in (*SPLITS, None):
            arrays = scores.of(split, None)
            cells[split or "mean"] = (mean_of(arrays), interval(arrays, None))
        record["gIoU"][arm] = cells
        lines.append(f"| {_shown(arm, scores)} | " + " | ".join(cell(*its) for its in cells.values()) + " |")
    lines += ["", "### Differences, mean of the splits (scenes paired)", ""]
    lines += [f"First three kinds: {', '.join(TAUGHT)}. Each seed: all kinds, seeds that both arms have.", ""]
    lines += ["| arms | " + " | ".join(groups) + " | each seed |", "|---" * (len(groups) + 2) + "|"]
    for first, second in COMPARED:
        if first not in arms or second not in arms:
            continue
        cells = {}
        for name, group in groups.items():
            one, other = arms[first].of(None, group), arms[second].of(None, group)
            cells[name] = (mean_of(one) - mean_of(other), interval(one, other))
        seeds = each_seed(arms[first], arms[second])
        record["differences"][f"{first} - {second}"] = {**cells, "each seed": seeds}
        row = " | ".join(difference(*its) for its in cells.values())
        apart = ", ".join(f"{value:+.3f}" for value in seeds)
        lines.append(f"| {NAMES[first]} - {NAMES[second]} | {row} | {apart} |")
    lines += ["", "### Answers right: the written answer is the reference's, mean of the splits", ""]
    start = {arm: "start-latent" if arm.endswith("latent") else "start" for arm in answers}
    lines += ["| arm | " + " | ".join(groups) + " | all kinds, less the start |", "|---" * (len(groups) + 2) + "|"]
    for arm, scores in answers.items():
        cells = {name: mean_of(scores.of(None, group)) for name, group in groups.items()}
        gained = "-"
        if arm not in ("start", "start-latent") and start[arm] in answers:
            one, other = scores.of(None, None), answers[start[arm]].of(None, None)
            cells["less the start"] = (mean_of(one) - mean_of(other), interval(one, other))
            gained = difference(*cells["less the start"])
        record["answers right"][arm] = cells
        shares = " | ".join(f"{cells[name]:.3f}" for name in groups)
        lines.append(f"| {_shown(arm, scores)} | {shares} | {gained} |")
    for title, measured, key in (("gIoU", arms, "kinds"), ("Answers right", answers, "answers by kind")):
        lines += ["", f"### {title} by kind, mean of the splits", ""]
        lines += ["| arm | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
        record[key] = {}
        for arm, scores in measured.items():
            # a split without a kind (no form of `count` is held out) has no mean of it
            values = {k: mean_of([array for array in scores.of(None, [k]) if array.size]) for k in kinds}
            record[key][arm] = values
            lines.append(f"| {NAMES[arm]} | " + " | ".join(f"{value:.3f}" for value in values.values()) + " |")
    lines += ["", "### Every seed: gIoU, mean of the splits", "", "| arm | seeds |", "|---|---|"]
    for arm, scores in arms.items():
        values = np.mean([array.mean(1) for array in scores.of(None, None)], axis=0).tolist()
        record["seeds"][arm] = values
        lines.append(f"| {NAMES[arm]} | " + ", ".join(f"{value:.3f}" for value in values) + " |")
    return lines, record


def plot(name: str, curves: dict[str, list]) -> None:
    """What training logged. Left out: what is measured on reference reasoning, or on other scales than it says."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), sharex=True)
    by_batch = ROUNDS[name].changes.get("scale_rewards") == "batch"  # TRL logs the batch's deviation then
    for arm, seeds in curves.items():
        for index, history in enumerate(seeds):
            for axis, key in zip(axes.flat, CURVES, strict=True):
                hidden = {"segmentation/giou"} if arm == "reference" else set()
                hidden |= {"frac_reward_zero_std"} if by_batch else set()
                values = np.array([np.nan if value is None else value for value in history[key]], float)
                if key in hidden or np.isnan(values).all():  # no KL where there is no reference
                    continue
                steps = history["step"]
                smooth = [np.nanmean(values[max(0, i - 9) : i + 1]) for i in range(len(values))]
                label = NAMES[arm] if index == 0 else None
                axis.plot(steps, smooth, color=COLORS[arm], alpha=0.8, lw=1.2, label=label)
    for axis, title in zip(axes.flat, CURVES.values(), strict=True):
        axis.set_title(title)
    for axis in axes[1]:
        axis.set_xlabel("optimizer step (mean of the last 10)")
        if not axis.lines:
            axis.set_axis_off()
            axis.set_title("")
    named = {text: line for axis in axes.flat for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.legend(named.values(), named, fontsize=8, ncols=len(named), loc="lower center")
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
    for name, found in collect(RESULTS / "ablation_records.json.gz").items():
        its = ROUNDS[name]
        arms = {arm: Scores(found[arm]) for arm in NAMES if arm in found}
        lines, record[name] = tables(arms, {arm: Scores(found[arm], "right") for arm in arms})
        record[name]["settings"] = {"start": its.start, "steps": its.steps, "kinds": its.kinds, **its.changes}
        sections += [f"## Round {name}: {its.title}", ""]
        sections += [f"{its.steps} optimizer steps of 8 prompts x 8 completions.", "", *lines, ""]
        curves = {arm: [run["history"] for run in found[arm]] for arm in arms if arm in ARMS}
        if curves:
            plot(name, curves)
            sections += [f"![curves](ablation_{name}.png)", ""]
        for arm in curves:
            for run in found[arm]:
                runs[f"{name}/{arm}-{run['seed']}"] = {key: run[key] for key in ("cpu_minutes", "commits")}
    record["runs"] = runs
    minutes = sum(run["cpu_minutes"] for run in runs.values())
    commits = ", ".join(sorted({commit for run in runs.values() for commit in run["commits"]}))
    head = ["# Ablation: what reinforcement and the segmentation losses add", "", "```", *commands(), "```", ""]
    head += [
        f"{EVALUATION_SAMPLES} scenes per split (seed {EVALUATION_SEED}), greedy. {len(runs)} runs, {minutes:.0f} CPU "
        f"minutes with evaluation, commits {commits}. Brackets: 95 %, percentile bootstrap over scenes and, where an "
        "arm has several, over seeds (with three that is somewhat too narrow); of one seed they do not say how far "
        "another would be. Start and settings of every round but the first were chosen after these scenes had been "
        "seen in the round before. Protocol: `scenes_study/PROTOCOL.md`; IoUs, answers and curves: "
        "`ablation_records.json.gz`.",
        "",
    ]
    write_json(RESULTS / "ablation.json", record)
    (RESULTS / "ablation.md").write_text("\n".join([*head, *sections]))


if __name__ == "__main__":
    main()
