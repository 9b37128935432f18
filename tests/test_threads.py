# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Threads on one model and one processor get the answers that they would get one by one."""

import copy
import os
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiny
import torch

from segcompass_hf import ReasoningSegmentationPipeline
from segcompass_hf.explain import explain
from segcompass_hf.threads_segcompass import tokenizer_lock

THREADS = 8
WORDS = ["the red circle", "all the blue squares left of the small green ring", "the ring", "the second square"]


@pytest.fixture(autouse=True)
def threads_change_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl"])
def parts(request):
    """Qwen keeps the positions of the newest prompt on the module: hooks are not all that calls share."""
    return tiny.tiny_model(request.param), tiny.tiny_processor(request.param)


def sample(number: int) -> dict:
    """One request: image and instruction both differ from those of its neighbours."""
    return {"images": tiny.tiny_image(number % 7, (30 + 5 * (number % 5), 40)), "instruction": WORDS[number % 4]}


def side_by_side(request, count: int) -> list:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(request, range(count)))


def assert_same(answers: list[dict], expected: list[dict]) -> None:
    assert len({tuple(answer["ids"]) for answer in expected}) > 1  # else mixed up answers would pass
    for answer, other in zip(answers, expected, strict=True):
        assert answer["ids"] == other["ids"]
        assert torch.equal(answer["maps"], other["maps"])


@pytest.mark.slow
def test_200_requests_of_every_kind_at_once(parts):
    """`segment`, `forward` and `generate` in turn, so that each stands beside the others."""
    model, processor = parts

    def request(number: int) -> dict:
        inputs = processor(**sample(number))
        if number % 3 == 0:
            output = model.segment(**inputs, max_new_tokens=10)
            return {"ids": output.sequences[0].tolist(), "maps": output.pred_masks}
        if number % 3 == 1:
            with torch.no_grad():
                output = model(**inputs, output_concepts=True)
            return {"ids": output.concepts.features.tolist(), "maps": output.logits}
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        return {"ids": ids[0].tolist(), "maps": ids}

    assert_same(side_by_side(request, 200), [request(number) for number in range(200)])


def test_a_model_in_training_mode_is_left_in_it(parts):
    """One call must not switch dropout back on while another one answers."""
    model, processor = parts
    expected = [model.segment(**processor(**sample(number)), max_new_tokens=9).pred_masks for number in range(24)]
    model.train()
    try:
        masks = side_by_side(lambda i: model.segment(**processor(**sample(i)), max_new_tokens=9).pred_masks, 24)
        assert all(module.training for module in model.modules())
    finally:
        model.eval()
    assert all(torch.equal(one, other) for one, other in zip(masks, expected, strict=True))


def test_one_pipeline_for_all_threads(parts):
    model, processor = parts
    pipe = ReasoningSegmentationPipeline(model, processor=processor, task="reasoning-segmentation", device="cpu")

    def request(number: int) -> dict:
        pair = [sample(number), sample(number + 1)]  # a batch: prompts of two lengths are padded
        answers = pipe(
            [{"image": one["images"], "instruction": one["instruction"]} for one in pair],
            batch_size=2,
            reasoning="short",
            max_new_tokens=12,
            slot_logit_threshold=-1e9,
        )
        masks = [np.asarray(segment["mask"]).tobytes() for one in answers for segment in one["segments"]]
        return {"ids": [answer["reasoning"] for answer in answers] + masks, "maps": torch.zeros(0)}

    assert_same(side_by_side(request, 40), [request(number) for number in range(40)])


def test_explanations_at_once(parts):
    model, processor = parts

    def request(number: int) -> dict:
        one = sample(number)
        explanation = explain(
            model, processor, one["images"], one["instruction"], num_ablations=1, max_new_tokens=10, max_concepts=3
        )
        concepts = [concept for mask in explanation.masks for concept in mask.concepts]
        maps = torch.tensor([concept.contribution for concept in concepts])
        return {"ids": [explanation.text, *(concept.feature for concept in concepts)], "maps": maps}

    assert_same(side_by_side(request, 8), [request(number) for number in range(8)])


def test_batches_of_one_processor_keep_their_padding():
    """How a fast tokenizer pads is its state: a call in between must not take the padding of another away."""
    processor = tiny.tiny_processor()
    image = tiny.tiny_image()

    def request(number: int) -> torch.Tensor:
        words = WORDS if number % 2 else WORDS[:1]
        return processor(images=[image] * len(words), instruction=words, reasoning=["left"] * len(words))["input_ids"]

    expected = [request(0), request(1)]
    for number, ids in enumerate(side_by_side(request, 60)):
        assert torch.equal(ids, expected[number % 2])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_a_lock_of_its_own(copied):
    model = tiny.tiny_model()
    with model.call_lock:
        twin = copied(model)
        with ThreadPoolExecutor(1) as pool:  # waits for ever where the copy shares the lock, or has a locked one
            ids = pool.submit(twin.generate, **tiny.tiny_processor()(**sample(0)), max_new_tokens=2).result(timeout=60)
    assert ids.shape[0] == 1


def test_saving_knows_nothing_of_the_lock(tmp_path):
    model = tiny.tiny_model()
    model.save_pretrained(tmp_path)
    assert not any("lock" in name for name in model.state_dict())
    assert "call_lock" not in (tmp_path / "config.json").read_text()
    assert type(model).from_pretrained(tmp_path).call_lock is not model.call_lock


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_process_forked_while_another_thread_tokenizes_can_tokenize():
    held, release = threading.Event(), threading.Event()

    def hold():
        with tokenizer_lock:
            held.set()
            release.wait(0.2)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()  # waits for the thread to let go
    if child == 0:
        os._exit(0 if tokenizer_lock.acquire(timeout=5) else 1)
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
