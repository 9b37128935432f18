# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Instruction -> rendered prompt and reference answer, with the control tokens in somebody's words made inert."""

import re
import unicodedata
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from .postprocessing_segcompass import REF_TOKEN, THINK_END, THINK_START
from .threads_segcompass import tokenizer_lock, within_seconds

INSTRUCTION_TEMPLATE = (
    "Find what this asks for in the image: {instruction}\n"
    "Think first, inside <think> and </think>: name the candidates and rule out the wrong ones. Then write "
    "{num_slots} position tokens, each as <REF_POS>, and nothing else."
)
COMPLETION_TEMPLATE = "<think>{reasoning}</think>{references}"
# For tokenizers without a chat template: `<s>`, the image, the words; an answer ends with the end-of-sequence token.
MINIMAL_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE_TOKEN"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
RENDER_SECONDS = 30.0  # a chat template comes with a checkpoint, and takes milliseconds unless it loops
_SENTINEL = "\u2603"  # stands for a message's content when a chat template is looked through
_ROLE_SHAPE = re.compile(r"([^\s:：]*\w)[ \t]*[:：]")  # USER:
_MARKER_SHAPE = re.compile(r"^[<\[]\S+[>\]]$")  # <think>, <|im_start|>, [INST]: control tokens even where not special


class PromptsMixin:
    """Texts of [`SegCompassProcessor`]; needs of its heir the tokenizer, the templates and the image placeholder."""

    tokenizer: PreTrainedTokenizerBase
    chat_template: str | dict[str, str] | None
    instruction_template: str
    completion_template: str
    num_slots: int
    apply_chat_template: Callable[..., Any]
    _control: dict | None

    if TYPE_CHECKING:  # properties of its heir

        @property
        def image_token(self) -> str | None: ...

    @property
    def ref_token_id(self) -> int:
        """Id of `<REF_POS>`."""
        return self.tokenizer.convert_tokens_to_ids(REF_TOKEN)

    @property
    def think_start_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(THINK_START)

    @property
    def think_end_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(THINK_END)

    @property
    def end_of_turn_token(self) -> str:
        """What ends an answer: the first control token the chat template puts after it, else the end of sequence."""
        return self._control_data()["end_of_turn"]

    @property
    def end_of_turn_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.end_of_turn_token)

    def neutralize(self, text: str) -> str:
        """Make control tokens inside somebody's words inert: they read the same to a person, but never encode to the
        token.

        Every control token of the tokenizer (special ones, image placeholders, `<REF_POS>`, think tags) and every
        marker in brackets of the chat template gets a space after its first character, in any letter case; role
        markers of plain text (`ASSISTANT:`) lose their colon, also glued to another word.

        Raises:
            `ValueError`: the tokenizer still reads a control token, whatever is done.
        """
        control = self._control_data()
        for attempt in range(3):
            broken = _without_markers(text, control)
            ids = self._ids_of(broken)
            found = {self.tokenizer.convert_ids_to_tokens(i) for i in ids if i in control["ids"]}
            found |= {match[0] for match in control["roles"].finditer(self.tokenizer.decode(ids))}
            if not found:
                return broken
            # the tokenizer's own normalisation put one together: spell it out first, then give up what marks them
            text = unicodedata.normalize("NFKC", text) if attempt == 0 else re.sub(r"[<>|\[\]:]+", " ", text)
        raise ValueError(
            f"the text holds {sorted(found)}, which this tokenizer always reads as control tokens; leave them out."
        )

    def build_messages(self, instruction: str, image: Any = None, reasoning: str | None = None) -> list[dict]:
        """The conversation for an instruction: one user turn, and the reference answer if `reasoning` is given.

        Args:
            instruction (`str`): The user's words, made inert here.
            image (*optional*): Stands in the image part; without it the part only marks the place.
            reasoning (`str`, *optional*): What the reference answer thinks.

        Returns:
            `list[dict]`: for `apply_chat_template`, or the `prompt` column of a TRL data set.

        Raises:
            `ValueError`: the instruction is empty or no text.
        """
        text = self.instruction_template.replace("{num_slots}", str(self.num_slots))
        text = text.replace("{instruction}", self.neutralize(checked_text(instruction, "the instruction")))
        place = {"type": "image"} if image is None else {"type": "image", "image": image}
        messages = [{"role": "user", "content": [place, {"type": "text", "text": text}]}]
        if reasoning is not None:
            answer = [{"type": "text", "text": self.build_completion(reasoning)}]
            messages.append({"role": "assistant", "content": answer})
        return messages

    def build_prompt(self, instruction: str) -> str:
        """The rendered prompt, ready for `processor(images=..., text=...)`."""
        return self._render(self.build_messages(instruction), add_generation_prompt=True)

    def build_completion(self, reasoning: str) -> str:
        """The reference answer: think block and `num_slots` times `<REF_POS>`, without the end of turn."""
        text = self.completion_template.replace("{references}", REF_TOKEN * self.num_slots)
        return text.replace("{reasoning}", self.neutralize(reasoning))

    def _append_completions(self, data: dict, reasonings: list[str]) -> dict:
        """The reference answers behind the prompts: `[padding | prompt | answer | padding]`, as TRL lays them out."""
        texts = []
        for index, words in enumerate(reasonings):
            if not isinstance(words, str):
                raise ValueError(f"reasoning {index} is a {type(words).__name__}; expected a text (it may be empty).")
            texts.append(self.build_completion(words) + self.end_of_turn_token)
        answers = [self._ids_of(words) for words in texts]
        width = max(map(len, answers))
        ids = torch.full((len(answers), width), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, answer in enumerate(answers):
            ids[row, : len(answer)] = torch.tensor(answer)
            mask[row, : len(answer)] = 1
        prompt_ids, prompt_mask = data["input_ids"], data["attention_mask"]
        completion_mask = torch.cat([torch.zeros_like(prompt_mask), mask], dim=1)  # (B, T)
        out = {
            "input_ids": torch.cat([prompt_ids, ids], dim=1),
            "attention_mask": torch.cat([prompt_mask, mask], dim=1),
            "completion_mask": completion_mask,
        }
        out["labels"] = out["input_ids"].masked_fill(completion_mask == 0, -100)
        return out

    def _ids_of(self, text: str) -> list[int]:
        with tokenizer_lock:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _render(self, messages: list[dict], **kwargs) -> str:
        """Render a conversation.

        Raises:
            `ValueError`: the chat template does not end.
        """
        try:
            return within_seconds(
                RENDER_SECONDS, partial(self.apply_chat_template, messages, tokenize=False, **kwargs)
            )
        except TimeoutError as error:
            raise ValueError(
                f"the checkpoint's chat template is {error} and seems to loop for ever; do not use it, or pass "
                "another chat_template."
            ) from error

    def _picture_prompt(self) -> str:
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _SENTINEL}]}
        return self._render([message], add_generation_prompt=True)

    def _control_data(self) -> dict:
        """Control tokens and role markers, looked up once per tokenizer, vocabulary and chat template."""
        key = (
            id(self.tokenizer),
            len(self.tokenizer),
            self.chat_template if isinstance(self.chat_template, str) else None,
        )
        if self._control is not None and self._control["key"] == key:
            return self._control
        added = self.tokenizer.added_tokens_decoder.values()
        tokens = {token.content for token in added if token.special or _MARKER_SHAPE.match(token.content)}
        tokens |= {*self.tokenizer.all_special_tokens, self.image_token or "", REF_TOKEN, THINK_START, THINK_END}
        tokens = {token for token in tokens if len(token.strip()) > 1}
        pattern = _any_of(tokens)
        ids = set(self.tokenizer.convert_tokens_to_ids(sorted(tokens))) - {self.tokenizer.unk_token_id, None}

        user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _SENTINEL}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": _SENTINEL}]}
        conversation = self._render([user, answer])
        around = [
            *conversation.split(_SENTINEL)[:2],
            self._render([user], add_generation_prompt=True).split(_SENTINEL)[-1],
        ]
        end = pattern.search(conversation.rpartition(_SENTINEL)[2])
        literal = "\n".join(pattern.sub("\n", text) for text in around)
        tokens |= {word for word in literal.split() if _MARKER_SHAPE.match(word)}  # [INST], where it is no token
        roles = {word for word in _ROLE_SHAPE.findall(literal) if not word.isdigit()}
        self._control = {
            "key": key,
            "pattern": _any_of(tokens),
            "ids": ids,
            "end_of_turn": end[0] if end else self.tokenizer.eos_token,
            "roles": re.compile(rf"({'|'.join(map(re.escape, sorted(roles))) or '(?!)'})(\s*[:：])+"),
        }
        return self._control


def checked_text(words: Any, name: str) -> str:
    """An instruction without white space around it.

    Raises:
        `ValueError`: it is no text, or empty, or not valid Unicode; the message calls it `name`.
    """
    if not isinstance(words, str):
        raise ValueError(f"{name} is a {type(words).__name__}; expected a text.")
    if not words.strip():
        raise ValueError(f"{name} is empty; say what to look for in the image.")
    try:
        words.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds {words[error.start]!r}, which is no valid Unicode character.") from error
    return words.strip()


def _any_of(markers: set[str]) -> re.Pattern:
    """Finds any of some texts, the longest first, in any letter case."""
    longest_first = sorted((marker.strip() for marker in markers), key=lambda marker: (-len(marker), marker))
    return re.compile("|".join(map(re.escape, longest_first)), re.IGNORECASE)


def _without_markers(text: str, control: dict) -> str:
    """Break control tokens and role markers, also those that breaking others puts together."""
    before = None
    while text != before:
        before = text
        text = control["pattern"].sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
        text = control["roles"].sub(lambda match: match[1], text)
    return text


__all__ = ["PromptsMixin", "checked_text"]
