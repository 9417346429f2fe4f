"""The one thing that pyproject.toml cannot say yet without setuptools calling it experimental."""

from setuptools import Extension, setup

# A plain shared library, loaded by ctypes: it needs a C compiler, but no headers of Python.
setup(ext_modules=[Extension("cordee.engine._capture", ["native/capture.c"])])
