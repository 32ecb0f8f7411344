"""The driver: slices, windows, results; and the page that shows them."""

import json

import numpy as np
import pytest

from lab import numerics, perplexity
from lab.perplexity import SLICE, Subject, result_of, slice_inputs, windows_of
from lab.teacher import one_request
from octavo.models.decoder import record
from octavo.models.reader import read_spec
from octavo.models.spec import ModelFiles
from octavo.models.weights import open_weights
from octavo.runtime.base import SamplingInputs
from octavo.runtime.reference import ReferenceRuntime
from tests.text.vocabularies import byte_level
from tests.tiny_llama import TINY

CONFIG = TINY | {"vocab_size": 53, "max_position_embeddings": 512}
WINDOW = 2 * SLICE + 21


class FakeArm:
    """Logits by a rule; keeps what it was asked."""

    def __init__(self, name, noise):
        self.name, self.description, self.scores = name, f"fake {name}", perplexity.Scores()
        self.asked = []
        self._noise, self._random = noise, np.random.default_rng(0)

    def logits(self, window, start):
        self.asked.append((int(window[0]), start))
        ids = window[start : start + SLICE]
        rows = np.cos(ids[:, None] * np.arange(1, 54)[None, :] / 7)
        return (rows + self._noise * self._random.normal(size=rows.shape)).astype(np.float32)


@pytest.fixture
def measured():
    windows = [np.full(WINDOW, first, np.int32) + np.arange(WINDOW, dtype=np.int32) % 40 for first in (1, 2, 3)]
    arms = [FakeArm("float32", 0), FakeArm("noisy", 0.1), FakeArm("same", 0)]
    perplexity.measure(arms, windows)
    subject = Subject("tiny", "moby-dick", WINDOW, {"F32": 3})
    return arms, result_of(subject, arms, "python -m lab.perplexity tiny")


def test_a_run_goes_on_behind_the_windows_that_an_earlier_one_kept(tmp_path):
    windows = [np.full(WINDOW, first, np.int32) + np.arange(WINDOW, dtype=np.int32) % 40 for first in (1, 2, 3)]
    kept = tmp_path / "cache" / "tiny.npz"
    whole, first, second = ([FakeArm("float32", 0), FakeArm("bent", 0)] for _ in range(3))
    for _, bent in (whole, first, second):
        bent.logits = lambda window, start, plain=bent.logits: plain(window, start) * np.float32(1.1)
    perplexity.measure(whole, windows)
    perplexity.measure(first, windows[:2], kept)
    perplexity.measure(second, windows, kept)
    assert [w for w, _ in second[0].asked] == [3, 3, 3]
    subject = Subject("tiny", "moby-dick", WINDOW, {"F32": 3})
    assert result_of(subject, second, "x") == result_of(subject, whole, "x")
    fewer = [FakeArm("float32", 0), FakeArm("bent", 0)]
    perplexity.measure(fewer, windows[:1], kept)  # a shorter run needs only some of them
    assert not fewer[0].asked
    assert len(np.concatenate(fewer[1].scores.surprises)) == WINDOW - 1


def test_a_window_in_slices_is_the_window_at_once(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    files = ModelFiles("tiny", "hf", tmp_path)
    spec = read_spec(files, max_model_len=512)
    runtime = ReferenceRuntime()
    weights = open_weights(files, spec, load_format="dummy", seed=3)
    runtime.load(record(spec), weights, dtype="float32", max_num_tokens=512, max_num_logits=512, max_num_requests=1)
    runtime.allocate_kv(32, 16)
    window = np.random.default_rng(0).integers(0, 53, WINDOW).astype(np.int32)
    slices = []
    for start in range(0, WINDOW, SLICE):
        runtime.execute(slice_inputs(window, start))
        runtime.sample(SamplingInputs.greedy(min(SLICE, WINDOW - start)))
        slices.append(runtime.logits())
    runtime.execute(one_request(window.tolist(), first_logits=0))
    runtime.sample(SamplingInputs.greedy(WINDOW))
    assert [len(logits) for logits in slices] == [SLICE, SLICE, 21]
    np.testing.assert_allclose(np.concatenate(slices), runtime.logits(), atol=1e-5)


def test_every_arm_sees_every_slice_and_every_token_but_the_first_counts(measured):
    arms, result = measured
    assert all(arm.asked == [(w, s) for w in (1, 2, 3) for s in (0, SLICE, 2 * SLICE)] for arm in arms)
    assert result["num_tokens"] == 3 * (WINDOW - 1)


def test_the_result_tells_noise_from_none(measured):
    _, result = measured
    noisy, same = result["rows"]
    assert (same["difference"], same["standard_error"], same["kl"], same["top1_agreement"]) == (0, 0, 0, 1)
    assert same["perplexity"] == result["against"]["perplexity"]
    assert noisy["kl_p99"] > noisy["kl"] > 0
    assert noisy["standard_error"] > 0
    assert noisy["difference"] == pytest.approx(noisy["perplexity"] / result["against"]["perplexity"] - 1)


def test_windows_do_not_overlap_and_begin_with_the_first_token_where_there_is_one():
    tokenizer = byte_level()
    text = "he said hello " * 40
    ids = tokenizer.encode(text, add_special_tokens=False)
    first = tokenizer.encode("")
    windows = windows_of(text, tokenizer, 50, 20)
    assert [len(w) for w in windows] == [20] * 3  # 19 predicted in each
    body = [token for w in windows for token in w[len(first) :].tolist()]
    assert body == ids[: 3 * (20 - len(first))]
    assert all(w[: len(first)].tolist() == first for w in windows)


def test_a_text_that_is_too_short_says_so():
    with pytest.raises(SystemExit, match="lower --tokens"):
        windows_of("hello", byte_level(), 50, 20)


@pytest.mark.parametrize("kind", ["alternatives", "models"])
def test_the_page_is_filled_from_results(measured, kind, tmp_path, capsys):
    _, result = measured
    (tmp_path / "perplexity-tiny.json").write_text(json.dumps(result))
    page = tmp_path / "page.md"
    page.write_text(f"before\n<!-- {kind} tiny:start -->\nwhat stood here\n<!-- end -->\nafter\n")
    assert numerics.main(page, tmp_path, check=True) == 1
    assert "run python -m lab.numerics" in capsys.readouterr().out
    assert numerics.main(page, tmp_path, check=False) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "what stood here" not in text
    (noisy,) = [line for line in text.splitlines() if "fake noisy" in line]
    assert f"{result['rows'][0]['perplexity']:.4f} |" in noisy
    assert f"| {result['rows'][0]['difference']:+.3%} ± " in noisy
    assert "F32 x3" in text
    assert f"- `{result['command']}`, {result['machine']}, {result['date']}\n" in text
    assert numerics.main(page, tmp_path, check=True) == 0


def test_several_results_stand_in_one_table(measured, tmp_path):
    _, result = measured
    for name in ("one", "two"):
        (tmp_path / f"perplexity-{name}.json").write_text(json.dumps({**result, "model": name}))
    text = numerics.filled("<!-- models one two:start -->\n<!-- end -->\n", tmp_path)
    assert [line.split(":")[0] for line in text.splitlines() if "fake" in line] == ["| one", "| one", "| two", "| two"]


def test_the_committed_page_shows_the_committed_results():
    assert numerics.main(numerics.PAGE, numerics.RESULTS, check=True) == 0


@pytest.mark.model
def test_the_default_model_on_text(monkeypatch, tmp_path):
    monkeypatch.setattr(perplexity, "RESULTS", tmp_path)
    size = ["--tokens", "190", "--window", "192"]
    perplexity.main(
        ["smollm2", "--dtype", "quantized", "quantized+int8", *size, "--stored-as", "Q5_1", "--save-as", "x"]
    )
    result = json.loads((tmp_path / "perplexity-x.json").read_text())
    quantized, int8_kv = result["rows"]
    assert result["stored_types"] == {"Q5_1": 211}
    assert result["against"]["dtype"] == "float32"
    assert 10 < result["against"]["perplexity"] < 200
    assert 0 < quantized["kl"] < int8_kv["kl"] < 0.01
    assert quantized["standard_error"] is None  # one window
    assert int8_kv["runtime"] == f"{quantized['runtime']}, KV int8"
