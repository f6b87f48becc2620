# Sourced by tools that keep a Debian system in a directory, to run programs from: makes one, once, with debootstrap.
#
#   AUTHBACKEND_CACHE   where built roots are kept   (/var/cache/authbackend)
#   DEBIAN_MIRROR       the mirror to use            (the one in /etc/apt)
#
# Progress goes to stderr. An interrupted build leaves nothing behind that a later run could take for a finished one.
CACHE=${AUTHBACKEND_CACHE:-/var/cache/authbackend}
HERE=$(readlink -f "$0")
BUILD='' LOG=''

say() { printf '%s: %s\n' "${HERE##*/}" "$*" >&2; }
die() { say "$*"; exit 1; }

# make_root NAME SUITE PACKAGES FINISH: $CACHE/NAME with these packages (comma-separated) beside the bare system, unless
# it is there. FINISH is called before the directory gets its name, completes what is in $BUILD, and prints its version.
make_root() {
  local name=$1 suite=$2 packages=$3 finish=$4 source stale version
  [ ! -e "$CACHE/$name/.done" ] || return 0
  if [ "$(id -u)" != 0 ]; then
    die "there is no $CACHE/$name yet, and building it needs root. Run:  sudo ${AUTHBACKEND_CACHE:+AUTHBACKEND_CACHE=$CACHE }$HERE"
  fi
  trap cleanup_root EXIT
  trap 'exit 130' INT TERM HUP
  mkdir -p "$CACHE"
  exec 9>"$CACHE/.$name.lock"
  flock -n 9 || { say "another run is building it, waiting"; flock 9; }
  [ ! -e "$CACHE/$name/.done" ] || return 0
  find "$CACHE" -maxdepth 1 -type d -name ".$name.*" | while read -r stale; do # from runs that were killed
    unmount "$stale"; rm -rf --one-file-system "$stale"
  done
  source=$(mirror)
  [ -n "$source" ] || die "no Debian mirror found in /etc/apt: set DEBIAN_MIRROR to the address of one"
  LOG=$(mktemp "$CACHE/.$name.log.XXXXXX")
  BUILD=$(mktemp -d "$CACHE/.$name.XXXXXX")
  chmod 755 "$BUILD"
  ensure_debootstrap
  say "fetching Debian $suite from $source, once (some minutes)"
  # The script 'sid' suits every later suite, also one that this debootstrap has not heard of.
  debootstrap --variant=minbase --include="$packages" "$suite" "$BUILD" "$source" /usr/share/debootstrap/scripts/sid >>"$LOG" 2>&1 ||
    die "debootstrap of Debian $suite from $source failed. Is the mirror reachable? Another one: DEBIAN_MIRROR=http://... $HERE"
  printf '127.0.0.1 localhost\n::1 localhost\n' >"$BUILD/etc/hosts"
  printf '#!/bin/sh\nexit 101\n' >"$BUILD/usr/sbin/policy-rc.d" # packages must not start daemons while they are installed
  chmod 755 "$BUILD/usr/sbin/policy-rc.d"
  version=$("$finish")
  chroot "$BUILD" apt-get clean
  rm -rf "$BUILD"/var/lib/apt/lists/*
  echo "$version" >"$BUILD/.done"
  rm -rf --one-file-system "${CACHE:?}/$name"
  mv -T "$BUILD" "$CACHE/$name"
  BUILD=
  say "$version is in $CACHE/$name"
  rm -f "$LOG"
  exec 9>&-
}

cleanup_root() {
  local status=$?
  [ "$status" = 0 ] || [ ! -s "$LOG" ] || { say "the last lines of the build's log:"; tail -n 15 "$LOG" >&2; }
  [ -z "$BUILD" ] || [ ! -d "$BUILD" ] || { unmount "$BUILD"; rm -rf --one-file-system "$BUILD"; }
  [ -z "$LOG" ] || rm -f "$LOG"
}

unmount() { # debootstrap mounts /proc and /sys inside while it configures packages
  local point
  awk -v base="$1/" 'index($2, base) == 1 {print $2}' /proc/mounts | sort -r |
    while read -r point; do umount -l "$point" || true; done
}

mirror() { # the first Debian archive in the apt sources, deb822 files first, then one-line files
  [ -z "${DEBIAN_MIRROR:-}" ] || { echo "$DEBIAN_MIRROR"; return; }
  local files=() file
  for file in /etc/apt/sources.list.d/*.sources /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
    [ ! -r "$file" ] || files+=("$file")
  done
  [ ${#files[@]} -gt 0 ] || return 0
  awk '/^URIs:/ {for (i = 2; i <= NF; i++) print $i}
       /^deb[ \t]/ {for (i = 2; i <= NF; i++) if ($i ~ /^[a-z+]+:\/\//) {print $i; break}}' "${files[@]}" |
    awk '/\/debian\/?$/ {print; exit}'
}

ensure_debootstrap() {
  command -v debootstrap >/dev/null && return
  command -v apt-get >/dev/null || die "debootstrap is missing, and this is no Debian: install debootstrap, then run this again"
  say "installing debootstrap"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends debootstrap; } >>"$LOG" 2>&1 ||
    die "apt-get could not install debootstrap"
}
