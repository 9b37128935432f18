"""examples/train_grpo.py from the command line to a checkpoint, on the bundled model."""

import sys

import pytest
import torch
from places import ROOT
from scripts import module

SMALL = {
    "num_samples": 4,
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "num_generations": 2,
    "max_completion_length": 24,
    "sample_pictures_steps": 0,
    "save_steps": 1,
    "disable_tqdm": "true",
}


def run(monkeypatch, folder, **flags) -> None:
    config = ROOT / "examples" / "configs" / "scenes_tiny_grpo.yaml"
    words = ["train_grpo.py", "--config", str(config), "--output_dir", str(folder)]
    for name, value in (SMALL | flags).items():
        words += [f"--{name}", str(value)]
    monkeypatch.setattr(sys, "argv", words)
    module("examples/train_grpo.py").main()


def test_a_step_trains_what_is_above_the_sae_and_can_be_resumed(monkeypatch, tmp_path):
    from segcompass_hf import SegCompassForReasoningSegmentation, bundled_checkpoint

    run(monkeypatch, tmp_path)
    before = SegCompassForReasoningSegmentation.from_pretrained(bundled_checkpoint())
    after = SegCompassForReasoningSegmentation.from_pretrained(tmp_path)
    weights = {name: parameter for name, parameter in after.named_parameters()}
    moved = {name for name, old in before.named_parameters() if not torch.equal(old, weights[name])}
    assert any(name.startswith("slot_mapper.") for name in moved)
    assert any(".language_model.layers.3." in name for name in moved)
    frozen = ("sae.", "sam.vision_encoder.", "vlm.model.vision_tower.", "vlm.model.language_model.layers.1.")
    assert [name for name in moved if name.startswith(frozen)] == []
    assert (tmp_path / "processor_config.json").is_file()

    run(monkeypatch, tmp_path, max_steps=2, resume="true")
    assert (tmp_path / "checkpoint-2").is_dir()


def test_what_cannot_be_loaded_in_4_bit_is_refused(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="load_in_4bit goes with a model; compose one around this vlm first"):
        run(monkeypatch, tmp_path, vlm="some/vlm", load_in_4bit="true", lora_r=4)


@pytest.mark.parametrize("script", ["train_grpo", "train_segmentation"])
def test_settings_of_what_trains_reach_the_adapter(monkeypatch, tmp_path, script):
    example, seen = module(f"examples/{script}.py"), []

    class Stop(Exception):
        pass

    def trainer(*args, peft_config=None, **kwargs):
        seen.append(peft_config or args[-1])
        raise Stop

    name = {"train_grpo": "SegCompassGRPOTrainer", "train_segmentation": "SegmentationTrainer"}[script]
    monkeypatch.setattr(example, name, trainer)
    words = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--num_samples", "4", "--lora_r", "4"]
    frozen = ["--train_token_rows", "none"] + (["--train_heads", "false"] if script == "train_grpo" else [])
    for flags in ([], frozen):
        monkeypatch.setattr(sys, "argv", [script, *words, *flags])
        with pytest.raises(Stop):
            example.main()
    assert seen[0].modules_to_save and seen[0].trainable_token_indices and seen[0].lora_alpha == 8
    assert not seen[1].trainable_token_indices and bool(seen[1].modules_to_save) == (script != "train_grpo")


@pytest.mark.slow
def test_adapters_are_saved_alone(monkeypatch, tmp_path):
    from segcompass_hf.training.adapters import load_adapter

    run(monkeypatch, tmp_path, lora_r=4)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "model.safetensors").exists()
    from segcompass_hf import bundled_checkpoint

    load_adapter(bundled_checkpoint(), tmp_path)
