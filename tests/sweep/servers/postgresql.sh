#!/bin/bash
# A throw-away PostgreSQL on 127.0.0.1. The server refuses to run as root, so it runs as the package's user.
#
#   postgresql.sh install               Debian's package
#   postgresql.sh start FOLDER PORT     prints its URL
#   postgresql.sh stop FOLDER
set -euo pipefail
verb=${1:?install, start FOLDER PORT or stop FOLDER}
folder=${2:-}
port=${3:-}
bin=$(find /usr/lib/postgresql -maxdepth 2 -name bin 2>/dev/null | sort -V | tail -1 || true)
case $verb in
install)
  apt-get update -q
  apt-get install -y -q --no-install-recommends postgresql
  ;;
start)
  install -d -o postgres -g postgres -m 700 "$folder"
  if [ ! -d "$folder/data" ]; then
    su postgres -c "$bin/initdb -D $folder/data -A trust -U postgres --no-sync -E UTF8 --locale=C" >/dev/null
  fi
  options="-p $port -k $folder -c listen_addresses=127.0.0.1 -c max_connections=100"
  su postgres -c "$bin/pg_ctl -D $folder/data -w -l $folder/log -o '$options' start" >/dev/null
  su postgres -c "createdb -h 127.0.0.1 -p $port -U postgres studies" 2>/dev/null || true
  echo "postgresql://postgres@127.0.0.1:$port/studies"
  ;;
stop) su postgres -c "$bin/pg_ctl -D $folder/data -m fast stop" >/dev/null ;;
*)
  echo "postgresql.sh install | start FOLDER PORT | stop FOLDER" >&2
  exit 2
  ;;
esac
