#!/bin/sh
# The current peers on an older machine: a Debian 13 tree in a cache folder, built once.
#
#   interop/rootfs.sh          build the tree if it is missing or its package list has changed
#
# Nothing runs inside the tree (no chroot, no root after the build): each program gets a launcher
# in TREE/peers, which starts it through the tree's own dynamic loader with the tree's libraries.
# The tree is built in a sibling folder and renamed, so that it is either whole or not there.
#
#   PYNBD_PEERS   the tree             default: ~/.cache/pynbd/trixie (XDG_CACHE_HOME is honoured)
#   PYNBD_MIRROR  a Debian mirror      default: the one that this machine's apt uses
set -eu

suite=trixie
packages=qemu-utils,qemu-system-common,libnbd-bin,python3-libnbd,nbdkit,fio,python3
programs='qemu-img qemu-io qemu-nbd qemu-storage-daemon nbdinfo nbdcopy nbddump nbdkit fio'
tree=${PYNBD_PEERS:-${XDG_CACHE_HOME:-$HOME/.cache}/pynbd/trixie}
tree=$(realpath -m "$tree")

say() { echo "rootfs.sh: $*" >&2; }
die() { say "$*"; exit 1; }

mirror() {
    [ -z "${PYNBD_MIRROR:-}" ] || { echo "$PYNBD_MIRROR"; return; }
    . /etc/os-release
    [ "${ID:-}" != debian ] || apt-get indextargets --format '$(RELEASE) $(COMPONENT) $(REPO_URI)' \
        'Identifier: Packages' 2> /dev/null | awk -v name="${VERSION_CODENAME:-stable}" \
        '($1 == name || $1 ~ /^(old)?stable$/) && $2 == "main" { print $3; exit }'
}

# A launcher needs no environment, so that what its program starts finds the world unchanged.
launcher() { # name, then the lines of the script
    name=$1; shift
    { echo '#!/bin/sh'; printf '%s\n' "$@"; } > "$tree/peers/.$name"
    chmod 755 "$tree/peers/.$name"
    mv "$tree/peers/.$name" "$tree/peers/$name"
}

launchers() {
    lib=$(echo "$tree"/usr/lib/*-linux-gnu)
    loader=$(echo "$tree"/lib/ld-linux*.so.* "$tree"/lib64/ld-linux*.so.* | tr ' ' '\n' | grep -v '\*' | head -n 1)
    mkdir -p "$tree/peers"
    for program in $programs; do
        start="exec '$loader' --library-path '$lib:$lib/ceph' '$tree/usr/bin/$program' \"\$@\""
        case $program in
        qemu-*) launcher "$program" "export QEMU_MODULE_DIR='$lib/qemu'" "$start" ;;
        # nbdkit looks for a plugin or filter of a bare name in /usr/lib: give it the whole path.
        nbdkit) launcher nbdkit 'for word; do' '    shift' '    case $word in' \
            "    --filter=[!/]*) word=--filter=$lib/nbdkit/filters/nbdkit-\${word#*=}-filter.so ;;" \
            "    [!-/]*) plugin=$lib/nbdkit/plugins/nbdkit-\$word-plugin.so; [ ! -e \"\$plugin\" ] || word=\$plugin ;;" \
            '    esac' '    set -- "$@" "$word"' 'done' "$start" ;;
        *) launcher "$program" "$start" ;;
        esac
    done
    # Python finds its library from argv[0]: in the folder beside the launcher's own, or, where that
    # is the link of a virtual environment, as the environment says.
    python="--library-path '$lib' '$tree/usr/bin/python3'"
    launcher python3 "exec '$loader' --argv0 \"\$0\" $python \"\$@\""
    launcher nbdsh "exec '$loader' --argv0 '$tree/peers/python3' $python -m nbd \"\$@\""
}

mkdir -p "$(dirname "$tree")"
exec 9> "$tree.lock"
flock 9
if [ "$(cat "$tree/packages" 2>/dev/null)" != "$suite $packages" ]; then
    [ "$(id -u)" = 0 ] || die "the peers' tree takes root to build: sudo PYNBD_PEERS='$tree' $0," \
        "or install qemu-utils >= 8.2, libnbd >= 1.18, nbdkit >= 1.36 and fio >= 3.30"
    command -v debootstrap > /dev/null || {
        say 'installing debootstrap'
        { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y \
            --no-install-recommends debootstrap; } > /dev/null || die 'apt-get cannot install debootstrap'
    }
    mirror=$(mirror)
    [ -n "$mirror" ] || { apt-get -qq update > /dev/null; mirror=$(mirror); } # its lists were empty
    [ -n "$mirror" ] || die "apt's configuration names no Debian mirror: set PYNBD_MIRROR to one"
    new=$tree.new.$$
    trap 'rm -rf --one-file-system "$new"' EXIT
    trap 'exit 1' HUP INT TERM
    say "building $tree (about a minute)"
    debootstrap --variant=minbase --include="$packages" "$suite" "$new" "$mirror" > "$tree.log" 2>&1 9>&- || {
        tail -n 20 "$tree.log" >&2
        die "debootstrap failed: the whole log is $tree.log"
    }
    rm -rf "$new"/var/cache/apt "$new"/var/lib/apt/lists "$new"/usr/share/doc "$new"/usr/share/man \
        "$new"/usr/share/locale "$new"/usr/share/info "$new"/boot "$new"/dev
    echo "$suite $packages" > "$new/packages"
    rm -rf --one-file-system "$tree"
    mv "$new" "$tree"
fi
launchers
