//! Whether the guest's network is up.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

/// Waits until there is a default route and a name server, or `limit` is over.
pub fn wait(limit: Duration) {
    let deadline = Instant::now() + limit;
    while !is_up() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(20));
    }
}

fn is_up() -> bool {
    let routes = fs::read_to_string("/proc/net/route").unwrap_or_default();
    let resolver = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    has_default_route(&routes) && resolver.lines().any(|line| line.trim_start().starts_with("nameserver"))
}

/// A route to 0.0.0.0/0 that is up (proc(5), net/route: interface, destination, gateway, flags, …, mask).
fn has_default_route(table: &str) -> bool {
    table.lines().skip(1).any(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let up =
            fields.get(3).and_then(|flags| u32::from_str_radix(flags, 16).ok()).is_some_and(|flags| flags & 1 != 0);
        up && fields.get(1) == Some(&"00000000") && fields.get(7) == Some(&"00000000")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n";

    #[test]
    fn only_a_default_route_that_is_up_counts() {
        let line = |destination: &str, flags: &str, mask: &str| {
            format!("{HEADER}eth0\t{destination}\t0202000A\t{flags}\t0\t0\t1024\t{mask}\t0\t0\t0\n")
        };
        assert!(has_default_route(&line("00000000", "0003", "00000000")));
        assert!(!has_default_route(&line("00000000", "0002", "00000000")));
        assert!(!has_default_route(&line("0002000A", "0001", "00FFFFFF")));
        assert!(!has_default_route(HEADER));
    }
}
