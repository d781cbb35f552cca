//! Stock Linux kernels with a busybox initramfs on the software engine: `VIREO_TEST_KERNELS` names the kernels.

mod support;

use std::path::Path;

use support::{boot_linux, busybox, initramfs, linux_kernels};
use vireo_machine::Outcome;

/// Says how many processors there are, and ends by `how`.
fn script(how: &str) -> String {
    format!(
        "/bin/busybox mount -t proc proc /proc
         echo \"init reached with $(/bin/busybox grep -c ^processor /proc/cpuinfo) processors\"
         /bin/busybox {how}
        "
    )
}

fn boot(kernel: &Path, busybox: &[u8], vcpus: u32, how: &str, outcome: &Outcome) {
    let (report, text) = boot_linux(kernel, &initramfs(busybox, &script(how), &[]), vcpus, "");
    assert_eq!(report.outcome, *outcome, "{}: {text}", kernel.display());
    assert!(text.contains(&format!("init reached with {vcpus} processors")), "{}: {text}", kernel.display());
    assert!(report.first_user.is_some() && report.first_user > report.kernel_entry);
}

#[test]
fn stock_kernels_reach_init_and_end_as_they_are_told() {
    let test = "stock_kernels_reach_init_and_end_as_they_are_told";
    let Some(busybox) = busybox() else {
        println!("SKIPPED: {test}: no busybox (package busybox-static)");
        return;
    };
    let kernels = linux_kernels();
    if kernels.is_empty() {
        println!("SKIPPED: {test}: VIREO_TEST_KERNELS names no kernel");
    }
    for kernel in kernels {
        for vcpus in [1, 2, 4] {
            boot(&kernel, &busybox, vcpus, "poweroff -f", &Outcome::PowerOff);
        }
        boot(&kernel, &busybox, 2, "reboot -f", &Outcome::Reset);
    }
}
