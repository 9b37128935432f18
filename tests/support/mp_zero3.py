"""Run by torchrun in two gloo processes where DeepSpeed is installed: joint training's forward under ZeRO-3."""

import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed  # noqa: E402
import mp_grpo  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from mp_common import (
    batch,
    joint_loss,
    joint_model,
    loss_of,
    model_of,
    outside_forward,
    sends_whole_weights,
    with_joint_forward,
)  # noqa: E402

from segcompass_hf.evaluation.processes import Processes  # noqa: E402
from segcompass_hf.training.fsdp import FinishShardingCallback  # noqa: E402

sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # compiled for minutes, and of no use here
deepspeed.init_distributed(dist_backend="gloo")
folder, rank, world_size = Path(sys.argv[1]), dist.get_rank(), dist.get_world_size()
mine = slice(2 * rank, 2 * rank + 2)
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},  # nothing is left whole
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def train(model, loss_function):
    """One step of SGD at 1: the change of a weight is its gradient."""
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    FinishShardingCallback().on_train_begin(None, None, None, model=model)
    result = {"partitioned": all(p.numel() == 0 for p in model.parameters())}
    result["sends_whole_weights"] = sends_whole_weights(model, gather=deepspeed.zero.GatheredParameters)
    result["outside"] = outside_forward(model, "llava", mine)
    loss = world_size * loss_function(engine)
    engine.backward(loss)
    engine.step()
    total = loss.detach().clone() / world_size
    dist.all_reduce(total)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        after = {name: p.detach().clone() for name, p in model.named_parameters()}
    return result | {"loss": total, "gradients": {name: old - after[name] for name, old in before.items()}}


num_tokens = int((batch()["labels"][:, 1:] != -100).sum())
results = {"world_size": world_size}
results["supervised"] = train(model_of(), lambda engine: loss_of(engine, batch(rows=mine), num_tokens))
joint = with_joint_forward(joint_model()[0], None)
results["joint"] = train(joint, lambda engine: joint_loss(engine, batch(rows=mine)))
dataloader = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1}
results["grpo"] = mp_grpo.run("one batch", folder / "out", deepspeed=CONFIG | dataloader)
torch.save(results, folder / f"rank{rank}.pt")
Processes.current().finish()
