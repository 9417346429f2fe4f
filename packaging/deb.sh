#!/bin/sh
# Makes dist/cordee_VERSION_amd64.deb from the folder of `make bundle`: `make deb`.
# The package holds that folder; its scripts install it into /usr/lib/cordee and start the service.
set -eu
cd "$(dirname "$0")/.."
set -- dist/cordee-bundle-*
bundle=$1
[ -f "$bundle/VERSION" ] || { echo "There is no dist/cordee-bundle-…: make bundle" >&2; exit 1; }
version=$(sed 's/-/+/' "$bundle/VERSION") # a hyphen would mean a revision of Debian's
work=dist/.deb.partial
rm -rf "$work"
mkdir -p "$work/DEBIAN" "$work/usr/lib/cordee" "$work/usr/share/doc/cordee"
cp -R "$bundle" "$work/usr/lib/cordee/bundle"
cp packaging/copyright "$work/usr/share/doc/cordee/copyright"
cat >"$work/DEBIAN/control" <<END
Package: cordee
Version: $version
Architecture: amd64
Maintainer: The Cordée developers <https://github.com/cordee/cordee>
Depends: python3 (>= 3.11), python3 (<< 3.15), libc6 (>= 2.34), libstdc++6 (>= 12), passwd
Installed-Size: $(du -sk "$work/usr" | cut -f 1)
Section: science
Priority: optional
Homepage: https://github.com/cordee/cordee
Description: open language models on the machines that you already have
 Cordée runs a language model on one machine, or on several of a local network that
 become one cluster. If a machine fails, the answer goes on.
 .
 It starts with the machine, as a service with an account of its own:
 sudo -u cordee -H cordee status
END
for script in postinst prerm postrm; do
    cp "packaging/debian/$script" "$work/DEBIAN/$script"
    chmod 755 "$work/DEBIAN/$script"
done
find "$work" -type d -exec chmod 755 {} +
find "$work/usr" -type f -exec chmod 644 {} +
rm -f dist/cordee_*.deb
# The wheels are compressed already.
dpkg-deb --root-owner-group -Znone --build "$work" "dist/cordee_${version}_amd64.deb"
rm -rf "$work"
