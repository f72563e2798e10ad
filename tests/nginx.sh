#!/usr/bin/env bash
# tools/nginx.conf for real: nginx in front of two servers. Streams go through as they come, a client
# stays with its server, others go where fewer requests are, a server that is gone, draining or full is
# passed over, a client that goes away is gone for the server too.
#
#   nginx.sh NANOGPT SOURCE_DIR
#
# Only the loopback address is used. The last line is "N passed, N failed"; exit code 77 with the
# reason if nginx or curl is not installed.
set -euo pipefail

binary=$1 source=$2
PATH=$PATH:/usr/sbin
for program in nginx curl; do
    if ! command -v "$program" >/dev/null 2>&1; then
        echo "skipped: $program is not installed"
        exit 77
    fi
done

dir=$(mktemp -d)
declare -A pids=()
nginx_pid=
cleanup() {
    [ -z "$nginx_pid" ] || kill "$nginx_pid" 2>/dev/null || true  # its workers go with it
    for pid in "${pids[@]}"; do kill -9 "$pid" 2>/dev/null || true; done
    wait 2>/dev/null || true
    rm -rf "$dir"
}
trap cleanup EXIT
export CUDA_VISIBLE_DEVICES=-1

passed=0 failed=0
check() { # check <name> <command...>
    local name=$1
    shift
    if "$@"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED: $name"
    fi
}

# Three ports that nobody listens on, below those that the system gives to clients' ends.
ports=()
while [ ${#ports[@]} -lt 3 ]; do
    port=$((20000 + RANDOM % 12000))
    (: </dev/tcp/127.0.0.1/$port) 2>/dev/null || ports+=("$port")
done
front=${ports[0]} one=${ports[1]} two=${ports[2]}

start() { # start <port> [flags]: a server, ready when this returns; two share the machine
    local port=$1
    shift
    "$binary" serve --port "$port" --base-dir "$source/tools/sample" --trust-proxy \
        --threads 1 --drain-seconds 60 "$@" >"$dir/out.$port" 2>"$dir/log.$port" &
    pids[$port]=$!
    for _ in $(seq 600); do
        curl -sf -o /dev/null "http://127.0.0.1:$port/health" && return
        sleep 0.05
    done
    echo "FAILED: the server on its port does not become ready"
    cat "$dir/log.$port"
    exit 1
}
stop() { # stop <port> [signal]
    kill "-${2:-TERM}" "${pids[$1]}" 2>/dev/null || true
    wait "${pids[$1]}" 2>/dev/null || true
    unset "pids[$1]"
}
proxy() { # proxy [sed expressions]: nginx with the example configuration on these ports
    if [ -n "$nginx_pid" ]; then
        kill "$nginx_pid"
        wait "$nginx_pid" 2>/dev/null || true
    fi
    mkdir -p "$dir/nginx_temp"
    sed -e "s/127\.0\.0\.1:8080/127.0.0.1:$front/; s/127\.0\.0\.1:8001/127.0.0.1:$one/" \
        -e "s/127\.0\.0\.1:8002/127.0.0.1:$two/" \
        -e "1i daemon off; user $(id -un);" "$@" "$source/tools/nginx.conf" >"$dir/nginx.conf"
    nginx -p "$dir" -c "$dir/nginx.conf" 2>"$dir/nginx.err" &
    nginx_pid=$!
    for _ in $(seq 100); do
        curl -s -o /dev/null "http://127.0.0.1:$front/health" && return
        sleep 0.05
    done
    echo "FAILED: nginx does not answer"
    cat "$dir/nginx.err"
    exit 1
}

# With exec=exec a call in the background is curl itself, which can be ended; with seed=142 a chat's answer
# is as long as it may be.
ask() { # ask <path> <max_tokens> [curl options]: a POST through nginx
    local path=$1 tokens=$2
    shift 2
    ${exec:-} curl -sN --max-time 60 "http://127.0.0.1:$front$path" -H 'Content-Type: application/json' "$@" \
        -d "{\"messages\":[{\"role\":\"user\",\"content\":\"Tell me a story about a dog.\"}],\"prompt\":\"The\",\"temperature\":1,\"seed\":${seed:-3},\"max_tokens\":$tokens}"
}
hits() { grep -c " POST $2 $3" "$dir/log.$1" || true; } # hits <port> <path> <code>
active() { curl -s "http://127.0.0.1:$1/health" | sed 's/.*"active":\([0-9]*\).*/\1/'; }
soon() { # soon <command...>: whether it is true now or becomes so
    for _ in $(seq 500); do
        "$@" && return
        sleep 0.02
    done
    return 1
}
is_idle() { [ "$(active "$one") $(active "$two")" = "0 0" ]; }
are_three_each() { [ "$(active "$one") $(active "$two")" = "3 3" ]; }
is_full() { grep -q '"active":1,"queued":1,' <(curl -s "http://127.0.0.1:$1/health"); }
is_writing() { # an answer of which something is there
    grep -q '"generated":[1-9]' <(curl -s "http://127.0.0.1:$one/slots" "http://127.0.0.1:$two/slots")
}
leave() { # leave <pids...>: clients end, whatever they wait for
    kill "$@" 2>/dev/null || true
    wait "$@" 2>/dev/null || true
}

start "$one"
start "$two"
proxy
chat=/chat/completions openai=/v1/chat/completions completion=/v1/completions

# ---- what goes through -----------------------------------------------------------------------------
direct=$(curl -sN "http://127.0.0.1:$one$chat" -H 'Content-Type: application/json' \
    -d '{"messages":[{"role":"user","content":"Hello"}],"temperature":0,"seed":1}')
through=$(curl -sN "http://127.0.0.1:$front$chat" -H 'Content-Type: application/json' \
    -H "Origin: http://127.0.0.1:$front" -H 'Sec-Fetch-Site: same-origin' \
    -d '{"messages":[{"role":"user","content":"Hello"}],"temperature":0,"seed":1}')
tokens_of() { grep -o '"token": "[^"]*"' <<<"$1"; }
check "a stream is the same through nginx" [ "$(tokens_of "$direct")" = "$(tokens_of "$through")" ]
check "the page comes" grep -q '<html' <(curl -s "http://127.0.0.1:$front/")
check "the list comes" grep -q 'sft/d4/2600' <(curl -s "http://127.0.0.1:$front/v1/models")
check "errors come as they are" grep -q '"code":"invalid_json"' <(curl -s "http://127.0.0.1:$front$openai" \
    -H 'Content-Type: application/json' -d '{')
check "another site is refused" [ "$(curl -s -o /dev/null -w '%{http_code}' "http://127.0.0.1:$front$openai" \
    -H 'Content-Type: application/json' -H 'Origin: http://evil.example' -d '{}')" = 403 ]

# Unbuffered: the first token is here long before the last.
first=$(ask "$chat" 150 -o "$dir/stream" -w '%{time_starttransfer} %{time_total}')
check "tokens go on as they come ($first s)" awk '{ exit !($1 < 0.5 * $2) }' <<<"$first"

# ---- a client stays with its server ----------------------------------------------------------------
# A server logs an answer before it sends the end of it.
moved=0
of_one=() of_two=()
for client in tab-{1..12}; do
    before=$(hits "$one" "$chat" 200)
    for _ in 1 2 3; do ask "$chat" 1 -H "X-Client-Id: $client" >/dev/null; done
    case $(($(hits "$one" "$chat" 200) - before)) in
        0) of_two+=("$client") ;;
        3) of_one+=("$client") ;;
        *) moved=$((moved + 1)) ;;
    esac
done
clients=("${of_one[@]}" "${of_two[@]}")
check "no client moves" [ $moved -eq 0 ]
check "clients are spread (${#of_one[@]} of 12 at the first)" [ ${#of_one[@]} -ge 1 -a ${#of_one[@]} -le 11 ]
say='{"role":"user","content":"Tell me about the sea, the wind and the old harbour where the ships come in."}'
turn() { # turn <messages>: how much of it was kept
    curl -s "http://127.0.0.1:$front$openai" -H 'Content-Type: application/json' -H 'X-Client-Id: tab-1' \
        -d "{\"messages\":[$1],\"temperature\":0,\"max_tokens\":8}" | sed 's/.*"cached_tokens":\([0-9]*\).*/\1/'
}
turn "$say" >/dev/null
kept=$(turn "$say,{\"role\":\"assistant\",\"content\":\"It is\"},{\"role\":\"user\",\"content\":\"Go on.\"}")
check "the second turn finds what the first computed ($kept tokens)" [ "$kept" -ge 15 ]

# A walk's pictures lie in the server that made it, and a browser asks for them without the tab's id.
pictures=0 found=0
for client in tab-{1..4}; do
    curl -s "http://127.0.0.1:$front/api/v1/inference/walk" -H 'Content-Type: application/json' \
        -H "X-Client-Id: $client" -d '{"prompt":"Hello","layers":[0]}' >"$dir/walk"
    for picture in $(grep -o '/api/v1/inference/walk/[^"]*png' "$dir/walk" | head -3); do
        pictures=$((pictures + 1))
        [ "$(curl -s -o /dev/null -w '%{http_code}' "http://127.0.0.1:$front$picture")" = 200 ] && found=$((found + 1))
    done
done
if grep -q '"pictures":\[\]' "$dir/walk"; then
    echo "skipped: a walk's pictures; the program was built without stb"
else
    check "a walk's pictures are found ($found of $pictures)" [ "$pictures $found" = "12 12" ]
fi

# ---- others go where fewer requests are ------------------------------------------------------------
six=()
for _ in {1..6}; do
    exec=exec ask "$completion" 1000 -o /dev/null &
    six+=($!)
done
check "six at once are three and three" soon are_three_each
leave "${six[@]}"
check "none of them once their clients have left" soon is_idle

# ---- a client that goes away -----------------------------------------------------------------------
for path in "$chat" "$openai"; do  # as a stream, and whole
    exec=exec seed=142 ask "$path" 1000 -o /dev/null &
    client=$!
    check "an answer is being written" soon is_writing
    leave $client
    check "an answer ends with its client" soon is_idle
    seen=$(($(hits "$one" "$path" 499) + $(hits "$two" "$path" 499)))
    check "whose end the server has seen" [ $seen -eq 1 ]
done

# ---- a server that is gone, and comes back ---------------------------------------------------------
answered() { # answered <clients...>: whether their chats and as many completions are
    local good=0 client
    for client in "$@"; do
        ask "$chat" 1 -H "X-Client-Id: $client" | grep -q '"done": true' && good=$((good + 1))
        ask "$completion" 1 | grep -q text_completion && good=$((good + 1))
    done
    [ $good -eq $((2 * $#)) ]
}
stop "$one" KILL
check "one server killed: all is answered by the other" answered "${clients[@]}"
start "$one"
check "it is back: all is answered" answered "${clients[@]}"
check "also by it" [ "$(hits "$one" "$completion" 200)" -ge 1 ]
check "its clients have come back to it" [ "$(hits "$one" "$chat" 200)" -eq ${#of_one[@]} ]

# A server told to stop: its stream ends in peace, all others are answered elsewhere.
seed=142 ask "$chat" 1000 -H "X-Client-Id: ${of_one[0]:-}" >"$dir/last" &
last=$!
check "a stream runs" soon is_writing
kill -TERM "${pids[$one]}"
check "one server drains: all is answered by the other" answered "${clients[@]}"
wait $last || true
check "its stream came to its end" grep -q '"done": true' "$dir/last"
check "after it was told to stop" grep -q " POST $chat 200" <(sed '1,/^stopping/d' "$dir/log.$one")
status=0
wait "${pids[$one]}" || status=$?
unset "pids[$one]"
check "it ended with 0" [ $status -eq 0 ]

# A full queue is a reason to ask the other one.
while_full() { # while_full <command> <ports...>: whether it is true while these servers' queues are full
    local filling port full result
    for _ in {1..20}; do  # until the answers that fill them outlast the command
        filling=() full=1 result=1
        for port in "${@:2}"; do
            for _ in 1 2; do
                front=$port exec=exec ask "$completion" 1000 -o /dev/null &
                filling+=($!)
            done
            soon is_full "$port" || full=0
        done
        "$1" && result=0
        for port in "${@:2}"; do is_full "$port" || full=0; done
        leave "${filling[@]}"
        soon is_idle
        ((full)) && return $result
    done
    return 1
}
some_of_one=("${of_one[@]:0:2}")
some=("${some_of_one[@]}" "${of_two[@]:0:2}") # few: it has to be over before a queue moves
passes_on() {
    local before
    before=$(hits "$one" "$chat" 503)
    answered "${some[@]}" && [ $(($(hits "$one" "$chat" 503) - before)) -eq ${#some_of_one[@]} ]
}
start "$one" --slots 1 --queue 1
check "a full server passes on what it cannot take" while_full passes_on "$one"
# Where all are full, each says so, and only those who ask for an answer are told so.
code() { curl -s -o /dev/null -w '%{http_code}' "http://127.0.0.1:$front$1"; }
tells_each() {
    local client
    for client in "${some[@]}"; do
        ask "$openai" 1 -H "X-Client-Id: $client" -i >"$dir/full"
        grep -qi '^retry-after:' "$dir/full" && grep -q '"code":"queue_full"' "$dir/full" || return
        [ "$(code /) $(code /v1/models)" = "200 200" ] || return
    done
}
stop "$two"
start "$two" --slots 1 --queue 1
check "all are full: who asks is told so, and has the page and the list" while_full tells_each "$one" "$two"

# ---- what nginx itself says ------------------------------------------------------------------------
said() { # said <file> <status> <code>
    grep -q "^HTTP/1.1 $2 " "$1" && grep -qi '^content-type: application/json' "$1" &&
        grep -q '^{"error":{"message":"\([^"]*\)",.*,"code":"'"$3"'",.*"detail":"\1",' "$1"
}
head -c 1100000 /dev/zero | curl -s -i "http://127.0.0.1:$front$openai" -H 'Content-Type: application/json' \
    -H 'Expect:' --data-binary @- >"$dir/large"
check "a body that is too large" said "$dir/large" 413 body_too_large
stop "$one"
stop "$two"
ask "$openai" 1 -i >"$dir/nobody"
check "no server" said "$dir/nobody" 503 no_server
check "which may be tried again" grep -qi '^retry-after: 5' "$dir/nobody"
start "$two"

# ---- the other variant: least_conn for all ---------------------------------------------------------
start "$one"
proxy -e '/completions/s/nanogpt_stay;$/nanogpt_least;/'
six=()
for _ in {1..6}; do
    exec=exec seed=142 ask "$chat" 1000 -H 'X-Client-Id: one' -o /dev/null &
    six+=($!)
done
check "least_conn for all: six of one client are three and three" soon are_three_each
leave "${six[@]}"
check "both are idle" soon is_idle

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
