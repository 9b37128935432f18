"""Your own pictures, start to end: data set, LoRA fine-tune, evaluation before and after, in one command.

    python examples/finetune_folder.py --folder my_pictures --output_dir runs/my_pictures

`my_pictures` holds images and a JSONL (or CSV) with a line per sample, in the forms that `build_folder` shows:

    {"image": "dog.jpg", "instruction": "the dog by the door", "masks": [[[10, 10, 90, 10, 90, 60]]], "split": "train"}

Without `split` a fifth of the images is held out. The same command goes on after a kill. All settings: `--help`.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import set_seed

from segcompass_hf import SegCompassForReasoningSegmentation, SegCompassProcessor, bundled_checkpoint
from segcompass_hf.data import BuildReport
from segcompass_hf.data.builders.splitting import build_folder_splits
from segcompass_hf.evaluation import ModelPredictor, evaluate_dataset
from segcompass_hf.evaluation.processes import Processes
from segcompass_hf.stopping import run_script
from segcompass_hf.training.adapters import lora_config
from segcompass_hf.training.arguments import read_arguments
from segcompass_hf.training.segmentation.own_reasoning import with_own_reasoning
from segcompass_hf.training.segmentation.trainer import SegmentationConfig, SegmentationTrainer


@dataclass
class ScriptArguments:
    folder: str = field(metadata={"help": "Your images and the file of annotations."})
    annotations: str | None = field(default=None, metadata={"help": "That file, where the folder has several."})
    held_out_share: float = field(default=0.2, metadata={"help": "Of the images, if nothing says the splits."})
    model: str = field(default=str(bundled_checkpoint()), metadata={"help": "Folder or Hub id."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    min_iou: float = field(default=0.0, metadata={"help": "Leave out rows that the start segments worse, in [0, 1]."})


# Over the settings' own defaults, which are for billions of parameters; factors are on the learning rate.
DEFAULTS = {"learning_rate": 3e-4, "codebook_lr_factor": 1.0, "slot_mapper_lr_factor": 1.0, "save_strategy": "epoch"}
DEFAULTS |= {"prompt_encoder_lr_factor": 0.1, "mask_decoder_lr_factor": 0.1}


def main() -> None:
    script, args = read_arguments(ScriptArguments, SegmentationConfig, defaults=DEFAULTS)
    output, report, metrics = Path(args.output_dir), BuildReport(), {}

    def evaluate(name: str) -> None:
        predictor = ModelPredictor(model.eval(), processor, name)
        batch_size = args.per_device_eval_batch_size
        metrics[name] = evaluate_dataset(predictor, held_out, output / name, batch_size, unreadable="count").metrics

    try:
        splits = build_folder_splits(script.folder, script.annotations, script.held_out_share, args.seed, report)
        train, held_out = splits
        model = SegCompassForReasoningSegmentation.from_pretrained(script.model).to(args.device)
        processor = SegCompassProcessor.from_pretrained(script.model)
        evaluate("before")
        predictor, given = ModelPredictor(model, processor), len(train)
        train = with_own_reasoning(train, predictor, args.per_device_eval_batch_size, script.min_iou)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    set_seed(args.seed)  # the adapters' start
    adapter = lora_config(model, r=script.lora_r, alpha=2 * script.lora_r)
    trainer = SegmentationTrainer(model, args, train, None, processor, adapter)  # puts the adapters into `model`
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    evaluate(f"after-{trainer.state.global_step}-steps")
    if args.should_save:
        counts = {"train_rows": len(train), "left_out_rows": given - len(train), "held_out_rows": len(held_out)}
        summary = counts | {"metrics": metrics, "build": report.to_dict()}
        (output / "summary.json").write_text(json.dumps(summary, indent=1))
        print(f"{script.folder}: {report.summary()}", *(f"{name} {count}" for name, count in counts.items()))
        for name, values in metrics.items():
            print(f"{name:18}", *(f"{key} {value:.3f}" for key, value in values.items()))
    Processes.current().finish()


if __name__ == "__main__":
    run_script(main)
