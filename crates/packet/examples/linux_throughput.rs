//! How fast the user-mode network is for a guest with Linux's TCP: the kernel's own stack in a network namespace, joined
//! to it by a tap device. Needs root: `cargo run --release -p vireo-packet --example linux_throughput [MIB]`.
//!

#[path = "../tests/guest/mod.rs"]
mod guest;

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use guest::{ALL_OFFLOADS, NO_OFFLOADS, linux, private};
use vireo_packet::{Offloads, UserNet, UserNetConfig};

fn main() {
    let mib: usize = std::env::args().nth(1).and_then(|arg| arg.parse().ok()).unwrap_or(2048);
    let checksums = Offloads { segmentation_in: false, segmentation_out: false, ..ALL_OFFLOADS };
    if !private::enter("the benchmark") {
        std::process::exit(1);
    }
    for (name, offloads, mtu) in [
        ("MTU 65520, all offloads", ALL_OFFLOADS, 65520),
        ("MTU 65520, no offloads", NO_OFFLOADS, 65520),
        ("MTU 1500, all offloads", ALL_OFFLOADS, 1500),
        ("MTU 1500, checksums only", checksums, 1500),
        ("MTU 1500, no offloads", NO_OFFLOADS, 1500),
    ] {
        let net = UserNet::new(UserNetConfig::default()).expect("a network without forwards");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port on loopback");
        let port = listener.local_addr().expect("it is bound").port();
        thread::spawn(move || serve(&listener, mib << 20));
        let (out, back) = linux::run(net.clone(), offloads, mtu, || (push(port, mib << 20), pull(port, mib << 20)));
        let lost = (net.stats().frames_lost_from_guest, net.stats().frames_lost_to_guest);
        println!("{name:26} guest to host {out}   host to guest {back}   lost {lost:?}");
    }
}

/// One connection that sends and one that wants to be sent to.
fn serve(listener: &TcpListener, total: usize) {
    let mut buffer = vec![7; 1 << 20];
    let (mut stream, _) = listener.accept().expect("the guest connects");
    while stream.read(&mut buffer).expect("the guest sends") > 0 {}
    drop(stream);
    let (mut stream, _) = listener.accept().expect("the guest connects");
    let mut left = total;
    while left > 0 {
        left -= stream.write(&buffer[..left.min(1 << 20)]).expect("the guest reads");
    }
}

fn timed(total: usize, run: impl FnOnce()) -> String {
    let (start, cpu) = (Instant::now(), cpu_of_network());
    run();
    let (seconds, cpu) = (start.elapsed().as_secs_f64(), cpu_of_network() - cpu);
    let mb = total as f64 / 1e6;
    format!("{:6.0} MB/s ({:4.0} CPU ms/GB)", mb / seconds, cpu * 1e6 / mb)
}

fn push(port: u16, total: usize) -> String {
    let mut stream = TcpStream::connect(("10.0.2.2", port)).expect("the server listens");
    let buffer = vec![7; 1 << 20];
    timed(total, || {
        (0..total >> 20).for_each(|_| stream.write_all(&buffer).expect("the server reads"));
        stream.shutdown(std::net::Shutdown::Write).expect("it is open");
        let _ = stream.read(&mut [0]);
    })
}

fn pull(port: u16, total: usize) -> String {
    thread::sleep(Duration::from_millis(50));
    let mut stream = TcpStream::connect(("10.0.2.2", port)).expect("the server listens");
    let mut buffer = vec![0; 1 << 20];
    timed(total, || while stream.read(&mut buffer).expect("the server sends") > 0 {})
}

/// Seconds of CPU that the network's thread used.
fn cpu_of_network() -> f64 {
    let tasks = std::fs::read_dir("/proc/self/task").expect("procfs").flatten();
    let of_network = tasks
        .filter_map(|task| std::fs::read_to_string(task.path().join("stat")).ok())
        .filter(|stat| stat.contains("(net-user)"));
    let ticks = of_network.filter_map(|stat| {
        let fields: Vec<i64> =
            stat.rsplit(')').next()?.split_whitespace().skip(1).filter_map(|field| field.parse().ok()).collect();
        Some(fields.get(10)? + fields.get(11)?)
    });
    ticks.sum::<i64>() as f64 / 100.0
}
