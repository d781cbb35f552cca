# In the guest: all stressors of some classes of stress-ng, each on its own on all vCPUs for SECONDS_EACH, so that a
# failure has a name. Those that can check their results do. A complaint of the kernel is a failure, too.
set -eu
here=$PWD
classes=${CLASSES:-cpu memory vm os}
seconds=${SECONDS_EACH:-3}
left_out='
cpu-online      takes processors away from all that runs beside it
memhotplug      there is no memory to take out
numa            there is one node
reboot          ends the machine where it works
smi             asks a chipset for system management interrupts, and there is none
swap            there is no swap space, and making some tests the disk
watchdog        there is none; where there is one it resets the machine
'
stressors=${STRESSORS:-$(for class in $classes; do stress-ng --class "$class?" | sed 's/.*: //'; done | tr ' ' '\n' | sort -u)}
mkdir -m 1777 /tmp/stress && cd /tmp/stress
try() {
    count=$1
    shift
    "$@" timeout --kill-after=10 900 stress-ng --verify --timeout "$seconds" "--$stressor" "$count" \
        >log 2>&1 </dev/null || status=$?
}
# What this kernel or this CPU does not have is not a failure: stress-ng's exit codes 3 and 4, or words.
cannot() { [ $status = 3 ] || [ $status = 4 ] || { [ $status != 2 ] && grep -qE 'No stress workers invoked|skipp(ed|ing)' log; }; }
ran=0 skipped='' failed=''
for stressor in $stressors; do
    if echo "$left_out" | grep -q "^$stressor "; then
        skipped="$skipped $stressor"
        continue
    fi
    begin=$(date +%s) status=0 verdict=ok
    # Signals that many processes queue for each other need no more than one of them.
    count=$(nproc)
    [ "$stressor" != sigrt ] || count=1
    try "$count"
    # A few refuse to run as root.
    if cannot; then
        status=0
        try "$count" setpriv --reuid=nobody --regid=nogroup --clear-groups
    fi
    if cannot; then
        skipped="$skipped $stressor" verdict=skipped
        sed -n 's/^stress-ng: [a-z]*: *\[[0-9]*\] *\(.*\(skip\|disabled\|must not\|cannot\|not \).*\)/  \1/p' log | head -n 1 >&2
    elif [ $status != 0 ]; then
        failed="$failed $stressor" verdict="FAILED with status $status"
        tail -n 30 log >&2
    fi
    if ! sh "$here/kernel-log.sh"; then
        failed="$failed $stressor(kernel)" verdict="$verdict, but the KERNEL COMPLAINS"
    fi
    [ "$verdict" = skipped ] || ran=$((ran + 1))
    echo "$stressor: $verdict, $(($(date +%s) - begin)) s" >&2
done
echo "$ran stressors ran"
echo "left out or skipped:$skipped"
echo "failed:${failed:- none}"
[ -z "$failed" ]
