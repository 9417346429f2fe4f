"""The one thing that pyproject.toml cannot say yet without setuptools calling it experimental."""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CAPTURE, TERNARY = "cordee.engine.llama._capture", "cordee.engine._ternary"


class Build(build_ext):
    """Names the ternary engine without the tag of a Python version: ctypes loads it, any Python can."""

    def get_ext_filename(self, name: str) -> str:
        """Where an extension goes: by its whole name, or in place by the last part of it."""
        is_ternary = name.rpartition(".")[2] == TERNARY.rpartition(".")[2]
        return name.replace(".", "/") + ".so" if is_ternary else super().get_ext_filename(name)


# Plain shared libraries, loaded by ctypes: they need a C compiler, but no headers of Python.
setup(
    cmdclass={"build_ext": Build},
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
