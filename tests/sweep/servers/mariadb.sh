#!/bin/bash
# A throw-away MariaDB on 127.0.0.1, which speaks MySQL.
#
#   mariadb.sh install               Debian's package
#   mariadb.sh start FOLDER PORT     prints its URL
#   mariadb.sh stop FOLDER
set -euo pipefail
verb=${1:?install, start FOLDER PORT or stop FOLDER}
folder=${2:-}
port=${3:-}
case $verb in
install)
  apt-get update -q
  apt-get install -y -q --no-install-recommends mariadb-server
  ;;
start)
  install -d -o mysql "$folder"
  mariadb-install-db --no-defaults --user=mysql --datadir="$folder/data" >"$folder/log"
  mariadbd --no-defaults --user=mysql --datadir="$folder/data" --bind-address=127.0.0.1 --port="$port" \
    --socket="$folder/socket" --pid-file="$folder/pid" >>"$folder/log" 2>&1 </dev/null &
  for _ in $(seq 60); do
    mariadb --no-defaults --socket="$folder/socket" -e "select 1" >/dev/null 2>&1 && break
    sleep 0.5
  done
  mariadb --no-defaults --socket="$folder/socket" -e "create database studies; create user 'me'@'127.0.0.1' \
    identified by 'word'; grant all on studies.* to 'me'@'127.0.0.1'"
  echo "mysql://me:\$STUDY_PASSWORD@127.0.0.1:$port/studies"
  ;;
stop) kill "$(cat "$folder/pid")" ;;
*)
  echo "mariadb.sh install | start FOLDER PORT | stop FOLDER" >&2
  exit 2
  ;;
esac
