//! Memory accesses by element: gathers, masked moves and byte-masked stores.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::{Fpu, GuestAccess};
use crate::regs::Regs;

/// VGATHER and VPGATHER (VEX forms).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gather {
    target: u8,
    index: u8,
    mask: u8,
    scale: u8,
    elements: u8,
    element_bytes: u8,
    index_bytes: u8,
    /// Effective addresses are 32 bits wide.
    short_addresses: bool,
}

impl Gather {
    pub(super) fn of(insn: &Instruction) -> Option<Self> {
        use Code::*;
        let (elements, element_bytes, index_bytes) = match insn.code() {
            VEX_Vpgatherdd_xmm_vm32x_xmm | VEX_Vgatherdps_xmm_vm32x_xmm => (4, 4, 4),
            VEX_Vpgatherdd_ymm_vm32y_ymm | VEX_Vgatherdps_ymm_vm32y_ymm => (8, 4, 4),
            VEX_Vpgatherdq_xmm_vm32x_xmm | VEX_Vgatherdpd_xmm_vm32x_xmm => (2, 8, 4),
            VEX_Vpgatherdq_ymm_vm32x_ymm | VEX_Vgatherdpd_ymm_vm32x_ymm => (4, 8, 4),
            VEX_Vpgatherqd_xmm_vm64x_xmm | VEX_Vgatherqps_xmm_vm64x_xmm => (2, 4, 8),
            VEX_Vpgatherqd_xmm_vm64y_xmm | VEX_Vgatherqps_xmm_vm64y_xmm => (4, 4, 8),
            VEX_Vpgatherqq_xmm_vm64x_xmm | VEX_Vgatherqpd_xmm_vm64x_xmm => (2, 8, 8),
            VEX_Vpgatherqq_ymm_vm64y_ymm | VEX_Vgatherqpd_ymm_vm64y_ymm => (4, 8, 8),
            _ => return None,
        };
        let base = insn.memory_base();
        let address_bytes = if base.size() != 0 { base.size() } else { insn.memory_displ_size() as usize };
        Some(Self {
            target: insn.op0_register().number() as u8 & 15,
            index: insn.memory_index().number() as u8 & 15,
            mask: insn.op2_register().number() as u8 & 15,
            scale: insn.memory_index_scale() as u8,
            elements,
            element_bytes,
            index_bytes,
            short_addresses: address_bytes != 8,
        })
    }

    /// A fault leaves the elements before it loaded and their mask cleared, so that the instruction can be
    /// restarted (Intel SDM vol. 2, VGATHERDPS).
    pub(super) fn execute<A: GuestAccess>(&self, regs: &mut Regs, memory: &mut A, base: u64) -> Result<(), A::Fault> {
        let width = usize::from(self.element_bytes);
        let indices = regs.ymm[usize::from(self.index)];
        let (target, mask) = (usize::from(self.target), usize::from(self.mask));
        for i in 0..usize::from(self.elements) {
            if !negative(&regs.ymm[mask], i, width) {
                set_element(&mut regs.ymm[mask], i, width, 0);
                continue;
            }
            let index = signed_element(&indices, i, usize::from(self.index_bytes));
            let mut address = base.wrapping_add(index.wrapping_mul(i64::from(self.scale)) as u64);
            if self.short_addresses {
                address &= 0xffff_ffff;
            }
            let mut value = [0; 8];
            memory.read(address, &mut value[..width])?;
            set_element(&mut regs.ymm[target], i, width, u64::from_le_bytes(value));
            set_element(&mut regs.ymm[mask], i, width, 0);
        }
        // Beyond the elements the target is zero; the mask is zero altogether.
        for i in usize::from(self.elements)..32 / width {
            set_element(&mut regs.ymm[target], i, width, 0);
        }
        regs.ymm[mask] = [0; 4];
        Ok(())
    }
}

/// VMASKMOVPS, VMASKMOVPD, VPMASKMOVD and VPMASKMOVQ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaskedMove {
    /// Loaded or stored.
    register: u8,
    mask: u8,
    store: bool,
    bytes: u8,
    element_bytes: u8,
}

impl MaskedMove {
    pub(super) fn of(insn: &Instruction) -> Option<Self> {
        let element_bytes = match insn.mnemonic() {
            Mnemonic::Vmaskmovps | Mnemonic::Vpmaskmovd => 4,
            Mnemonic::Vmaskmovpd | Mnemonic::Vpmaskmovq => 8,
            _ => return None,
        };
        let store = insn.op0_kind() == OpKind::Memory;
        let register = if store { insn.op2_register() } else { insn.op0_register() };
        Some(Self {
            register: register.number() as u8 & 15,
            mask: insn.op1_register().number() as u8 & 15,
            store,
            bytes: if register.is_ymm() { 32 } else { 16 },
            element_bytes,
        })
    }

    pub(super) fn is_store(&self) -> bool {
        self.store
    }

    /// Elements that the mask leaves out are not touched and cannot fault; a fault changes nothing.
    pub(super) fn execute<A: GuestAccess>(&self, regs: &mut Regs, memory: &mut A, base: u64) -> Result<(), A::Fault> {
        let width = usize::from(self.element_bytes);
        let mask = regs.ymm[usize::from(self.mask)];
        let chosen = (0..usize::from(self.bytes) / width).filter(|&i| negative(&mask, i, width));
        let address = |i: usize| base.wrapping_add((i * width) as u64);
        if self.store {
            for i in chosen.clone() {
                memory.check_write(address(i), width)?;
            }
            for i in chosen {
                let value = element(&regs.ymm[usize::from(self.register)], i, width).to_le_bytes();
                memory.write(address(i), &value[..width])?;
            }
            return Ok(());
        }
        let mut result = [0; 4];
        for i in chosen {
            let mut value = [0; 8];
            memory.read(address(i), &mut value[..width])?;
            set_element(&mut result, i, width, u64::from_le_bytes(value));
        }
        regs.ymm[usize::from(self.register)] = result;
        Ok(())
    }
}

/// MASKMOVQ, MASKMOVDQU and VMASKMOVDQU: bytes of a register to DS:rDI where the mask has its top bit set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaskedBytes {
    source: u8,
    mask: u8,
    pub(super) kind: MaskedBytesKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MaskedBytesKind {
    Mmx,
    Sse,
    Avx,
}

impl MaskedBytes {
    pub(super) fn of(insn: &Instruction) -> Option<Self> {
        let kind = match insn.mnemonic() {
            Mnemonic::Maskmovq => MaskedBytesKind::Mmx,
            Mnemonic::Maskmovdqu => MaskedBytesKind::Sse,
            Mnemonic::Vmaskmovdqu => MaskedBytesKind::Avx,
            _ => return None,
        };
        let number = |i| insn.op_register(i).number() as u8 & 15;
        Some(Self { source: number(1), mask: number(2), kind })
    }

    pub(super) fn execute<A: GuestAccess>(
        &self,
        fpu: &mut Fpu,
        regs: &mut Regs,
        memory: &mut A,
        base: u64,
    ) -> Result<(), A::Fault> {
        let mmx = self.kind == MaskedBytesKind::Mmx;
        let value = |fpu: &Fpu, register: u8| match mmx {
            true => [fpu.mmx(register), 0, 0, 0],
            false => regs.ymm[usize::from(register)],
        };
        let (source, mask) = (value(fpu, self.source), value(fpu, self.mask));
        if mmx {
            // Before the accesses: processors keep the transition when one faults.
            fpu.enter_mmx();
        }
        let chosen = (0..if mmx { 8 } else { 16 }).filter(|&i| negative(&mask, i, 1));
        for i in chosen.clone() {
            memory.check_write(base.wrapping_add(i as u64), 1)?;
        }
        for i in chosen {
            memory.write(base.wrapping_add(i as u64), &[element(&source, i, 1) as u8])?;
        }
        Ok(())
    }
}

fn element(register: &[u64; 4], i: usize, width: usize) -> u64 {
    let bit = i * width * 8;
    let word = register[(bit / 64) & 3] >> (bit % 64);
    if width == 8 { word } else { word & ((1 << (width * 8)) - 1) }
}

fn signed_element(register: &[u64; 4], i: usize, width: usize) -> i64 {
    let value = element(register, i, width);
    if width == 4 { i64::from(value as u32 as i32) } else { value as i64 }
}

fn set_element(register: &mut [u64; 4], i: usize, width: usize, value: u64) {
    let bit = i * width * 8;
    let mask = if width == 8 { u64::MAX } else { (1 << (width * 8)) - 1 };
    let word = &mut register[(bit / 64) & 3];
    *word = *word & !(mask << (bit % 64)) | ((value & mask) << (bit % 64));
}

fn negative(register: &[u64; 4], i: usize, width: usize) -> bool {
    (element(register, i, width) >> (width * 8 - 1)) & 1 == 1
}
