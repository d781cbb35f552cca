//! From nothing to the first user process, and off again.

use std::{fs, path::Path};

use anyhow::{Context, Result};

use crate::{
    guest::{Guest, READY},
    report::{self, Figure, Unit},
    vmm::{Machine, Vmm},
};

pub fn measure(vmm: &Vmm, guest: &Guest, work: &Path, memory_mib: u64) -> Result<Vec<Figure>> {
    let ramdisk = work.join("boot.cpio");
    fs::write(&ramdisk, guest.bare_ramdisk())?;
    let machine = Machine::new(&guest.kernel, &ramdisk, memory_mib);
    let finished = vmm.run(&machine)?;
    let ready = finished.line(READY).context("init did not run")?;
    let seconds = |name: &str, value| Figure { name: name.into(), unit: Unit::Seconds, value, by_cpu: None };
    Ok(vec![
        seconds("boot to /init, CPU", ready.cpu.as_secs_f64()),
        seconds("boot to /init, wall", (ready.at - finished.started).as_secs_f64()),
        seconds("boot to /init and off, CPU", finished.cpu.as_secs_f64()),
        seconds("boot to /init and off, wall", finished.wall.as_secs_f64()),
        report::memory("boot", finished.outside_guest_bytes),
    ])
}
