"""Two gloo processes do what one does: DDP and FSDP2. Each launch is shared by the tests that read its results."""

import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
import torch

pytest.importorskip("trl")  # `training` needs it

import mp_grpo  # noqa: E402
from mp_common import (  # noqa: E402
    NUM_OBJECTS,
    batch,
    gradients,
    joint_loss,
    joint_model,
    loss_of,
    model_of,
    outside_forward,
    peft_model,
    with_joint_forward,
)
from places import ROOT, SUPPORT

WORLD_SIZE = 2


def launch(script, *arguments):
    """Run a script in two processes and return what each of them saved."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    paths = [ROOT / "src", SUPPORT, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={WORLD_SIZE}",
        f"--master_port={port}",
    ]
    done = subprocess.run(
        [*command, str(SUPPORT / script), *map(str, arguments)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(Path(arguments[0]) / f"rank{rank}.pt", weights_only=False) for rank in range(WORLD_SIZE)]


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    folder = tmp_path_factory.mktemp("core")
    return folder, launch("mp_core.py", folder)


@pytest.fixture(scope="module")
def alone():
    """Loss and gradients of one process on the whole batch."""
    found = {}

    def compute(family="llava", tie=False):
        if (family, tie) not in found:
            model, inputs = model_of(family, tie=tie), batch(family)
            loss = loss_of(model, inputs, (inputs["labels"][:, 1:] != -100).sum())
            loss.backward()
            found[family, tie] = loss.detach(), gradients(model)
        return found[family, tie]

    return compute


@pytest.fixture(scope="module")
def grpo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo")
    return folder, launch("mp_grpo.py", folder, *mp_grpo.CASES)


def same_gradients(got, expected):
    assert set(got) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("name", ["single_gpu", "ddp", "fsdp2", "deepspeed_zero3"])
def test_accelerate_reads_the_configurations(name):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    file = str(ROOT / "examples" / "accelerate" / f"{name}.yaml")
    config = load_config_from_file(file)
    kinds = {"single_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero3": "DEEPSPEED"}
    assert config.distributed_type == kinds[name] and config.mixed_precision == "bf16" and not config.use_cpu
    assert config.num_processes == (1 if name == "single_gpu" else 8)
    known = {action.dest for action in launch_command_parser()._actions}
    sharding = config.fsdp_config if name == "fsdp2" else config.deepspeed_config
    assert set(sharding) <= known and bool(sharding) == (name in ("fsdp2", "deepspeed_zero3"))


def test_batch_has_a_process_without_objects():
    assert NUM_OBJECTS[2:] == [0, 0] and batch()["num_objects"].tolist() == NUM_OBJECTS


def test_ddp_gives_the_gradients_of_one_process(core, alone):
    for result in core[1]:
        assert result["world_size"] == WORLD_SIZE
        assert result["ddp"]["wrapped"] == "DistributedDataParallel"
        same_gradients(result["ddp"]["gradients"], alone()[1])


def test_ddp_has_no_unused_parameters(core):
    for result in core[1]:
        assert set(result["ddp"]["gradients"]) == set(result["ddp"]["trained"])
        assert any(bool(g.any()) for n, g in result["ddp"]["gradients"].items() if n.startswith("sam.mask_decoder"))


FSDP = {"fsdp2": ("llava", False), "fsdp2_qwen": ("qwen2_5_vl", False), "fsdp2_tied": ("gemma3", True)}


@pytest.mark.parametrize("case", [*FSDP, "accelerate"])
def test_fsdp2_gives_the_loss_and_gradients_of_one_process(core, alone, case):
    family, tie = FSDP.get(case, ("llava", False))
    loss, expected = alone(family, tie)
    for result in core[1]:
        assert result[case]["sharded"]
        torch.testing.assert_close(result[case]["loss"], loss, atol=1e-5, rtol=1e-5)
        same_gradients(result[case]["gradients"], expected)


@pytest.mark.parametrize("case", FSDP)
def test_rows_of_added_tokens_alone_train_under_sharding(core, alone, case):
    family, tie = FSDP[case]
    model = model_of(family, tie=tie)
    rows = sorted({model.config.ref_token_id, model.config.think_start_token_id, model.config.think_end_token_id})
    (name,) = [n for n, p in model.named_parameters() if p is model.get_output_embeddings().weight]
    # The vocabulary of 494 is split in halves of 247: the added tokens, the last rows, are all on the second process.
    gradient = core[1][0][case]["gradients"][name]
    assert gradient.abs().sum(1).nonzero().flatten().tolist() == rows


@pytest.fixture(scope="module")
def joint_alone():
    model, reference = joint_model()
    loss = joint_loss(with_joint_forward(model, reference), batch())
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("how", ["ddp", "fsdp2", "accelerate"])
def test_joint_forward_gives_the_loss_and_gradients_of_one_process(core, joint_alone, how):
    """The head's weight is read without calling the head, and SAM's encoder runs before the model does."""
    for result in core[1]:
        torch.testing.assert_close(result["joint"][how]["loss"], joint_alone[0], atol=1e-5, rtol=1e-5)
        same_gradients(result["joint"][how]["gradients"], joint_alone[1])


def test_units_are_those_of_accelerate(core):
    ours, theirs = core[1][0]["fsdp2"]["units"], core[1][0]["accelerate"]["units"]
    # accelerate looks for the final norm among the children of the model alone, and leaves it to the root.
    assert set(ours) - set(theirs) == {"vlm.model.language_model.norm"} and set(theirs) <= set(ours)
    layers = [f"vlm.model.language_model.layers.{index}" for index in range(tiny.NUM_LAYERS)]
    heads = ["codebook", "slot_encoder", "slot_mapper", "sam.mask_decoder", "sam.vision_encoder"]
    assert {"", "vlm.lm_head", "vlm.model.language_model.embed_tokens", *layers, *heads} <= set(ours)


def test_fsdp2_with_lora(core):
    model, inputs = peft_model(), batch()
    loss_of(model, inputs, (inputs["labels"][:, 1:] != -100).sum()).backward()
    expected = gradients(model)
    assert any("lora_A" in name and bool(gradient.any()) for name, gradient in expected.items())
    for rank, result in enumerate(core[1]):
        same_gradients(result["lora"]["gradients"], expected)
        outside = outside_forward(model.get_base_model(), "llava", slice(2 * rank, 2 * rank + 2))
        for name, value in outside.items():
            torch.testing.assert_close(result["lora"]["outside"][name], value, atol=1e-5, rtol=1e-5)


def test_fsdp2_with_a_segmenter_that_encodes_with_its_decoder(core):
    model, inputs = model_of(sam_config=tiny.tiny_segmenter_config("sam2")), batch()
    loss_of(model, inputs, (inputs["labels"][:, 1:] != -100).sum()).backward()
    for rank, result in enumerate(core[1]):
        assert {"sam.mask_decoder", "sam.vision_encoder"} <= set(result["sam2"]["units"])
        same_gradients(result["sam2"]["gradients"], gradients(model))
        pixels = inputs["sam_pixel_values"][2 * rank : 2 * rank + 2]
        for part, expected in zip(result["sam2"]["encoded"], model.encode_image(pixels).parts, strict=True):
            torch.testing.assert_close(part, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", [*FSDP, "lora", "accelerate"])
def test_vllm_gets_whole_weights_of_a_sharded_model(core, case):
    assert all(result[case]["sends_whole_weights"] for result in core[1])


@pytest.mark.parametrize("case", ["fsdp2", "fsdp2_qwen", "accelerate"])
def test_methods_outside_forward(core, case):
    family, _ = FSDP.get(case, ("llava", False))
    model = model_of(family)
    for rank, result in enumerate(core[1]):
        expected = outside_forward(model, family, slice(2 * rank, 2 * rank + 2))
        assert torch.equal(result[case]["outside"].pop("generated"), expected.pop("generated"))
        for name, value in result[case]["outside"].items():
            torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_full_state_of_a_sharded_model_saves_and_loads(core, alone, family):
    model = model_of(family)
    loaded = type(model).from_pretrained(core[0] / f"sharded-{family}")
    _, expected = alone(family)
    for name, parameter in model.named_parameters():  # the weights after one step of SGD at 0.1
        stepped = parameter - 0.1 * expected[name] if name in expected else parameter
        torch.testing.assert_close(loaded.get_parameter(name), stepped, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_processes_with_unequal_numbers_of_equal_groups_choose_together(tmp_path):
    first, second = launch("mp_choosing.py", tmp_path)
    assert first["world_size"] == second["world_size"] == WORLD_SIZE
    assert first["began_with"] == ["row-0"] * 2 and second["began_with"] == ["row-4"] * 2
    assert second["chosen"] == ["row-4"] * 2 and len(set(first["chosen"])) == 1
    taught = first["chosen"][0] in ("row-4", "row-5")
    assert (first["rewards"][0] != first["rewards"][1]) == taught
    assert first["log"] == second["log"]  # of both together
    assert first["log"]["groups/equal_rewards"] == (0.0 if taught else 0.5)
    assert 0.25 <= first["log"]["groups/dropped"] <= 0.6  # one to three of the groups that both sampled
    assert first["pool"][0] is False and second["pool"][1] is True  # by place in the data set


@pytest.mark.slow
@pytest.mark.parametrize("case", mp_grpo.CASES)
def test_grpo_step_equals_that_of_one_process(grpo, case, tmp_path):
    """Weights after a step of SGD at 1: policy, segmentation, confidence and KL losses in one."""
    alone = mp_grpo.run(case, tmp_path, alone=True)
    assert alone["world_size"] == 1 and any(bool(g.any()) for g in alone["gradients"].values())
    for result in grpo[1]:
        assert result[case]["world_size"] == WORLD_SIZE
        assert result[case]["wrapped"] == "DistributedDataParallel"
        same_gradients(result[case]["gradients"], alone["gradients"])
        assert result[case]["logs"] == pytest.approx(alone["logs"], abs=1e-5)


@pytest.mark.slow
def test_zero3_gives_the_loss_and_gradients_of_one_process(alone, tmp_path):
    """Where DeepSpeed is installed; it runs on CPUs. Without a reference policy, which ZeRO-3 cannot have."""
    if find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    joint = with_joint_forward(joint_model()[0], None)
    loss = joint_loss(joint, batch())
    loss.backward()
    expected = {"supervised": alone(), "joint": (loss.detach(), gradients(joint))}
    outside = [outside_forward(model_of(), "llava", slice(2 * rank, 2 * rank + 2)) for rank in range(WORLD_SIZE)]
    step = mp_grpo.run("one batch", tmp_path, alone=True)
    for rank, result in enumerate(launch("mp_zero3.py", tmp_path)):
        assert result["world_size"] == WORLD_SIZE
        for case, (loss, found) in expected.items():
            assert result[case]["partitioned"] and result[case]["sends_whole_weights"]
            torch.testing.assert_close(result[case]["loss"], loss, atol=1e-5, rtol=1e-5)
            same_gradients(result[case]["gradients"], found)
            for name, value in outside[rank].items():
                torch.testing.assert_close(result[case]["outside"][name], value, atol=1e-5, rtol=1e-5)
        assert result["grpo"]["wrapped"] == "DeepSpeedEngine"
        same_gradients(result["grpo"]["gradients"], step["gradients"])
        assert result["grpo"]["logs"] == pytest.approx(step["logs"], abs=1e-5)
