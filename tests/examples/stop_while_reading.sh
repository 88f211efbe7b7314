#!/bin/sh
# SPDX-License-Identifier: MIT
# A training is stopped before it has begun: the signal comes while the program waits for its text,
# which comes through a named pipe.
#   stop_while_reading.sh PROGRAM TEXT FOLDER SIGNAL argument...
program=$1
text=$2
folder=$3
signal=$4
shift 4
rm -rf "$folder"
mkdir -p "$folder"
mkfifo "$folder/pipe"
"$program" "$folder/pipe" --out "$folder/model.safetensors" "$@" &
# Opens when the program has opened the other end.
exec 3>"$folder/pipe"
kill -s "$signal" $!
cat "$text" >&3
exec 3>&-
wait $!
status=$?
if [ $status -ne 130 ]; then
  echo "expected exit status 130, got $status" >&2
  exit 1
fi
exec "$program" "$text" --out "$folder/model.safetensors" "$@" --resume
