//! From an operand's address to the host's memory.

use std::mem::offset_of;

use super::{
    HOST,
    block::Work,
    emit::{Label, Mem, T0, T1, cc},
    outline::{Form, Outline},
    thunks::{DATA, PAGE},
    window::Window,
};
use crate::{
    cpu::Cpu,
    regs::slot,
    tlb::{DataSet, ENTRIES, ENTRY_SHIFT, Entry},
    uop::{FLAT, Uop, address},
};

const SEG_BASE: usize = offset_of!(Cpu, seg_base);
const READ_TABLE: i32 = offset_of!(DataSet, read) as i32;
const WRITE_TABLE: i32 = offset_of!(DataSet, write) as i32;
const HOST_FIELD: i32 = offset_of!(Entry, host) as i32;
const DIFFERENCE_FIELD: i32 = offset_of!(Entry, difference) as i32;

impl Work<'_> {
    /// An operand's displacement, if its address can be made here.
    pub fn displacement(&self, op: &Uop) -> Option<i32> {
        let start = if usize::from(op.base) == slot::BLOCK { self.start } else { 0 };
        if op.asz != address::LONG {
            return None;
        }
        i32::try_from(i64::from(op.disp) + start).ok()
    }

    /// The linear address of an operand with such a displacement, in T0. Uses T1 and the host's flags.
    pub fn address(&mut self, op: &Uop, disp: i32) {
        self.offset(op, disp, T0);
        self.drop_held();
        if op.seg != FLAT && op.seg >= 4 {
            self.e().rm(true, &[0x03], T0, Mem::State(SEG_BASE + usize::from(op.seg) * 8));
        }
    }

    /// `to` = base + index << scale + disp. Uses T0 and T1; leaves flags alone.
    pub fn offset(&mut self, op: &Uop, disp: i32, to: u8) {
        let (base, index, scale) = (usize::from(op.base), usize::from(op.index), op.scale);
        let index_in_memory = index != slot::ZERO && HOST[index].is_none();
        let base = match base {
            slot::ZERO => None,
            slot::BLOCK => {
                self.e().load(T0, PAGE);
                Some(T0)
            }
            guest => Some(match HOST[guest] {
                Some(host) => host,
                None if self.holds(guest as u8) && (!index_in_memory || index == guest) => T1,
                None => {
                    self.load_guest(T0, guest as u8);
                    T0
                }
            }),
        };
        let index = match index {
            slot::ZERO => None,
            guest => Some(HOST[guest].unwrap_or_else(|| {
                self.load_guest(T1, guest as u8);
                T1
            })),
        };
        if to == T1 {
            self.drop_held();
        }
        let e = &mut self.t.emitter;
        match (base, index) {
            (None, None) => e.constant(to, disp as i64 as u64),
            (Some(base), None) if disp == 0 => e.mov(to, base),
            (Some(base), None) => e.lea(to, Mem::Base(base, disp)),
            (Some(base), Some(index)) => e.lea(to, Mem::Indexed(base, index, scale, disp)),
            (None, Some(index)) => {
                // No base: a form of its own, with a 32-bit displacement.
                e.raw(&[
                    0x48 | (to >> 3) << 2 | (index >> 3) << 1,
                    0x8d,
                    (to & 7) << 3 | 4,
                    scale << 6 | (index & 7) << 3 | 5,
                ]);
                e.raw(&disp.to_le_bytes());
            }
        }
    }

    /// From the linear address in T0 to the host's: in T0, or as the sum of T0 and T1. Uses T1 and the host's flags.
    fn look_up(&mut self, bytes: u64, write: bool, pair: bool) -> (Label, Label, i32) {
        let table = self.entry(bytes, write);
        let e = &mut self.t.emitter;
        let missed = e.label();
        e.jcc(cc::A, missed);
        if pair {
            e.load(T1, Mem::Base(T1, table + HOST_FIELD));
        } else {
            e.rm(true, &[0x03], T0, Mem::Base(T1, table + HOST_FIELD));
        }
        let again = e.mark();
        (missed, again, table)
    }

    /// The same for a span, but for T1: it holds the difference of host and linear addresses then.
    pub fn look_up_span(&mut self, bytes: u64, write: bool) -> Label {
        let table = self.entry(bytes, write);
        let e = &mut self.t.emitter;
        let missed = e.label();
        e.jcc(cc::A, missed);
        e.load(T1, Mem::Base(T1, table + DIFFERENCE_FIELD));
        missed
    }

    /// T0 becomes the distance of the address in it from the window's start. Leads to the label if it is not inside. Uses
    /// the host's flags.
    pub fn check_window(&mut self, window: u64) -> Label {
        self.compare_window(window, T0)
    }

    /// The same with the distance in another register.
    fn compare_window(&mut self, window: u64, distance: u8) -> Label {
        debug_assert!(self.flags.memory || self.recipe.is_some());
        self.drop_held();
        let e = &mut self.t.emitter;
        let missed = e.label();
        e.mov(distance, T0);
        e.rm(true, &[0x2b], distance, Mem::Near(window + offset_of!(Window, start) as u64));
        e.rm(true, &[0x3b], distance, Mem::Near(window + offset_of!(Window, room) as u64));
        e.jcc(cc::AE, missed);
        self.flags.host = false;
        missed
    }

    /// Where a set's table for reading or writing is.
    pub fn table(&self, write: bool) -> i32 {
        if write { WRITE_TABLE } else { READ_TABLE }
    }

    /// T1 is where the TLB entry for the address in T0 is; T0 becomes the offset in its page, and "above" says that
    /// the bytes are not in it.
    fn entry(&mut self, bytes: u64, write: bool) -> i32 {
        debug_assert!(self.flags.memory || self.recipe.is_some());
        self.drop_held();
        let table = self.table(write);
        let bmi2 = self.t.bmi2;
        let e = &mut self.t.emitter;
        if bmi2 {
            // RORX R15D, EAX, imm8
            e.raw(&[0xc4, 0x63, 0x7b, 0xf0, 0xf8, 12 - ENTRY_SHIFT]);
        } else {
            e.mov32(T1, T0);
            e.shift(false, 5, T1, 12 - ENTRY_SHIFT);
        }
        e.group1(false, 4, T1, ((ENTRIES - 1) << ENTRY_SHIFT) as i32);
        e.rm(true, &[0x03], T1, DATA);
        e.rm(true, &[0x33], T0, Mem::Base(T1, table));
        // CMP RAX, imm32
        e.raw(&[0x48, 0x3d]);
        e.raw(&(0x1000 - bytes as u32).to_le_bytes());
        self.flags.host = false;
        table
    }

    /// The address of an operand of `bytes` bytes on the host, in T0. `done` is where the interpreter goes on if it
    /// did the instruction; `flags`: flags are expected in the host's there.
    pub fn access(&mut self, index: usize, bytes: u64, write: bool, align: u64, done: Label) {
        self.access_by(index, bytes, write, align, done, false);
    }

    /// The same; with `pair` the address is the sum of T0 and T1.
    pub fn access_by(&mut self, index: usize, bytes: u64, write: bool, align: u64, done: Label, pair: bool) {
        let site = self.site(index, bytes, write);
        if align > 1 {
            // TEST AL, align - 1
            self.e().raw(&[0xa8, align as u8 - 1]);
            let from = self.e().label();
            self.e().jcc(cc::NE, from);
            // Which the interpreter says.
            let make = self.missing_flags();
            self.t.outlines.push(Outline::Last { from, site, make });
        }
        let make = self.missing_flags();
        if let Some(window) = self.window(index, bytes, write) {
            let missed;
            if pair {
                // The address itself waits for nothing.
                missed = self.compare_window(window, T1);
                self.e().load(T1, Mem::Near(window + offset_of!(Window, difference) as u64));
            } else {
                missed = self.check_window(window);
                self.e().rm(true, &[0x03], T0, Mem::Near(window + offset_of!(Window, host) as u64));
            }
            let again = self.e().mark();
            let form = if pair { Form::Pair } else { Form::Sum };
            self.t.outlines.push(Outline::Moved {
                missed,
                again,
                done,
                site,
                window,
                form,
                flags: false,
                held: None,
                make,
                scatter: Vec::new(),
            });
            return;
        }
        let (missed, again, table) = self.look_up(bytes, write, pair);
        self.t.outlines.push(Outline::Slow {
            missed,
            again,
            done,
            site,
            table,
            flags: false,
            held: None,
            make,
            pair,
            scatter: Vec::new(),
        });
    }

    /// Where accesses are checked: ends the process if these bytes are not the guest's RAM.
    pub fn guard(&mut self, mem: Mem, bytes: u64) {
        if !self.guards {
            return;
        }
        let thunk = self.thunks.guard;
        let e = &mut self.t.emitter;
        e.push(T0);
        e.lea(T0, mem);
        e.call_address(thunk);
        e.lea(T0, Mem::Base(T0, bytes as i32 - 1));
        e.call_address(thunk);
        e.pop(T0);
    }

    /// The outlines pushed since `first` come back to a place where T1 holds a guest register, if it does.
    pub fn held_wanted(&mut self, first: usize) {
        let Some(guest) = self.held_guest() else { return };
        for outline in &mut self.t.outlines[first..] {
            match outline {
                Outline::Slow { held, .. } | Outline::SlowNear { held, .. } | Outline::Moved { held, .. } => {
                    *held = Some(guest);
                }
                // It tries again, or does not come back.
                Outline::Span { .. } | Outline::Last { .. } | Outline::Vectors { .. } | Outline::X87 { .. } => {}
                _ => return self.drop_held(),
            }
        }
    }

    /// The outlines pushed since `first` come back to a place where flags are in the host's.
    pub fn flags_wanted(&mut self, first: usize) {
        let host = self.flags.host;
        for outline in &mut self.t.outlines[first..] {
            if let Outline::Slow { flags, .. } | Outline::SlowNear { flags, .. } | Outline::Moved { flags, .. } =
                outline
            {
                *flags = host;
            }
        }
    }
}
