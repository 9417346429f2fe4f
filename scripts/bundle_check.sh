#!/bin/sh
# Installs dist/cordee-bundle-… on a bare Debian that has no network, and asks the starter model a question.
# Then installs, updates and removes the .deb, if dist/ has one. As root, with debootstrap.
#
#   scripts/bundle_check.sh [bookworm|trixie] [FOLDER]     FOLDER is kept, so that the next check starts at once
set -eu
cd "$(dirname "$0")/.."
suite=${1:-bookworm}
root=${2:-build/chroots/$suite}
set -- dist/cordee-bundle-*
bundle=$1
[ -f "$bundle/VERSION" ] || { echo "There is no dist/cordee-bundle-…: make bundle" >&2; exit 1; }

if [ ! -x "$root/usr/bin/python3" ]; then
    mkdir -p "$root"
    debootstrap --variant=minbase --include=python3 "$suite" "$root"
fi
# unshare: a namespace of mounts that ends with the command, and one of networks that has nothing but a loopback.
inside() {
    unshare --mount --net --pid --fork sh -euc '
        root=$1; shift
        mount --bind "$1" "$root/mnt"; shift
        mount -t proc proc "$root/proc"
        ip link set lo up 2>/dev/null || true
        exec chroot "$root" env -i PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin HOME=/root sh -euc "$1"
    ' inside "$root" "$(pwd)/dist" "$1"
}
inside 'rm -rf /opt/cordee /usr/local/bin/cordee /root/.local /stick; cp -R /mnt/cordee-bundle-* /stick'
begin=$(date +%s)
inside 'sh /stick/install.sh && cordee run starter "Why do climbers rope together?"'
echo "$suite: installed and answered in $(($(date +%s) - begin)) s"
inside 'cordee doctor | grep -i -E "variant|libllama:" ; cordee uninstall --yes --models
    for left in /opt/cordee /usr/local/bin/cordee /root/.local/share/cordee; do
        [ ! -e $left ] || { echo "$left was left behind" >&2; exit 1; }
    done'
ls dist/cordee_*.deb >/dev/null 2>&1 || exit 0
inside 'dpkg --install /mnt/cordee_*.deb >/dev/null && cordee run starter Hello && dpkg --install /mnt/cordee_*.deb >/dev/null
    dpkg --remove cordee >/dev/null
    for left in /usr/bin/cordee /usr/lib/cordee; do
        [ ! -e $left ] || { echo "$left was left behind" >&2; exit 1; }
    done
    dpkg --purge cordee; rm -rf /root/.local'
echo "$suite: the Debian package installs, answers, and is removed"
