#!/usr/bin/env bash
# Runs a command with a Docker engine at hand:
#
#     tests/image/engine.sh amd64 .venv/bin/python -m pytest tests/image        (arm64: emulated on an x86-64 machine)
#
# Where an engine answers, the command gets that one, and images are built on the Dockerfile's own base. Elsewhere
# Debian 13's packages (Docker 26: BuildKit, and images saved in OCI's layout, as on GitHub's runners) become an engine of
# this run alone, unpacked in build/docker/engine, with its data beside it and its socket in a new folder, stopped when the
# command ends. It knows no hub, so the base is made here too, by debootstrap, once. Such machines often
# reach package indexes by ways of their own (proxies, certificates, mirrors): pip of this machine, which knows them,
# brings the wheels into the image in which packages are installed, and nothing of that is in the image that is built.
#
# The command finds DOCKER_HOST, and in EMERALD_IMAGE_ARGUMENTS what "python -m pipeline.image build" needs here.
set -euo pipefail

SUITE=bookworm PYTHON=3.11 GLIBC=36 # a Debian release, and the Python and the minor version of glibc 2 it ships
PACKAGES=ca-certificates,python3,python3-pip,python3-venv
ENGINE_SUITE=trixie
ENGINE_PACKAGES=(docker.io docker-cli docker-buildx containerd)
HOME_FOLDER=build/docker
PLUGINS=/usr/local/lib/docker/cli-plugins
declare -A MACHINES=([amd64]=x86_64 [arm64]=aarch64)

main() {
    [ $# -ge 2 ] && [ -n "${MACHINES[$1]-}" ] || stop "usage: tests/image/engine.sh amd64|arm64 COMMAND..."
    arch=$1 machine=${MACHINES[$1]}
    shift
    cd "$(dirname "$0")/../.."
    arguments=""
    if [ "$machine" != "$(uname -m)" ]; then
        arguments="--platform linux/$arch"
        [ "$machine" = aarch64 ] || stop "only arm64 is emulated here"
        register_emulator
    fi
    if docker version >/dev/null 2>&1; then
        say "using the engine that answers"
        command -v docker-registry >/dev/null || install docker-registry
        EMERALD_IMAGE_ARGUMENTS=$arguments exec "$@"
    fi
    [ "$(id -u)" = 0 ] || stop "no Docker engine answers, and starting one needs root: put sudo before the command"
    need_tools
    start_engine
    make_base
    make_builder
    EMERALD_IMAGE_ARGUMENTS="$arguments --base $base --builder $builder --network host" "$@"
}

need_tools() {
    local tool
    [ -x .venv/bin/python ] || stop "no .venv: run make setup"
    for tool in runc iptables docker-registry debootstrap; do
        command -v $tool >/dev/null || install runc iptables docker-registry debootstrap debian-archive-keyring
    done
    make_engine
    PATH=$PWD/$HOME_FOLDER/engine/usr/sbin:$PWD/$HOME_FOLDER/engine/usr/bin:$PATH
    # where Docker's command line looks for plugins, whatever configuration a command has
    [ -e $PLUGINS/docker-buildx ] || {
        mkdir -p $PLUGINS
        ln -sfn "$PWD/$HOME_FOLDER/engine/usr/libexec/docker/cli-plugins/docker-buildx" $PLUGINS/docker-buildx
    }
}

# Docker of a newer Debian than this machine's: its programs need little of the system, and are unpacked, not installed.
make_engine() {
    local folder=$HOME_FOLDER/engine stamp lists
    stamp=$({ declare -f make_engine; echo "$ENGINE_SUITE ${ENGINE_PACKAGES[*]}"; } | sha256sum)
    [ "$(cat $folder/made-by 2>/dev/null)" != "$stamp" ] || return 0
    say "unpacking Docker of Debian $ENGINE_SUITE into $folder"
    rm -rf $folder $folder.partial
    mkdir -p $folder.partial/apt/lists/partial $folder.partial/apt/archives/partial
    lists=$PWD/$folder.partial/apt
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $(mirror) $ENGINE_SUITE main" >"$lists/sources.list"
    local options=(-o Dir::Etc::SourceList="$lists/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o Dir::State::Lists="$lists/lists" -o Dir::Cache="$lists" -o APT::Sandbox::User=root)
    apt-get "${options[@]}" update -qq || stop "apt-get cannot read the list of packages of Debian $ENGINE_SUITE"
    (cd "$lists" && apt-get "${options[@]}" download -qq "${ENGINE_PACKAGES[@]}" >/dev/null) ||
        stop "apt-get cannot download ${ENGINE_PACKAGES[*]} of Debian $ENGINE_SUITE"
    for package in "$lists"/*.deb; do dpkg-deb --extract "$package" $folder.partial; done
    rm -r "$lists"
    echo "$stamp" >$folder.partial/made-by
    mv $folder.partial $folder
}

# Debian's mirror that apt uses here.
mirror() {
    # shellcheck disable=SC2016 # the $(…) is apt's
    apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Component: main' | head -n 1
}

install() {
    command -v apt-get >/dev/null || stop "install what Debian calls $*"
    local root=(sudo)
    [ "$(id -u)" != 0 ] || root=()
    say "installing $*"
    "${root[@]}" apt-get update -qq
    "${root[@]}" apt-get install -qq -y --no-install-recommends "$@" >/dev/null
}

start_engine() {
    mkdir -p $HOME_FOLDER
    exec 9>$HOME_FOLDER/lock
    flock --nonblock 9 || stop "another run is at work in $HOME_FOLDER: wait for it"
    run=$(mktemp -d /run/emerald-docker.XXXXXX)
    export DOCKER_HOST=unix://$run/docker.sock
    trap stop_engine EXIT
    dockerd --data-root "$PWD/$HOME_FOLDER/data" --exec-root "$run/exec" --pidfile "$run/pid" --host "$DOCKER_HOST" \
        --bridge none --iptables=false --ip6tables=false >$HOME_FOLDER/dockerd.log 2>&1 9>&- &
    engine=$!
    for _ in $(seq 100); do
        docker version >/dev/null 2>&1 && return
        kill -0 $engine 2>/dev/null || break
        sleep 0.2
    done
    stop "the engine did not start: see $HOME_FOLDER/dockerd.log"
}

stop_engine() {
    kill $engine 2>/dev/null && wait $engine || true
    umount "$run"/exec/netns/* 2>/dev/null || true # the engine leaves the network of the host mounted there
    rm -rf "$run"
}

# made IMAGE: whether the engine has it. Names carry a digest of what the image is made of.
made() { docker image inspect "$1" >/dev/null 2>&1; }

make_base() {
    base=emerald-base:$arch-$({ declare -f make_base load; echo $SUITE $PACKAGES; } | sha256sum | head -c 12)
    made "$base" && return
    local folder=$HOME_FOLDER/root-$arch
    say "making a base image of Debian $SUITE for $arch (some minutes, once)"
    rm -rf $folder
    debootstrap --arch=$arch --variant=minbase --include=$PACKAGES $SUITE $folder >$folder.log 2>&1 ||
        stop "debootstrap failed: see $folder.log"
    rm -rf $folder/var/cache/apt/archives/*.deb $folder/var/lib/apt/lists/* $folder/usr/share/man $folder/usr/share/locale
    # in two layers that both call apt-get in their history, as the official Python images have
    tar --directory $folder --create --file $folder-1.tar --exclude ./usr/share/doc .
    tar --directory $folder --create --file $folder-2.tar ./usr/share/doc
    rm -rf $folder
    load $folder-1.tar $folder-2.tar
    rm $folder-1.tar $folder-2.tar
}

# load LAYER...: the base image of these layers, as docker save would write it. (Importing calls whatever it is given an
# image of the machine's own architecture, and a build for another refuses it at its first COPY --from.)
load() {
    local folder layer history=() digests=() names=()
    folder=$(mktemp -d "$run/load.XXXXXX")
    for layer; do
        history+=('{"created_by": "RUN /bin/sh -c apt-get update; apt-get install"}')
        digests+=("\"sha256:$(sha256sum <"$layer" | head -c 64)\"")
        names+=("\"$(basename "$layer")\"")
        ln -s "$PWD/$layer" "$folder/$(basename "$layer")"
    done
    local IFS=,
    {
        printf '{"architecture": "%s", "os": "linux", "config": {}, "history": [%s], ' "$arch" "${history[*]}"
        printf '"rootfs": {"type": "layers", "diff_ids": [%s]}}' "${digests[*]}"
    } >"$folder/config.json"
    printf '[{"Config": "config.json", "RepoTags": ["%s"], "Layers": [%s]}]' "$base" "${names[*]}" >"$folder/manifest.json"
    tar --directory "$folder" --dereference --create . | docker load --quiet >/dev/null
}

make_builder() {
    local inputs=(pyproject.toml requirements/linux-$machine.txt)
    [ -f requirements/lambda.txt ] && inputs+=(requirements/lambda.txt)
    builder=emerald-builder:$arch-$({ declare -f make_builder locked; echo "$base"; cat "${inputs[@]}"; } | sha256sum | head -c 12)
    made "$builder" && return
    local folder=$HOME_FOLDER/builder-$arch minor tags=(--platform "manylinux2014_$machine")
    say "bringing the wheels of requirements/linux-$machine.txt that serving needs"
    for minor in $(seq 17 $GLIBC); do tags+=(--platform "manylinux_2_${minor}_$machine"); done
    mkdir -p $folder/wheels
    rm -f $folder/wheels/*
    locked >$folder/wanted.txt
    .venv/bin/python -m pip --disable-pip-version-check download -q --no-deps --only-binary=:all: "${tags[@]}" \
        --python-version $PYTHON --dest $folder/wheels --requirement $folder/wanted.txt
    printf '[global]\nno-index = true\nfind-links = /wheels\n' >$folder/pip.conf
    printf 'FROM %s\nCOPY wheels /wheels\nCOPY pip.conf /etc/pip.conf\n' "$base" >$folder/Dockerfile
    DOCKER_BUILDKIT=1 docker build -q --platform linux/$arch -t "$builder" $folder >/dev/null
}

# The pins of this architecture for all that serving and Lambda need. pip says what that is on this machine; the locks
# differ in versions, not in names.
locked() {
    .venv/bin/python - "$machine" <<'PYTHON'
import json, platform, re, subprocess, sys, tomllib
from pathlib import Path

def lock(machine):
    return Path(f"requirements/linux-{machine}.txt")

def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()

pins = dict(line.split("==") for line in lock(sys.argv[1]).read_text().splitlines() if "==" in line)
pins = {plain(name): version for name, version in pins.items()}
asked = tomllib.loads(Path("pyproject.toml").read_text())["project"]["dependencies"]
extra = Path("requirements/lambda.txt")
command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
command += ["--constraint", str(lock(platform.machine())), *asked, *(["--requirement", str(extra)] if extra.exists() else [])]
found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)["install"]
for package in (item["metadata"] for item in found):
    print(f"{package['name']}=={pins.get(plain(package['name']), package['version'].partition('+')[0])}")
PYTHON
}

register_emulator() {
    [ "$(id -u)" = 0 ] || stop "emulating $arch needs root: put sudo before the command"
    command -v qemu-aarch64-static >/dev/null || install qemu-user-static
    local table=/proc/sys/fs/binfmt_misc
    [ -e $table/register ] || mount -t binfmt_misc binfmt_misc $table || stop "the kernel has no binfmt_misc"
    grep -qs '^flags:.*F' $table/qemu-aarch64 || cat /usr/lib/binfmt.d/qemu-aarch64.conf >$table/register
}

say() { echo "engine: $*" >&2; }

stop() {
    echo "error: $*" >&2
    exit 2
}

main "$@"
