"""Harvesting: which tokens of which rows, in which order, in how much memory; and the cache on disk."""

import gc
import itertools
import json
import shutil
import threading
import time

import pytest
import torch
from PIL import Image
from sae import Stream, harvester, interleaved, rows
from safetensors.torch import load_file
from tiny import tiny_image, tiny_model, tiny_parts, tiny_processor

from segcompass_hf.locks import alone_with
from segcompass_hf.training.sae.activations import HarvestedTokens, TokenStates, layer_states
from segcompass_hf.training.sae.buffer import ActivationBuffer
from segcompass_hf.training.sae.cache import ActivationCache
from segcompass_hf.training.sae.cache_filling import cache_bytes, cache_key, estimate_tokens
from segcompass_hf.training.sae.rows import RowEncoder, RowStream, UnreadableRow


@pytest.fixture(scope="module")
def llava():
    return tiny_model("llava")


@pytest.fixture(scope="module")
def processor():
    return tiny_processor("llava")


class FakeSource:
    """Batches of 1, 2, 3, 4 and again 1, ... tokens that count up; an epoch has 10 tokens in 4 batches."""

    def __init__(self):
        self.most_alive = 0

    def batches(self, place):
        for epoch in itertools.count(place[0]):
            for row in range(place[1] if epoch == place[0] else 0, 4):
                first = 10 * epoch + (0, 1, 3, 6)[row]
                values = torch.arange(first, first + row + 1)
                yield (epoch, row), TokenStates(values[:, None].float(), (values % 2).to(torch.int8))


class TestRowStream:
    def test_held_out_rows_and_the_others_are_all_rows(self):
        parts = {part: [i for i, _ in RowStream(range(20), 5, part).rows(0)] for part in ("train", "held_out")}
        assert parts["held_out"] == [4, 9, 14, 19]
        assert sorted(parts["train"] + parts["held_out"]) == list(range(20))

    def test_rows_are_counted_without_walking_them(self):
        class Long:
            def __len__(self):
                return 10**12  # whatever touches each of them would never end

            def __getitem__(self, index):
                raise AssertionError

        for part, held_out in (("train", 19), ("held_out", 1)):  # of 20
            assert RowStream(Long(), 20, part, world_size=2).rows_per_epoch == 10**12 * held_out // 20 // 2
        assert RowStream(Long()).rows_per_epoch == 10**12

    def test_a_seed_shuffles_every_epoch_anew(self):
        stream = RowStream(range(20), seed=3)
        epochs = [[i for i, _ in stream.rows(epoch)] for epoch in range(2)]
        assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
        assert epochs[0] != epochs[1] != list(range(20))
        assert [i for i, _ in RowStream(range(20), seed=3).rows(1)] == epochs[1]

    @pytest.mark.parametrize("kind", ["map", "stream"])
    def test_processes_share_the_rows_out_evenly(self, kind):
        data = list(range(11))
        dataset = data if kind == "map" else Stream(data)
        shares = [[i for i, _ in RowStream(dataset, rank=rank, world_size=3).rows(0)] for rank in range(3)]
        assert shares == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]  # 9 and 10 would give two processes a row more

    @pytest.mark.parametrize("kind", ["map", "stream"])
    def test_starting_in_the_middle(self, kind):
        dataset = list(range(12)) if kind == "map" else Stream(range(12))
        stream = RowStream(dataset, 4, rank=1, world_size=2, seed=0 if kind == "map" else None)
        assert list(stream.rows(0, 2)) == list(stream.rows(0))[2:]

    def test_a_stream_is_told_the_epoch(self):
        stream = Stream(range(3))
        assert [i for i, _ in RowStream(stream).rows(5)] == [0, 1, 2]
        assert stream.epoch == 5 and RowStream(stream).rows_per_epoch is None

    def test_more_processes_than_rows(self):
        with pytest.raises(ValueError, match="2 rows to read, fewer than the 3 processes"):
            RowStream([1, 2], world_size=3)

    def test_images_of_a_datasets_table_stay_encoded(self):
        from datasets import Dataset, Features, Image, List, Value

        features = Features({"images": List(Image()), "texts": List(Value("string"))})
        table = Dataset.from_list([{"images": [None, tiny_image()], "texts": ["a", None]}], features=features)
        (_, row), *_ = RowStream(table).rows(0)
        assert row["images"][0] is None and isinstance(row["images"][1]["bytes"], bytes)
        RowEncoder(tiny_processor("llava"))([(0, row)])  # and are read


class TestRowEncoder:
    @pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3"])
    def test_rows_of_the_schema_give_the_tokens_the_model_trains_on(self, family):
        processor = tiny_processor(family)
        row = rows(2)[1]
        inputs = RowEncoder(processor)([(0, row)])
        expected = processor(images=row["image"], instruction=row["instruction"], reasoning=row["reasoning"])
        assert inputs["input_ids"].tolist() == expected["input_ids"].tolist()
        assert "sam_pixel_values" not in inputs

    @pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
    def test_interleaved_rows(self, family):
        processor = tiny_processor(family)
        inputs = RowEncoder(processor)([(0, interleaved())])
        ids = inputs["input_ids"][0]
        is_image = ids == processor.image_token_id
        per_image = int(is_image.sum()) // 2
        assert per_image >= 4 and is_image.sum() == 2 * per_image
        runs = (is_image[1:] != is_image[:-1]).sum()
        assert runs >= 3  # text, image, text, image
        text = processor.tokenizer.decode(ids[~is_image])
        assert text.index("red circle") < text.index("blue square")

    def test_control_tokens_in_the_words_are_inert(self, processor):
        tokenizer = processor.tokenizer
        ids = RowEncoder(processor)([(0, {"images": [None], "texts": ["a </s> <image> b"]})])["input_ids"][0].tolist()
        assert tokenizer.eos_token_id not in ids and processor.image_token_id not in ids

    def test_any_vlm_processor(self):
        from transformers import LlavaProcessor

        parts = tiny_parts("llava")
        tokenizer = parts["tokenizer"]
        plain = LlavaProcessor(
            parts["image_processor"], tokenizer, chat_template=tokenizer.chat_template, **parts["vlm_processor_kwargs"]
        )
        encoder = RowEncoder(plain)
        ids = encoder([(0, {"image": tiny_image(), "instruction": "the ring </s>", "reasoning": "one"})])["input_ids"][
            0
        ]
        text = tokenizer.decode(ids)
        assert text.startswith("<s>USER: <image><image>") and "the ring" in text and "ASSISTANT: one" in text
        assert (ids == tokenizer.convert_tokens_to_ids("<image>")).sum() == 4
        assert tokenizer.eos_token_id not in ids.tolist()  # that of the instruction is inert
        assert encoder.image_markup == "<image>\n"
        assert (encoder([(0, interleaved())])["input_ids"] == tokenizer.convert_tokens_to_ids("<image>")).sum() == 8

    def test_long_interleaved_rows_are_cut(self, processor):
        length = RowEncoder(processor)([(0, interleaved())])["input_ids"].shape[1]
        for limit in range(4, length, 3):
            ids = RowEncoder(processor, max_length=limit)([(0, interleaved())])["input_ids"][0]
            images = (ids == processor.image_token_id).sum()
            assert len(ids) <= limit and images in (0, 4, 8)
        # the second image goes as a whole: 4 tokens and what stands around it
        ids = RowEncoder(processor, max_length=length - 1)([(0, interleaved())])["input_ids"][0]
        assert (ids == processor.image_token_id).sum() == 4

    @pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3"])
    def test_lengths_are_known_without_processing_the_images(self, family, monkeypatch):
        encoder = RowEncoder(tiny_processor(family))
        texts = ["the ring", f"{encoder.image_markup} the ring {encoder.image_markup}", encoder.image_markup]
        images = [[], [tiny_image(1), tiny_image(2, (200, 50))], [tiny_image(3)]]
        exact = [int(encoder.tensors([t], [i])["attention_mask"].sum()) for t, i in zip(texts, images, strict=True)]
        encoder.num_tokens(texts[2], images[2])  # looks at one image as a whole
        processed = []
        monkeypatch.setattr(type(encoder.processor.image_processor), "__call__", lambda *a, **k: processed.append(a))
        assert [encoder.num_tokens(t, i) for t, i in zip(texts[1:], images[1:], strict=True)] == exact[1:]
        assert not processed

    def test_long_rows_of_the_schema_are_refused(self, processor):
        with pytest.raises(UnreadableRow, match="row 7: it is .* tokens long, max_length is 9"):
            RowEncoder(processor, max_length=9, unreadable_rows="error")([(7, rows()[0])])
        assert RowEncoder(processor, max_length=9)([(7, rows()[0])]) is None  # cut off, a prompt would mean nothing

    def test_without_max_length_the_tokenizer_s_limit_counts(self):
        long = rows()[0] | {"instruction": "ring " * 200, "sample_id": "long"}
        encoder = RowEncoder(tiny_processor(model_max_length=100), unreadable_rows="error")
        with pytest.raises(UnreadableRow, match=r"row 2 \(long\): .* model_max_length of the tokenizer is 100"):
            encoder([(2, long)])
        document = {"images": [None], "texts": ["ring " * 200]}
        assert encoder([(3, document)])["input_ids"].shape[1] == 100

    @pytest.mark.parametrize(
        ("damage", "reason"),
        [
            ({"instruction": None}, "the instruction is a NoneType"),
            ({"instruction": "  "}, "the instruction is empty"),
            ({"reasoning": 3}, "the reasoning is a int"),
            ({"image": None}, "the image is a NoneType"),
        ],
    )
    def test_one_refused_text_among_many_is_skipped_and_named(self, processor, tmp_path, damage, reason):
        from segcompass_hf.data.readable_rows import UnreadableLog

        log = UnreadableLog(tmp_path / "unreadable.jsonl", "rows")
        encoder = RowEncoder(processor, unreadable_log=log)
        batch = [(0, rows()[0]), (1, rows()[0] | {"sample_id": "bad"} | damage)]
        for _ in range(2):
            assert encoder(batch)["input_ids"].shape[0] == 1
        (line,) = map(json.loads, log.file.open())  # named once
        assert (line["index"], line["sample_id"]) == (1, "bad") and line["reason"].startswith(reason)

    def test_rows_that_are_neither(self, processor):
        with pytest.raises(ValueError, match=r"row 3 has the columns \['caption'\]"):
            RowEncoder(processor)([(3, {"caption": "a cat"})])
        with pytest.raises(ValueError, match="row 4.*None in exactly one"):
            RowEncoder(processor, unreadable_rows="error")([(4, {"images": [None], "texts": [None]})])
        assert RowEncoder(processor)([(4, {"images": [None], "texts": [None]})]) is None  # one row, not the data set

    def test_unreadable_images(self, processor, tmp_path):
        from segcompass_hf.data.readable_rows import UnreadableLog, count_unreadable

        broken = {"image": {"bytes": b"no image"}, "instruction": "the ring", "sample_id": "seven"}
        with pytest.raises(UnreadableRow, match=r"row 5 \(seven\): the image: .* cannot be read as an image"):
            RowEncoder(processor, unreadable_rows="error")([(5, broken)])
        log = UnreadableLog(tmp_path / "unreadable.jsonl", "rows")
        encoder = RowEncoder(processor, unreadable_log=log)
        assert encoder([(5, broken)]) is None
        assert encoder([(5, broken), (6, rows()[0])])["input_ids"].shape[0] == 1
        assert count_unreadable(log.file) == 1 and '"seven"' in log.file.read_text()


class TestLayerStates:
    @pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3"])
    @pytest.mark.parametrize("layer", [0, 2, 4])
    def test_what_the_model_reads_there(self, family, layer):
        from segcompass_hf.text_stack_segcompass import HiddenStateCapture

        model = tiny_model(family)
        inputs = RowEncoder(tiny_processor(family))(list(enumerate(rows(2))))
        assert not inputs["attention_mask"][:, 0].all()  # padded on the left: positions count from the first token
        with torch.no_grad(), HiddenStateCapture(model.vlm, layer) as capture:
            model(**inputs)
        assert torch.equal(layer_states(model.vlm, layer, inputs), capture.states()[0])

    def test_nothing_above_the_layer_runs(self, llava, processor):
        ran = []
        layers = llava.vlm.base_model.language_model.layers
        handles = [layer.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(layers)]
        handles.append(llava.vlm.lm_head.register_forward_hook(lambda *_: ran.append("head")))
        layer_states(llava.vlm, 2, RowEncoder(processor)([(0, rows()[0])]))
        for handle in handles:
            handle.remove()
        assert ran == [0, 1]
        hooks = [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in layers]
        assert sum(hooks) == 0  # its own are gone

    def test_a_layer_too_far(self, llava, processor):
        with pytest.raises(IndexError):
            layer_states(llava.vlm, 9, RowEncoder(processor)([(0, rows()[0])]))


class TestHarvester:
    def test_no_padding_no_first_token(self, llava, processor):
        batch = list(enumerate(rows(4)))
        alone = [harvester(llava, processor)([row]) for row in batch]
        together = harvester(llava, processor)(batch)
        lengths = [RowEncoder(processor)([row])["input_ids"].shape[1] for row in batch]
        assert len(set(lengths)) > 1  # so that there is padding
        assert [len(states) for states in alone] == [length - 1 for length in lengths]
        assert len(together) == sum(lengths) - 4
        torch.testing.assert_close(together.states, torch.cat([s.states for s in alone]), atol=1e-5, rtol=1e-4)
        assert torch.equal(together.modality_ids, torch.cat([s.modality_ids for s in alone]))
        whole = harvester(llava, processor, drop_first_token=False)(batch)
        assert len(whole) == sum(lengths)

    def test_modality_is_kept(self, llava, processor):
        states = harvester(llava, processor)([(0, rows()[0])])
        assert states.modality_ids.sum() == 4  # image tokens of a tiny LLaVA
        both = harvester(llava, processor)([(0, rows()[0]), (1, {"images": [None], "texts": ["the ring"]})])
        assert both.modality_ids.sum() == 4

    def test_image_tokens_are_those_that_the_processor_writes(self, llava, processor, monkeypatch):
        """Also of a VLM whose configuration names another token, or none (Chameleon)."""
        monkeypatch.setattr(llava.config, "image_token_id", processor.tokenizer.pad_token_id)
        assert harvester(llava, processor)([(0, rows()[0])]).modality_ids.sum() == 4

    def test_epochs_follow_each_other_and_can_be_entered_anywhere(self, llava, processor):
        source = HarvestedTokens(harvester(llava, processor), RowStream(rows(5), seed=1), rows_per_batch=2)
        batches = list(itertools.islice(source.batches((0, 0)), 6))
        assert [place for place, _ in batches] == [(0, 0), (0, 2), (0, 4), (1, 0), (1, 2), (1, 4)]
        place, again = next(source.batches((1, 2)))
        assert place == (1, 2) and torch.equal(again.states, batches[4][1].states)

    def test_no_token_at_all_is_an_error_not_a_hang(self, llava, processor):
        broken = [{"image": {"bytes": b""}, "instruction": "the ring"}]
        with pytest.raises(ValueError, match="gave no token"):
            next(HarvestedTokens(harvester(llava, processor), RowStream(broken), 2).batches((0, 0)))


class TestActivationBuffer:
    def served(self, buffer, batches):
        return [buffer.next_batch()["hidden_states"][:, 0].int().tolist() for _ in range(batches)]

    def test_every_token_once_and_in_its_block(self):
        buffer = ActivationBuffer(FakeSource(), batch_tokens=3, block_tokens=7, seed=0)
        assert buffer.block_tokens == 6
        batches = self.served(buffer, 10)  # 5 blocks of 6: three epochs of 10
        for block in range(5):
            served = batches[2 * block] + batches[2 * block + 1]
            assert sorted(served) == list(range(6 * block, 6 * block + 6)) != served

    def test_modality_stays_beside_its_state(self):
        batch = ActivationBuffer(FakeSource(), 6, 6).next_batch()
        assert torch.equal(batch["modality_ids"], batch["hidden_states"][:, 0].long() % 2)

    def test_the_order_is_that_of_seed_and_block(self):
        orders = [self.served(ActivationBuffer(FakeSource(), 2, 20, seed), 20) for seed in (0, 0, 1)]
        assert orders[0] == orders[1] != orders[2]
        first, second = orders[0][:10], orders[0][10:]
        assert [[x + 20 for x in batch] for batch in first] != second

    def test_a_batch_has_one_token_of_each_run(self):
        batches = self.served(ActivationBuffer(FakeSource(), 3, 12), 8)
        for number, batch in enumerate(batches):  # three runs of 4 tokens in a block of 12
            assert [x // 4 for x in batch] == [3 * (number // 4) + run for run in range(3)]

    @pytest.mark.parametrize("count", [2, 4])
    def test_parts_of_a_batch_are_together_that_of_one_process(self, count):
        class Part(FakeSource):
            """Tokens that count up; blocks of 24, of which each process has one of `count` parts."""

            def __init__(self, rank, count):
                self.rank, self.tokens, self.step = rank, 24 // count, 24

            def batches(self, place):
                for block in itertools.count():
                    first = block * self.step + self.rank * self.tokens
                    values = torch.arange(first, first + self.tokens)
                    yield (0, first), TokenStates(values[:, None].float(), (values % 2).to(torch.int8))

        whole = self.served(ActivationBuffer(Part(0, 1), 8, 24, 7), 6)
        parts = [
            self.served(ActivationBuffer(Part(rank, count), 8 // count, 24 // count, 7, rank), 6)
            for rank in range(count)
        ]
        assert [sum(together, []) for together in zip(*parts, strict=True)] == whole

    def test_harvest_goes_on_while_batches_are_served(self):
        harvested = []

        class Noting(FakeSource):
            def batches(self, place):
                for item in super().batches(place):
                    harvested.append(int(item[1].states[-1]))
                    yield item

        buffer = ActivationBuffer(Noting(), 3, 12)
        self.served(buffer, 3)  # of four: the last batch of the block is not asked for
        until = time.monotonic() + 20
        while harvested[-1] < 20 and time.monotonic() < until:  # 12 and the 9 that there is room for: 0 to 20
            time.sleep(0.01)
        assert harvested[-1] in (20, 22)  # a batch that does not fit waits
        buffer.close()

    def test_what_goes_wrong_in_the_thread_is_raised_here(self):
        class Broken(FakeSource):
            def batches(self, place):
                yield from itertools.islice(super().batches(place), 3)
                raise OSError("the disk is gone")

        buffer = ActivationBuffer(Broken(), 3, 6)
        self.served(buffer, 2)
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                buffer.next_batch()

    def test_no_thread_is_left(self):
        def harvesting():
            return [thread for thread in threading.enumerate() if thread.name == "sae-harvest"]

        buffer = ActivationBuffer(FakeSource(), 3, 6)
        first = self.served(buffer, 1)
        buffer.close()
        assert not harvesting() and self.served(buffer, 1) != first  # it goes on where it was
        del buffer
        gc.collect()
        assert not harvesting()

    @pytest.mark.parametrize("stop", range(1, 9))
    def test_resuming_anywhere_serves_the_rest(self, stop):
        whole = self.served(ActivationBuffer(FakeSource(), 3, 9, seed=5), 12)
        buffer = ActivationBuffer(FakeSource(), 3, 9, seed=5)
        self.served(buffer, stop)
        state = json.loads(json.dumps(buffer.state_dict()))
        assert all(isinstance(value, int) for value in state.values()) and len(state) == 5
        resumed = ActivationBuffer(FakeSource(), 3, 9, seed=5)
        resumed.load_state_dict(state)
        assert self.served(resumed, 12 - stop) == whole[stop:]

    def test_memory_is_bounded(self, llava, processor):
        """What the buffer holds: room for one block, whatever it has served; the thread holds a harvested batch."""
        source = HarvestedTokens(harvester(llava, processor), RowStream(rows(6), seed=0), rows_per_batch=2)
        buffer = ActivationBuffer(source, batch_tokens=16, block_tokens=64)
        rooms = set()
        for _ in range(11):
            batch = buffer.next_batch()
            assert batch["hidden_states"].untyped_storage().nbytes() == 16 * 32 * 4
            room = buffer._filler.room
            assert room.states.untyped_storage().nbytes() == 64 * 32 * 4
            rooms.add(room.states.data_ptr())
        assert len(rooms) == 1


class TestCache:
    @pytest.fixture
    def source(self, llava, processor):
        return HarvestedTokens(harvester(llava, processor), RowStream(rows(9), seed=0), rows_per_batch=2)

    def read(self, cache, tokens, place=(0, 0)):
        parts = []
        for _, batch in cache.batches(place):
            parts.append(batch.states)
            if sum(map(len, parts)) >= tokens:
                return torch.cat(parts)[:tokens]

    def test_size_by_hand(self):
        # 10 tokens of 4 numbers of 2 bytes, and a byte each
        assert cache_bytes(10, d_in=4, dtype="float16") == 10 * (4 * 2 + 1)
        assert cache_bytes(10, d_in=4, dtype="float32") == 10 * (4 * 4 + 1)

    def test_the_estimate_is_exact_where_every_row_is_sampled(self, source):
        assert estimate_tokens(source) == sum(len(batch) for _, batch in source.epoch_batches(0))

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_holds_what_was_harvested(self, source, tmp_path, dtype):
        cache = ActivationCache(tmp_path, cache_key(source), dtype, shard_tokens=100)
        cache.fill(source, d_in=32)
        expected = torch.cat([batch.states for _, batch in source.epoch_batches(0)])
        assert cache.complete and cache.num_tokens == len(expected) and len(cache.index["shards"]) > 2
        stored = self.read(cache, len(expected))
        assert torch.equal(stored, expected.to(getattr(torch, dtype)))
        size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
        assert cache_bytes(len(expected), 32, dtype) <= size <= cache_bytes(len(expected), 32, dtype) + 3000

    def test_reading_starts_anywhere_and_goes_round(self, source, tmp_path):
        cache = ActivationCache(tmp_path, cache_key(source), "float32", shard_tokens=100)
        cache.fill(source, d_in=32)
        total = cache.num_tokens
        whole = self.read(cache, total)
        assert torch.equal(self.read(cache, total, (0, 130)), torch.cat([whole[130:], whole[:130]]))
        place, batch = next(cache.batches((3, 130)))
        assert place == (3, 130) and torch.equal(batch.states[0], whole[130])

    def test_the_buffer_resumes_from_it(self, source, tmp_path):
        cache = ActivationCache(tmp_path, cache_key(source), "float32", shard_tokens=100)
        cache.fill(source, d_in=32)
        buffer = ActivationBuffer(cache, 16, 64)
        batches = [buffer.next_batch()["hidden_states"] for _ in range(40)]  # 640 tokens: more than an epoch
        assert cache.num_tokens < 640
        buffer = ActivationBuffer(cache, 16, 64)
        [buffer.next_batch() for _ in range(27)]
        resumed = ActivationBuffer(cache, 16, 64)
        resumed.load_state_dict(buffer.state_dict())
        assert all(torch.equal(resumed.next_batch()["hidden_states"], batch) for batch in batches[27:])

    @pytest.mark.parametrize("moment", ["harvest", "shard", "index"])
    def test_killed_and_filled_again(self, source, tmp_path, moment, monkeypatch):
        whole = ActivationCache(tmp_path / "whole", cache_key(source), "float32", shard_tokens=100)
        whole.fill(source, d_in=32)
        self.interrupt(source, tmp_path / "killed", moment, monkeypatch)
        cache = ActivationCache(tmp_path / "killed", cache_key(source), "float32", shard_tokens=100)
        assert not cache.complete and 0 < cache.num_tokens < whole.num_tokens
        ran = []
        monkeypatch.setattr(source, "harvester", _Counting(source.harvester, ran))
        cache.fill(source, d_in=32)
        assert 0 < len(ran) < 5  # of five batches, not all again
        assert cache.index == whole.index
        for shard in whole.index["shards"]:
            ours, theirs = (load_file(tmp_path / name / shard["file"]) for name in ("killed", "whole"))
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert not list((tmp_path / "killed").glob("*.part"))

    def interrupt(self, source, folder, moment, monkeypatch):
        """Fill, and die in the second shard: while harvesting it, after its file, or before the index is in place."""
        import os

        cache = ActivationCache(folder, cache_key(source), "float32", shard_tokens=100)
        replace, calls = os.replace, []

        def dying(aside, path):
            calls.append(str(path))
            if moment == "shard" and len(calls) == 3:  # shard, index, second shard
                raise KeyboardInterrupt
            if moment == "index" and len(calls) == 4:
                raise KeyboardInterrupt
            replace(aside, path)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying)
            if moment == "harvest":
                ran = []
                patch.setattr(source, "harvester", _Counting(source.harvester, ran, stop=4))
            with pytest.raises(KeyboardInterrupt):
                cache.fill(source, d_in=32)

    def test_of_two_processes_that_fill_it_the_second_is_refused(self, source, tmp_path):
        with alone_with(tmp_path / ".lock", "held"), pytest.raises(FileExistsError, match="is filling the activation"):
            ActivationCache(tmp_path, cache_key(source)).fill(source, d_in=32)
        ActivationCache(tmp_path, cache_key(source)).fill(source, d_in=32)
        assert not (tmp_path / ".lock").exists()

    def test_a_complete_cache_is_not_filled_again(self, source, tmp_path, monkeypatch):
        ActivationCache(tmp_path, cache_key(source)).fill(source, d_in=32)
        cache = ActivationCache(tmp_path, cache_key(source))
        monkeypatch.setattr(source, "harvester", None)
        cache.fill(source, d_in=32)

    def test_at_most_so_many_tokens(self, source, tmp_path):
        cache = ActivationCache(tmp_path, cache_key(source), "float32", shard_tokens=50)
        cache.fill(source, d_in=32, max_tokens=120)
        largest = max(len(batch) for _, batch in source.epoch_batches(0))
        assert 120 <= cache.num_tokens < 120 + largest

    def test_a_higher_limit_fills_on(self, source, tmp_path, monkeypatch):
        whole = ActivationCache(tmp_path / "whole", cache_key(source), "float32")
        whole.fill(source, d_in=32)
        sizes = []
        for limit in (120, 60, 200, None):
            cache = ActivationCache(tmp_path / "grown", cache_key(source), "float32", shard_tokens=50)
            cache.fill(source, d_in=32, max_tokens=limit)
            sizes.append(cache.num_tokens)
        assert 120 <= sizes[0] == sizes[1] < 200 <= sizes[2] < sizes[3] == whole.num_tokens
        assert torch.equal(self.read(cache, sizes[3]), self.read(whole, sizes[3])), "every token once, in its place"
        again = ActivationCache(tmp_path / "grown", cache_key(source), "float32")
        monkeypatch.setattr(source, "harvester", None)
        for limit in (None, 10 * sizes[3]):  # the epoch has no more
            again.fill(source, d_in=32, max_tokens=limit)

    def test_a_stale_cache_is_refused_by_name(self, source, processor, tmp_path):
        key = cache_key(source)
        ActivationCache(tmp_path, key).fill(source, d_in=32)
        other_layer = HarvestedTokens(harvester(source.harvester, processor, 3), source.stream, 2)
        with pytest.raises(ValueError, match="holds the states of layer 2, and those of layer 3 are wanted. Delete"):
            ActivationCache(tmp_path, cache_key(other_layer))
        other_rows = HarvestedTokens(source.harvester, RowStream(rows(10)[1:], seed=0), 2)
        with pytest.raises(ValueError, match="first_row is"):
            ActivationCache(tmp_path, cache_key(other_rows))
        other_vlm = HarvestedTokens(harvester(tiny_model("llava", seed=1), processor), source.stream, 2)
        with pytest.raises(ValueError, match="vlm_weights is"):
            ActivationCache(tmp_path, cache_key(other_vlm))
        with pytest.raises(ValueError, match="dtype is 'bfloat16' there and 'float32' here"):
            ActivationCache(tmp_path, key, "float32")

    def test_the_key_sees_single_rows_of_weights_and_of_data(self, processor):
        model = tiny_model("llava")

        def key(data=None):
            stream = RowStream(data or rows(9), seed=0)
            return cache_key(HarvestedTokens(harvester(model, processor), stream, 2))

        before = key()
        assert key() == before
        embedding = model.get_input_embeddings().weight
        with torch.no_grad():
            embedding[57] += 0.01  # one word was trained
            assert {name for name, value in key().items() if value != before[name]} == {"vlm_weights"}
            embedding[57] -= 0.01
            embedding.copy_(embedding.flip(0))  # the same numbers in other places
            assert key()["vlm_weights"] != before["vlm_weights"]
            embedding.copy_(embedding.flip(0))
        changed = rows(9)
        changed[5] = changed[5] | {"instruction": "other words"}  # neither the first row nor the number of rows
        assert key(changed)["dataset"] != before["dataset"]
        changed = rows(9)
        changed[5] = changed[5] | {"image": changed[4]["image"].transpose(Image.Transpose.ROTATE_180)}
        assert key(changed)["dataset"] != before["dataset"]

    def test_the_size_is_announced_and_checked(self, source, tmp_path, monkeypatch):
        from segcompass_hf.training.sae import cache_filling as sae_cache

        announced = []
        monkeypatch.setattr(sae_cache.logger, "warning", announced.append)
        ActivationCache(tmp_path / "a", cache_key(source), "float32").fill(source, d_in=32)
        assert f"about {estimate_tokens(source):,} tokens of 32 x float32" in announced[0]
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(OSError, match="still needs about .* and .* has 0.00 GiB"):
            ActivationCache(tmp_path / "b", cache_key(source), "float32").fill(source, d_in=32)
        assert not (tmp_path / "b").exists()

    def test_a_stream_needs_a_limit(self, llava, processor, tmp_path):
        source = HarvestedTokens(harvester(llava, processor), RowStream(Stream(rows(4))), 2)
        with pytest.raises(ValueError, match="cache_max_tokens"):
            ActivationCache(tmp_path, cache_key(source)).fill(source, d_in=32)

    def test_states_beyond_the_dtype_are_refused(self, source, tmp_path, monkeypatch):
        scaled = lambda rows: TokenStates(torch.full((3, 32), 1e5), torch.zeros(3, dtype=torch.int8))  # noqa: E731
        cache = ActivationCache(tmp_path, cache_key(source), "float16")
        monkeypatch.setattr(source, "harvester", _Counting(source.harvester, [], call=scaled))
        with pytest.raises(ValueError, match="not finite in float16"):
            cache.fill(source, d_in=32)


class _Counting:
    """A harvester that notes its calls, dies at the `stop`-th, or answers with `call`."""

    def __init__(self, harvester, ran, stop=None, call=None):
        self.harvester, self.ran, self.stop, self.call = harvester, ran, stop, call

    def of_layers(self, rows, layers):
        self.ran.append(len(rows))
        if len(self.ran) == self.stop:
            raise KeyboardInterrupt
        return self.harvester.of_layers(rows, layers) if self.call is None else [self.call(rows) for _ in layers]

    def __getattr__(self, name):
        return getattr(self.harvester, name)
