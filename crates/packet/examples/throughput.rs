//! How fast the user-mode network moves bytes between a guest's stack and a socket of the host:
//! `cargo run --release -p vireo-packet --example throughput [MIB]`.
//!
//! The guest is a second TCP stack in the same process, so the figures are what both stacks do together on the
//! machine's cores: a floor for what a guest with a good stack of its own gets.

#[path = "../tests/guest/mod.rs"]
mod guest;

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener},
    thread,
    time::Instant,
};

use guest::{ALL_OFFLOADS, Guest, NO_OFFLOADS, Setup};
use vireo_packet::{Offloads, UserNet, UserNetConfig};

const BUFFER: usize = 1 << 20;

fn main() {
    let mib: usize = std::env::args().nth(1).and_then(|arg| arg.parse().ok()).unwrap_or(1024);
    let checksums = Offloads { segmentation_in: false, segmentation_out: false, ..ALL_OFFLOADS };
    for (name, offloads, mtu) in [
        ("MTU 65520, all offloads", ALL_OFFLOADS, 65520),
        ("MTU 1500, all offloads", ALL_OFFLOADS, 1500),
        ("MTU 1500, checksums only", checksums, 1500),
        ("MTU 1500, no offloads", NO_OFFLOADS, 1500),
    ] {
        let total = if mtu > 1500 { mib } else { mib / 4 } << 20;
        let out = measure(offloads, mtu, total, send);
        let back = measure(offloads, mtu, total, receive);
        println!("{name:26} guest to host {out}   host to guest {back}");
    }
}

fn measure(offloads: Offloads, mtu: usize, total: usize, run: fn(&mut Guest, TcpListener, usize)) -> String {
    let net = UserNet::new(UserNetConfig::default()).expect("a network without forwards");
    let mut guest = Guest::with(net.clone(), Setup { offloads, mtu, strict: false, ..Setup::default() });
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port on loopback");
    let (start, cpu) = (Instant::now(), cpu_of_network());
    run(&mut guest, listener, total);
    let (seconds, cpu) = (start.elapsed().as_secs_f64(), cpu_of_network() - cpu);
    let mb = total as f64 / 1e6;
    let lost = net.stats().frames_lost_to_guest + net.stats().frames_lost_from_guest;
    format!("{:6.0} MB/s ({:4.0} CPU ms/GB, {lost} lost)", mb / seconds, cpu * 1e6 / mb)
}

/// Seconds of CPU that the network's threads used; threads that ended do not count.
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

fn connect(guest: &mut Guest, listener: &TcpListener) -> smoltcp::iface::SocketHandle {
    let port = listener.local_addr().expect("it is bound").port();
    let handle = guest.add_tcp(BUFFER);
    guest.connect_with(handle, SocketAddr::new([10, 0, 2, 2].into(), port));
    guest.established(handle);
    handle
}

fn send(guest: &mut Guest, listener: TcpListener, total: usize) {
    let handle = connect(guest, &listener);
    let reader = thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("the guest connects");
        let (mut buffer, mut count) = (vec![0; BUFFER], 0);
        while count < total {
            count += stream.read(&mut buffer).expect("the guest sends");
        }
    });
    let mut left = total;
    while !reader.is_finished() {
        while left > 0 && guest.tcp(handle).can_send() {
            left -= guest.tcp(handle).send(|room| (room.len().min(left), room.len().min(left))).expect("it is open");
        }
        guest.poll();
        guest.wait(std::time::Duration::from_millis(1));
    }
}

fn receive(guest: &mut Guest, listener: TcpListener, total: usize) {
    let handle = connect(guest, &listener);
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("the guest connects");
        let buffer = vec![7; BUFFER];
        let mut left = total;
        while left > 0 {
            left -= stream.write(&buffer[..left.min(BUFFER)]).expect("the guest reads");
        }
    });
    let mut count = 0;
    while count < total {
        guest.poll();
        while guest.tcp(handle).can_recv() {
            count += guest.tcp(handle).recv(|data| (data.len(), data.len())).expect("it is open");
        }
        guest.poll();
        if !guest.tcp(handle).can_recv() {
            guest.wait(std::time::Duration::from_millis(1));
        }
    }
}
