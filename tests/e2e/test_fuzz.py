"""Mutated requests to a real server; `make fuzz` sends 100,000 (tools/fuzz_server.py says what must hold)."""

import pytest

from tools import fuzz_server
from tools.fuzz_requests import Requests


@pytest.mark.parametrize("seed", [100])
def test_mutated_requests_harm_nobody(seed):
    fuzzer = fuzz_server.run(400, seed=seed)
    assert not fuzzer.failures, "\n".join(fuzzer.failures)
    counts = fuzzer.counts
    statuses = sum(count for name, count in counts.items() if name.isdigit())
    assert statuses + counts["left"] + counts["hung up"] == 400, "every request was answered, left or hung up on"
    assert counts["200"] > 50
    assert counts["400"] > 100
    assert counts["canaries"] == 2


def test_a_number_is_always_the_same_request():
    document = {"paths": {}}
    one, other = Requests(1, document), Requests(1, document)
    assert [one.draw(number) for number in range(50)] == [other.draw(number) for number in range(50)]
    assert one.draw(3) != Requests(2, document).draw(3)


def test_failures_are_found():
    fuzzer = fuzz_server.Fuzzer(Requests(1, {"paths": {}}))
    headers = {"x-request-id": "r", "content-type": "text/event-stream"}
    wrong = [
        fuzz_server.Reply(500, headers, b"{}"),
        fuzz_server.Reply(503, headers, b"{}"),
        fuzz_server.Reply(400, headers, b'{"error": "Unauthorized"}'),
        fuzz_server.Reply(200, headers, b'data: {"choices": []}\n\n'),
        fuzz_server.Reply(200, headers, b'data: {"error": {"type": "server_error"}}\n\ndata: [DONE]\n\n'),
    ]
    for number, reply in enumerate(wrong):
        fuzzer.judge(number, "/v1/completions", reply)
    assert len(fuzzer.failures) == fuzzer.counts["failures"] == len(wrong)
