"""Ctrl-C and SIGTERM: one line, the exit codes of shells, the command that goes on, and nothing unfinished left."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from segcompass_hf import stopping
from segcompass_hf.stopping import Stopped, handled, raise_stopped, run_script

SRC = str(Path(stopping.__file__).parents[1])
AS_IN_A_TERMINAL = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # started with `&` it is ignored
WAIT = "print(flush=True); time.sleep(60)"


def stopped(script, number, *arguments, **environment):
    """Exit code and lines of stderr of a program that gets a signal after its first line."""
    code = f"import signal, sys, time\n{AS_IN_A_TERMINAL}\n{script}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"PYTHONPATH": SRC} | environment
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], env=environment, **pipes)
    assert process.stdout.readline() == "\n"
    process.send_signal(number)
    lines = process.communicate(timeout=60)[1].splitlines()
    return process.returncode, lines


class TestScripts:
    SCRIPT = f"from segcompass_hf.stopping import run_script\ndef main():\n    {WAIT}\n"

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_one_line_with_the_command_that_goes_on(self, number, code):
        script = self.SCRIPT + "sys.argv[0] = 'train me.py'\nrun_script(main, '--resume')"
        expected = f"stopped by {number.name}; this goes on: python 'train me.py' --steps 3 --resume"
        assert stopped(script, number, "--steps", 3) == (code, [expected])
        assert stopped(script, number, "--steps", 3, "--resume") == (code, [expected])

    def test_of_several_processes_the_first_speaks(self):
        script = self.SCRIPT + "sys.argv[0] = 'train.py'\nrun_script(main)"
        both = {"WORLD_SIZE": "2"}
        line = "stopped by SIGTERM; this goes on: accelerate launch train.py"
        assert stopped(script, signal.SIGTERM, RANK="0", **both) == (143, [line])
        assert stopped(script, signal.SIGTERM, RANK="1", **both) == (143, [])

    def test_files_that_cannot_be_written(self, capsys):
        def main():
            raise OSError("the disk is full")

        with pytest.raises(SystemExit) as ended:
            run_script(main)
        assert ended.value.code == 2 and capsys.readouterr().err == "error: the disk is full\n"

    def test_faults_of_the_code_keep_their_traceback(self):
        with pytest.raises(ZeroDivisionError):
            run_script(lambda: 1 / 0)


class TestCommandLine:
    # A command whose work is replaced, so that nothing has to be loaded.
    SCRIPT = (
        "from segcompass_hf import cli\nfrom segcompass_hf.commands import evaluate, init\n"
        "from segcompass_hf.files import staged_folder\n"
        "def wait(args):\n    with staged_folder(args.output) as folder:\n"
        f"        (folder / 'half').touch(); {WAIT}\n"
        "evaluate.run = init.run = wait\nsys.exit(cli.main())"
    )

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_what_was_unfinished_is_removed(self, tmp_path, number, code):
        line = f"segcompass init: stopped by {number.name}"
        assert stopped(self.SCRIPT, number, "init", "--vlm", "a", "--output", tmp_path / "out") == (code, [line])
        assert list(tmp_path.iterdir()) == []

    def test_the_command_that_goes_on(self, tmp_path):
        arguments = ("evaluate", "--dataset", "scenes:val", "--output", tmp_path / "my out")
        command = f"segcompass evaluate --dataset scenes:val --output '{tmp_path / 'my out'}'"
        line = f"segcompass evaluate: stopped by SIGTERM; this goes on: {command}"
        assert stopped(self.SCRIPT, signal.SIGTERM, *arguments) == (143, [line])

    def test_while_commands_are_imported(self):
        script = (
            "class Slow:\n    def find_spec(self, name, *others):\n"
            f"        if name == 'segcompass_hf.commands.common': {WAIT}\n"
            "sys.meta_path.insert(0, Slow())\nfrom segcompass_hf import cli\nsys.exit(cli.main())"
        )
        line = "segcompass train: stopped by SIGINT; this goes on: segcompass train recipe.yaml"
        assert stopped(script, signal.SIGINT, "train", "recipe.yaml") == (130, [line])


@pytest.mark.usefixtures("usual_signals")
class TestHandlers:
    def test_come_and_go(self):
        before = [signal.getsignal(number) for number in stopping.SIGNALS]
        with pytest.raises(Stopped) as ended, handled(raise_stopped):
            os.kill(os.getpid(), signal.SIGTERM)
        assert (ended.value.code, ended.value.signal) == (143, signal.SIGTERM)
        assert [signal.getsignal(number) for number in stopping.SIGNALS] == before

    def test_of_others_stay(self):
        seen = []
        before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
        try:
            with handled(raise_stopped):
                os.kill(os.getpid(), signal.SIGTERM)
        finally:
            signal.signal(signal.SIGTERM, before)
        assert seen == [signal.SIGTERM]

    def test_inner_one_counts(self):
        seen = []
        with handled(raise_stopped), handled(lambda number, frame: seen.append(number)):
            os.kill(os.getpid(), signal.SIGINT)
        assert seen == [signal.SIGINT]

    def test_other_threads_take_none(self):
        seen = []

        def work():
            with handled(raise_stopped):
                seen.append(signal.getsignal(signal.SIGTERM))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert seen == [signal.getsignal(signal.SIGTERM)] != [raise_stopped]
