#!/usr/bin/env bash
# Fetch what tests/rollout runs: Debian's nginx with its JavaScript module, and Prometheus with promtool.
# The packages are unpacked, whole or not at all, into ~/.cache/w4a8-convert/rollout or $W4A8_ROLLOUT_TOOLS. Nothing is
# installed or started, and no root is needed. What is there is not fetched again. Exits with 1 where there is no apt,
# or it does not answer.
set -euo pipefail

target=${W4A8_ROLLOUT_TOOLS:-$HOME/.cache/w4a8-convert/rollout}
packages=(nginx libnginx-mod-http-js prometheus)
complete() {
    [[ -x $target/usr/sbin/nginx && -x $target/usr/bin/promtool && -x $target/usr/bin/prometheus ]] &&
        [[ -f $target/usr/lib/nginx/modules/ngx_http_js_module.so ]]
}

if complete; then exit 0; fi
for tool in apt-get dpkg; do
    command -v "$tool" >/dev/null || { echo "$0: there is no $tool here" >&2 && exit 1; }
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/root" "$work/apt/lists/partial" "$work/apt/archives/partial"
cd "$work"
# apt's own lists, where it has any; else lists of our own, as nothing else may be written without root.
own=(-o "Dir::State::Lists=$work/apt/lists" -o "Dir::Cache=$work/apt" -o APT::Sandbox::User= -o Acquire::Retries=2)
download() {
    timeout 5m apt-get -q "$@" -o APT::Sandbox::User= download "${packages[@]}" >&2
}
if ! download 2>/dev/null; then
    timeout 5m apt-get -q "${own[@]}" update >&2
    download "${own[@]}"
fi
for package in ./*.deb; do
    dpkg -x "$package" root
done
mkdir -p "$(dirname "$target")"
rm -rf "$target.new" "$target"
mv root "$target.new"
mv "$target.new" "$target"
complete || { echo "$0: the packages lack what is needed" >&2 && exit 1; }
echo "nginx and Prometheus are in $target"
