# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Image and instruction -> inputs of the VLM and of the segmenter; the model's maps -> masks at the image's size."""

import copy
import os
import re
import unicodedata
from functools import partial
from typing import Any, Literal

import torch
from transformers import AddedToken, BatchFeature, ProcessorMixin

from .images_segcompass import (
    check_masks,
    fit_objects_to_slots,
    to_rgb_image,
)
from .postprocessing_segcompass import REF_TOKEN, THINK_END, THINK_START, PostProcessingMixin
from .segmenters_segcompass import Geometry, geometry_of, to_sam_image_processor
from .threads_segcompass import tokenizer_lock, within_seconds
from .vlm_processors_segcompass import (
    ImageHandling,
    build_vlm_processor,
    heard_texts,
    is_own_folder,
    load_vlm_parts,
    measure_image_handling,
    on_pil_backend,
    own_arguments,
    shift_behind_padding,
)

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


class SegCompassProcessor(PostProcessingMixin, ProcessorMixin):
    r"""Prepares SegCompass's inputs and reads its outputs.

    The VLM's own inputs come from the VLM family's own processor class, built here around the same image processor and
    tokenizer (without parts for videos or audio: a video processor would need torchvision). The segmenter's come from
    one of transformers' image processors on PIL.

    Args:
        image_processor (`BaseImageProcessor`): The VLM's image processor.
        tokenizer (`PreTrainedTokenizerBase`):
            The VLM's tokenizer; `<REF_POS>`, `<think>`, `</think>` are added where missing, not as special tokens, so
            that decoding with `skip_special_tokens` keeps them.
        sam_image_processor (`BaseImageProcessor`):
            The segmenter's image processor: `size` is the canvas, `mask_size` the low-resolution maps (4 x the image
            embedding). With `"longest_edge"` images are padded to the square, with `"height"` and `"width"` stretched.
        num_slots (`int`, *optional*, defaults to 4): Slots of the model, and `<REF_POS>` tokens of a completion.
        vlm_processor_class (`str`, *optional*, defaults to `"LlavaProcessor"`): The family's class in transformers.
        vlm_processor_kwargs (`dict`, *optional*): What that class takes besides image processor and tokenizer.
        instruction_template (`str`, *optional*): User turn after the image; holds `{instruction}`, may hold
        `{num_slots}`.
        completion_template (`str`, *optional*): The reference answer; holds `{reasoning}` and `{references}`.
        chat_template (`str`, *optional*): Jinja template; the tokenizer's own, or a minimal one, where not given.
        think_tags (`str`, *optional*, defaults to `"tokens"`): `"text"` leaves `<think>` and `</think>` to be spelled
            with the tokens there are, as the original code does; answers are then written freely.
    """

    def __init__(
        self,
        image_processor,
        tokenizer,
        sam_image_processor,
        num_slots: int = 4,
        vlm_processor_class: str = "LlavaProcessor",
        vlm_processor_kwargs: dict | None = None,
        instruction_template: str = INSTRUCTION_TEMPLATE,
        completion_template: str = COMPLETION_TEMPLATE,
        chat_template: str | None = None,
        think_tags: Literal["tokens", "text"] = "tokens",
    ):
        if type(num_slots) is not int or num_slots < 1:  # True is an int too
            raise ValueError(f"num_slots is {num_slots!r}; expected a positive integer.")
        if think_tags not in ("tokens", "text"):
            raise ValueError(f"think_tags is {think_tags!r}; expected 'tokens' or 'text'.")
        templates = {"instruction_template": instruction_template, "completion_template": completion_template}
        for name, template in templates.items():
            if not isinstance(template, str):
                raise ValueError(f"{name} is {template!r}; expected a text.")
        if "{instruction}" not in instruction_template:
            raise ValueError(f"instruction_template {instruction_template!r} has no {{instruction}} to be filled in.")
        if "{reasoning}" not in completion_template or "{references}" not in completion_template:
            raise ValueError(
                f"completion_template {completion_template!r} must hold {{reasoning}} and {{references}}."
            )
        image_processor = on_pil_backend(image_processor)
        sam_image_processor = to_sam_image_processor(sam_image_processor)
        known = tokenizer.get_vocab()
        needed = (REF_TOKEN, THINK_START, THINK_END) if think_tags == "tokens" else (REF_TOKEN,)
        missing = [token for token in needed if token not in known]
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in missing])
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"  # prompts end together, where generation starts

        self.num_slots, self.think_tags = num_slots, think_tags
        self.vlm_processor_class = vlm_processor_class
        self.vlm_processor_kwargs = dict(vlm_processor_kwargs or {})
        self.instruction_template = instruction_template
        self.completion_template = completion_template
        self._vlm_processor = self._control = self._handling = None
        chat_template = chat_template or getattr(tokenizer, "chat_template", None)
        super().__init__(image_processor, tokenizer, sam_image_processor, chat_template=chat_template)
        image_token = self.image_token  # builds the family's processor, so that a wrong class or argument shows here
        if self.chat_template is None:
            self.chat_template = MINIMAL_CHAT_TEMPLATE.replace("IMAGE_TOKEN", image_token or "")
            self._vlm_processor = None  # it was built without the template

    @classmethod
    def from_parts(
        cls, vlm_processor: Any, sam_processor: Any = 1024, num_slots: int = 4, **kwargs
    ) -> "SegCompassProcessor":
        """Put a processor together from a VLM's and a segmenter's.

        Args:
            vlm_processor (`ProcessorMixin`, `str` or `os.PathLike`):
                A VLM's processor, or the id or folder of one (also where `AutoProcessor` wants a video processor). Of
                a `SegCompassProcessor` its VLM's, and the templates.
            sam_processor (`ProcessorMixin`, `BaseImageProcessor`, `PretrainedConfig`, `str`, `os.PathLike` or `int`):
                A segmenter's processor, configuration, id or folder, or the side of SAM's canvas in pixels (patches of
                16).
            num_slots (`int`, *optional*, defaults to 4): Slots of the model.
            kwargs: Further arguments of the constructor.
        """
        own = {}
        if isinstance(vlm_processor, (str, os.PathLike)) and is_own_folder(vlm_processor):
            vlm_processor = cls.from_pretrained(vlm_processor)
        if hasattr(vlm_processor, "vlm_processor_class"):  # one of ours, as the warm-up saves with a VLM
            own = {name: getattr(vlm_processor, name) for name in ("instruction_template", "completion_template")}
            vlm_processor = vlm_processor.vlm_processor
        if isinstance(vlm_processor, (str, os.PathLike)):
            image_processor, tokenizer, class_name, class_kwargs, template = load_vlm_parts(str(vlm_processor))
        else:
            image_processor, tokenizer = vlm_processor.image_processor, vlm_processor.tokenizer
            class_name, template = type(vlm_processor).__name__, vlm_processor.chat_template
            names = own_arguments(type(vlm_processor))
            class_kwargs = {name: getattr(vlm_processor, name) for name in names if hasattr(vlm_processor, name)}
        fields = {"vlm_processor_class": class_name, "vlm_processor_kwargs": class_kwargs, "chat_template": template}
        sam_image_processor = to_sam_image_processor(sam_processor)
        return cls(image_processor, tokenizer, sam_image_processor, num_slots, **(fields | own | kwargs))

    # What the VLM family brings

    @property
    def vlm_processor(self) -> ProcessorMixin:
        """The family's own processor around our image processor and tokenizer; rebuilt when either is replaced."""
        inner = self._vlm_processor
        if inner is None or inner.tokenizer is not self.tokenizer or inner.image_processor is not self.image_processor:
            template, arguments = getattr(self, "chat_template", None), self.vlm_processor_kwargs
            inner = build_vlm_processor(
                self.vlm_processor_class, self.image_processor, self.tokenizer, template, arguments
            )
            self._vlm_processor, self._handling = inner, None
        return inner

    @property
    def image_handling(self) -> ImageHandling:
        """How the family's processor wants images, and what stands for them in the ids; found out at first use."""
        inner = self.vlm_processor
        if self._handling is None:
            prompt = self._picture_prompt()
            with tokenizer_lock:
                self._handling = measure_image_handling(
                    inner, self.vlm_processor_class, prompt, **self._special_tokens([prompt])
                )
        return self._handling

    def picture_inputs(self, picture: Any, **image_options) -> BatchFeature:
        """The VLM's inputs for one picture in a short prompt, as the family's processor makes them of any image.

        Args:
            picture: See `to_rgb_image`.
            image_options: For the family's image processor.
        """
        return self._vlm_inputs([[picture]], [self._picture_prompt()], return_tensors="pt", **image_options)

    def _picture_prompt(self) -> str:
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _SENTINEL}]}
        return self._render([message], add_generation_prompt=True)

    def text_for_tokenizer(self, prompt: str) -> tuple[str, bool]:
        """What the family's processor makes of a rendered prompt with one image before it is tokenized.

        Families write into it what they need: a token per patch, line ends, separators, a second `<s>`.

        Returns:
            `tuple[str, bool]`: the text, with the patches of a small picture, and whether the tokenizer adds special
            tokens to it. The prompt itself where the family does not pass its tokenizer a text.
        """
        options = self._special_tokens([prompt])
        with tokenizer_lock:
            heard = heard_texts(self.vlm_processor, prompt, nested=self.image_handling.nested, **options)
        written = (prompt, options.get("add_special_tokens", True))
        return max(heard, key=lambda text: len(text[0]), default=written)

    @property
    def image_token(self) -> str | None:
        """The VLM's image placeholder in texts; `None` where the family has none."""
        token = getattr(self.vlm_processor, "image_token", None) or getattr(self.tokenizer, "image_token", None)
        return getattr(token, "content", token)

    @property
    def image_token_id(self) -> int | None:
        """Id that stands for image patches in `input_ids`, as measured: families may write another token in the text.
        `None` where the ids hold nothing for an image."""
        return self.image_handling.token_id

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

    @property
    def geometry(self) -> Geometry:
        """How images lie on the segmenter's canvas."""
        return geometry_of(self.sam_image_processor)

    @property
    def canvas_size(self) -> int:
        """Side of the segmenter's input in pixels."""
        return self.geometry.canvas

    @property
    def mask_size(self) -> int:
        """Side of the low-resolution maps in cells."""
        return self.geometry.map_size

    @property
    def model_input_names(self) -> list[str]:
        return [*self.vlm_processor.model_input_names, "sam_pixel_values", "original_sizes", "reshaped_input_sizes"]

    # Text

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
        text = text.replace("{instruction}", self.neutralize(_checked_text(instruction, "the instruction")))
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

    # Inputs

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        instruction: str | list[str] | None = None,
        reasoning: str | list[str] | None = None,
        masks: Any = None,
        overflow: Literal["error", "merge", "drop"] = "error",
        return_tensors: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Inputs for the model: one sample per image and instruction.

        Args:
            images: One image or a list of them, of any size (see `to_rgb_image`). One image serves all instructions.
            text (`str` or `list[str]`, *optional*):
                Rendered prompts in place of instructions: returns the VLM's own inputs only, by the family's processor
                and with its arguments (TRL calls this).
            instruction (`str` or `list[str]`, *optional*): What to look for. One instruction serves all images.
            reasoning (`str` or `list[str]`, *optional*): Appends the reference answer: think block, `<REF_POS>`
            tokens, end.
            masks (list of `(n, H, W)` bool arrays, *optional*):
                The target objects of each image, at its size after EXIF rotation; for one image also its array alone.
            overflow (`"error"`, `"merge"` or `"drop"`, *optional*, defaults to `"error"`):
                What happens to more objects than slots, see `fit_objects_to_slots`.
            return_tensors (`str`, *optional*): `"pt"`, also where not given with instructions.

        Returns:
            `BatchFeature` with `input_ids`, `attention_mask` `(B, T)`: prompts padded on the left, answers on the
            right; `pixel_values` and the family's own keys (token types and the like of the prompt alone, the model
            lets them grow over an answer); `sam_pixel_values` `(B, 3, canvas, canvas)`;
            `original_sizes`, `reshaped_input_sizes` `(B, 2)` as (height, width); with `reasoning` `completion_mask`
            and `labels` `(B, T)`, -100 outside the answer; with `masks` `mask_labels` `(B, num_slots, h, w)` in [0, 1]
            and `num_objects` `(B,)`.

        Raises:
            `ValueError`: an input is empty, unreadable, too long, or does not fit the others; the message says which.
            `FileNotFoundError`: an image file is missing.
        """
        if (text is None) == (instruction is None):
            raise ValueError(
                "pass either `instruction` (SegCompass's inputs) or `text` (the VLM's own), not both or neither."
            )
        if text is not None:
            if reasoning is not None or masks is not None:
                raise ValueError(
                    "`reasoning` and `masks` go with `instruction`; with `text` only the VLM's inputs are made."
                )
            return self._vlm_inputs(images, text, return_tensors=return_tensors, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        if kwargs:
            raise ValueError(
                f"{sorted(kwargs)} are not known; `images`, `instruction`, `reasoning`, `masks`, `overflow` are."
            )
        if return_tensors not in (None, "pt"):
            raise ValueError(f'return_tensors={return_tensors!r} is not supported; expected "pt".')

        images, instructions, reasonings = _align(images, instruction, reasoning)
        name = "image {}" if len(images) > 1 else "image"
        images = [to_rgb_image(image, name.format(index)) for index, image in enumerate(images)]
        messages = []
        for index, words in enumerate(instructions):
            messages.append(self.build_messages(_checked_text(words, f"instruction {index}")))
        prompts = [self._render(message, add_generation_prompt=True) for message in messages]
        data = dict(
            self._vlm_inputs([[i] for i in images], prompts, return_tensors="pt", padding=True, padding_side="left")
        )
        if reasonings is not None:
            data |= self._append_completions(data, reasonings)
        self._check_length(data["attention_mask"])
        data |= self._sam_inputs(images)
        if masks is not None:
            data |= self._mask_targets(masks, images, overflow)
        return BatchFeature(data)

    def _vlm_inputs(self, images: Any, text: str | list[str], **kwargs) -> BatchFeature:
        """What the family's own processor returns, but for labels."""
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        kwargs = self._special_tokens([text] if isinstance(text, str) else text) | kwargs
        images = _map_images(images)
        if images is not None:
            if not self.image_handling.nested:
                images = _flat(images)
            if self.image_handling.asks_types:
                kwargs.setdefault("return_mm_token_type_ids", True)
        with tokenizer_lock:
            inputs = self.vlm_processor(images=images, text=text, **kwargs)
        inputs.pop("labels", None)  # PaliGemma's mark answers that it was not given
        if images is not None and torch.is_tensor(inputs.get("attention_mask")):
            shift_behind_padding(inputs, self.image_handling.padding_ignored)
        return inputs

    def _special_tokens(self, texts: list[str]) -> dict[str, bool]:
        """A template that writes `<s>` itself must not get a second one."""
        bos = self.tokenizer.bos_token
        has_bos = bos and all(isinstance(words, str) and words.startswith(bos) for words in texts)
        return {"add_special_tokens": False} if has_bos else {}

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

    def _check_length(self, attention_mask: torch.Tensor) -> None:
        limit = self.tokenizer.model_max_length
        for index, length in enumerate(attention_mask.sum(1).tolist()):
            if length > limit:
                raise ValueError(
                    f"instruction {index} makes a sequence of {length} tokens, image included, but the tokenizer's "
                    f"model_max_length is {limit}; shorten it by {length - limit} tokens."
                )

    def _sam_inputs(self, images: list) -> dict:
        sizes = [(image.height, image.width) for image in images]
        resized = [self.geometry.resized_size(size) for size in sizes]
        # SAM's processor rounds the short side of a very thin image to nothing: those are resized here, to one pixel
        thin = [1 in size for size in resized]
        images = [
            image.resize(size[::-1]) if flag else image
            for image, size, flag in zip(images, resized, thin, strict=True)
        ]
        return {
            "sam_pixel_values": self.sam_image_processor(images, return_tensors="pt")["pixel_values"],
            "original_sizes": torch.tensor(sizes),
            "reshaped_input_sizes": torch.tensor(resized),
        }

    def _mask_targets(self, masks: Any, images: list, overflow: str) -> dict:
        if len(images) == 1 and (_depth(masks) in (2, 3) or len(masks) == 0):
            masks = [masks]  # one image's objects, not in a list of one
        if len(masks) != len(images):
            raise ValueError(
                f"got masks for {len(masks)} images and {len(images)} images; pass one array of masks per image."
            )
        labels = torch.zeros(len(images), self.num_slots, self.mask_size, self.mask_size)
        counts = torch.zeros(len(images), dtype=torch.long)
        for index, (objects, image) in enumerate(zip(masks, images, strict=True)):
            objects = check_masks(objects, (image.height, image.width), f"masks of sample {index}")
            objects = fit_objects_to_slots(objects, self.num_slots, overflow, f"sample {index}")
            counts[index] = len(objects)
            labels[index, : len(objects)] = self.geometry.soft_mask_targets(objects)
        return {"mask_labels": labels, "num_objects": counts}

    # Saving and copying leave out what is built from the rest

    def to_dict(self) -> dict[str, Any]:
        bare = copy.copy(self)
        for name in ("_vlm_processor", "_control", "_handling"):
            bare.__dict__.pop(name, None)
        output = super(SegCompassProcessor, bare).to_dict()
        # by this name it loads without torchvision and without the warning that the base name gives
        output["sam_image_processor"]["image_processor_type"] = type(self.sam_image_processor).__name__
        for part in ("image_processor", "sam_image_processor"):
            output[part].pop("auto_map", None)  # saving as remote code notes ours in every part
        return output

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_vlm_processor": None, "_control": None, "_handling": None}


def _checked_text(words: Any, name: str) -> str:
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


def _depth(value: Any) -> int:
    """Number of axes of an array or nested list; -1 where there is nothing inside."""
    if hasattr(value, "ndim"):
        return value.ndim
    if isinstance(value, (list, tuple)):
        inner = _depth(value[0]) if len(value) else -1
        return inner + 1 if inner >= 0 else -1
    return -1 if value is None else 0


def _align(images: Any, instruction: Any, reasoning: Any) -> tuple[list, list, list | None]:
    """One image, instruction and reasoning per sample; a single one of them serves all."""
    if images is None:
        raise ValueError("`images` is missing; SegCompass segments an image.")
    stacked = getattr(images, "ndim", 0) == 4
    images = list(images) if stacked or isinstance(images, (list, tuple)) else images
    if isinstance(images, list) and any(isinstance(image, (list, tuple)) for image in images):
        if any(not isinstance(image, (list, tuple)) or len(image) != 1 for image in images):
            raise ValueError(
                "`images` is nested with other than one image per sample; SegCompass takes one image each."
            )
        images = [image[0] for image in images]
    columns = {"images": images, "instruction": instruction, "reasoning": reasoning}
    columns = {name: list(v) if isinstance(v, tuple) else v for name, v in columns.items() if v is not None}
    lengths = {name: len(value) for name, value in columns.items() if isinstance(value, list)}
    if any(length == 0 for length in lengths.values()) or len(set(lengths.values())) > 1:
        raise ValueError(f"the lengths differ or are 0: {lengths}; pass one image and one instruction per sample.")
    count = next(iter(lengths.values()), 1)
    columns = {name: value if isinstance(value, list) else [value] * count for name, value in columns.items()}
    return columns["images"], columns["instruction"], columns.get("reasoning")


def _map_images(images: Any) -> Any:
    """`to_rgb_image` on every image of a nested list."""
    if images is None:
        return None
    if isinstance(images, (list, tuple)):
        return [_map_images(image) for image in images]
    return to_rgb_image(images)


def _flat(images: Any) -> Any:
    """One list of all images of a nested one."""
    if not isinstance(images, list) or not any(isinstance(image, list) for image in images):
        return images
    return [one for image in images for one in (image if isinstance(image, list) else [image])]


SegCompassProcessor.register_for_auto_class("AutoProcessor")
