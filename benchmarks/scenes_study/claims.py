"""The paper's claims about interpretability, measured on Scenes with the model's own greedy reasoning.

    python benchmarks/scenes_study/claims.py --model bundled --num-samples 300

Writes claims.json, claims.md and claims.png; what is measured, see `segcompass_hf.explain.claims.measure`.
`--report` makes the last two from the first.
"""

import argparse
import dataclasses
import json
import shlex
import sys
from pathlib import Path

import torch
from runs import commit, counted, write_json
from settings import RESULTS, RUNS
from transformers import AutoModel, AutoProcessor

from segcompass_hf import bundled_checkpoint
from segcompass_hf.data import scenes
from segcompass_hf.explain.claims.figures import claims_figures
from segcompass_hf.explain.claims.measure import ClaimRecord, measure_claims
from segcompass_hf.explain.claims.report import claims_markdown, plot_claims


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled", help="folder of a checkpoint, or `bundled` for scenes-tiny")
    parser.add_argument("--split", default="val", choices=list(scenes.SPLITS))
    parser.add_argument("--num-samples", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="of the samples and of the bootstrap")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "claims", help="path without ending")
    parser.add_argument("--report", action="store_true", help="only the table and the plot, of what is recorded")
    options = parser.parse_args()
    if not options.report:
        with counted(RUNS / "claims", {"model": options.model, "num_samples": options.num_samples}):
            run(options)
    report(options.output)


def run(options: argparse.Namespace) -> None:
    """Measure, and write the records."""
    path = Path(bundled_checkpoint() if options.model == "bundled" else options.model)
    model = AutoModel.from_pretrained(path).to(options.device).eval()
    processor = AutoProcessor.from_pretrained(path)
    rows = scenes.iterate(options.split, options.num_samples, seed=options.seed)
    records = []
    for record in measure_claims(model, processor, rows, options.batch_size):
        records.append(record)
        if len(records) % 50 == 0:
            print(f"{len(records)} of {options.num_samples}", flush=True)
    figures = claims_figures(records, seed=options.seed)
    command = shlex.join(["python", "benchmarks/scenes_study/claims.py", *sys.argv[1:]])
    write_json(
        options.output.with_suffix(".json"),
        {"command": command, "commit": commit(), "split": options.split, "figures": figures}
        | {"records": [dataclasses.asdict(record) for record in records]},
    )


def report(output: Path) -> None:
    """Table and plot of the records."""
    record = json.loads(output.with_suffix(".json").read_text())
    split, figures = record.get("split", "val"), record["figures"]
    title = f"# The paper's claims, on Scenes ({split})\n\nCommit {record['commit']}: `{record['command']}`\n\n"
    output.with_suffix(".md").write_text(title + claims_markdown(figures))
    plot_claims(figures, [ClaimRecord(**of) for of in record["records"]]).savefig(output.with_suffix(".png"))
    print(claims_markdown(figures))


if __name__ == "__main__":
    main()
