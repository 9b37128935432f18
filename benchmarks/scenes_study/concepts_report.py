"""Table and plot of the study of one concept space, from the records of `concepts.py`.

    python benchmarks/scenes_study/concepts_report.py

Writes concepts.md, concepts.json and concepts.png to `benchmarks/results/scenes_study`. Options without a record are
left out; where `runs/` holds none, that of the last concepts.json is kept.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from concepts_settings import BASELINE, FOLDER, OPTIONS, WHOLE
from runs import commit, write_json
from settings import RESULTS

RESAMPLES = 10_000
INTRODUCTION = """# One concept space, on Scenes

Commit {commit}: `python benchmarks/scenes_study/concepts_report.py`, from runs of
`python benchmarks/scenes_study/concepts.py OPTION --base RUN`.

**Joint AUC**: min(AUC on words, AUC on patches) of one SAE feature, chosen on one half of the scenes and scored on the
other. Negatives are the other values of the same attribute: `red` against other color words, patches of red objects
against patches of other objects; "is a color word" or "is an object" earns nothing. Chance 0.5, often a little less,
being a minimum. *Words alone* and *patches alone*: the best feature of one modality. Bridge Score: mean cosine of the
features that fire on a word and on its patches, weighted by how strongly (arXiv 2504.11695); in brackets for random
pairs. Jaccard: active features that a word and its patches have in common. Explained variance in the space of the
VLM. gIoU: {evaluated} scenes, the model's own greedy reasoning, a shortened recipe (slots 300, joint 200 steps);
difference to `{baseline}` on the same scenes. `previous` and `bundled` are checkpoints of the whole recipe (slots
1,000, joint 800 steps), without and with concept words and the shared top-k; they are compared with each other,
though the second went on from the first and has seen more scenes. The first four options start from the VLM and SAM of
`previous`, which had been trained on just such states before: gIoU favours them (PROTOCOL.md, question 2).
Intervals: 95 %, percentile bootstrap over scenes; one seed.
"""


def load() -> dict[str, dict[str, Any]]:
    """Records by option, as far as they are there."""
    last = RESULTS / "concepts.json"
    old = json.loads(last.read_text()) if last.exists() else {}
    records = {option: old[option] for option in (*OPTIONS, *WHOLE) if option in old}
    for option in (*OPTIONS, *WHOLE):
        folder = FOLDER / option
        if (folder / "sae.json").exists():
            records[option] = json.loads((folder / "sae.json").read_text())
            if (folder / "giou.json").exists():
                giou = json.loads((folder / "giou.json").read_text())
                records[option] |= {key: giou[key] for key in ("ious", "cpu_minutes") if key in giou}
    return records


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(1)
    return float(values.mean()), *np.quantile(means, [0.025, 0.975]).tolist()


def add_giou(records: dict[str, dict[str, Any]]) -> None:
    """gIoU and its difference to the baseline, with intervals, where there are figures."""
    for option, record in records.items():
        against = WHOLE[0] if option in WHOLE else BASELINE
        baseline = records.get(against, {}).get("ious")
        if "ious" in record:
            record["giou"] = interval(np.array(record["ious"]))
            if baseline is not None and option != against:
                record["giou_difference"] = interval(np.array(record["ious"]) - np.array(baseline))


def table(records: dict[str, dict[str, Any]]) -> str:
    """Markdown: one line per option, then one per concept."""
    names = list(records)
    lines = [INTRODUCTION.format(commit=commit(), evaluated=300, baseline=BASELINE)]
    rows: list[tuple[str, Any]] = [
        ("concepts of joint AUC 0.8 or more", lambda r: f"{r['at_least_0.8']} of {len(r['concepts'])}"),
        ("mean joint AUC", lambda r: f"{r['joint']:.3f}"),
        ("mean words alone", lambda r: f"{np.mean([c['words_alone'] for c in r['concepts']]):.3f}"),
        ("mean patches alone", lambda r: f"{np.mean([c['patches_alone'] for c in r['concepts']]):.3f}"),
        ("Bridge Score", lambda r: f"{r['bridge']['score']:.3f} ({r['bridge']['chance']:.3f})"),
        ("Jaccard", lambda r: f"{r['jaccard']:.3f} ({r['jaccard_of_random_pairs']:.3f})"),
        (
            "features of one modality only",
            lambda r: f"{r['one_modality']['words_only'] + r['one_modality']['patches_only']:.0%}",
        ),
        ("explained variance", lambda r: f"{r['explained_variance']['all']:.3f}"),
        (
            "... words / patches",
            lambda r: f"{r['explained_variance']['words']:.3f} / {r['explained_variance']['patches']:.3f}",
        ),
        ("L0, words / patches", lambda r: f"{r['l0']['words']:.1f} / {r['l0']['patches']:.1f}"),
        ("dead features", lambda r: f"{r['dead_features']:.1%}"),
        ("token accuracy of the warm-up", lambda r: f"{r['token_accuracy']:.4f}" if "token_accuracy" in r else "-"),
        ("gIoU", lambda r: _shown(r.get("giou"))),
        (f"... less that of `{BASELINE}` (`{WHOLE[0]}`)", lambda r: _shown(r.get("giou_difference"), "+.3f")),
        ("CPU minutes", lambda r: f"{r['cpu_minutes']:.1f}" if "cpu_minutes" in r else "-"),
    ]
    lines += ["| | " + " | ".join(f"`{name}`" for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {title} | " + " | ".join(show(records[name]) for name in names) + " |" for title, show in rows]
    lines += ["\n## Joint AUC of every concept\n"]
    lines += ["| | " + " | ".join(f"`{name}`" for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for number, concept in enumerate(records[names[0]]["concepts"]):
        shown = (records[name]["concepts"][number] for name in names)
        cells = (f"{c['joint']:.2f} [{c['low']:.2f}, {c['high']:.2f}]" for c in shown)
        lines.append(f"| {concept['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _shown(figure: tuple[float, float, float] | None, form: str = ".3f") -> str:
    return "-" if figure is None else f"{figure[0]:{form}} [{figure[1]:{form}}, {figure[2]:{form}}]"


def plot(records: dict[str, dict[str, Any]], path: Path) -> None:
    """Joint AUC of every concept and gIoU, one color per option."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, 4.2), width_ratios=(4, 1), layout="constrained", squeeze=True
    )
    width = 0.8 / len(records)
    for index, (option, record) in enumerate(records.items()):
        concepts = record["concepts"]
        heights = np.array([concept["joint"] for concept in concepts])
        errors = np.array([[c["joint"] - c["low"], c["high"] - c["joint"]] for c in concepts]).T.clip(min=0)
        places = np.arange(len(concepts)) + (index - (len(records) - 1) / 2) * width
        left.bar(places, heights, width, yerr=errors, label=option, error_kw={"lw": 0.8})
        if "giou" in record:
            value, low, high = record["giou"]
            right.errorbar(value, -index, xerr=[[value - low], [high - value]], fmt="o", color=f"C{index}", capsize=3)
    left.axhline(0.5, color="black", lw=0.8, ls=":")
    left.axhline(0.8, color="black", lw=0.8, ls="--")
    left.set(ylim=(0.4, 1.02), ylabel="joint word-and-patch AUC")
    left.set_xticks(np.arange(len(concepts)), [concept["name"] for concept in concepts], rotation=30)
    left.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.22))
    right.set(xlabel="gIoU (300 scenes)", yticks=[-i for i in range(len(records))], yticklabels=list(records))
    right.set_ylim(-len(records) + 0.5, 0.5)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "concepts", help="path without ending")
    output = parser.parse_args().output
    records = load()
    if not records:
        raise SystemExit(f"{FOLDER} holds no record; run benchmarks/scenes_study/concepts.py first.")
    add_giou(records)
    write_json(output.with_suffix(".json"), records)
    output.with_suffix(".md").write_text(table(records))
    plot(records, output.with_suffix(".png"))
    print(output.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
