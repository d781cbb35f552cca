//! Host machine code, byte by byte: the instructions that translations and thunks are made of besides the guest's own.

/// Host registers by number. The two that no guest register lives in:
pub const T0: u8 = 0;
pub const T1: u8 = 15;
pub const RSP: u8 = 4;
pub const RDI: u8 = 7;
pub const RSI: u8 = 6;
pub const RDX: u8 = 2;

/// Condition codes as in the low bits of Jcc opcodes.
pub mod cc {
    pub const B: u8 = 2;
    pub const AE: u8 = 3;
    pub const E: u8 = 4;
    pub const NE: u8 = 5;
    pub const BE: u8 = 6;
    pub const A: u8 = 7;
    pub const S: u8 = 8;
    pub const NS: u8 = 9;
}

/// A memory operand.
#[derive(Clone, Copy, Debug)]
pub enum Mem {
    /// A field of [`crate::cpu::Cpu`], which GS points at.
    State(usize),
    Base(u8, i32),
    /// An address within 2 GiB of the code. Not with an immediate.
    Near(u64),
    /// Base, index, scale (as a power of two), displacement.
    Indexed(u8, u8, u8, i32),
}

/// A place in the code that jumps lead to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label(usize);

/// Code under construction, for a known address.
#[derive(Default)]
pub struct Emitter {
    pub code: Vec<u8>,
    /// Where the first byte will run.
    pub address: u64,
    /// Where the part begins that is put elsewhere, and where it will run.
    apart: Option<(usize, u64)>,
    labels: Vec<u32>,
    /// Places of 32-bit displacements, and the labels they lead to.
    jumps: Vec<(usize, Label)>,
}

const UNBOUND: u32 = u32::MAX;

impl Emitter {
    pub fn start(&mut self, address: u64) {
        self.code.clear();
        self.labels.clear();
        self.jumps.clear();
        self.address = address;
        self.apart = None;
    }

    /// What follows will run at another address.
    pub fn go_apart(&mut self, address: u64) {
        self.apart = Some((self.code.len(), address));
    }

    pub fn is_apart(&self) -> bool {
        self.apart.is_some()
    }

    /// What runs at the first address, and what apart from it.
    pub fn parts(&self) -> (&[u8], &[u8]) {
        self.code.split_at(self.apart.map_or(self.code.len(), |(at, _)| at))
    }

    fn address_of(&self, at: usize) -> u64 {
        match self.apart {
            Some((apart, address)) if at >= apart => address.wrapping_add((at - apart) as u64),
            _ => self.address.wrapping_add(at as u64),
        }
    }

    pub fn here(&self) -> usize {
        self.code.len()
    }

    pub fn raw(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    pub fn label(&mut self) -> Label {
        self.labels.push(UNBOUND);
        Label(self.labels.len() - 1)
    }

    pub fn bind(&mut self, label: Label) {
        self.labels[label.0] = self.code.len() as u32;
    }

    /// Where a label is.
    pub fn place(&self, label: Label) -> usize {
        self.labels[label.0] as usize
    }

    /// A label for the current place.
    pub fn mark(&mut self) -> Label {
        let label = self.label();
        self.bind(label);
        label
    }

    /// Fills in all jumps. Every label that is used was bound.
    pub fn resolve(&mut self) {
        for (at, label) in std::mem::take(&mut self.jumps) {
            let target = self.labels[label.0];
            debug_assert_ne!(target, UNBOUND);
            let next = self.address_of(at).wrapping_add(4);
            let rel = self.address_of(target as usize).wrapping_sub(next) as i32;
            self.code[at..at + 4].copy_from_slice(&rel.to_le_bytes());
        }
    }

    fn rel32(&mut self, label: Label) {
        self.jumps.push((self.code.len(), label));
        self.raw(&[0; 4]);
    }

    pub fn jmp(&mut self, label: Label) {
        self.raw(&[0xe9]);
        self.rel32(label);
    }

    pub fn jcc(&mut self, cc: u8, label: Label) {
        self.raw(&[0x0f, 0x80 | cc]);
        self.rel32(label);
    }

    /// CMP of a register with eight bytes of data in the code.
    pub fn cmp_data(&mut self, reg: u8, data: Label) {
        self.rex(true, reg, 0, 0, false);
        self.raw(&[0x3b, (reg & 7) << 3 | 5]);
        self.rel32(data);
    }

    fn relative(&mut self, target: u64) {
        let next = self.address_of(self.code.len()).wrapping_add(4);
        self.raw(&(target.wrapping_sub(next) as i32).to_le_bytes());
    }

    pub fn jmp_address(&mut self, target: u64) {
        self.raw(&[0xe9]);
        self.relative(target);
    }

    pub fn jcc_address(&mut self, cc: u8, target: u64) {
        self.raw(&[0x0f, 0x80 | cc]);
        self.relative(target);
    }

    pub fn call_address(&mut self, target: u64) {
        self.raw(&[0xe8]);
        self.relative(target);
    }

    fn rex(&mut self, wide: bool, reg: u8, index: u8, base: u8, byte: bool) {
        let rex = 0x40 | u8::from(wide) << 3 | (reg >> 3) << 2 | (index >> 3) << 1 | base >> 3;
        // SPL, BPL, SIL and DIL want an empty prefix.
        if rex != 0x40 || byte {
            self.raw(&[rex]);
        }
    }

    /// An instruction between two registers: `reg` in ModRM.reg, `rm` in ModRM.rm.
    pub fn rr(&mut self, wide: bool, opcode: &[u8], reg: u8, rm: u8) {
        self.rex(wide, reg, 0, rm, false);
        self.raw(opcode);
        self.raw(&[0xc0 | (reg & 7) << 3 | rm & 7]);
    }

    /// An instruction with a memory operand.
    pub fn rm(&mut self, wide: bool, opcode: &[u8], reg: u8, mem: Mem) {
        self.prefixed(&[], wide, opcode, reg, mem);
    }

    /// The same with mandatory or operand-size prefixes.
    pub fn prefixed(&mut self, prefixes: &[u8], wide: bool, opcode: &[u8], reg: u8, mem: Mem) {
        self.raw(prefixes);
        let field = (reg & 7) << 3;
        match mem {
            Mem::State(offset) => {
                self.raw(&[0x65]);
                self.rex(wide, reg, 0, 0, false);
                self.raw(opcode);
                self.raw(&[field | 4, 0x25]);
                self.raw(&(offset as u32).to_le_bytes());
            }
            Mem::Near(address) => {
                self.rex(wide, reg, 0, 0, false);
                self.raw(opcode);
                self.raw(&[field | 5]);
                self.relative(address);
            }
            Mem::Base(base, disp) => {
                self.rex(wide, reg, 0, base, false);
                self.raw(opcode);
                self.modrm(field, base, None, disp);
            }
            Mem::Indexed(base, index, scale, disp) => {
                self.rex(wide, reg, index, base, false);
                self.raw(opcode);
                self.modrm(field, base, Some((index, scale)), disp);
            }
        }
    }

    fn modrm(&mut self, field: u8, base: u8, index: Option<(u8, u8)>, disp: i32) {
        let low = base & 7;
        // RBP and R13 as a base always have a displacement.
        let mode = match i8::try_from(disp) {
            Ok(0) if low != 5 => 0,
            Ok(_) => 0x40,
            Err(_) => 0x80,
        };
        match index {
            Some((index, scale)) => self.raw(&[mode | field | 4, scale << 6 | (index & 7) << 3 | low]),
            None if low == 4 => self.raw(&[mode | field | 4, 0x24]),
            None => self.raw(&[mode | field | low]),
        }
        match mode {
            0 => {}
            0x40 => self.raw(&[disp as u8]),
            _ => self.raw(&disp.to_le_bytes()),
        }
    }

    pub fn load(&mut self, reg: u8, mem: Mem) {
        self.rm(true, &[0x8b], reg, mem);
    }

    pub fn load32(&mut self, reg: u8, mem: Mem) {
        self.rm(false, &[0x8b], reg, mem);
    }

    pub fn store(&mut self, reg: u8, mem: Mem) {
        self.rm(true, &[0x89], reg, mem);
    }

    pub fn mov(&mut self, to: u8, from: u8) {
        if to != from {
            self.rr(true, &[0x89], from, to);
        }
    }

    pub fn mov32(&mut self, to: u8, from: u8) {
        self.rr(false, &[0x89], from, to);
    }

    pub fn lea(&mut self, reg: u8, mem: Mem) {
        self.rm(true, &[0x8d], reg, mem);
    }

    /// A constant, in as few bytes as it takes. Leaves flags alone.
    pub fn constant(&mut self, reg: u8, value: u64) {
        if u32::try_from(value).is_ok() {
            self.rex(false, 0, 0, reg, false);
            self.raw(&[0xb8 | reg & 7]);
            self.raw(&(value as u32).to_le_bytes());
        } else if i32::try_from(value as i64).is_ok() {
            self.rex(true, 0, 0, reg, false);
            self.raw(&[0xc7, 0xc0 | reg & 7]);
            self.raw(&(value as u32).to_le_bytes());
        } else {
            self.rex(true, 0, 0, reg, false);
            self.raw(&[0xb8 | reg & 7]);
            self.raw(&value.to_le_bytes());
        }
    }

    /// ADD (0), OR (1), AND (4), SUB (5), XOR (6), CMP (7) with an immediate.
    pub fn group1(&mut self, wide: bool, which: u8, reg: u8, imm: i32) {
        self.rex(wide, 0, 0, reg, false);
        match i8::try_from(imm) {
            Ok(short) => self.raw(&[0x83, 0xc0 | which << 3 | reg & 7, short as u8]),
            Err(_) => {
                self.raw(&[0x81, 0xc0 | which << 3 | reg & 7]);
                self.raw(&imm.to_le_bytes());
            }
        }
    }

    /// The same on memory.
    pub fn group1_mem(&mut self, wide: bool, which: u8, mem: Mem, imm: i32) {
        match i8::try_from(imm) {
            Ok(short) => {
                self.rm(wide, &[0x83], which, mem);
                self.raw(&[short as u8]);
            }
            Err(_) => {
                self.rm(wide, &[0x81], which, mem);
                self.raw(&imm.to_le_bytes());
            }
        }
    }

    /// Stores a constant.
    pub fn set32(&mut self, mem: Mem, value: u32) {
        self.rm(false, &[0xc7], 0, mem);
        self.raw(&value.to_le_bytes());
    }

    pub fn cmp_byte(&mut self, mem: Mem, imm: u8) {
        self.rm(false, &[0x80], 7, mem);
        self.raw(&[imm]);
    }

    pub fn test_byte(&mut self, mem: Mem, imm: u8) {
        self.rm(false, &[0xf6], 0, mem);
        self.raw(&[imm]);
    }

    /// IMUL of 32 bits by a constant.
    pub fn multiply(&mut self, to: u8, from: u8, factor: u32) {
        self.rr(false, &[0x69], to, from);
        self.raw(&factor.to_le_bytes());
    }

    /// CF from flags in memory: BT word, 8.
    pub fn carry(&mut self, flags: Mem) {
        self.prefixed(&[0x66], false, &[0x0f, 0xba], 4, flags);
        self.raw(&[8]);
    }

    /// SHL (4), SHR (5), SAR (7) by an immediate.
    pub fn shift(&mut self, wide: bool, which: u8, reg: u8, count: u8) {
        self.rex(wide, 0, 0, reg, false);
        self.raw(&[0xc1, 0xc0 | which << 3 | reg & 7, count]);
    }

    /// Compares the address in T0 with its canonical form: "equal" says that it is one. Uses T1.
    pub fn compare_canonical(&mut self) {
        self.mov(T1, T0);
        self.shift(true, 4, T1, 16);
        self.shift(true, 7, T1, 16);
        self.rr(true, &[0x39], T0, T1);
    }

    pub fn push(&mut self, reg: u8) {
        self.rex(false, 0, 0, reg, false);
        self.raw(&[0x50 | reg & 7]);
    }

    pub fn pop(&mut self, reg: u8) {
        self.rex(false, 0, 0, reg, false);
        self.raw(&[0x58 | reg & 7]);
    }

    pub fn ret(&mut self) {
        self.raw(&[0xc3]);
    }

    pub fn jmp_mem(&mut self, mem: Mem) {
        self.rm(false, &[0xff], 4, mem);
    }
}
