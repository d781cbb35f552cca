use std::sync::Arc;

use minicbor::{Decode, Encode};
use vireo_cpu::{CpuError, Engine, MsiLine, MsiMessage};

use crate::saved::BadState;

/// PCI local bus 3.0, 6.8.2.3: the size field has 11 bits.
pub const MAX_VECTORS: u16 = 2048;
const ENTRY_BYTES: usize = 16;
const CONTROL_BYTE: usize = 12;
const ENTRY_MASKED: u8 = 1;
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_MASK_ALL: u16 = 1 << 14;

/// An MSI-X table with its pending bits (PCI local bus 3.0, 6.8.2). Each entry owns a line.
pub struct Msix {
    entries: Vec<Entry>,
    control: u16,
}

struct Entry {
    raw: [u8; ENTRY_BYTES],
    pending: bool,
    line: Arc<dyn MsiLine>,
    /// What the line was last told.
    told: Option<MsiMessage>,
}

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct SavedMsix {
    /// 16 bytes for each entry.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub table: Vec<u8>,
    /// Vectors whose pending bit is set.
    #[n(1)]
    pub pending: Vec<u16>,
    #[n(2)]
    pub control: u16,
}

impl Entry {
    fn message(&self) -> MsiMessage {
        let word = |at: usize| u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|i| self.raw[at + i]));
        MsiMessage { address: word(0) & !3, data: word(8) as u32 }
    }

    /// Brings the line in line with the entry; sends what was held back.
    fn refresh(&mut self, open: bool) {
        let live = open && self.raw[CONTROL_BYTE] & ENTRY_MASKED == 0;
        let message = live.then(|| self.message());
        if self.told != message {
            self.line.set(message);
            self.told = message;
        }
        if live && std::mem::take(&mut self.pending) {
            self.line.trigger();
        }
    }
}

impl Msix {
    pub fn new(engine: &dyn Engine, vectors: u16) -> Result<Self, CpuError> {
        let mut raw = [0; ENTRY_BYTES];
        raw[CONTROL_BYTE] = ENTRY_MASKED;
        let entry = |_| Ok(Entry { raw, pending: false, line: engine.msi_line()?, told: None });
        let entries = (0..vectors.min(MAX_VECTORS)).map(entry).collect::<Result<_, CpuError>>()?;
        Ok(Self { entries, control: 0 })
    }

    pub fn vectors(&self) -> u16 {
        self.entries.len() as u16
    }

    /// Sends vector `vector`, or holds it back while masked. Without MSI-X enabled it is lost.
    pub fn trigger(&mut self, vector: u16) {
        if self.control & CONTROL_ENABLE == 0 {
            return;
        }
        if let Some(entry) = self.entries.get_mut(usize::from(vector)) {
            if entry.told.is_some() {
                entry.line.trigger();
            } else {
                entry.pending = true;
            }
        }
    }

    /// The message control word of the capability changed.
    pub fn set_control(&mut self, control: u16) {
        self.control = control & (CONTROL_ENABLE | CONTROL_MASK_ALL);
        let open = self.open();
        for entry in &mut self.entries {
            entry.refresh(open);
        }
    }

    fn open(&self) -> bool {
        self.control & CONTROL_ENABLE != 0 && self.control & CONTROL_MASK_ALL == 0
    }

    /// Bytes past the table are zero.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.entries.get(entry_of(offset, i)).map_or(0, |entry| entry.raw[byte_of(offset, i)]);
        }
    }

    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        let open = self.open();
        for (i, byte) in data.iter().enumerate() {
            let Some(entry) = self.entries.get_mut(entry_of(offset, i)) else { return };
            let at = byte_of(offset, i);
            entry.raw[at] = match at {
                CONTROL_BYTE => byte & ENTRY_MASKED,
                // The rest of vector control is reserved.
                13.. => 0,
                _ => *byte,
            };
            if i + 1 == data.len() || entry_of(offset, i + 1) != entry_of(offset, i) {
                entry.refresh(open);
            }
        }
    }

    /// One bit for each vector; writes have no effect on hardware, so there is no counterpart.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let first = (offset as usize).saturating_mul(8);
        for (i, byte) in data.iter_mut().enumerate() {
            let bits = self.entries.iter().skip(first.saturating_add(8 * i)).take(8).enumerate();
            *byte = bits.map(|(bit, entry)| u8::from(entry.pending) << bit).sum();
        }
    }

    pub fn save(&self) -> SavedMsix {
        let pending = (0..).zip(&self.entries).filter(|(_, entry)| entry.pending);
        SavedMsix {
            table: self.entries.iter().flat_map(|entry| entry.raw).collect(),
            pending: pending.map(|(vector, _)| vector).collect(),
            control: self.control,
        }
    }

    pub fn restore(
        engine: &dyn Engine,
        vectors: u16,
        device: &'static str,
        saved: &SavedMsix,
    ) -> Result<Self, RestoreError> {
        if saved.table.len() != usize::from(vectors) * ENTRY_BYTES {
            let why = format!("{} bytes of MSI-X table for {vectors} vectors", saved.table.len());
            return Err(BadState::new(device, why).into());
        }
        let mut msix = Self::new(engine, vectors)?;
        for (entry, raw) in msix.entries.iter_mut().zip(saved.table.chunks_exact(ENTRY_BYTES)) {
            entry.raw.copy_from_slice(raw);
            entry.raw[CONTROL_BYTE] &= ENTRY_MASKED;
            entry.raw[CONTROL_BYTE + 1..].fill(0);
        }
        for vector in &saved.pending {
            let entry = msix.entries.get_mut(usize::from(*vector));
            entry.ok_or_else(|| BadState::new(device, format!("vector {vector} is pending")))?.pending = true;
        }
        msix.set_control(saved.control);
        Ok(msix)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error(transparent)]
    State(#[from] BadState),
    #[error("no interrupt lines for MSI-X")]
    Lines(#[from] CpuError),
}

fn entry_of(offset: u64, i: usize) -> usize {
    (offset as usize).saturating_add(i) / ENTRY_BYTES
}

fn byte_of(offset: u64, i: usize) -> usize {
    (offset as usize).saturating_add(i) % ENTRY_BYTES
}
