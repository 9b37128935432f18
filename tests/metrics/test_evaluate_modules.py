"""The metrics as an `evaluate` module: loaded from its folder without network, streamed, shared among processes."""

import multiprocessing
import socket
import sys

import numpy as np
import pytest

from segcompass_hf.data.schema import encode_mask
from segcompass_hf.metrics import ALL_METRIC_NAMES, evaluate_module_path, segmentation_metrics

EMPTY = np.zeros((2, 3), dtype=bool)
RIGHT, HALF = np.array([[1, 1, 0], [0, 0, 0]], bool), np.array([[1, 0, 0], [0, 0, 0]], bool)

# IoU 1, 1/2, 1 (both empty), 0 (invented), 0 (missed): gIoU 2.5 / 5; intersections 2 + 1, unions 2 + 2 + 1 + 2;
# one of two samples without target is left alone; two of three with target answered; IoU >= 0.5 twice of three.
PREDICTIONS = [RIGHT, HALF, EMPTY, HALF, EMPTY]
REFERENCES = [RIGHT, RIGHT, EMPTY, EMPTY, RIGHT]
EXPECTED = {
    "gIoU": 0.5,
    "cIoU": 3 / 7,
    "N-acc": 0.5,
    "T-acc": 2 / 3,
    "precision@0.5": 2 / 3,
    "precision@0.7": 1 / 3,
    "precision@0.9": 1 / 3,
}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """`evaluate.load` of the module, with every cache in a folder of the test and no way to the network."""
    evaluate = pytest.importorskip("evaluate")

    def refuse(*args, **kwargs):
        raise AssertionError("loading the module reached for the network")

    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", folder / "modules")
        patch.setattr(sys, "path", list(sys.path))
        yield lambda **kwargs: evaluate.load(evaluate_module_path(), cache_dir=str(folder / "data"), **kwargs)


def test_all_at_once(load):
    result = load().compute(predictions=PREDICTIONS, references=REFERENCES)
    assert list(result) == list(ALL_METRIC_NAMES) and result == pytest.approx(EXPECTED)
    assert {name: result[name] for name in list(result)[:4]} == segmentation_metrics(PREDICTIONS, REFERENCES)


def test_streamed_in_batches_of_any_size_and_one_by_one(load):
    metric = load()
    metric.add_batch(predictions=PREDICTIONS[:2], references=REFERENCES[:2])
    big = np.zeros((3, 40, 50), bool)
    metric.add_batch(predictions=[big], references=[big])  # of another size, and several masks
    for prediction, reference in zip(PREDICTIONS[3:], REFERENCES[3:], strict=True):
        metric.add(prediction=prediction, reference=reference)
    assert metric.compute() == pytest.approx(EXPECTED)
    metric.add(prediction=RIGHT, reference=RIGHT)  # the next evaluation starts afresh
    assert metric.compute() == dict.fromkeys(ALL_METRIC_NAMES, 1.0)


def test_every_form_of_masks(load):
    rle = [encode_mask(mask) for mask in (RIGHT, HALF)]
    predictions = [rle[0], [rle[1]], [], HALF.tolist(), np.zeros((0, 2, 3))]
    references = [[rle[0], rle[1]], rle[0], [], [], RIGHT.astype(int)]
    assert load().compute(predictions=predictions, references=references) == pytest.approx(EXPECTED)


def test_uncompressed_run_lengths_and_one_name(load):
    # Down the columns of 2: RIGHT is 1, 0, 1, 0, 0, 0; HALF is 1, 0, 0, 0, 0, 0.
    right, half = {"size": [2, 3], "counts": [0, 1, 1, 1, 3]}, {"size": [2, 3], "counts": [0, 1, 5]}
    metric = load()
    assert metric.compute(predictions=[half], references=[RIGHT], metrics="gIoU") == {"gIoU": 0.5}
    assert metric.compute(predictions=[[right, half]], references=[right], metrics=["cIoU"]) == {"cIoU": 1.0}
    with pytest.raises(ValueError, match="sample 0 of the batch: the runs of the mask cover 5 pixels"):
        metric.add_batch(predictions=[{"size": [2, 3], "counts": [0, 5]}], references=[RIGHT])


def test_tensors(load):
    torch = pytest.importorskip("torch")
    predictions = [torch.tensor(HALF, dtype=torch.bfloat16), torch.tensor(RIGHT.astype(float), requires_grad=True)]
    assert load().compute(predictions=predictions, references=[RIGHT, RIGHT], metrics="gIoU") == {"gIoU": 0.75}


def test_a_target_that_is_ignored_as_a_whole_is_left_out(load):
    metric = load()
    metric.add(prediction=EMPTY, reference=HALF, ignore=RIGHT, group="hidden")
    metric.add(prediction=HALF, reference=RIGHT, group="seen")
    result = metric.compute(intervals=True)
    assert result["gIoU"] == result["cIoU"] == 0.5 and result["T-acc"] == result["N-acc"] == 1.0
    assert [result["intervals"][name]["num_samples"] for name in ("gIoU", "N-acc", "T-acc")] == [1, 0, 1]
    assert result["by_group"]["hidden"]["gIoU"]["num_samples"] == 0


def test_ignored_pixels_intervals_and_groups(load):
    metric = load(keep_in_memory=True)
    everything_else = ~HALF
    result = metric.compute(
        predictions=[HALF, HALF, RIGHT],
        references=[RIGHT, RIGHT, RIGHT],
        ignore=[None, everything_else, encode_mask(EMPTY)],
        groups=["place", "colour", "colour"],
        metrics=["gIoU", "cIoU"],
        intervals=True,
    )
    # IoU 1/2, 1 (only the one right pixel counts), 1; intersections 1 + 1 + 2, unions 2 + 1 + 2.
    assert (result["gIoU"], result["cIoU"]) == (pytest.approx(2.5 / 3), 4 / 5)
    interval = result["intervals"]["gIoU"]
    assert interval["value"] == result["gIoU"] and interval["num_samples"] == 3
    assert 0.5 <= interval["low"] < result["gIoU"] < interval["high"] <= 1
    assert {group: figures["gIoU"]["value"] for group, figures in result["by_group"].items()} == {
        "colour": 1.0,
        "place": 0.5,
    }


def _share_of_one_process(load, process_id, results):
    metric = load(num_process=2, process_id=process_id, experiment_id="two")
    metric.add_batch(predictions=PREDICTIONS[process_id::2], references=REFERENCES[process_id::2])
    results.put((process_id, metric.compute()))


def test_two_processes_are_one(load):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_share_of_one_process, args=(load, index, results)) for index in (0, 1)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(10)
    assert found[1] is None and found[0] == load().compute(predictions=PREDICTIONS, references=REFERENCES)


def test_what_goes_wrong_says_which_sample(load):
    metric = load()
    with pytest.raises(ValueError, match="sample 1 of the batch: masks of one sample differ in size"):
        metric.add_batch(predictions=[HALF, np.zeros((5, 5))], references=[HALF, HALF])
    with pytest.raises(ValueError, match="differ in length.*'ignore': 1"):
        metric.add_batch(predictions=[HALF, HALF], references=[HALF, HALF], ignore=[None])
    with pytest.raises(ValueError, match="references are missing"):
        metric.compute(predictions=[HALF])
    with pytest.raises(ValueError, match="'mIoU' is no metric"):
        metric.compute(predictions=[HALF], references=[HALF], metrics=["mIoU"])
    with pytest.raises(ValueError, match=r"no evaluate module 'giou'; expected one of \['segmentation'\]"):
        evaluate_module_path("giou")
