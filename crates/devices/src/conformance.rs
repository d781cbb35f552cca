//! What every stateful device must pass: its saved state is complete, survives encoding, and restoring it
//! (or garbage) is harmless; and no guest access whatsoever makes it panic.

use std::fmt::Debug;

use minicbor::{Decode, Encode};
use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};

use crate::saved::{decode, encode};

/// One random thing to do to a device; what the fields mean is the subject's to say.
#[derive(Clone, Copy, Debug)]
pub struct Op {
    pub kind: u8,
    pub address: u64,
    /// 1, 2, 4 or 8
    pub size: usize,
    pub value: u64,
}

impl Op {
    pub fn bytes(&self) -> Vec<u8> {
        self.value.to_le_bytes()[..self.size].to_vec()
    }

    /// For devices on a bus: writes or reads `size` bytes and says what was read.
    pub fn access(&self, read: impl FnOnce(u64, &mut [u8]), write: impl FnOnce(u64, &[u8])) -> Vec<u8> {
        let mut data = self.bytes();
        if self.kind.is_multiple_of(2) {
            read(self.address, &mut data);
        } else {
            write(self.address, &data);
        }
        data
    }
}

pub fn op() -> impl Strategy<Value = Op> {
    let address = prop_oneof![4 => 0..0x50u64, 2 => 0..0x1100u64, 1 => any::<u64>()];
    let value = prop_oneof![0..0x100u64, any::<u64>(), Just(u64::MAX), Just(0), (0..64u32).prop_map(|bit| 1 << bit)];
    let size = prop_oneof![4 => Just(1usize), 1 => Just(2), 3 => Just(4), 1 => Just(8)];
    (any::<u8>(), address, size, value).prop_map(|(kind, address, size, value)| Op { kind, address, size, value })
}

pub trait Subject: Sized {
    type Saved: Encode<()> + for<'b> Decode<'b, ()> + PartialEq + Debug;
    fn fresh() -> Self;
    /// Does `op` and tells everything that can be seen of it.
    fn poke(&self, op: Op) -> Vec<u8>;
    fn save(&self) -> Self::Saved;
    fn restored(saved: Self::Saved) -> Result<Self, String>;
}

/// Runs the suite on `S`.
pub fn check<S: Subject>() {
    let ops = || prop::collection::vec(op(), 0..120);
    let damage = (any::<prop::sample::Index>(), any::<u8>());
    let run = TestRunner::new(Config { failure_persistence: None, ..Config::default() }).run(
        &(ops(), ops(), damage),
        |(before, after, (at, byte))| {
            let device = S::fresh();
            for op in before {
                device.poke(op);
            }
            let saved = device.save();
            let bytes = encode(&saved);
            goes_on_alike::<S>(&device, &bytes, &after)?;
            survives_damage::<S>(bytes, at, byte, &after)
        },
    );
    if let Err(failure) = run {
        panic!("{failure}");
    }
}

fn goes_on_alike<S: Subject>(device: &S, bytes: &[u8], after: &[Op]) -> Result<(), TestCaseError> {
    let decoded = decode::<S::Saved>("subject", bytes).map_err(|e| TestCaseError::fail(e.to_string()))?;
    prop_assert_eq!(&decoded, &device.save(), "saving twice, once through bytes");
    let twin = S::restored(decoded).map_err(TestCaseError::fail)?;
    prop_assert_eq!(twin.save(), device.save(), "right after restoring");
    for op in after {
        prop_assert_eq!(twin.poke(*op), device.poke(*op), "restored (left) and original differ at {:x?}", op);
    }
    prop_assert_eq!(twin.save(), device.save(), "after the same accesses");
    Ok(())
}

fn survives_damage<S: Subject>(
    mut bytes: Vec<u8>,
    at: prop::sample::Index,
    byte: u8,
    after: &[Op],
) -> Result<(), TestCaseError> {
    if bytes.is_empty() {
        return Err(TestCaseError::fail("nothing was saved"));
    }
    let at = at.index(bytes.len());
    prop_assert!(decode::<S::Saved>("subject", &bytes[..at]).is_err(), "cut off at {}", at);
    bytes.push(0);
    prop_assert!(decode::<S::Saved>("subject", &bytes).is_err(), "left-over data");
    bytes.pop();
    bytes[at] = byte;
    if let Ok(device) = decode::<S::Saved>("subject", &bytes).map_err(|e| e.to_string()).and_then(S::restored) {
        for op in after {
            device.poke(*op);
        }
        device.save();
    }
    Ok(())
}
