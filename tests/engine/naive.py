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

    def generate(self, prompt, num_tokens, *, temperature=0.0, seed=0):
        ids = list(prompt)
        for drawn in range(num_tokens):
            ids.append(self._next(ids, drawn, temperature, seed))
        return ids[len(prompt) :]

    def _next(self, ids, drawn, temperature, seed):
        self._runtime.execute(one_request(ids, first_logits=len(ids) - 1, block_size=self._block_size))
        sampling = greedy(1)
        sampling.temperature[:], sampling.seeds[:], sampling.positions[:] = temperature, seed, drawn
        return int(self._runtime.sample(sampling).token_ids[0])


def one_request(ids, *, first_logits, block_size=16):
    """A whole sequence as one step of one request in blocks 0, 1, 2, ...; logits from position `first_logits` on."""
    n = len(ids)
    positions = np.arange(n, dtype=np.int32)
    return StepInputs(
        token_ids=np.array(ids, np.int32),
        positions=positions,
        slots=positions.astype(np.int64)[None],
        query_start_loc=np.array([0, n], np.int32),
        seq_lens=np.array([n], np.int32),
        block_tables=np.arange(-(-n // block_size), dtype=np.int32)[None, None],
        logits_indices=np.arange(first_logits, n, dtype=np.int32),
    )


def greedy(num_rows):
    """Sampling inputs that take the most likely token of so many rows."""
    none = np.zeros(0, np.int32)
    return SamplingInputs(
        temperature=np.zeros(num_rows, np.float32),
        top_k=np.zeros(num_rows, np.int32),
        top_p=np.ones(num_rows, np.float32),
        min_p=np.zeros(num_rows, np.float32),
        seeds=np.zeros(num_rows, np.uint64),
        positions=np.zeros(num_rows, np.int64),
        num_logprobs=np.full(num_rows, -1, np.int32),
        bias_start=np.zeros(num_rows + 1, np.int32),
        bias_ids=none,
        bias_values=np.zeros(0, np.float32),
        repetition_penalty=np.ones(num_rows, np.float32),
        presence_penalty=np.zeros(num_rows, np.float32),
        frequency_penalty=np.zeros(num_rows, np.float32),
        seen_start=np.zeros(num_rows + 1, np.int32),
        seen_ids=none,
        seen_counts=none,
    )
