#!/usr/bin/env bash
# Fetch what tests/rollout runs: Debian's nginx with its JavaScript module, and Prometheus with promtool.
# The packages are unpacked, whole or not at all, into ~/.cache/w4a8-convert/rollout or $W4A8_ROLLOUT_TOOLS. Nothing is
# installed or started, and no root is needed. What is there and runs is not fetched again. Exits with 1 where there is no
# apt, or it does not answer, or the programs do not run, such as for want of shared libraries.
set -euo pipefail

target=$(realpath -m "${W4A8_ROLLOUT_TOOLS:-$HOME/.cache/w4a8-convert/rollout}")
packages=(nginx libnginx-mod-http-js prometheus)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# complete ROOT: whether the programs under it run, and nginx loads the module.
complete() {
    echo "load_module $1/usr/lib/nginx/modules/ngx_http_js_module.so; pid $work/pid; events {}" >"$work/nginx.conf"
    "$1/usr/sbin/nginx" -t -e stderr -c "$work/nginx.conf" &&
        "$1/usr/bin/promtool" --version && "$1/usr/bin/prometheus" --version
} &>/dev/null

if complete "$target"; then exit 0; fi
for tool in apt-get dpkg; do
    command -v "$tool" >/dev/null || { echo "$0: there is no $tool here" >&2 && exit 1; }
done
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
complete "$work/root" || { echo "$0: the packages lack what is needed, or do not run here" >&2 && exit 1; }
mkdir -p "$(dirname "$target")"
rm -rf "$target.new" "$target"
mv root "$target.new"
mv "$target.new" "$target"
echo "nginx and Prometheus are in $target"
