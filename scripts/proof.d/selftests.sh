# In the guest: the selftests/x86 of the kernel's own sources, each on its own, those for 32 bits, too.
set -eu
mkdir -p /root/selftests && cd /root/selftests
tar --extract --file=/usr/src/linux-source-6.1.tar.xz --strip-components=1 --wildcards \
    '*/tools/testing/selftests' '*/tools/include' '*/scripts' '*/arch/x86/include'
cd tools/testing/selftests/x86
make -k -j"$(nproc)" >make.log 2>&1 || { grep -iE 'error|\*\*\*' make.log >&2; exit 1; }
left_out='
amx_64  wants tiles, which no engine has, and fails instead of being skipped
'
ran=0 failed=''
for test in *_32 *_64; do
    [ -x "$test" ] || continue
    status=0
    timeout --kill-after=10 600 "./$test" >"$test.log" 2>&1 </dev/null || status=$?
    echo "$test: status $status" >&2
    if echo "$left_out" | grep -q "^$test "; then
        continue
    fi
    ran=$((ran + 1))
    [ $status = 0 ] || { failed="$failed $test"; tail -n 30 "$test.log" >&2; }
done
echo "$ran tests ran"
echo "left out:$(echo "$left_out" | sed 's/ .*//' | tr '\n' ' ')"
echo "failed:${failed:- none}"
[ -z "$failed" ]
