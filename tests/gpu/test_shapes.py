"""What captured steps are padded to."""

import pytest

pytest.importorskip("torch")

from octavo.runtime.cuda.graphs import bucket_of, buckets, mixed_rows, mixed_shape, most_mixed_tokens


@pytest.mark.parametrize("most", [1, 7, 64, 256, 1000])
def test_every_batch_has_a_bucket_that_start_up_captures(most):
    sizes = [bucket_of(n, most) for n in range(1, most + 1)]
    assert all(n <= size <= most for n, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes)
    assert buckets(most) == sorted(set(sizes), reverse=True)
    assert len(buckets(most)) <= 26


@pytest.mark.parametrize(("max_tokens", "max_rows"), [(2048, 256), (512, 64), (64, 4)])
def test_a_mixed_step_gets_a_token_and_a_request_more_than_it_has(max_tokens, max_rows):
    shapes = set()
    for num_tokens in range(1, max_tokens + 1):
        for num_requests in {1, min(num_tokens, max_rows)}:
            shape = mixed_shape(num_tokens, num_requests, max_tokens, max_rows)
            if shape is None:
                assert num_tokens >= max_tokens - 256
                continue
            shapes.add(shape)
            assert num_tokens < shape.num_tokens <= min(max_tokens, num_tokens + 256)
            assert num_requests <= shape.num_rows
            assert shape.num_rows in mixed_rows(max_rows)
    assert len(shapes) <= 48


def test_a_large_model_is_captured_for_few_tokens_only():
    assert most_mixed_tokens(600_000_000) == 2048
    assert 300 <= most_mixed_tokens(6_700_000_000) <= 400
    assert most_mixed_tokens(70_000_000_000) < 64
