"""Names of concepts: read from the header of a dictionary, of the right SAE; unknown ones with near ones."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny import tiny_model

from segcompass_hf.concept_names_segcompass import (
    NUMBERS_FILE,
    NamedConcept,
    find_concepts,
    is_same_sketch,
    names_header,
    names_of,
    read_names,
    sae_sketch,
)

RED, PERSON = NamedConcept("red", (7, 9), (0.25, 1.5)), NamedConcept("person", (3,), (0.5,))
KNOWN = {"red": RED, "person": PERSON}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def write(folder, sketch, names=(RED, PERSON)):
    header = {} if names is None else {"names": names_header(names)}
    # A first array of odd length: the sketch does not begin where the data do.
    arrays = {"pictures": np.zeros(3, np.uint8), "sae_sketch": sketch}
    save_file(arrays, folder / NUMBERS_FILE, metadata={"format": "x", **header})
    return folder / NUMBERS_FILE


def test_what_is_written_is_read(tmp_path):
    sketch = np.arange(5, dtype=np.float32)
    names, read = read_names(write(tmp_path, sketch))
    assert names == KNOWN and np.array_equal(read, sketch)


def test_names_lie_beside_the_checkpoint(tmp_path, model, monkeypatch):
    monkeypatch.setattr(model.config, "_name_or_path", str(tmp_path))
    with pytest.raises(ValueError, match="no concept dictionary beside the model .*ConceptDictionary.build"):
        names_of(model)
    write(tmp_path, sae_sketch(model.sae))
    assert names_of(model) == KNOWN
    write(tmp_path, sae_sketch(model.sae) + 1)
    with pytest.raises(ValueError, match="another SAE"):
        names_of(model)
    monkeypatch.setattr(model.config, "_name_or_path", "")
    with pytest.raises(ValueError, match="which comes from no folder"):
        names_of(model)


def test_a_sketch_outlives_rounding(model):
    sketch = sae_sketch(model.sae)
    assert is_same_sketch(sketch, sketch * (1 + 2**-8)) and not is_same_sketch(sketch, sketch[:-1])


@pytest.mark.parametrize(
    "content",
    [b"", b"x", (2**40).to_bytes(8, "little"), (2).to_bytes(8, "little") + b"{}", (4).to_bytes(8, "little") + b"null"],
)
def test_damaged_files_are_named(tmp_path, content):
    (tmp_path / NUMBERS_FILE).write_bytes(content)
    with pytest.raises(ValueError, match="concepts.safetensors' is no concept dictionary, or damaged"):
        read_names(tmp_path / NUMBERS_FILE)


def test_damaged_names_are_named(tmp_path):
    path = write(tmp_path, np.zeros(2, np.float32))
    for names in ("[]", '{"red": [[1], []]}', '{"red": 7}', "{"):
        save_file({"sae_sketch": np.zeros(2, np.float32)}, path, metadata={"names": names})
        with pytest.raises(ValueError, match="damaged"):
            read_names(path)


def test_a_file_of_an_older_version_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"without names; write it again: ConceptDictionary.load\(folder\)"):
        read_names(write(tmp_path, np.zeros(2, np.float32), names=None))


def test_names_are_found_in_any_case_and_stand_for_themselves():
    own = NamedConcept("mine", (1,), (0.0,))
    assert find_concepts([" Red ", own, "person"], KNOWN) == [RED, own, PERSON]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("persn", r"named 'persn'. Near: person. The dictionary knows person, red\."),
        ("zzz", r"named 'zzz'. The dictionary knows person, red\."),
        ("", "named by a text"),
        (7, "named by a text such as 'person', got 7"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        find_concepts([name], KNOWN)


def test_a_long_list_of_names_is_cut():
    known = {f"name{i:02}": NamedConcept(f"name{i:02}", (i,), (0.0,)) for i in range(20)}
    with pytest.raises(ValueError, match=r"knows name00, .*name11 and 8 more\.$"):
        find_concepts(["other"], known)


def test_a_concept_has_a_threshold_per_feature():
    for features, thresholds in (((), ()), ((1, 2), (0.5,))):
        with pytest.raises(ValueError, match="a threshold of each"):
            NamedConcept("red", features, thresholds)
    assert json.loads(names_header([RED])) == {"red": [[7, 9], [0.25, 1.5]]}
