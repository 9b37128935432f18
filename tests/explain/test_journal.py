"""Records of samples are kept, taken up again, and not mixed with those of other settings."""

import pytest

from segcompass_hf.explain.journal import measured_records

ROWS = [{"value": number} for number in range(3)]


def test_a_measurement_goes_on_where_it_stopped(tmp_path):
    path, done = tmp_path / "records.jsonl", []

    def measure(number, row):
        if row["value"] == 2 and len(done) == 2:
            done.append("killed")
            raise KeyboardInterrupt
        done.append(number)
        return 10 * row["value"]

    with pytest.raises(KeyboardInterrupt):
        measured_records(path, {"seed": 0}, ROWS, measure)
    with path.open("a") as file:
        file.write('{"sample": 2, "rec')  # a kill in the middle of a line
    assert measured_records(path, {"seed": 0}, ROWS, measure) == [0, 10, 20]
    assert done == [0, 1, "killed", 2]
    assert measured_records(path, {"seed": 0}, ROWS[:2], measure) == [0, 10] and len(done) == 4


def test_records_of_other_settings_are_refused(tmp_path):
    path = tmp_path / "records.jsonl"
    measured_records(path, {"seed": 0, "model": "a"}, ROWS, lambda number, row: number)
    with pytest.raises(ValueError, match=r"other settings \(seed\)"):
        measured_records(path, {"seed": 1, "model": "a"}, ROWS, lambda number, row: number)
    path.write_text("no record\n")
    with pytest.raises(ValueError, match="other lines"):
        measured_records(path, {"seed": 0}, ROWS, lambda number, row: number)
