"""Pinned texts: what is in the folder is used without a network, what is not the pinned text is refused."""

import dataclasses
import hashlib

import pytest

from lab import text
from octavo.errors import DownloadError, ModelFileError
from octavo.models.aliases import Digest

CONTENT = "Call me Ishmael. — Some years ago\n"


@pytest.fixture
def offline(monkeypatch):
    """A text of our own under a known name, and no tool to fetch it with."""
    raw = CONTENT.encode()
    digest = Digest(len(raw), hashlib.sha256(raw).hexdigest())
    monkeypatch.setitem(text.TEXTS, "moby-dick", dataclasses.replace(text.TEXTS["moby-dick"], file=digest))
    monkeypatch.setenv("PATH", "")


def test_a_text_that_is_there_needs_no_network(offline, tmp_path):
    (tmp_path / "moby-dick.txt").write_text(CONTENT, encoding="utf-8")
    assert text.load_text("moby-dick", tmp_path) == CONTENT
    assert text.load_text("moby-dick", tmp_path) == CONTENT  # now by its sidecar


def test_another_text_is_refused_and_removed(offline, tmp_path):
    path = tmp_path / "moby-dick.txt"
    path.write_text(CONTENT.replace("Ishmael", "Ishmaul"), encoding="utf-8")
    with pytest.raises(ModelFileError, match="sha256"):
        text.load_text("moby-dick", tmp_path)
    assert not path.exists()


def test_without_a_network_the_error_says_what_to_do(offline, tmp_path, capsys):
    with pytest.raises(DownloadError, match=r"npm package.*Node\.js"):
        text.load_text("moby-dick", tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert "fetching moby-dick" in capsys.readouterr().err


def test_the_cache_is_where_the_user_says(offline, tmp_path, monkeypatch):
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "moby-dick.txt").write_text(CONTENT, encoding="utf-8")
    assert text.load_text("moby-dick") == CONTENT
