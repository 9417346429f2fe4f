#!/bin/sh
# A Debian 13 in a folder, with what builds for Windows (mingw, CMake, NSIS) and what runs it (Wine 10): Debian 12's
# mingw headers are too old for libllama, and its Wine for the wheels. As root: chroot.sh FOLDER
set -eu
folder=${1:?a folder for the system}
[ -x "$folder/usr/bin/makensis" ] && exit 0
command -v debootstrap >/dev/null || { echo "install debootstrap first: apt-get install -y debootstrap" >&2; exit 1; }
[ -e "$folder/etc/debian_version" ] || debootstrap --variant=minbase trixie "$folder"
chroot "$folder" apt-get update
DEBIAN_FRONTEND=noninteractive chroot "$folder" apt-get install -y --no-install-recommends \
    wine64 wine g++-mingw-w64-x86-64-posix cmake ninja-build nsis
