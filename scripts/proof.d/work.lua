-- Prints what must not depend on how it is run; see runtimes.sh.
local sum = 0
for i = 1, 3e6 do sum = sum + i % 7 end
print(sum)
local t = {}
for i = 1, 1e5 do t[i] = math.sqrt(i) * (i * 7919 % 1009) end
table.sort(t)
local picked = 0
for i = 1, 1e5, 100 do picked = picked + t[i] end
print(string.format("%.6f", picked))
print((string.rep("x", 1e5):gsub("x", "yy")):len())
local words = {}
for i = 1, 1e5 do words["k" .. i % 997] = (words["k" .. i % 997] or 0) + i end
print(words.k0, words.k996)
