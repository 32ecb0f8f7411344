"""The frame that `octavo top` draws, from what GET /memory may tell."""

from rich.console import Console

from octavo.cli.top import frame

METRICS = {
    "generation_tokens_total": 100.0,
    "prefix_cache_hits_total": 30.0,
    "prefix_cache_queries_total": 120.0,
    "num_preemptions_total": 2.0,
    "num_requests_running": 1.0,
    "num_requests_waiting": 3.0,
    "cpu_cache_usage_perc": 0.0,
}
HOLDER = {"request_id": "cmpl-1", "status": "running", "num_prompt_tokens": 1234, "num_output_tokens": 5}


def told(states: str, at: float = 0.0, **changes: object) -> dict:
    holders = [{**HOLDER, "num_preemptions": 1, "blocks": [0, 2, 4, 1]}]
    holders.append({**HOLDER, "request_id": "[red]", "status": "preempted", "num_preemptions": 1, "blocks": []})
    known = {"states": states, "ages": "0" * len(states), "block_size": 16}
    return {**known, "holders": holders, "metrics": METRICS, "at": at, "url": "http://x:1", **changes}


def drawn(before: dict, now: dict, width: int = 100, height: int = 40) -> list[str]:
    console = Console(width=width, color_system=None, emoji=False)
    with console.capture() as captured:
        console.print(frame(before, now, width, height))
    return captured.get().splitlines()


def test_a_frame_tells_what_the_server_told() -> None:
    later = told("12cc3+..", 2.0, ages="00:9000f", metrics={**METRICS, "generation_tokens_total": 150.0})
    lines = drawn(told("........"), later)
    assert lines[0] == "octavo top   http://x:1   8 blocks of 16 tokens"
    assert lines[1] == "25.0 tok/s   running 1   waiting 3, 1 preempted   preemptions 2"
    assert lines[2] == "KV held 50.0%   host memory 0.0%   prefix hits 25.0%"
    assert lines[4] == "█▓░░▓▓··"
    assert lines[6] == "· free 2   ░ cached 2   █ held by one 1   ▓ shared 3   a cell: 1 block"
    assert lines[7] == "cached blocks touched within 1 s 0, 1 min 0, 17 min 2, 4.6 h 2"
    assert lines[10].split() == ["cmpl-1", "running", "3", "2", "1,234", "5", "1"]
    assert lines[11].split() == ["[red]", "preempted", "0", "0", "1,234", "5", "1"]


def test_a_cell_of_many_blocks_is_drawn_as_most_of_them_are() -> None:
    states = "1" * 40_000 + "c" * 30_000 + "." * 30_000
    lines = drawn(told(states), told(states), width=100, height=20)
    cells = "".join(line for line in lines if set(line) <= set("█░·▓"))
    assert len(cells) == 1000
    assert (cells.count("█"), cells.count("░"), cells.count("·")) == (400, 300, 300)
    assert max(map(len, lines)) <= 100
    assert lines[15].endswith("a cell: most of 100 blocks")
