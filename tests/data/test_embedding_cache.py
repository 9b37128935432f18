"""SAM embeddings on disk: the encoder's numbers, never another encoder's, whatever happens to processes and files."""

import copy
import multiprocessing
import os
import pickle
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from supervised import arguments, tiny_row
from tiny import tiny_image, tiny_model, tiny_processor
from torch.utils.data import DataLoader

from segcompass_hf.data.collator import SegmentationCollator
from segcompass_hf.data.embedding_cache import CacheSize, EmbeddingCache, image_key
from segcompass_hf.training.segmentation.config import SegmentationConfig
from segcompass_hf.training.segmentation.trainer import SegmentationTrainer

IMAGES = [tiny_image(index, size=(40, 30 + index)) for index in range(5)]
BYTES = 32 * 8 * 8 * 2  # one embedding of the tiny SAM in float16


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture
def encoded(monkeypatch, model):
    """How many images went through the encoder, one entry per call."""
    calls, encode = [], type(model).encode_image

    def counting(self, pixels):
        calls.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(type(model), "encode_image", counting)
    return calls


def uncached(model, processor, images):
    with torch.no_grad():
        return model.encode_image(processor._sam_inputs(images)["sam_pixel_values"])


def shard_files(cache):
    return sorted(path for path in cache.shards.folder.iterdir() if path.name.startswith("shard-"))


# Values


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 1e-3), ("bfloat16", 1e-2)])
def test_values_are_those_of_the_encoder(tmp_path, model, processor, dtype, tolerance):
    expected = uncached(model, processor, IMAGES)
    assert expected.abs().max() > 0.5
    with EmbeddingCache(tmp_path, model, processor, dtype=dtype, batch_size=2) as cache:
        fresh = cache.get(IMAGES)
    again = EmbeddingCache(tmp_path, model, processor, dtype=dtype)
    assert len(again) == 5
    for embeddings in (fresh, again.get(IMAGES)):
        assert embeddings.dtype == getattr(torch, dtype)
        torch.testing.assert_close(embeddings.float(), expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(fresh, again.get(IMAGES)) and torch.equal(again.get(IMAGES[3:1:-1]), fresh[[3, 2]])


def test_an_image_is_encoded_once_whatever_its_form(tmp_path, model, processor, encoded):
    IMAGES[0].save(tmp_path / "image.png")
    cache = EmbeddingCache(tmp_path / "cache", model, processor, batch_size=2)
    forms = [IMAGES[0], np.asarray(IMAGES[0]), str(tmp_path / "image.png"), IMAGES[1], IMAGES[2]]
    embeddings = cache.get(forms)
    assert (
        encoded == [2, 1] and torch.equal(embeddings[0], embeddings[1]) and torch.equal(embeddings[0], embeddings[2])
    )
    cache.flush()
    EmbeddingCache(tmp_path / "cache", model, processor).get(IMAGES[:3])
    assert encoded == [2, 1]


def test_pixels_and_shape_make_the_key_of_an_image():
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    wide, tall = Image.fromarray(pixels), Image.fromarray(pixels.reshape(4, 2, 3))
    assert wide.tobytes() == tall.tobytes() and image_key(wide) != image_key(tall)
    assert image_key(wide) == image_key(Image.fromarray(pixels.copy()))
    pixels[1, 2, 0] += 1
    assert image_key(wide) != image_key(Image.fromarray(pixels))


def test_what_cannot_be_held_is_refused(tmp_path, model, processor):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.sam.vision_encoder.neck.layer_norm2.weight.fill_(1e6)
    with pytest.raises(ValueError, match="NaN or infinity in float16"):
        EmbeddingCache(tmp_path, broken, processor).get(IMAGES[:1])
    assert EmbeddingCache(tmp_path, broken, processor, dtype="float32").get(IMAGES[:1]).isfinite().all()
    with pytest.raises(ValueError, match="dtype='int8' is not known"):
        EmbeddingCache(tmp_path, model, processor, dtype="int8")


# Keys


def test_a_reloaded_encoder_hits(tmp_path, model, processor, encoded):
    EmbeddingCache(tmp_path / "cache", model, processor).fill(IMAGES)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    twin = type(model).from_pretrained(tmp_path / "model")
    cache = EmbeddingCache(tmp_path / "cache", twin, type(processor).from_pretrained(tmp_path / "model"))
    before = list(encoded)
    cache.get(IMAGES)
    assert encoded == before and len(cache) == 5


def change_weight(model, processor):
    with torch.no_grad():
        model.sam.vision_encoder.layers[0].mlp.lin1.weight[0, 0] += 1e-3


def swap_two_weights(model, processor):
    weight = model.sam.vision_encoder.layers[1].mlp.lin2.weight
    with torch.no_grad():
        weight[0, :2] = weight[0, :2].flip(0).clone()


def change_dtype(model, processor):
    model.sam.vision_encoder.to(torch.bfloat16)


def change_mean(model, processor):
    processor.sam_image_processor.image_mean = [0.5, 0.5, 0.5]


@pytest.mark.parametrize("change", [change_weight, swap_two_weights, change_dtype, change_mean])
def test_a_changed_encoder_or_input_never_hits(tmp_path, encoded, change):
    model, processor = tiny_model(), tiny_processor()
    cache = EmbeddingCache(tmp_path, model, processor)
    cache.fill(IMAGES[:2])
    first, key = cache.get(IMAGES[:2]), cache.encoder_key
    change(model, processor)  # while the cache is in use
    encoded.clear()
    second = cache.get(IMAGES[:2])
    assert encoded == [2] and cache.encoder_key != key and not torch.equal(first, second)
    torch.testing.assert_close(second.float(), uncached(model, processor, IMAGES[:2]).float(), atol=1e-3, rtol=1e-3)
    assert EmbeddingCache(tmp_path, model, processor).encoder_key == cache.encoder_key


def test_other_parts_of_the_model_do_not_matter(tmp_path, encoded):
    model, processor = tiny_model(), tiny_processor()
    cache = EmbeddingCache(tmp_path, model, processor)
    cache.get(IMAGES[:1])
    with torch.no_grad():
        model.slot_mapper.key_proj.weight.add_(1)
        model.sam.mask_decoder.mask_tokens.weight.add_(1)
    cache.get(IMAGES[:1])
    assert encoded == [1]
    model.sam.vision_encoder.pos_embed.data.add_(1)  # past autograd's counter
    key = cache.encoder_key
    assert cache.refresh_key() != key


def test_weights_made_in_inference_mode(tmp_path, processor):
    with torch.inference_mode():
        model = tiny_model()
        assert EmbeddingCache(tmp_path, model, processor).get(IMAGES[:1]).shape == (1, 32, 8, 8)
    assert (
        EmbeddingCache(tmp_path, model, processor).encoder_key
        == EmbeddingCache(tmp_path, tiny_model(), processor).encoder_key
    )


# Space


def test_size_is_announced_and_must_fit(tmp_path, model, processor, monkeypatch, encoded):
    cache = EmbeddingCache(tmp_path / "not" / "yet", model, processor, min_free_bytes=1000)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5 * BYTES + 999))
    assert cache.size(5) == CacheSize(BYTES, 5 * BYTES, 5 * BYTES + 999)
    with pytest.raises(OSError, match=r"up to 0.02 MiB for 5 images .* too little"):
        cache.fill(IMAGES)
    assert encoded == [] and cache.fill(IMAGES[:4]) == 4


def test_sentences_about_one_image_need_its_space_once(tmp_path, model, processor, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3 * BYTES + 999))
    rows = [{"image": IMAGES[number % 2], "image_id": str(number % 2)} for number in range(20)]
    with EmbeddingCache(tmp_path / "cache", model, processor, min_free_bytes=1000) as cache:
        assert cache.fill(rows) == 2
        with pytest.raises(OSError, match="for 20 images"):
            cache.fill([{"image": row["image"]} for row in rows])  # which do not say whose they are


def test_a_full_disk_does_not_stop_the_work(tmp_path, model, processor, monkeypatch, encoded):
    cache = EmbeddingCache(tmp_path, model, processor, shard_bytes=2 * BYTES, min_free_bytes=1000)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    expected = uncached(model, processor, IMAGES)
    cache.get(IMAGES[:1])
    for _ in range(2):
        torch.testing.assert_close(cache.get(IMAGES).float(), expected, atol=1e-3, rtol=1e-3)
    assert shard_files(cache) == [] and len(cache) == 0
    with pytest.raises(OSError):
        cache.fill(iter(IMAGES))  # without a length nothing is known beforehand


# Files and processes


def fill_in_a_process(folder, model, processor, index, results):
    torch.set_num_threads(1)  # threads do not survive a fork
    cache = EmbeddingCache(folder, model, processor, batch_size=1, shard_bytes=BYTES)
    results.put(cache.fill(IMAGES * 2, process_index=index, num_processes=2))


def test_two_processes_share_the_images(tmp_path, model, processor, encoded):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    arguments = [(tmp_path, model, processor, index, results) for index in (0, 1)]
    processes = [context.Process(target=fill_in_a_process, args=each) for each in arguments]
    reader = EmbeddingCache(tmp_path, model, processor)
    for process in processes:
        process.start()
    assert sum(results.get(timeout=100) for _ in processes) == 5
    for process in processes:
        process.join(10)
    reader.get(IMAGES)
    assert encoded == [] and len(reader) == 5  # what others finished since is found


def die_while_writing(folder, model, processor):
    torch.set_num_threads(1)
    cache = EmbeddingCache(folder, model, processor, batch_size=1, shard_bytes=BYTES)
    cache.fill(IMAGES[:2])
    os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
    cache.fill(IMAGES)


def test_a_killed_writer_leaves_a_good_cache(tmp_path, model, processor, encoded):
    process = multiprocessing.get_context("fork").Process(target=die_while_writing, args=(tmp_path, model, processor))
    process.start()
    process.join(100)
    assert process.exitcode == -signal.SIGKILL
    cache = EmbeddingCache(tmp_path, model, processor)
    assert len(cache) == 2
    (unfinished,) = [path for path in shard_files(cache) if path.suffix == ".part"]
    elsewhere = unfinished.with_name("shard-1-a.safetensors.0a1b2c3d-1-e4f5.part")  # of another machine
    elsewhere.touch()
    assert cache.fill(IMAGES) == 3 and encoded == [3]
    assert not unfinished.exists()  # its writer is dead
    assert elsewhere.exists()  # it might still have a writer
    os.utime(elsewhere, (0, 0))
    assert len(EmbeddingCache(tmp_path, model, processor)) == 5 and not elsewhere.exists()


def test_a_half_or_foreign_shard_is_left_out(tmp_path, model, processor, encoded):
    cache = EmbeddingCache(tmp_path, model, processor, shard_bytes=2 * BYTES)
    cache.fill(IMAGES)
    files = shard_files(cache)
    assert len(files) == 3  # 2 + 2 + 1 images
    sizes = [path.stat().st_size for path in files]
    half = files[sizes.index(max(sizes))]
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    other = tiny_model(seed=1)
    foreign = EmbeddingCache(tmp_path, other, processor)
    foreign.fill(IMAGES)
    shutil.copy(shard_files(foreign)[0], cache.shards.folder)
    encoded.clear()
    again = EmbeddingCache(tmp_path, model, processor)
    assert len(again) == 3
    torch.testing.assert_close(again.get(IMAGES).float(), uncached(model, processor, IMAGES), atol=1e-3, rtol=1e-3)
    assert encoded[0] == 2


# In training and evaluation


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 2e-3)])
def test_losses_are_equal(tmp_path, model, processor, encoded, dtype, tolerance):
    rows = [tiny_row(0, 1), tiny_row(1, 0), tiny_row(2, 2, None)]
    plain = SegmentationCollator(processor)(rows)
    cache = EmbeddingCache(tmp_path, model, processor, dtype=dtype)
    assert cache.fill(rows) == 3
    collator = SegmentationCollator(processor, embedding_cache=cache)
    batch = collator(rows)
    assert set(plain) ^ set(batch) == {"sam_pixel_values", "image_embeddings"}
    for name in set(plain) & set(batch):
        assert torch.equal(plain[name], batch[name]), name
    expected = model(**plain)
    encoded.clear()
    output = model(**batch)
    assert encoded == []
    torch.testing.assert_close(output.loss, expected.loss, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(output.heatmap_logits, expected.heatmap_logits, atol=10 * tolerance, rtol=tolerance)
    gradients = [torch.autograd.grad(out.loss, model.slot_mapper.key_proj.weight)[0] for out in (expected, output)]
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, atol=10 * tolerance, rtol=10 * tolerance)


def test_training_step_from_the_cache_is_that_without(tmp_path, processor, encoded):
    rows, results = [tiny_row(0, 1), tiny_row(1, 2)], []
    for cached in (False, True):
        model = tiny_model()
        cache = EmbeddingCache(tmp_path / "cache", model, processor, dtype="float32") if cached else None
        if cached:
            cache.fill(rows)
        encoded.clear()
        trainer = SegmentationTrainer(
            model=model,
            args=arguments(SegmentationConfig, tmp_path / "out", per_device_train_batch_size=2),
            train_dataset=rows,
            processing_class=processor,
            data_collator=SegmentationCollator(processor, embedding_cache=cache),
        )
        trainer.train()
        results.append(
            (trainer.state.log_history[0]["loss"], model.slot_mapper.key_proj.weight.detach(), sum(encoded))
        )
    (loss, weight, num_encoded), (cached_loss, cached_weight, num_encoded_cached) = results
    assert (num_encoded, num_encoded_cached) == (2, 0)
    assert cached_loss == pytest.approx(loss, rel=1e-4)
    torch.testing.assert_close(cached_weight, weight, atol=1e-5, rtol=1e-4)


def test_evaluation_segments_from_the_cache(tmp_path, model, processor):
    rows = [tiny_row(0, 1), tiny_row(1, 0)]
    cache = EmbeddingCache(tmp_path, model, processor, dtype="float32")
    outputs = []
    for options in ({}, {"embedding_cache": cache}):
        batch = SegmentationCollator.for_evaluation(processor, **options)(rows)
        assert len(batch.pop("references")) == 2
        outputs.append(model.segment(**batch, max_new_tokens=8))
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    torch.testing.assert_close(outputs[0].pred_masks, outputs[1].pred_masks, atol=1e-4, rtol=1e-4)


def test_workers_read_and_do_not_encode(tmp_path, model, processor):
    rows = [tiny_row(index, 1) for index in range(4)]
    cache = EmbeddingCache(tmp_path, model, processor)
    collator = SegmentationCollator(processor, embedding_cache=cache)
    with pytest.raises(ValueError, match=r"2 images of a batch are not in the embedding cache .* call cache.fill"):
        list(DataLoader(rows, batch_size=2, num_workers=1, collate_fn=collator))
    cache.fill(rows)
    batches = list(DataLoader(rows, batch_size=2, num_workers=2, collate_fn=collator))
    expected = uncached(model, processor, [row["image"] for row in rows])
    found = torch.cat([batch["image_embeddings"] for batch in batches]).float()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_copies_leave_the_model_behind_and_read(tmp_path, model, processor):
    cache = EmbeddingCache(tmp_path, model, processor)
    expected = cache.get(IMAGES[:2])  # only in memory so far
    assert len(pickle.dumps(cache)) < 200_000
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert twin.model is None and torch.equal(twin.get(IMAGES[:2]), expected)
        assert twin.size(3).total == 3 * BYTES
        with pytest.raises(ValueError, match="1 images of a batch are not in the embedding cache"):
            twin.get(IMAGES[2:3])
