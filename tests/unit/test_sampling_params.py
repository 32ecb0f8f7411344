"""Every bound of SamplingParams holds, and its error names the parameter."""

import math

import pytest

from octavo.errors import InvalidValueError, UnsupportedParameterError
from octavo.sampling_params import MAX_STOP, RequestOutputKind, SamplingParams, StructuredOutputsParams


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("n", 1.0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "0"),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("min_p", 1.5),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("seed", 1 << 63),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 17),  # above max_tokens
        ("logprobs", 21),
        ("stop", ["x"] * (MAX_STOP + 1)),
        ("stop", [""]),
        ("stop", [3]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", "12"),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", dict.fromkeys(range(301), 1.0)),
        ("output_kind", "some"),
        ("best_of", 0),
        ("best_of", 129),
        ("length_penalty", 0.5),  # without beam search
        ("early_stopping", True),
        ("prompt_logprobs", 21),
        ("early_stopping", "always"),
        ("n", None),
        ("temperature", None),
        ("logit_bias", {"1": 1.0}),
        ("ignore_eos", "no"),
        ("use_beam_search", 1),
        ("structured_outputs", {"json": {}}),
    ],
)
def test_out_of_bounds_is_refused_by_name(name, bad):
    with pytest.raises(InvalidValueError) as caught:
        SamplingParams(**{name: bad})
    assert caught.value.param == name


@pytest.mark.parametrize(
    "given", [{"choice": "abc"}, {"choice": ["a", 1]}, {"choice": []}, {"regex": 5}, {"grammar": []}]
)
def test_a_structure_of_the_wrong_type_is_refused(given):
    with pytest.raises(InvalidValueError, match=f"{next(iter(given))} must be") as caught:
        StructuredOutputsParams(**given)
    assert caught.value.param == "structured_outputs"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("truncate_prompt_tokens", 4),
    ],
)
def test_unbuilt_parameters_are_refused_by_name(name, value):
    with pytest.raises(UnsupportedParameterError, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


def test_neutral_values_of_unbuilt_parameters_are_accepted():
    assert SamplingParams(best_of=1, use_beam_search=False, bad_words=[]).n == 1


def test_stop_is_one_string_or_many():
    assert SamplingParams(stop="a").stops == ["a"]
    assert SamplingParams(stop=["a", "b"]).stops == ["a", "b"]
    assert SamplingParams().stops == []


def test_stop_may_be_changed_later():
    params = SamplingParams()
    params.stop = "a"
    assert params.stops == ["a"]


def test_output_kind_may_be_given_by_its_value():
    assert SamplingParams(output_kind="delta").output_kind is RequestOutputKind.DELTA


@pytest.mark.parametrize(("name", "ids"), [("stop_token_ids", [3, 10]), ("logit_bias", {3: 1.0, 10: 1.0})])
def test_ids_outside_the_vocabulary_are_refused_by_name(name, ids):
    params = SamplingParams(**{name: ids})
    params.check_vocabulary(11)
    with pytest.raises(InvalidValueError, match="token id 10 is outside the vocabulary of 10") as caught:
        params.check_vocabulary(10)
    assert caught.value.param == name
