"""Puts the native library into the wheel; everything else about the package is in pyproject.toml.

The library is loaded by ctypes and knows nothing of Python, so one wheel serves every Python 3 of a platform.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


def _load_builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("octavo_native_build", ROOT / "octavo/runtime/native/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BUILDER = _load_builder()


class BuildNative(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1], BUILDER.LIBRARY))

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).parent
        try:
            BUILDER.build(target)
        except BUILDER.BuildError as error:
            raise CompileError(str(error)) from None


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension("octavo.runtime.native.liboctavo", sources=sorted(str(p) for p in Path("native").rglob("*.cpp")))
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
