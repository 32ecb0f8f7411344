"""Requests that wait for another one's prefill: `n` answers to a prompt are one parent and n - 1 children.

A child is held, outside the queue, until its parent's prompt is complete. It then begins with the parent's KV and
samples its first token from the parent's logits, in the very step that computes them.
"""

from octavo.request import Request


class Forks:
    """The children that are held, by parent. A parent is nobody's child."""

    def __init__(self) -> None:
        self._children: dict[str, list[Request]] = {}  # by the parent's request_id, never empty

    def try_hold(self, child: Request, parent: Request) -> bool:
        """Holds a new Request until `parent` has its prompt computed; False when that is in the past."""
        if parent.num_computed_tokens >= parent.num_prompt_tokens or parent.num_output_tokens:
            return False
        if parent.fork_of is not None or not same_prefix(parent, child):
            return False
        self._children.setdefault(parent.request_id, []).append(child)
        return True

    def __contains__(self, parent: Request) -> bool:
        return parent.request_id in self._children

    def take(self, parent: Request) -> list[Request]:
        """The children of a parent whose prompt is complete."""
        return self._children.pop(parent.request_id)

    def heir(self, parent: Request) -> Request | None:
        """The parent has ended: its first child takes its place, and must be queued. None where none is held."""
        held = self._children.pop(parent.request_id, None)
        if held is None:
            return None
        heir, *others = held
        heir.fork_of = None
        if others:
            self._children[heir.request_id] = others
        for child in others:
            child.fork_of = heir.request_id
        return heir

    def drop(self, child: Request) -> bool:
        """Forgets a child that has ended; False for a Request that is not held."""
        held = self._children.get(child.fork_of or "", [])
        if child not in held:
            return False
        held.remove(child)
        if not held:
            del self._children[child.fork_of or ""]
        return True


def same_prefix(one: Request, other: Request) -> bool:
    """Whether two Requests' prompts may share all their KV."""
    return one.cache_salt == other.cache_salt and one.prompt_token_ids == other.prompt_token_ids
