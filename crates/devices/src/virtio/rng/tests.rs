use proptest::prelude::*;

use super::Rng;
use crate::virtio::{
    VirtioDevice,
    fake_driver::{F_EVENT_IDX, Heap, Ring},
};

#[test]
fn fills_what_it_is_given() {
    for features in [0, F_EVENT_IDX] {
        let heap = Heap::new(1 << 20);
        let mut device = Rng::new("rng0");
        let mut ring = Ring::new(&heap, 16, features);
        device.start_queue(0, ring.resources(None)).unwrap();
        let (first, second) = (heap.empty(100), heap.empty(5000));
        assert_eq!(ring.run(&[first, second]), 5100);
        let bytes = heap.bytes(second);
        // of 5000 random bytes about 20 are zero; 200 would be far beyond chance
        assert!(bytes.iter().filter(|b| **b == 0).count() < 200);
        assert_ne!(bytes[..2500], bytes[2500..]);
        assert!(device.stop_queue(0).is_some());
    }
}

#[test]
fn one_request_is_bounded_and_none_is_refused() {
    let heap = Heap::new(1 << 20);
    let mut device = Rng::new("rng0");
    let mut ring = Ring::new(&heap, 16, 0);
    device.start_queue(0, ring.resources(None)).unwrap();
    let large = heap.empty(300 << 10);
    assert_eq!(ring.run(&[large]), 64 << 10);
    assert!(heap.bytes(large)[64 << 10..].iter().all(|b| *b == 0));
    let readable = heap.filled(b"give me entropy");
    assert_eq!(ring.run(&[readable]), 0);
    assert_eq!(ring.run(&[readable, heap.empty(8)]), 8);
}

#[test]
fn saves_and_restores() {
    let mut device = Rng::new("rng0");
    let saved = device.save();
    device.restore(&saved).unwrap();
    assert!(device.restore(&[&saved[..], b"x"].concat()).is_err());
    assert!(device.restore(b"").is_err());
}

proptest! {
    #![proptest_config(crate::tests::cases(64))]
    #[test]
    fn garbage_descriptors_do_no_harm(
        raw in prop::collection::vec(any::<[u8; 16]>(), 16),
        heads in prop::collection::vec(any::<u16>(), 1..40),
    ) {
        let heap = Heap::new(1 << 20);
        let mut device = Rng::new("rng0");
        let mut ring = Ring::new(&heap, 16, 0);
        device.start_queue(0, ring.resources(None)).unwrap();
        for (index, mut raw) in raw.into_iter().enumerate() {
            // mostly inside of RAM
            raw[3..8].fill(0);
            raw[11] = 0;
            raw[13..16].fill(0);
            ring.scribble(index as u16, raw);
        }
        for head in heads {
            ring.offer(head % 20);
        }
        ring.kick();
        ring.publish();
        prop_assert!(device.stop_queue(0).is_some());
    }
}
