#!/usr/bin/env bash
# Brings compose.yaml up for real, talks to it, breaks it and takes it down again. Prints `N passed, N failed`.
#
# Needs an engine that runs already and curl; docs/compose.md says which versions. Not a part of `./hearth test`.
#
#   tests/compose/run.sh              everything
#   KEEP=1 tests/compose/run.sh       leave the cluster running at the end
#
# Environment: COMPOSE ("docker compose") and DOCKER ("docker") are the commands; HEARTH_PORT the published port (a
# free one from 18080 on); HEARTH_WHEELS, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS as in compose.yaml.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

PROJECT=hearth-compose-test     # its own containers and volumes: a cluster of the user's stays as it is
PORT=${HEARTH_PORT:-$(p=$((18080 + RANDOM % 2000)); while (: < "/dev/tcp/127.0.0.1/$p") 2> /dev/null; do p=$((p + 1)); done; echo "$p")}
URL=http://127.0.0.1:$PORT
SERVICES=(nats redis scheduler gateway store-1 worker-1 store-2 worker-2)
export HEARTH_PORT=$PORT HEARTH_BIND=127.0.0.1 HEARTH_API_KEYS='' HEARTH_API_KEY='' HEARTH_DRAM_BYTES=268435456
export HEARTH_PEER_TOKEN=compose-test
export HEARTH_IMAGE=${HEARTH_IMAGE:-hearth:compose-test} COMPOSE_ANSI=never COMPOSE_PROGRESS=plain

work=$(mktemp -d)
passed=0 failed=0
started=$SECONDS

# shellcheck disable=SC2086 # COMPOSE and DOCKER may be several words
dc() { ${COMPOSE:-docker compose} --project-name "$PROJECT" --file compose.yaml "$@"; }
# shellcheck disable=SC2086
engine() { ${DOCKER:-docker} "$@"; }
say() { printf '[%3ds] %s\n' $((SECONDS - started)) "$*"; }
check() { # WHAT COMMAND...: one check
    local what=$1 from=$SECONDS
    shift
    if "$@"; then
        passed=$((passed + 1)); printf '  ok    %s (%ds)\n' "$what" $((SECONDS - from))
    else
        failed=$((failed + 1)); printf '  FAIL  %s (%ds)\n' "$what" $((SECONDS - from))
    fi
}
quiet() { "$@" > "$work/log" 2>&1 || { tail -40 "$work/log"; return 1; }; }
until_ok() { # SECONDS COMMAND...: repeat until it succeeds
    local end=$((SECONDS + $1))
    shift
    until "$@" > /dev/null 2>&1; do [ $SECONDS -lt "$end" ] || return 1; sleep 0.2; done
}

container() { dc ps --all --quiet "$1"; }
healthy() { # SERVICE...
    local name
    for name; do
        [ "$(engine inspect --format '{{.State.Status}} {{.State.Health.Status}}' "$(container "$name")")" = "running healthy" ] || return 1
    done
}
restarted() { [ "$(engine inspect --format '{{.RestartCount}}' "$(container "$1")")" -gt "$2" ]; }
restarts() { engine inspect --format '{{.RestartCount}}' "$(container "$1")"; }
# Every process of the container but its init: the service dies without a word, and the restart policy answers
# (it does not answer `docker kill`, which counts as a wish).
kill_processes() { dc exec -T "$1" sh -c 'kill -9 -1' > /dev/null 2>&1 || true; }
python_in_gateway() { dc exec -T gateway python -Ic "$1"; }

get() { curl --silent --show-error --fail --max-time 20 "$URL$1"; }
lists_demo() { get /v1/models | grep -q '"demo"'; }
chat() { # MAX_TOKENS FILE: a greedy stream, written to a file as it comes
    curl --silent --show-error --no-buffer --max-time 120 "$URL/v1/chat/completions" \
        --header 'Content-Type: application/json' --output "$2" --data-binary @- << JSON
{"model": "demo", "stream": true, "temperature": 0, "max_tokens": $1, "ignore_eos": true,
 "messages": [{"role": "user", "content": "Tell me a story."}]}
JSON
}
text_of() { # FILE: the text of a stream, or failure if it is no whole one
    python_in_gateway '
import json, sys
lines = [line[6:] for line in sys.stdin.read().splitlines() if line.startswith("data: ")]
assert lines and lines[-1] == "[DONE]", lines[-1:]
frames = [json.loads(line) for line in lines[:-1]]
assert all("error" not in frame for frame in frames), frames
choices = [choice for frame in frames for choice in frame["choices"]]
assert choices[-1]["finish_reason"], choices[-1]
print("".join(choice["delta"].get("content") or "" for choice in choices))
' < "$1"
}
answers() { # a short stream has text and ends
    chat 20 "$work/short" || return 1
    local text
    text=$(text_of "$work/short") || { head -c 2000 "$work/short"; return 1; }
    [ -n "${text//[[:space:]]/}" ] || return 1
    printf '        %s\n' "$(tr -s '[:space:]' ' ' <<< "$text")"
}
answers_json() {
    curl --silent --show-error --fail --max-time 60 "$URL/v1/chat/completions" --header 'Content-Type: application/json' \
        --data '{"model": "demo", "max_tokens": 8, "messages": [{"role": "user", "content": "Hello"}]}' \
        | grep -q '"usage"'
}
refuses_unknown() {
    [ "$(curl --silent --output /dev/null --write-out '%{http_code}' --max-time 10 "$URL/v1/chat/completions" \
        --header 'Content-Type: application/json' --data '{"model": "nobody", "messages": [{"role": "user", "content": "x"}]}')" = 404 ]
}
cluster_is() { # WORKERS SERVERS, all of them ready
    get /v1/admin/cluster | python_in_gateway "
import json, sys
view = json.load(sys.stdin)
found = [[record.get('phase') for record in view.get(kind, ())] for kind in ('workers', 'servers')]
sys.exit(found != [['ready'] * $1, ['ready'] * $2])"
}
worker_of_demo() { # the service whose replica of demo is ready
    get /v1/admin/cluster | python_in_gateway "
import json, sys
for record in json.load(sys.stdin).get('replicas', ()):
    if record['deployment'] == 'demo' and record['state'] == 'ready':
        print(record['worker_id'])
        break"
}
maps_pool() { # the worker sees its store's DRAM pool, and can only read it
    dc exec -T "$1" sh -c 'cat /proc/[0-9]*/maps 2> /dev/null | grep " /dev/shm/hearth/" > /tmp/maps
        grep -q " r--s " /tmp/maps && ! grep -q " rw-s " /tmp/maps'
}
frames_in() { [ "$(grep -c '^data: ' "$1" 2> /dev/null)" -ge "$2" ]; }

crash_of_the_worker() { # kill -9 while it streams: the client reads on, and reads what it would have read
    local worker before reader
    worker=$(worker_of_demo)
    [ -n "$worker" ] || { echo "        no replica of demo is ready"; return 1; }
    chat "$LONG" "$work/whole" && text_of "$work/whole" > "$work/whole.text" || { tail -c 600 "$work/whole"; return 1; }
    before=$(restarts "$worker")
    chat "$LONG" "$work/broken" &
    reader=$!
    until_ok 30 frames_in "$work/broken" 10 || { echo "        the stream did not begin"; kill "$reader"; return 1; }
    kill_processes "$worker"
    ! grep -q '\[DONE\]' "$work/broken" || { echo "        the stream had ended before the crash"; return 1; }
    echo "        $worker killed after $(grep -c '^data: ' "$work/broken") frames"
    wait "$reader" || { echo "        the stream broke off"; return 1; }
    text_of "$work/broken" > "$work/broken.text" || { tail -c 600 "$work/broken"; return 1; }
    cmp "$work/whole.text" "$work/broken.text" || return 1
    until_ok 60 restarted "$worker" "$before"
}
stop_of_the_worker() { # `stop` while it streams: the stream moves or is finished, and the service ends in order
    local worker reader
    worker=$(worker_of_demo)
    [ -n "$worker" ] || { echo "        no replica of demo is ready"; return 1; }
    chat "$LONG" "$work/drained" &
    reader=$!
    until_ok 30 frames_in "$work/drained" 10 || { echo "        the stream did not begin"; kill "$reader"; return 1; }
    quiet dc stop "$worker" || return 1
    wait "$reader" || { echo "        the stream broke off"; return 1; }
    text_of "$work/drained" > "$work/drained.text" || { tail -c 600 "$work/drained"; return 1; }
    cmp "$work/whole.text" "$work/drained.text" || return 1
    [ "$(engine inspect --format '{{.State.ExitCode}}' "$(container "$worker")")" = 0 ] || return 1
    quiet dc start "$worker"
}
drain_of_the_worker() { # `hearth drain` while it streams: the stream moves to the other server, and the worker is empty
    local worker reader
    worker=$(worker_of_demo)
    [ -n "$worker" ] || { echo "        no replica of demo is ready"; return 1; }
    chat "$LONG" "$work/moved" &
    reader=$!
    until_ok 30 frames_in "$work/moved" 10 || { echo "        the stream did not begin"; kill "$reader"; return 1; }
    dc run --rm --no-deps cli drain "$worker" > "$work/drain.out" 2>&1 || { tail -5 "$work/drain.out"; return 1; }
    wait "$reader" || { echo "        the stream broke off"; return 1; }
    text_of "$work/moved" > "$work/moved.text" || { tail -c 600 "$work/moved"; return 1; }
    cmp "$work/whole.text" "$work/moved.text" || return 1
    [ "$(worker_of_demo)" != "$worker" ] || { echo "        it still has a replica"; return 1; }
    quiet dc run --rm --no-deps cli drain --undo "$worker"
}
crash_of_the_stores() {
    local name before=()
    for name in store-1 store-2; do before+=("$(restarts "$name")"); kill_processes "$name"; done
    until_ok 60 restarted store-1 "${before[0]}" && until_ok 60 restarted store-2 "${before[1]}" \
        && until_ok 60 healthy store-1 store-2
}
peer_bytes() { # bytes that a store has taken from the other one
    dc exec -T "$1" python -Ic '
import urllib.request
text = urllib.request.urlopen("http://127.0.0.1:9100/metrics", timeout=4).read().decode()
lines = [line for line in text.splitlines() if line.startswith("hearth_store_import_bytes_total{origin=\"peer\"}")]
print(int(sum(float(line.split()[1]) for line in lines)))'
}
store_verb() { quiet dc run --rm --no-deps cli store "$@"; }
shares_with_its_peer() { # both servers hold the demo model, and one of them has it from the other
    store_verb prefetch demo --server server-1 && store_verb prefetch demo --server server-2 || return 1
    [ $(($(peer_bytes store-1) + $(peer_bytes store-2))) -gt 10000000 ]
}
nothing_left() {
    [ -z "$(engine ps --all --quiet --filter "label=com.docker.compose.project=$PROJECT")" ] \
        && [ -z "$(engine volume ls --quiet --filter "label=com.docker.compose.project=$PROJECT")" ]
}
LONG=800   # tokens of the stream that survives a crash

finish() {
    if [ $failed -gt 0 ]; then
        dc ps --all
        dc logs --no-color --tail 40 scheduler gateway store-1 store-2 worker-1 worker-2 demo 2>&1 | cut -c 1-400
    fi
    if [ -z "${KEEP:-}" ]; then
        say "down -v"
        check "down -v leaves no container and no volume" eval 'quiet dc down --volumes && nothing_left'
    fi
    rm -rf "$work"
    echo "$passed passed, $failed failed"
    [ $failed = 0 ]
    exit
}

engine version > /dev/null 2>&1 || { echo "no engine answers \`${DOCKER:-docker} version\`" >&2; exit 2; }
dc down --volumes > /dev/null 2>&1

say "build"
check "the image builds" quiet dc build
engine images --format '        {{.Repository}}:{{.Tag}} {{.Size}}' "$HEARTH_IMAGE"
say "up"
check "up -d --wait: everything healthy, the demo model deployed" quiet dc up --detach --wait
[ $failed = 0 ] || finish

say "answers"
check "GET /v1/models lists demo" lists_demo
check "two servers, two workers" until_ok 10 cluster_is 2 2
check "a cold start streams text and [DONE]" answers
check "a warm one as well" answers
check "without streaming" answers_json
check "an unknown model is 404" refuses_unknown
check "the worker reads the store's pool, read-only" maps_pool "$(worker_of_demo)"
check "the command line works (run --rm cli ps)" quiet dc run --rm --no-deps cli ps

say "kill -9 of the worker while it streams"
check "the stream goes on and is the same as an undisturbed one" crash_of_the_worker
check "the worker comes back" until_ok 60 healthy worker-1 worker-2
check "it answers again" answers

say "stop of the worker while it streams"
check "the stream is finished, the worker ends with 0" stop_of_the_worker
check "the worker comes back" until_ok 60 healthy worker-1 worker-2

say "hearth drain of the worker while it streams"
check "the stream moves away, the worker is empty" drain_of_the_worker
check "drain --undo: it takes work again" until_ok 10 cluster_is 2 2

say "the stores"
check "hearth store ls" store_verb ls
check "a store takes chunks from its peer" shares_with_its_peer
check "hearth store verify" store_verb verify demo --server server-2

say "kill -9 of both stores"
check "they come back" crash_of_the_stores
check "it answers again" until_ok 60 answers

say "restart of NATS and Redis under the running services"
for name in nats redis; do
    check "restart $name" quiet dc restart "$name"
    check "it answers again" until_ok 30 answers
    check "every server and worker is back in the registry" until_ok 30 cluster_is 2 2
done

say "down, and up without deploying"
check "down" quiet dc down
check "up" quiet dc up --detach --wait "${SERVICES[@]}"
check "the deployment is still there" until_ok 20 lists_demo
check "it answers" answers
finish
