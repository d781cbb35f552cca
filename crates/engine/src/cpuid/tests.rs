use super::*;

fn everything(_: u32, _: u32) -> CpuidLeaf {
    CpuidLeaf { eax: !0, ebx: !0, ecx: !0, edx: !0 }
}

fn with(vendor: Vendor, avx: bool) -> CpuidTable {
    build(&Host { vendor, cpuid: everything, avx }, 2_500_000)
}

#[test]
fn no_bit_is_told_twice() {
    for (at, one) in FEATURES.iter().enumerate() {
        let same = |other: &&Feature| {
            (other.leaf, other.index, other.register, other.bit) == (one.leaf, one.index, one.register, one.bit)
        };
        assert!(FEATURES[..at].iter().find(same).is_none(), "{:#x}.{} bit {}", one.leaf, one.index, one.bit);
    }
}

#[test]
fn a_full_host_gives_x86_64_v3() {
    for vendor in [Vendor::Amd, Vendor::Intel] {
        let table = with(vendor, true);
        // x86-64 psABI, table 3.1: v2 and v3
        let (one, seven, extended) = (table.get(1, 0), table.get(7, 0), table.get(0x8000_0001, 0));
        for bit in [0, 9, 12, 13, 19, 20, 22, 23, 26, 28, 29] {
            assert!(one.ecx & 1 << bit != 0, "1:ECX.{bit}");
        }
        for bit in [3, 5, 8] {
            assert!(seven.ebx & 1 << bit != 0, "7:EBX.{bit}");
        }
        assert_eq!(extended.ecx & 0x21, 0x21, "LAHF and LZCNT");
        assert_eq!(supported_xcr0(&table), 7);
        assert_eq!(table.get(0xd, 0).ebx, 832);
        assert_eq!(table.get(0xd, 2), CpuidLeaf { eax: 256, ebx: 576, ecx: 0, edx: 0 });
        assert_eq!(table.get(0xd, 3), CpuidLeaf::default());
        assert_eq!(table.get(0x4000_0010, 0).eax, 2_500_000);
        assert!(table.get(0x8000_0008, 0).eax & 0xff >= 40);
        // no VME, no MONITOR, no VMX, no TSX, no AVX-512
        assert_eq!((one.edx & 2, one.ecx & 0x28, seven.ebx & (1 << 4 | 1 << 11 | 1 << 16)), (0, 0, 0));
        // the interpreter sets OSXSAVE by CR4
        assert_eq!(one.ecx & 1 << 27, 0);
    }
    assert_eq!(
        with(Vendor::Amd, true).get(1, 0).edx & AMD_MIRRORED & !with(Vendor::Amd, true).get(0x8000_0001, 0).edx,
        0
    );
}

#[test]
fn without_avx_all_that_needs_it_goes() {
    let table = with(Vendor::Intel, false);
    assert_eq!(table.get(1, 0).ecx & (1 << 12 | 1 << 28 | 1 << 29), 0);
    assert_eq!(table.get(7, 0).ebx & 1 << 5, 0);
    assert_eq!(supported_xcr0(&table), 3);
    assert_eq!(table.get(0xd, 0).ecx, 576);
}

#[test]
fn a_bare_host_gives_only_what_is_ours() {
    let host = Host { vendor: Vendor::Amd, cpuid: |_, _| CpuidLeaf::default(), avx: false };
    let table = build(&host, 1_000_000);
    assert_eq!(table.get(1, 0).ecx, 1 << 17 | 1 << 21 | 1 << 24 | 1 << 26 | 1 << 31);
    assert_eq!(table.get(7, 0).ebx & (1 << 3 | 1 << 8 | 1 << 18 | 1 << 19 | 1 << 29), 0);
}

/// What keeps mitigations off in Linux 6.1 and 6.12.
#[test]
fn linux_finds_no_bug_to_mitigate() {
    let amd = with(Vendor::Amd, true);
    assert_eq!(amd.get(0x8000_0008, 0).ebx & (1 << 26 | 1 << 29), 1 << 26 | 1 << 29);
    assert_eq!(amd.get(0x8000_0021, 0).ecx, 1 << 1 | 1 << 2 | 1 << 7);
    assert_eq!(amd.get(0x8000_0021, 0).eax & 1 << 29, 1 << 29);
    assert!(amd.get(0x8000_0000, 0).eax >= 0x8000_0021);
    let intel = with(Vendor::Intel, true);
    assert_eq!((intel.get(7, 0).eax, intel.get(7, 2).edx), (2, 1 << 4));
    for table in [amd, intel] {
        assert!(table.get(7, 0).edx & 1 << 29 != 0, "ARCH_CAPABILITIES");
    }
}

#[test]
fn topology_tells_vcpus_apart() {
    for vendor in [Vendor::Amd, Vendor::Intel] {
        let mut table = with(vendor, true);
        set_topology(&mut table, 5, 6);
        assert_eq!(table.get(1, 0).ebx, 5 << 24 | 6 << 16 | 8 << 8);
        assert!(table.get(1, 0).edx & 1 << 28 != 0);
        assert_eq!(table.get(0xb, 1), CpuidLeaf { eax: 3, ebx: 6, ecx: 0x201, edx: 5 });
        let leaf = if vendor == Vendor::Amd { 0x8000_001d } else { 4 };
        let size = |l: CpuidLeaf| ((l.ebx >> 22) + 1) * ((l.ebx & 0xfff) + 1) * (l.ecx + 1);
        let sizes: Vec<u32> = (0..4).map(|i| size(table.get(leaf, i))).collect();
        assert_eq!(sizes, [32 << 10, 32 << 10, 1 << 20, 32 << 20]);
        assert_eq!(table.get(leaf, 4).eax, 0);
        assert_eq!(table.get(leaf, 3).eax >> 14 & 0xfff, 5, "all share the L3");
        set_topology(&mut table, 0, 1);
        assert_eq!(table, with(vendor, true));
    }
}

#[test]
fn this_host_has_a_table() {
    let table = soft_cpuid(2_000_000);
    assert_eq!(table.get(0, 0).eax, 0x16);
    assert_eq!(&table.get(0x4000_0000, 0).ebx.to_le_bytes(), b"KVMK");
    assert_eq!(table.get(0x4000_0001, 0).eax, 1 << 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 24);
    let brand: Vec<u8> = (0x8000_0002..=0x8000_0004u32)
        .flat_map(|leaf| {
            let l = table.get(leaf, 0);
            [l.eax, l.ebx, l.ecx, l.edx]
        })
        .flat_map(u32::to_le_bytes)
        .collect();
    assert!(brand.starts_with(b"Vireo software CPU"));
}
