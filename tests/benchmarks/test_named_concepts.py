"""The benchmark of named concepts: shares by hand, records that go on where they stopped, records that are refused."""

import json
import sys

import numpy as np
import pytest
from places import ROOT

from segcompass_hf.explain.dictionary.dictionary import ConceptDictionary
from segcompass_hf.explain.dictionary.entries import ConceptEntry
from segcompass_hf.explain.dictionary.names import ConceptName

sys.path.insert(0, str(ROOT / "benchmarks"))
import named_concepts  # noqa: E402

ANSWER = ConceptName("answer 1", "role", "words", 0.9, 0.95, 0.02, 1.0, 2.0)
RARE = ConceptName("a word", "word", "words", 0.3, 0.9, 0.02, 1.0, 1.0)
POOR = ConceptName("place e4", "place", "words", 0.5, 0.5, 0.02, 1.0, 1.0)


@pytest.fixture(scope="module")
def dictionary():
    entries = [
        ConceptEntry(0, names=[ANSWER]),
        ConceptEntry(1, label="red", purity=0.9, names=[POOR, ANSWER]),
        ConceptEntry(2, label="blue", purity=0.5),
        ConceptEntry(3, names=[RARE]),
    ]
    info = {"d_sae": 4, "rows": 10, "rows_derive": 6, "rows_score": 4}
    return ConceptDictionary(entries, {}, [], info, np.zeros(1, np.float32))


def record(sample, *features):
    return {"sample": sample, "slot": 0, "features": [[f, share, [[False, 1.5, share]]] for f, share in features]}


def test_shares_by_hand(dictionary):
    mask = record(0, (0, 0.4), (1, 0.3), (2, 0.2), (3, 0.1))
    found = named_concepts.scores(dictionary, mask)
    assert found["label"] == (pytest.approx(0.5), False) and found["pure label"] == (pytest.approx(0.3), False)
    # Feature 1 has a first name that does not hold; the second is not taken in its place.
    assert found["name"] == (pytest.approx(0.5), True) and found["f1"] == (pytest.approx(0.4), True)
    # Feature 0 fires on a word at 1.5 and, below its threshold there, on a patch at 1.5.
    mask["features"][0][2] = [[False, 1.5, 0.1], [True, 1.5, 0.3]]
    assert named_concepts.scores(dictionary, mask)["firing"] == (pytest.approx(0.4 * 0.25 + 0.1), True)


def test_summary_counts_scenes_without_masks_and_lists_what_has_no_name(dictionary):
    records = [record(0, (0, 1.0)), record(0, (1, 0.6), (3, 0.4)), {"sample": 1}, record(2, (2, 1.0))]
    summary = named_concepts.summarize(dictionary, records)
    assert (summary["scenes"], summary["masks"]) == (3, 3)
    mean, low, high = summary["ways"]["name"]["contribution"]
    assert mean == pytest.approx((1.0 + 0.4 + 0.0) / 3) and low <= mean <= high
    assert summary["ways"]["name"]["first"][0] == pytest.approx(1 / 3)
    assert [one["feature"] for one in summary["unnamed"]] == [2, 1]
    assert summary["unnamed"][1]["candidates"] == ["place e4", "answer 1"]
    assert summary["features"] == {"named": 2, "role": 1, "word": 1}
    result = {"command": "python x", "split": "val", "seed": 9, "dictionary": dictionary.info, **summary}
    text = named_concepts.markdown(result)
    assert "3 masks of 3 scenes of `val`, seed 9" in text and "80% of the contribution (not reached)" in text
    assert "| names that hold | 46.7 %" in text


def test_records_of_something_else_are_refused(tmp_path):
    path, key = tmp_path / "new" / "named.jsonl", {"weights": "a", "split": "val", "seed": 1}
    assert named_concepts.read_records(path, key) == []
    with path.open("a") as file:
        file.write(json.dumps({"sample": 0}) + "\n")
    assert named_concepts.read_records(path, key) == [{"sample": 0}]
    with pytest.raises(SystemExit, match="remove it"):
        named_concepts.read_records(path, key | {"seed": 2})
