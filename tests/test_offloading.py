# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Parts that `accelerate` keeps on disk or on the CPU answer as a model in memory does."""

import pytest
import tiny
import torch
import transformers
from model_inputs import inputs_of
from packaging import version
from transformers import AutoModel

from segcompass_hf.explain import explain
from segcompass_hf.interventions_segcompass import ConceptIntervention

accelerate = pytest.importorskip("accelerate")
PARTS = ("vlm", "sae", "codebook", "slot_encoder", "slot_mapper", "sam")
# Concepts and the residual stream read the SAE; all parts answer.
ASKED = {"max_new_tokens": 10, "interventions": [ConceptIntervention(3, add=2.0, where="residual")]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    sae_config = {"d_in": 32, "d_sae": 64, "layer": 2, "finetuning_scaling_factor": True}
    tiny.tiny_model(sae_config=sae_config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(checkpoint):
    model = AutoModel.from_pretrained(checkpoint)
    with torch.no_grad():
        return model.segment(**inputs_of(), **ASKED), model(**inputs_of(training=True))


def assert_answers_as(model, expected) -> None:
    answer, output = expected
    got = model.segment(**inputs_of(), **ASKED)
    assert torch.equal(got.sequences, answer.sequences)
    torch.testing.assert_close(got.pred_masks, answer.pred_masks)
    torch.testing.assert_close(got.slot_logits, answer.slot_logits)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs_of(training=True)).loss, output.loss)


@pytest.mark.parametrize("parts", [*((part,) for part in PARTS), PARTS, ("sam.mask_decoder", "sam.prompt_encoder")])
def test_parts_on_disk(checkpoint, expected, tmp_path, parts):
    if parts in (("sam",), PARTS) and version.parse(transformers.__version__) < version.parse("5.24"):
        pytest.skip("transformers 5.17 reads a convolution of SAM wrongly from the disk, and refuses all parts there")
    names = [name for name, _ in AutoModel.from_pretrained(checkpoint).named_children()]
    if parts[0].startswith("sam."):
        names = [name for name in names if name != "sam"]
        names += ["sam.shared_image_embedding", "sam.vision_encoder", "sam.prompt_encoder", "sam.mask_decoder"]
    places = {name: "disk" if name in parts else "cpu" for name in names}
    model = AutoModel.from_pretrained(checkpoint, device_map=places, offload_folder=tmp_path)
    assert any(weight.is_meta for weight in model.parameters())
    assert_answers_as(model, expected)
    assert any(weight.is_meta for weight in model.parameters())  # and they are gone again


@pytest.mark.parametrize("offload", [accelerate.cpu_offload, accelerate.disk_offload])
def test_the_whole_model(checkpoint, expected, tmp_path, offload):
    model = AutoModel.from_pretrained(checkpoint)
    where = {} if offload is accelerate.cpu_offload else {"offload_dir": tmp_path}
    offload(model, execution_device="cpu", **where)
    assert all(weight.is_meta for weight in model.parameters())
    assert_answers_as(model, expected)
    assert all(weight.is_meta for weight in model.parameters())


def test_an_explanation(checkpoint):
    model, processor = tiny.follow_concepts(AutoModel.from_pretrained(checkpoint)), tiny.tiny_processor()
    ask = {"image": tiny.tiny_image(), "instruction": "the ring", "num_ablations": 1, "max_new_tokens": 10}
    expected = explain(model, processor, **ask)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert model.device == torch.device("cpu")
    explanation = explain(model, processor, **ask)
    assert explanation.text == expected.text
    for mask, other in zip(explanation.masks, expected.masks, strict=True):
        shares = [[(concept.feature, concept.contribution) for concept in one.concepts[:3]] for one in (mask, other)]
        assert [feature for feature, _ in shares[0]] == [feature for feature, _ in shares[1]]
        assert dict(shares[0]) == pytest.approx(dict(shares[1]), rel=1e-3)
