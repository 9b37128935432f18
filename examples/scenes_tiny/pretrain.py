"""What stands for downloading a VLM and a SAM: both of scenes-tiny, trained from random weights on Scenes' own labels.

    python examples/scenes_tiny/pretrain.py --output runs/scenes-tiny
    segcompass train examples/scenes_tiny/recipe.yaml            # everything after it, from these two

`vision` teaches the VLM's vision tower to name patches in the words of its language model (no instruction is seen),
`masks` teaches SAM to turn blobs into masks. Both run side by side, some five minutes on two CPU cores. Stop it at any
time: the same command goes on from the last checkpoint.
"""

import argparse
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from labels import SceneSamples, collate
from parts import SEGMENTERS, build_processor, build_tokenizer, build_vlm
from trainers import MaskTrainer, VisionTrainer
from transformers import TrainingArguments, set_seed

from segcompass_hf.segmenters_segcompass import to_sam_image_processor
from segcompass_hf.training.loop.muon import has_fast_bfloat16

STAGES = {"vision": (700, 64), "masks": (1000, 16)}  # steps, batch size
DONE = "preprocessor_config.json"  # written last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/scenes-tiny"), help="gets the folders vision and masks"
    )
    parser.add_argument("--stage", choices=STAGES, help="only this one, in this process")
    parser.add_argument("--segmenter", choices=SEGMENTERS, default="sam", help="what masks trains (%(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the steps: 0.005 to see both work")
    given = parser.parse_args()
    if given.stage:
        run(given.stage, given.output / given.stage, given.scale, given.segmenter)
        return
    environment = dict(os.environ) if torch.cuda.is_available() else {**os.environ, "OMP_NUM_THREADS": "1"}
    options = ["--output", str(given.output), "--scale", str(given.scale), "--segmenter", given.segmenter]
    command = [sys.executable, __file__, *options, "--stage"]
    codes = [one.wait() for one in [subprocess.Popen([*command, stage], env=environment) for stage in STAGES]]
    if any(codes):
        sys.exit(f"a stage failed (exit codes {codes}); fix what its log says and run the same command again.")


def run(stage: str, folder: Path, scale: float = 1.0, segmenter: str = "sam") -> None:
    """Train one of the two, from its last checkpoint where there is one; nothing where it is done."""
    if (folder / DONE).exists():
        return
    (steps, batch_size), seed = STAGES[stage], list(STAGES).index(stage)
    steps = max(4, round(scale * steps))
    set_seed(seed)
    arguments = arguments_of(stage, folder, steps, batch_size, seed)
    processor, rows = build_processor(), SceneSamples(steps * batch_size, seed=seed)
    if stage == "vision":
        part = processor.image_processor
        tokenizer = build_tokenizer()
        model = build_vlm(tokenizer)
        model.model.language_model.layers.requires_grad_(False)
        trainer_class = partial(VisionTrainer, tokenizer=tokenizer)
    else:
        model = SEGMENTERS[segmenter]()
        part = processor.sam_image_processor if segmenter == "sam" else to_sam_image_processor(model.config)
        MaskTrainer.add_auxiliary_head(model)
        trainer_class = MaskTrainer
    data = {"train_dataset": rows, "data_collator": partial(collate, image_processor=part)}
    trainer = trainer_class(model=model, args=arguments, **data)
    trainer.train(resume_from_checkpoint=True)
    if stage == "masks":
        del model.auxiliary_head, model.place_head
    model.save_pretrained(folder)
    trainer.state.save_to_json(str(folder / "trainer_state.json"))
    if stage == "vision":
        processor.vlm_processor.save_pretrained(folder)
    part.save_pretrained(folder)


def arguments_of(stage: str, folder: Path, steps: int, batch_size: int, seed: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=6e-3,  # Muon's
        weight_decay=0.02,
        warmup_steps=min(40, steps // 10),
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": int(0.6 * steps), "min_lr_ratio": 0.02},
        bf16=has_fast_bfloat16(),
        use_cpu=not torch.cuda.is_available(),
        logging_steps=50,
        save_steps=max(1, min(250, steps // 4)),
        save_total_limit=1,
        report_to=[],
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=8 if torch.cuda.is_available() else 1,
        seed=seed,
    )


if __name__ == "__main__":
    main()
