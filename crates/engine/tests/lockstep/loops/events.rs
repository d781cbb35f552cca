//! What happens between the calls of loops, and inside of them.

use super::{
    AREAS, Area, FRAME_COUNT, FRAMES, FUNCTION, GLOBAL, IS_LARGE, LARGE, LARGE_FRAMES, Maker, SPACES, TABLES,
    TABLES_OF_ONE, USER, constant, store,
};
use crate::runtime::STEPS;

impl Maker<'_> {
    /// What happens at some time: in words, and as code that may use RAX, RCX, RDX and RBX. On its stack is the saved
    /// RFLAGS, at RSP + 38.
    pub(super) fn event(&mut self) -> (String, Vec<u8>) {
        match self.random.below(58) {
            40..52 => self.chores(),
            52.. => self.trip(),
            0..16 => self.remap(),
            16..19 => self.switch(),
            19..24 => self.run_frame(),
            24..27 => self.change_function(),
            27 | 28 => self.toggle("CR0.WP", 0, 1 << 16),
            29 => self.toggle("CR4.PGE", 4, 1 << 7),
            30 | 31 => self.toggle("CR4.SMAP", 4, 1 << 21),
            32 => self.toggle("CR0.AM", 0, 1 << 18),
            33 => self.toggle_nxe(),
            34 | 35 => self.saved_flag("AC", 1 << 18),
            36 => self.breakpoint(),
            37 => self.step(),
            38 => ("STAC or CLAC".to_owned(), vec![0x0f, 0x01, self.random.pick(&[0xca, 0xcb])]),
            _ => self.invalidate_only(),
        }
    }

    pub(super) fn area(&mut self) -> (usize, u64) {
        let area = self.random.pick(&[0, 0, 0, 0, 1, 1, 1, 2, 3, 4, LARGE, LARGE]);
        (area, self.random.below(AREAS[area].pages))
    }

    /// Another frame, other rights, or none, for a page of the current address space.
    fn remap(&mut self) -> (String, Vec<u8>) {
        let (area, page) = self.area();
        let Area { start, shift, user, shared, .. } = AREAS[area];
        let linear = start + (page << shift);
        let bits = self.random.pick(&[3u64, 3, 3, 1, 2, 0]);
        let user = if user != self.random.chance(10) { USER } else { 0 };
        let global = if shared && self.random.chance(50) { GLOBAL } else { 0 };
        let frame = if area == LARGE {
            self.random.pick(&LARGE_FRAMES) | IS_LARGE
        } else {
            // Often where a neighbour's page suggests.
            let to = if self.random.chance(50) { page + self.random.below(3) } else { self.random.below(FRAME_COUNT) };
            FRAMES + to % FRAME_COUNT * 0x1000
        };
        let value = frame | bits | user | global;
        let mut code = Vec::new();
        if shared {
            code.extend([0x31, 0xc0]); // XOR EAX, EAX
        } else {
            code.extend([0x0f, 0x20, 0xd8]); // MOV RAX, CR3
            code.extend([0x48, 0x25, 0, 0xf0, 0xff, 0xff]); // AND RAX, -4096
        }
        constant(&mut code, 3, value);
        code.extend([0x48, 0x89, 0x98]); // MOV [RAX + offset], RBX
        code.extend(((self.offsets[area] as u32 + page as u32 * 8) & !1).to_le_bytes());
        let text = format!("{linear:#x} to {value:#x}, ");
        let (how, more) = self.invalidate(linear, shift, shared);
        code.extend(more);
        (text + &how, code)
    }

    /// What is shared may be global, and in what other spaces know; with these engines INVLPG drops that, too.
    fn invalidate(&mut self, linear: u64, shift: u32, shared: bool) -> (String, Vec<u8>) {
        let at = linear + (self.random.below(1 << (shift - 4)) << 4);
        let mut code = Vec::new();
        match self.random.below(if shared { 8 } else { 12 }) {
            0..5 => {
                constant(&mut code, 0, at);
                code.extend([0x0f, 0x01, 0x38]);
                (format!("INVLPG {at:#x}"), code)
            }
            8 => (String::from("CR3"), vec![0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8]),
            9..12 => {
                // Of this PCID: MOV RCX, CR3; AND ECX, FFF; SUB RSP, 10; MOV [RSP], RCX; MOV [RSP + 8], RBX;
                // INVPCID RAX, [RSP]; ADD RSP, 10
                let kind = self.random.pick(&[0u64, 1, 1, 3]);
                constant(&mut code, 0, kind);
                constant(&mut code, 3, at);
                code.extend([0x0f, 0x20, 0xd9, 0x81, 0xe1, 0xff, 0x0f, 0, 0, 0x48, 0x83, 0xec, 0x10]);
                code.extend([0x48, 0x89, 0x0c, 0x24, 0x48, 0x89, 0x5c, 0x24, 8]);
                code.extend([0x66, 0x0f, 0x38, 0x82, 0x04, 0x24, 0x48, 0x83, 0xc4, 0x10]);
                (format!("INVPCID {kind} of {at:#x}"), code)
            }
            5 => {
                // INVPCID RAX, [RSP - 16] after SUB, with all contexts
                constant(&mut code, 0, 2);
                code.extend([0x48, 0x83, 0xec, 0x10, 0x48, 0xc7, 0x04, 0x24, 0, 0, 0, 0]);
                code.extend([0x48, 0xc7, 0x44, 0x24, 8, 0, 0, 0, 0]);
                code.extend([0x66, 0x0f, 0x38, 0x82, 0x04, 0x24, 0x48, 0x83, 0xc4, 0x10]);
                ("INVPCID of all".to_owned(), code)
            }
            6 => {
                // MOV RAX, CR4; BTC RAX, 7; MOV CR4, RAX; BTC RAX, 7; MOV CR4, RAX
                let mut toggle = vec![0x0f, 0x20, 0xe0];
                for _ in 0..2 {
                    toggle.extend([0x48, 0x0f, 0xba, 0xf8, 7, 0x0f, 0x22, 0xe0]);
                }
                ("CR4.PGE there and back".to_owned(), toggle)
            }
            _ => {
                // INVLPG drops what is global, the load of CR3 the rest.
                constant(&mut code, 0, at);
                code.extend([0x0f, 0x01, 0x38, 0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8]);
                (format!("INVLPG {at:#x} and CR3"), code)
            }
        }
    }

    fn invalidate_only(&mut self) -> (String, Vec<u8>) {
        let (area, page) = self.area();
        let Area { start, shift, shared, .. } = AREAS[area];
        self.invalidate(start + (page << shift), shift, shared)
    }

    fn switch(&mut self) -> (String, Vec<u8>) {
        let space = self.random.below(SPACES);
        let pcid = if self.pcid { space + 1 } else { 0 };
        // Of a space that is not the current one nothing is ever changed.
        let keep = if self.pcid && self.random.chance(60) { 1 << 63 } else { 0 };
        let mut code = Vec::new();
        constant(&mut code, 0, (TABLES + space * TABLES_OF_ONE) | pcid | keep);
        code.extend([0x0f, 0x22, 0xd8]);
        (format!("address space {space}, keep {}", keep != 0), code)
    }

    /// Runs the function of a frame, at its address in the first 4 MiB, and adds its result up.
    fn run_frame(&mut self) -> (String, Vec<u8>) {
        let at = FRAMES + self.random.below(FRAME_COUNT) * 0x1000 + FUNCTION;
        let mut code = Vec::new();
        constant(&mut code, 0, at);
        // CALL RAX; ADD [7F00], RAX
        code.extend([0xff, 0xd0, 0x48, 0x01, 0x04, 0x25, 0, 0x7f, 0, 0]);
        (format!("call {at:#x}"), code)
    }

    /// INC of its constant, through an area if that can be.
    fn change_function(&mut self) -> (String, Vec<u8>) {
        let at = FRAMES + self.random.below(FRAME_COUNT) * 0x1000 + FUNCTION + 1;
        let mut code = Vec::new();
        constant(&mut code, 0, at);
        // STAC; INC DWORD [RAX]; CLAC
        code.extend([0x0f, 0x01, 0xca, 0xff, 0x00, 0x0f, 0x01, 0xcb]);
        (format!("change the constant at {at:#x}"), code)
    }

    fn toggle(&mut self, what: &str, register: u8, bit: u64) -> (String, Vec<u8>) {
        // MOV RAX, CRn; XOR RAX, bit; MOV CRn, RAX
        let mut code = vec![0x0f, 0x20, 0xc0 | register << 3, 0x48, 0x35];
        code.extend((bit as u32).to_le_bytes());
        code.extend([0x0f, 0x22, 0xc0 | register << 3]);
        (format!("toggle {what}"), code)
    }

    fn toggle_nxe(&mut self) -> (String, Vec<u8>) {
        let mut code = vec![0xb9, 0x80, 0, 0, 0xc0, 0x0f, 0x32, 0x35];
        code.extend((1u32 << 11).to_le_bytes());
        code.extend([0x0f, 0x30]);
        ("toggle EFER.NXE".to_owned(), code)
    }

    fn saved_flag(&mut self, name: &str, bit: u32) -> (String, Vec<u8>) {
        // XOR DWORD [RSP + 38], bit
        let mut code = vec![0x81, 0x74, 0x24, 0x38];
        code.extend(bit.to_le_bytes());
        (format!("RFLAGS.{name} changes"), code)
    }

    fn breakpoint(&mut self) -> (String, Vec<u8>) {
        let (area, page) = self.area();
        let at = AREAS[area].start + (page << AREAS[area].shift) + self.random.below(0x80) * 8;
        let on = self.random.chance(40);
        let mut code = Vec::new();
        constant(&mut code, 0, at);
        code.extend([0x0f, 0x23, 0xc0]);
        constant(&mut code, 0, if on { 0xd_0402 } else { 0x400 });
        code.extend([0x0f, 0x23, 0xf8]);
        (format!("a breakpoint at {at:#x}: {on}"), code)
    }

    fn step(&mut self) -> (String, Vec<u8>) {
        let mut code = Vec::new();
        store(&mut code, STEPS, self.random.below(40));
        code.extend([0x81, 0x4c, 0x24, 0x38, 0, 1, 0, 0]);
        ("a few single steps".to_owned(), code)
    }
}
