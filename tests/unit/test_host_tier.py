"""The host tier: what is planned to be copied, in which order, and what is forgotten."""

from __future__ import annotations

from fake import make_request

from octavo.kvcache.host import HostTier
from octavo.kvcache.manager import KVCacheManager
from octavo.request import Request

A, B, C = b"a", b"b", b"c"


def test_the_least_recently_used_goes_first() -> None:
    host = HostTier(2, first=10)
    host.save(0, A)
    host.save(1, B)
    assert host.copies == [(0, 10), (1, 11)]
    [source] = host.hold([A])
    host.load(source, 5, A)  # read back: it stays, as the latest
    host.save(2, C)
    assert host.copies[2:] == [(10, 5), (2, 11)]
    assert (host.find(A), host.find(B), host.find(C)) == (10, None, 11)
    assert (host.num_saved, host.num_loaded) == (3, 1)


def test_what_is_there_is_not_copied_again() -> None:
    host = HostTier(2, first=10)
    host.save(0, A)
    host.save(3, A)
    assert host.copies == [(0, 10)]


def test_nothing_is_saved_over_what_is_being_read() -> None:
    host = HostTier(1, first=10)
    host.save(0, A)
    host.hold([A])
    host.save(1, B)
    assert host.copies == [(0, 10)]
    assert host.find(B) is None


def test_what_is_dropped_is_free() -> None:
    host = HostTier(1, first=10)
    host.save(0, A)
    host.drop(A)
    host.drop(B)
    assert (len(host), host.find(A)) == (0, None)
    host.save(1, B)
    assert host.find(B) == 10


def computed(kv: KVCacheManager, name: str, prompt: list[int]) -> Request:
    request = make_request(name, prompt)
    kv.add(request)
    hits = kv.lookup(request)
    assert kv.try_allocate(request, len(prompt), hits) is not None
    kv.hash_full(request, len(prompt))
    return request


def test_an_evicted_prefix_comes_back_and_is_shared_at_once() -> None:
    kv = KVCacheManager(4, 4, hash_key=b"key", num_host_blocks=4)
    one, other = list(range(12)), list(range(50, 66))
    kv.forget(computed(kv, "a", one))
    kv.forget(computed(kv, "b", other))  # takes all four blocks
    assert [target for _, target in kv.take_copies()] == [4, 5, 6]
    assert kv.host.num_saved == 3
    again = computed(kv, "c", [*one, 99])
    assert kv.num_loaded_tokens(again) == 12
    copies = kv.take_copies()
    saves, loads = [c for c in copies if c[1] >= 4], [c for c in copies if c[0] >= 4]
    assert sorted(source for source, _ in loads) == [4, 5, 6]
    assert [target for _, target in loads] == kv.block_ids(again)[0][:3]
    assert copies.index(loads[0]) > copies.index(saves[0]), "a block is saved before it is overwritten"
    twin = make_request("d", [*one, 98])
    kv.add(twin)
    assert kv.lookup(twin)[0] == kv.block_ids(again)[0][:3], "found in the pool by whoever comes next"


def test_a_failed_step_leaves_nothing_on_the_host() -> None:
    kv = KVCacheManager(2, 4, hash_key=b"key", num_host_blocks=4)
    kv.forget(computed(kv, "a", list(range(8))))
    kv.host.take_changed()
    kv.forget(computed(kv, "b", list(range(50, 58))))
    changed = kv.host.take_changed()
    assert len(changed) == len(kv.host) == 2
    kv.unhash(changed)
    assert len(kv.host) == 0
