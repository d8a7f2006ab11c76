#!/bin/sh
# The Debian packages of the guest, browser, cluster and benchmark suites, and the guest's kernel; idempotent. Run as root.
set -eu
cd "$(dirname "$0")/.."
PACKAGES="python3-venv make openssl qemu-system-x86 busybox-static e2fsprogs chromium nginx-light postgresql runc mmdebstrap zstd"
KERNEL=build/guest/kernel

missing=""
for package in $PACKAGES; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q "install ok installed" || missing="$missing $package"
done
if [ -z "$missing" ] && [ -d "$KERNEL/boot" ]; then
  echo "system packages: all there"
  exit 0
fi
if [ -n "$missing" ] && [ "$(id -u)" != 0 ]; then
  echo "system packages: run as root to install:$missing" >&2
  exit 2
fi
export DEBIAN_FRONTEND=noninteractive
[ "$(id -u)" != 0 ] || apt-get -qq update
if [ -n "$missing" ]; then
  echo "system packages: installing$missing"
  # shellcheck disable=SC2086
  RUNLEVEL=1 apt-get -qq install -y --no-install-recommends $missing > /dev/null  # 1: starts no server (invoke-rc.d)
fi
if [ ! -d "$KERNEL/boot" ]; then
  image=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | awk '/Depends: linux-image/ {print $2; exit}')
  [ -n "$image" ] || image=$(apt-cache depends linux-image-virtual 2>/dev/null | awk '/Depends: linux-image/ {print $2; exit}')
  if [ -z "$image" ]; then
    echo "system packages: no kernel image for the guest is offered here; the guest suite will not run" >&2
    exit 0
  fi
  echo "system packages: unpacking $image for the guest (it is not installed)"
  work=$(mktemp -d)
  chmod 755 "$work"
  trap 'rm -rf "$work"' EXIT
  (cd "$work" && apt-get -qq download "$image" 2>/dev/null)
  mkdir -p "$KERNEL"
  dpkg-deb -x "$work"/*.deb "$KERNEL"
fi
