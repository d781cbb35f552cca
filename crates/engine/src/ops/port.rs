//! IN and OUT.

use super::{attempt, next};
use crate::{
    cpu::Cpu,
    fault::Run,
    uop::{Ctl, Uop},
};

impl Cpu {
    /// IOPL and the I/O permission bitmap (SDM vol. 1, 19.5).
    pub fn check_port(&mut self, port: u16, bytes: usize) -> Run {
        if self.real_mode() || (!self.v86() && self.cpl <= self.iopl()) {
            return Ok(());
        }
        let (limit, base) = (u64::from(self.tr.limit), self.tr.base);
        // Only 32- and 64-bit task states (types 9 and 11) have a map.
        if self.tr.rights & 8 == 0 || limit < 0x67 {
            return self.gp(0);
        }
        let map = u64::from(self.load_system::<u16>(base.wrapping_add(0x66))?);
        let first = map + u64::from(port / 8);
        if first + 1 > limit {
            return self.gp(0);
        }
        let bits = self.load_system::<u16>(base.wrapping_add(first))?;
        let mask = ((1u16 << bytes) - 1) << (port % 8);
        if bits & mask != 0 { self.gp(0) } else { Ok(()) }
    }

    pub fn port_read(&mut self, port: u16, bytes: usize) -> u32 {
        self.counters.pio += 1;
        let mut data = [0; 4];
        self.park_fpu();
        self.bus().pio_read(port, &mut data[..bytes]);
        u32::from_le_bytes(data)
    }

    pub fn port_write(&mut self, port: u16, value: u32, bytes: usize) {
        self.counters.pio += 1;
        self.park_fpu();
        self.bus().pio_write(port, &value.to_le_bytes()[..bytes]);
        self.leave_soon();
    }
}

/// `aux` low bits: operand size in bytes; bit 4: the port is in DX, else in `imm`.
pub const PORT_IN_DX: u16 = 16;

fn operands(cpu: &Cpu, op: &Uop) -> (u16, usize) {
    let port = if op.aux & PORT_IN_DX != 0 { cpu.regs.gpr[2] as u16 } else { op.imm as u16 };
    (port, (op.aux & 15) as usize)
}

pub unsafe fn input(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let (port, bytes) = operands(cpu, &*op);
        attempt!(cpu, op, cpu.check_port(port, bytes));
        let v = cpu.port_read(port, bytes);
        match bytes {
            1 => cpu.set_reg(0, v as u8),
            2 => cpu.set_reg(0, v as u16),
            _ => cpu.set_reg(0, v),
        }
        next(cpu, op)
    }
}

pub unsafe fn output(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let (port, bytes) = operands(cpu, &*op);
        attempt!(cpu, op, cpu.check_port(port, bytes));
        let v = cpu.reg::<u32>(0);
        cpu.port_write(port, v, bytes);
        next(cpu, op)
    }
}
