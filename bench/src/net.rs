//! TCP between a guest in a user-mode network and a server on the host.

use std::{
    fs,
    io::{self, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    path::Path,
    thread,
};

use anyhow::{Result, ensure};

use crate::{
    disk::moved,
    guest::Guest,
    report::{self, Figure},
    vmm::{Machine, Vmm},
};

const CHUNK: usize = 256 << 10;
/// Bytes that a test moves.
const TOTAL: u64 = 512 << 20;

/// Both networks have the host at 10.0.2.2, and a guest at 10.0.2.15 (QEMU's documentation of `-netdev user`).
/// Busybox has no script for its DHCP client here, so addresses are set by hand.
fn script(port: u16, scale: f64) -> String {
    let total = (TOTAL as f64 * scale) as u64;
    format!(
        "ip link set eth0 up\nip addr add 10.0.2.15/24 dev eth0\n\
         load tcp warm-up 10.0.2.2:{port} down 65536\n\
         load tcp 'TCP to the guest' 10.0.2.2:{port} down {total}\n\
         load tcp 'TCP from the guest' 10.0.2.2:{port} up {total}\n"
    )
}

pub fn measure(vmm: &Vmm, guest: &Guest, work: &Path, memory_mib: u64, scale: f64) -> Result<Vec<Figure>> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    // It ends with this process.
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || serve(stream));
        }
    });
    let ramdisk = work.join("net.cpio");
    fs::write(&ramdisk, guest.ramdisk(&script(port, scale)))?;
    let machine = Machine { user_network: true, ..Machine::new(&guest.kernel, &ramdisk, memory_mib) };
    let finished = vmm.run(&machine)?;
    let moved = moved(&finished.lines)?;
    ensure!(moved.len() == 3, "the guest ran {} tests of 3", moved.len());
    // The first one was the warm-up.
    let mut figures: Vec<_> = moved.into_iter().skip(1).collect();
    figures.push(report::memory("network", finished.outside_guest_bytes));
    Ok(figures)
}

/// The other end of the load program's `tcp`.
fn serve(mut stream: TcpStream) -> io::Result<()> {
    let (mut up, mut total) = ([0; 8], [0; 8]);
    stream.read_exact(&mut up)?;
    stream.read_exact(&mut total)?;
    let total = u64::from_le_bytes(total);
    let mut chunk = vec![0x5a; CHUNK];
    if u64::from_le_bytes(up) == 0 {
        let mut left = total;
        while left > 0 {
            let piece = left.min(CHUNK as u64) as usize;
            stream.write_all(&chunk[..piece])?;
            left -= piece as u64;
        }
        return stream.shutdown(Shutdown::Write);
    }
    let mut count = 0u64;
    loop {
        match stream.read(&mut chunk)? {
            0 => break,
            read => count += read as u64,
        }
    }
    stream.write_all(&count.to_le_bytes())
}
