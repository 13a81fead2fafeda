#!/usr/bin/env bash
# Set shares, go back to the baseline, say how things are. Run it as who may write the directory and reload nginx.
#   rollout.sh shadow PERCENT   of the baseline's requests: the candidate gets copies
#   rollout.sh canary PERCENT   of the clients: the candidate answers
#   rollout.sh back             remove the file `go`: from the next request on all to the baseline, and no copies
#   rollout.sh forward          put it back: the shares hold again
#   rollout.sh status
# From the environment: W4A8_ROLLOUT (the directory, /etc/nginx/w4a8), NGINX_COMMAND (nginx). sudo passes on what is named
# after it: sudo W4A8_ROLLOUT=DIRECTORY rollout.sh back
set -euo pipefail
directory=${W4A8_ROLLOUT:-/etc/nginx/w4a8}
shares=$directory/shares.conf
flag=$directory/go
read -ra nginx <<<"${NGINX_COMMAND:-nginx}"

die() {
    echo "rollout.sh: $*" >&2
    exit 1
}

# percent_of WORD: what shares.conf says of it; nothing is 0.
percent_of() {
    local found
    found=$(sed -nE "s/^ *([0-9.]+)% $1;\$/\1/p" "$shares")
    echo "${found:-0}"
}

# line PERCENT WORD: of a share; nginx takes none of 0 %.
line() {
    [[ $1 =~ ^0*(\.0*)?$ ]] || printf '\n    %s%% %s;' "$1" "$2"
}

write() {
    cat <<END
# Written by rollout.sh. Clients that are in a share stay in it when it grows.

# Of the clients: whose requests the candidate answers.
split_clients "\$w4a8_key" \$w4a8_canary {$(line "$1" candidate)
    * baseline;
}

# Of the requests that the baseline answers: those that the candidate gets a copy of.
split_clients "\$request_id" \$w4a8_sample {$(line "$2" 1)
    * 0;
}
END
}

set_shares() {
    cp "$shares" "$shares.before"
    write "$1" "$2" >"$shares.new"
    mv "$shares.new" "$shares"
    if ! "${nginx[@]}" -t -q || ! "${nginx[@]}" -s reload; then
        mv "$shares.before" "$shares"
        die "nginx does not take it; the shares are as they were"
    fi
    rm "$shares.before"
}

share() {
    [[ ${1:-} =~ ^(100|[0-9]{1,2}(\.[0-9]{1,2})?)$ ]] || die "a share is a percentage from 0 to 100, such as 5 or 0.5"
}

# Whatever else is missing. But a directory that is not there is not the one that nginx looks at.
back() {
    [[ -d $directory ]] || die "there is no $directory, so NOTHING WENT BACK; say W4A8_ROLLOUT=DIRECTORY, after sudo"
    rm -f "$flag"
    [[ -f $shares ]] || { echo "ROLLED BACK: the baseline answers everything. There is no $shares" && exit; }
}

if [[ ${1:-} == back ]]; then back; fi
[[ -f $shares ]] || die "there is no $shares; copy the directory nginx/ of this guide to /etc/nginx"
case ${1:-} in
    shadow) share "${2:-}" && set_shares "$(percent_of candidate)" "$2" ;;
    canary) share "${2:-}" && set_shares "$2" "$(percent_of 1)" ;;
    back | status) ;;
    forward) echo 'While this file is here, the shares of shares.conf hold.' >"$flag" ;;
    *) die "say shadow PERCENT, canary PERCENT, back, forward or status" ;;
esac
printf 'canary %s %%, shadow %s %%' "$(percent_of candidate)" "$(percent_of 1)"
if [[ -e $flag ]]; then echo; else echo ', but ROLLED BACK: the baseline answers everything'; fi
