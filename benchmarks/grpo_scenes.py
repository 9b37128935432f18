"""Does joint training learn on Scenes? From a start that writes the format about half of the time, several seeds.

    python benchmarks/grpo_scenes.py --seeds 0 1 2 --steps 120

`start`: the bundled checkpoint is fine-tuned for some steps on completions that are spoilt on purpose: three in five
break the format (a `<REF_POS>` too few or too many, no `</think>`), and 40 % stop reasoning before the answer, which
costs masks but not format. `run`: SegCompassGRPOTrainer from there, once per seed. `report`: a table and a plot from
the records. What is done already is not done again; runs resume where they were killed.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from segcompass_hf import SegCompassForReasoningSegmentation, SegCompassProcessor, bundled_checkpoint
from segcompass_hf.data import scenes
from segcompass_hf.training import SegCompassGRPOConfig, SegCompassGRPOTrainer

RUNS = Path("runs/grpo-scenes")
RESULTS = Path("benchmarks/results")
CURVES = {
    "format_share": "well-formed completions",
    "rewards/mask_reward/mean": "mask reward",
    "segmentation/giou": "gIoU (low resolution)",
    "kl": "KL to the start",
    "completions/mean_length": "tokens per completion",
    "entropy": "entropy per token",
}
EVALUATED = ("format_share", "rewards/mask_reward/mean", "segmentation/giou")


class SpoiltCompletions:
    """Collator: reference completions, some with a broken format, some without the answer."""

    def __init__(self, processor: SegCompassProcessor, seed: int):
        self.processor, self.random = processor, random.Random(seed)

    def spoil(self, reasoning: str) -> str:
        if self.random.random() < 0.4:
            words = reasoning.split()
            reasoning = " ".join(words[: self.random.randint(1, max(1, len(words) // 2))])
        text = self.processor.build_completion(reasoning)
        kind = self.random.choice(["fine", "fine", "too few", "too many", "not closed"])
        if kind == "too few":
            return text[: text.rfind("<REF_POS>")]
        if kind == "too many":
            return text + "<REF_POS>"
        return text.replace("</think>", "") if kind == "not closed" else text

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        prompts = [self.processor.build_prompt(row["instruction"]) for row in rows]
        completions = [self.spoil(row["reasoning"]) + tokenizer.eos_token for row in rows]
        images = [[row["image"]] for row in rows]
        batch = self.processor(images=images, text=prompts, padding=True, return_tensors="pt")
        ids = [torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in completions]
        mask = [torch.ones_like(one) for one in ids]
        ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
        mask = torch.nn.utils.rnn.pad_sequence(mask, batch_first=True)
        labels = torch.cat([torch.full_like(batch["input_ids"], -100), ids.masked_fill(mask == 0, -100)], dim=1)
        batch["input_ids"] = torch.cat([batch["input_ids"], ids], dim=1)
        batch["attention_mask"] = torch.cat([batch["attention_mask"], mask], dim=1)
        return {**batch, "labels": labels}


def make_start(steps: int) -> Path:
    folder = RUNS / "start"
    if (folder / "config.json").is_file():
        return folder
    model = SegCompassForReasoningSegmentation.from_pretrained(bundled_checkpoint())
    processor = SegCompassProcessor.from_pretrained(bundled_checkpoint())
    model.freeze_for_training()
    arguments = TrainingArguments(
        RUNS / "start-training",
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=3e-4,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        use_cpu=True,
    )
    collate = SpoiltCompletions(processor, seed=0)
    Trainer(model, arguments, collate, scenes.build("train", 16 * steps, seed=11)).train()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def run(start: Path, seed: int, steps: int) -> None:
    folder = RUNS / f"seed-{seed}"
    if (folder / "record.json").is_file():
        return
    arguments = SegCompassGRPOConfig(
        folder,
        max_steps=steps,
        per_device_train_batch_size=32,
        gradient_accumulation_steps=2,  # 8 prompts of 8 completions
        num_generations=8,
        max_completion_length=120,
        learning_rate=1e-4,
        codebook_lr_factor=1,
        slot_mapper_lr_factor=1,
        prompt_encoder_lr_factor=1,
        mask_decoder_lr_factor=1,
        gradient_checkpointing=False,
        bf16=False,
        logging_steps=1,
        save_steps=20,
        save_total_limit=1,
        sample_pictures_steps=steps,
        report_to="none",
        use_cpu=True,
        seed=seed,
        per_device_eval_batch_size=32,
        num_generations_eval=1,
    )
    trainer = SegCompassGRPOTrainer(
        str(start),
        args=arguments,
        train_dataset=scenes.build("train", 8 * steps, seed=100 + seed),
        eval_dataset=scenes.build("val", 128, seed=1),
    )
    before_file = folder / "before.json"
    if not before_file.is_file():
        before_file.parent.mkdir(parents=True, exist_ok=True)
        before_file.write_text(json.dumps(trainer.evaluate()))
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    record = {
        "seed": seed,
        "steps": steps,
        "before": json.loads(before_file.read_text()),
        "after": trainer.evaluate(),
        "history": [{"step": e["step"], "reward": e["reward"], **{k: e.get(k) for k in CURVES}} for e in history],
    }
    (folder / "record.json").write_text(json.dumps(record))


def report(seeds: list[int], command: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [json.loads((RUNS / f"seed-{seed}" / "record.json").read_text()) for seed in seeds]
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), sharex=True)
    for axis, (name, title) in zip(axes.flat, CURVES.items(), strict=True):
        for record in records:
            values = torch.tensor([entry[name] or 0.0 for entry in record["history"]])
            smooth = [values[max(0, i - 4) : i + 1].mean() for i in range(len(values))]
            axis.plot([entry["step"] for entry in record["history"]], smooth, label=f"seed {record['seed']}")
        axis.set_title(title)
    for axis in axes[1]:
        axis.set_xlabel("optimizer step (mean of the last 5)")
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(RESULTS / "grpo_scenes.png", dpi=80)

    lines = ["# Joint training on Scenes from a spoilt start", "", f"`{command}`", ""]
    lines += ["Sampled at temperature 1 on 128 scenes of `val`, before -> after, and the KL of the last 10 steps.", ""]
    lines += ["| seed | well-formed | mask reward | gIoU (low resolution) | KL |", "|---|---|---|---|---|"]
    for record in records:
        cells = [f"{record['before']['eval_' + k]:.3f} -> {record['after']['eval_' + k]:.3f}" for k in EVALUATED]
        kl = sum(entry["kl"] for entry in record["history"][-10:]) / 10
        lines.append(f"| {record['seed']} | " + " | ".join(cells) + f" | {kl:.4f} |")
    lines += ["", "![curves](grpo_scenes.png)", ""]
    (RESULTS / "grpo_scenes.md").write_text("\n".join(lines))
    (RESULTS / "grpo_scenes.json").write_text(json.dumps({"command": command, "records": records}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of joint training")
    parser.add_argument("--start-steps", type=int, default=150, help="steps on spoilt completions")
    parser.add_argument("--stage", choices=("all", "start", "run", "report"), default="all")
    given = parser.parse_args()
    command = f"python benchmarks/grpo_scenes.py --seeds {' '.join(map(str, given.seeds))} --steps {given.steps}"
    if given.stage == "report":
        report(given.seeds, command)
        return
    start = make_start(given.start_steps)
    for seed in given.seeds if given.stage != "start" else []:
        run(start, seed, given.steps)
    if given.stage == "all":
        report(given.seeds, command)


if __name__ == "__main__":
    main()
