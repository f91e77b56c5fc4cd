# shellcheck shell=bash
# What the scripts of ci/ share: where things are, how to say something, how to become root.
# Sourced, never run.

root=$(git -C "$(dirname "${BASH_SOURCE[0]}")" rev-parse --show-toplevel)
cache="$root/.cache"
# shellcheck disable=SC2034 # for those who source this
target="${CARGO_TARGET_DIR:-$root/target}"
export PATH="$HOME/.cargo/bin:$PATH"

say() { printf '%s\n' "$*" >&2; }
step() { printf '\n== %s ==\n' "$*" >&2; }
die() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

# Runs a command as root: directly, or through sudo where there is one.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "'$*' needs root, and there is no sudo: run ci/setup once as root"
    fi
}

# The packages among the names given that are not installed.
missing() {
    local name
    for name in "$@"; do
        [ "$(dpkg-query -W -f '${db:Status-Abbrev}' "$name" 2>/dev/null | head -c 2)" = ii ] || printf '%s\n' "$name"
    done
}

updated=
# Installs the Debian packages among the names given that are missing.
install_packages() {
    local absent
    mapfile -t absent < <(missing "$@")
    [ "${#absent[@]}" -gt 0 ] || return 0
    say "installing ${absent[*]}"
    [ -n "$updated" ] || as_root apt-get -qq update
    updated=yes
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends --no-remove \
        install "${absent[@]}" >"$cache/apt.log" 2>&1 || { tail -n 20 "$cache/apt.log" >&2; die "apt-get install failed"; }
}

# sha256 over the words and files given, for keys of cached things: key WORD… -- FILE…
key() {
    local words=()
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        words+=("$1")
        shift
    done
    [ $# -eq 0 ] || shift
    { printf '%s\n' "${words[@]}"; cat "$@" </dev/null; } | sha256sum | cut -c1-16
}

# fresh DIR KEY: is DIR there, complete and made from KEY?
fresh() { [ "$(cat "$1/.key" 2>/dev/null)" = "$2" ]; }

# Runs a command in the environment of one of our QEMUs, whatever the machine has: with_qemu 7.2|10 COMMAND…
with_qemu() {
    local version=$1 folder="$cache/qemu-$1/usr"
    shift
    env FLEECE_TEST_QEMU="$version" FLEECE_TEST_CACHE="$cache" PATH="$folder/bin:$PATH" \
        QEMU_MODULE_DIR="$folder/lib/x86_64-linux-gnu/qemu" "$@"
}
