#!/bin/sh
# Builds the real Kubernetes binaries (containerd, Helm) of the cluster suite and of `colocate demo gang` from the tool modules in tools/go,
# into a cache named after their go.sum; prints nothing when all are there. About 11 minutes on 2 cores, once.
# `--path` only prints the folder.
set -eu
cd "$(dirname "$0")/go"
KUBERNETES=v1.36.3
cache="${XDG_CACHE_HOME:-$HOME/.cache}/colocate/kube"
bin="$cache/$(cat ./*/go.mod ./*/go.sum ../kube-binaries.sh | sha256sum | cut -c1-16)"
[ "${1:-}" != --path ] || { echo "$bin"; exit 0; }

needed=$(sed -n 's/^go //p' kubernetes/go.mod)
missing=""
for name in etcd kube-apiserver kube-scheduler kube-controller-manager kubectl kwok kubelet containerd containerd-shim-runc-v2 ctr helm; do
  [ -x "$bin/$name" ] || missing="$missing $name"
done
[ -n "$missing" ] || exit 0
command -v go > /dev/null || {
  echo "kube binaries: no Go here; install Go >= $needed (https://go.dev/dl), or set KUBEBUILDER_ASSETS to a folder with$missing" >&2
  exit 2
}
have=$(go env GOVERSION | sed 's/^go//')
if [ "$(printf '%s\n%s\n' "$needed" "$have" | sort -V | head -1)" != "$needed" ]; then
  echo "kube binaries: Go $have is here, Go >= $needed is needed" >&2
  exit 2
fi
mkdir -p "$bin"
version="-X k8s.io/component-base/version.gitVersion=$KUBERNETES -X k8s.io/component-base/version.gitMajor=1"
version="$version -X k8s.io/component-base/version.gitMinor=$(echo $KUBERNETES | cut -d. -f2)"
for name in $missing; do
  case $name in
    helm) module=helm; package=helm.sh/helm/v4/cmd/helm ;;
    etcd) module=etcd; package=go.etcd.io/etcd/server/v3 ;;
    containerd | containerd-shim-runc-v2 | ctr) module=containerd; package=github.com/containerd/containerd/v2/cmd/$name ;;
    kwok) module=kubernetes; package=sigs.k8s.io/kwok/cmd/kwok ;;
    *) module=kubernetes; package=k8s.io/kubernetes/cmd/$name ;;
  esac
  echo "kube binaries: building $name ..."
  # made under another name and moved: an interrupted build leaves no half binary
  (cd "$module" && CGO_ENABLED=0 GOFLAGS=-mod=readonly go build -trimpath -ldflags "-s -w $version" \
    -tags "no_btrfs no_devmapper no_zfs no_aufs" -o "$bin/.$name" "$package")
  mv "$bin/.$name" "$bin/$name"
done
for old in "$cache"/*; do
  [ "$old" = "$bin" ] || rm -rf "$old"   # an older lock's binaries
done
