# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Hidden states that vLLM computes and leaves in files. Experimental, not run on a GPU: `docs/how-to/vllm.md`."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig

WRITING_SECONDS = 60.0  # that a file may take from when vLLM names it
WAITING_SECONDS = 0.01  # between looks at a file's lock


class VllmStates:
    """A [`StateSource`] over a vLLM engine: each sequence is a prompt, whose states vLLM writes to a file.

    The engine's method is `extract_hidden_states`, its writer `ExampleHiddenStatesConnector` (a file per request with
    `hidden_states` `(tokens, layers, hidden_size)` and `token_ids` `(tokens,)`). vLLM knows a layer by the number of
    layers passed, as this package does. Files are deleted when they are read.

    Args:
        engine (`vllm.LLM`): Opened with [`extraction_settings`]; [`~VllmStates.open`] does.
        processor ([`SegCompassProcessor`]): Made the inputs that states are asked of.
        layers (`Sequence[int]`): Of which the engine keeps states.
        config (`PreTrainedConfig`): Of the VLM that the engine runs.
        dtype (`torch.dtype`): Of the states.

    Raises:
        ValueError: A layer is none of the VLM's, or one whose states vLLM takes at another point.
    """

    def __init__(self, engine: Any, processor: Any, layers: Sequence[int], config: Any, dtype: torch.dtype):
        import vllm

        self.engine, self.processor, self.dtype = engine, processor, dtype
        self.layers = check_layers(layers, config)
        self.hidden_size = config.get_text_config(decoder=True).hidden_size
        self.origin = f"vLLM {vllm.__version__}"
        self._sampling = vllm.SamplingParams

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike,
        processor: Any,
        layers: Sequence[int],
        storage: str | os.PathLike,
        dtype: torch.dtype | None = None,
        **engine_settings,
    ) -> VllmStates:
        """Start an engine on a folder that [`export_for_vllm`] wrote.

        Args:
            folder (`str` or `os.PathLike`): Of the VLM.
            processor ([`SegCompassProcessor`]): As above.
            layers (`Sequence[int]`): For an SAE its layer; for masks also the number of decoder layers.
            storage (`str` or `os.PathLike`): Where files go, best in memory (`/dev/shm`).
            dtype (`torch.dtype`, *optional*): That the engine computes in; the folder's when left out.
            engine_settings: For `vllm.LLM`, such as `gpu_memory_utilization` or `max_model_len`.
        """
        import vllm

        config = AutoConfig.from_pretrained(folder)
        dtype = dtype or config.dtype or torch.float32
        layers = check_layers(layers, config)
        settings = {"dtype": str(dtype).removeprefix("torch."), **extraction_settings(layers, storage)}
        engine = vllm.LLM(model=os.fspath(folder), **settings | engine_settings)
        return cls(engine, processor, layers, config, dtype)

    def states_of_layers(
        self, layers: Sequence[int], inputs: Mapping[str, torch.Tensor], images: Sequence[list]
    ) -> list[torch.Tensor]:
        """As [`StateSource`] says, in the engine's dtype on the inputs' device, 0 on padding.

        Raises:
            ValueError: A layer that the engine keeps no states of, or a file that does not hold what was asked for.
            TimeoutError: A file is not written in time.
        """
        missing = sorted(set(layers) - set(self.layers))
        if missing:
            raise ValueError(
                f"states of layers {missing} are asked for, and the engine keeps those of {list(self.layers)}; name "
                "every layer where it is opened (VllmStates.open(..., layers=...))."
            )
        rows, mask = _tokens(inputs), inputs["attention_mask"].bool()
        # A token has to be asked for; it is thrown away.
        outputs = self._generate(rows, images, max_tokens=1, temperature=0.0)
        try:
            found = torch.cat([self._read(output, ids) for output, ids in zip(outputs, rows, strict=True)])
        finally:
            _delete_files(outputs)
        found = found.to(mask.device)  # (tokens of all rows, layers, hidden_size)
        states = found.new_zeros(len(layers), *mask.shape, self.hidden_size)
        for place, layer in enumerate(layers):
            states[place][mask] = found[:, self.layers.index(layer)]
        return list(states)

    def write(self, inputs: Mapping[str, torch.Tensor], images: Sequence[list], **sampling) -> list[Any]:
        """What vLLM writes behind prompts, greedily; the states of the prompts are thrown away.

        Args:
            inputs, images: See [`~StateSource.states_of_layers`].
            sampling: For `vllm.SamplingParams`.

        Returns:
            `list`: a completion per row, with `token_ids` (the end token among them) and `logprobs`, of each token
            `{id: entry}` with `entry.logprob` in nats, as the VLM has it before `bad_words`.
        """
        outputs = self._generate(_tokens(inputs), images, temperature=0.0, logprobs=0, **sampling)
        _delete_files(outputs)
        return [output.outputs[0] for output in outputs]

    def _generate(self, rows: list[list[int]], images: Sequence[list], **sampling) -> list[Any]:
        prompts = [self._prompt(ids, pictures) for ids, pictures in zip(rows, images, strict=True)]
        return self.engine.generate(prompts, self._sampling(detokenize=False, **sampling), use_tqdm=False)

    def _prompt(self, ids: list[int], images: list) -> dict[str, Any]:
        """What vLLM takes for a sequence: ids with one placeholder per image, which it expands itself, and images."""
        if not images:
            return {"prompt_token_ids": ids}
        short = unexpand_image_tokens(ids, self.processor, len(images))
        return {"prompt_token_ids": short, "multi_modal_data": {"image": images}}

    def _read(self, output: Any, ids: list[int]) -> torch.Tensor:
        """The states of one sequence, `(tokens, layers, hidden_size)`."""
        path = _path_of(output)
        if path is None:
            raise ValueError(
                "vLLM answered without a file of hidden states (kv_transfer_params.hidden_states_path); open the "
                "engine with VllmStates.open, or with what extraction_settings returns."
            )
        token_ids, states = read_states_file(path)
        if token_ids != ids:
            differs = next((n for n, (a, b) in enumerate(zip(token_ids, ids, strict=False)) if a != b), None)
            where = (
                "they agree as far as both go" if differs is None else f"the first that differs is number {differs}"
            )
            raise ValueError(
                f"{path} holds states of {len(token_ids)} tokens, and the sequence has {len(ids)}; {where}. vLLM "
                "makes other tokens of the text or its images than the processor: give both the same processor files "
                "(export_for_vllm writes them) and image settings."
            )
        expected = (len(ids), len(self.layers), self.hidden_size)
        if tuple(states.shape) != expected or states.dtype != self.dtype:
            raise ValueError(
                f"{path} holds states {tuple(states.shape)} of {states.dtype}; expected (tokens, layers, hidden_size) "
                f"= {expected} of {self.dtype}. The engine runs another model, layers or dtype than it was opened "
                "for; open it with VllmStates.open."
            )
        return states


def extraction_settings(layers: Sequence[int], storage: str | os.PathLike) -> dict[str, Any]:
    """Arguments of `vllm.LLM` with which it writes the states of a prompt's tokens at layers.

    Prompts pass whole and without the cache of common beginnings, so that every state is computed for its request.

    Example:

    >>> extraction_settings([16], "/dev/shm/states")["speculative_config"]["method"]
    'extract_hidden_states'
    """
    kept = {"eagle_aux_hidden_state_layer_ids": list(layers)}
    return {
        "speculative_config": {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": kept},
        },
        "kv_transfer_config": {
            "kv_connector": "ExampleHiddenStatesConnector",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"shared_storage_path": os.fspath(storage)},
        },
        "enable_chunked_prefill": False,
        "enable_prefix_caching": False,
    }


def check_layers(layers: Sequence[int], config: Any) -> tuple[int, ...]:
    """Layers in the order in which vLLM keeps their states: the lowest first, each once.

    Raises:
        ValueError: The VLM has no such layer, or adds features of the image behind it (deepstack of Qwen3-VL): vLLM
            takes the state after that, and this package before it.
    """
    count = config.get_text_config(decoder=True).num_hidden_layers
    wrong = [layer for layer in layers if not 0 <= layer <= count]
    if wrong or not layers:
        raise ValueError(f"layers are {list(layers)}; expected some of 0 to {count}, which the VLM has.")
    added = len(getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None) or ())
    early = [layer for layer in layers if 1 <= layer <= added]
    if early:
        raise ValueError(
            f"behind each of the first {added} layers this VLM adds features of the image, and vLLM's states of "
            f"layers {early} have them in, other than this package's; take a layer above {added}, or states of "
            "transformers."
        )
    return tuple(sorted(set(layers)))


def read_states_file(path: str | os.PathLike, timeout: float = WRITING_SECONDS) -> tuple[list[int], torch.Tensor]:
    """Token ids and states `(tokens, layers, hidden_size)` of a file that vLLM has named.

    vLLM names a file before it is written and holds the lock `<path>.lock` until it is; versions before 0.23 write
    first and have no lock.

    Args:
        path (`str` or `os.PathLike`): `kv_transfer_params["hidden_states_path"]` of an answer.
        timeout (`float`): Seconds to wait for the lock.

    Raises:
        TimeoutError: The lock is still held.
        ValueError: There is no such file, or it holds something else.
    """
    _wait_for_lock(f"{os.fspath(path)}.lock", timeout)
    try:
        tensors = load_file(path)
        return tensors["token_ids"].tolist(), tensors["hidden_states"]
    except (OSError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"{os.fspath(path)!r} is no file of hidden states ({error!r}); expected the safetensors file with "
            "`hidden_states` and `token_ids` that vLLM's ExampleHiddenStatesConnector writes. vLLM's log says why it "
            "could not; is there room on the disk?"
        ) from error


def _wait_for_lock(path: str, timeout: float) -> None:
    import fcntl

    end = time.monotonic() + timeout
    with suppress(FileNotFoundError), open(path) as lock:
        while True:
            try:
                return fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TimeoutError(
                        f"vLLM has not written {path.removesuffix('.lock')} within {timeout:.0f} s. An engine inside "
                        "this process (VLLM_ENABLE_V1_MULTIPROCESSING=0) writes only while it answers: leave that "
                        "setting out."
                    ) from None
            time.sleep(WAITING_SECONDS)


def _path_of(output: Any) -> str | None:
    return (getattr(output, "kv_transfer_params", None) or {}).get("hidden_states_path")


def _delete_files(outputs: list[Any]) -> None:
    """Those that answers name, once they are written."""
    for path in filter(None, map(_path_of, outputs)):
        lock = f"{path}.lock"
        _wait_for_lock(lock, WRITING_SECONDS)
        for each in (path, lock):
            Path(each).unlink(missing_ok=True)


def _tokens(inputs: Mapping[str, torch.Tensor]) -> list[list[int]]:
    """The ids of every row, without padding."""
    kept = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
    return [ids[mask].tolist() for ids, mask in kept]


def unexpand_image_tokens(prompt_ids: list[int], processor: Any, num_images: int = 1) -> list[int]:
    """A prompt with one placeholder per image, as vLLM wants it, from one with a token per image patch.

    Args:
        prompt_ids (`list[int]`): As the processor makes them.
        processor ([`SegCompassProcessor`]): Knows the family's placeholders.
        num_images (`int`, defaults to 1): Images of the prompt.

    Raises:
        ValueError: The prompt has another number of placeholders than images, or its text does not encode back.
    """
    full = getattr(processor.vlm_processor, "full_image_sequence", None)
    if full is not None:
        # Gemma 3 surrounds its image by line breaks that merge with those of the text: go by the text.
        tokenizer = processor.tokenizer
        text = tokenizer.decode(prompt_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if tokenizer(text, add_special_tokens=False)["input_ids"] != list(prompt_ids):
            raise ValueError("the prompt's text does not encode back to its ids, so its images cannot be found.")
        found = text.count(full)
        short = tokenizer(text.replace(full, processor.image_token), add_special_tokens=False)["input_ids"]
    else:
        image = processor.image_token_id
        if image != processor.tokenizer.convert_tokens_to_ids(processor.image_token):
            raise ValueError(
                f"{processor.vlm_processor_class} writes other tokens for an image ({image}) than vLLM takes in its "
                f"prompt ({processor.image_token!r}); use use_vllm=False with this family."
            )
        starts = [i == image and (k == 0 or prompt_ids[k - 1] != image) for k, i in enumerate(prompt_ids)]
        found = sum(starts)
        short = [i for i, start in zip(prompt_ids, starts, strict=True) if i != image or start]
    if found != num_images:
        raise ValueError(f"the prompt has {found} runs of image tokens, but {num_images} images go with it.")
    return short


__all__ = ["VllmStates", "check_layers", "extraction_settings", "read_states_file", "unexpand_image_tokens"]
