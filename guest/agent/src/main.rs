//! The in-guest agent: runs commands for the host, over virtio-vsock. See `vireo-guest-protocol`.
//!
//! It is linked statically, so that it runs in any Linux guest, and needs nothing but the kernel's vsock
//! transport. Whoever can connect to its port from the host is the host: a guest's own programs cannot, as vsock
//! connections to the agent are accepted from [`HOST_CID`] only.

mod network;
mod pump;
mod session;
mod terminal;
mod user;
mod vsock;

use std::{process::ExitCode, thread, time::Duration};

use vireo_guest_protocol::{FromAgent, HOST_CID, READY_PORT, Ready, SESSION_PORT, VERSION};

/// Sessions at a time; more wait in the listening socket's queue.
const MAX_SESSIONS: usize = 256;

fn main() -> ExitCode {
    let listener = match vsock::Listener::bind(SESSION_PORT) {
        Ok(listener) => listener,
        Err(error) => {
            eprintln!("vireo-agent: cannot listen on vsock port {SESSION_PORT}: {error}");
            return ExitCode::FAILURE;
        }
    };
    thread::spawn(announce);
    let sessions = std::sync::Arc::new(());
    loop {
        match listener.accept() {
            Ok((stream, cid)) if cid == HOST_CID => {
                while std::sync::Arc::strong_count(&sessions) > MAX_SESSIONS {
                    thread::sleep(Duration::from_millis(10));
                }
                let held = sessions.clone();
                thread::spawn(move || {
                    session::serve(stream);
                    drop(held);
                });
            }
            Ok(_) => {}
            Err(error) => {
                eprintln!("vireo-agent: accepting a connection: {error}");
                thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

/// Tells the host that we are up. A host that is not interested refuses, which is no matter.
fn announce() {
    let Ok(mut stream) = vsock::connect(HOST_CID, READY_PORT) else { return };
    let uptime = std::fs::read_to_string("/proc/uptime").ok();
    let seconds = uptime.and_then(|text| text.split(' ').next()?.parse::<f64>().ok()).unwrap_or(0.0);
    let ready = Ready { version: VERSION, uptime_ms: (seconds * 1000.0) as u64 };
    let _ = FromAgent::Ready(ready).write(&mut stream);
}
