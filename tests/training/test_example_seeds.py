"""The same command with the same seed starts from the same weights, whatever was drawn before."""

import sys

import pytest
import torch
from scripts import module
from supervised import arguments, uneven_rows
from tiny import tiny_model, tiny_processor

pytest.importorskip("trl")


class Seen(Exception):
    pass


@pytest.mark.parametrize(
    ("script", "trainer", "flag"),
    [
        ("train_warmup", "WarmupTrainer", "--fresh"),
        ("train_segmentation", "SegmentationTrainer", "--fresh_heads"),
    ],
)
def test_scripts(script, trainer, flag, tmp_path, monkeypatch):
    starts = []

    def note(model, *args):
        starts.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        raise Seen

    code = module(f"examples/{script}.py")
    monkeypatch.setattr(code, trainer, note)
    for before, seed in ((1, 5), (2, 5), (3, 6)):
        torch.manual_seed(before)
        options = {"--output_dir": tmp_path, "--num_samples": 2, "--seed": seed, flag: True}
        flags = [str(word) for option in options.items() for word in option]
        monkeypatch.setattr(sys, "argv", [script, *flags, "--use_cpu", "true"])
        with pytest.raises(Seen):
            code.main()
    first, second, other = starts
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in first.items())


@pytest.mark.parametrize("stage", ["segmentation", "warmup"])
def test_adapters_of_trainers(stage, tmp_path):
    from segcompass_hf.training import SegmentationConfig, SegmentationTrainer, WarmupConfig, WarmupTrainer
    from segcompass_hf.training.adapters import lora_config

    def start(before):
        from peft import LoraConfig

        model = tiny_model("llava")
        torch.manual_seed(before)
        if stage == "segmentation":
            args, kind, adapters = (
                arguments(SegmentationConfig, tmp_path),
                SegmentationTrainer,
                lora_config(model, r=2),
            )
        else:
            args, kind = arguments(WarmupConfig, tmp_path), WarmupTrainer
            adapters = LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj")
        trainer = kind(model, args, uneven_rows(), None, tiny_processor("llava"), adapters)
        return {name: value for name, value in trainer.model.named_parameters() if "lora_A" in name}

    first, second = start(1), start(2)
    assert first and all(torch.equal(value, second[name]) for name, value in first.items())
