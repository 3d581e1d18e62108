#!/bin/sh
# Works through parts, one file each, and sums them up. Goes on after the newest part that is there.
set -eu
cd "$SPOTFIRST_CHECKPOINT_DIR"
mkdir -p parts
for part in 01 02 03 04 05 06 07 08 09 10 11 12 13 14 15 16; do
    [ -e "parts/$part.txt" ] && continue
    seq 1 "${part#0}" | awk '{ n = (n * 31 + $1) % 1000003; print n }' > "parts/$part.tmp"
    sleep "$PACE_S"
    sort -n "parts/$part.tmp" > "parts/$part.part"
    mv "parts/$part.part" "parts/$part.txt"
    rm "parts/$part.tmp"
    echo "part $part done" >> progress.log
    wc -l parts/*.txt > counts.txt
done
cat parts/*.txt | cksum > summary.tmp
mv summary.tmp summary.txt
sleep 0.5
