"""Joint training for one optimizer step, run by torchrun in two gloo processes: `<folder>` `<case>` ...

Completions are given, not sampled, so that one process and two train on the same ones. With plain SGD at a learning
rate of 1 the change of a weight is its gradient.
"""

import hashlib
import sys
from pathlib import Path

import torch
from grpo import by_length, tiny_rows, tiny_trainer
from tiny import tiny_model

from segcompass_hf.evaluation.processes import Processes
from segcompass_hf.training import SegCompassGRPOTrainer, mask_reward

NUM_OBJECTS = (2, 1, 0, 1)  # three of the four rows have objects: two processes never see equally many
LENGTH = 6
CASES = {
    "one batch": {"per_device_train_batch_size": 4},
    "two batches": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "reference": {"per_device_train_batch_size": 4, "beta": 0.2},
    "tokens": {"per_device_train_batch_size": 4, "loss_type": "dapo"},
    "lora": {"per_device_train_batch_size": 4, "beta": 0.2},
}


class GivenCompletions(SegCompassGRPOTrainer):
    """Completions are a function of prompt and place in the group."""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, **kwargs):
        ref, vocabulary = self.core.config.ref_token_id, 200
        completions = []
        for index, ids in enumerate(prompt_ids):
            seed = int.from_bytes(hashlib.sha256(repr((ids, index % num_generations)).encode()).digest()[:4], "big")
            draw = torch.Generator().manual_seed(seed)
            length = int(torch.randint(2, LENGTH, (), generator=draw))
            words = torch.randint(60, vocabulary, (length,), generator=draw).tolist()
            completions.append([*words, ref, ref])
        return completions, None

    def training_step(self, model, *args, **kwargs):
        self.wrapped = type(model).__name__
        return super().training_step(model, *args, **kwargs)


def run(case, folder, alone=False, **changed):
    """Results of one case; `alone` with all eight completions in one batch of one process."""
    settings = {"loss_type": "grpo", "num_generations": 2, "max_steps": 1, "optim": "sgd", "learning_rate": 1.0}
    settings |= {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "ddp_find_unused_parameters": False}
    settings |= {"max_completion_length": LENGTH + 2, "weight_decay": 0.0, "beta": 0.0} | CASES[case]
    settings |= changed
    if alone:
        settings |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    model, peft_config = tiny_model("llava"), None
    if case == "lora":
        from segcompass_hf.training.adapters import lora_config

        peft_config = lora_config(model, r=2, dropout=0.0)
        settings["max_steps"] = 2  # a parameter left out of the first would stop the second
    trainer = tiny_trainer(
        folder,
        model=model,
        rows=tiny_rows(NUM_OBJECTS),
        reward_funcs=[by_length, mask_reward],
        cls=GivenCompletions,
        peft_config=peft_config,
        **settings,
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = whole_weights(trainer.model)
    logs = next(line for line in trainer.state.log_history if "reward" in line)
    return {
        "world_size": trainer.accelerator.num_processes,
        "wrapped": trainer.wrapped,
        "gradients": {name: (old - after[name]).detach() for name, old in before.items()},
        "logs": {name: value for name, value in logs.items() if name.startswith("segmentation/") or name == "reward"},
    }


def whole_weights(model):
    if not hasattr(next(model.parameters()), "ds_id"):
        return dict(model.named_parameters())
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def main():
    folder = Path(sys.argv[1])
    results = {case: run(case, folder / "out") for case in sys.argv[2:]}
    torch.save(results, folder / f"rank{torch.distributed.get_rank()}.pt")
    Processes.current().finish()


if __name__ == "__main__":
    main()
