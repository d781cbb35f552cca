//! Debian's cloud kernel on one to eight vCPUs of the software engine: no complaint in its log, and a user program
//! that changes its own code from another thread and by other mappings.
//!
//! The kernel is what `VIREO_TEST_KERNEL` names, or the first of `VIREO_TEST_KERNELS`, or the one that this host's
//! package tool gets (kept in the target folder).
#![allow(unsafe_code)] // assembles the guest's program

mod support;

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use support::{boot_linux, busybox, initramfs, linux_kernels};
use vireo_machine::Outcome;

// The program: each step's number is its exit status if it goes wrong, 0 if none does. Linux system calls by number:
// 9 mmap, 11 munmap, 24 sched_yield, 56 clone, 60 exit, 77 ftruncate, 231 exit_group, 319 memfd_create.
std::arch::global_asm!(
    r#"
    .pushsection .rodata.vireo_smp_boot, "a"
    .macro MAP address, bytes, flags, fd, offset
        mov eax, 9
        mov rdi, \address
        mov esi, \bytes
        mov edx, 7
        mov r10d, \flags
        mov r8, \fd
        mov r9d, \offset
        syscall
    .endm
    .hidden vireo_smp_boot_start
    .global vireo_smp_boot_start
vireo_smp_boot_start:
    // 1: an immediate changes, with a counter beside it
    mov ebp, 1
    MAP 0, 4096, 0x22, -1, 0
    mov rbx, rax
    mov byte ptr [rbx], 0xb8 // MOV EAX, imm32; RET
    mov byte ptr [rbx + 5], 0xc3
    mov r12d, 20000
20: mov [rbx + 1], r12d
    call rbx
    cmp eax, r12d
    jne 90f
    lock inc dword ptr [rbx + 64]
    dec r12d
    jnz 20b
    cmp dword ptr [rbx + 64], 20000
    jne 90f
    // 2: the next instruction changes in a straight line, and by a string instruction
    mov ebp, 2
    mov r12d, 2000
21: mov byte ptr [rbx + 128], 0xc7 // MOV DWORD [RIP+0], imm32: over the next instruction
    mov byte ptr [rbx + 129], 0x05
    mov dword ptr [rbx + 130], 0
    mov dword ptr [rbx + 134], 0xc3c0ff90 // NOP; INC EAX; RET
    mov dword ptr [rbx + 138], 0x0b0f0b0f // UD2
    xor eax, eax
    lea rdx, [rbx + 128]
    call rdx
    cmp eax, 1
    jne 90f
    dec r12d
    jnz 21b
    // 3: another thread changes code that this one runs: it writes, then says so; this one serialises
    mov ebp, 3
    MAP 0, 65536, 0x22, -1, 0
    mov r13, rax
    mov eax, 56
    mov edi, 0x50f00 // VM, FS, FILES, SIGHAND, THREAD, SYSVSEM
    lea rsi, [r13 + 65536]
    xor edx, edx
    xor r10d, r10d
    xor r8d, r8d
    syscall
    test rax, rax
    js 90f
    jz 50f
    mov r12d, 1
30: cmp [rbx + 256], r12d
    je 31f
    mov eax, 24
    syscall
    jmp 30b
31: xor eax, eax
    push rbx
    cpuid
    pop rbx
    call rbx
    cmp eax, r12d
    jne 90f
    mov [rbx + 320], r12d
    inc r12d
    cmp r12d, 5000
    jbe 30b
    // 4: other pages at the same address
    mov ebp, 4
    mov eax, 319
    lea rdi, [rip + 80f]
    xor esi, esi
    syscall
    mov r14, rax
    mov eax, 77
    mov rdi, r14
    mov esi, 8192
    syscall
    MAP 0, 8192, 1, r14, 0
    mov r15, rax
    mov dword ptr [r15], 0x000001b8
    mov word ptr [r15 + 4], 0xc300
    mov dword ptr [r15 + 4096], 0x000002b8
    mov word ptr [r15 + 4100], 0xc300
    MAP 0, 4096, 1, r14, 0
    mov r13, rax
    mov r12d, 500
40: MAP r13, 4096, 0x11, r14, 0
    call r13
    cmp eax, 1
    jne 90f
    MAP r13, 4096, 0x11, r14, 4096
    call r13
    cmp eax, 2
    jne 90f
    // and new code through the other mapping
    mov [r15 + 4097], r12d
    call r13
    cmp eax, r12d
    jne 90f
    mov dword ptr [r15 + 4097], 2
    dec r12d
    jnz 40b
    xor ebp, ebp
90: mov edi, ebp
    mov eax, 231
    syscall
    // the other thread of step 3
50: mov r12d, 1
51: mov [rbx + 1], r12d
    mov [rbx + 256], r12d
52: cmp [rbx + 320], r12d
    je 53f
    mov eax, 24
    syscall
    jmp 52b
53: inc r12d
    cmp r12d, 5000
    jbe 51b
    mov eax, 60
    xor edi, edi
    syscall
80: .asciz "code"
    .hidden vireo_smp_boot_end
    .global vireo_smp_boot_end
vireo_smp_boot_end:
    .purgem MAP
    .popsection
    "#
);

unsafe extern "C" {
    static vireo_smp_boot_start: u8;
    static vireo_smp_boot_end: u8;
}

/// The program as a static ELF executable.
fn changes_code() -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    // SAFETY: both labels are in the same read-only section, the end behind the start.
    let code = unsafe {
        let (start, end) = (&raw const vireo_smp_boot_start, &raw const vireo_smp_boot_end);
        std::slice::from_raw_parts(start, end.offset_from(start) as usize)
    };
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend(2u16.to_le_bytes()); // executable
    file.extend(62u16.to_le_bytes()); // x86-64
    file.extend(1u32.to_le_bytes());
    for field in [BASE + HEADERS, 64, 0] {
        file.extend(u64::to_le_bytes(field)); // entry, program headers, no section headers
    }
    file.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    file.extend(1u32.to_le_bytes()); // load, read and execute
    file.extend(5u32.to_le_bytes());
    let bytes = HEADERS + code.len() as u64;
    for field in [0, BASE, BASE, bytes, bytes, 4096] {
        file.extend(u64::to_le_bytes(field));
    }
    file.extend_from_slice(code);
    file
}

/// The kernel to boot, or why there is none: found once for all tests.
fn kernel() -> Result<PathBuf, String> {
    static FOUND: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    FOUND.get_or_init(find_kernel).clone()
}

fn find_kernel() -> Result<PathBuf, String> {
    if let Some(named) = env::var_os("VIREO_TEST_KERNEL") {
        return Ok(named.into());
    }
    if let Some(first) = linux_kernels().into_iter().next() {
        return Ok(first);
    }
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join("linux-image-cloud-amd64");
    if let Some(there) = kernel_in(&kept) {
        return Ok(there);
    }
    let fresh = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).map_err(|e| e.to_string())?;
    let depends = output(Command::new("apt-cache").args(["depends", "linux-image-cloud-amd64"]))?;
    // Its own name comes first, then the kernel of the day.
    let package = depends
        .split_whitespace()
        .filter(|word| word.starts_with("linux-image-"))
        .nth(1)
        .ok_or("apt knows no linux-image-cloud-amd64")?;
    output(Command::new("apt-get").args(["download", package]).current_dir(fresh.path()))?;
    let file = std::fs::read_dir(fresh.path()).map_err(|e| e.to_string())?.flatten().next();
    let file = file.ok_or("apt-get download left no file")?.path();
    output(Command::new("dpkg-deb").arg("-x").arg(&file).arg(fresh.path()))?;
    std::fs::remove_file(&file).map_err(|e| e.to_string())?;
    std::fs::rename(fresh.keep(), &kept).map_err(|e| e.to_string())?;
    kernel_in(&kept).ok_or_else(|| format!("{package} has no /boot/vmlinuz"))
}

fn kernel_in(folder: &Path) -> Option<PathBuf> {
    let files = std::fs::read_dir(folder.join("boot")).ok()?.flatten();
    files
        .map(|file| file.path())
        .find(|path| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("vmlinuz-")))
}

fn output(command: &mut Command) -> Result<String, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|e| format!("{name}: {e}"))?;
    if !output.status.success() {
        return Err(format!("{name}: {}", String::from_utf8_lossy(&output.stderr).trim()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Boots with an `/init` of these commands for busybox's shell; `None` where this host cannot, said by name.
fn boot(test: &str, vcpus: u32, arguments: &str, script: &str) -> Option<(Outcome, String)> {
    let Some(busybox) = busybox() else {
        println!("SKIPPED: {test}: no busybox (package busybox-static)");
        return None;
    };
    let kernel = match kernel() {
        Ok(kernel) => kernel,
        Err(why) => {
            println!("SKIPPED: {test}: no kernel: {why}");
            return None;
        }
    };
    let initramfs = initramfs(&busybox, script, &[("changes-code", &changes_code())]);
    let (report, text) = boot_linux(&kernel, &initramfs, vcpus, arguments);
    Some((report.outcome, text))
}

const CALM: &str = "\
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
echo \"processors: $(/bin/busybox grep -c ^processor /proc/cpuinfo)\"
/bin/changes-code
echo \"changes-code: $?\"
before=$(/bin/busybox cut -d' ' -f1 /proc/uptime)
/bin/busybox sleep 1
echo \"slept from $before to $(/bin/busybox cut -d' ' -f1 /proc/uptime)\"
/bin/busybox grep -H . /sys/devices/system/cpu/vulnerabilities/*
echo \"clock: $(/bin/busybox cat /sys/devices/system/clocksource/clocksource0/current_clocksource)\"
/bin/busybox poweroff -f
";

/// What a kernel says when something is wrong with its processors, timers or interrupts.
const COMPLAINTS: &[&str] = &[
    "soft lockup",
    "hard LOCKUP",
    "rcu_sched",
    "rcu_preempt detected",
    "self-detected stall",
    "BUG:",
    "WARNING:",
    "Unhandled",
    "unchecked MSR",
    "Call Trace",
    "unstable",
    "spurious",
    "Firmware Bug",
    "not responding",
    "microcode",
    "blocked for more",
    "Vulnerable",
    "general protection",
    "invalid opcode",
    "TSC warp",
    "MTRR: ",
    "mtrr: ",
];

fn boots_calmly(vcpus: u32) {
    let test = format!("boots_calmly_with_{vcpus}");
    let Some((outcome, text)) = boot(&test, vcpus, "", CALM) else { return };
    assert_eq!(outcome, Outcome::PowerOff, "{text}");
    assert!(text.contains(&format!("processors: {vcpus}\r")), "{text}");
    assert!(text.contains("changes-code: 0\r"), "{text}");
    assert!(text.contains("clock: tsc\r") || text.contains("clock: kvm-clock\r"), "{text}");
    assert!(text.contains("vulnerabilities/spectre_v2:"), "{text}");
    for complaint in COMPLAINTS {
        let line = text.lines().find(|line| line.contains(complaint));
        assert_eq!(line, None, "{text}");
    }
    let slept = text.lines().find_map(|line| line.strip_prefix("slept from ")).unwrap();
    let (from, to) = slept.trim().split_once(" to ").unwrap();
    let seconds = to.parse::<f64>().unwrap() - from.parse::<f64>().unwrap();
    // Late it may be on a busy host, early never (the figures are cut to hundredths).
    assert!(seconds > 0.98, "sleep 1 took {seconds} s: {text}");
}

#[test]
fn boots_calmly_with_1() {
    boots_calmly(1);
}

#[test]
fn boots_calmly_with_2() {
    boots_calmly(2);
}

#[test]
fn boots_calmly_with_4() {
    boots_calmly(4);
}

#[test]
fn boots_calmly_with_8() {
    boots_calmly(8);
}

#[test]
fn restarts_and_panics_end_as_resets() {
    let test = "restarts_and_panics_end_as_resets";
    let crash = "/bin/busybox mount -t proc proc /proc\necho c >/proc/sysrq-trigger\n";
    for (arguments, script) in [("", "/bin/busybox reboot -f\n"), ("", crash)] {
        let Some((outcome, text)) = boot(test, 2, arguments, script) else { return };
        assert_eq!(outcome, Outcome::Reset, "{script}: {text}");
    }
}

#[test]
fn a_triple_fault_is_a_crash() {
    // reboot=t: by an empty interrupt table
    let Some((outcome, text)) = boot("a_triple_fault_is_a_crash", 2, "reboot=t", "/bin/busybox reboot -f\n") else {
        return;
    };
    assert!(
        matches!(&outcome, Outcome::Crash { .. } if format!("{outcome:?}").contains("triple fault")),
        "{outcome:?}: {text}"
    );
}
