//! A network that nobody uses costs nothing. Alone in its binary, so that its thread is the only one of its name.
#![allow(unsafe_code)]

mod guest;

use std::{fs, net::TcpListener, time::Duration};

use guest::Guest;
use vireo_packet::{UserNet, UserNetConfig};

/// How often the network's thread was woken.
fn wake_ups() -> u64 {
    let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
    let of_network =
        tasks.filter(|task| fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.trim() == "net-user"));
    let switches = of_network.map(|task| {
        let status = fs::read_to_string(task.path().join("status")).unwrap();
        let line = status.lines().find(|line| line.starts_with("voluntary_ctxt_switches")).unwrap().to_owned();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    });
    switches.sum()
}

#[test]
fn an_idle_network_sleeps_even_with_a_connection_open() {
    let forwards = vec!["tcp:0:80".parse().unwrap()];
    let net = UserNet::new(UserNetConfig { forwards, ..Default::default() }).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut guest = Guest::new(net.clone());
    let handle = guest.connect(format!("10.0.2.2:{}", listener.local_addr().unwrap().port()).parse().unwrap());
    guest.established(handle);
    guest.run_for(Duration::from_millis(200));
    let before = wake_ups();
    std::thread::sleep(Duration::from_secs(2));
    let woken = wake_ups() - before;
    assert!(woken <= 3, "woken {woken} times in two seconds");
}
