use super::*;

const DIRECT_MAP: u64 = 0xffff_8880_0000_0000;

fn found(gpa: u64, shift: u32) -> Translation {
    Translation { gpa, shift, global: true }
}

fn fill(tlb: &mut Tlb, linear: u64, shift: u32) {
    tlb.kernel.data.fill(linear, 0x7000_0000_0000 as *mut u8, false, &found(linear & 0xffff_ffff, shift));
}

fn has(tlb: &Tlb, linear: u64) -> bool {
    tlb.kernel.data.read[index(linear)].find(linear, 1).is_some()
}

#[test]
fn any_page_of_a_large_one_drops_all_of_it() {
    for (shift, distance) in [(21, 0x1f_f000), (30, 0x3fff_f000)] {
        let mut tlb = Tlb::default();
        fill(&mut tlb, DIRECT_MAP, shift);
        tlb.flush_page(DIRECT_MAP + distance);
        assert!(!has(&tlb, DIRECT_MAP), "entry of a page of 1 << {shift} bytes");
    }
    for (here, there) in [(0xc040_0000, 0xc060_0000), (0xc060_0000, 0xc040_0000)] {
        let mut tlb = Tlb::default();
        fill(&mut tlb, here, 22);
        tlb.flush_page(there);
        assert!(!has(&tlb, here), "the other half of a page of 4 MiB");
    }
}

#[test]
fn pages_of_processes_leave_large_ones_alone() {
    let mut tlb = Tlb::default();
    let regions = (0..700).map(|i| DIRECT_MAP + (i << 21) + ((i * 2 + 1) << 12));
    regions.clone().for_each(|linear| fill(&mut tlb, linear, 21));
    for i in 0..4096 {
        tlb.flush_page(0x5555_0000_0000 + (i << 21));
    }
    let left = regions.clone().filter(|linear| has(&tlb, *linear)).count();
    assert!(left > 600, "only {left} are left");
}

#[test]
fn more_large_pages_than_are_remembered_are_dropped_all_the_same() {
    let mut tlb = Tlb::default();
    for i in 0..5000 {
        fill(&mut tlb, DIRECT_MAP + (i << 21), 21);
    }
    tlb.flush_page(DIRECT_MAP + (4999 << 21) + 0x1000);
    assert!(!has(&tlb, DIRECT_MAP + (4999 << 21)));
}
