# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The words that a checkpoint was trained on, so that it can say which of an instruction's it was not."""

import re
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")


class TrainedWordsMixin:
    """Words of [`SegCompassProcessor`]; needs of its heir the tokenizer and the list."""

    tokenizer: PreTrainedTokenizerBase
    trained_words: list[str] | None

    def add_trained_words(self, instructions: Iterable[str]) -> None:
        """Note the words of training instructions, beside those that are noted. `save_pretrained` keeps them.

        For a checkpoint whose language model knows little more than what it was trained on: a large one knows words
        that no training row has.

        Args:
            instructions (`Iterable[str]`): Such as the column `instruction` of any data set in the row schema.
        """
        found = {word for text in instructions for word in _words_of(text)}
        self.trained_words = sorted(found.union(self.trained_words or ()))

    def unknown_words(self, instruction: str) -> list[str]:
        """Words of an instruction that the checkpoint was not trained on, in order, each once.

        Those that the tokenizer maps to its unknown token, and where [`~SegCompassProcessor.add_trained_words`] has
        noted words, all others. Without either every word counts as known. With capitals a word is another one, unless
        it is the same to the tokenizer.

        Args:
            instruction (`str`): The user's words.
        """
        return [word for word in _words_of(instruction) if not self._is_known(word)]

    def _is_known(self, word: str) -> bool:
        ids, unknown = self._ids_of(word), self.tokenizer.unk_token_id
        if unknown is not None and unknown in ids:
            return False
        if self.trained_words is None or word in self.trained_words:
            return True
        return word.lower() in self.trained_words and self._ids_of(word.lower()) == ids

    def _ids_of(self, word: str) -> list[int]:
        return self.tokenizer(word, add_special_tokens=False)["input_ids"]


def _words_of(text: str) -> list[str]:
    return list(dict.fromkeys(_WORD.findall(text)))
