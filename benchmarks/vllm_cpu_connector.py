"""The writer of hidden states of vLLM 0.31 for an engine on the CPU: vLLM's own copies on a CUDA stream."""

import os

import torch
from vllm.distributed.kv_transfer.kv_connector.v1 import example_hidden_states_connector as of_vllm


class _Done:
    """A copy that is complete."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class CpuHiddenStatesConnector(of_vllm.ExampleHiddenStatesConnector):
    """As its parent, but a request's states are copied and written at once."""

    def _submit_async_write(self, pending: of_vllm.PendingSave) -> None:
        blocks = torch.tensor(pending.block_ids)
        slots = (blocks[:, None] * self._block_size + torch.arange(self._block_size)).flatten()
        states = of_vllm.extract_from_kv_cache(self._kv_cache, slots, len(pending.token_ids))
        tensors = {"hidden_states": states.contiguous(), "token_ids": pending.token_ids.clone()}
        os.makedirs(os.path.dirname(pending.filename), exist_ok=True)
        self._write_tensors(tensors, _Done(), pending.filename, self._lock_fds.pop(pending.req_id, None))
        self._req_copy_events[pending.req_id] = _Done()
