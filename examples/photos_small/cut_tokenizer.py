"""SmolLM2's tokenizer, cut to the tokens that texts need."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, normalizers
from transformers import AddedToken, PreTrainedTokenizerFast

IMAGE_TOKEN = "<image>"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2, as before; the first one pads
NUM_COMMON = 4096  # the first tokens of the vocabulary, which are the most common: other people ask in other words
ADDED = ("<think>", "</think>", "<REF_POS>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def cut_tokenizer(
    full: PreTrainedTokenizerFast, texts: Iterable[str], num_common: int = NUM_COMMON
) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """Keep the special tokens, all bytes, the most common tokens, and every one that the texts use, with the merges
    that lead to it; and read capitals as small letters.

    Any other text still has tokens, down to its bytes, and the texts have the same as before. Merges keep their order,
    and one stays only where both of its pieces and what it makes do.

    Args:
        full (`PreTrainedTokenizerFast`): A byte-level BPE.
        texts (`Iterable[str]`): What has to be said and read.
        num_common (`int`, *optional*): Tokens at the start of the vocabulary to keep in any case.

    Returns:
        `tuple`: the tokenizer, with the tokens of SegCompass and `<image>` added, and the old id of each kept token in
        the order of its new id; added tokens have none.
    """
    content = json.loads(full.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    made_of = {}
    for left, right in content["model"]["merges"]:
        made_of.setdefault(left + right, []).append((left, right))
    wanted = {token for token, index in vocabulary.items() if len(token) == 1 or index < num_common}
    for text in texts:
        wanted.update(full.convert_ids_to_tokens(full(text, add_special_tokens=False)["input_ids"]))
    left = list(wanted)
    while left:  # the pieces of what is wanted
        for piece in (piece for pair in made_of.get(left.pop(), ()) for piece in pair):
            if piece not in wanted:
                wanted.add(piece)
                left.append(piece)
    wanted.difference_update(SPECIAL)
    tokens = [*SPECIAL, *sorted(wanted & set(vocabulary), key=vocabulary.get)]
    kept = [vocabulary[token] for token in tokens]
    content["model"]["vocab"] = {token: index for index, token in enumerate(tokens)}
    present = content["model"]["vocab"]
    merges = content["model"]["merges"]
    content["model"]["merges"] = [[a, b] for a, b in merges if a in present and b in present and a + b in present]
    content["added_tokens"] = [
        entry | {"id": present[entry["content"]]} for entry in content["added_tokens"] if entry["content"] in SPECIAL
    ]
    cut = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[0],
        unk_token=SPECIAL[0],
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    cut.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED])
    cut.chat_template = CHAT_TEMPLATE
    read_in_small_letters(cut)
    return cut, kept


def read_in_small_letters(tokenizer: PreTrainedTokenizerFast) -> None:
    """Let capitals make no difference: the rows have none, and `Something To Drink From` was answered as another
    question. Added tokens stay as they are."""
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
