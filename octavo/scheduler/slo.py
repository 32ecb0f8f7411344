"""Deadlines for first tokens, a target for the gaps between tokens: our own policy.

Admission: shortest predicted work first among those whose first token can still come in time, with ageing. Their key is
fixed when they arrive: predicted seconds of work * WORK_WEIGHT + arrival time, so a Request is overtaken only by those
that arrive within WORK_WEIGHT * (its work - theirs) after it. Whoever can no longer make its deadline (under overload
somebody cannot) waits in a second queue, first come, first served, which gets every LATE_SHARE-th admission and
whatever nobody else needs: the k-th in it is admitted after at most k * LATE_SHARE admissions. Nothing starves, and a
hopeless Request does not drag those behind it past their deadlines, which is what first come, first served does.

Chunks: a step that carries running Requests gets only as many prompt tokens as the step-cost model (cost.py) predicts
to fit into the inter-token target, but at least MIN_CHUNK, so that prompts always advance.
"""

from collections import OrderedDict
from collections.abc import Iterable

from octavo.request import Request, RequestStatus
from octavo.scheduler.cost import CostModel, StepWork
from octavo.scheduler.policies import NO_CAP, Policy, RequestHeap

WORK_WEIGHT = 4.0  # seconds of waiting that weigh as much as one second of work
LATE_SHARE = 8
MIN_CHUNK = 16  # tokens
OUTPUT_GUESS = 64  # new tokens expected of a Request that does not say fewer


class SloPolicy(Policy):
    """First tokens within `ttft` seconds of arrival, later ones every `itl` seconds; `cost` predicts steps.

    `cost` may be replaced while it runs (a first fit, then a better one)."""

    def __init__(self, ttft: float, itl: float, cost: CostModel) -> None:
        super().__init__()
        self.cost = cost
        self._ttft = ttft
        self._itl = itl
        self._hopeful = RequestHeap()
        self._late: OrderedDict[str, Request] = OrderedDict()
        self._admissions = 0

    def push(self, request: Request) -> None:
        new_tokens = min(request.max_tokens, OUTPUT_GUESS)
        work = self._prefill_seconds(request) + new_tokens * self.cost.per_row
        self._hopeful.push(request, request.arrival_time + WORK_WEIGHT * work)

    def put_back(self, request: Request) -> None:
        """It has begun: it goes on before all others."""
        self._hopeful.push(request, float("-inf"))

    def first(self, now: float) -> Request | None:
        while (request := self._hopeful.first()) is not None and self._hopeless(request, now):
            self._hopeful.remove(request)
            self._late[request.request_id] = request
        late = next(iter(self._late.values()), None)
        if request is None or (late is not None and self._admissions % LATE_SHARE == LATE_SHARE - 1):
            return late
        return request

    def remove(self, request: Request) -> None:
        self._admissions += request.status is RequestStatus.RUNNING  # else it has ended, and took nobody's turn
        if request in self._hopeful:
            self._hopeful.remove(request)
        else:
            del self._late[request.request_id]

    def prefill_cap(self, running: Iterable[Request]) -> int:
        decoding: list[int] = []
        context = 0
        for request in running:
            if request.num_tokens - request.num_computed_tokens <= 1:
                decoding.append(request.num_tokens)
            else:
                context = max(context, request.num_tokens // 2)
        if not decoding:
            return NO_CAP
        work = StepWork(len(decoding), len(decoding), sum(decoding), 0)
        return max(MIN_CHUNK, self.cost.prefill_tokens(self._itl, work, context))

    def __len__(self) -> int:
        return len(self._hopeful) + len(self._late)

    def _hopeless(self, request: Request, now: float) -> bool:
        deadline = request.arrival_time + self._ttft
        return request.first_scheduled_time is None and now + self._prefill_seconds(request) > deadline

    def _prefill_seconds(self, request: Request) -> float:
        n = request.num_prompt_tokens
        return self.cost.seconds(StepWork(n, 1, n, n * (n + 1) // 2))
