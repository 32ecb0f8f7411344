"""Who runs in the next step. No phases: each Request's `num_computed_tokens` tries to catch up with its tokens.

`schedule()` decides a step, `update()` or `fail()` takes its result; other steps may be scheduled in between. A token
that a step in flight samples is *pending*: counted, though not known yet. Its Request may run ahead, since the worker
finds the token where that step leaves it; where it may not, it has nothing to compute until the token is here. A
Request is WAITING or PREEMPTED in the queue, or RUNNING with a row and blocks; one whose step failed is a *suspect* and
runs its next step alone.

Who is admitted first and who is preempted first is a policy's to say (policies.py). Two rules keep it free of livelock
whatever a policy says: the oldest running Request can take blocks from everybody else, and a Request that an empty pool
could not finish is refused at the door.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from octavo.errors import InvalidValueError, TimeLimitError
from octavo.kvcache.manager import KVCacheManager
from octavo.messages import RequestDelta, StepRecord
from octavo.request import FinishReason, Request, RequestStatus
from octavo.scheduler.beams import Beams
from octavo.scheduler.budget import Budget, Limits
from octavo.scheduler.counts import Counts
from octavo.scheduler.deltas import append, last_deltas, new_row
from octavo.scheduler.door import Door, refuse_impossible, too_late
from octavo.scheduler.forks import Forks
from octavo.scheduler.policies import FcfsPolicy, Policy, victim
from octavo.scheduler.rows import Rows
from octavo.step import NO_BLOCKS, Blocks, ModelRunnerOutput, ScheduledRow, SchedulerOutput


@dataclass(slots=True)
class _Step:
    """What the scheduler remembers of a step in flight."""

    requests: list[Request] = field(default_factory=list)  # parallel to SchedulerOutput.scheduled
    hashed: list[tuple[int, bytes]] = field(default_factory=list)  # blocks made findable before they are written


class Scheduler:
    """Admits, runs, preempts and finishes Requests over one KV pool.

    Args:
        kv: the block tables; owned by the scheduler from now on.
        limits: of Requests and tokens, running and waiting.
        policy: the queue's order, and who yields; first come, first served by default.
        clock: seconds, the clock of Request.arrival_time.
    """

    def __init__(
        self,
        kv: KVCacheManager,
        limits: Limits,
        *,
        policy: Policy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.kv = kv
        self.max_model_len = limits.max_model_len
        self._budget = Budget(limits)
        self._rows = Rows(kv, limits.max_num_seqs, limits.admission_headroom)
        self._clock = clock
        self._requests: dict[str, Request] = {}
        self.policy: Policy = policy if policy is not None else FcfsPolicy()
        self.door = Door(limits.max_num_queued_reqs, limits.max_num_queued_tokens)
        self._now = clock()  # read once per call: what a recorded run needs to be replayed
        self.preempted: list[tuple[Request, Request]] = []  # by the last schedule(): who, and for whom
        self._beams = Beams()
        self._forks = Forks()
        self._ready: list[Request] = []  # parents whose prompt the step being decided completes
        self.suspects: dict[str, Request] = {}  # waiting or running, to be tried alone, in this order
        self._in_flight: dict[int, _Step] = {}
        self._next_step = 0
        self._counts = Counts()

    @property
    def has_unfinished(self) -> bool:
        """True while any Request has not ended. With no step in flight, schedule() then makes progress."""
        return bool(self._requests)

    @property
    def next_step(self) -> int:
        """The number that the next step will have."""
        return self._next_step

    def find(self, request_id: str) -> Request | None:
        """A live Request."""
        return self._requests.get(request_id)

    def close(self) -> None:
        """The engine ends well; nothing is called any more."""

    @property
    def num_running(self) -> int:
        """Requests that have a row and blocks."""
        return len(self._rows.running)

    @property
    def num_waiting(self) -> int:
        """Requests that wait to be admitted, for the first time or again."""
        if not self._beams:
            return len(self._requests) - len(self._rows.running)
        return len(self._requests) - sum(request_id in self._requests for request_id in self._rows.running)

    def holders(self) -> list[Request]:
        """The Requests that run, and those that were preempted and wait again."""
        preempted = [r for r in self._requests.values() if r.status is RequestStatus.PREEMPTED]
        return [*self._rows.running.values(), *preempted]

    def add(self, request: Request) -> None:
        """Puts a new Request into the queue.

        Raises:
            InvalidValueError: an empty prompt, or an id that is in use.
            ContextLengthError: too long for the context, or for the whole KV pool.
            QueueFullError: as many wait as may.
        """
        if request.request_id in self._requests:
            raise InvalidValueError(f"request_id {request.request_id!r} is already running", param="request_id")
        request.max_length = min(request.num_prompt_tokens + request.max_tokens, self.max_model_len)
        request.max_pending = self._budget.max_pending(request)
        refuse_impossible(request, self.kv, self.max_model_len, self._rows.num_rows)
        self.door.enter(request, self.num_waiting, self._clock())
        for member in self._beams.add(request, self.max_model_len):
            self.kv.add(member)
        parent = self._requests.get(request.fork_of or "")
        self._requests[request.request_id] = request
        self.policy.arrived(request)
        if request.retry_alone:
            self.suspects[request.request_id] = request
        elif parent is not None and self._forks.try_hold(request, parent):
            return  # its prompt is its parent's
        else:
            self.policy.push(request)
        self.kv.digest_all(request)

    def abort(self, request_id: str) -> list[RequestDelta]:
        """Ends a Request nobody wants any more, at once: its last delta, or nothing if it has ended already."""
        request = self._requests.get(request_id)
        if request is None:
            return []
        return self._give_up(request, FinishReason.ABORT)

    def expire(self) -> list[RequestDelta]:
        """Ends the Requests whose deadline has passed: their last deltas."""
        deltas = []
        for request_id in self.door.expired(self._clock()):
            request = self._requests[request_id]
            deltas += self._give_up(request, FinishReason.ERROR, too_late(request), TimeLimitError.__name__)
        return deltas

    def finish(self, request_id: str, num_kept: int) -> None:
        """Ends a Request after `num_kept` generated tokens, because the front saw a stop string in them.

        Later tokens are dropped. The front knows already, so there is no delta; an id that has ended is ignored.
        """
        request = self._requests.get(request_id)
        if request is not None:
            del request.token_ids[request.num_prompt_tokens + max(num_kept, 0) :]
            self._end(request)

    # ------------------------------------------------------------------------------------------------- schedule

    def schedule(self) -> SchedulerOutput:
        """Decides the next step: running Requests in order, then waiting ones, under one token budget.

        An output without rows means that there is nothing to compute now; it must not be executed. Any other one must
        come back, in order, through update() or fail().
        """
        output, step = SchedulerOutput(step=self._next_step), _Step()
        self._now = self._clock()
        self.kv.pool.now = int(self._now)
        self.preempted.clear()
        self._budget.begin(self.policy.prefill_cap(self._rows.running.values()))
        if self.suspects:
            self._schedule_suspect(output, step)
            self._fork(output, step, 0)
        else:
            self._schedule_running(output, step)
            if self._ready or len(self.policy):
                self._schedule_waiting(output, step)
        if output.scheduled:
            if self.kv.host.copies:
                output.copy_blocks = self.kv.take_copies()
                step.hashed += self.kv.host.take_changed()
            self._in_flight[output.step] = step
            self._next_step += 1
        return output

    def _schedule_suspect(self, output: SchedulerOutput, step: _Step) -> None:
        """Runs the first suspect with no other Request in its step, or in flight: a failure is then its own."""
        if self._in_flight:
            return
        request = next(iter(self.suspects.values()))
        if request.status is RequestStatus.RUNNING:
            share = self._budget.share(request, output.num_tokens)
            order = [request, *(other for other in self._rows.ranked(self.policy) if other is not request)]
            if (blocks := self._allocate(output, request, request.num_computed_tokens + share, order)) is not None:
                self._schedule_row(output, step, request, share, blocks)
        elif not self._try_admit(output, step, self._beams.leader(request)):
            self._schedule_running(output, step)  # no row or blocks yet: those that hold them go on, and end

    def _schedule_running(self, output: SchedulerOutput, step: _Step) -> None:
        """Gives each running Request its share; for its blocks the last in the policy's order are preempted.

        One that would run ahead takes no blocks from anybody: it waits until its token is here.
        """
        order = self._rows.ranked(self.policy)
        charge = self.policy.charge if self.policy.charges else None
        scheduled, requests = output.scheduled, step.requests
        num_tokens, max_tokens = output.num_tokens, self._budget.max_tokens
        kv_read = 0
        for request in order:
            if num_tokens == max_tokens:
                break
            start, num_pending = request.num_computed_tokens, request.num_pending
            if request.plain_from <= start:  # what most rows of most steps are, made short: one more token
                if num_pending and (num_pending > request.max_pending or start + 1 >= request.max_length):
                    continue  # Budget.can_run_ahead() without a call
                blocks = NO_BLOCKS if start < request.num_slots else self._allocate(output, request, start + 1, order)
                if blocks is None:
                    continue
                scheduled.append(ScheduledRow(request.row, request.request_id, request.epoch, start, 1, True, blocks))
                requests.append(request)
                request.num_computed_tokens = end = start + 1
                request.num_pending = num_pending + 1
                num_tokens += 1
                kv_read += end
                if charge is not None:
                    charge(request, start, end)
                continue
            share = self._budget.share(request, num_tokens)
            if not share or request.status is not RequestStatus.RUNNING:  # preempted with another of its beams
                continue
            if (blocks := self._allocate(output, request, start + share, order)) is not None:
                self._schedule_row(output, step, request, share, blocks)
                num_tokens += share
        output.num_tokens = num_tokens
        self._counts.num_kv_read += kv_read

    def _allocate(self, output: SchedulerOutput, request: Request, end: int, order: list[Request]) -> Blocks | None:
        """Blocks for a running Request up to position `end`, at the cost of those behind it in `order`; None where it
        has to wait, or went itself."""
        while (blocks := self.kv.try_allocate(request, end)) is None and not request.num_pending:
            behind = order[order.index(request) + (request is order[0]) :]
            running = [r for r in behind if r.status is RequestStatus.RUNNING]
            loser = victim(self.policy, [r for r in running if not self._beams.keep(r, output, order)])
            if loser is None:
                return None
            self._preempt(self._beams.leader(loser), request)
            if request.status is not RequestStatus.RUNNING:
                return None
        return blocks

    def _schedule_waiting(self, output: SchedulerOutput, step: _Step) -> None:
        """Forks what can be forked, then admits the queue's first, again and again, until something is used up."""
        self._fork(output, step, len(self._rows.free))
        while (request := self.policy.first(self._now)) is not None and self._try_admit(output, step, request):
            self.policy.remove(request)
            self._fork(output, step, len(self._rows.free))

    def _fork(self, output: SchedulerOutput, step: _Step, limit: int) -> None:
        """Children of a Request whose prompt this step completes sample from its logits; those over the limit queue up.

        Only once nobody is preempted in this step any more: whoever is in it has its row to itself.
        """
        ready, self._ready = self._ready, []
        for parent in ready:
            children = self._forks.take(parent)
            for child in children[:limit]:
                self._rows.fork(parent, child, self._now)
                self.door.admitted(child, self._now)
                self._send_row(output, child)
                self._schedule_row(output, step, child, 0)
                output.scheduled[-1].fork_of = parent.row
            self._counts.num_forked += len(children[:limit])
            for child in children[limit:]:
                self.policy.push(child)
            limit = max(0, limit - len(children))

    def _try_admit(self, output: SchedulerOutput, step: _Step, request: Request) -> bool:
        """Gives a waiting Request, with its beams, rows and blocks, and its first share of the step."""
        if output.num_tokens == self._budget.max_tokens or not self._budget.prefill_left:
            return False
        members = self._beams.members(request)
        if (starts := self._rows.try_allocate(members)) is None:
            return False
        if request.first_scheduled_time is None:
            request.num_cached_tokens = starts[0]
            self._counts.looked_up(request, starts[0], self.kv)
            self.door.admitted(request, self._now)
        alone = next(iter(self.suspects.values()), None)
        for member, start in zip(members, starts, strict=True):
            self._rows.start(member, start, self._now)
            self._send_row(output, member)
            share = self._budget.share(member, output.num_tokens)
            if share and alone in (None, member):
                self._schedule_row(output, step, member, share)
        return True

    def _schedule_row(
        self, output: SchedulerOutput, step: _Step, request: Request, share: int, blocks: Blocks = NO_BLOCKS
    ) -> None:
        """Puts a running Request's share, with the blocks it needed, into the step."""
        start = request.num_computed_tokens
        end = start + share
        samples = end == len(request.token_ids) + request.num_pending
        request.num_pending += samples
        row = ScheduledRow(request.row, request.request_id, request.epoch, start, share, samples)
        if request.has_moved:
            self._send_row(output, request)
        elif blocks:
            row.new_block_ids = blocks
        output.scheduled.append(row)
        output.num_tokens += share
        step.requests.append(request)
        request.num_computed_tokens = end
        num_prompt = len(request.prompt_token_ids)
        if start < num_prompt:  # Requests of this very step may hit them: every layer writes KV before it attends
            step.hashed += self.kv.hash_full(request, min(end, num_prompt))
        if samples and request in self._forks:
            self._ready.append(request)
        self._counts.scheduled(request, start, share, samples=samples)
        self._budget.take(request, share, samples)
        if self.policy.charges:
            self.policy.charge(self._beams.leader(request), max(start, request.num_lost_tokens), end)

    def _send_row(self, output: SchedulerOutput, request: Request) -> None:
        """Sends the whole state of a row, as it is before this step."""
        request.has_moved = False
        output.new_rows.append(new_row(request, self.kv.block_ids(request), self._beams.num_logprobs(request)))

    # --------------------------------------------------------------------------------------------------- update

    def update(self, output: SchedulerOutput, result: ModelRunnerOutput) -> list[RequestDelta]:
        """Takes a step's tokens: hashes, appends, stops. What is of an old epoch is dropped."""
        step = self._in_flight.pop(output.step)
        deltas: list[RequestDelta] = []
        is_plain = not self.suspects
        for request, item, tokens, logprobs in zip(
            step.requests, output.scheduled, result.token_ids, result.logprobs, strict=True
        ):
            if request.epoch != item.epoch:
                continue
            if (  # again what most are: one more token, and not the last
                is_plain
                and len(tokens) == 1
                and request.plain_from <= item.start < request.max_length - 2
                and (token := tokens[0]) not in request.stop_ids
            ):
                request.num_pending -= 1
                request.token_ids.append(token)
                deltas.append(RequestDelta(request.request_id, tokens, logprobs))  # the front knows the rest already
                continue
            if item.start < request.plain_from:  # behind that, all at once when they are given back
                self.kv.hash_full(request, item.start + item.num_tokens)
            if request.reads_prompt:
                request.prompt_logprobs += result.prompt_logprobs.get(item.row, [])
            if not tokens:
                continue
            request.num_pending -= 1
            if request.retry_alone:  # it sampled: it was not the guilty one
                request.retry_alone = False
                del self.suspects[request.request_id]
            if request in self._beams:
                answers, num_forked = self._beams.grow(request, logprobs, self.kv)
                self._counts.num_forked += num_forked
                if answers is not None:
                    deltas += answers
                    self._end(self._beams.leader(request))
            else:
                deltas.append(append(request, tokens, logprobs, result.vectors.get(item.row)))
                if deltas[-1].finish_reason is not None:
                    self._end(request)
        return deltas

    def fail(self, output: SchedulerOutput, error: str) -> list[RequestDelta]:
        """A step failed, and with it every later one in flight, for which this is called too, in order.

        What the step was to fill is unhashed; its Requests start over, each alone. One that fails alone ends with
        `error`; the others never notice.
        """
        step = self._in_flight.pop(output.step)
        self.kv.unhash(step.hashed)
        deltas: list[RequestDelta] = []
        for request, item in zip(step.requests, output.scheduled, strict=True):
            if request.epoch != item.epoch:
                continue
            if request.retry_alone:
                deltas += self._give_up(self._beams.leader(request), FinishReason.ERROR, error)
                continue
            request.num_computed_tokens = item.start
            for member in self._beams.members(request):
                self._release(member)
                if member.token_ids:
                    member.retry_alone = True
                    self.suspects[member.request_id] = member
        return deltas

    # -------------------------------------------------------------------------------------------- ends and counts

    def _preempt(self, request: Request, whom: Request) -> None:
        """Takes a running Request's row and blocks, because `whom` needs blocks; it waits again."""
        self.preempted.append((request, whom))
        self._counts.num_preempted += 1
        request.num_preemptions += 1
        for member in self._beams.members(request):
            self._counts.num_preempted_tokens += member.num_computed_tokens
            self._release(member)
        self.policy.put_back(request)

    def _release(self, request: Request) -> None:
        """Takes row and blocks, and what it told of a round of beams."""
        self._beams.forget_round(request)
        self._rows.release(request)

    def _end(self, request: Request) -> None:
        """Forgets a Request, with all its beams, wherever it is."""
        suspected = bool(self.suspects) and any(member.retry_alone for member in self._beams.members(request))
        for member in self._beams.members(request):
            if member.status is RequestStatus.RUNNING:
                self._release(member)
            elif member is request and not suspected and not self._forks.drop(request):
                self.policy.remove(request)
            self.suspects.pop(member.request_id, None)
            self.kv.forget(member)
            member.status = RequestStatus.FINISHED
        self._beams.drop(request)
        if (heir := self._forks.heir(request)) is not None:
            self.policy.push(heir)
        self.policy.ended(request)
        self.door.left(request)
        del self._requests[request.request_id]

    def _give_up(
        self, request: Request, reason: FinishReason, error: str | None = None, kind: str | None = None
    ) -> list[RequestDelta]:
        """Ends a Request before its time: the last delta of each of its answers."""
        self._end(request)
        return last_deltas(request, reason, error, kind)

    def fill(self, record: StepRecord, output: SchedulerOutput) -> None:
        """Writes the counts of schedule() into the step's record; preemptions since the last record included."""
        record.num_waiting = self.num_waiting
        self._counts.fill(record, output, self._rows.running.values(), self.kv)
