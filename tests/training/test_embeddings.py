# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""`embedding_cache_dir`: SAM's image encoder runs once per image, and losses stay what they are."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, Image
from grpo import tiny_rows, tiny_trainer
from supervised import arguments
from tiny import tiny_model, tiny_processor

from segcompass_hf.data.embedding_cache import EmbeddingCache
from segcompass_hf.training.embeddings import DifferentImages, open_embedding_cache
from segcompass_hf.training.segmentation.config import SegmentationConfig
from segcompass_hf.training.segmentation.trainer import SegmentationTrainer


@pytest.fixture
def encoded(monkeypatch):
    """Images that went through the encoder of any model, one entry per call."""
    calls, encode = [], type(tiny_model()).encode_image

    def counting(self, pixels):
        calls.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(type(tiny_model()), "encode_image", counting)
    return calls


def sentences():
    """Six rows about four images: the first two are asked about twice."""
    rows = tiny_rows((1, 0, 2, 1))
    again = [{**rows[index], "sample_id": f"again-{index}", "instruction": "the other one"} for index in (0, 1)]
    return Dataset.from_list([*rows, *again], features=rows.features)


def segmentation_run(folder, cache=None, **settings):
    """Losses of two epochs with an evaluation after each."""
    settings = {"num_eval_segmentations": 2, "eval_max_new_tokens": 8, "eval_strategy": "epoch"} | settings
    settings |= {"max_steps": -1, "num_train_epochs": 2, "learning_rate": 1e-5, "embedding_cache_dir": cache}
    trainer = SegmentationTrainer(
        model=tiny_model(),
        args=arguments(SegmentationConfig, folder, per_device_train_batch_size=2, **settings),
        train_dataset=sentences(),
        eval_dataset=tiny_rows((1, 1)),
        processing_class=tiny_processor(),
    )
    trainer.train()
    return curve(trainer)


def curve(trainer):
    kept = ("loss", "eval_loss", "eval_gIoU", "segmentation/loss", "reward")
    return [{name: entry[name] for name in kept if name in entry} for entry in trainer.state.log_history]


class TestSegmentation:
    def test_every_image_once_and_the_same_losses(self, tmp_path, encoded):
        plain = segmentation_run(tmp_path / "plain")
        # Epochs x (rows, evaluated rows, segmented rows); an image asked about twice is one where both rows meet.
        assert 2 * (4 + 2 + 2) <= sum(encoded) <= 2 * (6 + 2 + 2)
        encoded.clear()
        cached = segmentation_run(tmp_path / "cached", str(tmp_path / "cache"))
        assert sum(encoded) == 4  # the images of evaluation are those of training
        assert len(plain) == len(cached) and any("eval_gIoU" in entry for entry in plain)
        for expected, got in zip(plain, cached, strict=True):
            assert got == pytest.approx(expected, rel=1e-5, abs=1e-6)
        encoded.clear()
        assert segmentation_run(tmp_path / "again", str(tmp_path / "cache")) == cached  # bit for bit
        assert encoded == []

    def test_workers_read(self, tmp_path, encoded):
        expected = segmentation_run(tmp_path / "plain", str(tmp_path / "cache"))
        encoded.clear()
        got = segmentation_run(tmp_path / "workers", str(tmp_path / "cache"), dataloader_num_workers=1)
        assert encoded == [] and got == expected

    def test_workers_hand_over_what_the_cache_lacks(self, tmp_path, encoded, monkeypatch):
        monkeypatch.setattr(EmbeddingCache, "fill", lambda *args: 0)
        got = segmentation_run(tmp_path / "workers", str(tmp_path / "cache"), dataloader_num_workers=1)
        assert len(encoded) >= 2 * 3  # the model encodes every batch, as without a cache
        monkeypatch.undo()
        for expected, entry in zip(segmentation_run(tmp_path / "plain"), got, strict=True):
            assert entry == pytest.approx(expected, rel=1e-5, abs=1e-6)

    def test_half_precision_is_kept_in_half_precision(self, tmp_path):
        segmentation_run(tmp_path / "a", str(tmp_path / "cache"), bf16=True)
        files = list((tmp_path / "cache").rglob("encoder.json"))
        assert len(files) == 2, "of the segmenter's encoder and of the VLM's"
        assert sum('"stored": "bfloat16"' in file.read_text() for file in files) == 1, "the VLM's as they come"

    def test_a_collator_that_does_not_read_it(self, tmp_path):
        with pytest.raises(ValueError, match="data_collator is a function; use a SegmentationCollator"):
            SegmentationTrainer(
                model=tiny_model(),
                args=arguments(SegmentationConfig, tmp_path, embedding_cache_dir=str(tmp_path / "cache")),
                train_dataset=tiny_rows(),
                processing_class=tiny_processor(),
                data_collator=lambda rows: rows,
            )


class TestGrpo:
    def test_every_image_once_and_the_same_rewards(self, tmp_path, encoded):
        runs = []
        for cache in (None, str(tmp_path / "cache"), str(tmp_path / "cache")):
            encoded.clear()
            torch.manual_seed(0)
            trainer = tiny_trainer(tmp_path / "out", max_steps=4, embedding_cache_dir=cache)
            trainer.train()
            runs.append((sum(encoded), curve(trainer)))
        (num_plain, plain), (num_cached, cached), (num_again, again) = runs
        assert num_plain == 4 * 2 and num_cached == 4 and num_again == 0  # steps x prompts; images; none
        assert any("reward" in entry for entry in plain) and cached == again
        for expected, got in zip(plain, cached, strict=True):
            assert got == pytest.approx(expected, rel=1e-5, abs=1e-6)


class TestOpening:
    def trainer(self, folder, rows=None, **changes):
        accelerator = SimpleNamespace(
            process_index=0, num_processes=1, is_main_process=True, device="cpu", wait_for_everyone=lambda: None
        )
        args = SimpleNamespace(embedding_cache_dir=folder, bf16=False, fp16=False, dataloader_num_workers=0)
        settings = {
            "train_dataset": rows,
            "eval_dataset": None,
            "is_fsdp_enabled": False,
            "is_deepspeed_enabled": False,
        }
        return SimpleNamespace(args=args, accelerator=accelerator, **(settings | changes))

    def test_off_by_default(self):
        assert SegmentationConfig.embedding_cache_dir is None
        assert open_embedding_cache(self.trainer(None), None, None) is None

    def test_an_encoder_that_trains(self, tmp_path):
        model = tiny_model()
        model.sam.vision_encoder.requires_grad_(True)
        with pytest.raises(ValueError, match="SAM's image encoder is to train"):
            open_embedding_cache(self.trainer(tmp_path), model, tiny_processor())

    def test_two_processes_share_the_images(self, tmp_path, encoded):
        model = tiny_model()
        model.freeze_for_training()
        for index in (0, 1):
            trainer = self.trainer(tmp_path, sentences(), eval_dataset={"a": tiny_rows((1, 1))})
            trainer.accelerator.process_index, trainer.accelerator.num_processes = index, 2
            open_embedding_cache(trainer, model, tiny_processor())
        assert sum(encoded) == 4

    def test_where_weights_are_shared_all_read(self, tmp_path, encoded):
        model = tiny_model()
        model.freeze_for_training()
        cache = open_embedding_cache(
            self.trainer(tmp_path, sentences(), is_fsdp_enabled=True), model, tiny_processor()
        )
        assert sum(encoded) == 4 and cache.model is None
        image = sentences()[0]["image"]
        assert set(cache.sam_inputs([image])) >= {"image_embeddings", "original_sizes"}
        assert "sam_pixel_values" in cache.sam_inputs([image.rotate(90)])

    def test_one_image_per_id_without_broken_ones(self):
        rows = sentences()
        encoded = rows.cast_column("image", Image(decode=False))
        broken = Dataset.from_list(
            [{**row, "image": {"bytes": b"no image", "path": None}} if index == 1 else row
             for index, row in enumerate(encoded)],
            features=rows.features,
        )  # fmt: skip
        images = DifferentImages(broken)
        assert images.indices == [0, 1, 2, 3] and len(images) == 4 and len(list(images)) == 3
        assert len(DifferentImages([{"image": 1}, {"image": 2}])) == 2  # rows that do not say whose they are
