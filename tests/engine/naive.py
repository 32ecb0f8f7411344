"""The oracle for the engine: one request at a time, the whole prefix computed anew for every token, no scheduler."""

import numpy as np

from octavo.models.decoder import record
from octavo.models.reader import read_spec
from octavo.models.weights import open_weights
from octavo.runtime.base import SamplingInputs, StepInputs


class NaiveLoop:
    """Drives a runtime directly; the KV of every call starts from nothing in block 0, 1, 2, ..."""

    def __init__(self, runtime, files, *, max_len=256, block_size=16, load_format="auto", seed=0):
        spec = read_spec(files, max_model_len=max_len)
        program = record(spec)
        self._runtime, self._block_size = runtime, block_size
        weights = open_weights(files, spec, load_format=load_format, seed=seed)
        runtime.load(program, weights, dtype="float32", max_num_tokens=max_len, max_num_logits=1, max_num_requests=1)
        runtime.allocate_kv(-(-max_len // block_size), block_size)
        self._groups = program.num_kv_groups

    def generate(self, prompt, num_tokens, *, temperature=0.0, seed=0):
        ids = list(prompt)
        for drawn in range(num_tokens):
            ids.append(self._next(ids, drawn, temperature, seed))
        return ids[len(prompt) :]

    def _next(self, ids, drawn, temperature, seed):
        n = len(ids)
        blocks = -(-n // self._block_size)
        positions = np.arange(n, dtype=np.int32)
        self._runtime.execute(
            StepInputs(
                token_ids=np.array(ids, np.int32),
                positions=positions,
                slots=np.tile(positions.astype(np.int64), (self._groups, 1)),
                query_start_loc=np.array([0, n], np.int32),
                seq_lens=np.array([n], np.int32),
                block_tables=np.tile(np.arange(blocks, dtype=np.int32), (self._groups, 1, 1)),
                logits_indices=np.array([n - 1], np.int32),
            )
        )
        nothing = np.zeros(2, np.int32), np.zeros(0, np.int32)
        out = self._runtime.sample(
            SamplingInputs(
                temperature=np.array([temperature], np.float32),
                top_k=np.zeros(1, np.int32),
                top_p=np.ones(1, np.float32),
                min_p=np.zeros(1, np.float32),
                seeds=np.array([seed], np.uint64),
                positions=np.array([drawn], np.int64),
                num_logprobs=np.full(1, -1, np.int32),
                bias_start=nothing[0],
                bias_ids=nothing[1],
                bias_values=np.zeros(0, np.float32),
                repetition_penalty=np.ones(1, np.float32),
                presence_penalty=np.zeros(1, np.float32),
                frequency_penalty=np.zeros(1, np.float32),
                seen_start=nothing[0],
                seen_ids=nothing[1],
                seen_counts=nothing[1],
            )
        )
        return int(out.token_ids[0])
