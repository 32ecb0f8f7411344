"""Beam search: one request, `width` hypotheses that grow together, the best kept after every step.

Each beam is a Request of its own, with row and table; they are admitted, preempted and ended together. A round is over
when every living beam has told its most likely next tokens. Then the best continuations are chosen over all beams:
the first child of a beam goes on in its place, further children fork its KV onto the beams that nobody continues.

The rules (what counts as finished, length penalty, when to stop) are those of transformers' `generate`, so results can
be compared token for token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from octavo.kvcache.manager import KVCacheManager
from octavo.messages import RequestDelta
from octavo.request import FinishReason, Request, answer_id
from octavo.scheduler.deltas import make_delta
from octavo.step import SchedulerOutput, TokenLogprobs


@dataclass(slots=True)
class Hypothesis:
    """A finished answer. `score` is its log probability over length ** length_penalty."""

    score: float
    token_ids: list[int]
    logprob: float
    logprobs: list[TokenLogprobs] | None
    is_stopped: bool  # by its last token, not by its length


@dataclass(slots=True)
class _Beam:
    """What a living beam has: its Request, its log probability, and what it told in this round."""

    request: Request
    logprob: float = 0.0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    told: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class _Candidate:
    logprob: float  # of the whole hypothesis
    parent: _Beam
    rank: int  # of the token among the parent's most likely ones, from 0

    @property
    def token(self) -> int:
        told = self.parent.told
        assert told is not None
        return told.top_ids[self.rank]


class Beams:
    """All beam searches under way, by the id of each of their Requests. The first member of a search is the request as
    it came, and stands for all of them in queue and policy."""

    def __init__(self) -> None:
        self._searches: dict[str, BeamSearch] = {}

    def __len__(self) -> int:
        return len(self._searches)

    def __contains__(self, request: Request) -> bool:
        return request.request_id in self._searches

    def add(self, request: Request, max_model_len: int) -> list[Request]:
        """Begins a search where a new Request asks for one; its members, or the Request alone."""
        if request.params.use_beam_search:
            most = min(request.max_tokens, max_model_len - request.num_prompt_tokens)
            search = BeamSearch(request, most)
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

    def is_told(self, request: Request, logprobs: TokenLogprobs) -> bool:
        """Takes a beam's likeliest next tokens; True when it was the last of its round."""
        return self._searches[request.request_id].is_told(request, logprobs)

    def advance(self, request: Request, kv: KVCacheManager) -> int | None:
        """Ends a round: how many beams were forked, or None when the search is over."""
        return self._searches[request.request_id].advance(kv)

    def answers(self, request: Request) -> list[RequestDelta]:
        """The n best answers of a search that is over."""
        return self._searches[request.request_id].answers()

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
    """The beams of one request, and the answers found so far.

    Args:
        first: the request as it came; the other members are made here. Its params give width (best_of, else n), length
            penalty, early stopping, and how many answers are wanted (n).
        num_tokens: most tokens of an answer.
    """

    def __init__(self, first: Request, num_tokens: int) -> None:
        params = first.params
        self.width = params.beam_width
        self.num_candidates = self.width + len(first.stop_ids)  # of each beam: enough that `width` go on
        self.members = [first, *(_member(first, index) for index in range(1, self.width))]
        self._params = params
        self._max_tokens = num_tokens
        self._num_kept = max(2, 1 + len(first.stop_ids)) * self.width
        self._living = [_Beam(first)]
        self._finished: list[Hypothesis] = []  # best first
        self._can_improve = True

    def is_told(self, request: Request, logprobs: TokenLogprobs) -> bool:
        """Takes a beam's most likely next tokens; True when it was the last of this round."""
        for beam in self._living:
            if beam.request is request:
                beam.told = logprobs
        return all(beam.told is not None for beam in self._living)

    def forget_round(self) -> None:
        """The beams lost their rows: all of them will tell again."""
        for beam in self._living:
            beam.told = None

    def advance(self, kv: KVCacheManager) -> int | None:
        """Ends a round. The beams' tables and tokens are ready for the next one, or None: the search is over.

        Returns how many beams were forked.
        """
        length = self._living[0].request.num_output_tokens + 1
        best = self._candidates(length)
        goes_on = [not self._stops(c, length) for c in best]
        is_full = len(self._finished) == self.width and self._params.early_stopping is True
        if self._can_improve and not is_full:
            stopped = [c for c, continues in zip(best[: self.width], goes_on, strict=False) if not continues]
            self._finished += [self._hypothesis(candidate, length) for candidate in stopped]
            self._finished.sort(key=lambda h: -h.score)  # stable: of equal ones the first stays before
            del self._finished[self.width :]
        chosen = [c for c, continues in zip(best, goes_on, strict=True) if continues][: self.width]
        if not chosen or self._is_over(chosen[0].logprob, length):
            return None
        return self._rearrange(chosen, kv)

    def answers(self) -> list[RequestDelta]:
        """The n best hypotheses, each as the one delta of its answer."""
        deltas = []
        for index in range(self._params.n):
            delta = make_delta(self.members[0], finish_reason=FinishReason.LENGTH)
            delta.request_id = answer_id(self.members[0].request_id, index, self._params.n)
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

    def _candidates(self, length: int) -> list[_Candidate]:
        """The best continuations over all beams, best first; equal ones in the order of beams and tokens."""
        may_stop = length > self._params.min_tokens
        stop_ids = self.members[0].stop_ids
        found = []
        for beam in self._living:
            assert beam.told is not None
            for rank, (token, logprob) in enumerate(zip(beam.told.top_ids, beam.told.top_logprobs, strict=True)):
                if may_stop or token not in stop_ids:
                    found.append(_Candidate(beam.logprob + logprob, beam, rank))
        found.sort(key=lambda candidate: -candidate.logprob)
        return found[: self._num_kept]

    def _stops(self, candidate: _Candidate, length: int) -> bool:
        return length >= self._max_tokens or candidate.token in self.members[0].stop_ids

    def _hypothesis(self, candidate: _Candidate, length: int) -> Hypothesis:
        token = candidate.token
        return Hypothesis(
            score=candidate.logprob / length**self._params.length_penalty,
            token_ids=[*candidate.parent.request.output_token_ids, token],
            logprob=candidate.logprob,
            logprobs=self._logprobs(candidate),
            is_stopped=token in self.members[0].stop_ids,
        )

    def _is_over(self, best_logprob: float, length: int) -> bool:
        """Whether the answers cannot get better, as far as one cares (early_stopping)."""
        if len(self._finished) < self.width:
            return False
        params = self._params
        reach = self._max_tokens if params.early_stopping == "never" and params.length_penalty > 0 else length
        if best_logprob / reach**params.length_penalty <= self._finished[-1].score:
            self._can_improve = False
        return not self._can_improve or params.early_stopping is True

    def _rearrange(self, chosen: list[_Candidate], kv: KVCacheManager) -> int:
        """Gives each chosen continuation a Request: its parent's, or one that nobody continues."""
        in_place: dict[str, _Candidate] = {}
        for candidate in chosen:
            in_place.setdefault(candidate.parent.request.request_id, candidate)
        spare = [member for member in self.members if member.request_id not in in_place]
        for member in spare:
            kv.free(member)
            member.token_ids, member.num_computed_tokens = [], 0
        living, forked = [], 0
        for candidate in chosen:
            parent = candidate.parent.request
            if in_place[parent.request_id] is candidate:
                living.append(_Beam(parent, candidate.logprob, self._logprobs(candidate) or []))
                continue
            child = spare.pop(0)
            kv.fork(parent, child, parent.num_computed_tokens)
            child.token_ids = [*parent.token_ids, candidate.token]
            child.num_computed_tokens, child.num_lost_tokens = parent.num_computed_tokens, parent.num_lost_tokens
            child.first_scheduled_time, child.has_moved = parent.first_scheduled_time, True
            living.append(_Beam(child, candidate.logprob, self._logprobs(candidate) or []))
            forked += 1
        for candidate in in_place.values():  # after the forks, which read the parents' tokens
            candidate.parent.request.token_ids.append(candidate.token)
            candidate.parent.request.has_moved = True  # the worker's row holds another token there
        self._living = living
        return forked

    def _logprobs(self, candidate: _Candidate) -> list[TokenLogprobs] | None:
        """Per token of the hypothesis, where they were asked for."""
        wanted, told = self._params.logprobs, candidate.parent.told
        if wanted is None or told is None:
            return None
        chosen = TokenLogprobs(
            told.top_logprobs[candidate.rank], candidate.rank + 1, told.top_ids[:wanted], told.top_logprobs[:wanted]
        )
        return [*candidate.parent.logprobs, chosen]


def _member(first: Request, index: int) -> Request:
    """A further beam, without tokens until a living one is forked onto it."""
    member = Request(
        request_id=f"{first.request_id}/{index}",
        prompt_token_ids=first.prompt_token_ids,
        params=first.params,
        stop_ids=first.stop_ids,
        max_tokens=first.max_tokens,
        arrival_time=first.arrival_time,
        priority=first.priority,
        cache_salt=first.cache_salt,
        adapter_id=first.adapter_id,
    )
    member.token_ids = []
    return member
