# Says what the guest's kernel complains about since this was called last, and fails if it does. What a kernel says at
# boot about clock sources that work is no complaint.
complaints='BUG|WARNING:|Oops|general protection|soft lockup|hard LOCKUP|rcu.*(stall|starved)|blocked for more than'
complaints="$complaints|clocksource:.*(unstable|skew|wd-)|Marking clocksource|unchecked MSR|unexpected trap|Call Trace"
dmesg --read-clear >>/root/kernel.log
if tail -n +"$(($(cat /root/kernel.log.read 2>/dev/null || echo 0) + 1))" /root/kernel.log | grep -E "$complaints" >&2; then
    found=1
fi
wc -l </root/kernel.log >/root/kernel.log.read
[ -z "${found:-}" ]
