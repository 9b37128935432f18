# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Saving and loading loses nothing: tied, sharded, bf16, through Trainer's resume; damaged folders say so."""

import json
from functools import partial

import pytest
import tiny
import torch
import transformers
from model_inputs import inputs_of
from packaging import version
from transformers import AutoModel, AutoModelForImageTextToText, Trainer, TrainingArguments

import segcompass_hf  # noqa: F401  registers the Auto classes
from segcompass_hf.configuration_segcompass import SegCompassSaeConfig
from segcompass_hf.loading_segcompass import load_part
from segcompass_hf.modeling_sae import SegCompassSae
from segcompass_hf.modeling_segcompass import SegCompassForReasoningSegmentation


def saved_names(folder) -> set[str]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return set(json.loads(index.read_text())["weight_map"])
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def assert_same_weights(model, loaded):
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name]), name


class TestRoundTrip:
    @pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
    def test_weights_outputs_and_generation_config(self, tmp_path, tie):
        model = tiny.tiny_model(tie=tie)
        model.generation_config.max_new_tokens = 77
        model.save_pretrained(tmp_path)
        loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is SegCompassForReasoningSegmentation and not loaded.training
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert_same_weights(model, loaded)
        assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tie
        assert loaded.generation_config.max_new_tokens == 77
        inputs = inputs_of(training=True)
        assert torch.equal(loaded(**inputs).pred_masks, model(**inputs).pred_masks)
        assert torch.equal(loaded(**inputs).loss, model(**inputs).loss)

    def test_names_are_those_in_memory(self, tmp_path):
        model = tiny.tiny_model()
        model.save_pretrained(tmp_path)
        # SAM ties its two positional matrices; one is stored.
        twice = "sam.prompt_encoder.shared_embedding.positional_embedding"
        assert saved_names(tmp_path) == set(model.state_dict()) - {twice}

    def test_shards(self, tmp_path):
        model = tiny.tiny_model()
        model.save_pretrained(tmp_path, max_shard_size="200KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
        assert_same_weights(model, AutoModelForImageTextToText.from_pretrained(tmp_path))

    def test_bf16(self, tmp_path):
        model = tiny.tiny_model()
        model.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
        kept = {name for name, value in loaded.state_dict().items() if value.dtype == torch.float32}
        assert {name.split(".")[-2] for name in kept} == {"shared_image_embedding", "shared_embedding"}
        positions = loaded.sam.shared_image_embedding.positional_embedding
        assert torch.equal(positions, model.sam.shared_image_embedding.positional_embedding)
        loaded.save_pretrained(tmp_path / "again")
        again = AutoModel.from_pretrained(tmp_path / "again")  # in the dtype it was saved in
        assert_same_weights(loaded, again)
        output = again.segment(**inputs_of(), max_new_tokens=12)
        assert output.pred_masks.isfinite().all()

    def test_resized_embeddings(self, tmp_path):
        model = tiny.tiny_model()
        model.resize_token_embeddings(model.config.vocab_size + 3)
        model.save_pretrained(tmp_path)
        assert_same_weights(model, AutoModel.from_pretrained(tmp_path))

    @pytest.mark.parametrize("variant", [None, "fp16"])
    def test_saving_over_another_layout_leaves_no_old_weights(self, tmp_path, variant):
        model = tiny.tiny_model()
        for size in ("50GB", "200KB", "50GB"):
            torch.nn.init.normal_(model.codebook.weight)
            model.save_pretrained(tmp_path, max_shard_size=size, variant=variant)
            assert_same_weights(model, AutoModel.from_pretrained(tmp_path, variant=variant))

    def test_index_beside_a_single_file_is_not_read(self, tmp_path):
        model = tiny.tiny_model()
        model.save_pretrained(tmp_path)
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
        assert_same_weights(model, AutoModel.from_pretrained(tmp_path))

    def test_attention_implementation_reaches_every_part(self, tmp_path):
        tiny.tiny_model().save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path, attn_implementation="eager")
        parts = loaded.vlm.config.text_config, loaded.sam.config
        assert [part._attn_implementation for part in parts] == ["eager", "eager"]

    def test_second_auto_class_in_the_auto_map(self, tmp_path):
        tiny.tiny_model().save_pretrained(tmp_path)
        auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
        name = "modeling_segcompass.SegCompassForReasoningSegmentation"
        assert auto_map["AutoModel"] == auto_map["AutoModelForImageTextToText"] == name


class TestDamagedFolders:
    def test_missing_shard(self, tmp_path):
        tiny.tiny_model().save_pretrained(tmp_path, max_shard_size="200KB")
        shards = sorted(tmp_path.glob("model-*.safetensors"))
        shards[1].unlink()
        with pytest.raises(FileNotFoundError, match=f"lacks 1 of the {len(shards)} weight files.*{shards[1].name}"):
            AutoModel.from_pretrained(tmp_path)

    def test_missing_weights(self, tmp_path):
        tiny.tiny_model().save_pretrained(tmp_path, max_shard_size="200KB")
        index = tmp_path / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        del content["weight_map"]["codebook.weight"]
        index.write_text(json.dumps(content))
        from safetensors.torch import load_file, save_file

        for shard in tmp_path.glob("model-*.safetensors"):
            tensors = load_file(shard)
            tensors.pop("codebook.weight", None)
            save_file(tensors, shard, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="lacks 1 weights of this model .codebook.weight."):
            AutoModel.from_pretrained(tmp_path)

    def test_no_such_folder(self, tmp_path):
        with pytest.raises(OSError, match="nowhere"):
            SegCompassForReasoningSegmentation.from_pretrained(str(tmp_path / "nowhere"))


class TestResume:
    """Trainer loads with `strict=False`: names it does not know would be dropped, and the trained VLM with them."""

    def rows(self):
        inputs = inputs_of(training=True)
        return [{name: value[row] for name, value in inputs.items()} for row in (0, 1)] * 2

    def trainer(self, folder, seed: int, tie: bool) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=4,
            save_steps=2,
            logging_steps=1,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            remove_unused_columns=False,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        model = tiny.tiny_model(seed=seed, tie=tie).freeze_for_training()
        return Trainer(model=model, args=arguments, train_dataset=self.rows(), eval_dataset=self.rows())

    @staticmethod
    def losses(trainer) -> list[float]:
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    @pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
    def test_resume_continues_the_exact_run(self, tmp_path, tie):
        whole = self.trainer(tmp_path, seed=0, tie=tie)
        whole.train()
        # Another random model: whatever the checkpoint does not bring back would show.
        resumed = self.trainer(tmp_path, seed=1, tie=tie)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert len(self.losses(whole)) == 4 and len(set(self.losses(whole))) == 4
        assert self.losses(resumed)[-2:] == self.losses(whole)[-2:]
        assert_same_weights(whole.model, resumed.model)
        assert whole.evaluate()["eval_loss"] == resumed.evaluate()["eval_loss"]

    def test_trained_rows_and_frozen_weights(self, tmp_path):
        trainer = self.trainer(tmp_path, seed=0, tie=False)
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        trainer.train()
        moved = {n for n, value in trainer.model.state_dict().items() if not torch.equal(value, before[n])}
        trains = {n for n, parameter in trainer.model.named_parameters() if parameter.requires_grad}
        assert moved == trains
        config = trainer.model.config
        added = sorted([config.ref_token_id, config.think_start_token_id, config.think_end_token_id])
        head = trainer.model.get_output_embeddings().weight
        assert (head != before["vlm.lm_head.weight"]).any(1).nonzero().flatten().tolist() == added


def with_config(folder, change):
    """The same files with another configuration."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class TestWeightsWithoutAPlace:
    """A configuration that says less than the weights hold loads everywhere, and answers differently."""

    @pytest.mark.parametrize(
        "part, counts, name",
        [
            ("vlm_config.text_config", {"num_hidden_layers": 3}, "vlm.model.language_model.layers.3"),
            ("vlm_config.vision_config", {"num_hidden_layers": 1}, "vlm.model.vision_tower.*layers.1"),
            ("sam_config.vision_config", {"num_hidden_layers": 1}, "sam.vision_encoder.layers.1"),
            ("sam_config.mask_decoder_config", {"num_hidden_layers": 1}, "sam.mask_decoder.transformer.layers.1"),
            ("", {"slot_encoder_layers": 1}, "slot_encoder.layers.1"),
        ],
    )
    def test_fewer_layers(self, tmp_path, part, counts, name):
        tiny.tiny_model().save_pretrained(tmp_path)

        def change(config):
            for key in filter(None, part.split(".")):
                config = config[key]
            assert config[next(iter(counts))] > next(iter(counts.values()))
            config.update(counts)

        with pytest.raises(ValueError, match=rf"holds \d+ weights \({name}.*its configuration has no place"):
            AutoModel.from_pretrained(with_config(tmp_path, change))

    def test_an_sae_of_its_own(self, tmp_path):
        config = SegCompassSaeConfig(d_in=8, d_sae=16, finetuning_scaling_factor=True)
        SegCompassSae(config).save_pretrained(tmp_path)
        assert SegCompassSae.from_pretrained(tmp_path).config.finetuning_scaling_factor
        with_config(tmp_path, lambda content: content.update(finetuning_scaling_factor=False))
        with pytest.raises(ValueError, match=r"holds 1 weights \(finetuning_scaling_factor\)"):
            SegCompassSae.from_pretrained(tmp_path)

    def test_parts_of_a_composition(self, tmp_path):
        model, tokenizer = tiny.tiny_model(), tiny.tiny_processor().tokenizer
        model.vlm.save_pretrained(tmp_path / "vlm")
        model.sam.save_pretrained(tmp_path / "sam")
        compose = partial(SegCompassForReasoningSegmentation.from_pretrained_parts, tokenizer=tokenizer, sae_layer=1)
        assert compose(str(tmp_path / "vlm"), str(tmp_path / "sam")).config.num_slots == 4
        with_config(tmp_path / "sam", lambda config: config["vision_config"].update(num_hidden_layers=1))
        with pytest.raises(ValueError, match="sam holds 14 weights .vision_encoder.layers.1.* does not count"):
            compose(str(tmp_path / "vlm"), str(tmp_path / "sam"))
        with_config(tmp_path / "vlm", lambda config: config["text_config"].update(num_hidden_layers=3))
        with pytest.raises(ValueError, match="vlm holds 9 weights .*language_model.layers.3.* does not count"):
            compose(str(tmp_path / "vlm"), model.sam)

    def test_what_other_users_of_a_vlm_need_is_no_reason_to_refuse_it(self, tmp_path):
        """A head for another task, and the frequencies that old checkpoints hold for every layer."""
        model = tiny.tiny_model()
        model.vlm.save_pretrained(tmp_path)
        add_weights(tmp_path, {"score.weight": torch.ones(2, 2), f"{LAYER}.rotary_emb.inv_freq": torch.ones(8)})
        assert type(load_part(AutoModelForImageTextToText, tmp_path)) is type(model.vlm)

    def test_names_that_are_no_surplus(self, tmp_path):
        """The second name of a tied weight, and buffers that were saved once and are computed today."""
        model = tiny.tiny_model(tie=True)
        model.save_pretrained(tmp_path)
        twice = "sam.prompt_encoder.shared_embedding.positional_embedding"
        weights = {twice: model.state_dict()[twice], "vlm.lm_head.weight": model.vlm.lm_head.weight.detach().clone()}
        frequencies = {f"vlm.{LAYER}.rotary_emb.inv_freq": torch.ones(8)}
        add_weights(tmp_path, {**weights, **frequencies})
        assert_same_weights(model, AutoModel.from_pretrained(tmp_path))
        add_weights(tmp_path, {"codebook.bias": torch.ones(3)})
        with pytest.raises(ValueError, match=r"holds 1 weights \(codebook.bias\)"):
            AutoModel.from_pretrained(tmp_path)

    @pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
    def test_an_adapter_is_neither_surplus_nor_missing(self, tmp_path, capfd, tie):
        """PEFT's rows of tied embeddings have two names and are stored under one."""
        get_peft_model = pytest.importorskip("peft").get_peft_model
        from segcompass_hf.training import lora_config

        model = tiny.tiny_model(tie=tie)
        model.save_pretrained(tmp_path / "base")
        adapted = get_peft_model(AutoModel.from_pretrained(tmp_path / "base"), lora_config(model))
        adapted.save_pretrained(tmp_path / "adapter")
        capfd.readouterr()
        loaded, info = AutoModel.from_pretrained(tmp_path / "adapter", output_loading_info=True)
        assert loaded.peft_config and not info["missing_keys"] and not info["unexpected_keys"]
        assert "MISSING" not in capfd.readouterr().err

    def test_weights_too_many_or_too_few_in_an_adapter_are_said_of_the_adapter(self, tmp_path):
        peft = pytest.importorskip("peft")
        from safetensors.torch import load_file, save_file

        tiny.tiny_model().save_pretrained(tmp_path / "base")
        adapted = peft.get_peft_model(
            AutoModel.from_pretrained(tmp_path / "base"), peft.LoraConfig(r=2, target_modules=["lm_head"])
        )
        adapted.save_pretrained(tmp_path / "adapter")
        file = "adapter_model.safetensors"
        add_weights(tmp_path / "adapter", {"base_model.model.vlm.more.lora_A.weight": torch.ones(2, 2)}, file)
        with pytest.raises(
            ValueError, match=r"the adapter \S*adapter \(on \S*base\) holds 1 weights \(vlm.more.lora_A"
        ):
            AutoModel.from_pretrained(tmp_path / "adapter")
        weights = load_file(tmp_path / "adapter" / file)
        kept = {name: weight for name, weight in weights.items() if "lora_A" not in name}
        save_file(kept, tmp_path / "adapter" / file, metadata={"format": "pt"})
        with pytest.raises(
            ValueError, match=r"the adapter \S*adapter \(on \S*base\) lacks 1 weights .*lm_head.lora_A"
        ):
            AutoModel.from_pretrained(tmp_path / "adapter")


LAYER = "model.language_model.layers.0.self_attn"


def add_weights(folder, weights: dict, name: str = "model.safetensors") -> None:
    from safetensors.torch import load_file, save_file

    file = folder / name
    save_file({**load_file(file), **weights}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("part", ["whole", "vlm", "sam", "sae"])
def test_pointers_that_git_left_in_place_of_weights(tmp_path, part):
    model = tiny.tiny_model()
    (model if part == "whole" else getattr(model, part)).save_pretrained(tmp_path / part)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1234567\n"
    (tmp_path / part / "model.safetensors").write_text(pointer)
    given = {"vlm": model.vlm, "sam": model.sam, "tokenizer": tiny.tiny_processor().tokenizer}
    with pytest.raises(ValueError, match="model.safetensors is no file of weights but a pointer .* `git lfs pull`"):
        if part == "whole":
            AutoModel.from_pretrained(tmp_path / part)
        else:
            SegCompassForReasoningSegmentation.from_pretrained_parts(**{**given, part: str(tmp_path / part)})


OLD = version.parse(transformers.__version__) < version.parse("5.24")


class TestAttention:
    @pytest.mark.parametrize("asked", ["sdpa", "eager", "flex_attention"])
    def test_one_for_the_whole_reaches_every_part_that_can(self, tmp_path, asked):
        """SAM computes no flex attention, and keeps its own; the SAE has none, and nothing to say."""
        if OLD and asked == "flex_attention":
            pytest.skip("transformers 5.17 refuses what one part cannot do, on loading")
        tiny.tiny_model().save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path, attn_implementation=asked)
        changed = tiny.tiny_model()
        changed.set_attn_implementation(asked)
        for model in (loaded, changed):
            parts = model.config, model.vlm.config.text_config, model.vlm.config.vision_config
            assert {part._attn_implementation for part in parts} == {asked}
            sam = "sdpa" if asked == "flex_attention" else asked
            assert {model.sam.config._attn_implementation, model.sam.config.vision_config._attn_implementation} == {
                sam
            }

    @pytest.mark.skipif(OLD, reason="transformers 5.17 does not hand an implementation on to nested configurations")
    def test_one_for_a_part(self, tmp_path):
        tiny.tiny_model().save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path, attn_implementation={"vlm_config": "eager"})
        loaded.set_attn_implementation({"sam_config": "eager"})
        configs = loaded.vlm.config.text_config, loaded.sam.config, loaded.config
        assert [config._attn_implementation for config in configs] == ["eager", "eager", "sdpa"]

    def test_what_nobody_knows_is_refused(self, tmp_path):
        tiny.tiny_model().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="nonsense"):
            AutoModel.from_pretrained(tmp_path, attn_implementation="nonsense")

    def test_answers_are_the_same(self):
        model = tiny.tiny_model()
        expected = model(**inputs_of()).pred_masks
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(**inputs_of()).pred_masks, expected, rtol=1e-3, atol=1e-4)
