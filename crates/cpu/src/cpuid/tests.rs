use super::*;

fn leaf(eax: u32, ebx: u32, ecx: u32, edx: u32) -> CpuidLeaf {
    CpuidLeaf { eax, ebx, ecx, edx }
}

fn vendor(name: &[u8; 12]) -> CpuidTable {
    let word = |at: usize| u32::from_le_bytes([name[at], name[at + 1], name[at + 2], name[at + 3]]);
    let mut table = CpuidTable::default();
    table.set(0, None, leaf(0x1f, word(0), word(8), word(4)));
    table.set(1, None, leaf(0, 0x0100_0800, 0, 0));
    table.set(4, Some(0), leaf(0xfc00_4121, 0, 0, 0));
    table.set(4, Some(3), leaf(0xfc00_4163, 0, 0, 0));
    table.set(0x8000_0001, None, leaf(0, 0, 1 << 22, 0));
    table.set(0x8000_0008, None, leaf(0x3030, 0, 0, 0));
    table
}

#[test]
fn a_table_without_subleaves_answers_any_index() {
    let mut table = CpuidTable::default();
    table.set(1, None, leaf(1, 2, 3, 4));
    table.set(7, Some(0), leaf(5, 6, 7, 8));
    assert_eq!(table.get(1, 99), leaf(1, 2, 3, 4));
    assert_eq!(table.get(7, 1), CpuidLeaf::default());
    table.remove(7);
    assert_eq!(table.get(7, 0), CpuidLeaf::default());
}

#[test]
fn each_vcpu_tells_its_own_apic_id_in_every_leaf() {
    for (count, shift) in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (64, 6)] {
        for id in [0, count - 1] {
            let mut table = vendor(b"AuthenticAMD");
            table.set_topology(id, count);
            assert_eq!(table.get(1, 0).ebx, id << 24 | count << 16 | 0x0800);
            assert_eq!(table.get(1, 0).edx >> 28 & 1, u32::from(count > 1));
            assert_eq!(table.get(0xb, 0), leaf(0, 1, 0x100, id));
            assert_eq!(table.get(0xb, 1), leaf(shift, count, 0x201, id));
            assert_eq!(table.get(0x8000_0008, 0).ecx, (count - 1) | shift << 12);
            assert_eq!(table.get(0x8000_001e, 0), leaf(id, id, 0, 0));
        }
    }
}

#[test]
fn caches_up_to_level_2_are_a_cores_own() {
    let mut table = vendor(b"GenuineIntel");
    table.set_topology(2, 4);
    assert_eq!(table.get(4, 0).eax, 0x121 | 3 << 26);
    assert_eq!(table.get(4, 3).eax, 0x163 | 3 << 14 | 3 << 26);
    assert_eq!(table.get(0x8000_001e, 0), CpuidLeaf::default());
}

#[test]
fn restricting_clears_features_and_nothing_else() {
    let mut supported = CpuidTable::default();
    supported.set(1, None, leaf(0, 0, 0b1010, 0));
    let mut asked = vendor(b"GenuineIntel");
    asked.set(1, None, leaf(0x306f2, 0x0100_0800, 1 << 27 | 0b0110, 0));
    assert_eq!(asked.missing_in(&supported), ["0x1.0.ECX: 0x4", "0x80000001.0.ECX: 0x400000"]);
    asked.restrict_to(&supported);
    assert_eq!(asked.get(1, 0), leaf(0x306f2, 0x0100_0800, 1 << 27 | 0b0010, 0));
    assert!(asked.missing_in(&supported).is_empty());
}
