"""Concept words and pairs of Scenes: the loss by hand, which states are paired, and the stages that use them."""

import json
import math

import pytest
import torch

pytest.importorskip("accelerate")

from segcompass_hf.modeling_sae import SegCompassSae  # noqa: E402
from segcompass_hf.training.scenes_batches import ATTRIBUTES, SceneCollator, SceneSamples, patch_labels  # noqa: E402
from segcompass_hf.training.scenes_concepts import ConceptWords, harvest_pairs  # noqa: E402
from segcompass_hf.training.scenes_parts import build_tokenizer, build_vlm  # noqa: E402
from segcompass_hf.training.scenes_recipe import LOG, Stage, run_stage  # noqa: E402
from segcompass_hf.training.scenes_sae import SceneSaeTrainer  # noqa: E402


def test_concept_words_by_hand():
    tokenizer = build_tokenizer()
    red, image = tokenizer.convert_tokens_to_ids(["red", "<image>"])
    words = [tokenizer.convert_tokens_to_ids(list(values)) for values in ATTRIBUTES.values()]
    embeddings = torch.zeros(len(tokenizer), 16)
    for attribute in words:  # 13 words, 13 directions
        for word in attribute:
            embeddings[word, sum(embeddings.any(1)).item()] = 3.0
    states = torch.zeros(1, 66, 16)
    ids = torch.full((1, 66), image)
    ids[0, 64:] = torch.tensor([red, tokenizer.convert_tokens_to_ids("find")])
    states[0, 0, 0], states[0, 1, 6] = 2.0, 5.0  # patch 0 points at red, patch 1 at the first shape
    states[0, 64, 1] = 1.0  # the word red points at the second color
    labels = {name: torch.full((1, 64), -100) for name in ATTRIBUTES} | {"centre": torch.zeros(1, 64).bool()}
    labels["color"][0, :2] = 0  # both patches are red, and patch 0, which counts double, is the centre
    labels["centre"][0, 0] = True
    loss, seen = ConceptWords(tokenizer, scale=2.0)(states, ids, embeddings, labels)
    # Scores times 2: patch 0 (2, 0, ...), patch 1 nothing among six colors; the word has its 2 at the wrong color. No
    # shape and no size is shown or said: they add nothing.
    e = math.exp(2)
    patches = (2 * -math.log(e / (e + 5)) + 1 * math.log(6)) / 3
    word = math.log(e + 5)
    assert loss.item() == pytest.approx(patches + word, rel=1e-5)
    assert seen["color_said"] == 0.0 and seen["color_shown"] >= 0.5


@pytest.fixture(scope="module")
def warmup(tmp_path_factory):
    """A folder with a finished warm-up of random weights."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("recipe")
    build_vlm(build_tokenizer()).save_pretrained(root / "warmup")
    (root / "warmup" / LOG).write_text("")
    return root


def test_pairs_are_words_and_the_patches_that_show_them():
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    vlm = build_vlm(tokenizer).eval()
    block = harvest_pairs(vlm, tokenizer, layer=1, num_scenes=3, seed=5, batch_size=2)
    data = SceneSamples(3, seed=5)
    expected = []
    for index in range(3):
        batch = SceneCollator(tokenizer)([data[index]])
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        states = vlm.base_model(**inputs, output_hidden_states=True).hidden_states[1][0].detach()
        labels, ids = patch_labels(batch["ids"], batch["objects"]), batch["input_ids"][0]
        patches = states[ids == tokenizer.convert_tokens_to_ids("<image>")]
        for attribute, values in ATTRIBUTES.items():
            for number, value in enumerate(values):
                words = states[ids == tokenizer.convert_tokens_to_ids(value)]
                shown = patches[labels[attribute][0] == number]
                if len(words) and len(shown):
                    expected.append((words, shown))
    assert len(block.pairs) == len(expected) > 12
    for (_, words, shown), (expected_words, expected_shown) in zip(block.pairs, expected, strict=True):
        torch.testing.assert_close(words, expected_words, rtol=1e-4, atol=1e-5)  # padding moves the last digits
        torch.testing.assert_close(shown, expected_shown, rtol=1e-4, atol=1e-5)


def test_sae_stage_with_pairs_resumes_exactly(warmup, tmp_path, monkeypatch):
    monkeypatch.setattr("segcompass_hf.training.scenes_recipe.SAE_SCENES", 16)
    options = {"normalize_activations": "per_modality", "d_sae": 64, "pair_loss": "shared_topk", "pair_weight": 0.5}
    stage, saes = Stage(4, 128, 2e-3, 3, options=options), []
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "warmup").symlink_to(warmup / "warmup")

    def killed(trainer, *args, **kwargs):
        if trainer.state.global_step == 2:
            raise KeyboardInterrupt
        return untouched(trainer, *args, **kwargs)

    untouched = SceneSaeTrainer.compute_loss
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SceneSaeTrainer, "compute_loss", killed)
        run_stage("sae", tmp_path / "parts", stage)
    for name in ("whole", "parts"):
        folder = run_stage("sae", tmp_path / name, stage)
        saes.append(SegCompassSae.from_pretrained(folder))
    for name, value in saes[0].state_dict().items():
        assert torch.equal(saes[1].state_dict()[name], value), name
    assert saes[0].modality_mean.any(1).all() and saes[0].W_dec.norm(dim=1).allclose(torch.ones(64))
    log = [json.loads(line) for line in (tmp_path / "whole" / "sae" / LOG).read_text().splitlines()]
    assert any("explained_variance" in entry for entry in log)
