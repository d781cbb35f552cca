//! Code that is rarely run, behind the block.

use std::mem::offset_of;

use super::{
    STACK, State,
    block::Work,
    emit::{Label, Mem, T0, T1, cc},
    flags::{self, Flags, Recipe},
    span,
    thunks::{PAGE, gpr, state},
    window::Window,
};
use crate::tlb::{Jump, PAGE_MASK};

/// A piece of it, and where it comes from and goes back to. `make`: how the flags get to memory, if they are not there.
/// `flags`: they are to be in the host's at `done`; `held`: the guest register that T1 is to be there. `scatter`: the
/// instruction, if its store may go to [`State::gathered`] and be scattered from there.
pub enum Outline {
    /// A memory access that missed.
    Slow {
        /// With `linear ^ tag` in T0 and the entry in T1; with the address in T0.
        missed: Label,
        again: Label,
        done: Label,
        site: u64,
        table: i32,
        flags: bool,
        held: Option<u8>,
        make: Option<Recipe>,
        /// The host's address is the sum of T0 and T1, else T0.
        pair: bool,
        scatter: Vec<u8>,
    },
    /// An instruction for the interpreter after all, in the middle of the block.
    Interpret {
        from: Label,
        done: Label,
        site: u64,
    },
    /// An instruction that ends the block, or is left to the interpreter after all.
    Last {
        from: Label,
        site: u64,
        make: Option<Recipe>,
    },
    /// A memory access that missed, where T1 is to be what its address lacks.
    SlowNear {
        missed: Label,
        again: Label,
        done: Label,
        own: Mem,
        site: u64,
        table: i32,
        flags: bool,
        held: Option<u8>,
        make: Option<Recipe>,
        scatter: Vec<u8>,
    },
    /// A memory access that is not in its window.
    Moved {
        missed: Label,
        again: Label,
        done: Label,
        site: u64,
        window: u64,
        form: Form,
        flags: bool,
        held: Option<u8>,
        make: Option<Recipe>,
        scatter: Vec<u8>,
    },
    /// A span that missed.
    Span {
        missed: Label,
        again: Label,
        /// Its window, and where it goes on when that was moved.
        moved: Option<(u64, Label)>,
        /// The operand that leads it.
        own: Mem,
        site: u64,
        reach: (i32, u32),
        make: Option<Recipe>,
    },
    /// A jump that is not patched yet: its displacement's place.
    Link {
        from: Label,
        to: i32,
        site: usize,
    },
    /// A jump to another page that is not patched for what is now.
    Across {
        missed: Label,
        to: i32,
        /// Where its data are.
        at: usize,
    },
    /// A request is pending.
    Called {
        from: Label,
        to: i32,
        make: Option<Recipe>,
    },
    CalledTo {
        from: Label,
    },
    /// The table's first place for a jump does not have it.
    Second {
        from: Label,
        found: Label,
        /// For an address that may not be canonical: the instruction, and what to add to RSP before it is done again.
        unsure: Option<(u64, i32)>,
    },
    /// Vectors must be brought in first.
    Vectors {
        from: Label,
        back: Label,
        at: i32,
        wanted: u32,
        make: Option<Recipe>,
    },
    /// The x87 state must be brought in first.
    X87 {
        from: Label,
        back: Label,
        at: i32,
        make: Option<Recipe>,
    },
}

/// How an access wants its address.
#[derive(Clone, Copy)]
pub enum Form {
    /// The host's, in T0.
    Sum,
    /// As the sum of T0 and T1.
    Pair,
    /// T1 is what the operand's own address lacks.
    Near(Mem),
}

impl Work<'_> {
    /// The access or span whose address (or `distance` in the window) is in T0 is not in its window: T1 is what the
    /// address in T0 lacks, if that could be moved; else the flags say "equal".
    fn move_window(&mut self, window: u64, distance: bool) {
        let thunk = self.thunks.window;
        let e = &mut self.t.emitter;
        if distance {
            e.rm(true, &[0x03], T0, Mem::Near(window + offset_of!(Window, start) as u64));
        }
        e.lea(T1, Mem::Near(window));
        e.call_address(thunk);
    }

    /// The access whose address is in T0 takes the slow path, and goes on at `again` with the host's address as `form`
    /// says; or behind the instruction as [`Outline`] says.
    fn reach_slowly(
        &mut self,
        site: u64,
        make: Option<Recipe>,
        form: Form,
        again: Label,
        scatter: &[u8],
        (flags, held, done): (bool, Option<u8>, Label),
    ) {
        let thunks = self.thunks;
        let e = &mut self.t.emitter;
        flags::make(e, make);
        e.constant(T1, site);
        e.call_address(thunks.slow);
        let interpreted = e.label();
        e.jcc(cc::E, interpreted);
        match form {
            Form::Sum => {}
            Form::Pair => e.constant(T1, 0),
            Form::Near(own) => {
                e.lea(T1, own);
                e.rr(true, &[0x29], T1, T0);
                e.mov(T1, T0);
            }
        }
        if scatter.is_empty() {
            e.jmp(again);
        } else {
            e.cmp_byte(state(offset_of!(State, scatters)), 0);
            e.jcc(cc::E, again);
            e.raw(scatter);
            e.call_address(thunks.scatter);
        }
        e.bind(interpreted);
        if flags {
            flags::unpack(e);
        }
        if let Some(guest) = held {
            e.load(T1, gpr(guest));
        }
        e.jmp(done);
    }

    pub(super) fn outlines(&mut self) {
        // SAFETY: the block is alive.
        let guest_page = unsafe { (*self.block).gpa } & !PAGE_MASK;
        while let Some(outline) = self.t.outlines.pop() {
            let thunks = self.thunks;
            let e = &mut self.t.emitter;
            match outline {
                Outline::Slow { missed, again, done, site, table, flags, held, make, pair, scatter } => {
                    e.bind(missed);
                    e.rm(true, &[0x33], T0, Mem::Base(T1, table));
                    let form = if pair { Form::Pair } else { Form::Sum };
                    self.reach_slowly(site, make, form, again, &scatter, (flags, held, done));
                }
                Outline::SlowNear { missed, again, done, own, site, table, flags, held, make, scatter } => {
                    e.bind(missed);
                    e.rm(true, &[0x33], T0, Mem::Base(T1, table));
                    self.reach_slowly(site, make, Form::Near(own), again, &scatter, (flags, held, done));
                }
                Outline::Moved { missed, again, done, site, window, form, flags, held, make, scatter } => {
                    e.bind(missed);
                    self.move_window(window, !matches!(form, Form::Pair));
                    let e = &mut self.t.emitter;
                    let slow = e.label();
                    e.jcc(cc::E, slow);
                    if matches!(form, Form::Sum) {
                        e.rr(true, &[0x01], T1, T0);
                    }
                    e.jmp(again);
                    e.bind(slow);
                    self.reach_slowly(site, make, form, again, &scatter, (flags, held, done));
                }
                Outline::Span { missed, again, moved, own, site, reach, make } => {
                    e.bind(missed);
                    if let Some((window, moved)) = moved {
                        self.move_window(window, true);
                        self.e().jcc(cc::NE, moved);
                    }
                    let e = &mut self.t.emitter;
                    flags::make(e, make);
                    e.lea(T0, own);
                    span::note(e, reach);
                    e.constant(T1, site);
                    e.call_address(thunks.span);
                    e.jmp(again);
                }
                Outline::Interpret { from, done, site } => {
                    e.bind(from);
                    e.constant(T1, site);
                    e.call_address(thunks.careful);
                    e.jmp(done);
                }
                Outline::Last { from, site, make } => {
                    e.bind(from);
                    flags::make(e, make);
                    e.constant(T1, site);
                    e.jmp_address(thunks.last);
                }
                Outline::Link { from, to, site } => {
                    e.bind(from);
                    e.constant(T1, guest_page);
                    e.store(T1, state(offset_of!(State, target)));
                    e.constant(T0, to as u64);
                    e.constant(T1, site as u64);
                    e.jmp_address(thunks.leave_link);
                }
                Outline::Across { missed, to, at } => {
                    e.bind(missed);
                    e.load(T0, PAGE);
                    e.lea(T0, Mem::Base(T0, to));
                    // After a while one of those that miss leaves to be patched.
                    let look_up = e.label();
                    e.group1_mem(false, 5, state(offset_of!(State, patience)), 1);
                    e.jcc(cc::NS, look_up);
                    e.constant(T1, at as u64);
                    e.jmp_address(thunks.leave_cross);
                    e.bind(look_up);
                    self.flags_set(Flags::IN_MEMORY, None);
                    self.jump_to(false, None);
                }
                Outline::Called { from, to, make } => {
                    e.bind(from);
                    flags::make(e, make);
                    e.constant(T0, to as u64);
                    e.jmp_address(thunks.leave_at);
                }
                Outline::CalledTo { from } => {
                    e.bind(from);
                    e.jmp_address(thunks.leave_to);
                }
                Outline::Second { from, found, unsure } => {
                    e.bind(from);
                    e.group1(true, 6, T1, size_of::<Jump>() as i32);
                    e.rm(true, &[0x3b], T0, Mem::Base(T1, offset_of!(Jump, rip) as i32));
                    e.jcc(cc::E, found);
                    if let Some((site, size)) = unsure {
                        e.compare_canonical();
                        e.jcc_address(cc::E, thunks.leave_to);
                        if size != 0 {
                            e.lea(STACK, Mem::Base(STACK, size));
                        }
                        e.constant(T1, site);
                        e.jmp_address(thunks.last);
                    } else {
                        e.jmp_address(thunks.leave_to);
                    }
                }
                Outline::X87 { from, back, at, make } => {
                    e.bind(from);
                    flags::make(e, make);
                    e.constant(T0, at as u64);
                    e.call_address(thunks.x87);
                    e.jmp(back);
                }
                Outline::Vectors { from, back, at, wanted, make } => {
                    e.bind(from);
                    flags::make(e, make);
                    e.constant(T0, at as u64);
                    e.constant(T1, u64::from(wanted));
                    e.call_address(thunks.vectors);
                    e.jmp(back);
                }
            }
        }
    }
}
