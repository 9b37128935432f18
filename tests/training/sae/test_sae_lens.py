"""SAELens' format: files it wrote itself give the same features here, and ours the same there."""

import json

import pytest
import torch
from sae import by_hand, seeded
from safetensors.torch import load_file, save_file

from segcompass_hf.modeling_sae import SegCompassSae
from segcompass_hf.training.sae.sae_lens import load_sae_lens, save_sae_lens

CASES = {
    "standard": {},
    "gated": {"architecture": "gated"},
    "jumprelu": {"architecture": "jumprelu"},
    "topk": {"architecture": "topk", "k": 3},
    "topk-activation": {"activation": "topk", "k": 3},
    "batchtopk": {"architecture": "batchtopk", "k": 3},
}


@pytest.fixture(scope="module")
def sae_lens():
    return pytest.importorskip("sae_lens", reason="the round trip needs the test dependency sae-lens")


def an_sae(name: str, **config) -> SegCompassSae:
    sae = seeded(layer=16, **CASES[name], **config)
    if name == "batchtopk":
        sae.topk_threshold.fill_(0.8)
    return sae


class TestAgainstSaeLens:
    @pytest.mark.parametrize("normalization", ["none", "layer_norm", "per_token"])
    @pytest.mark.parametrize("name", CASES)
    def test_sae_lens_computes_the_same(self, sae_lens, name, normalization, tmp_path):
        sae = an_sae(name, normalize_activations=normalization)
        theirs = sae_lens.SAE.load_from_disk(save_sae_lens(sae, tmp_path, vlm="some/vlm"))
        states = torch.randn(20, 8) * 3 + 1
        normalized = sae.normalize(states)[1]
        acts = sae.encode(states)
        assert 0 < (acts > 0).float().mean() < 1
        torch.testing.assert_close(theirs.encode(states), acts, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(theirs(states), sae.decode(acts, normalized), atol=1e-4, rtol=1e-4)
        assert theirs.cfg.metadata.hook_name == "blocks.15.hook_resid_post"
        assert theirs.cfg.metadata.model_name == "some/vlm"

    @pytest.mark.parametrize("name", CASES)
    def test_there_and_back(self, sae_lens, name, tmp_path):
        sae = an_sae(name, apply_b_dec_to_input=True, finetuning_scaling_factor=True)
        theirs = sae_lens.SAE.load_from_disk(save_sae_lens(sae, tmp_path / "ours"))
        theirs.save_model(tmp_path / "theirs")
        back = load_sae_lens(tmp_path / "theirs")
        states = torch.randn(20, 8)
        torch.testing.assert_close(back.encode(states), sae.encode(states))
        torch.testing.assert_close(back.decode(back.encode(states)), sae.decode(sae.encode(states)))
        assert back.config.layer == 16 and back.config.apply_b_dec_to_input

    @pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "topk"])
    def test_an_sae_made_by_sae_lens(self, sae_lens, architecture, tmp_path):
        from sae_lens.registry import get_sae_class

        sae_class, config_class = get_sae_class(architecture)
        extra = {"k": 4, "rescale_acts_by_decoder_norm": True} if architecture == "topk" else {}
        theirs = sae_class(config_class(d_in=8, d_sae=32, normalize_activations="layer_norm", **extra))
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.5)
        theirs.save_model(tmp_path)
        ours = load_sae_lens(tmp_path, layer=3)
        assert ours.config.architecture == architecture and ours.config.layer == 3
        states = torch.randn(20, 8)
        acts = theirs.encode(states)
        assert 0 < (acts > 0).float().mean() < 1
        torch.testing.assert_close(ours.encode(states), acts, atol=1e-5, rtol=1e-5)
        rebuilt = ours.decode(ours.encode(states), ours.normalize(states)[1])
        torch.testing.assert_close(rebuilt, theirs(states), atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("rescale", [True, False])
    def test_a_batchtopk_sae_in_training(self, sae_lens, rescale, tmp_path):
        from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

        config = BatchTopKTrainingSAEConfig(d_in=8, d_sae=32, k=4, rescale_acts_by_decoder_norm=rescale)
        theirs = BatchTopKTrainingSAE(config)
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.5)
            theirs.topk_threshold.fill_(0.5)
        theirs.save_inference_model(tmp_path / "inference")  # as jumprelu
        theirs.save_model(tmp_path / "training")
        states = torch.randn(20, 8)
        acts = (states - theirs.b_dec) @ theirs.W_enc + theirs.b_enc
        acts = acts * theirs.W_dec.norm(dim=-1) if rescale else acts
        expected = acts * (acts > 0.5)
        assert 0 < (expected > 0).float().mean() < 1
        for folder, architecture in (("inference", "jumprelu"), ("training", "batchtopk")):
            ours = load_sae_lens(tmp_path / folder)
            assert ours.config.architecture == architecture
            torch.testing.assert_close(ours.encode(states), expected, atol=1e-5, rtol=1e-5)


class TestWithoutSaeLens:
    def test_the_files(self, tmp_path):
        save_sae_lens(an_sae("topk", normalize_activations="per_token"), tmp_path)
        settings = json.loads((tmp_path / "cfg.json").read_text())
        assert settings["architecture"] == "topk" and settings["k"] == 3
        assert settings["normalize_activations"] == "constant_norm_rescale"
        assert settings["metadata"]["hook_name"] == "blocks.15.hook_resid_post"
        weights = load_file(tmp_path / "sae_weights.safetensors")
        assert {name: tuple(value.shape) for name, value in weights.items()} == {
            "W_enc": (8, 32),
            "b_enc": (32,),
            "W_dec": (32, 8),
            "b_dec": (8,),
        }

    def test_the_scaling_factor_goes_into_the_decoder(self, tmp_path):
        sae = by_hand(finetuning_scaling_factor=True)
        sae.finetuning_scaling_factor.data = torch.tensor([2.0, 1.0, 3.0])
        weights = load_file(save_sae_lens(sae, tmp_path) / "sae_weights.safetensors")
        # rows (3, 4), (0, 1), (1, 0) times 2, 1, 3
        torch.testing.assert_close(weights["W_dec"], torch.tensor([[6.0, 8.0], [0.0, 1.0], [3.0, 0.0]]))

    def test_a_batchtopk_threshold_keeps_what_reaches_it(self, tmp_path):
        sae = by_hand(architecture="batchtopk", k=1)
        sae.topk_threshold.fill_(2.0)
        back = load_sae_lens(save_sae_lens(sae, tmp_path))
        assert back.config.architecture == "jumprelu"
        # pre-activations 2, 1, 3: the 2 is exactly at the threshold and stays
        torch.testing.assert_close(back.encode(torch.tensor([[2.0, 1.0]])), torch.tensor([[2.0, 0.0, 3.0]]))

    @pytest.mark.parametrize(
        ("hook", "layer"),
        [
            ("blocks.0.hook_resid_pre", 0),
            ("blocks.12.hook_resid_post", 13),
            ("model.language_model.layers.12", 13),
            ("blocks.12.hook_mlp_out", None),
        ],
    )
    def test_files_from_before_version_6(self, hook, layer, tmp_path):
        sae = by_hand()
        save_file(sae.state_dict(), tmp_path / "sae_weights.safetensors")
        settings = {"d_in": 2, "d_sae": 3, "hook_name": hook, "activation_fn_str": "relu"}
        settings |= {"apply_b_dec_to_input": False, "normalize_activations": None}
        (tmp_path / "cfg.json").write_text(json.dumps(settings))
        loaded = load_sae_lens(tmp_path)
        assert loaded.config.layer == layer and loaded.config.architecture == "standard"
        torch.testing.assert_close(loaded.encode(torch.tensor([[2.0, -1.0]])), torch.tensor([[2.0, 0.0, 1.0]]))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"architecture": "temporal"}, "'temporal'.*only standard"),
            ({"normalize_activations": "expected_average_only_in"}, "fold_activation_norm_scaling_factor"),
            ({"reshape_activations": "hook_z"}, "attention heads"),
            ({"architecture": "standard", "activation_fn": "gelu"}, "'gelu'"),
        ],
    )
    def test_what_cannot_be_read_is_refused(self, settings, message, tmp_path):
        (tmp_path / "cfg.json").write_text(json.dumps({"d_in": 2, "d_sae": 3} | settings))
        with pytest.raises(ValueError, match=message):
            load_sae_lens(tmp_path)

    def test_what_cannot_be_written_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="per_modality"):
            save_sae_lens(seeded(normalize_activations="per_modality"), tmp_path)
        with pytest.raises(ValueError, match="tanh-relu"):
            save_sae_lens(seeded(activation="tanh-relu"), tmp_path)

    def test_a_folder_of_something_else(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no cfg.json"):
            load_sae_lens(tmp_path)
