"""The runs of `robust_runs` with TRL's GRPO and a tiny language model: `python robust_grpo_runs.py FOLDER`."""

import sys
from dataclasses import dataclass

import torch
from datasets import Dataset
from robust_runs import KillableMixin, main
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from segcompass_hf.training.loop.resume import RobustTrainerMixin, RobustTrainingArguments


@dataclass
class Arguments(RobustTrainingArguments, GRPOConfig):
    pass


class RobustGRPOTrainer(KillableMixin, RobustTrainerMixin, GRPOTrainer):
    pass


def count_a(completions, **_):
    return [float(text.count("a")) - 0.1 * len(text) for text in completions]


def grpo_trainer(folder):
    """A cycle of generation is 8 micro-steps, 4 optimizer steps; checkpoints every 3 fall inside it."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", *"abcdefghijklmnopqrstuvwxyz"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), pad_token_id=0, eos_token_id=1, **size))
    args = Arguments(
        str(folder),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        steps_per_generation=4,
        num_generations=4,
        num_iterations=2,
        max_completion_length=6,
        max_steps=12,
        learning_rate=0.01,
        logging_steps=2,
        save_steps=3,
        report_to=[],
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    rows = Dataset.from_dict({"prompt": [f"{a} {b}" for a in "bcd" for b in "ef"]})  # 6 prompts of 4 to a cycle
    return RobustGRPOTrainer(
        model=model, reward_funcs=count_a, args=args, train_dataset=rows, processing_class=tokenizer
    )


if __name__ == "__main__":
    main(sys.argv[1], grpo_trainer, {"in_step": ("in_step", 5), "half_written": ("half_written", 9)})
