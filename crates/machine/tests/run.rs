//! Whole machines with guests of a few instructions, on every engine that the host has.

mod support;

use std::{
    path::Path,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

use support::{Captured, crash, elf_kernel, engines, halt, power_off, print, report_panic, reset, write};
use vireo_api::ByteSize;
use vireo_machine::{
    Control, Outcome, Report,
    config::{Accel, BootConfig, MachineConfig},
    run,
};

fn config(folder: &Path, code: &[Vec<u8>], accel: Accel) -> (MachineConfig, Captured) {
    let kernel = write(folder, "kernel", &elf_kernel(&code.concat()));
    let boot = BootConfig { kernel, initrd: None, cmdline: String::new(), decompressor: None };
    let serial = Captured::default();
    let config = MachineConfig {
        accel,
        memory: ByteSize(16 << 20),
        serial: Some(serial.stream()),
        metrics: true,
        ..MachineConfig::new(boot)
    };
    (config, serial)
}

fn run_code(code: &[Vec<u8>], accel: Accel, change: impl FnOnce(&mut MachineConfig)) -> (Report, String) {
    let folder = tempfile::tempdir().unwrap();
    let (mut config, serial) = config(folder.path(), code, accel);
    change(&mut config);
    let report = run(&config, &Control::default(), |_| {}).unwrap();
    (report, serial.text())
}

#[test]
fn a_guest_prints_and_powers_off() {
    for accel in engines("a_guest_prints_and_powers_off") {
        let (report, text) = run_code(&[print("hello\n"), power_off(), halt()], accel, |_| {});
        assert_eq!((report.outcome, text.as_str()), (Outcome::PowerOff, "hello\n"), "{accel:?}");
        assert_eq!(report.boots, 1);
        assert!(report.memory.unwrap().guest > 0);
        assert!(report.kernel.contains("ELF"), "{}", report.kernel);
    }
}

#[test]
fn several_vcpus_wait_while_the_first_powers_off() {
    for accel in engines("several_vcpus_wait_while_the_first_powers_off") {
        let (report, text) = run_code(&[print("4"), power_off(), halt()], accel, |c| c.vcpus = 4);
        assert_eq!((report.outcome, text.as_str()), (Outcome::PowerOff, "4"), "{accel:?}");
    }
}

#[test]
fn a_reset_is_an_end_only_where_it_shall_be() {
    for accel in engines("a_reset_is_an_end_only_where_it_shall_be") {
        let (report, text) = run_code(&[print("r"), reset(), halt()], accel, |c| c.reboot = false);
        assert_eq!((report.outcome, text.as_str()), (Outcome::Reset, "r"), "{accel:?}");

        let folder = tempfile::tempdir().unwrap();
        let (config, serial) = config(folder.path(), &[print("r"), reset(), halt()], accel);
        let (control, builds) = (Control::default(), AtomicU32::new(0));
        let report = run(&config, &control, |_| {
            if builds.fetch_add(1, Ordering::SeqCst) == 2 {
                control.stop();
            }
        });
        let report = report.unwrap();
        assert_eq!((report.outcome, report.boots), (Outcome::Stopped, 3), "{accel:?}");
        assert!(serial.text().starts_with("rr"), "{}", serial.text());
    }
}

/// Address space of this process in bytes.
fn address_space() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let size = status.lines().find_map(|line| line.strip_prefix("VmSize:")).unwrap();
    size.trim().strip_suffix("kB").unwrap().trim().parse::<u64>().unwrap() << 10
}

#[test]
fn a_reboot_gives_the_old_memory_back() {
    const BOOTS: u32 = 40;
    for accel in engines("a_reboot_gives_the_old_memory_back") {
        let folder = tempfile::tempdir().unwrap();
        let (config, _) = config(folder.path(), &[reset(), halt()], accel);
        let config = MachineConfig { memory: ByteSize(1 << 30), metrics: false, ..config };
        let (control, builds, before) = (Control::default(), AtomicU32::new(0), address_space());
        let stop_at_last = |_: &vireo_machine::Machine| {
            if builds.fetch_add(1, Ordering::SeqCst) + 1 == BOOTS {
                control.stop();
            }
        };
        assert_eq!(run(&config, &control, stop_at_last).unwrap().boots, BOOTS);
        let grown = address_space().saturating_sub(before);
        assert!(grown < u64::from(BOOTS) / 2 * config.memory.0, "{accel:?}: {grown} bytes more");
    }
}

#[test]
fn a_triple_fault_says_where() {
    for accel in engines("a_triple_fault_says_where") {
        let (report, _) = run_code(&[print("x"), crash()], accel, |_| {});
        let Outcome::Crash(info) = report.outcome else { panic!("{accel:?}: {:?}", report.outcome) };
        assert!(info.reason.contains("triple fault"), "{info:?}");
        // KVM on AMD processors has reset the vCPU by then.
        if !info.reason.contains("does not tell where") {
            assert_eq!(info.rip, 0x10_0000 + 7, "{info:x?}");
        }
    }
}

#[test]
fn a_panic_report_ends_the_run_unless_the_guest_restarts_by_itself() {
    for accel in engines("a_panic_report_ends_the_run") {
        let (report, text) = run_code(&[report_panic(), print("last words"), halt()], accel, |_| {});
        assert_eq!((report.outcome, text.as_str()), (Outcome::Panic, "last words"), "{accel:?}");
        let (report, _) = run_code(&[report_panic(), reset(), halt()], accel, |c| {
            c.boot.cmdline = "panic=1".into();
            c.reboot = false;
        });
        assert_eq!(report.outcome, Outcome::Panic, "{accel:?}");
    }
}

#[test]
fn a_halted_guest_can_be_stopped() {
    for accel in engines("a_halted_guest_can_be_stopped") {
        let folder = tempfile::tempdir().unwrap();
        let (config, _) = config(folder.path(), &[halt()], accel);
        let control = Control::default();
        let stopper = control.clone();
        let stop = thread::spawn(move || {
            thread::sleep(Duration::from_millis(50));
            stopper.stop();
        });
        assert_eq!(run(&config, &control, |_| {}).unwrap().outcome, Outcome::Stopped, "{accel:?}");
        stop.join().unwrap();
    }
}

#[test]
fn too_many_vcpus_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    for (accel, most) in [(Accel::Soft, 8), (Accel::Kvm, 64)] {
        let (mut config, _) = config(folder.path(), &[halt()], accel);
        config.vcpus = most + 1;
        let error = run(&config, &Control::default(), |_| {}).err().unwrap();
        assert_eq!(error.exit_code(), vireo_api::ExitCode::Usage);
        assert!(error.to_string().contains(&format!("--cpus {most}")), "{error}");
    }
}
