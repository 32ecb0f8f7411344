"""Repositories of the Hugging Face Hub: complete snapshots need no network, every refusal says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from octavo.errors import DownloadError, ModelNotFoundError
from octavo.models.hub import resolve_model
from octavo.models.spec import ModelFiles


def make_snapshot(folder: Path, *files: str) -> Path:
    """The Hub library's cache with one commit of owner/name on main."""
    commit = "0" * 40
    repository = folder / "models--owner--name"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    for name in files:
        (snapshot / name).write_text('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}')
    return snapshot


class Refused:
    """A Hub whose every fetch raises; counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        self.fetches = 0
        real = huggingface_hub.snapshot_download

        def snapshot_download(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("local_files_only"):
                return real(*args, **kwargs)
            self.fetches += 1
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("files", "load_format", "complete"),
    [
        (("config.json", "model.safetensors"), "auto", True),
        (("config.json", INDEX, "one.safetensors", "two.safetensors"), "auto", True),
        (("config.json", INDEX, "one.safetensors"), "auto", False),
        (("config.json",), "auto", False),
        (("config.json",), "dummy", True),
        (("model.safetensors",), "auto", False),
    ],
)
def test_cached_hub_repositories_need_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: tuple[str, ...], load_format: str, complete: bool
) -> None:
    snapshot = make_snapshot(tmp_path, *files)
    refused = Refused(monkeypatch, OSError("no route to host"))
    if complete:
        found = resolve_model("owner/name", download_dir=tmp_path, load_format=load_format)
        assert found == ModelFiles("owner/name", "hf", snapshot)
    else:
        with pytest.raises(DownloadError, match=r"no route to host.*HF_ENDPOINT"):
            resolve_model("owner/name", download_dir=tmp_path, load_format=load_format)
    assert refused.fetches == (0 if complete else 1)


def test_hub_errors_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    response = type("Response", (), {"headers": {}, "request": None, "status_code": 404})()
    errors = huggingface_hub.errors
    for error, expected, reason in (
        (errors.RepositoryNotFoundError("x", response=response), ModelNotFoundError, "a Hub repository of that name"),
        (errors.RevisionNotFoundError("x", response=response), ModelNotFoundError, "no revision 'v9'"),
        (errors.GatedRepoError("x", response=response), DownloadError, "accept its terms.*HF_TOKEN"),
        (errors.LocalEntryNotFoundError("offline"), DownloadError, "offline"),
    ):
        with monkeypatch.context() as patch:
            Refused(patch, error)
            with pytest.raises(expected, match=reason):
                resolve_model("owner/name", revision="v9", download_dir=tmp_path)


def test_hub_repositories_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = make_snapshot(tmp_path, "config.json")
    asked: list[dict[str, Any]] = []

    def snapshot_download(repo: str, **kwargs: Any) -> str:
        asked.append(kwargs)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelNotFoundError, match=r"lacks config\.json or safetensors"):
        resolve_model("owner/name", revision="v1", download_dir=tmp_path)
    assert [(a["revision"], a["cache_dir"]) for a in asked] == [("v1", tmp_path)] * 2
    assert "*.safetensors" in asked[1]["allow_patterns"]
