# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Saving and loading loses nothing: tied, sharded, bf16, through Trainer's resume; damaged folders say so."""

import json

import pytest
import tiny
import torch
from model_inputs import inputs_of
from transformers import AutoModel, AutoModelForImageTextToText, Trainer, TrainingArguments

import segcompass_hf  # noqa: F401  registers the Auto classes
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
