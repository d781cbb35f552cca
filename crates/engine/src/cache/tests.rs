use super::*;
use crate::decode::BLANK;

#[test]
fn changes_are_forgotten() {
    let last = Instant::now();
    let changes = Changes { count: 40, last };
    assert_eq!(changes.lately(last), 40);
    assert_eq!(changes.lately(last + HALF_LIFE), 20);
    assert_eq!(changes.lately(last + HALF_LIFE * 10), 0);
    assert_eq!(changes.lately(last + Duration::from_secs(1 << 40)), 0);
}

const MODE: u8 = 3;

fn add(cache: &mut BlockCache, gpa: u64, ops: usize) -> *mut Block {
    let ops: Vec<Uop> = (0..ops).map(|i| Uop { off: i as u16, imm: gpa, ..BLANK }).collect();
    let count = ops.len() as u32;
    cache.insert(gpa, Shape { mode: MODE, second_page: None, count, abortable: count }, &ops).cast_mut()
}

fn translate(cache: &mut BlockCache, block: *mut Block) {
    let at = cache.code.push(&[0xcc; 40], &[0xcc; 24]).unwrap();
    // SAFETY: a block of this cache.
    unsafe {
        (*block).entry = at as u32;
        (*block).code = cache.code.address(at);
    }
}

fn translated(cache: &mut BlockCache, gpa: u64, ops: usize) -> *mut Block {
    let block = add(cache, gpa, ops);
    translate(cache, block);
    block
}

/// The block that is found for an address, and what tells it from others: the first op's constant, and their number.
fn found(cache: &BlockCache, gpa: u64) -> Option<(&Block, u64, u8)> {
    // SAFETY: blocks that are found are alive.
    let block = unsafe { cache.find(gpa, MODE).as_ref()? };
    assert_eq!(block.gpa, gpa);
    let ops = unsafe { std::slice::from_raw_parts(block.ops, block.count.into()) };
    assert!(ops.iter().enumerate().all(|(i, op)| usize::from(op.off) == i && op.imm == ops[0].imm));
    Some((block, ops[0].imm, block.count))
}

#[test]
fn a_collection_keeps_what_was_translated() {
    let mut cache = BlockCache::new(1, true).unwrap();
    let empty = cache.code.used();
    for i in 0..60 {
        let gpa = 0x1000 + i * 0x80;
        if i % 3 == 0 {
            translated(&mut cache, gpa, 5 + i as usize % 7)
        } else {
            add(&mut cache, gpa, 11)
        };
    }
    let gone = translated(&mut cache, 0x1_0000, 3);
    cache.invalidate_page(0x1_0000, BLANK.handler);
    assert!(unsafe { !(*gone).valid });
    cache.collect();
    for i in 0..60 {
        let gpa = 0x1000 + i * 0x80;
        let kept = found(&cache, gpa);
        assert_eq!(kept.is_some(), i % 3 == 0, "{i}");
        if let Some((block, imm, count)) = kept {
            assert_eq!((imm, usize::from(count)), (gpa, 5 + i as usize % 7));
            // It is to be translated at its next run, and what led to it is gone.
            assert_eq!((block.entry, block.runs_left, block.checked), (0, 1, 0));
            assert!(block.code.is_null());
            assert!(block.valid && block.links.iter().all(|link| link.is_null()));
        }
    }
    assert!(found(&cache, 0x1_0000).is_none() && !cache.has_page(0x1_0000));
    assert!(cache.has_page(0x1000));
    assert_eq!((cache.collections, cache.code.used()), (1, empty));
    // What is not translated again goes the next time.
    let again = cache.find(0x1000, MODE).cast_mut();
    translate(&mut cache, again);
    cache.collect();
    let left: Vec<u64> = (0..60).map(|i| 0x1000 + i * 0x80).filter(|gpa| found(&cache, *gpa).is_some()).collect();
    assert_eq!(left, [0x1000]);
    // And the kept one is still ended when its page changes.
    cache.invalidate_page(0x1000, BLANK.handler);
    assert!(found(&cache, 0x1000).is_none());
}

#[test]
fn a_collection_keeps_paths_up_to_what_is_gone() {
    let mut cache = BlockCache::new(1, true).unwrap();
    let kept: Vec<_> = (0..4).map(|i| translated(&mut cache, 0x1000 + i * 64, 4)).collect();
    let gone = add(&mut cache, 0x2000, 4);
    let part = |i: usize| kept[i].cast_const();
    cache.set_path(part(0), vec![part(1), part(2), gone, part(3)]);
    cache.set_path(part(1), vec![gone, part(2)]);
    cache.set_path(gone, vec![part(3)]);
    cache.note_head(part(1), kept[0]);
    cache.collect();
    let at = |i: u64| cache.find(0x1000 + i * 64, MODE);
    assert_eq!(cache.path(at(0)), [at(1), at(2)]);
    assert!((1..4).all(|i| cache.path(at(i)).is_empty()));
    // Heads are known again when they are translated.
    assert!(cache.heads(at(1)).is_empty());
}

#[test]
fn room_grows_where_it_is_filled_soon_with_what_is_of_use() {
    let mut cache = BlockCache::new(1, true).unwrap();
    let (first, code) = (cache.limit, cache.code.limit());
    assert_eq!(first, SMALL_CAPACITY.first);
    let fill = |cache: &mut BlockCache, of_use: usize| {
        let mut added = 0;
        while !cache.is_full() {
            let block = add(cache, 0x10_0000 + added * 0x100, 40);
            added += 1;
            if added as usize * 40 <= of_use {
                translate(cache, block);
            }
        }
    };
    // The first time says nothing of how soon.
    fill(&mut cache, first / 2);
    cache.collect();
    assert_eq!((cache.limit, cache.code.limit()), (first, code));
    assert!(!cache.is_full());
    // Little of use: other code may take its place.
    cache.clear();
    fill(&mut cache, first / 8);
    cache.collect();
    assert_eq!(cache.limit, first);
    cache.clear();
    fill(&mut cache, first / 2);
    cache.collect();
    assert_eq!(cache.limit, SMALL_CAPACITY.most);
    // Not above what there is, and nothing is kept where nearly all would be.
    cache.clear();
    fill(&mut cache, SMALL_CAPACITY.most);
    cache.collect();
    assert_eq!((cache.limit, cache.used, cache.block_count), (SMALL_CAPACITY.most, 0, 0));
    assert!(!cache.is_full());
    // Not where it took long to fill.
    let mut cache = BlockCache::new(1, true).unwrap();
    cache.collected = Instant::now().checked_sub(SOON * 2);
    if cache.collected.is_some() {
        fill(&mut cache, first / 2);
        cache.collect();
        assert_eq!(cache.limit, first);
    }
}
