"""From what a user typed to files on disk: a folder, a .gguf file, an alias, or a Hugging Face Hub repository."""

import difflib
import os
import re
from pathlib import Path
from typing import Any

from octavo.config import EngineConfig
from octavo.errors import ConfigError, DownloadError, ModelError, ModelFileError, ModelNotFoundError
from octavo.models.aliases import ALIASES, Alias
from octavo.models.download import fetch, is_verified, verify
from octavo.models.hf_config import Fields, read_json
from octavo.models.spec import ModelFiles

CONFIG = "config.json"
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_BARE_PATTERNS = ["*.json", "*.jinja"]
_WEIGHT_PATTERNS = ["*.safetensors"]


def resolve_model(
    name: str, *, revision: str | None = None, download_dir: str | Path | None = None, load_format: str = "auto"
) -> ModelFiles:
    """Finds a model's files, and fetches them where they are not here yet.

    Tried in this order: a folder with a config.json; a .gguf file; an alias; a Hub repository OWNER/NAME. What is in
    the cache is used without asking the network. `load_format` "dummy" needs a config.json only, and takes the path
    of one. `revision` is a branch, tag or commit of a Hub repository.

    Raises:
        ModelNotFoundError: nothing of that name; lists what was looked for.
        DownloadError: no network, no disk space, a missing tool.
        ModelFileError: the wrong sha256, or a damaged download.
        ConfigError: `revision` with something that has none.
    """
    files = _find_local(name, load_format)
    if files is None and name in ALIASES:
        files = ModelFiles(name, "gguf", _alias_file(ALIASES[name], cache_folder(download_dir)))
    if files is not None:
        if revision is not None:
            raise ConfigError(f"revision {revision!r} is for Hub repositories, and {name!r} is none: leave it out")
        return files
    if not _is_repo_id(name):
        raise _not_found(name)
    folder = _hub_folder(name, revision, download_dir, load_format == "dummy")
    return ModelFiles(name, "hf", folder)


def resolve_model_of(config: EngineConfig) -> ModelFiles:
    """The files of the model that a config asks for. Raises as `resolve_model` does."""
    return resolve_model(
        config.model, revision=config.revision, download_dir=config.download_dir, load_format=config.load_format
    )


def cache_folder(download_dir: str | Path | None = None) -> Path:
    """Where fetched models lie: `download_dir`, $OCTAVO_CACHE, $XDG_CACHE_HOME/octavo or ~/.cache/octavo.

    Raises ConfigError: none of these is set, and a user without a home, as containers have them.
    """
    if own := download_dir or os.environ.get("OCTAVO_CACHE"):
        return Path(own).expanduser()
    folder = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if folder.startswith("~"):
        raise ConfigError("this user has no home folder for a cache: name a folder, OCTAVO_CACHE or --download-dir")
    return Path(folder) / "octavo"


def cached_models(download_dir: str | Path | None = None) -> dict[str, Path]:
    """The aliases that need no network any more, and their files."""
    files = {name: cache_folder(download_dir) / alias.file_name for name, alias in ALIASES.items()}
    return {name: path for name, path in files.items() if is_verified(path, ALIASES[name].file)}


def _find_local(name: str, load_format: str) -> ModelFiles | None:
    if not name:  # as a path it would be the working folder
        return None
    path = Path(os.path.expanduser(name))
    if os.path.isfile(path / CONFIG):  # unlike a Path's, for any name
        return ModelFiles(name, "hf", path)
    is_file = os.path.isfile(path)
    if is_file and path.suffix.lower() == ".gguf":
        return ModelFiles(name, "gguf", path)
    if is_file and path.name == CONFIG and load_format == "dummy":
        return ModelFiles(name, "hf", path.parent)
    return None


def _alias_file(alias: Alias, folder: Path) -> Path:
    path = folder / alias.file_name
    if is_verified(path, alias.file):
        return path
    if path.is_file():  # put here by hand, or copied
        try:
            verify(path, alias.file)
        except OSError as error:
            raise ModelFileError(f"{path} cannot be read: {error.strerror}") from None
        return path
    return fetch(alias, folder)


def _is_repo_id(name: str) -> bool:
    return bool(_REPO_ID.fullmatch(name)) and not name.lower().endswith((".gguf", ".json", ".safetensors"))


def _hub_folder(repo: str, revision: str | None, download_dir: str | Path | None, bare: bool) -> Path:
    """A snapshot with everything that is needed: the cached one, else a fetched one."""
    wanted: dict[str, Any] = {
        "revision": revision,
        "cache_dir": cache_folder(download_dir) if download_dir else None,
        "allow_patterns": _BARE_PATTERNS if bare else _BARE_PATTERNS + _WEIGHT_PATTERNS,
        "ignore_patterns": ["*/*"],  # other formats lie in subfolders
    }
    folder = _cached_snapshot(repo, wanted)
    if folder is None or not _is_complete(folder, bare):
        folder = _fetched_snapshot(repo, wanted)
    if not _is_complete(folder, bare):
        raise ModelNotFoundError(
            f"the Hub repository {repo} lacks {CONFIG} or safetensors weights at its top; "
            "of a GGUF repository, download one .gguf file and give its path"
        )
    return folder


def _cached_snapshot(repo: str, wanted: dict[str, Any]) -> Path | None:
    import huggingface_hub  # takes a third of a second, which only Hub models are worth

    try:
        return Path(huggingface_hub.snapshot_download(repo, **wanted, local_files_only=True))
    except (huggingface_hub.errors.LocalEntryNotFoundError, huggingface_hub.errors.HFValidationError):
        return None


def _fetched_snapshot(repo: str, wanted: dict[str, Any]) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(repo, **wanted))
    except Exception as error:  # network errors differ between versions of the library
        raise _hub_error(repo, wanted["revision"], error) from error


def _is_complete(folder: Path, bare: bool) -> bool:
    index = folder / "model.safetensors.index.json"
    if not (folder / CONFIG).is_file():
        return False
    if bare or (folder / "model.safetensors").is_file():
        return True
    if not index.is_file():
        return False
    shards = Fields(read_json(index), index).child("weight_map")
    return all((folder / shard).is_file() for shard in {shards.text(tensor) for tensor in shards.names()})


def _hub_error(repo: str, revision: str | None, error: Exception) -> ModelError:
    from huggingface_hub import errors

    said = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
    if isinstance(error, errors.GatedRepoError):
        return DownloadError(
            f"the Hub repository {repo} is gated: accept its terms at https://huggingface.co/{repo} and set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelNotFoundError(f"the Hub repository {repo} has no revision {revision!r}")
    if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        return _not_found(repo)
    return DownloadError(
        f"fetching {repo} from the Hugging Face Hub failed: {said}. Check the network (HF_ENDPOINT names a mirror), or "
        f"download the repository elsewhere and give the folder's path; aliases without the Hub: {', '.join(ALIASES)}"
    )


def _not_found(name: str) -> ModelNotFoundError:
    path = Path(name)
    hub = " and a Hub repository of that name" if _is_repo_id(name) else " (a Hub repository is written OWNER/NAME)"
    looked = f"a folder with a {CONFIG}, a .gguf file, the aliases {', '.join(ALIASES)}{hub}"
    close = difflib.get_close_matches(name.lower(), ALIASES, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    if os.path.exists(name):  # unlike a Path's, for any name
        kind = f"a folder without {CONFIG}" if path.is_dir() else "a file, but no .gguf"
        hint = f"; what lies there is {kind}{hint}"
    return ModelNotFoundError(f"no model {name!r:.200}: looked for {looked}{hint}")
