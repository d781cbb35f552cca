# What runtimes with a JIT compute must not depend on how they run it: interpreted, by each of their compilers, with each
# garbage collector.
set -eu
javac -d . Work.java
failed=
same() {
    expected=$1
    shift
    begin=$(date +%s)
    if ! "$@" >out 2>err </dev/null; then
        failed=yes
        echo "$* failed:" >&2
        tail -n 20 err >&2
    elif ! [ -e "$expected" ]; then
        cat out
        mv out "$expected"
    elif ! cmp -s out "$expected"; then
        failed=yes
        echo "$*: computed something else:" >&2
        diff "$expected" out | head -n 20 >&2
    fi
    echo "$*: $(($(date +%s) - begin)) s" >&2
}
for mode in -Xint -XX:TieredStopAtLevel=1 -XX:-TieredCompilation -XX:+UseZGC -XX:+UseParallelGC -XX:+UseSerialGC \
    -XX:+UseShenandoahGC -XX:+UseG1GC; do
    same java.expected java -Xmx400m "$mode" Work
done
for mode in --jitless --no-opt --max-lazy --interrupt-budget=1000 --stack-size=900; do
    same node.expected node "$mode" work.js
done
same lua.expected luajit -joff work.lua
same lua.expected luajit work.lua
[ -z "$failed" ]
