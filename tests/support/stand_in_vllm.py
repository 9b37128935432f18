"""A stand-in for vLLM: the parts of `vllm.LLM` that TRL and `VllmStates` call, over transformers.

It loads a folder as vLLM would (family class, family files), expands one placeholder per image, samples, and takes
weights under the names of the files only. Sleep level 2 throws the weights away, as vLLM's does. With the settings of
`extract_hidden_states` it writes the states of every prompt as vLLM 0.31 does: to a file that it names before it is
written, with a lock held until it is.
"""

import fcntl
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

__version__ = "0.0-stand-in"
WRITING_SECONDS = 0.05  # of a file, after it is named


class SamplingParams(SimpleNamespace):
    """Holds what it is given, like vLLM's."""

    def __init__(self, **given):
        defaults = {"temperature": 1.0, "top_k": 0, "max_tokens": 16, "logit_bias": None, "bad_words": None}
        super().__init__(**defaults | given)


class LLM:
    """`vllm.LLM` as far as `trl.generation.vllm_generation.VLLMGeneration` uses it."""

    def __init__(self, model: str, **settings):
        from segcompass_hf.processing_segcompass import SegCompassProcessor

        self.folder, self.settings = model, settings
        self.processor = SegCompassProcessor.from_parts(model, sam_processor=64)
        self.model, info = AutoModelForImageTextToText.from_pretrained(model, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        self.model.eval()
        self.received, self.asleep, self.prompts, self.events = {}, False, [], []
        draft = settings.get("speculative_config", {}).get("draft_model_config", {})
        self.layers = sorted(draft.get("hf_config", {}).get("eagle_aux_hidden_state_layer_ids", []))
        self.written = 0
        self.forbidden_shares = []  # per call: rise of log-probabilities because others may not come
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self._load_weights))
        executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        context = self.model.config.get_text_config().max_position_embeddings
        self.llm_engine = SimpleNamespace(
            model_executor=executor,
            model_config=SimpleNamespace(max_model_len=settings.get("max_model_len") or context),
        )

    def _load_weights(self, weights):
        assert not self.asleep, "weights sent to an engine that sleeps"
        for name, weight in weights:
            assert name not in self.received, f"{name} sent twice"
            self.received[name] = weight.detach().clone()

    def reset_prefix_cache(self):
        """TRL calls it when a synchronisation is complete: here the weights go in, by the names of the files."""
        state, self.received = self.received, {}
        self.events.append(("synchronised", len(state)))
        self.model, info = type(self.model).from_pretrained(
            None, config=self.model.config, state_dict=state, output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        self.model.eval()

    def sleep(self, level: int = 1):
        self.asleep = True
        self.events.append(("sleep", level))
        if level == 2:
            for parameter in self.model.parameters():
                parameter.data.fill_(float("nan"))

    def wake_up(self, tags: list[str] | None = None):
        self.asleep = False
        self.events.append(("wake_up", tags))

    def generate(self, prompts: list[dict], sampling_params: SamplingParams, use_tqdm: bool = True) -> list:
        assert not self.asleep
        self.prompts += prompts
        self.forbidden_shares.append(0.0)
        return [self._generate(prompt, sampling_params) for prompt in prompts]

    @torch.no_grad()
    def _generate(self, prompt: dict, params: SamplingParams) -> SimpleNamespace:
        inputs, tokenizer = self._inputs(prompt), self.processor.tokenizer
        assert not (self.layers and params.logit_bias), "no logit_bias with speculative decoding"
        forbidden = [token for token, bias in (params.logit_bias or {}).items() if bias <= -100]
        forbidden += tokenizer.convert_tokens_to_ids(params.bad_words or [])
        ends = getattr(params, "stop_token_ids", None) or []
        sampling = {"temperature": params.temperature, "top_k": params.top_k or None} if params.temperature else {}
        output = self.model.generate(
            **inputs,
            do_sample=bool(params.temperature),
            **sampling,
            **({"eos_token_id": ends} if ends else {}),
            max_new_tokens=params.max_tokens,
            suppress_tokens=forbidden or None,
            output_scores=True,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=tokenizer.pad_token_id,
        )
        ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        scored = output.scores if self.settings.get("logprobs_mode") == "processed_logprobs" else output.logits
        logprobs = [
            {token: SimpleNamespace(logprob=float(score[0].log_softmax(-1)[token]), rank=1)}
            for token, score in zip(ids, scored, strict=True)
        ]
        shares = torch.stack(
            [(logits / (params.temperature or 1)).softmax(-1)[0, forbidden].sum() for logits in output.logits]
        )
        self.forbidden_shares[-1] = max(self.forbidden_shares[-1], float(-(1 - shares).log().min()))
        expanded = inputs["input_ids"][0].tolist()
        transferred = {"hidden_states_path": self._write_states(inputs)} if self.layers else None
        written = SimpleNamespace(token_ids=ids, logprobs=logprobs)
        return SimpleNamespace(prompt_token_ids=expanded, outputs=[written], kv_transfer_params=transferred)

    def _inputs(self, prompt: dict) -> dict[str, torch.Tensor]:
        """The model's inputs: the ids as they are, but each placeholder made the tokens of its image."""
        images = prompt.get("multi_modal_data", {}).get("image", [])
        images = images if isinstance(images, list) else [images]
        name, process = self.processor.image_token, self.processor.vlm_processor
        placeholder, left = self.processor.tokenizer.convert_tokens_to_ids(name), iter(images)
        ids = []
        for token in prompt["prompt_token_ids"]:
            of_image = {"images": [next(left)], "text": [name]} if token == placeholder else None
            ids += process(**of_image, add_special_tokens=False)["input_ids"][0] if of_image else [token]
        assert next(left, None) is None, "more images than placeholders"
        inputs = {}
        if images:
            inputs = dict(process(images=images, text=[name * len(images)], return_tensors="pt"))
        inputs["input_ids"] = torch.tensor([ids])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.processor.image_token_id).long()
        return inputs

    def _write_states(self, inputs) -> str:
        """Name a file for the states of a prompt, `(tokens, layers, hidden_size)`, and write it a little later."""
        above = []
        handle = self.model.model.language_model.norm.register_forward_pre_hook(lambda _, args: above.append(args[0]))
        states = list(self.model(**inputs, output_hidden_states=True).hidden_states)
        handle.remove()
        states[-1] = above[0]  # vLLM's states of the last layer are those before the norm
        kept = torch.stack([states[layer][0] for layer in self.layers], dim=1)
        folder = Path(self.settings["kv_transfer_config"]["kv_connector_extra_config"]["shared_storage_path"])
        folder.mkdir(parents=True, exist_ok=True)
        path, self.written = folder / f"{self.written}.safetensors", self.written + 1
        lock = open(f"{path}.lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX)

        def write():
            time.sleep(WRITING_SECONDS)
            save_file({"hidden_states": kept.contiguous(), "token_ids": inputs["input_ids"][0]}, path)
            lock.close()

        threading.Thread(target=write).start()
        return str(path)
