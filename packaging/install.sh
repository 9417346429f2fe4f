#!/bin/sh
# Installs Cordée from this folder: no network, no compiler, no root. Python 3.11 or newer is enough.
#
#   sh install.sh             for this user: program ~/.local/bin/cordee, in ~/.local/lib/cordee
#   sudo sh install.sh        for the whole machine: program /usr/local/bin/cordee, in /opt/cordee
#
# Installe Cordée à partir de ce dossier, sans réseau ni compilateur ; voir docs/installation.md.
# Run again, or with a newer folder, it keeps the version before beside the new one (`cordee update` goes back to it).
# Options: --prefix FOLDER and --bin FOLDER choose other places; --no-switch leaves the program that is in use.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
needed_kb=900000 # the program with its libraries and starter model, and a copy of this folder for other machines

say() { printf '%s\n' "$*"; }
fail() {
    printf 'cordee: %s\n' "$1" >&2
    printf '  %s\n' "$2" >&2
    exit 1
}

if [ "$(id -u)" = 0 ]; then
    prefix=/opt/cordee bin=/usr/local/bin
else
    [ -n "${HOME:-}" ] || fail "This user has no home folder." "Choose places: sh install.sh --prefix FOLDER --bin FOLDER"
    prefix=$HOME/.local/lib/cordee bin=$HOME/.local/bin
fi
switch=yes
while [ $# -gt 0 ]; do
    case $1 in
    --prefix | --bin)
        [ $# -gt 1 ] || fail "$1 needs a folder." "sh install.sh $1 FOLDER"
        case $2 in /*) folder=$2 ;; *) folder=$(pwd)/$2 ;; esac
        [ "$1" = --bin ] && bin=$folder || prefix=$folder
        shift
        ;;
    --no-switch) switch=no ;;
    *) fail "There is no option $1." "Options: --prefix FOLDER, --bin FOLDER, --no-switch" ;;
    esac
    shift
done

# All that could be missing is looked at before anything is written.
machine=$(uname -s)-$(uname -m)
[ "$machine" = Linux-x86_64 ] ||
    fail "This folder is for Linux on 64-bit x86, and this machine is $machine." "docs/install.md says what else there is."
glibc=$(getconf GNU_LIBC_VERSION 2>/dev/null || echo "none")
case $glibc in
"glibc "*) ;;
*) fail "This system has no glibc (Alpine, for example)." "Debian 12, Ubuntu 22.04 or newer, Fedora and the like have one." ;;
esac
minor=${glibc#glibc 2.}
[ "${minor%%.*}" -ge 34 ] ||
    fail "glibc 2.34 or newer is needed, and this system has ${glibc#glibc }." "Update the system: Debian 12, Ubuntu 22.04 or newer."
found=
for python in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11; do
    command -v "$python" >/dev/null || continue
    found="${found:+$found, }$("$python" -V 2>&1)"
    "$python" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null || continue
    break
done
"$python" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null ||
    fail "Python 3.11 to 3.14 is needed, and this machine has ${found:-none}." \
        "Install it (Debian 12, Ubuntu 24.04 or newer: sudo apt-get install python3), or name one: PYTHON=/usr/bin/python3.12 sh install.sh"
existing=$prefix
while [ ! -d "$existing" ]; do existing=$(dirname "$existing"); done
[ -w "$existing" ] || fail "$existing cannot be written to by $(id -un)." "Choose another place: sh install.sh --prefix FOLDER"
free_kb=$(df -Pk "$existing" | awk 'END { print $4 }')
[ "$free_kb" -ge "$needed_kb" ] ||
    fail "The disk of $existing has $((free_kb / 1000)) MB free, and $((needed_kb / 1000)) MB are needed." \
        "Free some space, or choose another disk: sh install.sh --prefix FOLDER"
[ ! -e "$bin/cordee" ] || [ -L "$bin/cordee" ] ||
    fail "$bin/cordee is a file that this script did not make." "Move it away, or choose another place: --bin FOLDER"
(cd "$here" && sha256sum --check --quiet --strict SHA256SUMS) ||
    fail "This folder is damaged or incomplete (above)." "Copy it anew."

umask 022
[ "$switch" = yes ] || bin=$prefix
version=$(cat "$here/VERSION")
target=$prefix/$version
mkdir -p "$prefix" "$bin"
if [ -f "$target/whole" ]; then
    say "Cordée $version is in $target already."
else
    say "Installing Cordée $version in $target"
    # What an interrupted attempt left. A finished version is never touched: it may be running.
    rm -rf "$target"
    "$python" -m venv --without-pip "$target"
    set -- "$here"/wheels/pip-*.whl
    "$target/bin/python" -I "$1/pip" --isolated --disable-pip-version-check install --quiet --no-index \
        --find-links "$here/wheels" cordee
    "$target/bin/cordee" --version >/dev/null
    touch "$target/whole"
fi

[ "$switch" = yes ] || exit 0

# The folder stays: `cordee update` knows its maker by it, and it can be copied to the next machine.
if [ "$here" != "$prefix/bundle" ]; then
    rm -rf "$prefix/bundle.partial"
    cp -R "$here" "$prefix/bundle.partial"
    rm -rf "$prefix/bundle"
    mv "$prefix/bundle.partial" "$prefix/bundle"
fi
ln -sfn "$version" "$prefix/current.new"
mv -T "$prefix/current.new" "$prefix/current"
ln -sfn "$prefix/current/bin/cordee" "$bin/cordee"
say "Installed: $bin/cordee"
case :$PATH: in
*:"$bin":*) say "Try it: cordee run starter \"Hello\"    Then: cordee setup" ;;
*)
    say "Try it: $bin/cordee run starter \"Hello\"    Then: $bin/cordee setup"
    say "To type only \`cordee\`, log out and in again; if that is not enough: export PATH=\"$bin:\$PATH\""
    ;;
esac
