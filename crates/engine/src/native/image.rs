//! Register images in memory: FXSAVE areas, XSAVE areas and the x87 environment.
//!
//! Layouts: Intel SDM vol. 1, 10.5.1 (FXSAVE), 13.4 (XSAVE), 8.1.10 (environment).

use super::fpu::{Environment, Fpu, MXCSR_DEFAULT, MXCSR_MASK};
use crate::regs::Regs;

pub(super) const FX_BYTES: usize = 512;
/// Size of an XSAVE area with x87, SSE and AVX state, in either format.
pub const XSAVE_BYTES: usize = AVX_AT + 256;

/// State components (Intel SDM vol. 1, 13.1).
pub mod component {
    pub const X87: u64 = 1 << 0;
    pub const SSE: u64 = 1 << 1;
    pub const AVX: u64 = 1 << 2;
    pub const ALL: u64 = X87 | SSE | AVX;
}

pub(super) const FCW: usize = 0;
pub(super) const FSW: usize = 2;
const FTW: usize = 4;
const FOP: usize = 6;
const FIP: usize = 8;
const FDP: usize = 16;
const MXCSR: usize = 24;
const MXCSR_MASK_AT: usize = 28;
const ST: usize = 32;
const XMM: usize = 160;
pub(super) const HEADER: usize = 512;
const AVX_AT: usize = 576;

/// Says that the area is compacted.
const COMPACT: u64 = 1 << 63;

/// Why an image was refused; an instruction that loads it raises `#GP(0)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    #[error("the XSAVE image is {0} bytes, shorter than the state it says it holds")]
    Short(usize),
    #[error("MXCSR in the image has reserved bits: {0:#x}")]
    Mxcsr(u32),
    #[error("the XSAVE header is not valid for this processor: XSTATE_BV {0:#x}, XCOMP_BV {1:#x}")]
    Header(u64, u64),
}

/// What an instruction in 64-bit mode sees more of: XMM8 to XMM15, and with REX.W 64-bit FIP and FDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Form {
    pub(super) long_mode: bool,
    pub(super) wide_pointers: bool,
}

impl Form {
    pub(super) const FULL: Self = Self { long_mode: true, wide_pointers: true };

    pub(super) fn vectors(self) -> usize {
        if self.long_mode { 16 } else { 8 }
    }
}

pub(super) fn read16(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).map_or(0, |b| u16::from_le_bytes([b[0], b[1]]))
}

pub(super) fn read32(bytes: &[u8], at: usize) -> u32 {
    u32::from(read16(bytes, at)) | u32::from(read16(bytes, at + 2)) << 16
}

pub(super) fn read64(bytes: &[u8], at: usize) -> u64 {
    u64::from(read32(bytes, at)) | u64::from(read32(bytes, at + 4)) << 32
}

pub(super) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(target) = bytes.get_mut(at..at + value.len()) {
        target.copy_from_slice(value);
    }
}

pub(super) fn control_word(area: &[u8; FX_BYTES]) -> u16 {
    read16(area, FCW)
}

pub(super) fn set_mxcsr(area: &mut [u8; FX_BYTES], value: u32) {
    put(area, MXCSR, &value.to_le_bytes());
}

/// Whether a control word lets any of the six exceptions through.
pub(super) fn unmasks(fcw: u16) -> bool {
    fcw & 0x3f != 0x3f
}

/// The state after FNINIT, registers zeroed as INIT of the component does (Intel SDM vol. 1, 13.6).
pub(super) fn initialise(area: &mut [u8; FX_BYTES]) {
    area[..MXCSR].fill(0);
    area[ST..XMM].fill(0);
    put(area, FCW, &0x037fu16.to_le_bytes());
}

/// Sets ES and B as the flags and masks say; returns ES.
pub(super) fn settle(area: &mut [u8; FX_BYTES]) -> bool {
    let (fcw, fsw) = (read16(area, FCW), read16(area, FSW));
    let pending = fsw & !fcw & 0x3f != 0;
    let summary = if pending { 0x8080 } else { 0 };
    put(area, FSW, &((fsw & !0x8080) | summary).to_le_bytes());
    // The bit that reads as one and the reserved ones.
    put(area, FCW, &((fcw & 0x1f3f) | 0x40).to_le_bytes());
    pending
}

/// The 16-bit tag word, which FXSAVE has in abridged form only (Intel SDM vol. 1, table 10-3 there).
fn full_tags(area: &[u8; FX_BYTES]) -> u16 {
    let top = read16(area, FSW) >> 11 & 7;
    let present = area[FTW];
    (0..8u16).fold(0, |tags, physical| {
        let at = ST + usize::from(physical.wrapping_sub(top) & 7) * 16;
        let (mantissa, exponent) = (read64(area, at), read16(area, at + 8) & 0x7fff);
        let tag = match (exponent, mantissa) {
            _ if present >> physical & 1 == 0 => 3,
            (0, 0) => 1,
            (0 | 0x7fff, _) => 2,
            _ if mantissa >> 63 == 0 => 2,
            _ => 0,
        };
        tags | tag << (physical * 2)
    })
}

fn abridge(tags: u16) -> u8 {
    (0..8).fold(0, |present, i| present | u8::from(tags >> (i * 2) & 3 != 3) << i)
}

/// How FNSTENV, FLDENV, FNSAVE and FRSTOR lay out the environment (Intel SDM vol. 1, figures 8-9 to 8-12).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// 32-bit operand size: 28 bytes, else 14.
    pub(super) wide: bool,
    /// Real or virtual-8086 mode.
    pub(super) real: bool,
}

impl Layout {
    pub(super) fn bytes(self) -> usize {
        if self.wide { 28 } else { 14 }
    }
}

impl Fpu {
    /// FCW, FSW, tags and pointers. The x87 state must be parked.
    pub(super) fn store_environment(&self, layout: Layout, out: &mut [u8]) {
        let area = &self.area.0;
        let Environment { instruction, operand, code_selector, data_selector, opcode } = self.environment;
        let linear = |selector: u16, offset: u64| (u64::from(selector) << 4).wrapping_add(offset) as u32;
        let (ip, dp) = (linear(code_selector, instruction), linear(data_selector, operand));
        let opcode = opcode & 0x7ff;
        let words = [read16(area, FCW), read16(area, FSW), full_tags(area)];
        let pointers: [u32; 4] = match (layout.wide, layout.real) {
            (true, false) => [
                instruction as u32,
                u32::from(code_selector) | u32::from(opcode) << 16,
                operand as u32,
                u32::from(data_selector),
            ],
            (true, true) => [ip & 0xffff, (ip >> 16) << 12 | u32::from(opcode), dp & 0xffff, (dp >> 16) << 12],
            (false, false) => {
                [instruction as u32 & 0xffff, u32::from(code_selector), operand as u32 & 0xffff, data_selector.into()]
            }
            (false, true) => {
                [ip & 0xffff, (ip >> 16 & 0xf) << 12 | u32::from(opcode), dp & 0xffff, (dp >> 16 & 0xf) << 12]
            }
        };
        for (i, word) in words.into_iter().enumerate() {
            if layout.wide {
                // The upper halves are reserved; processors write ones.
                put(out, i * 4, &(0xffff_0000 | u32::from(word)).to_le_bytes());
            } else {
                put(out, i * 2, &word.to_le_bytes());
            }
        }
        for (i, pointer) in pointers.into_iter().enumerate() {
            if layout.wide {
                let reserved = if i == 3 && !layout.real { 0xffff_0000 } else { 0 };
                put(out, 12 + i * 4, &(pointer | reserved).to_le_bytes());
            } else {
                put(out, 6 + i * 2, &(pointer as u16).to_le_bytes());
            }
        }
    }

    pub(super) fn load_environment(&mut self, layout: Layout, bytes: &[u8]) {
        let step = if layout.wide { 4 } else { 2 };
        let status = read16(bytes, step);
        self.set_top((status >> 11 & 7) as u8);
        let area = &mut self.area.0;
        put(area, FCW, &read16(bytes, 0).to_le_bytes());
        put(area, FSW, &status.to_le_bytes());
        area[FTW] = abridge(read16(bytes, 2 * step));
        let word = |i: usize| match layout.wide {
            true => read32(bytes, 12 + i * 4),
            false => u32::from(read16(bytes, 6 + i * 2)),
        };
        self.environment = if layout.real {
            Environment {
                instruction: u64::from(word(0) & 0xffff | (word(1) >> 12) << 16),
                operand: u64::from(word(2) & 0xffff | (word(3) >> 12) << 16),
                opcode: word(1) as u16 & 0x7ff,
                ..Environment::default()
            }
        } else {
            Environment {
                instruction: word(0).into(),
                operand: word(2).into(),
                code_selector: word(1) as u16,
                data_selector: word(3) as u16,
                opcode: if layout.wide { (word(1) >> 16) as u16 & 0x7ff } else { 0 },
            }
        };
        self.settle();
    }

    /// ST0 to ST7, 10 bytes each, as FNSAVE has them after the environment.
    pub(super) fn store_stack(&self, out: &mut [u8]) {
        for i in 0..8 {
            let at = ST + i * 16;
            put(out, i * 10, &self.area.0[at..at + 10]);
        }
    }

    pub(super) fn load_stack(&mut self, bytes: &[u8]) {
        for i in 0..8 {
            let mut register = [0; 16];
            if let Some(value) = bytes.get(i * 10..i * 10 + 10) {
                register[..10].copy_from_slice(value);
            }
            put(&mut self.area.0, ST + i * 16, &register);
        }
    }

    /// FNINIT: the registers keep their contents.
    pub(super) fn reset_environment(&mut self) {
        self.set_top(0);
        self.area.0[..MXCSR].fill(0);
        put(&mut self.area.0, FCW, &0x037fu16.to_le_bytes());
        self.environment = Environment::default();
        self.settle();
    }

    /// FNSTENV masks all exceptions once it has stored.
    pub(super) fn mask_exceptions(&mut self) {
        let masked = read16(&self.area.0, FCW) | 0x3f;
        put(&mut self.area.0, FCW, &masked.to_le_bytes());
        self.settle();
    }

    /// The mantissa of the physical register that an MMX register is.
    pub(super) fn mmx(&self, register: u8) -> u64 {
        let top = self.area.0[FSW + 1] >> 3 & 7;
        read64(&self.area.0, ST + usize::from(register.wrapping_sub(top) & 7) * 16)
    }

    /// What every MMX instruction but EMMS does besides (Intel SDM vol. 1, 9.6.2): TOP := 0, all tags valid.
    pub(super) fn enter_mmx(&mut self) {
        self.set_top(0);
        self.area.0[FTW] = 0xff;
    }

    /// Changes TOP alone. The area has the registers in the order of the stack, so that they move.
    fn set_top(&mut self, top: u8) {
        let old = self.area.0[FSW + 1] >> 3 & 7;
        self.area.0[ST..XMM].rotate_left(usize::from(top.wrapping_sub(old) & 7) * 16);
        self.area.0[FSW + 1] = self.area.0[FSW + 1] & !0x38 | (top & 7) << 3;
    }

    /// The x87 part (bytes 0–23 and 32–159) of an area.
    fn store_x87(&self, form: Form, out: &mut [u8]) {
        let area = &self.area.0;
        let e = &self.environment;
        put(out, FCW, &area[FCW..FOP]);
        put(out, FOP, &(e.opcode & 0x7ff).to_le_bytes());
        if form.wide_pointers {
            put(out, FIP, &e.instruction.to_le_bytes());
            put(out, FDP, &e.operand.to_le_bytes());
        } else {
            let pair = |offset: u64, selector: u16| u64::from(offset as u32) | u64::from(selector) << 32;
            put(out, FIP, &pair(e.instruction, e.code_selector).to_le_bytes());
            put(out, FDP, &pair(e.operand, e.data_selector).to_le_bytes());
        }
        put(out, ST, &area[ST..XMM]);
    }

    fn load_x87(&mut self, form: Form, bytes: &[u8]) {
        let area = &mut self.area.0;
        // The byte behind the abridged tags is reserved.
        put(area, FCW, &bytes[FCW..FTW + 1]);
        for i in 0..8 {
            let at = ST + i * 16;
            put(area, at, &bytes[at..at + 10]);
        }
        let (ip, dp) = (read64(bytes, FIP), read64(bytes, FDP));
        self.environment = if form.wide_pointers {
            Environment { instruction: ip, operand: dp, ..Environment::default() }
        } else {
            Environment {
                instruction: ip as u32 as u64,
                operand: dp as u32 as u64,
                code_selector: (ip >> 32) as u16,
                data_selector: (dp >> 32) as u16,
                opcode: 0,
            }
        };
        self.environment.opcode = read16(bytes, FOP) & 0x7ff;
        self.settle();
    }

    fn initialise_x87(&mut self) {
        initialise(&mut self.area.0);
        self.environment = Environment::default();
        self.settle();
    }

    /// FXSAVE's 512 bytes, of which it writes the first 416 in 64-bit mode and 288 elsewhere.
    pub(super) fn fxsave(&mut self, regs: &mut Regs, form: Form, out: &mut [u8; FX_BYTES]) {
        self.park(regs);
        self.store_x87(form, out);
        store_mxcsr(regs, out);
        store_xmm(regs, form, out);
    }

    pub(super) fn fxrstor(&mut self, regs: &mut Regs, form: Form, bytes: &[u8; FX_BYTES]) -> Result<(), ImageError> {
        let mxcsr = checked_mxcsr(bytes)?;
        self.park(regs);
        self.load_x87(form, bytes);
        regs.mxcsr = mxcsr;
        load_xmm(regs, form, bytes);
        Ok(())
    }

    /// Components that are not in their initial state (XINUSE). A processor may say more (Intel SDM vol. 1, 13.6).
    pub(super) fn in_use(&self, regs: &Regs, form: Form) -> u64 {
        let mut initial = [0; FX_BYTES];
        initialise(&mut initial);
        let x87 = self.area.0[..FOP] != initial[..FOP]
            || self.area.0[ST..XMM] != initial[ST..XMM]
            || self.environment != Environment::default();
        let registers = &regs.ymm[..form.vectors()];
        let sse = registers.iter().any(|r| r[..2] != [0; 2]);
        let avx = registers.iter().any(|r| r[2..] != [0; 2]);
        u64::from(x87) | u64::from(sse) << 1 | u64::from(avx) << 2
    }

    /// Writes the named components into an XSAVE area, without its header. Both formats have them in the same
    /// places: AVX comes first in the extended region.
    pub(super) fn store_components(&mut self, regs: &mut Regs, form: Form, components: u64, out: &mut [u8]) {
        self.park(regs);
        if components & component::X87 != 0 {
            self.store_x87(form, out);
        }
        if components & component::SSE != 0 {
            store_xmm(regs, form, out);
        }
        if components & component::AVX != 0 {
            for (i, register) in regs.ymm[..form.vectors()].iter().enumerate() {
                put(out, AVX_AT + i * 16, &register[2].to_le_bytes());
                put(out, AVX_AT + i * 16 + 8, &register[3].to_le_bytes());
            }
        }
    }

    /// XRSTOR: loads those of `requested` that the header says are there and initialises the others
    /// (Intel SDM vol. 1, 13.8).
    pub(super) fn xrstor(
        &mut self,
        regs: &mut Regs,
        form: Form,
        requested: u64,
        xcr0: u64,
        bytes: &[u8; XSAVE_BYTES],
    ) -> Result<(), ImageError> {
        let (present, layout) = (read64(bytes, HEADER), read64(bytes, HEADER + 8));
        let refused = ImageError::Header(present, layout);
        let compact = layout & COMPACT != 0;
        let allowed = if compact { layout & !COMPACT } else { xcr0 };
        if allowed & !xcr0 != 0 || present & !allowed != 0 || (!compact && layout != 0) {
            return Err(refused);
        }
        let reserved_from = HEADER + 16;
        let reserved_to = if compact { HEADER + 64 } else { HEADER + 24 };
        if bytes[reserved_from..reserved_to].iter().any(|b| *b != 0) {
            return Err(refused);
        }
        let requested = requested & xcr0;
        let loads = |c: u64| requested & present & c != 0;
        let mxcsr = match compact {
            false if requested & (component::SSE | component::AVX) != 0 => Some(checked_mxcsr(bytes)?),
            true if loads(component::SSE) => Some(checked_mxcsr(bytes)?),
            true if requested & component::SSE != 0 => Some(MXCSR_DEFAULT),
            _ => None,
        };
        self.park(regs);
        if let Some(value) = mxcsr {
            regs.mxcsr = value;
        }
        if loads(component::X87) {
            self.load_x87(form, bytes);
        } else if requested & component::X87 != 0 {
            self.initialise_x87();
        }
        let registers = 0..form.vectors();
        if loads(component::SSE) {
            load_xmm(regs, form, bytes);
        } else if requested & component::SSE != 0 {
            registers.clone().for_each(|i| regs.ymm[i][..2].fill(0));
        }
        if requested & component::AVX != 0 {
            for i in registers {
                let at = AVX_AT + i * 16;
                let upper = [read64(bytes, at), read64(bytes, at + 8)];
                regs.ymm[i][2..].copy_from_slice(&if loads(component::AVX) { upper } else { [0; 2] });
            }
        }
        Ok(())
    }

    /// The whole state in the standard format, for `CpuState::xsave`.
    pub fn save_image(&mut self, regs: &mut Regs) -> Vec<u8> {
        let mut out = vec![0; XSAVE_BYTES];
        self.store_components(regs, Form::FULL, component::ALL, &mut out);
        store_mxcsr(regs, &mut out);
        put(&mut out, HEADER, &component::ALL.to_le_bytes());
        out
    }

    /// The reverse of [`Self::save_image`], for images of any processor: x87, SSE and AVX are taken, components that
    /// the header leaves out are initialised.
    pub fn load_image(&mut self, regs: &mut Regs, image: &[u8]) -> Result<(), ImageError> {
        let present = read64(image, HEADER);
        let needed = if present & component::AVX != 0 { XSAVE_BYTES } else { AVX_AT };
        if image.len() < needed {
            return Err(ImageError::Short(image.len()));
        }
        let mut bytes = [0; XSAVE_BYTES];
        let length = image.len().min(XSAVE_BYTES);
        bytes[..length].copy_from_slice(&image[..length]);
        put(&mut bytes, HEADER, &(present & component::ALL).to_le_bytes());
        bytes[HEADER + 8..AVX_AT].fill(0);
        self.xrstor(regs, Form::FULL, component::ALL, component::ALL, &bytes)
    }

    /// Guest MXCSR, wherever it is now.
    pub fn mxcsr(&mut self, regs: &mut Regs) -> u32 {
        self.park(regs);
        regs.mxcsr
    }

    /// LDMXCSR.
    pub fn set_mxcsr(&mut self, regs: &mut Regs, value: u32) -> Result<(), ImageError> {
        if value & !MXCSR_MASK != 0 {
            return Err(ImageError::Mxcsr(value));
        }
        self.park(regs);
        regs.mxcsr = value;
        Ok(())
    }
}

pub(super) fn store_mxcsr(regs: &Regs, out: &mut [u8]) {
    put(out, MXCSR, &regs.mxcsr.to_le_bytes());
    put(out, MXCSR_MASK_AT, &MXCSR_MASK.to_le_bytes());
}

fn checked_mxcsr(bytes: &[u8]) -> Result<u32, ImageError> {
    let value = read32(bytes, MXCSR);
    if value & !MXCSR_MASK == 0 { Ok(value) } else { Err(ImageError::Mxcsr(value)) }
}

fn store_xmm(regs: &Regs, form: Form, out: &mut [u8]) {
    for (i, register) in regs.ymm[..form.vectors()].iter().enumerate() {
        put(out, XMM + i * 16, &register[0].to_le_bytes());
        put(out, XMM + i * 16 + 8, &register[1].to_le_bytes());
    }
}

fn load_xmm(regs: &mut Regs, form: Form, bytes: &[u8]) {
    for (i, register) in regs.ymm[..form.vectors()].iter_mut().enumerate() {
        register[0] = read64(bytes, XMM + i * 16);
        register[1] = read64(bytes, XMM + i * 16 + 8);
    }
}
