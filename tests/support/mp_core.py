"""Run by torchrun in two gloo processes: DDP and FSDP2 on tiny models. Results go to `<folder>/rank<r>.pt`."""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from mp_common import (
    batch,
    gradients,
    joint_loss,
    joint_model,
    loss_of,
    model_of,
    outside_forward,
    peft_model,
    sends_whole_weights,
    with_joint_forward,
)
from tiny import tiny_segmenter_config
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from segcompass_hf.evaluation.processes import Processes
from segcompass_hf.training.fsdp import FinishShardingCallback, core_model, prepare_fsdp2

folder = Path(sys.argv[1])
dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
mine = slice(2 * rank, 2 * rank + 2)
NUM_TOKENS = int((batch()["labels"][:, 1:] != -100).sum())


def ddp():
    """Two steps with no search for unused parameters: the second would hang or raise if one had been left out."""
    model = DistributedDataParallel(model_of())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(2):
        optimizer.zero_grad()
        loss = world_size * loss_of(model, batch(rows=mine), NUM_TOKENS)
        loss.backward()
        if step == 0:
            found = gradients(model)
        optimizer.step()
    trained = [name for name, p in model.module.named_parameters() if p.requires_grad]
    return {"gradients": found, "trained": trained, "wrapped": type(model).__name__}


def units(model):
    return sorted(name for name, module in model.named_modules() if isinstance(module, FSDPModule))


def fsdp2(family, tie, as_accelerate):
    model = model_of(family, tie=tie, train_token_rows="head")
    model = prepare_as_accelerate(model) if as_accelerate else prepare_fsdp2(model)
    result = {"units": units(model), "sharded": all(isinstance(p, DTensor) for p in model.parameters())}
    result["sends_whole_weights"] = sends_whole_weights(model, family, tie)
    inputs = batch(family, mine)
    if not tie:
        result |= {"outside": outside_forward(model, family, mine)}
    loss = world_size * loss_of(model, inputs, NUM_TOKENS)
    loss.backward()
    total = loss.detach().clone() / world_size
    dist.all_reduce(total)
    result |= {"loss": total, "gradients": gradients(model)}
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0 and not as_accelerate and not tie:
        model.save_pretrained(folder / f"sharded-{family}", state_dict=state)
    return result


def fsdp2_lora():
    model = prepare_fsdp2(peft_model())
    core = core_model(model)
    result = {"sends_whole_weights": sends_whole_weights(model), "outside": outside_forward(core, "llava", mine)}
    loss = world_size * loss_of(model.train(), batch(rows=mine), NUM_TOKENS)
    loss.backward()
    return result | {"gradients": gradients(model)}


def fsdp2_sam2():
    """Its images are encoded with two layers of the mask decoder, which is a unit of its own."""
    model = prepare_fsdp2(model_of(sam_config=tiny_segmenter_config("sam2")))
    loss = world_size * loss_of(model, batch(rows=mine), NUM_TOKENS)
    loss.backward()
    result = {"gradients": gradients(model), "units": units(model)}  # before weights are gathered again
    return result | {"encoded": model.encode_image(batch(rows=mine)["sam_pixel_values"]).parts}


def prepare_as_accelerate(model):
    """accelerate's own FSDP2 preparation: it is off on a CPU, so it is called here, with the settings of the yaml."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=rank == 0,
        device=torch.device("cpu"),
    )
    model = fsdp2_prepare_model(accelerator, model)
    FinishShardingCallback().on_train_begin(None, None, None, model=model)
    return model


def joint(how):
    """Joint training's forward; a batch of this process alone."""
    model, reference = joint_model()
    if how != "ddp":
        reference = fully_shard(reference)  # as TRL does
    model = with_joint_forward(model, reference)
    model = {"ddp": DistributedDataParallel, "fsdp2": prepare_fsdp2, "accelerate": prepare_as_accelerate}[how](model)
    loss = world_size * joint_loss(model, batch(rows=mine))
    loss.backward()
    total = loss.detach().clone() / world_size
    dist.all_reduce(total)
    return {"loss": total, "gradients": gradients(model)}


results = {"world_size": world_size, "ddp": ddp()}
results["fsdp2"] = fsdp2("llava", tie=False, as_accelerate=False)
results["fsdp2_qwen"] = fsdp2("qwen2_5_vl", tie=False, as_accelerate=False)
results["fsdp2_tied"] = fsdp2("gemma3", tie=True, as_accelerate=False)
results["accelerate"] = fsdp2("llava", tie=False, as_accelerate=True)
results["lora"] = fsdp2_lora()
results["sam2"] = fsdp2_sam2()
results["joint"] = {how: joint(how) for how in ("ddp", "fsdp2", "accelerate")}
torch.save(results, folder / f"rank{rank}.pt")
Processes.current().finish()
