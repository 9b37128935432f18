"""Batches of prompts of like length: every question once, and every image encoded before it is asked about."""

import copy
import io
import threading

import pytest
import tiny
import torch

from segcompass_hf.bulk import batches
from segcompass_hf.bulk.batches import BatchMaker, read_ahead
from segcompass_hf.bulk.shards import Shard, SourceRow
from segcompass_hf.data.vlm_texts import RowTextCheck


def encoded(index, size=(20, 16)):
    file = io.BytesIO()
    tiny.tiny_image(index, size).save(file, "PNG")
    return file.getvalue()


class Given:
    """A source of given rows."""

    name = "given"

    def __init__(self, rows):
        self.rows, self.shards = rows, [Shard(0, "", 0, len(rows))]

    def read(self, shard):
        yield from self.rows


def row(index, image, instruction):
    return SourceRow("given", index, f"row {index}", image, instruction)


@pytest.fixture(scope="module")
def processor():
    return tiny.tiny_processor("llava")


def made(processor, rows, instructions=(), batch_size=3):
    maker = BatchMaker(processor, RowTextCheck(processor, with_reasoning=False), Given(rows), instructions, batch_size)
    return list(maker.batches(Given(rows).shards))


def test_a_window_is_sorted_by_length(processor):
    words = ["red " * count for count in (9, 1, 5, 7, 2, 8, 3)]
    found = made(processor, [row(index, encoded(index), words[index] + "ring") for index in range(7)])
    assert [[question.place for question in batch.questions] for batch in found] == [[1, 4, 6], [2, 3, 5], [0], []]
    assert [batch.is_last for batch in found] == [False, False, False, True]
    tokens = [question.num_tokens for batch in found for question in batch.questions]
    assert tokens == sorted(tokens)
    inputs, pixels = found[1].inputs.result()
    assert tokens[5] == inputs["input_ids"].shape[1]  # the longest of the second batch, counted with its image
    assert len(pixels) == 3 and "sam_pixel_values" not in inputs


def test_images_are_new_once_and_done_with_once(processor):
    rows = [row(0, encoded(0), ["a", "b " * 9]), row(1, encoded(1), "c " * 4), row(2, encoded(0), "d " * 6)]
    found = made(processor, rows, batch_size=1)
    keys = [batch.questions[0].key for batch in found[:-1]]
    first, second = keys[0], keys[1]
    assert keys == [first, second, first, first] and first != second
    assert [batch.new for batch in found[:-1]] == [[first], [second], [], []]
    assert [batch.done_with for batch in found[:-1]] == [set(), {second}, set(), {first}]
    assert [batch.inputs.result()[1] is None for batch in found[:-1]] == [False, False, True, True]


def test_every_problem_is_a_question(processor):
    rows = [row(0, encoded(0), ""), row(1, encoded(1), None), row(2, encoded(2), 7), row(3, None, "x")]
    rows += [row(4, b"nothing", "x"), row(5, "/nowhere/x.png", "x"), row(6, encoded(6), "red " * 9000)]
    rows += [row(7, encoded(7), []), row(8, encoded(8), ["right", ""])]
    found = made(processor, rows)
    failed = {(q.columns["row"], q.columns["question"]): q.problem for q in found[-1].questions}
    assert sorted(failed) == [*((index, 0) for index in range(8)), (8, 1)]
    assert [(q.columns["row"], q.columns["question"]) for b in found[:-1] for q in b.questions] == [(8, 0)]
    assert "instruction is None" in failed[1, 0] and "instruction is 7" in failed[2, 0]
    assert "no image" in failed[3, 0] and "cannot be read as an image" in failed[4, 0]
    assert "No such file" in failed[5, 0] and "model_max_length" in failed[6, 0]


def test_a_window_ends_before_its_images_fill_the_memory(processor, monkeypatch):
    monkeypatch.setattr(batches, "PIXELS_PER_WINDOW", 2 * 20 * 16)
    words = ["red " * count for count in (5, 4, 3, 2, 1)]
    found = made(processor, [row(index, encoded(index), words[index]) for index in range(5)])
    assert [[question.place for question in batch.questions] for batch in found[:-1]] == [[1, 0], [3, 2], [4]]


def test_reading_ahead_stops_at_its_depth_and_hands_errors_on():
    read, go_on = [], threading.Event()

    def numbers():
        for number in range(10):
            read.append(number)
            if number == 4:
                go_on.set()
            yield number
        raise ValueError("the end")

    items = read_ahead(numbers, 3)
    assert next(items) == 0
    assert go_on.wait(10)  # 0 is here, 1 to 3 wait, 4 is made
    assert read == [0, 1, 2, 3, 4]
    assert [next(items) for _ in range(9)] == list(range(1, 10))
    with pytest.raises(ValueError, match="the end"):
        next(items)
    before = threading.active_count()
    items = read_ahead(lambda: iter(range(100)), 3)
    next(items)
    items.close()
    assert threading.active_count() == before


def test_inputs_are_those_of_the_processor_also_where_image_tokens_lie(processor):
    grids = copy.copy(processor)
    grids.image_token_grids = True
    batch = made(grids, [row(0, encoded(0), "a ring"), row(1, encoded(1, (16, 24)), "a dot")])[0]
    inputs, pixels = batch.inputs.result()
    whole = grids(
        images=[question.image for question in batch.questions],
        instruction=[question.columns["instruction"] for question in batch.questions],
    )
    assert "image_token_grids" in inputs and set(inputs) | {"sam_pixel_values"} == set(whole)
    for name, value in (inputs | {"sam_pixel_values": pixels}).items():
        assert torch.equal(value, whole[name]), name
