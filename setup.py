"""The one thing that pyproject.toml cannot say yet without setuptools calling it experimental."""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CAPTURE, TERNARY = "cordee.engine.llama._capture", "cordee.engine._ternary"


class Build(build_ext):
    """Names our libraries without the tag of a Python version: ctypes loads them, any Python can."""

    def get_ext_filename(self, name: str) -> str:
        """Where a library goes: by its whole name, or in place by the last part of it."""
        return name.replace(".", "/") + ".so"


class Wheel(bdist_wheel):
    """One wheel of a platform for every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, its binary interface, platform."""
        return "py3", "none", super().get_tag()[2]


# Plain shared libraries, loaded by ctypes: they need a C compiler, but no headers of Python.
setup(
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
    ext_modules=[
        Extension(CAPTURE, ["native/capture.c"]),
        Extension(
            TERNARY,
            sorted(str(path) for path in Path("native/src").rglob("*.c")),
            include_dirs=["native/include", "native/src"],
            depends=sorted(str(path) for path in Path("native").rglob("*.[hi]*")),
            extra_compile_args=[
                "-std=c11",
                "-O3",
                "-ffp-contract=off",
                "-fexcess-precision=fast",
                "-fno-math-errno",
                "-fvisibility=hidden",
            ],
            extra_link_args=["-pthread", "-lm"],
        ),
    ],
)
