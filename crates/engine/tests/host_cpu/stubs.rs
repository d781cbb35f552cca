//! The native stubs as an executor: what the interpreter core does around them, in the smallest form.

use iced_x86::{Decoder, DecoderOptions, Instruction, OpKind, Register};
use vireo_engine::{
    native::{Access, Context, FeatureSet, Fpu, GuestAccess, Native, StubCache, Trap, Unsupported},
    regs::{Regs, pack, unpack},
};

use super::case::{Case, Executor, Mode, Outcome, STATUS, State, Verdict, WINDOW, WINDOW_BYTES};
use super::generate::mask;

pub struct Stubs {
    cache: StubCache,
    memory: Box<Aligned>,
    step: u64,
}

#[repr(align(4096))]
struct Aligned([u8; WINDOW_BYTES]);

impl Stubs {
    pub fn new(features: FeatureSet) -> std::io::Result<Self> {
        Ok(Self { cache: StubCache::new(features)?, memory: Box::new(Aligned([0; WINDOW_BYTES])), step: 0 })
    }

    /// Stubs, and bytes of code.
    pub fn size(&self) -> (usize, usize) {
        self.cache.size()
    }

    /// Brings the state into the host's registers, as earlier instructions of the guest would have: FNOP and
    /// CVTDQ2PD XMM0, XMM0, which raises nothing.
    fn warm(&mut self, regs: &mut Regs, fpu: &mut Fpu) {
        let vectors = regs.ymm;
        for bytes in [&[0xd9, 0xd0][..], &[0xf3, 0x0f, 0xe6, 0xc0]] {
            let insn = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
            if let Ok(Native::Stub(stub)) = self.cache.get(&insn) {
                // SAFETY: no memory operand, and the stub is of this cache's present generation.
                let _ = unsafe { fpu.call(&stub, regs, std::ptr::null_mut()) };
            }
        }
        regs.ymm = vectors;
    }

    fn window(&mut self) -> &mut [u8] {
        &mut self.memory.0
    }
}

/// Accesses outside the window. The host's vector tells which kind of fault it is.
struct OutOfWindow;

struct Window<'a>(&'a mut [u8]);

impl Window<'_> {
    fn range(&mut self, address: u64, bytes: usize) -> Result<&mut [u8], OutOfWindow> {
        let at = usize::try_from(address.wrapping_sub(WINDOW)).map_err(|_| OutOfWindow)?;
        let end = at.checked_add(bytes).ok_or(OutOfWindow)?;
        self.0.get_mut(at..end).ok_or(OutOfWindow)
    }
}

impl GuestAccess for Window<'_> {
    type Fault = OutOfWindow;

    fn read(&mut self, address: u64, data: &mut [u8]) -> Result<(), OutOfWindow> {
        let source = self.range(address, data.len())?;
        data.copy_from_slice(source);
        Ok(())
    }

    fn write(&mut self, address: u64, data: &[u8]) -> Result<(), OutOfWindow> {
        self.range(address, data.len())?.copy_from_slice(data);
        Ok(())
    }

    fn check_write(&mut self, address: u64, bytes: usize) -> Result<(), OutOfWindow> {
        self.range(address, bytes).map(drop)
    }
}

/// Marks a memory fault, whichever it is: any of `#PF`, `#GP` and `#SS` will do.
pub const MEMORY_FAULT: u8 = 0xfe;

impl Executor for Stubs {
    fn features(&self) -> FeatureSet {
        *self.cache.features()
    }

    fn step(&mut self, case: &Case) -> Verdict {
        self.step += 1;
        let native = match self.cache.get(&case.instruction) {
            Ok(native) => native,
            Err(Unsupported::Full) => {
                self.cache.flush();
                return self.step(case);
            }
            Err(Unsupported::NotNative) => return Verdict::Skipped("left to the interpreter core"),
            Err(Unsupported::NotAdvertised) => return Verdict::Skipped("not advertised"),
        };
        self.window().copy_from_slice(&case.memory[..]);
        let mut regs = Regs::default();
        let mut fpu = Fpu::default();
        if load(&case.state, &mut regs, &mut fpu).is_err() {
            return Verdict::Skipped("state not loadable");
        }
        if self.step.is_multiple_of(3) {
            self.warm(&mut regs, &mut fpu);
        }
        let result = match native {
            Native::Stub(stub) => {
                let mut address = effective_address(&case.instruction, &regs);
                address = address.wrapping_add(stub.bit_displacement(&regs) as u64) & address_mask(&case.instruction);
                let bytes = usize::from(stub.memory.bytes);
                let bounce = self.step.is_multiple_of(2);
                let mut window = Window(&mut self.memory.0);
                let fits = window.range(address, bytes).map(|r| r.as_mut_ptr());
                if fpu.pending_x87_exception() && stub.waits {
                    Err(16)
                } else if stub.memory.access == Access::None {
                    // SAFETY: no memory operand, and the stub is of this cache's present generation.
                    unsafe { fpu.call(&stub, &mut regs, std::ptr::null_mut()) }.map_err(vector)
                } else if !address.is_multiple_of(u64::from(stub.memory.alignment)) {
                    Err(13)
                } else if let Ok(target) = fits {
                    let through = if bounce { regs.bounce.as_mut_ptr().cast::<u8>() } else { target };
                    // SAFETY: `target` has `bytes` bytes, at most 32, and `bounce` 64; both have the guest's
                    // alignment as far as the stub needs it.
                    unsafe {
                        if bounce {
                            std::ptr::copy_nonoverlapping(target, through, bytes);
                        }
                        let done = fpu.call(&stub, &mut regs, through).map_err(vector);
                        if bounce && done.is_ok() && stub.memory.access != Access::Read {
                            std::ptr::copy_nonoverlapping(through, target, bytes);
                        }
                        done
                    }
                } else {
                    Err(MEMORY_FAULT)
                }
            }
            Native::Special(special) => {
                let address = effective_address(&case.instruction, &regs);
                let context = Context { xcr0: 7, long_mode: case.mode == Mode::Bits64, real_mode: false };
                let mut window = Window(&mut self.memory.0);
                if fpu.pending_x87_exception() && special.waits() {
                    Err(16)
                } else if !address.is_multiple_of(u64::from(special.alignment())) {
                    Err(13)
                } else {
                    special.execute(&mut fpu, &mut regs, &context, &mut window, address).map_err(vector)
                }
            }
        };
        let mut state = case.state;
        if result.is_ok() {
            state.rip += case.instruction.len() as u64;
        }
        store(&mut state, &mut regs, &mut fpu);
        let memory = Box::new(std::array::from_fn(|i| self.memory.0[i]));
        Verdict::Ran(Box::new(Outcome { vector: result.err(), page_fault: None, state, memory }))
    }

    /// What the specials compute in Rust; nearly all else is the host's own doing.
    fn undefined_flags(&self, case: &Case) -> u64 {
        use iced_x86::Mnemonic as M;
        match case.instruction.mnemonic() {
            // Intel SDM vol. 2: DIV, IDIV "The CF, OF, SF, ZF, AF, and PF flags are undefined".
            M::Div | M::Idiv => STATUS,
            // AAA, AAS: "OF, SF, ZF, and PF flags are undefined".
            M::Aaa | M::Aas => 0x8c4,
            // DAA, DAS: "The OF flag is undefined".
            M::Daa | M::Das => 0x800,
            // RCL, RCR: "For multi-bit rotates, the OF flag is undefined", and it does differ from run to run.
            M::Rcl | M::Rcr => 0x800,
            // AAM, AAD: "OF, AF, and CF flags are undefined".
            M::Aam | M::Aad => 0x811,
            _ => 0,
        }
    }
}

fn vector<F>(trap: Trap<F>) -> u8 {
    match trap {
        Trap::Divide => 0,
        Trap::InvalidOpcode => 6,
        Trap::GeneralProtection => 13,
        Trap::MathFault => 16,
        Trap::SimdException => 19,
        Trap::Memory(_) => MEMORY_FAULT,
    }
}

fn register_value(register: Register, regs: &Regs) -> u64 {
    if register.is_segment_register() || register == Register::None {
        return 0;
    }
    regs.gpr[register.full_register().number() & 15] & mask(register)
}

fn address_mask(insn: &Instruction) -> u64 {
    let registers = [insn.memory_base(), insn.memory_index()].into_iter().filter(|r| r.is_gpr() && r.size() > 1);
    match registers.map(Register::size).next() {
        Some(4) => 0xffff_ffff,
        Some(2) => 0xffff,
        // Without registers the displacement tells: four bytes with an address-size prefix, eight without.
        None if insn.memory_displ_size() == 4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

/// The memory operand's effective address; for gathers without the index.
fn effective_address(insn: &Instruction, regs: &Regs) -> u64 {
    let memory = |k: OpKind| matches!(k, OpKind::Memory | OpKind::MemorySegRDI | OpKind::MemorySegEDI);
    let Some(at) = (0..insn.op_count()).find(|&i| memory(insn.op_kind(i))) else {
        return 0;
    };
    insn.virtual_address(at, 0, |r, _, _| Some(if r.is_vector_register() { 0 } else { register_value(r, regs) }))
        .unwrap_or(0)
}

/// The state as a vCPU's; also an exercise of the image functions.
fn load(state: &State, regs: &mut Regs, fpu: &mut Fpu) -> Result<(), vireo_engine::native::ImageError> {
    let mut image = vec![0; vireo_engine::native::XSAVE_BYTES];
    image[..512].copy_from_slice(&state.fx);
    image[512] = 7;
    for (i, upper) in state.upper.iter().enumerate() {
        image[576 + i * 16..][..8].copy_from_slice(&upper[0].to_le_bytes());
        image[584 + i * 16..][..8].copy_from_slice(&upper[1].to_le_bytes());
    }
    fpu.load_image(regs, &image)?;
    regs.gpr[..16].copy_from_slice(&state.gpr);
    regs.flags = pack(state.rflags);
    Ok(())
}

fn store(state: &mut State, regs: &mut Regs, fpu: &mut Fpu) {
    let image = fpu.save_image(regs);
    state.fx.copy_from_slice(&image[..512]);
    for (i, upper) in state.upper.iter_mut().enumerate() {
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|b| image[at + b]));
        *upper = [word(576 + i * 16), word(584 + i * 16)];
    }
    state.gpr.copy_from_slice(&regs.gpr[..16]);
    state.rflags = state.rflags & !STATUS | unpack(regs.flags);
}
