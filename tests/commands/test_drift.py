"""`segcompass drift`: a reference from rows or from a file, and what the command says."""

import json

import pytest

from segcompass_hf.cli import main

FEW = ["--num-samples", "8", "--batch-size", "4"]


def test_a_reference_is_made_once_and_compared_with(tmp_path, capsys):
    file = tmp_path / "made" / "reference.safetensors"
    assert main(["drift", "--reference", "scenes:val:11", "--save", str(file), *FEW]) == 0
    assert f"{file}: 8 samples" in capsys.readouterr().err
    compare = ["drift", "--reference", str(file), *FEW]
    assert main([*compare, "--dataset", "scenes:val:11", "--json"]) == 0
    same = json.loads(capsys.readouterr().out)
    assert same["distance"] == pytest.approx(0, abs=1e-6) and same["p_value"] == 1 and not same["drifted"]
    assert main([*compare, "--dataset", "scenes:test_crowded:3"]) == 0
    first, *changes = capsys.readouterr().out.splitlines()
    assert "Distance 0." in first and "8 samples against 8" in first and len(changes) == 10


def test_bad_input(tmp_path, capsys):
    (tmp_path / "x.safetensors").write_bytes(b"no")
    for reference, message in ((str(tmp_path / "x.safetensors"), "no reference of a drift monitor"), ("nowhere", "")):
        assert main(["drift", "--reference", reference, "--dataset", "scenes:val", *FEW]) == 2
        assert message in capsys.readouterr().err
    assert main(["drift", "--reference", "scenes:val", "--dataset", "scenes:val", "--num-samples", "2"]) == 2
    assert "at least 8 are needed" in capsys.readouterr().err
