"""What trainers are given: one order of arguments, models by folder, processors from where the model lies."""

import inspect

import pytest
import torch
from grpo import by_length, tiny_rows
from supervised import arguments, bare_vlm
from tiny import tiny_model, tiny_processor, tiny_segmenter_config

from segcompass_hf import SegCompassProcessor
from segcompass_hf.segmenters_segcompass import geometry_of
from segcompass_hf.training import (
    SaeTrainer,
    SaeTrainingConfig,
    SegCompassGRPOConfig,
    SegCompassGRPOTrainer,
    SegmentationConfig,
    SegmentationTrainer,
    WarmupConfig,
    WarmupTrainer,
)
from segcompass_hf.training.inputs import load_model, load_processor

TRAINERS = {
    WarmupTrainer: WarmupConfig,
    SaeTrainer: SaeTrainingConfig,
    SegmentationTrainer: SegmentationConfig,
    SegCompassGRPOTrainer: SegCompassGRPOConfig,
}
SETTINGS = {
    SaeTrainingConfig: {"d_sae": 64, "max_steps": 1, "dead_after_tokens": 100},
    SegCompassGRPOConfig: {"num_generations": 2, "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False},
}


@pytest.fixture(scope="module")
def segcompass(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segcompass")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_all_trainers_begin_alike(trainer_class):
    names = list(inspect.signature(trainer_class.__init__).parameters)
    assert names[1:6] == ["model", "args", "train_dataset", "eval_dataset", "processing_class"]


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_a_folder_is_model_and_processor(trainer_class, segcompass, tmp_path):
    config = TRAINERS[trainer_class]
    args = arguments(config, tmp_path, **SETTINGS.get(config, {}))
    trainer = trainer_class(str(segcompass), args, tiny_rows())
    if trainer_class is SaeTrainer:  # what trains is the SAE, what is read the VLM
        assert trainer.model.config.d_sae == 64 and trainer.vlm.config.model_type == "llava"
        return
    assert isinstance(trainer.processing_class, SegCompassProcessor)
    core = getattr(trainer, "segcompass", None) or trainer.core
    weights = tiny_model().state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in core.state_dict().items())


def test_grpo_asks_for_rewards_by_name(segcompass):
    with pytest.raises(TypeError, match="args must be a SegCompassGRPOConfig, got list; rewards are reward_funcs"):
        SegCompassGRPOTrainer(str(segcompass), [by_length])


def test_weights_come_in_float32(segcompass):
    module = tiny_model().half()
    assert load_model(module) is module
    module.save_pretrained(segcompass / "half")
    assert load_model(segcompass / "half").dtype == torch.float32
    assert load_model(segcompass / "half", dtype="auto").dtype == torch.float16


def test_a_processor_that_is_not_there(tmp_path, segcompass):
    processor = tiny_processor()
    assert load_processor(processor, tiny_model()) is processor
    with pytest.raises(ValueError, match="this LlavaForConditionalGeneration was not loaded from a folder or id"):
        load_processor(None, bare_vlm())
    bare_vlm().save_pretrained(tmp_path / "vlm")
    alone = load_model(tmp_path / "vlm")
    with pytest.raises(ValueError, match="vlm holds no processor that loads"):
        load_processor(None, alone, SegCompassProcessor)
    processor.save_pretrained(tmp_path / "vlm")  # as the warm-up leaves it
    assert load_processor(None, alone, SegCompassProcessor).num_slots == processor.num_slots
    with pytest.raises(ValueError, match=r"holds a SegCompassProcessor, not a ProcessorMixinOfAnotherKind; make one"):
        load_processor(None, alone, type("ProcessorMixinOfAnotherKind", (), {}))


def test_a_processor_for_another_segmenter_is_refused():
    sam2 = geometry_of(tiny_segmenter_config("sam2")).image_processor()
    stretching = SegCompassProcessor.from_parts(tiny_processor(), sam2)
    with pytest.raises(ValueError, match="fit 'stretch' and 'pad'"):
        load_processor(stretching, tiny_model())


def test_a_bare_vlm_has_no_masks_to_train(tmp_path):
    with pytest.raises(TypeError, match="got a LlavaForConditionalGeneration, not a SegCompassForReasoning"):
        SegmentationTrainer(bare_vlm(), arguments(SegmentationConfig, tmp_path), processing_class=tiny_processor())
