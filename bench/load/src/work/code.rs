//! Code that changes while it runs.

use std::{arch::asm, io, ptr};

use super::Run;

const PAGE: usize = 4096;

struct Code {
    start: *mut u8,
    bytes: usize,
}

impl Code {
    fn new(bytes: usize, access: libc::c_int) -> Self {
        // SAFETY: a new mapping wherever the kernel likes it.
        let start =
            unsafe { libc::mmap(ptr::null_mut(), bytes, access, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0) };
        assert!(start != libc::MAP_FAILED, "no memory for code: {}", io::Error::last_os_error());
        Self { start: start.cast(), bytes }
    }

    fn protect(&self, access: libc::c_int) {
        // SAFETY: it is this mapping.
        assert!(unsafe { libc::mprotect(self.start.cast(), self.bytes, access) } == 0);
    }

    fn write(&mut self, offset: usize, code: &[u8]) {
        assert!(offset + code.len() <= self.bytes);
        // SAFETY: within the mapping, which is writable whenever a test writes.
        unsafe { ptr::copy_nonoverlapping(code.as_ptr(), self.start.add(offset), code.len()) };
    }

    /// Calls the function at `offset`, which takes and leaves a number in RAX, and changes nothing else.
    fn call(&self, offset: usize, value: u64) -> u64 {
        let mut value = value;
        // SAFETY: tests call only what they wrote, and that keeps to what is said above.
        unsafe { asm!("call {}", in(reg) self.start.add(offset), inout("rax") value) };
        value
    }
}

impl Drop for Code {
    fn drop(&mut self) {
        // SAFETY: nobody else has the mapping.
        unsafe { libc::munmap(self.start.cast(), self.bytes) };
    }
}

const RWX: libc::c_int = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;

/// ADD RAX, imm32
fn add(number: u32) -> [u8; 6] {
    let [a, b, c, d] = number.to_le_bytes();
    [0x48, 0x05, a, b, c, d]
}
const RET: [u8; 1] = [0xc3];

/// One number in one instruction changes before each call.
pub fn self_modifying(run: &Run) -> u64 {
    let mut code = Code::new(PAGE, RWX);
    code.write(0, &add(0));
    code.write(6, &RET);
    let mut sum = 0;
    for turn in 0..run.rounds {
        code.write(2, &(turn as u32).to_le_bytes());
        sum = code.call(0, sum);
    }
    sum
}

/// Data beside code: the page is written all the time, the code in it never changes.
pub fn data_beside_code(run: &Run) -> u64 {
    let mut code = Code::new(PAGE, RWX);
    code.write(0, &add(3));
    code.write(6, &RET);
    let mut sum = 0u64;
    for turn in 0..run.rounds {
        code.write(2048 + (turn as usize & 0x7f) * 8, &sum.to_le_bytes());
        sum = code.call(0, sum);
    }
    sum
}

/// New functions, a page full each time, each called a few times.
fn generate(run: &Run, before: impl Fn(&Code), after: impl Fn(&Code)) -> u64 {
    let mut code = Code::new(16 * PAGE, RWX);
    let mut sum = 1u64;
    for turn in 0..run.rounds {
        let page = (turn as usize % 16) * PAGE;
        let mut body: Vec<u8> = (0..600).flat_map(|i| add(i ^ turn as u32)).collect();
        body.extend(RET);
        before(&code);
        code.write(page, &body);
        after(&code);
        for _ in 0..8 {
            sum = code.call(page, sum);
        }
    }
    sum
}

pub fn just_in_time(run: &Run) -> u64 {
    generate(run, |_| (), |_| ())
}

/// As runtimes do it that never have a page writable and executable at once.
pub fn just_in_time_protected(run: &Run) -> u64 {
    let (write, execute) = (libc::PROT_READ | libc::PROT_WRITE, libc::PROT_READ | libc::PROT_EXEC);
    generate(run, |code| code.protect(write), |code| code.protect(execute))
}
