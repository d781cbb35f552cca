//! What guest RAM was before it was written to.

/// A page that was written to.
struct Page {
    host: *mut u8,
    gpa: u64,
    before: [u8; 4096],
    /// When the first run was done.
    after: [u8; 4096],
}

/// Pages that one run may write to.
const MOST: usize = 1024;

/// A byte of guest RAM and its value.
pub type Byte = (*mut u8, u8);

/// Writes bytes, each for itself: what is between them may be a device's.
pub fn put(bytes: &[Byte]) {
    for (at, value) in bytes {
        // SAFETY: of a page that is guest RAM, which others may look at.
        unsafe { at.write_volatile(*value) };
    }
}

/// What two runs of the same code did to RAM.
#[derive(Default)]
pub struct Journal {
    #[allow(clippy::vec_box, reason = "kept for their allocations, and large")]
    pages: Vec<Box<Page>>,
    used: usize,
    open: bool,
    full: bool,
}

impl Journal {
    /// Begins anew.
    pub fn start(&mut self) {
        (self.used, self.open, self.full) = (0, true, false);
    }

    pub fn stop(&mut self) {
        self.open = false;
    }

    /// More was written than can be undone.
    pub fn is_full(&self) -> bool {
        self.full
    }

    /// Keeps the page at `host`, before it is written to.
    pub fn save(&mut self, host: *mut u8, gpa: u64) {
        if !self.open || self.pages[..self.used].iter().any(|page| page.host == host) {
            return;
        }
        if self.used == MOST {
            self.full = true;
            return;
        }
        if self.used == self.pages.len() {
            self.pages.push(Box::new(Page { host, gpa, before: [0; 4096], after: [0; 4096] }));
        }
        let page = &mut *self.pages[self.used];
        self.used += 1;
        (page.host, page.gpa) = (host, gpa);
        page.before = read(host);
        page.after = page.before;
    }

    /// The first run is done: its writes are noted and undone.
    pub fn first_is_done(&mut self) {
        for page in &mut self.pages[..self.used] {
            page.after = read(page.host);
            each_difference(&page.before, &page.after, |i| put(&[page.byte(i, page.before[i])]));
        }
    }

    /// What the first run did, if the second did something else.
    pub fn take_first(&mut self) {
        for page in &self.pages[..self.used] {
            each_difference(&page.before, &page.after, |i| put(&[page.byte(i, page.after[i])]));
        }
    }

    /// Undoes both runs, to try again. Bytes in which they differed may be a device's: their values are kept.
    pub fn undo(&mut self, kept: &mut Vec<Byte>) {
        for page in &self.pages[..self.used] {
            let now = read(page.host);
            each_difference(&page.after, &now, |i| {
                let value = if now[i] == page.before[i] { page.after[i] } else { now[i] };
                kept.push(page.byte(i, value));
            });
            each_difference(&page.before, &now, |i| put(&[page.byte(i, page.before[i])]));
        }
    }

    /// Where the second run left something else than the first: the guest-physical address, what was there before, after
    /// the first run, and is now.
    pub fn differences(&self) -> Vec<(u64, [u8; 3])> {
        let mut found = Vec::new();
        for page in &self.pages[..self.used] {
            let now = read(page.host);
            each_difference(&page.after, &now, |i| {
                found.push((page.gpa + i as u64, [page.before[i], page.after[i], now[i]]));
            });
        }
        found
    }
}

impl Page {
    fn byte(&self, at: usize, value: u8) -> Byte {
        (self.host.wrapping_add(at), value)
    }
}

fn read(host: *mut u8) -> [u8; 4096] {
    let mut bytes = [0; 4096];
    // SAFETY: a page of guest RAM. Devices may write to it meanwhile: then these bytes are told from ours by another try.
    unsafe { std::ptr::copy_nonoverlapping(host, bytes.as_mut_ptr(), 4096) };
    bytes
}

fn each_difference(a: &[u8; 4096], b: &[u8; 4096], mut see: impl FnMut(usize)) {
    if a == b {
        return;
    }
    for (at, (x, y)) in a.chunks(64).zip(b.chunks(64)).enumerate().filter(|(_, (x, y))| x != y) {
        (0..64).filter(|&i| x[i] != y[i]).for_each(|i| see(at * 64 + i));
    }
}
