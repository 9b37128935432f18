"""A cache that cannot be written is named, with what moves it."""

import errno

import datasets
import pytest
from made_rows import make_row

from segcompass_hf.data import scenes
from segcompass_hf.data.builders.rows import dataset_from_rows
from segcompass_hf.data.datasets_cache import named_cache
from segcompass_hf.evaluation.datasets_spec import load_dataset_of


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    """A place for the cache below a file, where nobody can make a folder, whoever runs the tests."""
    (tmp_path / "file").write_text("")
    cache = tmp_path / "file" / "cache"
    for name in ("HF_CACHE_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setattr(datasets.config, name, cache)
    monkeypatch.setattr("datasets.builder.config.HF_DATASETS_CACHE", cache)
    return cache


def test_building_and_loading_name_the_cache(no_cache, tmp_path):
    message = rf"the cache of `datasets`, {no_cache}, cannot be written .*HF_HOME \(or HF_DATASETS_CACHE"
    with pytest.raises(OSError, match=message):
        scenes.build("val", 2)
    with pytest.raises(OSError, match=message):
        dataset_from_rows([])
    rows = [make_row(0, [])]
    dataset_from_rows(rows, cache_dir=tmp_path / "own").to_parquet(tmp_path / "a.parquet")  # of one's own it is right
    with pytest.raises(OSError, match=message):
        load_dataset_of(str(tmp_path / "a.parquet"))


def test_other_errors_pass_as_they_are(no_cache, tmp_path):
    for error in (
        OSError(errno.EACCES, "no", str(tmp_path / "mine")),
        OSError(errno.ENOENT, "no", str(no_cache)),
        ValueError("no"),
    ):
        with pytest.raises(type(error)) as raised, named_cache():
            raise error
        assert raised.value is error


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_what_is_above_and_below_the_cache_counts(no_cache, number):
    for place in (no_cache.parent, no_cache / "scenes" / "x.lock"):
        with pytest.raises(OSError, match="the cache of `datasets`") as raised, named_cache():
            try:
                raise OSError(number, "refused", str(place))
            except OSError as error:
                raise datasets.exceptions.DatasetGenerationError("hidden") from error
        assert raised.value.errno == number and "refused" in str(raised.value) and str(place) in str(raised.value)


def test_a_full_disk_counts_in_the_middle_of_writing(no_cache):
    with pytest.raises(OSError, match="the cache of `datasets`.*No space left"), named_cache():
        raise OSError(errno.ENOSPC, "No space left on device")
