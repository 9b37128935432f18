# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Files and folders that are whole or not there, their modes, free space, sizes and digests."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from segcompass_hf import files
from segcompass_hf.files import (
    check_disk_space,
    file_digest,
    folder_digest,
    follow_umask,
    free_space,
    json_digest,
    readable_size,
    staged_folder,
    weights_digest,
    whole_file,
    write_whole,
)

SRC = str(Path(files.__file__).parents[1])


@pytest.fixture
def umask():
    """Sets the umask for a test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def run(script, *arguments, **options):
    environment = os.environ | {"PYTHONPATH": SRC}
    return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], env=environment, **options)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def mode(path):
    return path.stat().st_mode & 0o777


class TestWholeFile:
    def test_old_or_new_but_never_half(self, tmp_path):
        path = tmp_path / "made" / "a.txt"  # its folder is made
        write_whole(path, "old ä")
        assert path.read_bytes() == "old ä".encode()
        with pytest.raises(RuntimeError), whole_file(path) as part:
            part.write_text("half")
            assert path.read_text("utf-8") == "old ä"
            raise RuntimeError
        assert path.read_text("utf-8") == "old ä" and names(path.parent) == ["a.txt"]
        write_whole(path, b"new", durable=True)
        assert path.read_bytes() == b"new" and names(path.parent) == ["a.txt"]

    def test_two_at_once_do_not_touch_each_other(self, tmp_path):
        path = tmp_path / "a"
        with whole_file(path) as one, whole_file(path) as other:
            one.write_text("one")
            other.write_text("other")
            assert one != other
        assert path.read_text() == "one" and names(tmp_path) == ["a"]  # whose block ends last

    @pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
    def test_modes_follow_the_umask(self, tmp_path, umask, mask, expected):
        umask(mask)
        with whole_file(tmp_path / "a.safetensors") as part:
            save_file({"a": torch.zeros(1)}, part)  # which makes a private file
        write_whole(tmp_path / "b", "")
        assert mode(tmp_path / "a.safetensors") == mode(tmp_path / "b") == expected

    def test_what_a_kill_left_goes_with_the_next(self, tmp_path):
        script = (
            "import os, sys; from segcompass_hf.files import whole_file\n"
            "with whole_file(sys.argv[1]) as part: os.kill(os.getpid(), 9)"
        )
        assert run(script, tmp_path / "a").wait() == -signal.SIGKILL
        (left,) = names(tmp_path)
        assert left.startswith("a.") and left.endswith(".part")
        alive = left.replace(left.split("-")[1], str(os.getpid()))  # of a process that runs
        elsewhere = left.replace(left.split(".")[1][:8], "0" * 8)  # of another machine, of which nothing is known
        for name in (alive, elsewhere, "other.part"):
            (tmp_path / name).touch()
        write_whole(tmp_path / "ab", "")  # any file of the folder
        assert names(tmp_path) == sorted(["ab", alive, elsewhere, "other.part"])

    def test_what_a_living_process_writes_stays(self, tmp_path):
        script = (
            "import sys; from segcompass_hf.files import whole_file\n"
            "with whole_file(sys.argv[1]) as part: part.write_text('theirs'); print(flush=True); input()"
        )
        process = run(script, tmp_path / "a", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        process.stdout.readline()
        write_whole(tmp_path / "a", "ours")
        process.communicate(b"\n")
        assert process.returncode == 0 and (tmp_path / "a").read_text() == "theirs" and names(tmp_path) == ["a"]

    def test_a_folder_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(OSError):
            write_whole(tmp_path / "file" / "a", "")


class TestStagedFolder:
    def test_of_two_processes_the_second_is_refused(self, tmp_path):
        script = (
            "import sys; from segcompass_hf.files import staged_folder\n"
            "with staged_folder(sys.argv[1]) as staged: print(flush=True); input(); (staged / 'theirs').touch()"
        )
        process = run(script, tmp_path / "out", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        process.stdout.readline()
        with pytest.raises(FileExistsError, match="another build is writing .*out"), staged_folder(tmp_path / "out"):
            pass
        process.communicate(b"\n")
        assert process.returncode == 0 and names(tmp_path) == ["out"] and names(tmp_path / "out") == ["theirs"]

    def test_what_appeared_meanwhile_is_kept(self, tmp_path):
        output = tmp_path / "out"
        with pytest.raises(FileExistsError, match="holds 1 files already"), staged_folder(output) as staged:
            (staged / "ours").touch()
            output.mkdir()
            (output / "theirs").touch()
        assert names(tmp_path) == ["out"] and names(output) == ["theirs"]

    def test_killed_and_started_again(self, tmp_path):
        script = (
            "import os, sys; from segcompass_hf.files import staged_folder\n"
            "with staged_folder(sys.argv[1]) as staged: (staged / 'old').touch(); os.kill(os.getpid(), 9)"
        )
        assert run(script, tmp_path / "out").wait() == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
        with staged_folder(tmp_path / "out") as staged:
            (staged / "new").touch()
        assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["new"]

    def test_private_weights_follow_the_umask(self, tmp_path, umask):
        umask(0o027)
        with staged_folder(tmp_path / "out") as staged:
            save_file({"a": torch.zeros(1)}, staged / "model.safetensors")
            (staged / "script.sh").touch(0o755)
        assert mode(tmp_path / "out" / "model.safetensors") == 0o640
        assert mode(tmp_path / "out" / "script.sh") == 0o750

    def test_links_are_left_alone(self, tmp_path):
        (tmp_path / "secret").touch(0o600)
        (tmp_path / "folder").mkdir(0o755)
        (tmp_path / "folder" / "link").symlink_to(tmp_path / "secret")
        follow_umask(tmp_path / "folder")
        assert mode(tmp_path / "secret") == 0o600


class TestTemporaryFolder:
    def test_what_a_kill_left_goes_with_the_next_of_its_kind(self, tmp_path, monkeypatch):
        script = (
            "import os, sys; from segcompass_hf.files import temporary_folder\n"
            "folder = temporary_folder(sys.argv[1]); open(os.path.join(folder.name, 'weights'), 'w').close()\n"
            "print(flush=True); input(); os.kill(os.getpid(), 9)"
        )
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setattr(files.tempfile, "tempdir", None)  # read anew
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        living, dead, other = (run(script, kind, **pipes) for kind in ("push", "push", "page"))
        for process in (living, dead, other):
            process.stdout.readline()
        for process in (dead, other):
            process.communicate(b"\n")
        assert len(names(tmp_path)) == 3
        with files.temporary_folder("push") as ours:
            assert Path(ours).parent == tmp_path and mode(Path(ours)) == 0o700
            left = names(tmp_path)
            of_living = [name for name in left if f"-{living.pid}-" in name]
            assert len(left) == 3 and len(of_living) == 1  # theirs, ours, and the page's
            assert [name for name in left if name.startswith("segcompass-page.")]
        living.communicate(b"\n")
        with files.temporary_folder("push"), files.temporary_folder("page"):
            assert len(names(tmp_path)) == 2
        assert names(tmp_path) == []


class TestFullDisk:
    # As torch.save, safetensors and Python themselves say it.
    @pytest.mark.parametrize(
        ("error", "free"),
        [
            (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), 0),
            (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), 3 << 20),
            (OSError(errno.ENOSPC, "No space left on device"), 0),
            (OSError(errno.EDQUOT, "Disk quota exceeded"), 10**12),
        ],
    )
    def test_is_said_in_one_way(self, tmp_path, monkeypatch, error, free):
        monkeypatch.setattr(files, "free_space", lambda path: free)
        size = readable_size(free)
        for writing in (staged_folder, whole_file):
            with pytest.raises(OSError, match=rf"the disk of .* is full \({size} free\); make room") as full:
                with writing(tmp_path / "out"):
                    raise error
            assert full.value.errno == errno.ENOSPC and "Errno" not in str(full.value)
            assert names(tmp_path) == []

    @pytest.mark.parametrize("error", [RuntimeError("unexpected pos 1 vs 2"), OSError("denied"), KeyError("full")])
    def test_other_errors_stay_as_they_are(self, tmp_path, error):
        with pytest.raises(type(error)) as raised, files.full_disk_in_words(tmp_path):
            raise error
        assert raised.value is error


class TestSpaceAndSizes:
    def test_free_space_of_what_is_not_there_yet(self, tmp_path, monkeypatch):
        asked = []
        monkeypatch.setattr(files.shutil, "disk_usage", lambda path: asked.append(path) or _Usage)
        assert free_space(tmp_path / "not" / "yet") == 7 and asked == [tmp_path]
        with pytest.raises(OSError, match="0.0 GB free and 0.0 GB"):
            check_disk_space(tmp_path, 8)
        check_disk_space(tmp_path, 7)

    @pytest.mark.parametrize(
        ("number", "text"),
        [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_250_000, "1.2 MB"), (10**9, "1.0 GB"), (5e12, "5000.0 GB")],
    )
    def test_readable_size(self, number, text):
        assert readable_size(number) == text


class _Usage:
    free = 7


class TestDigests:
    def test_file(self, tmp_path):
        content = bytes(range(256)) * 5000  # more than a block
        (tmp_path / "a").write_bytes(content)
        assert file_digest(tmp_path / "a") == hashlib.sha256(content).hexdigest()
        assert file_digest(tmp_path / "a", hashlib.sha1(b"x")) == hashlib.sha1(b"x" + content).hexdigest()

    def test_folder_counts_names_and_contents(self, tmp_path):
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "a").write_text("1")
        (tmp_path / "b").write_text("2")
        first = folder_digest(tmp_path)
        one, two = (hashlib.sha256(text).hexdigest() for text in (b"1", b"2"))
        assert first == hashlib.sha256(f'{{"b": "{two}", "sub/a": "{one}"}}'.encode()).hexdigest()
        (tmp_path / "b").rename(tmp_path / "c")
        assert folder_digest(tmp_path) != first
        (tmp_path / "c").rename(tmp_path / "b")
        assert folder_digest(tmp_path) == first
        (tmp_path / "b").write_text("3")
        assert folder_digest(tmp_path) != first

    def test_weights_know_every_value_and_its_place(self):
        embedding = torch.nn.Embedding(100, 6)
        first = weights_digest(embedding)
        assert first == weights_digest(embedding) and len(first) == 64
        whole = embedding.weight.detach().clone()

        def digest_of(weight):
            embedding.weight = torch.nn.Parameter(weight)
            return weights_digest(embedding)

        shuffled, one_row = whole.roll(1, 0), whole.clone()
        one_row[57] += 1e-3  # one of a hundred words was trained
        changed = [shuffled, one_row, whole.flip(1), whole.half(), whole.reshape(60, 10), whole[:, :5], -whole]
        digests = [digest_of(weight) for weight in changed]
        assert len({first, *digests}) == 8 and digest_of(whole.clone()) == first
        assert digest_of(whole.T.contiguous().T) == first  # as it lies in memory does not count

    def test_weights_of_every_kind(self):
        norm = torch.nn.BatchNorm1d(3)  # with buffers, one of them a single number
        first = weights_digest(norm)
        norm.num_batches_tracked += 1
        assert weights_digest(norm) != first
        for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.bool, torch.complex64):
            module = torch.nn.Module()
            module.register_buffer("values", torch.ones(2, 2).to(dtype))
            ones = weights_digest(module)
            module.values[0, 1] = 0
            assert weights_digest(module) != ones
        swapped = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        before = weights_digest(swapped)
        assert weights_digest(torch.nn.Sequential(*list(swapped)[::-1])) != before

    def test_json(self):
        assert json_digest({"a": 1, "b": [2.5, None]}) == json_digest({"b": [2.5, None], "a": 1})
        assert json_digest({"a": 1}) == hashlib.sha256(b'{"a": 1}').hexdigest() != json_digest({"a": "1"})
        with pytest.raises(TypeError):
            json_digest({"a": object()})
