//! The few host instructions that a stub is made of besides the guest's own.
//!
//! A stub is called with RDI = `*mut Regs` and RSI = host address of the memory operand (System V ABI).

use std::mem::offset_of;

use crate::regs::Regs;

pub(super) const RAX: u8 = 0;
pub(super) const RCX: u8 = 1;
pub(super) const RDX: u8 = 2;
pub(super) const RBX: u8 = 3;
pub(super) const R8: u8 = 8;
pub(super) const R11: u8 = 11;

// Aligned vector moves and the guest's aligned memory operands depend on these (see `Regs::gpr`).
const _: () = assert!(offset_of!(Regs, ymm).is_multiple_of(32) && offset_of!(Regs, bounce).is_multiple_of(64));
const _: () = assert!(offset_of!(Regs, gpr) == 0);

/// Code under construction.
#[derive(Default)]
pub(super) struct Emitter {
    pub(super) code: Vec<u8>,
}

impl Emitter {
    pub(super) fn raw(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    /// ModRM and displacement for `[rdi + offset]`.
    fn field(&mut self, reg: u8, offset: usize) {
        const RDI: u8 = 7;
        self.raw(&[0x80 | (reg & 7) << 3 | RDI]);
        self.raw(&(offset as u32).to_le_bytes());
    }

    /// `mov` between a host register and a guest GPR's slot.
    fn gpr(&mut self, opcode: u8, host: u8, guest: u8) {
        self.raw(&[0x48 | (host >> 3) << 2, opcode]);
        self.raw(&[0x40 | (host & 7) << 3 | 7, guest * 8]);
    }

    pub(super) fn load_gpr(&mut self, host: u8, guest: u8) {
        self.gpr(0x8b, host, guest);
    }

    pub(super) fn store_gpr(&mut self, host: u8, guest: u8) {
        self.gpr(0x89, host, guest);
    }

    /// `and r8, mask`.
    pub(super) fn mask_r8(&mut self, mask: u8) {
        self.raw(&[0x49, 0x83, 0xe0, mask]);
    }

    /// Guest status flags into the host's; clobbers RAX. Adding 127 to AL (0 or 1) makes OF.
    pub(super) fn load_flags(&mut self) {
        self.raw(&[0x0f, 0xb7]);
        self.field(RAX, offset_of!(Regs, flags));
        self.raw(&[0x04, 0x7f, 0x9e]);
    }

    /// The host's status flags into the guest's; clobbers RAX.
    pub(super) fn store_flags(&mut self) {
        self.raw(&[0x9f, 0x0f, 0x90, 0xc0, 0x66, 0x89]);
        self.field(RAX, offset_of!(Regs, flags));
    }

    /// MOVAPS between an XMM register and the low half of its slot, leaving both upper halves alone.
    fn movaps(&mut self, opcode: u8, register: u8) {
        if register >= 8 {
            self.raw(&[0x44]);
        }
        self.raw(&[0x0f, opcode]);
        self.field(register, vector_offset(register));
    }

    pub(super) fn load_xmm(&mut self, register: u8) {
        self.movaps(0x28, register);
    }

    pub(super) fn store_xmm(&mut self, register: u8) {
        self.movaps(0x29, register);
    }

    /// VMOVAPS of 16 or 32 bytes.
    fn vmovaps(&mut self, opcode: u8, register: u8, wide: bool) {
        let r = if register >= 8 { 0 } else { 0x80 };
        self.raw(&[0xc5, r | 0x78 | (wide as u8) << 2, opcode]);
        self.field(register, vector_offset(register));
    }

    pub(super) fn load_vector(&mut self, register: u8, wide: bool) {
        self.vmovaps(0x28, register, wide);
    }

    /// Always 32 bytes: a VEX instruction has zeroed what it did not write.
    pub(super) fn store_vector(&mut self, register: u8) {
        self.vmovaps(0x29, register, true);
    }

    pub(super) fn push_rbx(&mut self) {
        self.raw(&[0x53]);
    }

    pub(super) fn pop_rbx(&mut self) {
        self.raw(&[0x5b]);
    }

    pub(super) fn vzeroupper(&mut self) {
        self.raw(&[0xc5, 0xf8, 0x77]);
    }

    pub(super) fn ret(&mut self) {
        self.raw(&[0xc3]);
    }
}

fn vector_offset(register: u8) -> usize {
    offset_of!(Regs, ymm) + register as usize * 32
}
