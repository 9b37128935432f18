"""Runs of two gloo processes, forks of this one, under DDP and FSDP2: `python robust_two_processes.py FOLDER`.

Each process leaves `FOLDER/<scenario>-<rank>.pt` with what it logged and its weights.
"""

import os
import signal
import socket
import sys
import traceback
from pathlib import Path

import torch
from robust_runs import Arguments, Net, PlainTrainer, Points
from torch.distributed.fsdp import fully_shard

from segcompass_hf.stopping import Stopped


class SpoilingTrainer(PlainTrainer):
    """NaN in the loss of process 1, or in one of its gradients before they are averaged, at the steps named."""

    spoilt_loss: tuple = ()
    spoilt_gradient: tuple = ()
    spoilt_shard: tuple = ()
    deadly_save: tuple = ()
    stopped: tuple = ()

    def training_step(self, model, *args, **kwargs):
        if self.args.process_index == 1 and self.state.global_step + 1 in self.stopped:
            os.kill(os.getpid(), signal.SIGTERM)  # process 0 is told nothing
        loss = super().training_step(model, *args, **kwargs)
        if self.args.process_index == 1 and self.state.global_step + 1 in self.spoilt_shard:
            model.first.weight.grad.to_local().fill_(float("nan"))  # rows that process 0 does not hold
        return loss

    def compute_loss(self, model, *args, **kwargs):
        loss = super().compute_loss(model, *args, **kwargs)
        if self.args.process_index == 1 and not self.accelerator.sync_gradients:  # the first of two micro-steps
            if self.state.global_step + 1 in self.spoilt_loss:
                loss = loss + (loss.detach() * float("nan"))  # the gradient stays finite
            if self.state.global_step + 1 in self.spoilt_gradient:
                loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    def _save_rng_state(self, output_dir):
        if self.state.global_step in self.deadly_save and self.args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)  # process 0 is done with its part, or soon will be
        super()._save_rng_state(output_dir)


def trainer(folder, **settings):
    torch.manual_seed(0)
    defaults = {"gradient_accumulation_steps": 2, "save_steps": 3}
    args = Arguments(
        str(folder),
        use_cpu=True,
        ddp_backend="gloo",
        per_device_train_batch_size=1,
        num_train_epochs=2,
        learning_rate=0.05,
        weight_decay=0.1,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        **defaults | settings,
    )
    model = Net()
    if "fsdp" in str(folder.name):
        # Trainer leaves a sharded model as it is; accelerate itself would not shard one on a CPU.
        fully_shard(model.first)
        fully_shard(model)
        model.is_distributed_loading_by_transformers = (
            True  # Trainer leaves it as it is; accelerate would not on a CPU
        )
    return SpoilingTrainer(model=model, args=args, train_dataset=Points())


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def work(folder, name, resume, spoil, settings):
    for key, value in spoil.items():
        setattr(SpoilingTrainer, key, value)
    robust = trainer(folder / name.split("-")[0], **settings)
    error = None
    try:
        robust.train(resume_from_checkpoint=resume)
    except (RuntimeError, Stopped) as raised:
        error = str(raised)
    result = {
        "world_size": robust.accelerator.num_processes,
        "wrapped": type(robust.model_wrapped).__name__,
        "curve": [(line["step"], line["loss"]) for line in robust.state.log_history if "loss" in line],
        "nonfinite_steps": robust.nonfinite_steps,
        "weights": {name: full(tensor) for name, tensor in robust.model.state_dict().items()},
        "sharded": hasattr(robust.model.first.weight, "to_local"),
        "optimizer_steps": robust.optimizer.state_dict()["state"][0]["step"].item(),
        "error": error,
    }
    torch.save(result, f"{folder / name}-{robust.args.process_index}.pt")


def run(folder, name, resume=None, spoil=(), settings=()):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
                work(folder, name, resume, dict(spoil), dict(settings))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    died = [os.waitpid(children[1], 0)]
    if os.waitstatus_to_exitcode(died[0][1]) == -signal.SIGKILL:
        os.kill(children[0], signal.SIGKILL)  # it would wait for the dead one; a launcher does the same
    os.waitpid(children[0], 0)


def main(folder):
    folder = Path(folder)
    run(folder, "whole")
    run(folder, "killed", spoil={"deadly_save": (9,)})
    run(folder, "killed-resumed", resume=True)
    run(folder, "stopped", spoil={"stopped": (4,)})
    run(folder, "stopped-resumed", resume=True)
    run(folder, "loss", spoil={"spoilt_loss": (4,)})
    run(folder, "gradient", spoil={"spoilt_gradient": (4,)}, settings={"max_grad_norm": 0.0})
    once = {"save_strategy": "no", "gradient_accumulation_steps": 1, "max_steps": 6}
    run(folder, "fsdp", spoil={"spoilt_shard": (4,)}, settings=once)
    run(folder, "fsdp0", spoil={"spoilt_shard": (4,)}, settings=once | {"max_grad_norm": 0.0})
    run(folder, "row", spoil={"spoilt_loss": (4, 5)}, settings={"max_nonfinite_steps": 2})


if __name__ == "__main__":
    main(sys.argv[1])
