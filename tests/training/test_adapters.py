# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""LoRA adapters: what they reach, what trains, and that merging, saving and reloading change nothing."""

import json
import logging
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import tiny
import torch
from adapters import cast_as_trl_does, largest_difference, move, outputs_of, trainable
from model_inputs import inputs_of
from packaging.version import parse
from peft import AutoPeftModel, IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel
from transformers.integrations.peft import MIN_PEFT_VERSION

import segcompass_hf  # noqa: F401  registers the Auto classes
from segcompass_hf.modeling_segcompass import SegCompassForReasoningSegmentation
from segcompass_hf.training.adapters import (
    check_peft_config,
    head_modules,
    load_adapter,
    lora_config,
    restore_head_precision,
)

LAYERS = "vlm.model.language_model.layers"
HEADS = ("codebook", "slot_encoder", "slot_mapper", "sam")
GENERATION_INPUTS = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids")


def wrapped(family: str = "llava", tie: bool = False, **kwargs) -> PeftModel:
    model = tiny.tiny_model(family, tie=tie)
    torch.manual_seed(0)  # LoRA starts at random
    return get_peft_model(model, lora_config(model, r=4, dropout=0.0, **kwargs)).eval()


class TestLoraConfig:
    @pytest.mark.parametrize("family", tiny.FAMILIES)
    def test_reaches_decoder_layers_from_the_sae_on(self, family):
        model = wrapped(family)
        adapted = {
            name.removeprefix("base_model.model.").split(".lora_A")[0] for name in trainable(model) if "lora_A" in name
        }
        attention = {f"self_attn.{x}_proj" for x in "qkvo"}
        linear = attention | {f"mlp.{x}_proj" for x in ("gate", "up", "down")}
        assert adapted == {f"{LAYERS}.{layer}.{name}" for layer in (2, 3) for name in linear}

    @pytest.mark.parametrize("segmenter", ["sam", "sam2"])
    def test_heads_are_those_of_freeze_for_training(self, segmenter):
        model, fresh = (tiny.tiny_model(sam_config=tiny.tiny_segmenter_config(segmenter)) for _ in range(2))
        model.freeze_for_training("none")
        expected = {name for name, p in model.named_parameters() if p.requires_grad and name.startswith(HEADS)}
        names = [
            f"{head}.{name}"
            for head in head_modules(model)
            for name, _ in model.get_submodule(head).named_parameters()
        ]
        assert len(names) == len(set(names)) and set(names) == expected
        copied = trainable(get_peft_model(fresh, lora_config(fresh, r=4)))
        copied = {name.removeprefix("base_model.model.").replace(".modules_to_save.default", "") for name in copied}
        assert {name for name in copied if name.startswith(HEADS)} == expected

    def test_disabling_and_enabling_does_not_unfreeze_what_gets_no_gradient(self):
        model = wrapped()
        before = set(trainable(model))
        with model.disable_adapter():
            assert not any(name.startswith("base_model.model.sam") for name in trainable(model))
        assert set(trainable(model)) == before

    @pytest.mark.parametrize(
        "tie, rows, expected",
        [
            (False, "head", {"vlm.lm_head"}),
            (False, "both", {"vlm.lm_head", "vlm.model.language_model.embed_tokens"}),
            (False, "none", set()),
            (True, "head", {"vlm.model.language_model.embed_tokens"}),  # the head follows
            (True, "both", {"vlm.model.language_model.embed_tokens"}),
        ],
    )
    def test_token_rows(self, tie, rows, expected):
        model = tiny.tiny_model(tie=tie)
        chosen = lora_config(model, train_token_rows=rows).trainable_token_indices or {}
        config = model.config
        ids = sorted([config.ref_token_id, config.think_start_token_id, config.think_end_token_id])
        assert chosen == dict.fromkeys(expected, ids)

    def test_frozen_heads_and_further_fields(self):
        config = lora_config(tiny.tiny_model(), heads="none", train_token_rows="none", use_dora=True)
        assert not config.modules_to_save and config.trainable_token_indices is None and config.use_dora

    def test_wrong_arguments(self):
        model = tiny.tiny_model()
        with pytest.raises(ValueError, match="from 2 on, of 4; of these none .*fc9.*LlavaForConditionalGeneration"):
            lora_config(model, targets=("fc9",))
        with pytest.raises(ValueError, match='"full" or "none", got \'lora\''):
            lora_config(model, heads="lora")
        model.config.sae_layer = 4
        with pytest.raises(ValueError, match="from 4 on, of 4"):
            lora_config(model)


class TestCheckPeftConfig:
    def refused(self, config, family: str = "llava") -> str:
        with pytest.raises(ValueError) as error:
            check_peft_config(tiny.tiny_model(family), config)
        return str(error.value)

    @pytest.mark.parametrize("family", tiny.FAMILIES)
    def test_ours_passes(self, family, caplog):
        model = tiny.tiny_model(family)
        for rows in ("head", "both", "none"):
            check_peft_config(model, lora_config(model, train_token_rows=rows))
        assert not caplog.records
        assert model.state_dict().keys() == tiny.tiny_model(family).state_dict().keys()

    def test_names_alone_reach_below_the_sae(self):
        message = self.refused(LoraConfig(target_modules=["q_proj", "v_proj"]))
        # Two layers of the decoder and two of CLIP, two modules each.
        assert "reaches 8 modules" in message and "vision_tower.encoder.layers.0" in message and "layer 2" in message

    def test_layers_to_transform(self):
        def of(layers):
            names = ["q_proj"]
            return LoraConfig(target_modules=names, layers_to_transform=layers, layers_pattern="language_model.layers")

        assert f"reaches 1 modules that decide what the frozen SAE reads at layer 2: {LAYERS}.1" in self.refused(
            of([1, 2])
        )
        check_peft_config(tiny.tiny_model(), of([2, 3]))

    @pytest.mark.parametrize(
        "config, named",
        [
            (LoraConfig(target_modules="all-linear"), "vlm.model"),
            (LoraConfig(target_modules=rf"{LAYERS}\.3\..*q_proj", modules_to_save=["embed_tokens"]), "embed_tokens"),
            (LoraConfig(target_modules=rf"{LAYERS}\.3\..*q_proj", modules_to_save=["sae"]), "sae"),
            (
                LoraConfig(target_modules=rf"{LAYERS}\.3\..*q_proj", modules_to_save=["language_model"]),
                "language_model",
            ),
            (LoraConfig(target_modules=r".*projector\.linear_1"), "multi_modal_projector.linear_1"),
            (LoraConfig(target_modules=rf"{LAYERS}\.3\..*q_proj", target_parameters=["sae.W_enc"]), "sae.W_enc"),
            (LoraConfig(target_modules=rf"{LAYERS}\.3\..*q_proj", trainable_token_indices=[5]), "embed_tokens"),
            (IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), f"{LAYERS}.0"),
        ],
    )
    def test_refused(self, config, named):
        message = self.refused(config)
        assert "what the frozen SAE reads" in message and named in message

    def test_unused_parts_of_sam(self):
        config = LoraConfig(target_modules=rf"{LAYERS}\.3\..*q_proj", modules_to_save=["sam.mask_decoder"])
        assert "sam.mask_decoder, parts of which mask prompts never use" in self.refused(config)

    def test_prompt_learning(self):
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        assert "virtual tokens" in self.refused(config)

    def test_frozen_heads_are_mentioned(self, caplog):
        logging.getLogger("transformers").propagate = True
        logging.getLogger("segcompass_hf").propagate = True
        check_peft_config(
            tiny.tiny_model(), LoraConfig(target_modules=rf"{LAYERS}\.3\..*q_proj", modules_to_save=["codebook"])
        )
        assert "leaves heads frozen (sam, slot_encoder, slot_mapper)" in caplog.text


class TestWrapped:
    @pytest.mark.parametrize("family, tie", [*((family, False) for family in tiny.FAMILIES), ("gemma3", True)])
    def test_adapter_starts_as_nothing_and_can_be_disabled_and_merged(self, family, tie):
        expected = outputs_of(tiny.tiny_model(family, tie=tie), family)
        model = wrapped(family, tie)
        assert largest_difference(outputs_of(model, family), expected) < 2e-6
        moved = outputs_of(move(model), family)
        assert all((a - b).abs().max() > 1e-4 for a, b in zip(moved, expected, strict=True))  # heads and LM alike
        with model.disable_adapter():
            assert largest_difference(outputs_of(model, family), expected) == 0
        assert largest_difference(outputs_of(model, family), moved) == 0
        merged = model.merge_and_unload()
        assert type(merged) is SegCompassForReasoningSegmentation
        assert merged.state_dict().keys() == tiny.tiny_model(family, tie=tie).state_dict().keys()
        assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tie
        assert largest_difference(outputs_of(merged, family), moved) < 1e-5

    @pytest.mark.parametrize("family", tiny.FAMILIES)
    def test_generate_and_segment(self, family):
        inputs = inputs_of(family)
        text = {name: value for name, value in inputs.items() if name in GENERATION_INPUTS}
        model = tiny.tiny_model(family)
        expected, written = model.segment(**inputs, max_new_tokens=12), model.generate(**text, max_new_tokens=3)
        model = wrapped(family)
        got = model.segment(**inputs, max_new_tokens=12)
        assert torch.equal(got.sequences, expected.sequences)
        torch.testing.assert_close(got.pred_masks, expected.pred_masks, atol=1e-5, rtol=0)
        assert torch.equal(model.generate(**text, max_new_tokens=3), written)

    @pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
    def test_gradients_reach_what_trains_and_nothing_else(self, tie):
        model = move(wrapped(tie=tie)).train()
        before = {name: value.clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}
        model(**inputs_of(training=True)).loss.backward()
        # The softmax of attention does not feel a bias that all keys share.
        moving = {name: p for name, p in trainable(model).items() if not name.endswith("k_proj.bias")}
        assert all(p.grad is not None and p.grad.any() for p in moving.values())
        torch.optim.SGD(trainable(model).values(), lr=0.1).step()
        after = [*model.named_parameters(), *model.named_buffers()]
        changed = {name for name, value in after if not torch.equal(value, before[name])}
        assert changed <= set(trainable(model)) and len(changed) > 0.9 * len(moving)  # some steps round to nothing

    def test_every_weight_gets_a_gradient_without_objects_too(self):
        """DistributedDataParallel waits for all of them, whatever is in the batch."""
        model = wrapped().train()
        none = [tiny.tiny_mask(0, (40, 30))]
        inputs = tiny.tiny_processor()(
            images=[tiny.tiny_image()], instruction=["nothing"], reasoning=["none"], masks=none, return_tensors="pt"
        )
        assert inputs["num_objects"].tolist() == [0]
        model(**inputs).loss.backward()
        assert not [name for name, parameter in trainable(model).items() if parameter.grad is None]

    def test_steps_of_training_lower_the_loss(self):
        model = wrapped().train()
        inputs = inputs_of(training=True)
        optimizer = torch.optim.AdamW(model.parameter_groups(3e-3, weight_decay=0.1))
        losses = []
        for _ in range(6):
            losses.append(model(**inputs).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < 0.9 * losses[0]

    def test_parameter_groups(self):
        model = wrapped()
        groups = model.parameter_groups(1.0, weight_decay=0.1, factors={"slot_mapper": 0.5, "vlm": 0.1})
        found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
        names = {name: found.pop(id(p)) for name, p in trainable(model).items()}
        assert not found
        for name, (rate, decay) in names.items():
            part = name.removeprefix("base_model.model.").split(".")[0]
            assert rate == {"slot_mapper": 0.5, "vlm": 0.1}.get(part, 1.0), name
            if "trainable_tokens" in name:
                assert decay == 0.0  # whole rows, not differences: decay would shrink them
            if "lora_" in name:
                assert decay == 0.1

    def test_second_adapter_as_trl_makes_one_for_its_reference(self):
        from trl.trainer.utils import use_adapter

        model = wrapped()
        model.add_adapter("ref", model.peft_config["default"])
        before, trains = outputs_of(model), set(trainable(model))
        assert trains == set(trainable(wrapped()))
        after = outputs_of(move(model))
        with use_adapter(model, "ref"):
            assert largest_difference(outputs_of(model), before) == 0
        assert set(trainable(model)) == trains and largest_difference(outputs_of(model), after) == 0

    def test_freezing_is_peft_s_own_business(self):
        with pytest.raises(ValueError, match="an adapter is attached"):
            wrapped().freeze_for_training()
        merged = wrapped().merge_and_unload()
        assert merged.freeze_for_training() is merged

    def test_fused_head_of_trl_reads_the_trained_rows(self):
        from trl.trainer.utils import add_fused_lm_head

        model = tiny.tiny_model()
        add_fused_lm_head(model)
        peft_model = move(get_peft_model(model, lora_config(model, r=4, dropout=0.0)).eval())
        inputs = inputs_of(training=True)
        text = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        with torch.no_grad():
            fused = peft_model(**text, labels=text["input_ids"], fused_lm_head=True).log_probs
            scores = model.vlm(**text).logits[:, :-1].log_softmax(-1)
        expected = scores.gather(-1, text["input_ids"][:, 1:, None]).squeeze(-1)
        written = inputs["labels"][:, 1:] != -100
        assert (text["input_ids"][:, 1:][written] == model.config.ref_token_id).sum() == 8
        torch.testing.assert_close(fused[written], expected[written], atol=1e-4, rtol=0)


class TestSaveAndReload:
    @pytest.fixture(scope="class")
    def folders(self, tmp_path_factory):
        """A base, an adapter trained on it, and what both say together."""
        base, adapter = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
        tiny.tiny_model().save_pretrained(base)
        model = SegCompassForReasoningSegmentation.from_pretrained(base)
        model = move(get_peft_model(model, lora_config(model, r=4, dropout=0.0)).eval())
        model.save_pretrained(adapter)
        return base, adapter, outputs_of(model)

    def test_the_folder_holds_the_adapter_only(self, folders):
        base, adapter, _ = folders
        assert {file.name for file in adapter.iterdir()} == {
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        tensors = load_file(adapter / "adapter_model.safetensors")
        model = tiny.tiny_model()
        # By hand: 2 layers; rank 4 on four 32x32 and three 32x64; the heads; 3 rows of 32.
        lora = 2 * 4 * (4 * (32 + 32) + 3 * (32 + 64))
        heads = sum(model.get_submodule(name).get_parameter(key).numel() for name in head_modules(model)
                    for key, _ in model.get_submodule(name).named_parameters())  # fmt: skip
        assert sum(tensor.numel() for tensor in tensors.values()) == lora + heads + 3 * 32
        assert not any("lm_head.weight" in name or "embed_tokens" in name or "sae" in name for name in tensors)
        size = (adapter / "adapter_model.safetensors").stat().st_size
        assert 4 * (lora + heads) < size < 4 * (lora + heads) + 40_000
        assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)

    def test_peft_loads_it(self, folders):
        base, adapter, expected = folders
        model = PeftModel.from_pretrained(SegCompassForReasoningSegmentation.from_pretrained(base), adapter)
        assert largest_difference(outputs_of(model), expected) == 0
        assert not trainable(model)

    @pytest.mark.parametrize("given", ["nothing", "folder", "model"])
    def test_load_adapter(self, folders, given):
        base, adapter, expected = folders
        chosen = {"nothing": None, "folder": base, "model": SegCompassForReasoningSegmentation.from_pretrained(base)}[
            given
        ]
        model = load_adapter(chosen, adapter)
        assert isinstance(model, PeftModel) and largest_difference(outputs_of(model), expected) == 0

    def test_load_adapter_to_go_on(self, folders):
        model = load_adapter(None, folders[1], is_trainable=True)
        assert set(trainable(model)) == set(trainable(wrapped()))

    def test_merged_saved_and_reloaded(self, folders, tmp_path):
        base, adapter, expected = folders
        load_adapter(base, adapter).merge_and_unload().save_pretrained(tmp_path)
        assert largest_difference(outputs_of(AutoModel.from_pretrained(tmp_path)), expected) < 1e-5

    def test_auto_model_loads_base_and_adapter_from_the_adapters_folder(self, folders, tmp_path):
        _, adapter, expected = folders
        model = AutoModel.from_pretrained(adapter)
        assert type(model) is SegCompassForReasoningSegmentation
        assert largest_difference(outputs_of(model), expected) == 0
        if parse(version("peft")) < parse(MIN_PEFT_VERSION):  # transformers 5.24 asks for a PEFT that is not out yet
            with pytest.raises(ValueError, match="PEFT"):
                model.save_pretrained(tmp_path)
            assert not list(tmp_path.glob("*.safetensors"))
            pytest.skip(f"this transformers saves adapters with PEFT {MIN_PEFT_VERSION} or newer only")
        model.save_pretrained(tmp_path)
        assert (tmp_path / "adapter_model.safetensors").is_file() and not (tmp_path / "model.safetensors").exists()
        assert largest_difference(outputs_of(AutoModel.from_pretrained(tmp_path)), expected) == 0

    def test_auto_peft_model(self, folders):
        model = AutoPeftModel.from_pretrained(folders[1], import_allowlist=["segcompass_hf.modeling_segcompass"])
        assert largest_difference(outputs_of(model), folders[2]) == 0

    def test_tied_embeddings(self, tmp_path):
        tiny.tiny_model("gemma3", tie=True).save_pretrained(tmp_path / "base")
        model = SegCompassForReasoningSegmentation.from_pretrained(tmp_path / "base")
        model = move(get_peft_model(model, lora_config(model, r=4)).eval())
        expected = outputs_of(model, "gemma3")
        model.save_pretrained(tmp_path / "adapter")
        loaded = load_adapter(None, tmp_path / "adapter")
        assert largest_difference(outputs_of(loaded, "gemma3"), expected) == 0
        assert largest_difference(outputs_of(AutoModel.from_pretrained(tmp_path / "adapter"), "gemma3"), expected) == 0
        loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = AutoModel.from_pretrained(tmp_path / "merged")
        assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
        assert largest_difference(outputs_of(merged, "gemma3"), expected) < 1e-5

    def test_pushes_the_adapter_only(self, folders, monkeypatch):
        from huggingface_hub import HfApi, ModelCard
        from transformers.utils import hub

        pushed = {}

        def create_commit(self, repo_id, operations, **kwargs):
            pushed[repo_id] = sorted(operation.path_in_repo for operation in operations)

        monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **kwargs: SimpleNamespace(repo_id=repo_id))
        monkeypatch.setattr(HfApi, "create_commit", create_commit)
        monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: ModelCard("An adapter."))
        load_adapter(*folders[:2]).push_to_hub("someone/an-adapter")
        assert pushed == {"someone/an-adapter": ["README.md", "adapter_config.json", "adapter_model.safetensors"]}

    def test_adapter_of_another_layer_is_refused(self, folders):
        model = SegCompassForReasoningSegmentation.from_pretrained(folders[0])
        model.config.sae_layer = 3
        with pytest.raises(ValueError, match="reaches 7 modules that decide what the frozen SAE reads at layer 3"):
            load_adapter(model, folders[1])

    def test_base_that_was_never_saved(self, tmp_path):
        wrapped().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="pass it as base"):
            load_adapter(None, tmp_path)
        with pytest.raises(ValueError, match="dtype would load the base, which is loaded already"):
            load_adapter(tiny.tiny_model(), tmp_path, dtype=torch.float32)


class TestPrecision:
    def test_heads_in_bf16_beside_frozen_parts_in_fp32(self):
        expected = outputs_of(wrapped())
        model = cast_as_trl_does(wrapped())
        for got, value in zip(outputs_of(model), expected, strict=True):
            assert (got.float() - value).abs().max() < 0.05 * value.abs().max()
        assert model.segment(**inputs_of(), max_new_tokens=12).pred_masks.isfinite().all()
        model.train()(**inputs_of(training=True)).loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable(model).values())

    def test_restored_heads_are_those_of_the_base(self):
        model = wrapped()
        expected, kept = outputs_of(model), {name: id(p) for name, p in trainable(model).items()}
        assert restore_head_precision(cast_as_trl_does(model)) is model
        assert largest_difference(outputs_of(model), expected) == 0  # LoRA adds nothing yet
        for name, parameter in trainable(model).items():
            assert parameter.dtype == (torch.bfloat16 if "lora_" in name else torch.float32), name
            assert id(parameter) == kept[name]  # an optimizer made before would still hold it

    def test_trained_heads_keep_what_they_learned(self):
        model = cast_as_trl_does(move(wrapped()))
        rounded = {name: p.float() for name, p in trainable(model).items()}
        restore_head_precision(model)
        assert all(torch.equal(p.float(), rounded[name]) for name, p in trainable(model).items())
