//! The run loop: from block to block, and everything that happens between them.

use std::{
    ptr,
    sync::atomic::{Ordering, fence},
    time::Instant,
};

use vireo_cpu::Exit;

use crate::{
    cache::Block,
    cpu::{Cpu, mode, rflags},
    fault::{Fault, Run, vector},
    machine::Letter,
    ops,
    regs::slot,
    signal::request,
    tlb::PAGE_MASK,
    translate::{self, Left, span},
    uop::Ctl,
};

/// For how long a host that kept a vCPU waiting is taken to be busy.
const CROWDED_NS: u64 = 50_000_000;

impl Cpu {
    /// Runs until a kick or a crash.
    pub fn run_loop(&mut self) -> Exit {
        self.forget_next();
        translate::point_gs(self.translated.cpu);
        self.go_on();
        loop {
            if self.is_called() || self.halted || self.wait_for_sipi {
                if let Some(exit) = self.attend() {
                    return exit;
                }
                if self.halted || self.wait_for_sipi {
                    continue;
                }
            }
            let entered = self.translated.counts.then(Instant::now);
            let crashed = self.crash.is_some() || self.run_blocks() == Ctl::Crash;
            if let Some(entered) = entered {
                self.counters.running += entered.elapsed().as_nanos() as u64;
            }
            if crashed {
                let crash = self.crash.take().unwrap_or_else(|| vireo_cpu::CrashInfo {
                    vcpu: self.id,
                    reason: "unknown".to_owned(),
                    rip: self.rip,
                    rsp: self.regs.gpr[4],
                    cr3: self.cr3,
                });
                return Exit::Crash(crash);
            }
        }
    }

    /// Runs blocks until a request is pending, the vCPU halts, or the guest crashes.
    fn run_blocks(&mut self) -> Ctl {
        loop {
            // STI and MOV SS hold interrupts off for one instruction: it runs alone if one waits.
            let held_off = std::mem::take(&mut self.shadow);
            let alone = held_off && self.signal.pending() != 0;
            if alone {
                self.mode |= mode::SINGLE;
                self.forget_next();
            }
            let mut block = self.next;
            // SAFETY: links lead to blocks of our own cache, which live until it is cleared (and all links with it).
            if block.is_null() || unsafe { !(*block).valid } {
                block = self.remembered();
            }
            if block.is_null() {
                block = match self.find_block() {
                    Ok(block) => block,
                    Err(_) => {
                        if self.deliver_fault() == Ctl::Crash {
                            return Ctl::Crash;
                        }
                        self.forget_next();
                        // A handler that cannot be fetched faults for ever.
                        if self.is_called() {
                            return Ctl::Next;
                        }
                        continue;
                    }
                };
            }
            let single = self.mode & mode::SINGLE != 0;
            if single && self.instruction_breakpoint() {
                if self.deliver_fault() == Ctl::Crash {
                    return Ctl::Crash;
                }
                // So does one with a breakpoint on itself.
                if self.is_called() {
                    return Ctl::Next;
                }
                continue;
            }
            let stepping = single && self.rflags & rflags::TF != 0;
            let resumed = self.rflags & rflags::RF != 0;
            let start = self.rip;
            self.transferred = false;
            self.block = block;
            self.regs.gpr[slot::BLOCK] = self.rip;
            match self.translated.left {
                Left::Link => self.link_translation(block),
                Left::Cross => self.link_across(block),
                _ => {}
            }
            let looking = self.trace.left != 0;
            let ctl = if self.verifier.is_some() {
                // SAFETY: as above.
                unsafe { self.run_in_lockstep(block, single) }
            } else if !single && !self.translated.interpret && !looking && self.is_translated(block) {
                // SAFETY: a translation of a block that is alive.
                unsafe { self.run_translation(block) }
            } else {
                self.translated.interpret = false;
                if looking {
                    self.look_at(block);
                }
                // SAFETY: as above.
                unsafe { self.interpret(block) }
            };
            if !self.suspended.is_empty() {
                self.resume_block();
            }
            if alone {
                self.refresh();
            } else if held_off && ctl == Ctl::Next && self.rip == start {
                // A translation may leave before its first instruction.
                self.shadow = true;
            }
            match ctl {
                Ctl::Next => {}
                Ctl::Fault => {
                    if self.deliver_fault() == Ctl::Crash {
                        return Ctl::Crash;
                    }
                    self.forget_next();
                }
                Ctl::Halt => {
                    self.halted = true;
                    self.shadow = false;
                    return Ctl::Next;
                }
                Ctl::Crash => return Ctl::Crash,
            }
            if single {
                // But for the one that IRET has just loaded: it is for the next instruction.
                if resumed {
                    self.rflags &= !rflags::RF;
                }
                // A load of SS holds its own back until the next instruction is done, INT n and SYSCALL with the entry
                // that they make (Intel SDM vol. 3, 7.8.3); a fault of it drops them.
                let held = self.shadow && ctl == Ctl::Next;
                let hits = if held { 0 } else { std::mem::take(&mut self.breakpoint_hits) };
                let stepped = stepping && !self.transferred;
                if (stepped || hits != 0) && ctl == Ctl::Next {
                    self.debug[4] = self.debug[4] & !15 | hits | u64::from(stepped) << 14;
                    self.fault = Fault::new(vector::DB);
                    if self.deliver_fault() == Ctl::Crash {
                        return Ctl::Crash;
                    }
                    self.forget_next();
                }
            }
            if self.is_called() {
                return Ctl::Next;
            }
        }
    }

    /// Runs a block in the interpreter.
    ///
    /// # Safety
    /// The block is alive and where `rip` is.
    #[inline(always)]
    pub unsafe fn interpret(&mut self, block: *const Block) -> Ctl {
        // SAFETY: the caller's word; a block's ops are handlers made for it.
        unsafe {
            self.counters.instructions += u64::from((*block).count);
            self.counters.blocks += 1;
            let first = (*block).ops;
            ((*first).handler)(self, first)
        }
    }

    /// Whether there is a translation of this block; makes one when the time has come.
    #[inline(always)]
    pub fn is_translated(&mut self, block: *const Block) -> bool {
        // SAFETY: the block is alive, and this is the thread that owns the cache.
        let block = unsafe { &mut *block.cast_mut() };
        if block.entry != 0 {
            return true;
        }
        block.runs_left = block.runs_left.wrapping_sub(1);
        block.runs_left == 0 && self.translate_block(block)
    }

    /// Has jumps of translated code find the translation of this block, which is alive and where `rip` is.
    #[inline(always)]
    unsafe fn remember_translation(&mut self, block: *mut Block) {
        let (linear, user) = (self.rip, self.cpl == 3);
        // SAFETY: the caller's word; this is the thread that owns the cache.
        let (code, gpa) = unsafe { ((*block).code, (*block).gpa) };
        if self.tlb.code(user).jumps_to(linear, code) {
            return;
        }
        // What is known of the page says how long that is true.
        if self.translate_fetch(linear).ok() != Some(gpa & !PAGE_MASK) {
            return;
        }
        self.tlb.code(user).remember_code(linear, code);
        // SAFETY: as above.
        unsafe { (*block).linear = linear };
    }

    /// Runs translated code until it leaves.
    ///
    /// # Safety
    /// The block is alive, translated, and where `rip` is.
    pub unsafe fn run_translation(&mut self, block: *const Block) -> Ctl {
        self.prepare_translation();
        // SAFETY: the caller's word.
        unsafe { self.remember_translation(block.cast_mut()) };
        let enter = self.cache.code.thunks.enter;
        self.translated.running = true;
        let entered = self.translated.counts.then(Instant::now);
        // SAFETY: the caller's word. GS was pointed at this `Cpu` when the thread entered the run loop.
        unsafe { translate::enter(enter, self, (*block).code) };
        if let Some(entered) = entered {
            self.counters.translated.running += entered.elapsed().as_nanos() as u64;
        }
        self.translated.running = false;
        if self.trace.eager {
            self.be_eager();
        }
        self.translated.clears = self.cache.clears;
        // Whatever left the code to the interpreter said in which block it was.
        let at = self.block;
        // Whoever comes next must not take this block for the one that a link leads from.
        self.block = ptr::null();
        self.link = ptr::null_mut();
        match self.translated.left {
            Left::Next | Left::Link | Left::Cross => self.next = ptr::null(),
            Left::Interpret => {
                self.next = ptr::null();
                self.translated.interpret = true;
                // SAFETY: the block is alive: nothing was decoded meanwhile.
                if unsafe { (*at).crossings } == span::CROSSINGS {
                    // SAFETY: as above.
                    unsafe { (*at.cast_mut()).crossings += 1 };
                    self.translate_again(at.cast_mut());
                }
            }
            Left::Handler => {
                self.next = ptr::null();
                return self.translated.ctl;
            }
        }
        Ctl::Next
    }

    /// The translated block at `rip`, if an instruction that was left to the interpreter was followed by it at once:
    /// what the run loop would do between the two is done here.
    pub fn successor(&mut self) -> *const Block {
        let t = &self.translated;
        let on = t.left == Left::Next || (t.left == Left::Handler && t.ctl == Ctl::Next);
        let plain = self.mode & !mode::USER == mode::CODE64 && !self.shadow && self.signal.pending() == 0;
        if !on || !plain || self.crash.is_some() || !self.suspended.is_empty() {
            return ptr::null();
        }
        // SAFETY: `code` points at a set of our own TLB; remembered blocks are alive.
        unsafe {
            let block = (*self.code).place(self.rip);
            let usable = !block.is_null() && (*block).valid && (*block).entry != 0 && (*block).mode == self.mode;
            if !usable || !self.is_whole(block) {
                return ptr::null();
            }
            self.transferred = false;
            self.link = ptr::null_mut();
            self.next = ptr::null();
            self.block = block;
            self.prepare_translation();
            block
        }
    }

    /// Puts what translated code looks at in order.
    #[inline(always)]
    fn prepare_translation(&mut self) {
        self.counters.translated.entries += 1;
        self.translated.page = self.rip & !PAGE_MASK;
        // SAFETY: `code` points at a set of our own TLB. Whatever changes it leaves translated code.
        self.translated.generation = unsafe { (*self.code).generation };
        self.look_at_x87();
        self.look_at_tsc();
    }

    /// Replaces a translation, and those that go on with it; whoever jumps to the old ones comes to the new.
    pub fn translate_again(&mut self, block: *mut Block) {
        let mut all = self.cache.heads(block).to_vec();
        all.push(block);
        for block in all {
            // SAFETY: blocks live until the cache is cleared, which forgets who is whose head.
            unsafe { self.translate_anew(block) };
        }
    }

    /// # Safety
    /// The block is alive.
    pub unsafe fn translate_anew(&mut self, block: *mut Block) {
        // A window of the old one may be all that tells that this vCPU wrote to a page.
        self.see_letters();
        // SAFETY: the caller's word.
        unsafe {
            let (old, code) = ((*block).entry, (*block).code);
            if old != 0 && (*block).valid && self.translate_block(block) {
                self.cache.code.cut(old as usize, (*block).entry as usize);
                let set = self.tlb.code((*block).mode & mode::USER != 0);
                set.replace_code((*block).linear, code, (*block).code);
            }
        }
    }

    /// Translated code left by a jump that may lead to this block's translation from now on.
    fn link_translation(&mut self, block: *const Block) {
        self.translated.left = Left::Next;
        // SAFETY: the block is alive.
        let (entry, page) = unsafe { ((*block).entry, (*block).gpa & !PAGE_MASK) };
        // A page may have been mapped elsewhere since the jump was taken.
        if entry != 0 && page == self.translated.target && self.translated.clears == self.cache.clears {
            self.counters.translated.links += 1;
            self.cache.code.patch(self.translated.site as usize, entry as usize);
        }
    }

    /// The same for a jump to another page: it may lead there while translations of code stay what they are.
    fn link_across(&mut self, block: *const Block) {
        self.translated.left = Left::Next;
        self.translated.patience = translate::PATIENCE;
        // SAFETY: the block is alive, and `code` points at a set of our own TLB.
        let (entry, generation) = unsafe { ((*block).entry, (*self.code).generation) };
        let same = self.translated.generation == generation && self.translated.clears == self.cache.clears;
        if entry != 0 && same {
            self.counters.translated.links += 1;
            let (data, page) = (self.translated.site as usize, self.translated.page);
            self.cache.code.patch_cross(data, generation, page, entry as usize);
        }
    }

    /// Whether requests are to be attended to now. What holds off interrupts does not hold off a kick: a guest can
    /// load SS for ever.
    #[inline(always)]
    fn is_called(&self) -> bool {
        let pending = self.signal.pending();
        pending != 0 && (!self.shadow || pending & request::KICK != 0)
    }

    /// The block at `rip`, if it started here lately and there is no link to fill: most jumps to other pages.
    #[inline(always)]
    fn remembered(&mut self) -> *const Block {
        let fillable = !self.link.is_null() && (self.rip ^ self.regs.gpr[slot::BLOCK]) & !PAGE_MASK == 0;
        if fillable || !self.code64() {
            return ptr::null();
        }
        // SAFETY: `code` points at a set of our own TLB; remembered blocks live until the cache is cleared, which
        // forgets them.
        unsafe {
            let block = (*self.code).place(self.rip);
            if block.is_null() || (*block).mode != self.mode || !(*block).valid || !self.is_whole(block) {
                return ptr::null();
            }
            self.link = ptr::null_mut();
            block
        }
    }

    /// The block at `rip`, decoded if need be, and linked to from where we come.
    #[inline(never)]
    fn find_block(&mut self) -> Run<*const Block> {
        let linear = if self.code64() { self.rip } else { self.seg[1].base.wrapping_add(self.rip) & 0xffff_ffff };
        let link = std::mem::replace(&mut self.link, ptr::null_mut());
        let came_from = self.block;
        let clears = self.cache.clears;
        let user = self.cpl == 3;
        let mut block = self.tlb.code(user).place(linear);
        // SAFETY: remembered blocks live until the cache is cleared, which forgets them.
        if block.is_null() || unsafe { (*block).mode != self.mode || !(*block).valid || !self.is_whole(block) } {
            block = self.look_up(linear)?;
        }
        // Within a page a direct jump always leads to the same block, as long as both live.
        if !link.is_null() && self.cache.clears == clears && (self.code64() || self.seg[1].base == 0) {
            // SAFETY: as above; `link` lies in the block that ran last, and the cache was not cleared since.
            unsafe {
                let (from, to) = (&*came_from, &*block);
                let same_page =
                    (self.regs.gpr[slot::BLOCK] ^ self.rip) & !PAGE_MASK == 0 && (from.gpa ^ to.gpa) & !PAGE_MASK == 0;
                let whole = from.second_page.is_none() && to.second_page.is_none();
                if same_page && whole && from.valid && from.mode == to.mode {
                    *link = block;
                }
            }
        }
        Ok(block)
    }

    /// Whether an instruction that crosses pages is known to go on where it did.
    ///
    /// # Safety
    /// The block is alive.
    #[inline(always)]
    unsafe fn is_whole(&self, block: *const Block) -> bool {
        // SAFETY: the caller's word; `code` points at a set of our own TLB.
        unsafe { (*block).second_page.is_none() || (*block).checked == (*self.code).generation }
    }

    fn look_up(&mut self, linear: u64) -> Run<*const Block> {
        if !self.code64() && self.protected() && self.rip > u64::from(self.seg[1].limit) {
            return self.gp(0);
        }
        if self.cpl == 3 && self.shared.first_user.get().is_none() {
            let _ = self.shared.first_user.set(std::time::Instant::now());
        }
        let gpa = self.translate_fetch(linear)?;
        let mut block = self.cache.find(gpa | (linear & PAGE_MASK), self.mode);
        // SAFETY: blocks that the cache finds are alive.
        if !block.is_null()
            && let Some(second) = unsafe { (*block).second_page }
        {
            // The instruction goes on where the next page is mapped now.
            let now = self.translate_fetch((linear | PAGE_MASK).wrapping_add(1))?;
            if now != second {
                self.cache.invalidate_page(gpa, ops::abort);
                block = ptr::null();
            }
        }
        if block.is_null() {
            block = self.decode_block(linear, gpa)?;
        }
        // SAFETY: as above.
        unsafe {
            let long = self.code64();
            let code = self.tlb.code(self.cpl == 3);
            if (*block).second_page.is_some() {
                code.note_page((linear | PAGE_MASK).wrapping_add(1));
                (*block.cast_mut()).checked = code.generation;
            }
            if long || (*block).second_page.is_none() {
                code.remember(linear, block);
            }
        }
        Ok(block)
    }

    /// Whether the instruction at `rip` has a breakpoint (DR7: enabled, R/W 00, length 00); notes the fault.
    fn instruction_breakpoint(&mut self) -> bool {
        let control = self.debug[5];
        if control & 0xff == 0 || self.rflags & rflags::RF != 0 {
            return false;
        }
        let linear = if self.code64() { self.rip } else { self.seg[1].base.wrapping_add(self.rip) & 0xffff_ffff };
        let hits = (0..4u64)
            .filter(|i| control >> (i * 2) & 3 != 0 && control >> (16 + i * 4) & 15 == 0)
            .filter(|&i| self.debug[i as usize] == linear)
            .fold(0, |bits, i| bits | 1 << i);
        if hits != 0 {
            let held = std::mem::take(&mut self.breakpoint_hits);
            self.debug[4] = self.debug[4] & !15 | hits | held;
            self.fault = Fault::new(vector::DB);
            self.forget_next();
        }
        hits != 0
    }

    /// The next block must be looked up.
    pub fn forget_next(&mut self) {
        self.next = ptr::null();
        self.link = ptr::null_mut();
        self.translated.left = Left::Next;
    }

    /// Works off pending requests, and sleeps while halted.
    fn attend(&mut self) -> Option<Exit> {
        loop {
            if self.signal.take(request::KICK) != 0 {
                return Some(Exit::Kicked);
            }
            let requests = self.signal.take(!request::KICK);
            if requests & request::CODE != 0 {
                self.drop_changed_code();
            }
            if requests & request::TIMER != 0 {
                self.apic.timer_due();
                self.look_at_waits();
            }
            if requests & request::HOT != 0 {
                self.look_for_heat();
            }
            if requests & request::INIT != 0 {
                self.init();
            }
            if requests & request::SIPI != 0 && self.wait_for_sipi {
                self.start_up();
            }
            self.nmi_pending |= requests & request::NMI != 0;
            if self.wait_for_sipi {
                self.signal.sleep(None);
                continue;
            }
            if self.nmi_pending && !self.nmi_masked {
                self.nmi_pending = false;
                self.nmi_masked = true;
                self.halted = false;
                self.external(vector::NMI);
                return None;
            }
            if self.rflags & rflags::IF != 0
                && self.apic.pending().is_some()
                && let Some(number) = self.apic.accept()
            {
                self.halted = false;
                self.external(number);
                return None;
            }
            if !self.halted {
                return None;
            }
            if self.signal.pending() == 0 {
                self.park_fpu();
                self.steal.halts(&self.memory);
                if self.shared.is_crowded(self.clock.vm().ns()) {
                    self.signal.lose_patience();
                }
                self.signal.sleep(None);
                self.go_on();
            }
        }
    }

    /// Nothing of the guest's was read or written for a while.
    fn go_on(&mut self) {
        if self.steal.goes_on(&self.memory) {
            self.counters.flushes_asked += 1;
            self.see_letters();
            self.tlb.flush_all();
            self.forget_next();
        }
        self.look_at_waits();
    }

    /// Whether this vCPU's thread had to wait for a processor of the host.
    fn look_at_waits(&mut self) {
        let now = self.clock.vm().ns();
        if self.steal.account(now, &self.memory) {
            self.shared.is_crowded_until(now + CROWDED_NS);
        }
    }

    fn external(&mut self, number: u8) {
        self.forget_next();
        // A crash is found by the run loop: `crash` is set and the next fault meets it.
        if self.deliver_external(number) == Ctl::Crash && self.crash.is_none() {
            self.crash_with("an interrupt could not be delivered".to_owned());
        }
    }

    /// Makes the running block end behind the current instruction, so that an interrupt which that instruction
    /// brought about is taken there: every op of the block leads out of it until [`Self::resume_block`].
    pub fn leave_soon(&mut self) {
        let alone = self.translated.alone.is_some();
        if self.block.is_null() || alone || !self.suspended.is_empty() || self.signal.pending() == 0 {
            return;
        }
        // SAFETY: the running block is alive and belongs to our own cache.
        unsafe {
            let block = &*self.block;
            for i in 0..block.abortable as usize {
                let op = block.ops.cast_mut().add(i);
                self.suspended.push((op, (*op).handler));
                (*op).handler = ops::abort;
            }
        }
    }

    #[cold]
    fn resume_block(&mut self) {
        for (op, handler) in std::mem::take(&mut self.suspended) {
            // SAFETY: nothing was decoded since the block was suspended, so its ops are where they were.
            unsafe {
                if (*self.block).valid {
                    (*op).handler = handler;
                }
            }
        }
    }

    /// What other vCPUs and devices did to code.
    pub fn drop_changed_code(&mut self) {
        self.translated.news = self.translated.news.wrapping_add(1);
        let mail = self.mail.clone();
        for letter in mail.take() {
            match letter {
                Letter::Changed(page) => self.cache.invalidate_page(page, ops::abort),
                Letter::Watched(page) => {
                    let Some(host) = self.memory.host_page(page) else { continue };
                    // What we wrote until now nobody noticed: the others decode it again.
                    if self.tlb.forbid_writes(host) {
                        self.shared.code_changed(page, Some(self.id));
                    }
                }
            }
        }
        self.forget_next();
    }

    /// This vCPU wrote to a page that has code: drop that code everywhere.
    pub fn code_written(&mut self, gpa: u64) {
        self.counters.code_writes += 1;
        let page = gpa & !PAGE_MASK;
        self.memory.unwatch_page(page);
        self.cache.invalidate_page(page, ops::abort);
        self.shared.code_changed(page, Some(self.id));
    }

    /// From now on a write to these bytes of the page that is at `host` is noticed, whoever makes it. They are to be
    /// read after this, or read again: see [`crate::machine`].
    pub fn watch_code(&mut self, gpa: u64, bytes: usize, host: *mut u8) {
        let page = gpa & !PAGE_MASK;
        let newly = !self.memory.watch(gpa, bytes as u64);
        fence(Ordering::SeqCst);
        if newly || !self.cache.has_page(page) {
            self.tlb.forbid_writes(host);
        }
        if newly {
            self.shared.code_watched(page, self.id);
        }
    }

    /// Forgets all decoded code.
    pub fn clear_code(&mut self) {
        // Windows go, too.
        self.see_letters();
        self.cache.clear();
        self.forget_places();
    }

    /// Forgets decoded code that was not of use lately, and all translations. No block is running.
    pub fn make_room(&mut self) {
        if self.stubs_full || !self.suspended.is_empty() {
            return self.clear_code();
        }
        self.see_letters();
        self.cache.collect();
        self.forget_places();
    }

    /// Forgets where code was: that is other code's place now.
    fn forget_places(&mut self) {
        self.suspended.clear();
        self.tlb.flush_jumps();
        self.tlb.windows.clear();
        self.translated.again.clear();
        self.forget_trace();
        if self.stubs_full {
            self.stubs.flush();
            self.kept_stubs.clear();
            self.kept_specials.clear();
            self.stubs_full = false;
        }
        self.forget_next();
        self.block = ptr::null();
    }

    pub fn keep_stub(&mut self, stub: crate::native::Stub) -> *const crate::native::Stub {
        &raw const **self.kept_stubs.entry(stub.entry as usize).or_insert_with(|| Box::new(stub))
    }

    pub fn keep_special(&mut self, special: crate::native::Special) -> *const crate::native::Special {
        if let Some(kept) = self.kept_specials.iter().find(|kept| ***kept == special) {
            return &raw const **kept;
        }
        self.kept_specials.push(Box::new(special));
        &raw const **self.kept_specials.last().unwrap_or_else(|| unreachable!("just pushed"))
    }

    pub fn mmio_read(&mut self, gpa: u64, data: &mut [u8]) {
        if let Some(base) = self.apic.mmio_base()
            && gpa & !PAGE_MASK == base
        {
            let offset = (gpa - base) as u32;
            let value = self.apic.mmio_read(offset & !15).to_le_bytes();
            let from = (offset & 15) as usize;
            for (i, byte) in data.iter_mut().enumerate() {
                *byte = value.get(from + i).copied().unwrap_or(0);
            }
            return;
        }
        self.park_fpu();
        self.bus().mmio_read(gpa, data);
    }

    pub fn mmio_write(&mut self, gpa: u64, data: &[u8]) {
        if let Some(base) = self.apic.mmio_base()
            && gpa & !PAGE_MASK == base
        {
            if let &[a, b, c, d, ..] = data
                && let Some(vector) = self.apic.mmio_write((gpa - base) as u32, u32::from_le_bytes([a, b, c, d]))
            {
                self.park_fpu();
                self.bus().eoi(vector);
            }
            self.leave_soon();
            return;
        }
        self.park_fpu();
        self.bus().mmio_write(gpa, data);
        self.leave_soon();
    }
}
