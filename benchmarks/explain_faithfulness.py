# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""How faithful explanations are on Scenes: deletion and insertion curves, completeness, specificity, sufficient sets.

Every kept mask of every sample is explained. Its features are then deleted from, and inserted into, the whole sequence
in order of attribution, of activation and at random, and the mask is compared with the full one. Specificity: the five
concepts that count most for one object's mask are ablated, and that mask's loss of IoU is compared with the mean loss
of the other masks of the same image. Intervals: 95 %, bootstrap over images.

    python benchmarks/explain_faithfulness.py --num-samples 300 --output benchmarks/results/explain/faithfulness

Records are appended to OUTPUT.jsonl as samples are done; started again, the benchmark goes on where it stopped.
Records of other weights are refused. Writes OUTPUT.json, OUTPUT.md and OUTPUT.png.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from segcompass_hf import SegCompassForReasoningSegmentation, SegCompassProcessor, bundled_checkpoint
from segcompass_hf.data import scenes
from segcompass_hf.explain.attribution import attribute
from segcompass_hf.explain.controls.measure import specificity
from segcompass_hf.explain.faithfulness import FRACTIONS, faithfulness_curves, feature_orders
from segcompass_hf.explain.journal import measured_records
from segcompass_hf.explain.replay import Replay, capture
from segcompass_hf.explain.sufficient import minimal_sufficient_set
from segcompass_hf.files import weights_digest
from segcompass_hf.metrics.intervals import bootstrap_interval

ORDERS = ("attribution", "activation", "random")
TOP = 5  # concepts ablated for the specificity
POINTS = np.array([0.0, *FRACTIONS, 1.0])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a checkpoint's folder; the bundled one when left out")
    parser.add_argument("--split", default="val", help="of Scenes")
    parser.add_argument("--seed", type=int, default=0, help="of Scenes; 0 is the data set that is published")
    parser.add_argument("--num-samples", type=int, default=300)
    parser.add_argument("--method", default="paths", help="of attribution")
    parser.add_argument("--target", default="mask_logit", help="what is explained")
    parser.add_argument("--no-sufficient", action="store_true", help="no minimal sufficient sets")
    parser.add_argument("--output", default="faithfulness", help="path of the results without ending")
    return parser.parse_args()


def measure(model, processor, row, arguments, seed: int) -> list[dict]:
    """One record per kept mask of a sample."""
    captured = capture(model, processor(images=row["image"], instruction=row["instruction"]))[0]
    replay = Replay(model, captured)
    attributions = attribute(replay, captured.kept_slots, arguments.target, arguments.method)
    return [
        measure_mask(replay, attributions, number, not arguments.no_sufficient, seed)
        for number in range(len(attributions))
    ]


def measure_mask(replay: Replay, attributions: list, number: int, sufficient: bool, seed: int) -> dict:
    attribution = attributions[number]
    orders = feature_orders(replay, attribution, seed)
    curves = faithfulness_curves(replay, attribution, orders)
    record = {
        "slot": attribution.slot,
        "target": attribution.target,
        "value": attribution.value,
        "baseline_value": attribution.baseline_value,
        "completeness_error": attribution.completeness_error,
        "quadrature_error": attribution.quadrature_error,
        "num_features": len(orders["random"]),
    }
    for name, curve in curves.items():
        record[name] = {
            "deletion_iou": curve.deletion_iou.round(4).tolist(),
            "insertion_iou": curve.insertion_iou.round(4).tolist(),
            "deletion_value": curve.deletion_value.round(3).tolist(),
            "insertion_value": curve.insertion_value.round(3).tolist(),
        }
    if len(attributions) > 1:
        record["specificity"] = specificity(replay, attributions, number, TOP)
    if sufficient:
        found = minimal_sufficient_set(replay, attribution)
        record["sufficient"] = {"size": len(found.features), "prefix": found.prefix_size, "iou": found.iou}
    return record


def area(record: dict, order: str, curve: str) -> float:
    return float(np.trapezoid(record[order][curve], POINTS))


def shared_by_number(records: list[dict]) -> list[dict]:
    """What `paths` would give to the others if it measured more features one by one, at every point of the curves.

    It is half of what the others add to the first features, and half of what they do without them; over the change. No
    way of sharing it out among them makes their contributions smaller than that.
    """
    shares = []
    for record in records:
        deleted, inserted = (np.array(record["attribution"][f"{way}_value"]) for way in ("deletion", "insertion"))
        whole, nothing = inserted[-1], inserted[0]
        change = max(abs(whole - nothing), 1e-12)
        shares.append(np.abs(whole - inserted + deleted - nothing) / 2 / change)
    numbers = np.outer([record["num_features"] for record in records], POINTS)
    return [
        {"share": point, "num_features": float(np.median(count)), "median": float(np.median(column))}
        for point, count, column in zip(POINTS, numbers.T, np.transpose(shares), strict=True)
    ]


def summarize(records: list[dict]) -> dict:
    """Means with intervals over all masks, drawn by image."""
    groups = [record["sample"] for record in records]
    summary = {"num_samples": len(set(groups)), "num_masks": len(records), "areas": {}, "between": {}}
    for curve in ("deletion_iou", "insertion_iou", "deletion_value", "insertion_value"):
        areas = {order: np.array([area(record, order, curve) for record in records]) for order in ORDERS}
        summary["areas"][curve] = {order: bootstrap_interval(areas[order], groups) for order in ORDERS}
        sign = -1 if curve.startswith("deletion") else 1
        summary["between"][curve] = {
            other: bootstrap_interval(sign * (areas["attribution"] - areas[other]), groups) for other in ORDERS[1:]
        }
    for name in ("completeness_error", "quadrature_error"):
        errors = [record[name] for record in records]
        summary[name] = {f"p{q}": float(np.quantile(errors, q / 100)) for q in (50, 90, 99, 100)}
    summary["shared_by_number"] = shared_by_number(records)
    pairs = [(record["specificity"], record["sample"]) for record in records if "specificity" in record]
    own, others = ([pair[name] for pair, _ in pairs] for name in ("own", "others"))
    where = [group for _, group in pairs]
    summary["specificity"] = {
        "num_masks": len(pairs),
        "own": bootstrap_interval(own, where),
        "others": bootstrap_interval(others, where),
        "difference": bootstrap_interval(np.subtract(own, others), where),
    }
    found = [record for record in records if "sufficient" in record]
    if found:
        sizes, where = [record["sufficient"]["size"] for record in found], [record["sample"] for record in found]
        shares = [size / record["num_features"] for size, record in zip(sizes, found, strict=True)]
        summary["sufficient"] = {
            "size": bootstrap_interval(sizes, where),
            "median": float(np.median(sizes)),
            "share": bootstrap_interval(shares, where),
        }
    return summary


def write_markdown(path: Path, summary: dict, command: str) -> None:
    def cell(interval):
        return "{:.3f} [{:.3f}, {:.3f}]".format(*interval)

    lines = [
        f"Faithfulness of explanations: {summary['num_masks']} masks of {summary['num_samples']} samples, "
        f"{summary['split']} split of Scenes. `{command}`",
        "",
        "Area under the curve, mean and 95 % interval; deletion is better small, insertion large.",
        "",
        "| curve | " + " | ".join(ORDERS) + " |",
        "|---|---|---|---|",
    ]
    for curve, areas in summary["areas"].items():
        lines.append(f"| {curve.replace('_', ', ')} | " + " | ".join(cell(areas[order]) for order in ORDERS) + " |")
    lines += ["", "| measure | value |", "|---|---|"]
    for name in ("completeness_error", "quadrature_error"):
        quantiles = ", ".join(f"{key} {100 * value:.2g} %" for key, value in summary[name].items())
        lines.append(f"| {name.replace('_', ' ')} | {quantiles} |")
    others = "; ".join(
        f"{entry['num_features']:.0f}: {entry['median']:.0%}" for entry in summary["shared_by_number"][1:-1]
    )
    lines.append(
        f"| what all others are worth, over the change, by the number of first features (medians) | {others} |"
    )
    specificity = summary["specificity"]
    lines.append(
        f"| loss of IoU without the top {TOP} concepts ({specificity['num_masks']} masks): own mask | "
        f"{cell(specificity['own'])} |"
    )
    lines.append(f"| the same: other masks of the image | {cell(specificity['others'])} |")
    lines.append(f"| difference | {cell(specificity['difference'])} |")
    if "sufficient" in summary:
        lines.append(
            f"| smallest set found that keeps IoU 0.9 | {cell(summary['sufficient']['size'])} features, median "
            f"{summary['sufficient']['median']:.0f}; {cell(summary['sufficient']['share'])} of those active |"
        )
    path.write_text("\n".join(lines) + "\n")


def draw(path: Path, records: list[dict]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, curve, title in zip(axes, ("deletion_iou", "insertion_iou"), ("deleted", "inserted"), strict=True):
        for order, colour in zip(ORDERS, ("#E8910C", "#2A9DF4", "#7A8190"), strict=True):
            values = np.array([record[order][curve] for record in records])  # (masks, points)
            groups = [record["sample"] for record in records]
            bands = np.array([bootstrap_interval(column, groups) for column in values.T])
            axis.plot(POINTS, bands[:, 0], color=colour, label=order)
            axis.fill_between(POINTS, bands[:, 1], bands[:, 2], color=colour, alpha=0.2, linewidth=0)
        axis.set(xlabel=f"share of features {title}", xlim=(0, 1), ylim=(0, 1.02))
    axes[0].set_ylabel("IoU to the full mask")
    axes[0].legend(title="order", frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    arguments = parse_arguments()
    source = arguments.model or bundled_checkpoint()
    model = SegCompassForReasoningSegmentation.from_pretrained(source).eval().requires_grad_(False)
    processor = SegCompassProcessor.from_pretrained(source)
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(arguments, name) for name in ("split", "seed", "method", "target")}
    settings["weights"] = weights_digest(model)
    done = measured_records(
        output.with_suffix(".jsonl"),
        settings,
        scenes.iterate(arguments.split, arguments.num_samples, seed=arguments.seed),
        lambda index, row: measure(model, processor, row, arguments, seed=index),
        lambda number: print(f"{number}/{arguments.num_samples}", flush=True),
    )
    records = [{"sample": index} | mask for index, masks in enumerate(done) for mask in masks]
    if not records:
        sys.exit("the model keeps no mask on these samples: there is nothing to measure.")
    given = {
        name.replace("_", "-"): getattr(arguments, name)
        for name in ("split", "seed", "num_samples", "method", "target")
    }
    command = " ".join(["python benchmarks/explain_faithfulness.py", *(f"--{k} {v}" for k, v in given.items())])
    summary = {"command": command, **settings, **summarize(records)}
    output.with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n")
    write_markdown(output.with_suffix(".md"), summary, command)
    draw(output.with_suffix(".png"), records)
    print(output.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
