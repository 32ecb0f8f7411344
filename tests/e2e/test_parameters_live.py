"""Each parameter, changed alone, changes the real model's answer in the stated way."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import httpx
import pytest

pytestmark = pytest.mark.model

STORY = {"prompt": "Once upon a time, there was a", "max_tokens": 10, "temperature": 0, "return_token_ids": True}
REPEATING = {"prompt": "one one one one one one one one", "max_tokens": 10, "temperature": 0, "return_token_ids": True}
WARM = {**STORY, "temperature": 2.0, "seed": 11}


@pytest.fixture(scope="module")
def http(server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.root, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def complete(http: httpx.Client) -> Callable[..., dict]:
    """The first choice of a completion, with its usage."""

    def post(**body: object) -> dict:
        answer = http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return {**answer.json()["choices"][0], "usage": answer.json()["usage"], "choices": answer.json()["choices"]}

    return post


@pytest.fixture(scope="module")
def base(complete) -> dict:
    return complete(**STORY)


@pytest.fixture(scope="module")
def eos(http: httpx.Client) -> int:
    tokens = http.post("/tokenize", json={"prompt": "<|im_end|>", "add_special_tokens": False}).json()["tokens"]
    assert len(tokens) == 1
    return tokens[0]


def test_greedy_repeats_itself(complete, base: dict) -> None:
    assert complete(**STORY)["token_ids"] == base["token_ids"]
    assert len(base["token_ids"]) == 10
    assert base["finish_reason"] == "length"


def test_max_tokens(complete, base: dict) -> None:
    assert complete(**{**STORY, "max_tokens": 4})["token_ids"] == base["token_ids"][:4]


def test_prompt_as_ids_is_the_same_prompt(complete, base: dict) -> None:
    assert complete(**{**STORY, "prompt": base["prompt_token_ids"]})["token_ids"] == base["token_ids"]


def test_echo(complete, base: dict) -> None:
    assert complete(**STORY, echo=True)["text"] == STORY["prompt"] + base["text"]


def test_stop_and_what_is_kept(complete, base: dict) -> None:
    word = base["text"].split()[3]
    cut = base["text"].index(word)
    stopped = complete(**STORY, stop=[word])
    assert (stopped["text"], stopped["finish_reason"], stopped["stop_reason"]) == (base["text"][:cut], "stop", word)
    kept = complete(**STORY, stop=[word], include_stop_str_in_output=True)
    assert kept["text"] == base["text"][: cut + len(word)]


def test_stop_token_ids(complete, base: dict) -> None:
    token = base["token_ids"][4]
    end = base["token_ids"].index(token) + 1
    stopped = complete(**STORY, stop_token_ids=[token])
    assert stopped["token_ids"] == base["token_ids"][:end]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", token)
    assert base["text"].startswith(stopped["text"])


def test_logit_bias(complete, base: dict) -> None:
    first = base["token_ids"][0]
    assert complete(**STORY, logit_bias={str(first): -100})["token_ids"][0] != first
    assert complete(**STORY, logit_bias={"500": 100})["token_ids"] == [500] * 10


def test_temperature_and_seed(complete, base: dict) -> None:
    warm = complete(**WARM)
    assert warm["token_ids"] != base["token_ids"]
    assert complete(**WARM)["token_ids"] == warm["token_ids"]
    assert complete(**{**WARM, "seed": 12})["token_ids"] != warm["token_ids"]


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_cutting_the_tail_to_one_token_is_greedy(complete, base: dict, narrow: dict) -> None:
    assert complete(**WARM, **narrow)["token_ids"] == base["token_ids"]


def test_n_gives_different_answers_of_which_the_first_is_that_of_one(complete) -> None:
    three = complete(**WARM, n=3)["choices"]
    assert [choice["index"] for choice in three] == [0, 1, 2]
    assert len({tuple(choice["token_ids"]) for choice in three}) == 3
    assert three[0]["token_ids"] == complete(**WARM)["token_ids"]


@pytest.mark.parametrize("penalty", [{"presence_penalty": 2}, {"frequency_penalty": 2}, {"repetition_penalty": 2}])
def test_penalties_break_a_repetition(complete, penalty: dict) -> None:
    plain = complete(**REPEATING)["token_ids"]
    assert len(set(plain)) < 4, "the model repeats the word"
    assert len(set(complete(**REPEATING, **penalty)["token_ids"])) > len(set(plain))


def test_eos_min_tokens_and_ignore_eos(complete, eos: int) -> None:
    ending = {**STORY, "logit_bias": {str(eos): 100}}
    ended = complete(**ending)
    assert (ended["token_ids"], ended["text"], ended["finish_reason"]) == ([eos], "", "stop")
    later = complete(**ending, min_tokens=5)["token_ids"]
    assert len(later) == 6
    assert later.index(eos) == 5
    ignoring = complete(**ending, ignore_eos=True)
    assert (ignoring["token_ids"], ignoring["text"], ignoring["finish_reason"]) == ([eos] * 10, "", "length")
    assert complete(**ending, ignore_eos=True, skip_special_tokens=False)["text"] == "<|im_end|>" * 10


def test_cache_salt_separates_what_the_prefix_cache_shares(complete) -> None:
    body = {"prompt": list(range(1000, 1064)), "max_tokens": 1, "temperature": 0}
    complete(**body, cache_salt="a")
    assert complete(**body, cache_salt="a")["usage"]["prompt_tokens_details"]["cached_tokens"] >= 48
    assert complete(**body, cache_salt="b")["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_chat_template_switches(http: httpx.Client) -> None:
    def count(**body: object) -> int:
        return http.post("/tokenize", json={"messages": [{"role": "user", "content": "Hi"}], **body}).json()["count"]

    assert count(add_generation_prompt=False) < count()
    assert count(add_generation_prompt=False, continue_final_message=True) < count(add_generation_prompt=False)


def test_tokenize_and_back(http: httpx.Client) -> None:
    text = "Straße, naïve café: 東京 🙂\n\tdef f(x): return x**2"
    tokens = http.post("/tokenize", json={"prompt": text}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == text


def test_metrics_move(http: httpx.Client, complete) -> None:
    def generated() -> float:
        lines = http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("octavo:generation_tokens_total"))

    before = generated()
    complete(**STORY)
    assert generated() - before == 10
