"""The memory estimator: what is counted exactly, and what is compared with a step that was measured."""

from dataclasses import replace

import pytest
import torch
from joint_step import joint_inputs
from tiny import tiny_config, tiny_model, tiny_sam_config, tiny_segmenter_config, tiny_vlm_config
from torch import nn

from segcompass_hf.generation_segcompass import CACHE
from segcompass_hf.image_features_segcompass import parts_of
from segcompass_hf.training.memory.estimate import estimate_memory, parameter_bytes
from segcompass_hf.training.memory.meter import MemoryMeter
from segcompass_hf.training.memory.model import fake_model
from segcompass_hf.training.memory.setup import TrainingSetup
from segcompass_hf.training.memory.shapes import SAM_SHAPES, VLM_SHAPES, composite_config, sam_config, vlm_config
from segcompass_hf.training.memory.step import _checkpoint, sampling_bytes, training_bytes

SMALL = {"batch_size": 2, "rollouts": 2, "prompt_tokens": 20, "completion_tokens": 10, "autocast": False}


def test_the_meter_counts_what_lives_and_what_is_saved_for_backward():
    weight = nn.Parameter(torch.ones(100))  # known: does not count
    weight.grad = torch.zeros(100)
    with MemoryMeter([weight, weight.grad]) as meter:
        double = weight * 2.0  # 400 bytes
        view = double.view(10, 10)  # none
        assert meter.live == 400
        squared = view.square()  # 400 more; its backward keeps `view`
        del double, view
        assert meter.live == 800
        loss = squared.sum()  # 4 bytes
        del squared  # nothing in the graph needs it
        assert meter.live == 404
        loss.backward()
        del loss
        assert meter.live == 0
    assert meter.peak > 804
    assert weight.grad.tolist() == [8.0] * 100  # d/dw of (2w)^2


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("tie", [False, True])
def test_weights_gradients_and_states_are_those_of_a_real_step(family, tie):
    from segcompass_hf.training.grpo.reference import ReferencePolicy

    model = tiny_model(family, tie=tie).freeze_for_training()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    reference = ReferencePolicy(model, 1.0)
    own = {id(parameter) for parameter in model.parameters()}
    copies = [parameter for parameter in reference.parameters() if id(parameter) not in own]

    with fake_model(tiny_config(family, tie=tie)) as fake:
        parts = parameter_bytes(fake, TrainingSetup(**SMALL))
    held = [*model.parameters(), *model.buffers()]
    assert parts["weights"] == sum(tensor.nbytes for tensor in held)
    assert parts["gradients"] == sum(parameter.grad.nbytes for parameter in trained)
    assert parts["optimizer"] == sum(moment.nbytes for moment in moments)
    assert parts["reference"] == sum(copy.nbytes for copy in copies)


def _middle_config(family: str, segmenter: str = "sam", **others):
    """Large enough that activations outweigh what is constant: hidden 256, 6 layers, 1,024 features, canvas of 256."""
    text = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "head_dim": 64}
    vlm = tiny_vlm_config(family, **text, num_attention_heads=4, num_key_value_heads=4)
    fields = {"sae_config": {"d_in": 256, "d_sae": 1024, "layer": 2}, "d_slot": 64, "concept_threshold": 0.0}
    sam = tiny_sam_config(256, 16, 64) if segmenter == "sam" else tiny_segmenter_config(segmenter, 256)
    return tiny_config(family, vlm_config=vlm, sam_config=sam, **fields | others)


def _measured_step(config, setup: TrainingSetup) -> tuple[int, int, int]:
    """Bytes kept by the forward pass of the trainer's own step, saved for backward by autograd, and at most."""
    from trl.trainer.utils import add_fused_lm_head

    from segcompass_hf.modeling_segcompass import SegCompassForReasoningSegmentation
    from segcompass_hf.training.grpo.forward import add_joint_forward
    from segcompass_hf.training.grpo.reference import ReferencePolicy

    torch.manual_seed(0)
    model = SegCompassForReasoningSegmentation(config).freeze_for_training().train()
    reference = ReferencePolicy(model, 1.0)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    add_joint_forward(model, 1.0, False, reference)
    if setup.gradient_checkpointing:
        _checkpoint(model)
    inputs = joint_inputs(model, setup)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    features = parts_of(inputs["segmentation"].image_embeddings)  # held all along; the estimate makes them itself
    known = [*model.parameters(), *model.buffers(), *reference.parameters(), *(p.grad for p in trained), *features]
    known_places, saved = {tensor.data_ptr() for tensor in known}, {}

    def save(tensor):
        if tensor.untyped_storage().data_ptr() not in known_places:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with MemoryMeter(known) as meter, torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=setup.autocast):
            output = model(**inputs, fused_lm_head=True)
        loss = output.log_probs.sum() + output.segmentation
        kept, kept_by_autograd = meter.live, sum(saved.values())
        loss.backward()
    held = sum(part.nbytes for part in features)
    return kept + held, kept_by_autograd + held, meter.peak + held


@pytest.mark.parametrize(
    ("checkpointing", "autocast", "segmenter", "heatmap_concepts"),
    [
        (False, False, "sam", False),
        (True, True, "sam", False),
        (False, False, "sam2", False),
        (True, True, "sam3_tracker", False),
        (False, False, "sam", True),
    ],
)
def test_activations_are_those_of_a_measured_step(checkpointing, autocast, segmenter, heatmap_concepts):
    config = _middle_config("llava", segmenter, heatmap_concepts=heatmap_concepts)
    setup = TrainingSetup(
        batch_size=3,
        rollouts=3,
        prompt_tokens=200,
        completion_tokens=150,
        active_concepts=512,  # half of 1,024 random features with a ReLU
        objects=2,
        autocast=autocast,
        gradient_checkpointing=checkpointing,
    )
    kept, kept_by_autograd, peak = _measured_step(config, setup)
    with fake_model(config) as fake:
        estimated, working = training_bytes(fake, setup)
    assert estimated == pytest.approx(kept, rel=0.04)
    assert estimated == pytest.approx(kept_by_autograd, rel=0.06)
    # On a CPU TRL's head makes a few tensors more than on a GPU; the estimate is for a GPU.
    assert estimated + working == pytest.approx(peak, rel=0.09)


def test_tied_rows_that_learn_from_the_head_alone_keep_nothing_of_the_layers_below():
    setup = TrainingSetup(**SMALL, stage="segmentation", active_concepts=8, objects=1, gradient_checkpointing=False)
    kept = {}
    for rows in ("head", "both"):
        for tie in (False, True):
            with fake_model(tiny_config("llava", tie=tie, train_token_rows=rows), stage="segmentation") as fake:
                kept[rows, tie] = training_bytes(fake, setup)[0]
    assert kept["head", True] == kept["head", False] < kept["both", True] == kept["both", False]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_the_cache_is_as_large_as_a_real_one(family):
    from transformers import DynamicCache

    model = tiny_model(family)
    text_model = model.base_model.language_model
    setup = TrainingSetup(**SMALL)
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        text_model(inputs_embeds=torch.randn(2, 30, 32), use_cache=True, **{CACHE: cache})
    keys_and_values = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    with fake_model(tiny_config(family)) as fake:
        cached, _ = sampling_bytes(fake, setup)
    captured = 2 * 2 * 30 * 32 * 4  # states of layer L and of the end, 2 sequences of 30 tokens, 32 wide, float32
    assert cached == keys_and_values + captured


def test_adapters_train_less_and_need_no_copy():
    from peft import get_peft_model

    from segcompass_hf.training.adapters import lora_config

    real = tiny_model("qwen2_5_vl")
    settings = lora_config(real, r=4)
    adapted = get_peft_model(real, lora_config(real, r=4), autocast_adapter_dtype=False)
    estimate = estimate_memory(tiny_config("qwen2_5_vl"), TrainingSetup(**SMALL), settings)
    assert estimate.trainable == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert estimate.parameters == sum(p.numel() for p in adapted.parameters())
    assert estimate.reference == 0
    whole = estimate_memory(tiny_config("qwen2_5_vl"), TrainingSetup(**SMALL))
    assert estimate.gradients < whole.gradients
    assert estimate.activations < whole.activations * 1.5  # adapters keep their inputs too


def test_nf4_weights_take_what_bitsandbytes_takes():
    bnb = pytest.importorskip("bitsandbytes")

    from segcompass_hf.training.memory.estimate import NF4_BYTES

    weights = torch.randn(1024, 1024)
    packed, state = bnb.functional.quantize_4bit(weights, quant_type="nf4", compress_statistics=True)
    scales = state.absmax.nbytes + state.state2.absmax.nbytes
    assert packed.nbytes + scales == pytest.approx(NF4_BYTES * weights.numel(), rel=1e-3)

    config = tiny_config("llava")
    plain = TrainingSetup(**SMALL)
    with fake_model(config) as fake:
        layers = fake.base_model.language_model.layers
        frozen = [m.weight for layer in layers[:2] for m in layer.modules() if isinstance(m, nn.Linear)]
        fake.requires_grad_(False)
        quantized = parameter_bytes(fake, TrainingSetup(**SMALL, load_in_4bit=True))["weights"]
        saved = parameter_bytes(fake, plain)["weights"] - quantized
    # 4 layers alike, of which `frozen` is half
    assert saved == pytest.approx(2 * (4 - NF4_BYTES) * sum(weight.numel() for weight in frozen))


def test_eight_bit_states_take_what_bitsandbytes_takes():
    bnb = pytest.importorskip("bitsandbytes")

    from segcompass_hf.training.memory.estimate import _state_bytes

    packed, scales = bnb.functional.quantize_blockwise(torch.randn(256, 1024), blocksize=256)  # as its optimizers do
    setup = TrainingSetup(optim="adamw_8bit")
    assert _state_bytes(256 * 1024, setup) == 2 * (packed.nbytes + scales.absmax.nbytes)
    assert _state_bytes(1000, setup) == 8000  # small tensors keep float32


def test_shards_divide_and_ddp_doubles_the_gradients():
    config = tiny_config("llava")
    with fake_model(config) as fake:
        one = parameter_bytes(fake, TrainingSetup(**SMALL))
        ddp = parameter_bytes(fake, TrainingSetup(**SMALL, gpus=4))
        sharded = parameter_bytes(fake, TrainingSetup(**SMALL, gpus=4, sharding="fsdp"))
    assert ddp == one | {"gradients": 2 * one["gradients"]}
    assert sharded == {name: size / 4 for name, size in one.items()}


def test_estimates_add_up_and_follow_the_settings():
    config = tiny_config("llava")
    base = estimate_memory(config, TrainingSetup(**SMALL, gradient_checkpointing=False))
    assert base.held == base.weights + base.optimizer + base.reference + base.context
    assert base.peak == max(base.training, base.sampling)
    assert base.training == base.held + base.gradients + base.gathered + base.activations + base.working
    assert "= peak" in base.table()
    sharded = estimate_memory(config, TrainingSetup(**SMALL, gpus=2, sharding="fsdp", reference=False))
    assert sharded.activations < base.activations  # layers are computed again
    assert sharded.reference == 0
    assert 0 < sharded.weights < base.weights and sharded.gathered > 0


# As reported for the checkpoints; for LLaVA-13B none was found, for SAM ViT-B, ViT-L and SAM 3's tracker none
# looked up: those pin the shapes only. SAM 2.1: see the test of whole checkpoints.
PUBLISHED = {
    "llava-hf/llava-1.5-7b-hf": 7_063_427_072,
    "llava-hf/llava-1.5-13b-hf": 13_351_494_656,
    "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen/Qwen3-VL-4B-Instruct": 4_437_815_808,
    "Qwen/Qwen3-VL-8B-Instruct": 8_767_123_696,
    "facebook/sam-vit-base": 93_735_728,
    "facebook/sam-vit-large": 312_343_088,
    "facebook/sam-vit-huge": 641_090_864,
    "facebook/sam2.1-hiera-tiny": 31_440_721,
    "facebook/sam2.1-hiera-small": 38_538_577,
    "facebook/sam2.1-hiera-base-plus": 73_328_401,
    "facebook/sam2.1-hiera-large": 216_924_865,
    "facebook/sam3": 458_260_369,
}
SAM2_MILLIONS = {"tiny": 38.9, "small": 46.0, "base-plus": 80.8, "large": 224.4}  # reported, the memory included


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_have_the_published_number_of_parameters(name):
    from transformers import AutoModelForImageTextToText, AutoModelForMaskGeneration

    with torch.device("meta"):
        if name in SAM_SHAPES:
            model = AutoModelForMaskGeneration.from_config(sam_config(name))
        else:
            model = AutoModelForImageTextToText.from_config(vlm_config(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]
    assert set(PUBLISHED) == {*VLM_SHAPES, *SAM_SHAPES}


@pytest.mark.parametrize("name", SAM2_MILLIONS)
def test_sam2_with_its_memory_for_videos_has_the_published_size(name):
    from transformers import Sam2VideoConfig, Sam2VideoModel

    vision = sam_config(f"facebook/sam2.1-hiera-{name}").vision_config.to_dict()
    with torch.device("meta"):
        model = Sam2VideoModel(Sam2VideoConfig(vision_config=vision))
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions == pytest.approx(SAM2_MILLIONS[name], abs=0.1)


def test_masks_alone_take_less_than_the_whole():
    config, setup = tiny_config("llava"), TrainingSetup(**SMALL, stage="segmentation")
    joint, masks = estimate_memory(config, setup), estimate_memory(config, replace(setup, trainable="masks"))
    assert masks.weights == joint.weights
    model = tiny_model("llava").freeze_for_training(trainable="masks")
    assert masks.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad) < joint.trainable
    assert masks.activations < joint.activations


def test_errors_say_what_is_known():
    with pytest.raises(ValueError, match=r"'nobody/model'; known are llava-hf"):
        composite_config("nobody/model", "facebook/sam-vit-base")
    with pytest.raises(ValueError, match=r"no SAM of known shape"):
        composite_config("llava-hf/llava-1.5-7b-hf", "nobody/sam")
    with pytest.raises(ValueError, match=r"optim='sgd'"):
        TrainingSetup(optim="sgd")
    with pytest.raises(ValueError, match=r"needs 2 or more"):
        TrainingSetup(sharding="fsdp")
    with pytest.raises(ValueError, match=r"takes 8 completions but only 4"):
        TrainingSetup(batch_size=8, rollouts=4)


@pytest.mark.parametrize("architecture", ["standard", "topk", "batchtopk"])
def test_a_step_of_the_sae_is_as_measured(architecture):
    from segcompass_hf.modeling_sae import SegCompassSae

    sae_config = {"d_in": 256, "d_sae": 1024, "layer": 2, "architecture": architecture, "k": 8}
    config = _middle_config("llava", sae_config=sae_config)
    tokens = {"batch_size": 512, "rows_per_batch": 1, "buffer_tokens": 1000}
    setup = TrainingSetup(**SMALL | tokens, stage="sae", gpus=0, cached=True)
    estimate = estimate_memory(config, setup)
    sae = SegCompassSae(config.sae_config).train()
    for parameter in sae.parameters():
        parameter.grad = torch.zeros_like(parameter)
    known = [*sae.parameters(), *sae.buffers(), *(parameter.grad for parameter in sae.parameters())]
    with MemoryMeter(known) as meter:
        output = sae(torch.randn(512, 256), output_feature_acts=False)
        kept = meter.live
        output.loss.backward()
    assert estimate.trainable == sum(parameter.numel() for parameter in sae.parameters())
    buffer = 1000 * 256 * 4
    assert estimate.activations - buffer == pytest.approx(kept, rel=0.1)
    assert estimate.activations - buffer + estimate.working == pytest.approx(meter.peak, rel=0.1)
    assert estimate.sampling == 0
    # without a cache a pass of the VLM runs beside the step, and needs less than it here
    beside = estimate_memory(config, replace(setup, cached=False))
    assert beside.activations == estimate.activations and 0 < beside.working - estimate.working < meter.peak
    # on a GPU every SAE makes rows of all features, here a few are computed with alone
    rows, on_gpu = 512 * 1024 * 4, estimate_memory(config, replace(setup, gpus=1))
    assert on_gpu.activations > rows and (estimate.activations - buffer < rows) == (architecture != "standard")


def test_the_warm_up_counts_what_it_trains():
    """All of the VLM, or all but what its vision encoder holds."""
    config, model = tiny_config(), tiny_model()
    vision = sum(parameter.numel() for parameter in model.vlm.base_model.vision_tower.parameters())
    whole = sum(parameter.numel() for parameter in model.vlm.parameters())
    for trainable, expected in (("all", whole), ("without_vision", whole - vision)):
        setup = TrainingSetup(stage="warmup", trainable=trainable, **{**SMALL, "rollouts": 2})
        assert estimate_memory(config, setup).trainable == expected
