# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Control sequences do not reach a terminal."""

import io
import sys

from segcompass_hf.printable import PrintableStream, printable, printable_output


def test_what_a_terminal_would_act_on_is_written_out():
    assert printable("a\x1b[2J\nb\r\x9b1m\x7f") == r"a\x1b[2J\nb\r\x9b1m\x7f"
    assert printable("abc\u202ecba \u2066x\u2028y") == r"abc\u202ecba \u2066x\u2028y"  # turned and broken lines
    assert printable("\udcff") == r"\udcff"  # a byte of a file's name that is no UTF-8
    assert printable("größe – 大 😀 `x`|\\n") == "größe – 大 😀 `x`|\\n"
    assert printable("a\nb\x07", keep="\n") == "a\nb\\x07"
    assert printable(None) == "None"


def test_a_stream_of_ascii_takes_every_text():
    buffer = io.BytesIO()
    stream = PrintableStream(io.TextIOWrapper(buffer, encoding="ascii"))
    stream.write("größe \x1b[31m\n")
    stream.flush()
    assert buffer.getvalue() == b"gr\\xf6\\xdfe \\x1b[31m\n"


def test_output_is_put_back(capsys):
    before = sys.stdout, sys.stderr
    with printable_output():
        sys.stdout.write("a\x1bb\tc\n")
        sys.stderr.write("bar\rbar\x1b[A\n")  # a progress bar goes back to its start
        assert sys.stdout.isatty() == before[0].isatty()
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr() == ("a\\x1bb\tc\n", "bar\rbar\\x1b[A\n")
