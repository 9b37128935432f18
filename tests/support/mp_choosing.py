"""Groups chosen by two gloo processes, of which one has much to replace and the other nothing: `torchrun ... FOLDER`.

Rows 0 to 3 teach nothing; only the first process begins with one of them. Row 5 alone has a reference.
"""

import sys
from pathlib import Path

import torch
from grpo import tiny_rows, tiny_trainer

from segcompass_hf.evaluation.processes import Processes
from segcompass_hf.training import SegCompassGRPOTrainer
from segcompass_hf.training.grpo.guidance import reference_answer

SETTINGS = {"per_device_train_batch_size": 2, "max_completion_length": 40, "max_steps": 1, "shuffle_dataset": False}
SETTINGS |= {"max_resamplings": 3, "guidance": "rollout", "beta": 0.1}


class Wrong(SegCompassGRPOTrainer):
    """Whose samples are all wrong, but for the reference answer; keeps the batch."""

    def _judge_rollouts(self, inputs, prompts, completions, completion_ids):
        columns, rewards = super()._judge_rollouts(inputs, prompts, completions, completion_ids)
        for column, row, ids in zip(columns, inputs, completion_ids, strict=True):
            column["answer_is_right"] = list(ids) == reference_answer(row, self.processing_class)
        return columns, rewards

    def _choose_groups(self, inputs):
        self.began_with = [row["sample_id"] for row in inputs]
        self.chosen = super()._choose_groups(inputs)
        return self.chosen


def reward(completions, sample_id, **columns):
    equal = {f"row-{number}" for number in range(4)}
    return [0.3 if name in equal else place % 2 + 0.1 for place, name in enumerate(sample_id)]


def main():
    folder = Path(sys.argv[1])
    rows = tiny_rows((1,) * 6)
    order = [0, 4, 1, 2, 3, 5]  # the first batch is row 0 for the first process, row 4 for the second
    words = [None] * 5 + ["a box is red. it is here"]
    rows = rows.remove_columns("reasoning").add_column("reasoning", words, feature=rows.features["reasoning"])
    trainer = tiny_trainer(folder / "out", rows=rows.select(order), reward_funcs=[reward], cls=Wrong, **SETTINGS)
    trainer.train()
    (log,) = [line for line in trainer.state.log_history if "reward" in line]
    result = {
        "world_size": trainer.accelerator.num_processes,
        "began_with": trainer.began_with,
        "chosen": [row["sample_id"] for row in trainer.chosen.rows],
        "rewards": trainer.chosen.rewards.flatten().tolist(),
        "log": {name: log[name] for name in ("groups/dropped", "groups/equal_rewards", "reward", "loss")},
        "pool": trainer._pool.state(),
    }
    torch.save(result, folder / f"rank{torch.distributed.get_rank()}.pt")
    Processes.current().finish()


if __name__ == "__main__":
    main()
