//! The cache, the lazily switched state and hostile images. What the instructions themselves do is held against
//! the host in `tests/host_cpu`.

use std::{hint::black_box, time::Instant};

use iced_x86::{Code, CpuidFeature, Decoder, DecoderOptions, Instruction};
use proptest::prelude::*;

use super::*;
use crate::regs::{Regs, pack, unpack};

fn decode(bytes: &[u8]) -> Instruction {
    Decoder::new(64, bytes, DecoderOptions::NONE).decode()
}

fn cache() -> StubCache {
    StubCache::new(FeatureSet::host()).expect("executable memory")
}

fn stub(cache: &mut StubCache, bytes: &[u8]) -> Stub {
    match cache.get(&decode(bytes)).expect("a stub") {
        Native::Stub(stub) => stub,
        Native::Special(special) => panic!("{special:?} is no stub"),
    }
}

/// Runs an instruction without a memory operand, or with one at `memory`.
fn run(cache: &mut StubCache, fpu: &mut Fpu, regs: &mut Regs, bytes: &[u8], memory: &mut [u8; 64]) -> Result<(), Trap> {
    let stub = stub(cache, bytes);
    // SAFETY: the cache is not flushed in between; 64 bytes are enough for any operand.
    unsafe { fpu.call(&stub, regs, memory.as_mut_ptr()) }
}

const FLD1: &[u8] = &[0xd9, 0xe8];
const FLDZ: &[u8] = &[0xd9, 0xee];
const FDIVP: &[u8] = &[0xde, 0xf9];
const FNSTSW_AX: &[u8] = &[0xdf, 0xe0];
const FLDCW: &[u8] = &[0xd9, 0x2e];
const DIVSS_XMM0_XMM1: &[u8] = &[0xf3, 0x0f, 0x5e, 0xc1];
const ADDSD_XMM0_MEM: &[u8] = &[0xf2, 0x0f, 0x58, 0x07];

#[test]
fn instructions_that_differ_only_in_their_address_share_a_stub() {
    let mut cache = cache();
    let first = stub(&mut cache, &[0x48, 0x03, 0x07]); // add rax, [rdi]
    let second = stub(&mut cache, &[0x64, 0x4a, 0x03, 0x84, 0xb3, 1, 2, 3, 4]); // add rax, fs:[rbx + r14*4 + …]
    assert_eq!(first.entry as usize, second.entry as usize);
    assert_eq!(first.memory, MemoryOperand { access: Access::Read, bytes: 8, alignment: 1, bit_offset: None });
    assert_ne!(first.entry as usize, stub(&mut cache, &[0x48, 0x03, 0x0f]).entry as usize);
}

#[test]
fn a_full_cache_says_so_and_works_again_after_a_flush() {
    let mut cache = cache();
    let mut add = [0x48, 0x05, 0, 0, 0, 0];
    let mut full = None;
    for immediate in 0..1_000_000u32 {
        add[2..].copy_from_slice(&immediate.to_le_bytes());
        if let Err(error) = cache.get(&decode(&add)) {
            full = Some(error);
            break;
        }
    }
    assert_eq!(full, Some(Unsupported::Full));
    let generation = cache.generation();
    cache.flush();
    assert_ne!(cache.generation(), generation);
    let mut regs = Regs::default();
    regs.gpr[0] = 1;
    run(&mut cache, &mut Fpu::default(), &mut regs, &[0x48, 0x83, 0xc0, 0x02], &mut [0; 64]).unwrap();
    assert_eq!(regs.gpr[0], 3);
}

#[test]
fn what_cpuid_does_not_name_is_refused_or_is_what_it_was_before() {
    let mut features = FeatureSet::host();
    features.remove(CpuidFeature::AVX2);
    features.remove(CpuidFeature::BMI1);
    let mut cache = StubCache::new(features).unwrap();
    let vpaddd = [0xc5, 0xfd, 0xfe, 0xc1];
    assert_eq!(cache.get(&decode(&vpaddd)).unwrap_err(), Unsupported::NotAdvertised);
    // TZCNT of zero is 64; the BSF that it used to be leaves the register alone and sets ZF.
    let mut regs = Regs::default();
    regs.gpr[0] = 77;
    run(&mut cache, &mut Fpu::default(), &mut regs, &[0xf3, 0x48, 0x0f, 0xbc, 0xc1], &mut [0; 64]).unwrap();
    assert_eq!((regs.gpr[0], unpack(regs.flags) & 0x40), (77, 0x40));
    // ENDBR64 without CET, and UD2, SYSCALL and RDMSR, which are not for the host.
    assert!(matches!(cache.get(&decode(&[0xf3, 0x0f, 0x1e, 0xfa])), Ok(Native::Stub(_))));
    for bytes in [&[0x0f, 0x0b][..], &[0x0f, 0x05], &[0x0f, 0x32], &[0x0f, 0xa2], &[0xcc], &[0xf4], &[0x0f, 0x00, 0xc0]]
    {
        assert!(cache.get(&decode(bytes)).is_err(), "{bytes:x?}");
    }
    assert!(cache.get(&Instruction::default()).is_err());
}

#[test]
fn every_code_is_refused_or_made_into_something_that_stays_inside_its_operand() {
    let mut cache = cache();
    for code in Code::values() {
        let mut insn = Instruction::default();
        insn.set_code(code);
        // No operand is set: whatever comes back must not be a panic.
        let _ = cache.get(&insn);
    }
}

#[test]
fn flags_pass_through() {
    let mut cache = cache();
    let mut regs = Regs::default();
    for rflags in (0..0x1000u64).filter(|f| f & !0x8d5 == 0) {
        regs.flags = pack(rflags);
        run(&mut cache, &mut Fpu::default(), &mut regs, &[0xf5], &mut [0; 64]).unwrap(); // cmc
        assert_eq!(unpack(regs.flags), rflags ^ 1);
    }
}

#[test]
fn x87_state_survives_parking_between_instructions() {
    let mut cache = cache();
    let (mut fpu, mut regs, mut memory) = (Fpu::default(), Regs::default(), [0; 64]);
    run(&mut cache, &mut fpu, &mut regs, FLD1, &mut memory).unwrap();
    fpu.park(&mut regs);
    // The ABI wants the registers empty here; a formatted float is a use of them on some hosts.
    assert_eq!(format!("{:.1}", black_box(0.5f64)), "0.5");
    run(&mut cache, &mut fpu, &mut regs, FLD1, &mut memory).unwrap();
    run(&mut cache, &mut fpu, &mut regs, &[0xde, 0xc1], &mut memory).unwrap(); // faddp
    run(&mut cache, &mut fpu, &mut regs, &[0xdd, 0x1e], &mut memory).unwrap(); // fstp qword [rsi]
    fpu.park(&mut regs);
    assert_eq!(f64::from_le_bytes(memory[..8].try_into().unwrap()), 2.0);
}

#[test]
fn an_unmasked_x87_exception_waits_for_the_next_waiting_instruction() {
    let mut cache = cache();
    let (mut fpu, mut regs, mut memory) = (Fpu::default(), Regs::default(), [0; 64]);
    memory[..2].copy_from_slice(&0x037bu16.to_le_bytes());
    for bytes in [FLD1, FLDCW, FLDZ, FDIVP] {
        run(&mut cache, &mut fpu, &mut regs, bytes, &mut memory).unwrap();
    }
    assert!(fpu.pending_x87_exception());
    assert_eq!(run(&mut cache, &mut fpu, &mut regs, FLD1, &mut memory), Err(Trap::MathFault));
    // FNSTSW does not wait, and sees ES, B and ZE.
    run(&mut cache, &mut fpu, &mut regs, FNSTSW_AX, &mut memory).unwrap();
    assert_eq!(regs.gpr[0] & 0x8084, 0x8084);
    run(&mut cache, &mut fpu, &mut regs, &[0xdb, 0xe2], &mut memory).unwrap(); // fnclex
    assert!(!fpu.pending_x87_exception());
    run(&mut cache, &mut fpu, &mut regs, FLD1, &mut memory).unwrap();
}

#[test]
fn an_unmasked_simd_exception_changes_nothing_but_mxcsr() {
    let mut cache = cache();
    let (mut fpu, mut regs, mut memory) = (Fpu::default(), Regs::default(), [0; 64]);
    regs.ymm[0][0] = u64::from(1.0f32.to_bits());
    let before = regs.ymm;
    regs.mxcsr = 0x1f80 & !(1 << 9);
    let host = Fpu::default().mxcsr(&mut Regs::default());
    assert_eq!(run(&mut cache, &mut fpu, &mut regs, DIVSS_XMM0_XMM1, &mut memory), Err(Trap::SimdException));
    assert_eq!((regs.ymm, regs.mxcsr), (before, 0x1f80 & !(1 << 9) | 4));
    // Masked it divides, and MXCSR is the guest's until it is parked.
    regs.mxcsr = 0x1f80;
    run(&mut cache, &mut fpu, &mut regs, DIVSS_XMM0_XMM1, &mut memory).unwrap();
    fpu.park(&mut regs);
    assert_eq!((regs.ymm[0][0], regs.mxcsr), (u64::from(f32::INFINITY.to_bits()), 0x1f84));
    assert_eq!(Fpu::default().mxcsr(&mut Regs::default()), host);
}

#[test]
fn a_fault_inside_a_stub_is_the_guests() {
    let mut cache = cache();
    let (mut fpu, mut regs) = (Fpu::default(), Regs::default());
    // CMPXCHG16B keeps RBX on the stack; MOVAPS has nothing there. Both fault on a misaligned address.
    for bytes in [&[0x48, 0x0f, 0xc7, 0x0e][..], &[0x0f, 0x28, 0x06], &[0x0f, 0x29, 0x06]] {
        let stub = stub(&mut cache, bytes);
        assert_eq!(stub.memory.alignment, 16);
        let mut memory = [0x11u8; 64];
        let odd = memory.as_ptr().align_offset(16) + 1;
        let before = regs.clone();
        // SAFETY: the operand lies inside `memory`; that it is misaligned is the point.
        let result = unsafe { fpu.call(&stub, &mut regs, memory.as_mut_ptr().add(odd)) };
        assert_eq!(result, Err(Trap::GeneralProtection));
        assert_eq!((regs.gpr, regs.ymm, memory), (before.gpr, before.ymm, [0x11; 64]));
    }
}

#[test]
fn division_by_zero_and_overflow_are_refused() {
    assert_eq!(divide(false, 64, 1, 0, 2), Some((1 << 63, 0)));
    assert_eq!(divide(false, 64, 2, 0, 2), None);
    assert_eq!(divide(false, 32, 0, 7, 0), None);
    assert_eq!(divide(true, 64, u64::MAX, i64::MIN as u64, u64::MAX), None);
    assert_eq!(divide(true, 64, 1 << 63, 0, u64::MAX), None);
    assert_eq!(divide(true, 8, 0xff, 0xf9, 2), Some((0xfd, 0xff)));
}

/// Guest memory that is one buffer at address 0.
struct Flat(Vec<u8>);

impl GuestAccess for Flat {
    type Fault = ();

    fn read(&mut self, address: u64, data: &mut [u8]) -> Result<(), ()> {
        let at = usize::try_from(address).map_err(drop)?;
        data.copy_from_slice(self.0.get(at..at.checked_add(data.len()).ok_or(())?).ok_or(())?);
        Ok(())
    }

    fn write(&mut self, address: u64, data: &[u8]) -> Result<(), ()> {
        let at = usize::try_from(address).map_err(drop)?;
        self.0.get_mut(at..at.checked_add(data.len()).ok_or(())?).ok_or(())?.copy_from_slice(data);
        Ok(())
    }

    fn check_write(&mut self, address: u64, bytes: usize) -> Result<(), ()> {
        if address.checked_add(bytes as u64).is_some_and(|end| end <= self.0.len() as u64) { Ok(()) } else { Err(()) }
    }
}

proptest! {
    #[test]
    fn any_image_is_refused_or_loaded_and_x87_runs_on(bytes in proptest::collection::vec(any::<u8>(), 0..900)) {
        let mut cache = cache();
        let (mut fpu, mut regs, mut memory) = (Fpu::default(), Regs::default(), [0; 64]);
        let loaded = fpu.load_image(&mut regs, &bytes).is_ok();
        let mut full = bytes.clone();
        full.resize(XSAVE_BYTES, 0);
        full[26..28].fill(0);
        full[513..528].fill(0);
        prop_assert!(fpu.load_image(&mut regs, &full).is_ok());
        let once = fpu.save_image(&mut regs);
        prop_assert!(fpu.load_image(&mut regs, &once).is_ok());
        prop_assert_eq!(&once, &fpu.save_image(&mut regs));
        prop_assert!(!loaded || bytes.len() >= 576);
        let pending = fpu.pending_x87_exception();
        prop_assert_eq!(run(&mut cache, &mut fpu, &mut regs, FLD1, &mut memory).is_err(), pending);
        fpu.park(&mut regs);
    }

    #[test]
    fn loading_special_instructions_take_any_memory(
        bytes in proptest::collection::vec(any::<u8>(), 832),
        size in 0usize..832,
        mask in 0u64..16,
        which in 0usize..7,
        long_mode: bool,
        real_mode: bool,
    ) {
        let special = [
            Special::Fxrstor { wide: long_mode },
            Special::Xrstor { wide: false },
            Special::LoadEnvironment { wide: true },
            Special::LoadEnvironment { wide: false },
            Special::RestoreX87 { wide: true },
            Special::RestoreX87 { wide: false },
            Special::Ldmxcsr { vex: false },
        ][which];
        let (mut fpu, mut regs) = (Fpu::default(), Regs::default());
        regs.gpr[0] = mask;
        let mut memory = Flat(bytes);
        memory.0.truncate(size);
        let context = Context { xcr0: 7, long_mode, real_mode };
        let _ = special.execute(&mut fpu, &mut regs, &context, &mut memory, 0);
        prop_assert_eq!(regs.mxcsr & !MXCSR_MASK, 0);
        let saved = fpu.save_image(&mut regs);
        prop_assert!(fpu.load_image(&mut regs, &saved).is_ok());
    }
}

/// `cargo test -p vireo-engine --release -- --ignored --nocapture nanoseconds`
#[test]
#[ignore = "a measurement"]
fn nanoseconds_per_call() {
    const CALLS: u32 = 5_000_000;
    let instructions: &[(&str, &[u8])] = &[
        ("paddd xmm0, xmm1", &[0x66, 0x0f, 0xfe, 0xc1]),
        ("paddd xmm0, [mem]", &[0x66, 0x0f, 0xfe, 0x07]),
        ("addsd xmm0, [mem]", ADDSD_XMM0_MEM),
        ("popcnt rax, rcx", &[0xf3, 0x48, 0x0f, 0xb8, 0xc1]),
        ("bswap rax", &[0x48, 0x0f, 0xc8]),
        ("adc rax, [mem]", &[0x48, 0x13, 0x07]),
        ("lock xadd [mem], rbx", &[0xf0, 0x48, 0x0f, 0xc1, 0x1f]),
        ("cmpxchg16b [mem]", &[0x48, 0x0f, 0xc7, 0x0f]),
        ("vfmadd231pd ymm0, ymm1, ymm2", &[0xc4, 0xe2, 0xf5, 0xb8, 0xc2]),
        ("vpaddd xmm0, xmm1, xmm2", &[0xc5, 0xf1, 0xfe, 0xc2]),
        ("aesenc xmm0, xmm1", &[0x66, 0x0f, 0x38, 0xdc, 0xc1]),
        ("fadd st0, st1", &[0xd8, 0xc1]),
        ("fldcw [mem]", FLDCW),
        ("fnstcw [mem]", &[0xd9, 0x3e]),
    ];
    let mut cache = cache();
    let mut memory = Scratch([0; 64]);
    let mut measure = |name: &str, bytes: &[u8], fpu: &mut Fpu, mxcsr: u32| {
        let mut regs = Regs { mxcsr, ..Regs::default() };
        let stub = stub(&mut cache, bytes);
        memory.0[..8].copy_from_slice(&0x037fu64.to_le_bytes());
        let start = Instant::now();
        for _ in 0..CALLS {
            // SAFETY: as in `run`; the memory is aligned.
            let _ = black_box(unsafe { fpu.call(black_box(&stub), &mut regs, memory.0.as_mut_ptr()) });
        }
        let elapsed = start.elapsed();
        fpu.park(&mut regs);
        println!("{name:<32} {:6.2} ns", elapsed.as_secs_f64() * 1e9 / f64::from(CALLS));
    };
    let empty = Fpu::default();
    for (name, bytes) in instructions {
        measure(name, bytes, &mut empty.clone(), 0x1f80);
    }
    measure("addsd, one exception unmasked", ADDSD_XMM0_MEM, &mut empty.clone(), 0x1d80);
    let mut strict = Fpu::default();
    let mut image = strict.save_image(&mut Regs::default());
    image[0] = 0x7b;
    strict.load_image(&mut Regs::default(), &image).unwrap();
    measure("fadd, one exception unmasked", &[0xd8, 0xc1], &mut strict, 0x1f80);
    let start = Instant::now();
    let (mut cache, mut fresh) = (self::cache(), 0);
    for immediate in 0..20_000u32 {
        let bytes = [&[0x48, 0x69, 0xc1][..], &immediate.to_le_bytes()].concat();
        fresh += u32::from(cache.get(&decode(&bytes)).is_ok());
    }
    println!(
        "a new stub {:.0} ns, {} bytes",
        start.elapsed().as_nanos() as f64 / f64::from(fresh),
        cache.size().1 / 20_000
    );
}

#[repr(align(64))]
struct Scratch([u8; 64]);
