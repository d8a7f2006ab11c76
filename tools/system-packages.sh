#!/bin/sh
# The Debian packages of the guest, browser and benchmark suites; idempotent. Run as root.
set -eu
PACKAGES="python3-venv make qemu-system-x86 busybox-static e2fsprogs chromium nginx-light redis-server redis-tools"
missing=""
for package in $PACKAGES; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q "install ok installed" || missing="$missing $package"
done
[ -n "$missing" ] || { echo "system packages: all there"; exit 0; }
[ "$(id -u)" = 0 ] || { echo "system packages: run as root to install:$missing" >&2; exit 2; }
echo "system packages: installing$missing"
export DEBIAN_FRONTEND=noninteractive
# No service may start by itself: the benchmarks start their own on loopback.
printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d.colocate
had=""; [ -e /usr/sbin/policy-rc.d ] && had=yes || mv /usr/sbin/policy-rc.d.colocate /usr/sbin/policy-rc.d
chmod +x /usr/sbin/policy-rc.d
trap 'rm -f /usr/sbin/policy-rc.d.colocate; [ -n "$had" ] || rm -f /usr/sbin/policy-rc.d' EXIT
apt-get -qq update
# shellcheck disable=SC2086
apt-get -qq install -y --no-install-recommends $missing > /dev/null
