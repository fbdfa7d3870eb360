#!/usr/bin/env bash
# Sets up and tests a copy of this tree where Python is newer: tests/python/run.sh [--pipeline] [RELEASE...]
#
#     sudo tests/python/run.sh                      Debian 13 and Debian's development release
#     sudo tests/python/run.sh --pipeline trixie    Debian 13 alone, with make pipeline, make chat and the tests of a build
#
# Each release is a Debian root with the packages that the README asks for and no other; it is made once, in
# build/python, and made again when what made it changes. It appears whole or not at all, so a killed run leaves nothing
# that would be used. The tree in it is copied and set up anew every time, committed or not; pip's downloads are kept in
# build/python/cache. Where pip has settings on this machine (indexes, proxies, certificates), it has them in the root.
#
# All mounts live in a mount namespace of their own and all processes in a process namespace, and the kernel takes both
# down with this script, however that ends: no mount leaks into the machine, and no process runs on.
set -euo pipefail

declare -A PYTHONS=([trixie]=3.13 [sid]=3.14) # the newest Python of each release that pipeline/install.py accepts
FOLDER=build/python
PACKAGES=ca-certificates,g++,git,make
TREE=/emerald # in the root
QUESTION="What are you capable of?"

main() {
    [ "$(id -u)" = 0 ] || stop "mounts and chroot need root: put sudo before the command"
    cd "$(dirname "$0")/../.."
    if [ "${1-}" != --unshared ]; then
        need_debootstrap
        unshare --mount true || stop "no mounts are allowed here: start the container with --privileged"
        setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child "$0" --unshared "$@"
        return
    fi
    shift
    local pipeline="" release told=() failed=""
    [ "${1-}" != --pipeline ] || { pipeline=yes && shift; }
    [ $# -gt 0 ] || set -- trixie sid
    for release; do [ -n "${PYTHONS[$release]-}" ] || stop "no such release: $release; there are ${!PYTHONS[*]}"; done
    mkdir -p $FOLDER/cache
    exec 9>$FOLDER/lock
    flock --nonblock 9 || stop "another run is at work in $FOLDER: wait for it"
    for release; do try "$release"; done
    printf '%s\n' "${told[@]}"
    [ -z "$failed" ]
}

need_debootstrap() {
    command -v debootstrap >/dev/null && return
    command -v apt-get >/dev/null || stop "install debootstrap and Debian's archive keyring"
    say "installing debootstrap"
    apt-get update -qq
    apt-get install -qq -y debootstrap debian-archive-keyring >/dev/null
}

# Debian's mirror that apt uses here, or debootstrap's own if it uses none.
mirror() {
    # shellcheck disable=SC2016 # the $(…) is apt's
    apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Component: main' 2>/dev/null |
        head -n 1
}

# Everything for one release. After a step that fails, the others are left out.
try() {
    local release=$1 root=$FOLDER/$1 undone=""
    build
    enter
    tell "$(in_root "python${PYTHONS[$release]}" --version) on Debian $release, $(in_root g++ --version | head -n 1)"
    tell_newer_python
    setup
    if [ -n "$pipeline" ]; then
        step "make pipeline" in_root make pipeline
        step "make chat" chat
        step "tests" in_root .venv/bin/python -m pytest tests/model tests/serving tests/pipeline
    else
        tell_left_out
        # shellcheck disable=SC2046 # names of files, without spaces
        step "tests" in_root .venv/bin/python -m pytest $(quick_tests)
    fi
    if [ -z "$undone" ]; then rm -rf "$root$TREE"; else failed=yes; fi
}

build() {
    [ "$(cat "$root/made-by" 2>/dev/null)" = "$(stamp)" ] && return
    say "building Debian $release in $root (some minutes, once)"
    rm -rf "$root.partial"
    debootstrap --variant=minbase --include="$(packages)" "$release" "$root.partial" "$(mirror)" >"$root.debootstrap.log" ||
        stop "debootstrap failed: see $root.debootstrap.log and $root.partial/debootstrap/debootstrap.log"
    rm "$root.partial"/var/cache/apt/archives/*.deb
    stamp >"$root.partial/made-by"
    rm -rf "$root"
    mv "$root.partial" "$root"
}

packages() {
    local python=python${PYTHONS[$release]}
    echo "$PACKAGES,$python,$python-dev,$python-venv"
}

stamp() { { declare -f build; packages; } | sha256sum; }

# A fresh copy of the tree, and what its commands need from the machine.
enter() {
    rm -rf "$root$TREE"
    mkdir -p "$root$TREE" "$root/cache" "$root$HOME"
    git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
        [ ! -e "$file" ] || printf '%s\0' "$file" # not those that were removed and are still in the index
    done | tar --create --null --files-from - | tar --extract --directory "$root$TREE"
    mount -t proc proc "$root/proc"
    mount --rbind /sys "$root/sys"
    mount --rbind /dev "$root/dev"
    mount -t tmpfs tmpfs "$root/run"
    mount --bind $FOLDER/cache "$root/cache"
    cp --dereference /etc/resolv.conf /etc/hosts "$root/etc/"
    local path settings=(/etc/pip.conf /etc/xdg/pip "$HOME/.pip" "$HOME/.config/pip")
    for path in "${settings[@]}" $(named_paths); do show "$path"; done
}

# The files and folders that pip's settings name; of an index of files its parent, where the files themselves are.
named_paths() {
    { env | grep '^PIP_' && cat "${settings[@]}" "${settings[@]/%//pip.conf}"; } 2>/dev/null |
        grep -oE '[=[:space:]](file://)?/[^[:space:]]+' | sed -E 's,^.,,; s,^file://(.*)/[^/]+/?$,\1,' | sort -u
}

# show PATH: has it at the same place in the root, for reading.
show() {
    [ -e "$1" ] && ! [ "$1" -ef "$root$1" ] || return 0
    if [ -d "$1" ]; then mkdir -p "$root$1"; else mkdir -p "$root${1%/*}" && touch "$root$1"; fi
    mount --bind "$1" "$root$1"
    mount -o remount,bind,ro "$root$1"
}

in_root() {
    local kept
    mapfile -t kept < <(env | grep -E '^(PIP_[A-Z_]+|SSL_CERT_[A-Z]+|https?_proxy|no_proxy|HTTPS?_PROXY|NO_PROXY)=')
    env --ignore-environment "${kept[@]}" PIP_CACHE_DIR=/cache PYTHON="python${PYTHONS[$release]}" HOME="$HOME" \
        LANG=C.UTF-8 TERM="${TERM-dumb}" PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        chroot "$root" env --chdir=$TREE "$@"
}

# The CPU build of torch if there is one to be had; else what setup itself offers.
setup() {
    step "make setup" in_root make setup
    grep -q "EMERALD_ALLOW_CUDA=1 make setup" "$FOLDER/$release-make-setup.log" || return 0
    tell "  torch's CPU build was not to be had: again, with EMERALD_ALLOW_CUDA=1"
    undone=""
    step "make setup" in_root env EMERALD_ALLOW_CUDA=1 make setup
}

chat() { echo "$QUESTION" | in_root make chat; }

# Those that need no build of the embedded model.
quick_tests() { test_files -L; }

test_files() { # -l or -L
    (cd "$root$TREE" && grep -r "$1" --include='test_*.py' embedded_build tests/model tests/serving tests/pipeline | sort)
}

tell_left_out() {
    # shellcheck disable=SC2046 # as above
    tell "  left out, as they need a build (--pipeline):" $(test_files -l)
}

tell_newer_python() {
    local newest
    newest=$(chroot "$root" apt-cache pkgnames python3. | grep -xE 'python3\.[0-9]+' | sort -V | tail -n 1)
    [ "$newest" = "python${PYTHONS[$release]}" ] || tell "  left out: $newest, which pipeline/install.py does not accept yet"
}

# step NAME COMMAND...: runs it, keeps what it prints in a log, and tells how it ended.
step() {
    local name=$1 log=$FOLDER/$release-${1// /-}.log start=$SECONDS ended="done"
    shift
    [ -z "$undone" ] || { tell "  $name: not run" && return; }
    say "$release: $name"
    "$@" 2>&1 | tee "$log" || { ended="failed, see $log" && undone=yes; }
    tell "  $name: $ended in $((SECONDS - start)) s$(counts "$log")"
}

# What pytest counted, and skipped for which reason, if it was that.
counts() {
    sed -nE 's/^=+ (.*(passed|failed|error).*) in .*/: \1/p' "$1" | tail -n 1
    sed -nE 's/^(SKIPPED|FAILED|ERROR) /    \1 /p' "$1"
}

tell() { told+=("$*"); }

say() { echo "python: $*" >&2; }

stop() {
    echo "error: $*" >&2
    exit 2
}

main "$@"
