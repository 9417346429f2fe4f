#!/bin/sh
# Builds libllama for machines that are not this one, into build/libllama/cpu/bin: a CPU backend for each
# generation of processors, of which a machine loads the best that it can run. Interrupted, it goes on where it was.
# With GCC's OpenMP: the threads of ggml's own barrier spin for ever, and on a busy machine a token took 25 times the CPU.
# On Debian 12 the result runs with glibc 2.34 and newer. It needs g++, and build/packaging (packaging/tools.sh).
#
#   packaging/libllama.sh            the libraries for every CPU: about 9 minutes of one core
#   packaging/libllama.sh vulkan     a backend for graphics cards beside them; needs glslc and Vulkan's headers,
#                                    newer ones than Debian 12 has: VULKAN_INCLUDE=FOLDER names them
#   packaging/libllama.sh cuda       likewise for NVIDIA's cards, with CUDA's compiler (untested: no card here)
set -eu
cd "$(dirname "$0")/.."
root=$(pwd)
bin=$root/build/packaging/bin
backend=${1:-cpu}
requirement=$(sed -n 's/^\(llama-cpp-python==[^ ]*\) .*/\1/p' packaging/source.txt)
sha256=$(sed -n 's/.*--hash=sha256://p' packaging/source.txt)
name=llama_cpp_python-${requirement#*==}
work=$root/build/libllama
source=$work/$name/vendor/llama.cpp

case $backend in
cpu) options="-DGGML_CPU_ALL_VARIANTS=ON" ;;
vulkan) options="-DGGML_CPU=OFF -DGGML_VULKAN=ON ${VULKAN_INCLUDE:+-DVulkan_INCLUDE_DIR=$VULKAN_INCLUDE}" ;;
cuda) options="-DGGML_CPU=OFF -DGGML_CUDA=ON" ;;
*) echo "There is no backend $backend: cpu, vulkan or cuda." >&2; exit 2 ;;
esac

if [ ! -f "$source/CMakeLists.txt" ]; then
    mkdir -p "$work"
    archive=$work/$name.tar.gz
    [ -f "$archive" ] || "$bin/python" -m pip download --quiet --disable-pip-version-check --no-deps \
        --no-binary :all: "$requirement" --dest "$work"
    echo "$sha256  $archive" | sha256sum --check --quiet
    rm -rf "$work/unpacking"
    mkdir "$work/unpacking"
    tar -xzf "$archive" -C "$work/unpacking"
    rm -rf "${work:?}/$name"
    mv "$work/unpacking/$name" "$work/$name"
    rmdir "$work/unpacking"
fi

# No path of this machine in the libraries: the same source and compiler give the same bytes everywhere.
map="-ffile-prefix-map=$source=llama.cpp -ffile-prefix-map=$work/$backend=build"
# shellcheck disable=SC2086
"$bin/cmake" -S "$source" -B "$work/$backend" -G Ninja -DCMAKE_MAKE_PROGRAM="$bin/ninja" \
    -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=OFF -DGGML_BACKEND_DL=ON -DGGML_OPENMP=ON \
    -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
    -DLLAMA_BUILD_SERVER=OFF -DCMAKE_PLATFORM_NO_VERSIONED_SONAME=ON -DCMAKE_INSTALL_RPATH='$ORIGIN' \
    -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON \
    -DCMAKE_C_FLAGS="$map" -DCMAKE_CXX_FLAGS="$map" $options
"$bin/cmake" --build "$work/$backend" --parallel "${JOBS:-$(nproc)}"
