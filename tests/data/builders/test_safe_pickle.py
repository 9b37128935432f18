# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Annotations are pickles: plain data is read, anything that could run is refused by name."""

import collections
import os
import pickle
import struct
import subprocess
import tracemalloc

import numpy as np
import pytest
from refer_files import python2_pickle

from segcompass_hf.data.builders.safe_pickle import RefusedPickleError, load_plain_pickle

PLAIN = [{"ref_id": 7, "box": [1.5, -2], "none": None, "yes": True, "big": 2**70, "pair": (1, "ü"), "raw": b"\xff"}]


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_plain_types_load(tmp_path, protocol):
    (tmp_path / "refs.p").write_bytes(pickle.dumps(PLAIN, protocol=protocol))
    assert load_plain_pickle(tmp_path / "refs.p") == PLAIN


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_old_protocols_load(tmp_path, protocol):
    plain = [{key: value for key, value in PLAIN[0].items() if key != "raw"}]
    (tmp_path / "refs.p").write_bytes(pickle.dumps(plain, protocol=protocol))
    assert load_plain_pickle(tmp_path / "refs.p") == plain


@pytest.mark.parametrize(
    ("text", "expected"),
    [(b"the man", "the man"), ("café".encode(), "café"), ("café".encode("latin-1"), "café"), ("\u4eba", "\u4eba")],
)
def test_python_2_texts(tmp_path, text, expected):
    (tmp_path / "refs.p").write_bytes(python2_pickle([{b"sent": text, b"id": 2**40}]))
    assert load_plain_pickle(tmp_path / "refs.p") == [{"sent": expected, "id": 2**40}]


class Runs:
    """Runs a function when it is unpickled in the ordinary way."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def malicious(marker) -> dict[str, bytes]:
    touch = f"open({str(marker)!r}, 'w').close()"
    shell = f"touch {marker}"
    at_protocol = {
        f"posix.system {protocol}": pickle.dumps([{"ref_id": 1}, Runs(os.system, shell)], protocol=protocol)
        for protocol in range(6)
    }
    return at_protocol | {
        "builtins.exec": pickle.dumps({"refs": [Runs(exec, touch)]}),
        "builtins.eval": pickle.dumps(Runs(eval, touch)),
        "builtins.getattr": b"cbuiltins\ngetattr\n(cos\nsystem\nS'x'\ntR.",
        "subprocess.Popen": pickle.dumps(Runs(subprocess.Popen, ["touch", str(marker)])),
        "os.system inst": b"(S'" + shell.encode() + b"'\nios\nsystem\n.",
        "os.system obj": b"(cos\nsystem\nS'" + shell.encode() + b"'\no.",
        "collections.OrderedDict": pickle.dumps(collections.OrderedDict(a=1)),
        "numpy": pickle.dumps([np.int64(3)]),
    }


@pytest.mark.parametrize("name", malicious("m"))
def test_code_is_refused_by_name_and_does_not_run(tmp_path, name):
    marker = tmp_path / "ran"
    (tmp_path / "refs.p").write_bytes(malicious(marker)[name])
    with pytest.raises(RefusedPickleError, match=name.split()[0].replace(".", r"\.")) as caught:
        load_plain_pickle(tmp_path / "refs.p")
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, pickle.UnpicklingError)
    assert "refused" in str(caught.value)
    assert not marker.exists()


def test_the_malicious_pickles_do_run_when_loaded_in_the_ordinary_way(tmp_path):
    """Else the test above would show nothing."""
    marker = tmp_path / "ran"
    pickle.loads(malicious(marker)["posix.system 2"])
    assert marker.exists()


def test_outside_objects_are_refused(tmp_path):
    (tmp_path / "refs.p").write_bytes(b"Psecret\n.")
    with pytest.raises(RefusedPickleError, match="outside object 'secret'"):
        load_plain_pickle(tmp_path / "refs.p")


@pytest.mark.parametrize("cut", [0, 1, 10, -1])
def test_truncated_pickles_are_named(tmp_path, cut):
    (tmp_path / "refs.p").write_bytes(pickle.dumps(PLAIN)[:cut])
    with pytest.raises(RefusedPickleError, match="refs.p.*no complete pickle"):
        load_plain_pickle(tmp_path / "refs.p")


def test_calling_plain_data_is_no_way_round(tmp_path):
    (tmp_path / "refs.p").write_bytes(b"S'text'\n(tR.")  # REDUCE of a text
    with pytest.raises(RefusedPickleError, match="no complete pickle"):
        load_plain_pickle(tmp_path / "refs.p")


def _nested(kind, depth=60):
    """A list (or tuple) of itself twice, `depth` times: 2**depth values in some 300 bytes."""
    value = kind(["a"])
    for _ in range(depth):
        value = kind([value, value])
    return value


def _in_itself():
    value = []
    value.append(value)
    return value


_KEY = pickle.dumps(_nested(tuple), 2)[2:-1]
BOMBS = {
    "a far place in the memory": (b"\x80\x02]r\xff\xff\xff\x3f.", None),  # 9 bytes, a list
    "the same as text": (b"]p1073741823\n.", None),
    "a long bytearray": (b"\x80\x05\x96" + struct.pack("<Q", 1 << 34) + b".", "no complete pickle"),
    "long bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 34) + b".", "no complete pickle"),
    "a long frame": (b"\x80\x04\x95" + struct.pack("<Q", 1 << 34) + b".", "no complete pickle"),
    "lists that multiply": (pickle.dumps(_nested(list)), "stand in so many places"),
    "tuples that multiply": (pickle.dumps(_nested(tuple), 2), "stand in so many places"),
    "texts that multiply": (pickle.dumps([["y" * 10_000] * 2_000] * 50), "stand in so many places"),
    "a list in itself": (pickle.dumps(_in_itself()), "holds itself"),
    "a key that takes for ever": (b"\x80\x02}" + _KEY + b"Ns.", "a tuple as its key"),
    "keys that take for ever": (b"\x80\x02}(" + _KEY + b"Nu.", "a tuple as its key"),
    "a dict of such": (b"(" + _KEY + b"Nd.", "a tuple as its key"),
    "a set of such": (b"\x80\x04\x8f(" + _KEY + b"\x90.", "no complete pickle"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_small_files_stay_small(tmp_path, name):
    data, message = BOMBS[name]
    (tmp_path / "refs.p").write_bytes(data)
    tracemalloc.start()
    try:
        if message is None:
            assert load_plain_pickle(tmp_path / "refs.p") == []
        else:
            with pytest.raises(RefusedPickleError, match=message):
                load_plain_pickle(tmp_path / "refs.p")
        assert tracemalloc.get_traced_memory()[1] < 10_000_000  # bytes
    finally:
        tracemalloc.stop()


def test_lists_in_several_places_load(tmp_path):
    box = [1, 2, 3, 4]
    (tmp_path / "refs.p").write_bytes(pickle.dumps([{"box": box, "same": box}] * 3))
    assert load_plain_pickle(tmp_path / "refs.p") == [{"box": box, "same": box}] * 3
