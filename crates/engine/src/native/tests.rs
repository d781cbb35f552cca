//! Unit tests; instruction semantics are held against the host in `tests/host_cpu`.
