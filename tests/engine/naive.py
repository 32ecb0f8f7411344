"""The oracle for the engine: one request at a time, the whole prefix computed anew for every token, no scheduler."""

from lab.teacher import one_request
from octavo.models.decoder import record
from octavo.models.reader import read_spec
from octavo.models.weights import open_weights
from octavo.runtime.base import SamplingInputs


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
        sampling = SamplingInputs.greedy(1)
        sampling.temperature[:], sampling.seeds[:], sampling.positions[:] = temperature, seed, drawn
        return int(self._runtime.sample(sampling).token_ids[0])
