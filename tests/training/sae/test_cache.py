"""The activation cache beyond one process, one layer and one disk; what is wrong with it is said."""

import itertools
import json
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from sae import Stream, harvester, rows
from safetensors.torch import load_file
from tiny import tiny_image, tiny_model, tiny_processor

from segcompass_hf.locks import alone_with
from segcompass_hf.training.sae import cache_filling
from segcompass_hf.training.sae.activations import HarvestedTokens, TokenStates
from segcompass_hf.training.sae.buffer import ActivationBuffer
from segcompass_hf.training.sae.cache import ActivationCache, CacheShare
from segcompass_hf.training.sae.cache_filling import cache_bytes, cache_key
from segcompass_hf.training.sae.rows import RowStream


@pytest.fixture(scope="module")
def llava():
    return tiny_model("llava")


@pytest.fixture(scope="module")
def processor():
    return tiny_processor("llava")


@pytest.fixture
def source(llava, processor):
    return HarvestedTokens(harvester(llava, processor), RowStream(rows(9), seed=0), rows_per_batch=2)


def filled(source, folder, **kwargs) -> ActivationCache:
    cache = ActivationCache(folder, cache_key(source), "float32", **kwargs)
    cache.fill(source, d_in=32)
    return cache


def states(cache, start=0, stop=None) -> torch.Tensor:
    parts = cache.tokens(start, cache.num_tokens if stop is None else stop)
    return TokenStates.joined([part for _, part in parts]).states


def files_of_documents(folder, files=3, rows_per_file=3):
    """A stream of `datasets` with several files of interleaved rows."""
    from datasets import Dataset, Features, Image, List, Value, load_dataset

    features = Features({"images": List(Image()), "texts": List(Value("string"))})
    for file in range(files):
        documents = [
            {"images": [None, tiny_image(i)], "texts": [f"the ring {file} {i}", None]} for i in range(rows_per_file)
        ]
        Dataset.from_list(documents, features=features).to_parquet(folder / f"{file}.parquet")
    names = [str(folder / f"{file}.parquet") for file in range(files)]
    return load_dataset("parquet", data_files=names, split="train", streaming=True, cache_dir=str(folder / "hub"))


class TestSections:
    def test_processes_read_files_of_their_own(self, tmp_path, monkeypatch):
        dataset = files_of_documents(tmp_path, files=4)
        streams = [RowStream(dataset, rank=rank, world_size=2) for rank in range(2)]
        opened = []
        shard = type(dataset).shard

        def noting(self, num_shards, index, **kwargs):
            opened.append(index)
            return shard(self, num_shards, index, **kwargs)

        monkeypatch.setattr(type(dataset), "shard", noting)
        found = [[row["texts"][0] for _, row in stream.rows(0)] for stream in streams]
        assert opened == [0, 2, 1, 3]
        assert found[0] == [f"the ring {file} {i}" for file in (0, 2) for i in range(3)]
        assert found[1] == [f"the ring {file} {i}" for file in (1, 3) for i in range(3)]

    def test_more_processes_than_files_take_turns(self, tmp_path):
        dataset = files_of_documents(tmp_path, files=2, rows_per_file=5)
        found = [
            [row["texts"][0] for _, row in RowStream(dataset, rank=rank, world_size=4).rows(0)] for rank in range(4)
        ]
        # processes 0 and 2 share the first file, 1 and 3 the second; its fifth row has no partner
        assert found[0] == ["the ring 0 0", "the ring 0 2"] and found[2] == ["the ring 0 1", "the ring 0 3"]
        assert found[1] == ["the ring 1 0", "the ring 1 2"] and found[3] == ["the ring 1 1", "the ring 1 3"]

    @pytest.mark.parametrize("world_size", [1, 2, 3, 5])
    def test_which_rows_are_held_out_does_not_depend_on_processes(self, tmp_path, world_size):
        dataset = files_of_documents(tmp_path, files=3, rows_per_file=4)
        held_out, read = set(), set()
        for part, into in (("held_out", held_out), ("train", read)):
            for rank in range(world_size):
                stream = RowStream(dataset, 3, part, rank, world_size)
                into.update(row["texts"][0] for _, row in stream.rows(0))
        # every third row of each file, counted from 0, 1 and 2 on: rows 2; 1; 0 and 3
        all_held_out = {"the ring 0 2", "the ring 1 1", "the ring 2 0", "the ring 2 3"}
        assert held_out <= all_held_out and not read & all_held_out
        if world_size in (1, 3):  # no section is shared, so that none is left over
            assert held_out == all_held_out and len(read) == 8

    def test_an_index_names_one_row(self, tmp_path):
        dataset = files_of_documents(tmp_path, files=3)
        stream = RowStream(dataset)
        found = list(stream.rows(0))
        assert len({index for index, _ in found}) == 9
        assert list(stream.rows(0, 4)) == found[4:]

    @pytest.mark.slow  # datasets waits five seconds for every shuffled file
    @pytest.mark.parametrize("files", [1, 3])
    def test_an_order_of_its_own_in_every_epoch(self, tmp_path, files):
        dataset = files_of_documents(tmp_path, files=files, rows_per_file=8).shuffle(seed=0, buffer_size=8)
        epochs = [[row["texts"][0] for _, row in RowStream(dataset).rows(epoch)] for epoch in (0, 1, 1)]
        assert epochs[0] != epochs[1] == epochs[2] and sorted(epochs[0]) == sorted(epochs[1])

    def test_a_stream_of_one_file_is_one_section(self):
        assert RowStream(Stream(range(3))).num_sections == RowStream(list(range(3))).num_sections == 1


class TestShares:
    @pytest.mark.parametrize("world_size", [2, 3])
    def test_processes_read_parts_and_serve_the_same_batches(self, source, tmp_path, world_size):
        cache = filled(source, tmp_path, shard_tokens=60)

        def batches(rank, count):
            share = CacheShare(cache, rank, count, block_tokens=60 // count)
            buffer = ActivationBuffer(share, 12 // count, 60 // count, 3, rank)
            return [buffer.next_batch() for _ in range(60)]  # 720 tokens: more than an epoch

        assert cache.num_tokens < 720
        whole = batches(0, 1)
        parts = [batches(rank, world_size) for rank in range(world_size)]
        for number, batch in enumerate(whole):
            for name, value in batch.items():
                assert torch.equal(torch.cat([part[number][name] for part in parts]), value)

    def test_no_process_reads_what_another_trains_on(self, source, tmp_path):
        cache, read = filled(source, tmp_path, shard_tokens=60), []
        inner = cache.tokens
        cache.tokens = lambda start, stop: read.append((start, stop)) or inner(start, stop)
        place = (0, 0)
        for rank in range(2):
            share = CacheShare(cache, rank, 2, block_tokens=30)
            list(itertools.islice(share.batches(place), 3))
        parts = {part for start, stop in read for part in range(start // 30, stop // 30)}
        assert read[0] == (0, 30) and (30, 60) in read and len(parts) == len(read)

    def test_goes_on_from_any_place(self, source, tmp_path):
        share = CacheShare(filled(source, tmp_path, shard_tokens=60), 1, 2, block_tokens=30)
        found = list(itertools.islice(share.batches((0, 0)), 20))
        for number, (place, batch) in enumerate(found):
            again = list(itertools.islice(share.batches(place), 3))
            assert again[0][0] == place and torch.equal(again[0][1].states, batch.states)
            assert [item[0] for item in again] == [item[0] for item in found[number : number + 3]] or number > 17

    def test_its_beginning_is_that_of_all(self, source, tmp_path):
        cache = filled(source, tmp_path, shard_tokens=60)
        for rank in range(2):
            assert torch.equal(CacheShare(cache, rank, 2, 50).first(70).states, states(cache, 0, 70))
        assert len(CacheShare(cache, 1, 2, 20).first(70)) == 40  # the first block has no more


class Team:
    """Processes played by threads: `in_every_process` of the module, for as many threads as there are processes."""

    def __init__(self, count: int):
        self.count, self.outcomes, self.own = count, [None] * count, threading.local()
        self.barrier = threading.Barrier(count, timeout=60)

    def in_every_process(self, work, world_size):
        if world_size == 1:
            return [work()]
        try:
            outcome = work(), None
        except Exception as error:
            outcome = None, error
        self.outcomes[self.own.rank] = outcome
        self.barrier.wait()
        outcomes = list(self.outcomes)
        self.barrier.wait()
        failed = next((error for _, error in outcomes if error is not None), None)
        if failed is not None:
            raise failed
        return [result for result, _ in outcomes]

    def run(self, work) -> list:
        """`work(rank)` in each of the processes."""

        def one(rank):
            self.own.rank = rank
            return work(rank)

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(one, range(self.count)))


def filled_by(count, source, folder, monkeypatch, dataset=None, max_tokens=None, **kwargs) -> list[ActivationCache]:
    """The same cache as each of several processes has it that fill it together."""
    team, key = Team(count), cache_key(source)
    monkeypatch.setattr(cache_filling, "in_every_process", team.in_every_process)

    def fill(rank):
        stream = RowStream(dataset or source.stream.dataset, rank=rank, world_size=count, seed=source.stream.seed)
        cache = ActivationCache(folder, key, "float32", **kwargs)
        cache.fill(HarvestedTokens(source.harvester, stream, 2), 32, max_tokens)
        return cache

    return team.run(fill)


def same_files(one, two):
    files = sorted(path.name for path in one.glob("*.safetensors"))
    assert files == sorted(path.name for path in two.glob("*.safetensors")) and len(files) > 2
    for file in files:
        ours, theirs = load_file(one / file), load_file(two / file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


class TestFilling:
    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_what_is_in_it_does_not_depend_on_the_number_of_processes(self, source, tmp_path, count, monkeypatch):
        whole = filled(source, tmp_path / "one", shard_tokens=60)
        caches = filled_by(count, source, tmp_path / "some", monkeypatch, shard_tokens=60)
        same_files(tmp_path / "one", tmp_path / "some")
        for cache in caches:
            assert cache.complete and cache.index == whole.index

    def test_nor_on_it_for_a_stream_of_files(self, llava, processor, tmp_path, monkeypatch):
        dataset = files_of_documents(tmp_path)
        stream = HarvestedTokens(harvester(llava, processor), RowStream(dataset), 2)
        for count in (1, 2):
            filled_by(count, stream, tmp_path / str(count), monkeypatch, dataset, max_tokens=10**6, shard_tokens=20)
        same_files(tmp_path / "1", tmp_path / "2")
        cache = ActivationCache(tmp_path / "2", cache_key(stream), "float32")
        expected = sum(len(batch) for _, batch in stream.epoch_batches(0))
        assert cache.num_tokens == expected and cache.index["ended_sections"] == [0, 1, 2]

    def test_processes_share_the_work(self, source, tmp_path, monkeypatch):
        made, make = [], cache_filling._Filling._make

        def noting(self, number):
            made.append((self.stream.rank, number))
            return make(self, number)

        monkeypatch.setattr(cache_filling._Filling, "_make", noting)
        filled_by(2, source, tmp_path, monkeypatch, shard_tokens=60)
        assert sorted(made, key=lambda item: item[1]) == [(number % 2, number) for number in range(6)]  # 5 have rows

    def test_a_limit_is_that_of_all_and_leaves_nothing_beyond(self, source, tmp_path, monkeypatch):
        one = ActivationCache(tmp_path / "one", cache_key(source), "float32", shard_tokens=60)
        one.fill(source, 32, max_tokens=60)
        caches = filled_by(3, source, tmp_path / "three", monkeypatch, max_tokens=60, shard_tokens=60)
        for cache in caches:
            assert cache.index["shards"] == one.index["shards"] and cache.num_tokens >= 60
        assert len(list((tmp_path / "three").glob("*.safetensors"))) == len(one.index["shards"]) < 5
        filled_by(2, source, tmp_path / "three", monkeypatch, shard_tokens=60)  # goes on, with another number
        filled(source, tmp_path / "whole", shard_tokens=60)
        same_files(tmp_path / "whole", tmp_path / "three")

    def test_what_another_run_has_filled_meanwhile_is_not_made_again(self, source, tmp_path, monkeypatch):
        late = ActivationCache(tmp_path, cache_key(source), "float32")  # begins with nothing, as the other does
        other_layer = ActivationCache(tmp_path, cache_key(source) | {"layer": 1}, "float32")
        other_rows = ActivationCache(tmp_path, cache_key(source) | {"first_row": "another"}, "float32")
        first = filled(source, tmp_path)
        monkeypatch.setattr(source.harvester, "of_layers", lambda *_: pytest.fail("it is harvested again"))
        late.fill(source, 32)
        assert late.complete and torch.equal(states(late), states(first))
        with pytest.raises(ValueError, match="holds the states of layer 2, and those of layer 1 are wanted"):
            other_layer.fill(source, 32)
        with pytest.raises(ValueError, match="made for something else: first_row is"):
            other_rows.fill(source, 32)
        assert not (tmp_path / ".lock").exists()

    def test_the_main_process_decides_whether_anything_is_missing(self, source, tmp_path, monkeypatch):
        """Of two processes that start while another run ends one may have read the index before, one after it."""
        before = ActivationCache(tmp_path, cache_key(source), "float32")
        filled(source, tmp_path)
        caches, team = [ActivationCache(tmp_path, cache_key(source), "float32"), before], Team(2)
        monkeypatch.setattr(cache_filling, "in_every_process", team.in_every_process)

        def fill(rank):
            stream = RowStream(source.stream.dataset, rank=rank, world_size=2, seed=source.stream.seed)
            caches[rank].fill(HarvestedTokens(source.harvester, stream, 2), 32)

        team.run(fill)
        assert before.complete and before.index == caches[0].index

    def test_a_full_cache_is_nobody_s_alone(self, source, tmp_path):
        cache = filled(source, tmp_path)
        with alone_with(tmp_path / ".lock", "held"):
            cache.fill(source, 32)

    def test_what_a_killed_run_left_goes(self, source, tmp_path):
        for name in ("shard-00077.safetensors", ".tmpX2k341"):
            (tmp_path / name).write_bytes(b"half")
        cache = filled(source, tmp_path, shard_tokens=60)
        names = {shard["file"] for shard in cache.index["shards"]} | {"index.json"}
        assert {path.name for path in tmp_path.iterdir()} == names

    def test_what_fails_in_one_process_fails_in_all(self, source, tmp_path, monkeypatch):
        write = cache_filling._Filling._stored

        def full(self, states):
            if self.stream.rank == 1:
                raise OSError("no space left")
            return write(self, states)

        monkeypatch.setattr(cache_filling._Filling, "_stored", full)
        with pytest.raises(OSError, match="no space left"):
            filled_by(2, source, tmp_path, monkeypatch, shard_tokens=60)
        assert not (tmp_path / "index.json").exists() and not (tmp_path / ".lock").exists()
        monkeypatch.setattr(cache_filling._Filling, "_stored", write)
        filled_by(2, source, tmp_path, monkeypatch, shard_tokens=60)
        filled(source, tmp_path / "one", shard_tokens=60)
        same_files(tmp_path / "one", tmp_path)

    def test_several_layers_out_of_one_pass(self, source, processor, tmp_path, monkeypatch):
        alone = {layer: None for layer in (1, 2, 4)}
        for layer in alone:
            of_layer = HarvestedTokens(harvester(source.harvester, processor, layer), source.stream, 2)
            alone[layer] = of_layer, filled(of_layer, tmp_path / f"layer{layer}", shard_tokens=60)
        passes = []
        vlm = source.harvester.vlm
        handle = vlm.get_input_embeddings().register_forward_hook(lambda *_: passes.append(1))
        together = filled(source, tmp_path / "all", shard_tokens=60, layers=[4, 1])
        handle.remove()
        assert len(passes) == 5 and together.index["layers"] == [1, 2, 4]  # nine rows, two at a time
        for of_layer, cache in alone.values():
            read = ActivationCache(tmp_path / "all", cache_key(of_layer), "float32")
            assert read.complete and torch.equal(states(read), states(cache))
        other = HarvestedTokens(harvester(source.harvester, processor, 3), source.stream, 2)
        with pytest.raises(ValueError, match="of layer 1, 2, 4, and those of layer 3 are wanted. .*cache_layers"):
            ActivationCache(tmp_path / "all", cache_key(other), "float32")

    def test_size_with_several_layers(self):
        assert cache_bytes(10, d_in=4, dtype="float16", num_layers=3) == 10 * (3 * 4 * 2 + 1)


class TestPlaces:
    def test_behind_a_url(self, source, tmp_path):
        url = f"memory://{uuid.uuid4().hex}/cache"
        there, here = filled(source, url, shard_tokens=60), filled(source, tmp_path, shard_tokens=60)
        assert there.index == here.index
        again = ActivationCache(url, cache_key(source), "float32")
        assert again.complete and torch.equal(states(again, 50, 300), states(here, 50, 300))

    def test_a_url_of_no_known_kind(self, source):
        with pytest.raises(ValueError, match="'nowhere://cache' cannot be written to"):
            ActivationCache("nowhere://cache", cache_key(source))

    def test_only_the_bytes_that_are_wanted_are_read(self, source, tmp_path, monkeypatch):
        cache, read = filled(source, tmp_path, shard_tokens=60, layers=[4]), []

        class Noting:
            def __init__(self, file):
                self.file = file

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self.file.close()

            def read(self, count):
                return self.file.read(count)

            def seek(self, place):
                return self.file.seek(place)

            def readinto(self, room):
                read.append(len(room))
                return self.file.readinto(room)

        states(cache, 0, 1)  # looks the shard's header up
        monkeypatch.setattr(cache.shards.folder, "open", lambda name: Noting(open(tmp_path / name, "rb")))
        states(cache, 3, 10)
        assert sorted(read) == [7, 7 * 32 * 4]


class TestDamage:
    def test_a_shard_that_is_missing(self, source, tmp_path):
        cache = filled(source, tmp_path, shard_tokens=60)
        (tmp_path / cache.index["shards"][1]["file"]).unlink()
        with pytest.raises(ValueError, match=f"shard-00001.safetensors, which the index names, .*folder {tmp_path}"):
            states(cache)

    @pytest.mark.parametrize("size", [4, 400, -100])
    def test_a_shard_that_is_cut(self, source, tmp_path, size):
        cache = filled(source, tmp_path, shard_tokens=60)
        file = tmp_path / cache.index["shards"][1]["file"]
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(ValueError, match="shard-00001.safetensors, which the index names, cannot be read"):
            states(cache)

    def test_a_shard_with_other_tokens_than_the_index_says(self, source, tmp_path):
        cache = filled(source, tmp_path, shard_tokens=60)
        shard = cache.index["shards"][1]
        tensors = {name: value[1:].contiguous() for name, value in load_file(tmp_path / shard["file"]).items()}
        cache.shards.write(1, tensors)
        said = f"holds {shard['tokens'] - 1} states and .* its index says {shard['tokens']} tokens; delete the folder"
        with pytest.raises(ValueError, match=said):
            states(ActivationCache(tmp_path, cache_key(source), "float32"))

    @pytest.mark.parametrize("damage", [{"shards": [3]}, {"layers": None}, {"complete": "yes"}, {"key": []}])
    def test_a_wrong_index(self, source, tmp_path, damage):
        filled(source, tmp_path)
        index = json.loads((tmp_path / "index.json").read_text())
        (tmp_path / "index.json").write_text(json.dumps(index | damage))
        with pytest.raises(ValueError, match=f"index.json is damaged .*delete the folder {tmp_path}"):
            ActivationCache(tmp_path, cache_key(source), "float32")

    def test_a_cache_of_an_older_version(self, source, tmp_path):
        old = tmp_path / "process-0"
        old.mkdir()
        (old / "index.json").write_text("{}")
        with pytest.raises(ValueError, match=f"a folder for each process .* Delete the folder {tmp_path}"):
            ActivationCache(tmp_path, cache_key(source))
