//! Guest memory as instructions see it: linear addresses, paging, permissions (Intel SDM vol. 3, chapter 5).

use std::{
    ptr,
    sync::atomic::{AtomicU32, AtomicU64, Ordering, fence},
};

use crate::{
    cpu::{Cpu, cr0, cr4, efer, rflags},
    fault::{Fault, NON_CANONICAL, Run, page_fault, vector},
    int::Int,
    signal::request,
    tlb::{DataSet, PAGE_MASK, index},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read,
    Write,
    Fetch,
}

/// Where a linear page leads.
#[derive(Clone, Copy, Debug)]
pub struct Translation {
    /// Guest-physical address of the 4 KiB page.
    pub gpa: u64,
    /// Size of the page that the tables gave, as a power of two.
    pub shift: u32,
    /// The same in all address spaces (CR4.PGE and the entry's G bit).
    pub global: bool,
}

mod pte {
    pub const PRESENT: u64 = 1;
    pub const WRITE: u64 = 2;
    pub const USER: u64 = 4;
    pub const ACCESSED: u64 = 32;
    pub const DIRTY: u64 = 64;
    pub const LARGE: u64 = 128;
    pub const GLOBAL: u64 = 256;
    pub const NX: u64 = 1 << 63;
}

/// Where the byte at a linear address is, as the TLB has it.
#[derive(Clone, Copy)]
struct Known {
    host: *mut u8,
    /// Its guest-physical address, if a write is to be followed by [`Cpu::settle`].
    gpa: Option<u64>,
}

/// Guest-physical address bits that CPUID 0x80000008 tells.
pub const PHYSICAL_BITS: u32 = 46;
const ADDRESS: u64 = ((1 << PHYSICAL_BITS) - 1) & !PAGE_MASK;
const RESERVED_HIGH: u64 = ((1 << 52) - 1) & !((1 << PHYSICAL_BITS) - 1);

pub const fn canonical(linear: u64) -> bool {
    ((linear as i64) << 16) >> 16 == linear as i64
}

/// One step of a page walk.
struct Level {
    /// Address bits below this level's index.
    shift: u32,
    /// Bits of its index.
    bits: u32,
    /// Whether an entry may map a large page.
    large: bool,
}

const LONG: [Level; 4] = [
    Level { shift: 39, bits: 9, large: false },
    Level { shift: 30, bits: 9, large: true },
    Level { shift: 21, bits: 9, large: true },
    Level { shift: 12, bits: 9, large: false },
];
const PAE: [Level; 3] = [
    Level { shift: 30, bits: 2, large: false },
    Level { shift: 21, bits: 9, large: true },
    Level { shift: 12, bits: 9, large: false },
];
const LEGACY: [Level; 2] = [Level { shift: 22, bits: 10, large: true }, Level { shift: 12, bits: 10, large: false }];

impl Cpu {
    /// Loads a value from a linear address with the current privilege.
    #[inline(always)]
    pub fn load<T: Int>(&mut self, linear: u64) -> Run<T> {
        // SAFETY: `data` points at a set of our own TLB.
        let entry = unsafe { (*self.data).read.get_unchecked(index(linear)) };
        if let Some(host) = entry.find(linear, T::BYTES as u64) {
            // SAFETY: a TLB entry leads to a page of guest RAM, and first and last byte are in it.
            return Ok(unsafe { ptr::read_unaligned(host as *const T) });
        }
        self.load_slow(linear, false)
    }

    #[inline(always)]
    pub fn store<T: Int>(&mut self, linear: u64, value: T) -> Run {
        // SAFETY: as in `load`.
        let entry = unsafe { (*self.data).write.get_unchecked(index(linear)) };
        if let Some(host) = entry.find(linear, T::BYTES as u64) {
            // SAFETY: as in `load`.
            unsafe { ptr::write_unaligned(host as *mut T, value) };
            return Ok(());
        }
        self.store_slow(linear, value, false)
    }

    /// Loads with supervisor privilege, whatever CPL is: descriptor tables, task state.
    #[inline]
    pub fn load_system<T: Int>(&mut self, linear: u64) -> Run<T> {
        // SAFETY: as in `load`.
        let entry = unsafe { (*self.system_data).read.get_unchecked(index(linear)) };
        if let Some(host) = entry.find(linear, T::BYTES as u64) {
            // SAFETY: as in `load`.
            return Ok(unsafe { ptr::read_unaligned(host as *const T) });
        }
        self.load_slow(linear, true)
    }

    #[inline]
    pub fn store_system<T: Int>(&mut self, linear: u64, value: T) -> Run {
        // SAFETY: as in `load`.
        let entry = unsafe { (*self.system_data).write.get_unchecked(index(linear)) };
        if let Some(host) = entry.find(linear, T::BYTES as u64) {
            // SAFETY: as in `load`.
            unsafe { ptr::write_unaligned(host as *mut T, value) };
            return Ok(());
        }
        self.store_slow(linear, value, true)
    }

    #[cold]
    #[inline(never)]
    fn load_slow<T: Int>(&mut self, linear: u64, system: bool) -> Run<T> {
        if crosses(linear, T::BYTES as u64)
            && let Some((a, b)) = self.known_pair(linear, T::BYTES as u64, false, system)
        {
            let here = 8 * (0x1000 - (linear & PAGE_MASK) as usize);
            // SAFETY: the last and the first eight bytes of two pages of guest RAM.
            let (low, high) = unsafe {
                let end = a.host.add(here / 8).sub(8).cast::<u64>();
                (end.read_unaligned(), b.host.cast::<u64>().read_unaligned())
            };
            return Ok(T::from_u64(low >> (64 - here) | high << here));
        }
        let mut bytes = [0; 8];
        self.read_bytes(linear, &mut bytes[..T::BYTES], system)?;
        Ok(T::from_u64(u64::from_le_bytes(bytes)))
    }

    #[cold]
    #[inline(never)]
    fn store_slow<T: Int>(&mut self, linear: u64, value: T, system: bool) -> Run {
        self.write_bytes(linear, &value.to_u64().to_le_bytes()[..T::BYTES], system)
    }

    /// Where the byte at `linear` is, if the TLB has its page: an access to it cannot fault.
    #[inline]
    fn known(&self, linear: u64, write: bool, system: bool) -> Option<Known> {
        // SAFETY: the sets are our own TLB's.
        let set = unsafe { &*(if system { self.system_data } else { self.data }) };
        let entry = if write { &set.write[index(linear)] } else { &set.read[index(linear)] };
        if let Some(host) = entry.find(linear, 1) {
            return Some(Known { host: host as *mut u8, gpa: None });
        }
        let (host, gpa) = if write { entry.find_watched(linear)? } else { return None };
        // Where the watch has ended there shall be a quick entry.
        self.memory.is_watched(gpa).then_some(Known { host: host as *mut u8, gpa: Some(gpa) })
    }

    /// Where the bytes of an access that crosses pages are, up to the page's end and from it on.
    #[inline]
    fn known_pair(&self, linear: u64, bytes: u64, write: bool, system: bool) -> Option<(Known, Known)> {
        let second = linear.wrapping_add(bytes - 1) & !PAGE_MASK;
        Some((self.known(linear, write, system)?, self.known(second, write, system)?))
    }

    /// Reads up to 64 bytes at a linear address, across pages and from devices.
    pub fn read_bytes(&mut self, linear: u64, out: &mut [u8], system: bool) -> Run {
        if !out.is_empty() && crosses(linear, out.len() as u64) {
            if let Some((a, b)) = self.known_pair(linear, out.len() as u64, false, system) {
                let (head, tail) = out.split_at_mut((0x1000 - (linear & PAGE_MASK)) as usize);
                // SAFETY: the end of a page of guest RAM, and the start of one.
                unsafe {
                    copy_out(a.host, head);
                    copy_out(b.host, tail);
                }
                return Ok(());
            }
        } else if let Some(known) = self.known(linear, false, system) {
            // SAFETY: the bytes do not leave the page.
            unsafe { copy_out(known.host, out) };
            return Ok(());
        }
        if self.inspect && !system {
            self.inspect_access(linear, out.len(), false)?;
        }
        let first = (0x1000 - (linear & PAGE_MASK)).min(out.len() as u64) as usize;
        let out_bytes = out.len() as u64;
        let (head, tail) = out.split_at_mut(first);
        if !tail.is_empty() {
            // Both pages must be there before a device sees anything.
            self.check_canonical(linear.wrapping_add(out_bytes - 1))?;
            self.translate_data(linear, Access::Read, system)?;
            self.translate_data(linear.wrapping_add(first as u64), Access::Read, system)?;
        }
        self.read_piece(linear, head, system)?;
        if tail.is_empty() { Ok(()) } else { self.read_piece(linear.wrapping_add(first as u64), tail, system) }
    }

    fn read_piece(&mut self, linear: u64, out: &mut [u8], system: bool) -> Run {
        let gpa = self.translate_data(linear, Access::Read, system)? | (linear & PAGE_MASK);
        match self.memory.host_page(gpa) {
            // SAFETY: the page is guest RAM and the piece does not leave it.
            Some(page) => unsafe { copy_out(page.add((gpa & PAGE_MASK) as usize), out) },
            None => self.device_read(gpa, out),
        }
        Ok(())
    }

    /// Writes up to 64 bytes at a linear address; nothing is written if any byte may not be.
    pub fn write_bytes(&mut self, linear: u64, data: &[u8], system: bool) -> Run {
        if !data.is_empty() && crosses(linear, data.len() as u64) {
            if let Some((a, b)) = self.known_pair(linear, data.len() as u64, true, system) {
                let (head, tail) = data.split_at((0x1000 - (linear & PAGE_MASK)) as usize);
                self.write_known(a, head);
                self.write_known(b, tail);
                return Ok(());
            }
        } else if let Some(known) = self.known(linear, true, system) {
            self.write_known(known, data);
            return Ok(());
        }
        if self.inspect && !system {
            self.inspect_access(linear, data.len(), true)?;
        }
        let first = (0x1000 - (linear & PAGE_MASK)).min(data.len() as u64) as usize;
        let (head, tail) = data.split_at(first);
        if !tail.is_empty() {
            self.check_canonical(linear.wrapping_add(data.len() as u64 - 1))?;
            self.translate_data(linear, Access::Write, system)?;
            self.translate_data(linear.wrapping_add(first as u64), Access::Write, system)?;
        }
        self.write_piece(linear, head, system)?;
        if tail.is_empty() { Ok(()) } else { self.write_piece(linear.wrapping_add(first as u64), tail, system) }
    }

    #[inline]
    fn write_known(&mut self, to: Known, data: &[u8]) {
        // SAFETY: guest RAM, and the callers see to it that the bytes do not leave the page.
        unsafe { copy_in(data, to.host) };
        if let Some(gpa) = to.gpa {
            self.settle(gpa, data.len());
        }
    }

    fn write_piece(&mut self, linear: u64, data: &[u8], system: bool) -> Run {
        let gpa = self.translate_data(linear, Access::Write, system)? | (linear & PAGE_MASK);
        match self.memory.host_page(gpa) {
            Some(page) => {
                // SAFETY: the page is guest RAM and the piece does not leave it.
                unsafe { copy_in(data, page.add((gpa & PAGE_MASK) as usize)) };
                self.settle(gpa, data.len());
            }
            None => self.device_write(gpa, data),
        }
        Ok(())
    }

    /// Devices take 1, 2, 4 or 8 bytes; anything else comes in such pieces.
    fn device_read(&mut self, gpa: u64, out: &mut [u8]) {
        self.counters.mmio += 1;
        let mut at = 0;
        while at < out.len() {
            let n = piece(gpa + at as u64, out.len() - at);
            self.mmio_read(gpa + at as u64, &mut out[at..at + n]);
            at += n;
        }
    }

    fn device_write(&mut self, gpa: u64, data: &[u8]) {
        self.counters.mmio += 1;
        let mut at = 0;
        while at < data.len() {
            let n = piece(gpa + at as u64, data.len() - at);
            self.mmio_write(gpa + at as u64, &data[at..at + n]);
            at += n;
        }
    }

    /// A host pointer to `len` bytes at `linear`, if they are one piece of RAM that may be accessed so
    /// directly (for writes: no cached code in it).
    #[inline(always)]
    pub fn direct(&mut self, linear: u64, len: u64, write: bool) -> Run<Option<*mut u8>> {
        // SAFETY: as in `load`.
        let set = unsafe { &(*self.data) };
        let entry = if write { &set.write[index(linear)] } else { &set.read[index(linear)] };
        if let Some(host) = entry.find(linear, len) {
            return Ok(Some(host as *mut u8));
        }
        self.direct_slow(linear, len, write)
    }

    #[cold]
    #[inline(never)]
    fn direct_slow(&mut self, linear: u64, len: u64, write: bool) -> Run<Option<*mut u8>> {
        let access = if write { Access::Write } else { Access::Read };
        let known = if crosses(linear, len) {
            self.known_pair(linear, len, write, false).is_some()
        } else {
            // It has code, or the quick way would have found it.
            write && self.known(linear, true, false).is_some()
        };
        if known {
            return Ok(None);
        }
        let last = linear.wrapping_add(len - 1);
        self.check_canonical(last)?;
        let gpa = self.translate_data(linear, access, false)?;
        if last & !PAGE_MASK != linear & !PAGE_MASK {
            // A fault there is told of the page's first byte.
            self.translate_data(last & !PAGE_MASK, access, false)?;
            return Ok(None);
        }
        if self.inspect || (write && self.memory.is_watched(gpa)) {
            return Ok(None);
        }
        // SAFETY: the offset stays in the page.
        Ok(self.memory.host_page(gpa).map(|page| unsafe { page.add((linear & PAGE_MASK) as usize) }))
    }

    /// Where [`Self::direct`] gave nothing: host pointer and guest-physical address, if it is one piece of RAM after
    /// all (with cached code in its page, or with breakpoints set). [`Self::settle`] must follow a write: this way it
    /// is one access of the host, which other vCPUs cannot get in between of.
    #[cold]
    #[inline(never)]
    pub fn in_ram(&mut self, linear: u64, len: u64, write: bool) -> Run<Option<(*mut u8, u64)>> {
        if crosses(linear, len) {
            return Ok(None);
        }
        if let Some(Known { host, gpa: Some(gpa) }) = self.known(linear, write, false) {
            return Ok(Some((host, gpa)));
        }
        let gpa =
            self.translate_data(linear, if write { Access::Write } else { Access::Read }, false)? | linear & PAGE_MASK;
        let Some(page) = self.memory.host_page(gpa) else { return Ok(None) };
        if self.inspect {
            self.inspect_access(linear, len as usize, write)?;
        }
        // SAFETY: the offset stays in the page.
        Ok(Some((unsafe { page.add((gpa & PAGE_MASK) as usize) }, gpa)))
    }

    /// After a write of `len` bytes that did not go through a TLB entry: drops the page's cached code, if they may be
    /// some of it.
    #[inline]
    pub fn settle(&mut self, gpa: u64, len: usize) {
        // Whoever decodes watches first and reads then; here it is the other way round, so that one sees the other.
        fence(Ordering::SeqCst);
        if self.memory.is_watched_at(gpa, len as u64) {
            self.code_written(gpa);
        }
    }

    /// What the TLB cannot do: alignment checks (SDM vol. 3, 7.15, #AC) and data breakpoints (18.2.4).
    fn inspect_access(&mut self, linear: u64, len: usize, write: bool) -> Run {
        let aligned = !len.is_power_of_two() || linear.is_multiple_of(len.min(8) as u64);
        if !aligned && self.cpl == 3 && self.cr0 & cr0::AM != 0 && self.rflags & rflags::AC != 0 {
            return self.raise(Fault::with(vector::AC, 0));
        }
        let control = self.debug[5];
        for i in 0..4u32 {
            let (kind, size) = (control >> (16 + i * 4) & 3, control >> (18 + i * 4) & 3);
            if control >> (i * 2) & 3 == 0 || !(kind == 3 || (kind == 1 && write)) {
                continue;
            }
            let bytes = [1, 2, 8, 4][size as usize];
            let start = self.debug[i as usize] & !(bytes - 1);
            if linear < start.wrapping_add(bytes) && start < linear.wrapping_add(len as u64) {
                self.breakpoint_hits |= 1 << i;
            }
        }
        Ok(())
    }

    /// An operand that ends in the hole of addresses is a #GP, whatever the page that it begins in.
    #[inline]
    fn check_canonical(&mut self, last: u64) -> Run {
        if !canonical(last) && self.code64() { self.raise(NON_CANONICAL) } else { Ok(()) }
    }

    /// Guest-physical page of a data access with the current (or supervisor) privilege; fills the TLB.
    fn translate_data(&mut self, linear: u64, access: Access, system: bool) -> Run<u64> {
        if !canonical(linear) && self.code64() {
            return self.raise(NON_CANONICAL);
        }
        self.counters.tlb_misses += 1;
        let user = self.cpl == 3 && !system;
        let ac = !system && self.rflags & rflags::AC != 0;
        let found = self.walk(linear, access, user, ac)?;
        let write = access == Access::Write;
        if write {
            // The entry that is replaced may be what a waiting letter asks for.
            self.see_letters();
        }
        if let Some(host) = self.memory.host_page(found.gpa)
            && (system || !self.inspect)
        {
            let set: *mut DataSet = if system { self.system_data } else { self.data };
            if write && let Some(verifier) = &mut self.verifier {
                verifier.about_to_write(host, found.gpa);
            }
            // SAFETY: the sets are our own TLB's.
            unsafe {
                if write && self.memory.is_watched(found.gpa) {
                    (*set).fill_watched(linear, host, &found);
                } else {
                    (*set).fill(linear, host, write, &found);
                }
            }
        }
        Ok(found.gpa)
    }

    /// Guest-physical page that instructions at `linear` come from; fills the TLB.
    pub fn translate_fetch(&mut self, linear: u64) -> Run<u64> {
        let user = self.cpl == 3;
        if let Some(gpa) = self.tlb.code(user).page(linear) {
            return Ok(gpa);
        }
        if !canonical(linear) && self.code64() {
            return self.gp(0);
        }
        let found = self.walk(linear, Access::Fetch, user, false)?;
        self.tlb.code(user).fill(linear, &found);
        Ok(found.gpa)
    }

    /// Works off news of code now, if there are any: before TLB entries or windows are dropped, by which it would be
    /// known that this vCPU may have written to a page.
    #[inline]
    pub fn see_letters(&mut self) {
        // Whoever posts one after this look reads what was written before it.
        fence(Ordering::SeqCst);
        if self.signal.pending() & request::CODE != 0 {
            self.drop_changed_code();
        }
    }

    /// Walks the page tables, sets accessed and dirty bits, and checks permissions.
    pub fn walk(&mut self, linear: u64, access: Access, user: bool, ac: bool) -> Run<Translation> {
        if self.cr0 & cr0::PG == 0 {
            return Ok(Translation { gpa: linear & 0xffff_f000, shift: 12, global: false });
        }
        loop {
            if let Some(found) = self.try_walk(linear, access, user, ac)? {
                return Ok(found);
            }
        }
    }

    /// `None` where an entry changed while it was looked at.
    fn try_walk(&mut self, linear: u64, access: Access, user: bool, ac: bool) -> Run<Option<Translation>> {
        let wide = self.cr4 & cr4::PAE != 0;
        let (levels, mut table): (&[Level], u64) = if self.long_mode() {
            (&LONG, self.cr3 & ADDRESS)
        } else if wide {
            (&PAE, self.cr3 & 0xffff_ffe0)
        } else {
            (&LEGACY, self.cr3 & 0xffff_f000)
        };
        let nx = self.efer & efer::NXE != 0;
        let mut reserved = RESERVED_HIGH | if nx { 0 } else { pte::NX };
        if !wide {
            reserved = 0;
        }
        // Permissions are the AND over all levels, execute-disable the OR.
        let mut rights = pte::WRITE | pte::USER;
        let mut no_execute = false;
        for level in levels {
            let index = (linear >> level.shift) & ((1 << level.bits) - 1);
            let address = table + index * if wide { 8 } else { 4 };
            let Some(entry) = self.read_entry(address, wide) else {
                // Tables outside RAM read as all ones on real machines; here as not present.
                return self.page_fault(linear, access, user, 0);
            };
            if entry & pte::PRESENT == 0 {
                return self.page_fault(linear, access, user, 0);
            }
            let directory_pointer = levels.len() == 3 && level.shift == 30;
            let is_large =
                level.large && entry & pte::LARGE != 0 && (wide || self.cr4 & cr4::PSE != 0) && !directory_pointer;
            let mut bad = reserved;
            if is_large && wide {
                bad |= ((1 << level.shift) - 1) & !0x1fff;
            } else if level.shift == 39 {
                bad |= pte::LARGE;
            }
            if entry & bad != 0 {
                return self.page_fault(linear, access, user, page_fault::PRESENT | page_fault::RESERVED);
            }
            if !directory_pointer {
                rights &= entry;
                no_execute |= nx && wide && entry & pte::NX != 0;
            }
            if level.shift != 12 && !is_large {
                if !directory_pointer && !self.mark_entry(address, wide, entry, pte::ACCESSED) {
                    return Ok(None);
                }
                table = if wide { entry & ADDRESS } else { entry & 0xffff_f000 };
                continue;
            }
            if !self.allowed(rights, no_execute, access, user, ac) {
                return self.page_fault(linear, access, user, page_fault::PRESENT);
            }
            let mark = pte::ACCESSED | if access == Access::Write { pte::DIRTY } else { 0 };
            if !self.mark_entry(address, wide, entry, mark) {
                return Ok(None);
            }
            let low = (1u64 << level.shift) - 1;
            let mut frame = if wide { entry & ADDRESS & !low } else { entry & 0xffff_f000 & !low };
            if is_large && !wide {
                // PSE-36: bits 13–20 of the entry are bits 32–39 of the address.
                frame |= ((entry >> 13) & 0xff) << 32;
            }
            let global = entry & pte::GLOBAL != 0 && self.cr4 & cr4::PGE != 0;
            return Ok(Some(Translation { gpa: frame | (linear & low & !PAGE_MASK), shift: level.shift, global }));
        }
        unreachable!("the last level always maps a page")
    }

    fn allowed(&self, rights: u64, no_execute: bool, access: Access, user: bool, ac: bool) -> bool {
        let user_page = rights & pte::USER != 0;
        let writable = rights & pte::WRITE != 0;
        if user {
            return user_page
                && match access {
                    Access::Read => true,
                    Access::Write => writable,
                    Access::Fetch => !no_execute,
                };
        }
        match access {
            Access::Fetch => !(no_execute || user_page && self.cr4 & cr4::SMEP != 0),
            _ if user_page && self.cr4 & cr4::SMAP != 0 && !ac => false,
            Access::Read => true,
            Access::Write => writable || self.cr0 & cr0::WP == 0,
        }
    }

    fn page_fault<T>(&mut self, linear: u64, access: Access, user: bool, mut code: u32) -> Run<T> {
        if access == Access::Write {
            code |= page_fault::WRITE;
        }
        if user {
            code |= page_fault::USER;
        }
        let nx = self.efer & efer::NXE != 0 && self.cr4 & cr4::PAE != 0;
        if access == Access::Fetch && (nx || self.cr4 & cr4::SMEP != 0) {
            code |= page_fault::FETCH;
        }
        self.counters.page_faults += 1;
        self.raise(Fault { vector: vector::PF, error: Some(code), address: linear })
    }

    fn entry_pointer(&self, gpa: u64) -> Option<*mut u8> {
        // SAFETY: the offset stays in the page.
        self.memory.host_page(gpa).map(|page| unsafe { page.add((gpa & PAGE_MASK) as usize) })
    }

    fn read_entry(&self, gpa: u64, wide: bool) -> Option<u64> {
        let at = self.entry_pointer(gpa)?;
        // SAFETY: in guest RAM, naturally aligned.
        Some(unsafe {
            if wide {
                (*at.cast::<AtomicU64>()).load(Ordering::Relaxed)
            } else {
                u64::from((*at.cast::<AtomicU32>()).load(Ordering::Relaxed))
            }
        })
    }

    /// Sets bits of an entry that was read as `entry`; `false` if it has changed since: another processor may have
    /// taken the page away, and must not find a bit in what it left.
    #[inline]
    fn mark_entry(&self, gpa: u64, wide: bool, entry: u64, bits: u64) -> bool {
        let new = entry | bits;
        if new == entry {
            return true;
        }
        let Some(at) = self.entry_pointer(gpa) else { return true };
        let (success, failure) = (Ordering::SeqCst, Ordering::Relaxed);
        // SAFETY: in guest RAM, naturally aligned.
        unsafe {
            if wide {
                (*at.cast::<AtomicU64>()).compare_exchange(entry, new, success, failure).is_ok()
            } else {
                (*at.cast::<AtomicU32>()).compare_exchange(entry as u32, new as u32, success, failure).is_ok()
            }
        }
    }
}

#[inline(always)]
pub const fn crosses(linear: u64, bytes: u64) -> bool {
    (linear ^ linear.wrapping_add(bytes - 1)) & !PAGE_MASK != 0
}

/// Copies from guest RAM. A naturally aligned power of two is one load, as the guest's other processors expect.
///
/// # Safety
/// As many bytes as `out` has are there.
#[inline]
unsafe fn copy_out(from: *const u8, out: &mut [u8]) {
    // SAFETY: the caller's word.
    unsafe {
        match out {
            [a] => *a = from.read_volatile(),
            [_, _] => out.copy_from_slice(&from.cast::<[u8; 2]>().read_unaligned()),
            [_, _, _, _] => out.copy_from_slice(&from.cast::<[u8; 4]>().read_unaligned()),
            [_, _, _, _, _, _, _, _] => out.copy_from_slice(&from.cast::<[u8; 8]>().read_unaligned()),
            _ => ptr::copy_nonoverlapping(from, out.as_mut_ptr(), out.len()),
        }
    }
}

/// Copies to guest RAM; a naturally aligned power of two is one store.
///
/// # Safety
/// There is room for `data`.
#[inline]
unsafe fn copy_in(data: &[u8], to: *mut u8) {
    // SAFETY: the caller's word.
    unsafe {
        match data {
            [b] => to.write_volatile(*b),
            &[a, b] => to.cast::<u16>().write_unaligned(u16::from_le_bytes([a, b])),
            &[a, b, c, d] => to.cast::<u32>().write_unaligned(u32::from_le_bytes([a, b, c, d])),
            &[a, b, c, d, e, f, g, h] => {
                to.cast::<u64>().write_unaligned(u64::from_le_bytes([a, b, c, d, e, f, g, h]));
            }
            _ => ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()),
        }
    }
}

/// The largest power of two that is at most `left` and 8 and does not leave the page.
fn piece(gpa: u64, left: usize) -> usize {
    let whole_page = 0x1000 - (gpa & PAGE_MASK) as usize;
    let mut n = 8;
    while n > left || n > whole_page {
        n /= 2;
    }
    n
}
