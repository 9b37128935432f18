# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The core in every precision on the device at hand (`SEGCOMPASS_TEST_DEVICE`, else CUDA, else the CPU).

What it computes is held against float32 on the CPU. Nothing here needs trl, datasets or pycocotools; what needs
bitsandbytes or peft is skipped without them.
"""

import copy

import numpy as np
import pytest
import tiny
import torch
from devices import DEVICE, DTYPES, on_device, relative_difference
from model_inputs import inputs_of
from transformers import AutoModel, AutoProcessor

from segcompass_hf import bundled_checkpoint
from segcompass_hf.data import scenes
from segcompass_hf.modeling_concepts import ConceptCodebook, encode_concepts
from segcompass_hf.training.quantization import check_quantization, quantization_config

# Norm of the difference over that of float32's: about three times what the CPU's own half precisions show.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.15, "fp16": 0.06}
OUTPUTS = ("loss", "logits", "heatmap_logits", "slot_logits", "pred_masks")
NUM_SCENES = 4


@pytest.fixture(autouse=True)
def whole_float32(monkeypatch):
    """cuDNN's convolutions would round float32 to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def reference(family):
    """Model and outputs in float32 on the CPU."""
    model = tiny.follow_concepts(tiny.tiny_model(family))
    with torch.no_grad():
        return model, model(**inputs_of(family, training=True))


@pytest.mark.parametrize("dtype", DTYPES)
class TestForward:
    def test_as_on_the_cpu(self, family, reference, dtype):
        model, expected = reference
        model = copy.deepcopy(model).to(DEVICE, DTYPES[dtype])
        with torch.no_grad():
            output = model(**on_device(inputs_of(family, training=True), DTYPES[dtype]))
        for name in OUTPUTS:
            assert output[name].device.type == torch.device(DEVICE).type
            assert relative_difference(output[name], expected[name]) < TOLERANCE[dtype], name

    def test_segment(self, family, reference, dtype):
        model = copy.deepcopy(reference[0]).to(DEVICE, DTYPES[dtype])
        inputs = inputs_of(family)
        output = model.segment(**on_device(inputs, DTYPES[dtype]), max_new_tokens=12)
        assert output.pred_masks.isfinite().all()
        written = output.sequences[:, inputs["input_ids"].shape[1] :]
        assert ((written == model.config.ref_token_id).sum(1) == tiny.NUM_SLOTS).all()
        if dtype == "fp32":
            expected = reference[0].segment(**inputs, max_new_tokens=12)
            assert torch.equal(output.sequences.cpu(), expected.sequences)
            assert relative_difference(output.pred_masks, expected.pred_masks) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_step(family, reference, dtype):
    """Gradients as on the CPU, through autocast as trainers do; a step moves what trains and nothing else."""
    inputs, gradients = inputs_of(family, training=True), []
    for device, precision in (("cpu", "fp32"), (DEVICE, dtype)):
        model = copy.deepcopy(reference[0]).to(device).freeze_for_training().train()
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer = torch.optim.AdamW(model.parameter_groups(1e-3), lr=1e-3)
        given = {name: value.to(device) for name, value in inputs.items()}
        with torch.autocast(torch.device(device).type, DTYPES["bf16"], enabled=precision == "bf16"):
            loss = model(**given).loss
        loss.backward()
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.grad is not None}
        gradients.append(torch.cat([parameter.grad.float().flatten().cpu() for parameter in trained.values()]))
        optimizer.step()
        moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
        assert moved and moved <= {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert relative_difference(gradients[1], gradients[0]) < TOLERANCE[dtype]


def test_saved_and_loaded(reference, tmp_path):
    model = copy.deepcopy(reference[0]).to(DEVICE, torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16  # as saved; the device is chosen when loading
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.cpu()), name


def test_sparse_concepts_equal_dense_ones(reference):
    """Output and gradient of the codebook, as `benchmarks/concept_path.py` compares them at full size."""
    sae, codebook = copy.deepcopy(reference[0].sae).to(DEVICE), ConceptCodebook(64, 32).to(DEVICE)
    torch.nn.init.normal_(codebook.weight)
    states, found = torch.randn(2, 50, tiny.HIDDEN_SIZE, device=DEVICE), []
    acts = sae.encode(states)
    dense = acts.masked_fill(acts.abs() < 0.01, 0.0)
    for path in (lambda: codebook(encode_concepts(sae, states, None, 0.01)), lambda: codebook.dense(dense)):
        codebook.weight.grad = None
        output = path()
        output.square().mean().backward()
        found.append((output, codebook.weight.grad))
    for sparse, full in zip(*found, strict=True):
        assert full.abs().max() > 0 and relative_difference(sparse, full) < 1e-5


@pytest.fixture(scope="module")
def scene_inputs():
    """Inputs of a few held-out scenes for the bundled checkpoint, and its processor."""
    processor = AutoProcessor.from_pretrained(bundled_checkpoint())
    chosen = [scenes.sample("val", number, seed=11) for number in range(NUM_SCENES)]
    images, instructions = [scene.image for scene in chosen], [scene.instruction.text for scene in chosen]
    return processor, processor(images=images, instruction=instructions, return_tensors="pt")


def answers(model, processor, inputs) -> tuple[torch.Tensor, list[np.ndarray]]:
    """Tokens written, and per scene the union `(height, width)` of its masks."""
    output = model.segment(**inputs)
    sizes = (inputs["original_sizes"], inputs["reshaped_input_sizes"])
    results = processor.post_process_segmentation(output, *sizes)
    return output.sequences.cpu(), [np.asarray(result["masks"].cpu()).any(0) for result in results]


@pytest.fixture(scope="module")
def expected_answers(scene_inputs):
    return answers(AutoModel.from_pretrained(bundled_checkpoint()).eval(), *scene_inputs)


def agreement(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Mean IoU with the masks in float32 on the CPU; 1 where both are empty."""
    pairs = zip(found, expected, strict=True)
    return float(np.mean([1.0 if not (a | b).any() else (a & b).sum() / (a | b).sum() for a, b in pairs]))


class TestBundledCheckpoint:
    @pytest.mark.parametrize("dtype, least", [("fp32", 0.999), ("bf16", 0.9), ("fp16", 0.95)])
    def test_answers_as_on_the_cpu(self, scene_inputs, expected_answers, dtype, least):
        model = AutoModel.from_pretrained(bundled_checkpoint(), dtype=DTYPES[dtype]).eval().to(DEVICE)
        processor, inputs = scene_inputs
        sequences, masks = answers(model, processor, on_device(inputs, DTYPES[dtype]))
        if dtype == "fp32":
            assert torch.equal(sequences, expected_answers[0])
        assert agreement(masks, expected_answers[1]) >= least

    def test_one_by_one_as_together(self, scene_inputs):
        processor, inputs = scene_inputs
        model = AutoModel.from_pretrained(bundled_checkpoint()).eval().to(DEVICE)
        _, together = answers(model, processor, on_device(inputs))
        alone = [answers(model, processor, on_device({k: v[row : row + 1] for k, v in inputs.items()}))[1][0]
                 for row in range(2)]  # fmt: skip
        assert agreement(alone, together[:2]) >= 0.999

    @pytest.mark.slow
    @pytest.mark.parametrize("bits", [4, 8])
    def test_quantised(self, scene_inputs, expected_answers, bits):
        """NF4 and LLM.int8() write well-formed answers whose masks are mostly those of full precision."""
        pytest.importorskip("bitsandbytes")
        config = AutoModel.from_pretrained(bundled_checkpoint()).config
        quantized = quantization_config(config, bits=bits)
        model = AutoModel.from_pretrained(bundled_checkpoint(), quantization_config=quantized, device_map={"": DEVICE})
        assert check_quantization(model)
        processor, inputs = scene_inputs
        sequences, masks = answers(model, processor, on_device(inputs))
        written = sequences[:, inputs["input_ids"].shape[1] :]
        assert ((written == model.config.ref_token_id).sum(1) == model.config.num_slots).all()
        assert agreement(masks, expected_answers[1]) >= 0.7


@pytest.mark.parametrize("bits", [4, 8])
def test_adapter_on_a_quantised_base(bits, tmp_path):
    """A few steps of QLoRA on one batch lower its loss by a tenth."""
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    from segcompass_hf.training.adapters import lora_config

    tiny.tiny_model().save_pretrained(tmp_path)
    config = quantization_config(tiny.tiny_config(), bits=bits)
    model = AutoModel.from_pretrained(tmp_path, quantization_config=config, device_map={"": DEVICE})
    model = peft.get_peft_model(model, lora_config(model, r=4, dropout=0.0))
    optimizer, losses = torch.optim.AdamW(model.parameter_groups(3e-3)), []
    for _ in range(5):
        losses.append(model(**on_device(inputs_of(training=True))).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
