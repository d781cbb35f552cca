//! What kernels do all the time, as events: bases of GS and FS, the interrupt flag, access to user pages, and copies.

use super::{AREAS, Maker, TRIP_CODE, constant};

/// RDFSBASE and its kin (F3 0F AE, the operation in ModRM.reg) of RAX, RBX and R12, which lives in memory.
const READ: u8 = 0;
const WRITE: u8 = 2;

impl Maker<'_> {
    pub(super) fn chores(&mut self) -> (String, Vec<u8>) {
        let mut text = String::from("chores:");
        // PUSH RSI; PUSH RDI; PUSH R12
        let mut code = vec![0x56, 0x57, 0x41, 0x54];
        for _ in 0..2 + self.random.below(6) {
            let (name, more) = self.chore();
            text += &format!(" {name};");
            code.extend(more);
        }
        code.extend([0x41, 0x5c, 0x5f, 0x5e]);
        (text, code)
    }

    /// To user code by SYSRET and back by SYSCALL, with some flags. What they left in RCX, R11 and RFLAGS is added up.
    pub(super) fn trip(&mut self) -> (String, Vec<u8>) {
        // Neither TF, NT nor VM.
        let flags = self.random.next() & self.random.pick(&[0x0028_3ed7, 0x002c_3ed7, 0x2d7]);
        let mask = if self.random.chance(80) { 0x4_7700 } else { self.random.next() & 0x3f_7fd5 };
        let mut code = Vec::new();
        if self.random.chance(30) {
            // MOV ECX, SFMASK; MOV EAX, mask; XOR EDX, EDX; WRMSR
            code.extend([0xb9, 0x84, 0, 0, 0xc0, 0xb8]);
            code.extend((mask as u32).to_le_bytes());
            code.extend([0x31, 0xd2, 0x0f, 0x30]);
        }
        // PUSH R11; MOV [7F20], RSP
        code.extend([0x41, 0x53, 0x48, 0x89, 0x24, 0x25, 0x20, 0x7f, 0, 0]);
        constant(&mut code, 1, TRIP_CODE);
        // MOV R11, flags
        code.extend([0x49, 0xbb]);
        code.extend(flags.to_le_bytes());
        // LEA RAX, [where it goes on]; MOV [7F28], RAX; SYSRET
        code.extend([0x48, 0x8d, 0x05, 11, 0, 0, 0, 0x48, 0x89, 0x04, 0x25, 0x28, 0x7f, 0, 0, 0x48, 0x0f, 0x07]);
        // MOV RSP, [7F20]; PUSHF; POP RAX; ADD RAX, RCX; ADD RAX, R11; ADD [7F00], RAX; CLD; POP R11
        code.extend([0x48, 0x8b, 0x24, 0x25, 0x20, 0x7f, 0, 0, 0x9c, 0x58, 0x48, 0x01, 0xc8, 0x4c, 0x01, 0xd8]);
        code.extend([0x48, 0x01, 0x04, 0x25, 0, 0x7f, 0, 0, 0xfc, 0x41, 0x5b]);
        (format!("to user code and back, flags {flags:#x}, mask {mask:#x}"), code)
    }

    fn chore(&mut self) -> (String, Vec<u8>) {
        let segment = self.random.below(2) as u8;
        match self.random.below(12) {
            0 | 1 => ("SWAPGS".to_owned(), vec![0x0f, 0x01, 0xf8]),
            2 => {
                let register = self.random.pick(&[0u8, 3, 0x0c]);
                let name = format!("read base {segment} to {register}");
                (name, base(READ + segment, register))
            }
            3 => {
                let register = self.random.pick(&[0u8, 3, 0x0c]);
                // Seldom one that is not canonical.
                let value = if self.random.chance(3) { 1 << 47 } else { self.random.integer() as i64 >> 17 };
                let mut code = Vec::new();
                constant(&mut code, 0, value as u64);
                match register {
                    3 => code.extend([0x48, 0x89, 0xc3]),
                    0x0c => code.extend([0x49, 0x89, 0xc4]),
                    _ => {}
                }
                code.extend(base(WRITE + segment, register));
                (format!("base {segment} becomes {value:#x} from {register}"), code)
            }
            // STI; NOP; CLI, in their places or not
            4 => ("STI, CLI".to_owned(), vec![0xfb, 0x90, 0xfa]),
            5 => ("STI".to_owned(), vec![0xfb]),
            6 => ("CLI".to_owned(), vec![0xfa]),
            7 => {
                // MOV AX, GS; MOV EBX, DS; MOV R12W, SS
                ("selectors".to_owned(), vec![0x66, 0x8c, 0xe8, 0x8c, 0xdb, 0x66, 0x41, 0x8c, 0xd4])
            }
            _ => self.copy(),
        }
    }

    /// A copy between areas, or a fill of one: user pages are open for it, or not, or only until it begins.
    fn copy(&mut self) -> (String, Vec<u8>) {
        let moves = self.random.chance(60);
        let size = self.random.below(4);
        let from = self.inside();
        // Never as far as where functions are.
        let to = if self.random.chance(25) { from + self.random.below(0x40) } else { self.inside() };
        let backwards = self.random.chance(8);
        let most = if backwards { 8 } else { 0x580 >> self.random.below(5) };
        let count = self.random.below(most) >> size;
        let mut code = Vec::new();
        constant(&mut code, 6, from);
        constant(&mut code, 7, to);
        constant(&mut code, 1, count);
        let opened = self.random.below(3);
        if opened != 0 {
            code.extend([0x0f, 0x01, 0xca]);
        }
        if opened == 2 {
            code.extend([0x0f, 0x01, 0xcb]);
        }
        if backwards {
            code.push(0xfd);
        }
        if size == 1 {
            code.push(0x66);
        }
        code.push(0xf3);
        if size == 3 {
            code.push(0x48);
        }
        code.push(if moves { 0xa4 } else { 0xaa } | u8::from(size != 0));
        code.extend([0xfc, 0x0f, 0x01, 0xcb]);
        let what = if moves { format!("from {from:#x}") } else { "of RAX".to_owned() };
        (format!("{count} << {size} bytes {what} to {to:#x}, opened {opened}, backwards {backwards}"), code)
    }

    /// An address in an area: at the start of a page, or at the end of one that another follows.
    fn inside(&mut self) -> u64 {
        let (area, page) = self.area();
        let last = page + 1 == AREAS[area].pages;
        let within = if last || self.random.chance(70) {
            0x80 + self.random.below(0x580)
        } else {
            (1 << AREAS[area].shift) - 0x80 + self.random.below(0x80)
        };
        AREAS[area].start + (page << AREAS[area].shift) + within
    }
}

fn base(operation: u8, register: u8) -> Vec<u8> {
    let rex = 0x48 | register >> 3;
    vec![0xf3, rex, 0x0f, 0xae, 0xc0 | operation << 3 | register & 7]
}
