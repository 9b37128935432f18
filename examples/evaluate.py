"""Evaluate a checkpoint on several data sets, with baselines beside it, and print one table:

    python examples/evaluate.py --datasets scenes:val scenes:test_pairs --num-samples 100 --output out/evaluation

Where a data set names its targets only, `all-objects` answers nothing. On several GPUs: `accelerate launch
examples/evaluate.py ...`. The same command goes on after a kill. Every folder
below the output holds records, a summary, plots and a page of samples; `model_index.yml` is for the model's card.
"""

import argparse
from pathlib import Path

from transformers import AutoModel, AutoProcessor

import segcompass_hf
from segcompass_hf.evaluation import ModelPredictor, evaluate_dataset, load_dataset_of
from segcompass_hf.evaluation.predictors.baselines import BASELINES, make_baseline
from segcompass_hf.evaluation.processes import Processes
from segcompass_hf.evaluation.report import figure_cell, model_index_yaml


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=segcompass_hf.bundled_checkpoint(), help="folder or Hub id")
    parser.add_argument("--datasets", nargs="+", default=["scenes:val"], help="as for `segcompass evaluate`")
    parser.add_argument("--baselines", nargs="*", default=["all-objects", "sam-box"], choices=list(BASELINES))
    parser.add_argument("--num-samples", type=int, help="of each data set (all; of Scenes 500)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("out/evaluation"))
    arguments = parser.parse_args()

    processes = Processes.current()
    model = AutoModel.from_pretrained(arguments.model).eval().to(processes.device or "cpu")
    processor = AutoProcessor.from_pretrained(arguments.model)
    predictors = [ModelPredictor(model, processor, name=Path(arguments.model).name)]
    predictors += [make_baseline(name, model.sam, processor, unknown="empty") for name in arguments.baselines]

    of_model = []
    lines = ["| data set | answers | samples | gIoU | cIoU | N-acc | T-acc |", "| --- " * 7 + "|"]
    for spec in arguments.datasets:
        with processes.main_first():  # the others find the built data set in the cache
            named = load_dataset_of(spec, arguments.num_samples)
        for predictor in predictors:
            summary = evaluate_dataset(
                predictor,
                named.dataset,
                arguments.output / named.name.replace(" ", "-") / predictor.name,
                batch_size=arguments.batch_size,
                num_samples=arguments.num_samples,
                dataset_name=named.name,
                notes=named.notes(),
            )
            if predictor is predictors[0]:
                of_model.append(summary.figures)
            cells = [named.name, predictor.name, str(summary.figures["counts"]["samples"])]
            for name in ("gIoU", "cIoU", "N-acc", "T-acc"):
                cells.append(figure_cell(summary.figures["metrics"][name]))
            lines.append("| " + " | ".join(cells) + " |")
    if processes.is_main:
        (arguments.output / "model_index.yml").write_text(model_index_yaml(*of_model), encoding="utf-8")
        print("\n".join(lines))
    processes.finish()


if __name__ == "__main__":
    main()
