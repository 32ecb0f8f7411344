"""Beam search: one request, `width` hypotheses that grow together, the best kept after every step.

Each beam is a Request of its own, with row and table; they are admitted, preempted and ended together. A round is over
when every living beam has told its most likely next tokens. Then the best continuations are chosen over all beams:
the first child of a beam goes on in its place, further children fork its KV onto the beams that nobody continues.

The rules (what counts as finished, length penalty, when to stop) are those of transformers' `generate`, so results can
be compared token for token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from octavo.kvcache.manager import KVCacheManager
from octavo.messages import RequestDelta
from octavo.request import FinishReason, Request, answer_id
from octavo.scheduler.deltas import make_delta
from octavo.scheduler.snapshot import LeftOut
from octavo.step import SchedulerOutput, TokenLogprobs


@dataclass(slots=True)
class Beam:
    """A living beam: its Request, and what it told in this round."""

    request: Request
    told: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """How a beam of the next round begins: the living one that it continues, by its place, and the token."""

    parent: int
    token: int


@dataclass(slots=True)
class Hypothesis:
    """A finished answer. `score` is its log probability over length ** length_penalty."""

    score: float
    token_ids: list[int]
    logprob: float
    logprobs: list[TokenLogprobs] | None
    is_stopped: bool  # by its last token, not by its length


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A continuation: log probability of the whole hypothesis, place of its parent, and the rank of its token among
    the parent's most likely ones, from 0."""

    logprob: float
    parent: int
    rank: int
    token: int


class Beams:
    """All beam searches under way, by the id of each of their Requests. The first member of a search is the request as
    it came, and stands for all of them in queue and policy."""

    def __init__(self) -> None:
        self._searches: dict[str, BeamSearch] = {}
        self.make_judge: Callable[[Request, int], Judge] = Judge
        # told of each round's end: the first member, the living ones' parents by place (None: it is over), the forked
        self.on_round: Callable[[Request, list[int] | None, list[Request]], None] | None = None

    def __len__(self) -> int:
        return len(self._searches)

    def __contains__(self, request: Request) -> bool:
        return request.request_id in self._searches

    def add(self, request: Request, max_model_len: int) -> list[Request]:
        """Begins a search where a new Request asks for one; its members, or the Request alone."""
        if request.params.use_beam_search:
            most = min(request.max_tokens, max_model_len - request.num_prompt_tokens)
            search = BeamSearch(request, self.make_judge(request, most))
            self._searches.update((member.request_id, search) for member in search.members)
        return self.members(request)

    def members(self, request: Request) -> list[Request]:
        """The Requests that are admitted, preempted and ended with this one, itself among them."""
        search = self._searches.get(request.request_id)
        return search.members if search is not None else [request]

    def leader(self, request: Request) -> Request:
        """The member that stands for all."""
        return self.members(request)[0]

    def num_logprobs(self, request: Request) -> int:
        """How many of the likeliest tokens its row must tell (step.NewRow)."""
        search, wanted = self._searches.get(request.request_id), request.params.logprobs
        return search.num_candidates if search is not None else -1 if wanted is None else wanted

    def grow(
        self, request: Request, logprobs: list[TokenLogprobs] | None, kv: KVCacheManager
    ) -> tuple[list[RequestDelta] | None, int]:
        """Takes a beam's likeliest next tokens; after the last of its round all move on. Returns the n best answers
        when the search is over (else None), and how many beams were forked."""
        assert logprobs is not None, "beams are told the likeliest tokens"
        search = self._searches[request.request_id]
        if not search.is_told(request, logprobs[0]):
            return None, 0
        chosen = search.judge.choose(search.living)
        forked = [] if chosen is None else search.rearrange(chosen, kv)
        if self.on_round is not None:
            self.on_round(search.members[0], None if chosen is None else [c.parent for c in chosen], forked)
        return search.judge.answers(search.members[0]) if chosen is None else None, len(forked)

    def forget_round(self, request: Request) -> None:
        """A member lost its row: all of them will tell again."""
        if request in self:
            self._searches[request.request_id].forget_round()

    def keep(self, victim: Request, output: SchedulerOutput, order: list[Request]) -> bool:
        """Whether a Request must not be preempted, because of another of its beams: in this step already, or oldest."""
        if victim not in self:
            return False
        in_step = {item.request_id for item in output.scheduled}
        return any(m.request_id in in_step or m in order[:1] for m in self.members(victim))

    def drop(self, request: Request) -> None:
        """Forgets an ended search."""
        for member in self.members(request):
            self._searches.pop(member.request_id, None)


class BeamSearch:
    """The beams of one request.

    Args:
        first: the request as it came; the other members are made here. Its params give the width (best_of, else n).
        judge: chooses who lives on.
    """

    def __init__(self, first: Request, judge: Judge) -> None:
        width = first.params.beam_width
        self.num_candidates = width + len(first.stop_ids)  # of each beam: enough that `width` go on
        self.members = [first, *(_member(first, index) for index in range(1, width))]
        self.living = [Beam(first)]
        self.judge = judge

    def is_told(self, request: Request, logprobs: TokenLogprobs) -> bool:
        """Takes a beam's most likely next tokens; True when it was the last of this round."""
        for beam in self.living:
            if beam.request is request:
                beam.told = logprobs
        return all(beam.told is not None for beam in self.living)

    def forget_round(self) -> None:
        """The beams lost their rows: all of them will tell again."""
        for beam in self.living:
            beam.told = None

    def rearrange(self, chosen: list[Choice], kv: KVCacheManager) -> list[Request]:
        """Gives each choice a Request: its parent's, or one that nobody continues; returns those. Tables and tokens are
        then ready for the next round."""
        in_place: dict[int, Choice] = {}
        for choice in chosen:
            in_place.setdefault(choice.parent, choice)
        kept = [self.living[place].request for place in in_place]
        spare = [member for member in self.members if member not in kept]
        for member in spare:
            kv.free(member)
            member.token_ids, member.num_computed_tokens = [], 0
        living, forked = [], []
        for choice in chosen:
            parent = self.living[choice.parent].request
            if in_place[choice.parent] is choice:
                living.append(Beam(parent))
                continue
            child = spare.pop(0)
            kv.fork(parent, child, parent.num_computed_tokens)
            child.token_ids = [*parent.token_ids, choice.token]
            child.num_computed_tokens, child.num_lost_tokens = parent.num_computed_tokens, parent.num_lost_tokens
            child.first_scheduled_time, child.has_moved = parent.first_scheduled_time, True
            living.append(Beam(child))
            forked.append(child)
        for place, choice in in_place.items():  # after the forks, which read the parents' tokens
            parent = self.living[place].request
            parent.token_ids.append(choice.token)
            parent.has_moved = True  # the worker's row holds another token there
        self.living = living
        return forked


class Judge(LeftOut):
    """Compares the hypotheses of one search, and keeps the answers found so far. All that is known of log probabilities
    is here, and no part of a recording.

    Args:
        first: the request; its params give length penalty, early stopping, and how many answers are wanted (n).
        num_tokens: most tokens of an answer.
    """

    def __init__(self, first: Request, num_tokens: int) -> None:
        self._params, self._stop_ids = first.params, first.stop_ids
        self._width = first.params.beam_width
        self._max_tokens = num_tokens
        self._num_kept = max(2, 1 + len(first.stop_ids)) * self._width
        self._known: list[tuple[float, list[TokenLogprobs]]] = [(0.0, [])]  # of each living beam
        self._finished: list[Hypothesis] = []  # best first
        self._can_improve = True

    def choose(self, living: list[Beam]) -> list[Choice] | None:
        """Who goes on, best first, now that all have told; None: the search is over."""
        length = living[0].request.num_output_tokens + 1
        best = self._candidates(living, length)
        goes_on = [not self._stops(c, length) for c in best]
        is_full = len(self._finished) == self._width and self._params.early_stopping is True
        if self._can_improve and not is_full:
            stopped = [c for c, continues in zip(best[: self._width], goes_on, strict=False) if not continues]
            self._finished += [self._hypothesis(candidate, living, length) for candidate in stopped]
            self._finished.sort(key=lambda h: -h.score)  # stable: of equal ones the first stays before
            del self._finished[self._width :]
        chosen = [c for c, continues in zip(best, goes_on, strict=True) if continues][: self._width]
        if not chosen or self._is_over(chosen[0].logprob, length):
            return None
        self._known = [(c.logprob, self._logprobs(c, living) or []) for c in chosen]
        return [Choice(c.parent, c.token) for c in chosen]

    def answers(self, first: Request) -> list[RequestDelta]:
        """The n best hypotheses, each as the one delta of its answer."""
        deltas = []
        for index in range(self._params.n):
            delta = make_delta(first, finish_reason=FinishReason.LENGTH)
            delta.request_id = answer_id(first.request_id, index, self._params.n)
            if index < len(self._finished):
                found = self._finished[index]
                delta.token_ids, delta.cumulative_logprob = found.token_ids, found.logprob
                delta.logprobs = found.logprobs
                if found.is_stopped:
                    delta.finish_reason = FinishReason.STOP
                    stop = found.token_ids[-1]
                    delta.stop_reason = stop if stop in (self._params.stop_token_ids or ()) else None
            deltas.append(delta)
        return deltas

    def _candidates(self, living: list[Beam], length: int) -> list[_Candidate]:
        """The best continuations over all beams, best first; equal ones in the order of beams and tokens."""
        may_stop = length > self._params.min_tokens
        found = []
        for place, beam in enumerate(living):
            assert beam.told is not None
            for rank, (token, logprob) in enumerate(zip(beam.told.top_ids, beam.told.top_logprobs, strict=True)):
                if may_stop or token not in self._stop_ids:
                    found.append(_Candidate(self._known[place][0] + logprob, place, rank, token))
        found.sort(key=lambda candidate: -candidate.logprob)
        return found[: self._num_kept]

    def _stops(self, candidate: _Candidate, length: int) -> bool:
        return length >= self._max_tokens or candidate.token in self._stop_ids

    def _hypothesis(self, candidate: _Candidate, living: list[Beam], length: int) -> Hypothesis:
        return Hypothesis(
            score=candidate.logprob / length**self._params.length_penalty,
            token_ids=[*living[candidate.parent].request.output_token_ids, candidate.token],
            logprob=candidate.logprob,
            logprobs=self._logprobs(candidate, living),
            is_stopped=candidate.token in self._stop_ids,
        )

    def _is_over(self, best_logprob: float, length: int) -> bool:
        """Whether the answers cannot get better, as far as one cares (early_stopping)."""
        if len(self._finished) < self._width:
            return False
        params = self._params
        reach = self._max_tokens if params.early_stopping == "never" and params.length_penalty > 0 else length
        if best_logprob / reach**params.length_penalty <= self._finished[-1].score:
            self._can_improve = False
        return not self._can_improve or params.early_stopping is True

    def _logprobs(self, candidate: _Candidate, living: list[Beam]) -> list[TokenLogprobs] | None:
        """Per token of the hypothesis, where they were asked for."""
        wanted, told = self._params.logprobs, living[candidate.parent].told
        if wanted is None or told is None:
            return None
        chosen = TokenLogprobs(
            told.top_logprobs[candidate.rank], candidate.rank + 1, told.top_ids[:wanted], told.top_logprobs[:wanted]
        )
        return [*self._known[candidate.parent][1], chosen]


def beam_id(request_id: str, index: int) -> str:
    """The id of a beam search's index-th member; the first has the request's own."""
    return f"{request_id}/{index}" if index else request_id


def _member(first: Request, index: int) -> Request:
    """A further beam, without tokens until a living one is forked onto it."""
    member = Request(
        request_id=beam_id(first.request_id, index),
        prompt_token_ids=first.prompt_token_ids,
        params=first.params,
        stop_ids=first.stop_ids,
        max_tokens=first.max_tokens,
        arrival_time=first.arrival_time,
        priority=first.priority,
        cache_salt=first.cache_salt,
    )
    member.token_ids = []
    return member
