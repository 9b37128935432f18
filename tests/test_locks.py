"""Of two that hold one lock file the second is refused, and a kill frees it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from segcompass_hf import locks
from segcompass_hf.locks import alone_with

HOLD = (
    "import sys; from pathlib import Path; from segcompass_hf.locks import alone_with\n"
    "with alone_with(Path(sys.argv[1]), 'held'): print(flush=True); input()"
)


def hold(path):
    """A process that holds a lock file until it reads a line."""
    environment = os.environ | {"PYTHONPATH": str(Path(locks.__file__).parents[1])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], env=environment, **pipes)
    process.stdout.readline()
    return process


def test_the_second_is_refused_until_the_first_ends(tmp_path):
    path = tmp_path / ".lock"
    process = hold(path)
    with pytest.raises(FileExistsError, match="^in use$"), alone_with(path, "in use"):
        pass
    process.communicate(b"\n")
    assert process.returncode == 0 and not path.exists()
    with alone_with(path, "in use"):
        assert path.exists()
        with pytest.raises(FileExistsError), alone_with(path, "in use"):  # of the same process too
            pass
        assert path.exists(), "who was refused takes nothing away"
    assert not path.exists()


def test_a_kill_frees_it_and_what_is_left_does_no_harm(tmp_path):
    path = tmp_path / ".lock"
    process = hold(path)
    process.kill()
    assert process.wait() == -signal.SIGKILL and path.exists()
    process.stdin.close(), process.stdout.close()
    with alone_with(path, "in use"):
        pass
    assert not path.exists()


def test_a_lock_file_that_its_holder_has_just_removed_is_not_taken_for_held(tmp_path, monkeypatch):
    """Between opening the file and locking it, its holder removes it and a third one makes another: try again."""
    path, tries = tmp_path / ".lock", []

    class Late(locks.FileLock):
        def acquire(self, **options):
            super().acquire(**options)
            tries.append(path.stat().st_ino)
            if len(tries) == 1:
                other = path.with_name("other")
                other.touch()
                other.replace(path)

    path.touch()
    monkeypatch.setattr(locks, "FileLock", Late)
    with alone_with(path, "in use"):
        assert len(tries) == 2 and path.stat().st_ino == tries[1]
