#!/usr/bin/env bash
# Runs a command as an Arm machine would, on an x86-64 one: tests/arm64/run.sh [--without-sys] [--building] CPU COMMAND...
#
#     sudo tests/arm64/run.sh neoverse-n1 python3 -m pytest tests/model
#
# What KleidiAI packs and computes exists on Arm alone, and the authors of a change often have no such machine. QEMU
# executes arm64 programs one instruction at a time: slowly, but with the results of the named CPU. "max" has i8mm and
# bf16 (as Graviton3 and later), "neoverse-n1" has neither (as Graviton2 and AWS Lambda). Never quote its timings.
#
# The programs come from a Debian root that is built once, in build/arm64/root: a base system, and in it the packages of
# the aarch64 lock. Each of the two carries a digest of what made it, and is made again when that changes. Both appear
# whole or not at all, so a killed build leaves nothing that would be used.
#
# All mounts live in a mount namespace of their own, which the kernel takes down with its last process, however that
# ends: none can leak into the machine, and none is left for the next build to delete through. /sys must be among them:
# without it PyTorch finds no Arm features and packs the slow reference instead, without an error. AWS Lambda is such a
# place, and --without-sys shows what happens there.
#
# The tree is read-only there. With --building it has a build folder of its own, which is kept: build/arm64/build.
set -euo pipefail

SUITE=bookworm PYTHON=3.11 GLIBC=36 # a Debian release, and the Python and the minor version of glibc 2 it ships
PACKAGES=g++,libpython3-dev,python-is-python3,python3,python3-venv
LOCKS=(requirements/linux-aarch64.txt requirements/models.txt requirements/lambda.txt)
ROOT=build/arm64/root

main() {
    [ $# -ge 2 ] || stop "usage: tests/arm64/run.sh [--without-sys] [--building] CPU COMMAND..."
    [ "$(uname -m)" != aarch64 ] || stop "this is an Arm machine, where nothing needs emulating: run make test"
    [ "$(id -u)" = 0 ] || stop "mounts and chroot need root: put sudo before the command"
    if [ "$1" != --unshared ]; then
        need_tools
        unshare --mount true || stop "no mounts are allowed here: start the container with --privileged"
        exec unshare --mount "$0" --unshared "$@"
    fi
    shift
    local trees=(proc sys dev) building=
    [ "$1" != --without-sys ] || { trees=(proc dev) && shift; }
    [ "$1" != --building ] || { building=yes && shift; }
    cd "$(dirname "$0")/../.."
    register_emulator
    build
    enter "$@"
}

need_tools() {
    command -v debootstrap >/dev/null && command -v qemu-aarch64-static >/dev/null && return
    command -v apt-get >/dev/null || stop "install debootstrap, Debian's archive keyring and QEMU's static user emulators"
    say "installing debootstrap and qemu-user-static"
    apt-get update -qq
    apt-get install -qq -y debootstrap debian-archive-keyring qemu-user-static >/dev/null
}

# Tells the kernel to start arm64 programs with QEMU, so that they can start one another. On Linux 6.7 and later that
# ends with this namespace, unless the machine itself had the table mounted.
register_emulator() {
    local table=/proc/sys/fs/binfmt_misc
    [ -e $table/register ] || mount -t binfmt_misc binfmt_misc $table || stop "the kernel has no binfmt_misc"
    emulator_registered && return
    cat /usr/lib/binfmt.d/qemu-aarch64.conf >$table/register || emulator_registered || # another run was faster
        stop "cannot register QEMU in $table: reinstall qemu-user-static"
}

emulator_registered() { # F: the kernel holds the emulator open, so it need not be in the root
    grep -qs '^flags:.*F' /proc/sys/fs/binfmt_misc/qemu-aarch64
}

# Leaves the root locked for sharing until the command ends, so that no other run replaces it under this one.
build() {
    mkdir -p "$(dirname $ROOT)"
    exec 9>$ROOT.lock
    flock --shared 9
    base_is_current && packages_are_current && return
    flock 9
    rm -rf $ROOT.partial $ROOT/packages.partial # left by a killed run
    base_is_current || make_base
    packages_are_current || install_packages
    flock --shared 9
}

base_is_current() { made $ROOT make_base "$SUITE $PACKAGES"; }
packages_are_current() { made $ROOT/packages install_packages "$(cat "${LOCKS[@]}")"; }

# made FOLDER FUNCTION INPUT: whether that function, as it is now, made the folder from that input.
made() { [ "$(cat "$1/made-by" 2>/dev/null)" = "$(stamp "$2" "$3")" ]; }

stamp() { { declare -f "$1"; echo "$2"; } | sha256sum; }

make_base() {
    say "building an arm64 Debian $SUITE in $ROOT (some minutes, once)"
    debootstrap --arch=arm64 --variant=minbase --include=$PACKAGES $SUITE $ROOT.partial "$(mirror)" >$ROOT.log ||
        stop "debootstrap failed: see $ROOT.log and $ROOT.partial/debootstrap/debootstrap.log"
    mkdir $ROOT.partial/emerald
    echo /packages >$ROOT.partial/usr/local/lib/python$PYTHON/dist-packages/emerald.pth
    rm $ROOT.partial/var/cache/apt/archives/*.deb
    stamp make_base "$SUITE $PACKAGES" >$ROOT.partial/made-by
    rm -rf $ROOT
    mv $ROOT.partial $ROOT
}

# The mirror that apt here uses for this release, or debootstrap's own if it uses none.
mirror() {
    # shellcheck disable=SC2016 # the $(…) is apt's
    apt-get indextargets --format '$(REPO_URI)' \
        'Created-By: Packages' 'Origin: Debian' "Codename: $SUITE" 2>/dev/null | head -n 1
}

# With the pip of this machine, which runs natively and knows its indexes, proxies and certificates.
install_packages() {
    local minor tags=(--platform manylinux2014_aarch64)
    say "installing ${LOCKS[*]} into $ROOT/packages"
    for minor in $(seq 17 $GLIBC); do tags+=(--platform "manylinux_2_${minor}_aarch64"); done
    [ -x .venv/bin/python ] || stop "no .venv: run make setup"
    .venv/bin/python -m pip --disable-pip-version-check install -qq --no-deps --only-binary=:all: \
        "${tags[@]}" --python-version $PYTHON --target $ROOT/packages.partial "${LOCKS[@]/#/--requirement=}"
    # pip's bytecode is of this machine's Python; where that is another version, the root's makes its own. Without it,
    # imports take three times as long under emulation, and warnings of compiling a package count as the tests' own.
    chroot $ROOT python3 -W ignore -m compileall -q -j 0 /packages.partial
    stamp install_packages "$(cat "${LOCKS[@]}")" >$ROOT/packages.partial/made-by
    rm -rf $ROOT/packages
    mv $ROOT/packages.partial $ROOT/packages
}

# The tree is at /emerald; /tmp is empty and gone afterwards.
enter() {
    local cpu=$1
    shift
    for tree in "${trees[@]}"; do mount --rbind "/$tree" "$ROOT/$tree"; done
    mount -t tmpfs tmpfs $ROOT/tmp
    mount --bind . $ROOT/emerald
    mount -o remount,bind,ro $ROOT/emerald
    [ -z "$building" ] || { mkdir -p build/arm64/build && mount --bind build/arm64/build $ROOT/emerald/build; }
    cpuinfo "$cpu" >$ROOT/tmp/cpuinfo
    mount --bind $ROOT/tmp/cpuinfo $ROOT/proc/cpuinfo
    rm $ROOT/tmp/cpuinfo
    exec env --ignore-environment QEMU_CPU="$cpu" PYTEST_ADDOPTS="-p no:cacheprovider" PYTHONDONTWRITEBYTECODE=1 HOME=/tmp \
        HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis \
        LANG=C.UTF-8 TERM="${TERM-dumb}" PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        chroot $ROOT env --chdir=/emerald "$@"
}

# /proc/cpuinfo as an Arm kernel writes it; QEMU before 8.2 shows the machine's own. The bits are the emulated CPU's,
# the names the kernel's: arch/arm64/kernel/cpuinfo.c, in order, each row 32 bits at most.
cpuinfo() {
    local auxv hwcap hwcap2 features processor
    auxv=$(QEMU_CPU=$1 chroot $ROOT env LD_SHOW_AUXV=1 /bin/true) || stop "QEMU knows no such CPU: $1"
    hwcap=0x$(sed -nE 's/^AT_HWCAP: +(0x)?//p' <<<"$auxv")
    hwcap2=0x$(sed -nE 's/^AT_HWCAP2: +(0x)?//p' <<<"$auxv")
    features="$(named "$hwcap" fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma \
        lrcpc dcpop sha3 sm3 sm4 asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg)$(named "$hwcap2" \
        dcpodp sve2 sveaes svepmull svebitperm svesha3 svesm4 flagm2 frint svei8mm svef32mm svef64mm svebf16 i8mm bf16 \
        dgh rng bti mte)"
    for processor in $(seq 0 $(($(nproc) - 1))); do
        printf 'processor\t: %d\nFeatures\t:%s\nCPU architecture: 8\n\n' "$processor" "$features"
    done
}

# named BITS NAME...: the names whose bit is set, the first one's being bit 0.
named() {
    local bits=$(($1)) name
    shift
    for name; do
        ((bits & 1)) && printf ' %s' "$name"
        bits=$((bits >> 1))
    done
}

say() { echo "arm64: $*" >&2; }

stop() {
    echo "error: $*" >&2
    exit 2
}

main "$@"
