"""The training examples under torchrun: each process trains and leaves its process group before Python ends."""

import os
import subprocess
import sys

import pytest
from places import ROOT

LEFT_PROPERLY = """
import runpy, sys, torch
from pathlib import Path
left, script, *flags = sys.argv[1:]
sys.argv = [script, *flags]
met = torch.distributed.init_process_group

def meet(*args, **kwargs):
    met(*args, **kwargs)
    Path(f"{left}.{torch.distributed.get_rank()}").write_text("in")

torch.distributed.init_process_group = meet
runpy.run_path(script, run_name="__main__")
assert not torch.distributed.is_initialized(), "the script leaves its process group to the end of Python"
"""
SHORT = {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": "true", "disable_tqdm": "true"}
FLAGS = {
    "train_warmup": SHORT | {"num_samples": 8},
    "train_sae": {**SHORT, "num_scenes": 8, "d_sae": 256, "max_steps": 2, "per_device_train_batch_size": 64},
    "train_segmentation": SHORT | {"num_samples": 8},
    "train_grpo": SHORT
    | {
        "num_samples": 4,
        "num_generations": 2,
        "max_completion_length": 24,
        "sample_pictures_steps": 0,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("script", FLAGS)
def test_each_process_leaves_its_group(tmp_path, script):
    caller, left = tmp_path / "caller.py", tmp_path / "group"
    caller.write_text(LEFT_PROPERLY)
    flags = [word for name, value in FLAGS[script].items() for word in (f"--{name}", str(value))]
    flags += ["--output_dir", str(tmp_path / "out")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(caller)]
    command += [str(left), str(ROOT / "examples" / f"{script}.py"), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(tmp_path / f"group.{rank}").exists() for rank in range(2)] == [True, True]
    assert (tmp_path / "out" / "config.json").exists() or (tmp_path / "out" / "model.safetensors").exists()
