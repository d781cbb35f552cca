//! A real guest without a VM: the kernel's own network stack in a namespace of its own, behind a tap device that a
//! cable joins to the backend under test.

use std::{
    io::{IoSlice, IoSliceMut},
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use vireo_packet::{Backend, Offloads, Tap};

use super::{private, wait_readable};

/// Carries frames both ways until it is dropped.
pub struct Cable {
    unplugged: Arc<AtomicBool>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Cable {
    pub fn between(one: Arc<dyn Backend>, other: Arc<dyn Backend>) -> Self {
        let unplugged = Arc::new(AtomicBool::new(false));
        let carry = |from: Arc<dyn Backend>, to: Arc<dyn Backend>| {
            let unplugged = unplugged.clone();
            thread::spawn(move || {
                let mut buffer = vec![0; 70_000];
                while !unplugged.load(Ordering::Relaxed) {
                    match from.recv(&mut [IoSliceMut::new(&mut buffer)]).unwrap() {
                        Some(length) => to.send(&[IoSlice::new(&buffer[..length])]).unwrap(),
                        None => drop(wait_readable(&*from, Duration::from_millis(50))),
                    }
                }
            })
        };
        let threads = vec![carry(one.clone(), other.clone()), carry(other, one)];
        Self { unplugged, threads }
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        self.unplugged.store(true, Ordering::Relaxed);
        self.threads.drain(..).for_each(|thread| thread.join().unwrap());
    }
}

/// Runs `inside` on a machine of its own that is joined to `backend`.
pub fn run<T: Send>(backend: Arc<dyn Backend>, offloads: Offloads, mtu: u16, inside: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let machine = scope.spawn(move || {
            assert!(private::enter("the guest"));
            // No pauses before and after an address is made.
            for (name, value) in [("accept_dad", "0"), ("router_solicitation_delay", "0")] {
                std::fs::write(format!("/proc/sys/net/ipv6/conf/default/{name}"), value).unwrap();
            }
            let tap = Tap::open("eth0").unwrap();
            backend.set_offloads(offloads);
            tap.set_offloads(offloads);
            private::set_mtu("eth0", mtu.into());
            let _cable = Cable::between(tap, backend);
            private::add_v4("eth0", Ipv4Addr::new(10, 0, 2, 15), Ipv4Addr::new(255, 255, 255, 0));
            private::up("eth0");
            private::add_default_route(Ipv4Addr::new(10, 0, 2, 2));
            inside()
        });
        match machine.join() {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}
