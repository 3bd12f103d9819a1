#!/usr/bin/env bash
# A real Ceph cluster with an S3 gateway on loopback, for tests: 1 monitor, 1 manager, 3 OSDs, 3 replicas, radosgw.
#   ceph.sh start FOLDER [PORT]   a new, empty cluster in FOLDER (must not exist) with the bucket `metadisk`;
#                                 prints the settings of an S3 client
#   ceph.sh osd-kill FOLDER N     kill -9 of OSD N (0..2)
#   ceph.sh osd-start FOLDER N    start it again
#   ceph.sh status FOLDER         ceph -s
#   ceph.sh stop FOLDER           end the processes of this cluster (those in its pid files)
# Needs root and Debian's ceph-mon ceph-mgr ceph-osd radosgw ceph-common. Takes half a minute, about 1 GiB of memory
# and some GB in FOLDER. What cost time once: radosgw hangs with auth=none unless `ms mon client mode = crc`; small GETs
# take 20 times as long without `tcp_nodelay=1`; a monitor stops on a rather full disk unless told not to; all replicas
# on one host need `osd crush chooseleaf type = 0`.
set -euo pipefail
verb=${1:?a verb: start, osd-kill, osd-start, status, stop}
D=$(realpath -m "${2:?a folder}")
C=(-c "$D/ceph.conf")
access=METADISKTEST secret=metadisk-test-secret bucket=metadisk

write_conf() {
  cat > "$D/ceph.conf" <<CONF
[global]
fsid = $1
mon host = [v2:127.0.0.1:$((port + 1)),v1:127.0.0.1:$((port + 2))]
public network = 127.0.0.0/8
cluster network = 127.0.0.0/8
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
run dir = $D/run
admin socket = $D/run/\$name.asok
pid file = $D/run/\$name.pid
log file = $D/log/\$name.log
mon cluster log file = $D/log/cluster.log
crash dir = $D/run
keyring = $D/keyring
osd pool default size = 3
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon max pg per osd = 1000
[mon]
mon data = $D/mon
mon osd down out interval = 20
mon data avail crit = 1
mon data avail warn = 1
[mgr]
mgr data = $D/mgr
[osd]
osd data = $D/osd\$id
osd objectstore = bluestore
bluestore block create = true
bluestore block size = 4294967296
osd memory target = 939524096
osd heartbeat grace = 5
[client.rgw]
rgw data = $D/rgw
ms mon client mode = crc
rgw frontends = beast endpoint=127.0.0.1:$port tcp_nodelay=1
rgw dns name = localhost
rgw enable usage log = false
rgw dynamic resharding = false
CONF
}

build() {
  monmaptool --create --fsid "$1" --addv a "[v2:127.0.0.1:$((port + 1)),v1:127.0.0.1:$((port + 2))]" "$D/monmap"
  ceph-mon "${C[@]}" --mkfs -i a --monmap "$D/monmap"
  ceph-mon "${C[@]}" -i a
  sleep 2
  ceph "${C[@]}" mon enable-msgr2 || true
  ceph-mgr "${C[@]}" -i x
  local number uuid
  for number in 0 1 2; do
    uuid=$(cat /proc/sys/kernel/random/uuid)
    ceph "${C[@]}" osd new "$uuid"
    ceph-osd "${C[@]}" -i "$number" --mkfs --osd-uuid "$uuid"
    ceph-osd "${C[@]}" -i "$number"
  done
  radosgw "${C[@]}" -n client.rgw
  for _ in $(seq 90); do curl -s -o /dev/null "http://127.0.0.1:$port/" && break; sleep 1; done
  radosgw-admin "${C[@]}" -n client.rgw user create --uid=metadisk --display-name=metadisk \
    --access-key="$access" --secret="$secret"
}

case $verb in
start)
  port=${3:-17480}
  [[ -e $D ]] && { echo "ceph.sh: $D exists" >&2; exit 2; }
  mkdir -p "$D"/{mon,mgr,osd0,osd1,osd2,rgw,run,log}
  touch "$D/keyring"
  fsid=$(cat /proc/sys/kernel/random/uuid)
  write_conf "$fsid"
  build "$fsid" > "$D/log/start.log" 2>&1 || { tail -5 "$D/log/start.log" >&2; exit 1; }
  curl -sf -X PUT -H "x-amz-content-sha256: UNSIGNED-PAYLOAD" --aws-sigv4 "aws:amz:us-east-1:s3" \
    --user "$access:$secret" "http://127.0.0.1:$port/$bucket" ||
    { echo "ceph.sh: the gateway made no bucket" >&2; exit 1; }
  echo "AWS_ENDPOINT_URL=http://127.0.0.1:$port AWS_ACCESS_KEY_ID=$access AWS_SECRET_ACCESS_KEY=$secret" \
    "AWS_REGION=us-east-1"
  ;;
osd-kill) kill -9 "$(cat "$D/run/osd.${3:?a number}.pid")" ;;
osd-start) ceph-osd "${C[@]}" -i "${3:?a number}" ;;
status) ceph "${C[@]}" -s ;;
stop)
  pids=()
  for file in "$D"/run/{client.rgw,osd.0,osd.1,osd.2,mgr.x,mon.a}*.pid; do
    [[ -f $file ]] && pids+=("$(cat "$file")")
  done
  ((${#pids[@]})) || exit 0
  kill "${pids[@]}" 2>/dev/null || true
  for _ in $(seq 20); do kill -0 "${pids[@]}" 2>/dev/null || exit 0; sleep .5; done
  kill -9 "${pids[@]}" 2>/dev/null || true # an OSD without its monitor takes its time
  ;;
*) echo "ceph.sh: unknown verb $verb" >&2; exit 2 ;;
esac
