//! What `--metrics` measures, and how.

use std::{
    fs,
    ops::Range,
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread::{self, JoinHandle},
    time::Duration,
};

use vireo_memory::GuestMemory;

/// How often memory is looked at: reading `smaps` walks all page tables. At first, while kernel and initrd are loaded
/// through buffers that are gone soon, more often.
const SAMPLE_EVERY: Duration = Duration::from_millis(250);
const FIRST_SAMPLES_EVERY: Duration = Duration::from_millis(10);
const FIRST_SAMPLES: u32 = 50;

/// Memory of this process in bytes, at one moment or at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// Resident and not guest RAM: our code, heap, stacks, caches.
    pub outside_guest: u64,
    /// Resident guest RAM.
    pub guest: u64,
}

impl MemoryUse {
    pub(crate) fn max(self, other: Self) -> Self {
        Self { outside_guest: self.outside_guest.max(other.outside_guest), guest: self.guest.max(other.guest) }
    }

    /// Adds up the `Rss:` lines of `/proc/self/smaps`, those of mappings in `guest` by themselves. Guest RAM may have
    /// become one mapping with a neighbour (both anonymous); then the neighbour counts as guest RAM as far as the
    /// guest's part of the mapping can hold it. Of a shared mapping, the part counts that is this one's (`Pss:`): the
    /// software engine's code is mapped twice, for writing and for execution.
    fn of_smaps(smaps: &str, guest: &[Range<u64>]) -> Self {
        let mut sum = Self::default();
        let (mut mapping, mut inside, mut counts) = (0, 0, "Rss:");
        for line in smaps.lines() {
            if let Some(range) = mapping_range(line) {
                let shared = line.split_ascii_whitespace().nth(1).is_some_and(|access| access.ends_with('s'));
                counts = if shared { "Pss:" } else { "Rss:" };
                mapping = range.end - range.start;
                inside = guest.iter().map(|g| overlap(g, &range)).sum();
            } else if let Some(resident) = line.strip_prefix(counts).and_then(kibibytes) {
                let in_guest = if inside == mapping { resident } else { resident.min(inside) };
                sum.guest += in_guest;
                sum.outside_guest += resident - in_guest;
            }
        }
        sum
    }

    fn now(guest: &[Range<u64>]) -> Self {
        fs::read_to_string("/proc/self/smaps").map_or_else(|_| Self::default(), |smaps| Self::of_smaps(&smaps, guest))
    }
}

/// The address range, if this line begins a mapping.
fn mapping_range(line: &str) -> Option<Range<u64>> {
    let (start, end) = line.split_ascii_whitespace().next()?.split_once('-')?;
    Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
}

fn kibibytes(text: &str) -> Option<u64> {
    Some(text.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> u64 {
    a.end.min(b.end).saturating_sub(a.start.max(b.start))
}

/// Looks at this process's memory now and then, and keeps the largest figures.
pub(crate) struct MemorySampler {
    peak: Arc<Mutex<MemoryUse>>,
    guest: Vec<Range<u64>>,
    stop: mpsc::Sender<()>,
    thread: Option<JoinHandle<()>>,
}

impl MemorySampler {
    pub fn start(memory: &GuestMemory) -> Self {
        let guest: Vec<_> = memory.ranges().iter().map(|(_, host, bytes)| *host as u64..*host as u64 + bytes).collect();
        let peak = Arc::new(Mutex::default());
        let (stop, stopped) = mpsc::channel();
        let sampler = Self { peak: peak.clone(), guest: guest.clone(), stop, thread: None };
        let sample = move || {
            let mut first = 0..FIRST_SAMPLES;
            loop {
                note(&peak, MemoryUse::now(&guest));
                let pause = first.next().map_or(SAMPLE_EVERY, |_| FIRST_SAMPLES_EVERY);
                if stopped.recv_timeout(pause) != Err(mpsc::RecvTimeoutError::Timeout) {
                    return;
                }
            }
        };
        // Without the thread there is one sample, at the end.
        let thread = thread::Builder::new().name("vireo-metrics".into()).spawn(sample).ok();
        Self { thread, ..sampler }
    }

    /// A last look, and the peak of all. Guest memory must still be there.
    pub fn finish(mut self) -> MemoryUse {
        let _ = self.stop.send(());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        note(&self.peak, MemoryUse::now(&self.guest));
        *self.peak.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn note(peak: &Mutex<MemoryUse>, now: MemoryUse) {
    let mut peak = peak.lock().unwrap_or_else(PoisonError::into_inner);
    *peak = peak.max(now);
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
00400000-00500000 r-xp 00000000 08:01 1 /usr/bin/vireo
Size:               1024 kB
Rss:                 512 kB
Pss:                 512 kB
7f0000000000-7f0010000000 rw-p 00000000 00:00 0
Rss:              100000 kB
7f0020000000-7f0020300000 rw-p 00000000 00:00 0
Rss:                3000 kB
7f0080000000-7f0080100000 rw-s 00000000 00:01 9 /memfd:code (deleted)
Rss:                 600 kB
Pss:                 300 kB
7f0090000000-7f0090100000 r-xs 00000000 00:01 9 /memfd:code (deleted)
Rss:                 600 kB
Pss:                 300 kB
7ffc00000000-7ffc00100000 rw-p 00000000 00:00 0 [stack]
Rss:                  88 kB
";

    #[test]
    fn guest_ram_is_told_apart() {
        let guest = [0x7f00_0000_0000..0x7f00_1000_0000, 0x7f00_2010_0000..0x7f00_2030_0000];
        let used = MemoryUse::of_smaps(SMAPS, &guest);
        assert_eq!(used.guest, (100_000 + 2048) << 10);
        assert_eq!(used.outside_guest, (512 + 952 + 600 + 88) << 10);
    }

    #[test]
    fn a_sampler_sees_what_was_touched() {
        let memory = GuestMemory::new(32 << 20, 32 << 20).unwrap();
        let sampler = MemorySampler::start(&memory);
        memory.write(0, &vec![1; 8 << 20]).unwrap();
        let peak = sampler.finish();
        assert!(peak.guest >= 8 << 20, "{peak:?}");
        assert!(peak.outside_guest > 0, "{peak:?}");
    }
}
