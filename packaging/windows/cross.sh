#!/bin/sh
# Inside the Debian of chroot.sh: our libraries and libllama for Windows. cross.sh TREE LLAMA_CPP_SOURCES OUT
# CORDEE_CPU_VARIANTS=OFF builds one CPU backend, for AVX2, in a tenth of the time: to try something out.
set -eu
tree=$1 sources=$2 out=$3
variants=${CORDEE_CPU_VARIANTS:-ON}
mkdir -p "$out/lib"
cd "$tree/native"
cc="x86_64-w64-mingw32-gcc-posix -O3 -shared -static"
# The flags of setup.py: the same bits as on Linux.
# shellcheck disable=SC2046
$cc -std=c11 -ffp-contract=off -fexcess-precision=fast -fno-math-errno -fvisibility=hidden -Wno-psabi \
    -Iinclude -Isrc -pthread -o "$out/_ternary.dll" $(find src -name '*.c' | LC_ALL=C sort) -lm
$cc -o "$out/_capture.dll" capture.c
cmake -S "$sources" -B "$out/libllama" -G Ninja -DCMAKE_TOOLCHAIN_FILE="$tree/packaging/windows/mingw.cmake" \
    -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=OFF -DGGML_BACKEND_DL=ON -DGGML_OPENMP=OFF \
    -DGGML_CPU_ALL_VARIANTS="$variants" -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON \
    -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
    -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_CURL=OFF \
    -DCMAKE_SHARED_LINKER_FLAGS= -DCMAKE_MODULE_LINKER_FLAGS=
cmake --build "$out/libllama"
find "$out/libllama/bin" -name '*.dll' -exec cp {} "$out/lib/" \;
# GCC's run-time libraries, which nobody has on Windows.
cp /usr/lib/gcc/x86_64-w64-mingw32/*-posix/libstdc++-6.dll /usr/lib/gcc/x86_64-w64-mingw32/*-posix/libgcc_s_seh-1.dll \
    /usr/x86_64-w64-mingw32/lib/libwinpthread-1.dll "$out/lib/"
x86_64-w64-mingw32-strip "$out"/lib/*.dll "$out"/*.dll
