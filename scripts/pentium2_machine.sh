#!/bin/sh
# Fetches what the emulated PC of 1997 boots (make test-pentium2): Debian's kernel for i686 and busybox, unpacked into
# build/pentium2_machine and installed nowhere. Needs apt, but neither root nor a foreign architecture: apt keeps
# its lists for i386 in that folder. Does nothing when all is there.
set -eu
cd "$(dirname "$0")/.."
place=$PWD/build/pentium2_machine

[ -f "$place/vmlinuz" ] && [ -f "$place/busybox" ] && [ -d "$place/modules" ] && exit 0
if ! command -v apt-get >/dev/null; then
    echo "pentium2_machine.sh: no apt here: this needs a Debian or a descendant" >&2
    exit 1
fi

partial=$place.partial
rm -rf "$partial"
mkdir -p "$partial/state/lists/partial" "$partial/cache/archives/partial" "$partial/root"
trap 'rm -rf "$partial"' EXIT
apt() {
    tool=$1
    shift
    "$tool" -qq -o APT::Architecture=i386 -o APT::Architectures::=i386 -o Dir::State="$partial/state" \
        -o Dir::State::status=/dev/null -o Dir::Cache="$partial/cache" -o APT::Sandbox::User=root "$@"
}
# Sources that have nothing for i386 are no matter, as long as one has.
apt apt-get update 2>/dev/null || true
kernel=$(apt apt-cache show linux-image-686 | sed -n 's/^Depends: \(linux-image-[^ ,]*\).*/\1/p' | head -n 1)
if [ -z "$kernel" ]; then
    echo "pentium2_machine.sh: the sources of apt have no linux-image-686 for i386: Debian 12 is the last that has it" >&2
    exit 1
fi
(cd "$partial" && apt apt-get download "$kernel" busybox-static)
for package in "$partial"/*.deb; do
    dpkg-deb -x "$package" "$partial/root"
done

# The drivers of an IDE disk with an ext4 file system, and what they need.
mkdir "$partial/modules"
for module in scsi_common scsi_mod libata ata_piix crc-t10dif crct10dif_common crc64 crc64-rocksoft \
    t10-pi sd_mod crc16 crc32c_generic mbcache jbd2 ext4; do
    find "$partial/root" -name "$module.ko" -exec cp {} "$partial/modules" \;
done
cp "$partial"/root/boot/vmlinuz-* "$partial/vmlinuz"
cp "$partial/root/bin/busybox" "$partial/busybox"
rm -rf "$partial"/*.deb "$partial/state" "$partial/cache" "$partial/root" "$place"
mv "$partial" "$place"
trap - EXIT
