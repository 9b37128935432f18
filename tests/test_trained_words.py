"""Words of an instruction that a checkpoint was not trained on, and where that is kept."""

import pytest
import tiny
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoProcessor, PreTrainedTokenizerFast

from segcompass_hf import SegCompassProcessor
from segcompass_hf.checkpoint import words_note
from segcompass_hf.hub import stage_checkpoint


def test_words_of_a_closed_vocabulary():
    """A tokenizer that maps what it does not have to an unknown token needs no list."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "red": 2, "circle": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    processor = tiny.tiny_processor("llava")
    processor.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    assert processor.unknown_words("the red zebra, the circle; zebra Gnu") == ["zebra", "Gnu"]
    assert processor.unknown_words("the circle !") == []
    processor.add_trained_words(["the red thing"])
    assert processor.unknown_words("the circle and the thing") == ["circle", "and", "thing"]


def test_words_of_training_instructions():
    processor = tiny.tiny_processor("qwen2_5_vl")
    assert processor.unknown_words("zebra") == [], "a byte-level tokenizer knows every word"
    processor.add_trained_words(["the zebra", "something to drink from", "where is the father-in-law's hat?"])
    assert processor.unknown_words("the zebra crossing, the zebra; 2 mugs") == ["crossing", "2", "mugs"]
    assert processor.unknown_words("the hat of the father-in-law") == ["of", "father-in-law"]
    processor.add_trained_words(iter(["two mugs"]))
    assert processor.unknown_words("mugs, zebra") == [], "noted beside the others"


def test_capitals_count_where_they_do_for_the_tokenizer():
    processor = tiny.tiny_processor("qwen2_5_vl")
    processor.add_trained_words(["the zebra"])
    assert processor.unknown_words("The zebra Crossing") == ["The", "Crossing"]
    processor.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert processor.unknown_words("The zebra Crossing") == ["Crossing"]


def test_what_is_said():
    processor = tiny.tiny_processor("llava")
    processor.add_trained_words(["the zebra"])
    assert words_note(processor, "the zebra") is None
    assert words_note(processor, "the gnu") == (
        'this checkpoint was not trained on the word "gnu"; its answer is a guess.'
    )
    assert 'on the words "a", "gnu";' in words_note(processor, "a gnu")


def test_the_words_are_saved_and_published_with_the_processor(tmp_path):
    processor = tiny.tiny_processor("llava")
    processor.add_trained_words(["the zebra", "a zebra"])
    tiny.tiny_model("llava").save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    stage_checkpoint(tmp_path / "saved", tmp_path / "stage")
    again = AutoProcessor.from_pretrained(tmp_path / "stage")
    assert type(again) is SegCompassProcessor and again.trained_words == ["a", "the", "zebra"]
    assert SegCompassProcessor.from_parts(again, 64).trained_words == again.trained_words
    tiny.tiny_processor("llava").save_pretrained(tmp_path / "none")
    assert SegCompassProcessor.from_pretrained(tmp_path / "none").trained_words is None


def test_a_damaged_list_is_refused():
    own = tiny.tiny_processor("llava")
    with pytest.raises(ValueError, match=r"trained_words is \[1\]; expected a list of words"):
        SegCompassProcessor(own.image_processor, own.tokenizer, own.sam_image_processor, trained_words=[1])
