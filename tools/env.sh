#!/bin/sh
# Makes .venv, or brings it up to date; does nothing (and asks no network) when it already is.
#
#   sh tools/env.sh                     the first Python in PATH that is new enough
#   PYTHON=python3.12 sh tools/env.sh   this one
#
# .venv/.stamp           written last: checksum of what was installed from. Present and equal: all is well.
# .venv/.making          there while we build a new one, with our process id: left behind, it says "half-made".
# .venv/install.log      everything pip said.
# An environment without either is somebody's own: it is installed into, never removed.
set -u
cd "$(dirname "$0")/.." || exit 1
venv=.venv
stamp=$venv/.stamp
making=$venv/.making
log=$venv/install.log
inputs="settings.ini setup.py pyproject.toml constraints.txt"
need=$(sed -n 's/^min_python *= *//p' settings.ini)

say() { printf '%s\n' "$*"; }
die() { printf '%s\n' "$*" >&2; exit 1; }
version_of() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }
# new_enough 3.12.1: true when it is at least $need (3.10)
new_enough() {
    [ "${1%%.*}" -gt "${need%%.*}" ] && return 0
    minor=${1#*.}
    [ "${1%%.*}" -eq "${need%%.*}" ] && [ "${minor%%.*}" -ge "${need#*.}" ]
}

# -- which Python ------------------------------------------------------------------------------------------
find_python() {
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" >/dev/null 2>&1 || die "PYTHON=$PYTHON is not a command on this machine."
        version=$(version_of "$PYTHON") || die "PYTHON=$PYTHON does not run as a Python interpreter."
        new_enough "$version" || die "PYTHON=$PYTHON is Python $version, dpi_nbdev needs $need or newer."
        return
    fi
    old=
    for PYTHON in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        command -v "$PYTHON" >/dev/null 2>&1 || continue
        version=$(version_of "$PYTHON") || continue
        new_enough "$version" && return
        old="$old $PYTHON is $version."
    done
    [ -n "$old" ] && die "dpi_nbdev needs Python $need or newer:$old Install one, or name it: make PYTHON=/path/to/python3"
    die "no Python found: install Python $need or newer, or name one: make PYTHON=/path/to/python3"
}

# -- is there anything to do? ------------------------------------------------------------------------------
asked=${PYTHON:-}
[ -n "$asked" ] && find_python
# shellcheck disable=SC2086
wanted=$(cat $inputs | cksum)
have=
[ -f $stamp ] && have=$(sed -n 1p $stamp)
have_version=$(version_of $venv/bin/python)
[ -n "$have_version" ] || have_version=none
[ -n "$asked" ] && [ "$have_version" != "$version" ] && have="another Python"
[ "$have_version" != none ] && [ "$have" = "$wanted" ] && exit 0

# -- a half-made, broken or differently versioned environment of ours goes -----------------------------------
if [ -f $making ]; then
    kill -0 "$(cat $making)" 2>/dev/null && die "another make (process $(cat $making)) seems to be installing into $venv: wait for it, or remove $venv if there is none."
    say "Removing $venv: its installation was interrupted."
    rm -rf $venv
elif [ -f $stamp ] && [ "$have_version" = none ]; then
    say "Removing $venv: its Python no longer runs."
    rm -rf $venv
elif [ -f $stamp ] && [ "$have" = "another Python" ]; then
    say "Removing $venv: it has Python $have_version, and PYTHON=$asked is $version."
    rm -rf $venv
elif [ -e $venv ] && ! $venv/bin/python -c 'import pip' >/dev/null 2>&1; then
    die "$venv exists, but make did not build it and it has no working Python with pip: move it away and run again."
elif [ -e $venv ] && ! new_enough "$have_version"; then
    die "$venv holds Python $have_version, dpi_nbdev needs $need or newer: move it away and run again."
elif [ -e $venv ] && [ "$have" = "another Python" ]; then
    die "$venv holds Python $have_version, PYTHON=$asked is $version, and make did not build it: move it away and run again."
fi

if [ ! -e $venv ]; then
    find_python
    "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null ||
        die "Python $version ($(command -v "$PYTHON")) has no venv module: install it (Debian, Ubuntu: apt install python3-venv) or name another Python with PYTHON=."
    say "Making $venv with Python $version and installing into it: once, a few minutes; pip's words go to $log"
    mkdir $venv 2>/dev/null || die "cannot create $venv here: is $(pwd) writable?"
    echo $$ >$making || die "cannot write into $venv: is the disk full?"
    trap ': >$making' EXIT             # however this ends early, no process is at work any more
    trap 'exit 130' INT TERM HUP
    "$PYTHON" -m venv $venv >$log 2>&1 || die "python -m venv failed: see $log"
else
    if [ -f $stamp ]
    then say "Updating $venv, because one of $inputs changed; pip's words go to $log"; say stale >$stamp
    else say "Installing into the $venv that is here already; pip's words go to $log"
    fi
    : >$log
fi

# -- install ---------------------------------------------------------------------------------------------------
# The user's own pip configuration (index, proxy, certificates) holds: no host is named here.
$venv/bin/python -m pip install --disable-pip-version-check --no-input --progress-bar off -e '.[dev]' -c constraints.txt >>$log 2>&1 || {
    status=$?
    [ $status -gt 128 ] && die "interrupted while installing; the next make starts again."
    if grep -qi 'no space left' $log; then why="the disk is full"
    elif grep -qiE 'new connection|name resolution|name or service not known|nodename nor servname|unreachable|max retries|timed out|proxyerror|getaddrinfo|connection (refused|broken|reset|aborted)' $log
    then why="pip cannot reach the package index (no network, or a proxy is not set)"
    else why=$(sed -n 's/^ERROR: //p' $log | sed -n '$p'); why=${why:-pip failed}
    fi
    die "installation failed, $why; the whole story is in $log"
}
say "$wanted" >$stamp
trap - EXIT
rm -f $making
say "Ready: $venv, Python $(version_of $venv/bin/python)."
