//! Stock Linux kernels with a busybox initramfs on the software engine: `VIREO_TEST_KERNELS` names the kernels.

mod support;

use std::path::Path;

use support::{Captured, busybox, initramfs, linux_kernels, write};
use vireo_api::ByteSize;
use vireo_machine::{
    Control, Outcome,
    config::{Accel, BootConfig, MachineConfig},
    run,
};

const SCRIPT: &str = "\
/bin/busybox mount -t proc proc /proc
echo \"init reached with $(/bin/busybox grep -c ^processor /proc/cpuinfo) processors\"
/bin/busybox poweroff -f
";

fn boot(kernel: &Path, busybox: &[u8], vcpus: u32) {
    let folder = tempfile::tempdir().unwrap();
    let initrd = Some(write(folder.path(), "initrd", &initramfs(busybox, SCRIPT)));
    let cmdline = "console=ttyS0 panic=-1".into();
    let boot = BootConfig { kernel: kernel.to_owned(), initrd, cmdline, decompressor: None };
    let serial = Captured::default();
    let config = MachineConfig {
        vcpus,
        accel: Accel::Soft,
        memory: ByteSize(256 << 20),
        serial: Some(serial.stream()),
        reboot: false,
        ..MachineConfig::new(boot)
    };
    let report = run(&config, &Control::default(), |_| {}).unwrap();
    let text = serial.text();
    assert_eq!(report.outcome, Outcome::PowerOff, "{}: {text}", kernel.display());
    assert!(text.contains(&format!("init reached with {vcpus} processors")), "{}: {text}", kernel.display());
}

#[test]
fn stock_kernels_reach_init_and_power_off() {
    let Some(busybox) = busybox() else {
        println!("SKIPPED: stock_kernels_reach_init_and_power_off: no busybox (package busybox-static)");
        return;
    };
    let kernels = linux_kernels();
    if kernels.is_empty() {
        println!("SKIPPED: stock_kernels_reach_init_and_power_off: VIREO_TEST_KERNELS names no kernel");
    }
    for kernel in kernels {
        for vcpus in [1, 2, 4] {
            boot(&kernel, &busybox, vcpus);
        }
    }
}
