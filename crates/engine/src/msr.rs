//! Model-specific registers that are only values: what a guest reads where nothing else is in charge, and what
//! writing does.
//!
//! The list is what stock Linux 6.1 and 6.12 touch without a fault handler on the processors that
//! [`crate::cpuid`] describes, and what boot loaders and other systems expect to be there. All others fault
//! (#GP), which Linux takes as "not there". Registers with behaviour live elsewhere: EFER, STAR…, FS/GS base,
//! SYSENTER_*, TSC_AUX with the interpreter; TSC, TSC_ADJUST and kvmclock in [`crate::clock`]; APIC base, x2APIC
//! and TSC_DEADLINE in [`crate::apic`].

use std::collections::BTreeMap;

/// The access is a #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrFault;

/// What writing does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// #GP.
    Fault,
    /// Nothing, without complaint.
    Ignore,
    /// These bits are kept; any other bit that differs from the reset value is #GP.
    Keep(u64),
    /// Eight memory types of which each must exist (PAT and fixed-range MTRRs).
    MemoryTypes,
}

/// A register as it is after reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrDefault {
    /// `None`: reading is #GP.
    pub value: Option<u64>,
    pub write: Write,
}

pub const ARCH_CAPABILITIES: u32 = 0x10a;
pub const PAT: u32 = 0x277;

/// Bits of IA32_ARCH_CAPABILITIES (Intel SDM vol. 4, table 2-2). A guest's code is interpreted or translated, its
/// branches never train the host's predictors by themselves and nothing of the host's memory is mapped where its
/// loads go: the mitigations in its kernel would cost much and protect nothing.
const IMMUNE: u64 = {
    const RDCL_NO: u64 = 1 << 0;
    const IBRS_ALL: u64 = 1 << 1;
    const SKIP_L1DFL_VMENTRY: u64 = 1 << 3;
    const SSB_NO: u64 = 1 << 4;
    const MDS_NO: u64 = 1 << 5;
    const PSCHANGE_MC_NO: u64 = 1 << 6;
    const TAA_NO: u64 = 1 << 8;
    const SBDR_SSDP_NO: u64 = 1 << 13;
    const FBSDP_NO: u64 = 1 << 14;
    const PSDP_NO: u64 = 1 << 15;
    const BHI_NO: u64 = 1 << 20;
    const PBRSB_NO: u64 = 1 << 24;
    const GDS_NO: u64 = 1 << 26;
    const RFDS_NO: u64 = 1 << 27;
    const ITS_NO: u64 = 1 << 62;
    RDCL_NO
        | IBRS_ALL
        | SKIP_L1DFL_VMENTRY
        | SSB_NO
        | MDS_NO
        | PSCHANGE_MC_NO
        | TAA_NO
        | SBDR_SSDP_NO
        | FBSDP_NO
        | PSDP_NO
        | BHI_NO
        | PBRSB_NO
        | GDS_NO
        | RFDS_NO
        | ITS_NO
};

/// SPEC_CTRL: IBRS, STIBP, SSBD, RRSBA_DIS_S, PSFD, BHI_DIS_S. Linux sets IBRS once ("enhanced IBRS") and, on Intel,
/// BHI_DIS_S; neither does anything here.
const SPEC_CTRL_BITS: u64 = 0x4c7;

/// MTRRs: eight variable ranges, fixed ranges, write-combining; on, everything write-back, so that Linux neither
/// moves RAM about nor complains about the firmware. Device memory is uncached by page attributes.
const MTRR_CAP: u64 = 0x508;
const MTRR_DEF_TYPE: u64 = 0x806;
const PAT_RESET: u64 = 0x0007_0406_0007_0406;
/// Physical addresses, and the type or valid bits below them.
const MTRR_BASE_BITS: u64 = 0x0000_ffff_ffff_f0ff;
const MTRR_MASK_BITS: u64 = 0x0000_ffff_ffff_f800;

const fn fixed(value: u64) -> MsrDefault {
    MsrDefault { value: Some(value), write: Write::Fault }
}
const fn ignored(value: u64) -> MsrDefault {
    MsrDefault { value: Some(value), write: Write::Ignore }
}
const fn kept(value: u64, bits: u64) -> MsrDefault {
    MsrDefault { value: Some(value), write: Write::Keep(bits) }
}
const fn types(value: u64) -> MsrDefault {
    MsrDefault { value: Some(value), write: Write::MemoryTypes }
}

/// `(first, last, register)`, sorted; what is in between is the same.
#[rustfmt::skip]
const TABLE: &[(u32, u32, MsrDefault)] = &[
    (0x0000, 0x0001, fixed(0)),                       // P5_MC_ADDR, P5_MC_TYPE
    (0x0017, 0x0017, fixed(0)),                       // PLATFORM_ID
    (0x002a, 0x002a, kept(0, 0)),                     // EBL_CR_POWERON
    (0x0034, 0x0034, fixed(0)),                       // SMI_COUNT
    (0x003a, 0x003a, fixed(1)),                       // FEATURE_CONTROL: locked, nothing enabled
    (0x0048, 0x0048, kept(0, SPEC_CTRL_BITS)),        // SPEC_CTRL
    (0x0049, 0x0049, MsrDefault { value: None, write: Write::Keep(1) }), // PRED_CMD: IBPB
    (0x0079, 0x0079, MsrDefault { value: None, write: Write::Ignore }),  // BIOS_UPDT_TRIG
    (0x008b, 0x008b, ignored(0x1_0000_0000)),         // BIOS_SIGN_ID, AMD PATCH_LEVEL: none (Linux writes 0 first)
    (0x00ce, 0x00ce, fixed(0)),                       // PLATFORM_INFO: no CPUID faulting
    (0x00fe, 0x00fe, fixed(MTRR_CAP)),                // MTRRCAP
    (ARCH_CAPABILITIES, ARCH_CAPABILITIES, fixed(IMMUNE)),
    (0x010b, 0x010b, MsrDefault { value: None, write: Write::Keep(1) }), // FLUSH_CMD: L1D
    (0x0140, 0x0140, kept(0, 0)),                     // MISC_FEATURES_ENABLES
    (0x0179, 0x0179, fixed(0)),                       // MCG_CAP: no banks, no MCG_CTL
    (0x017a, 0x017a, kept(0, 7)),                     // MCG_STATUS
    (0x0198, 0x0198, fixed(0)),                       // PERF_STATUS
    (0x0199, 0x0199, ignored(0)),                     // PERF_CTL
    (0x019a, 0x019b, ignored(0)),                     // CLOCK_MODULATION, THERM_INTERRUPT
    (0x019c, 0x019c, ignored(0)),                     // THERM_STATUS
    (0x01a0, 0x01a0, kept(0x1801, 0x40_0001)),        // MISC_ENABLE: fast strings; no BTS, no PEBS
    (0x01d9, 0x01d9, kept(0, 3)),                     // DEBUGCTL: LBR, BTF
    (0x01db, 0x01de, fixed(0)),                       // last branch and last interrupt from/to
    (0x0200, 0x0200, kept(0, MTRR_BASE_BITS)), (0x0201, 0x0201, kept(0, MTRR_MASK_BITS)),
    (0x0202, 0x0202, kept(0, MTRR_BASE_BITS)), (0x0203, 0x0203, kept(0, MTRR_MASK_BITS)),
    (0x0204, 0x0204, kept(0, MTRR_BASE_BITS)), (0x0205, 0x0205, kept(0, MTRR_MASK_BITS)),
    (0x0206, 0x0206, kept(0, MTRR_BASE_BITS)), (0x0207, 0x0207, kept(0, MTRR_MASK_BITS)),
    (0x0208, 0x0208, kept(0, MTRR_BASE_BITS)), (0x0209, 0x0209, kept(0, MTRR_MASK_BITS)),
    (0x020a, 0x020a, kept(0, MTRR_BASE_BITS)), (0x020b, 0x020b, kept(0, MTRR_MASK_BITS)),
    (0x020c, 0x020c, kept(0, MTRR_BASE_BITS)), (0x020d, 0x020d, kept(0, MTRR_MASK_BITS)),
    (0x020e, 0x020e, kept(0, MTRR_BASE_BITS)), (0x020f, 0x020f, kept(0, MTRR_MASK_BITS)),
    (0x0250, 0x0250, types(0)),                       // MTRR_FIX64K
    (0x0258, 0x0259, types(0)),                       // MTRR_FIX16K
    (0x0268, 0x026f, types(0)),                       // MTRR_FIX4K
    (PAT, PAT, types(PAT_RESET)),
    (0x02ff, 0x02ff, kept(MTRR_DEF_TYPE, 0xcff)),     // MTRR_DEF_TYPE
    (0x0345, 0x0345, fixed(0)),                       // PERF_CAPABILITIES
    (0xc001_0010, 0xc001_0010, kept(0, 0xffff_ffff)), // AMD SYSCFG: no TOP_MEM2, no memory encryption
    (0xc001_0015, 0xc001_0015, kept(1 << 24, 0xffff_ffff)), // AMD HWCR: the TSC runs at P0's frequency
    (0xc001_001a, 0xc001_001a, ignored(0)),           // AMD TOP_MEM
    (0xc001_001d, 0xc001_001d, ignored(0)),           // AMD TOP_MEM2
    (0xc001_001f, 0xc001_001f, ignored(0)),           // AMD NB_CFG
    (0xc001_0055, 0xc001_0055, ignored(0)),           // AMD INT_PENDING_MSG
    (0xc001_0058, 0xc001_0058, ignored(0)),           // AMD MMIO_CONF_BASE
    (0xc001_0112, 0xc001_0113, ignored(0)),           // AMD TSEG base and mask
    (0xc001_0114, 0xc001_0114, fixed(0x10)),          // AMD VM_CR: SVM disabled
    (0xc001_0140, 0xc001_0141, ignored(0)),           // AMD OSVW
    (0xc001_1020, 0xc001_1020, ignored(0)),           // AMD LS_CFG
    (0xc001_1022, 0xc001_1023, ignored(0)),           // AMD DC_CFG, BU_CFG
    (0xc001_1029, 0xc001_1029, kept(2, u64::MAX)),    // AMD DE_CFG: LFENCE is serializing
    (0xc001_102a, 0xc001_102a, ignored(0)),           // AMD BU_CFG2
];

/// The register's reset value and what writing does; `None` where there is no such register (#GP).
pub fn default_msr(index: u32) -> Option<MsrDefault> {
    let at = TABLE.partition_point(|(_, last, _)| *last < index);
    TABLE.get(at).filter(|(first, _, _)| *first <= index).map(|(_, _, register)| *register)
}

/// UC, WC, WT, WP, WB; UC- in the PAT only.
fn memory_types_exist(index: u32, value: u64) -> bool {
    value.to_le_bytes().iter().all(|t| matches!(t, 0 | 1 | 4 | 5 | 6) || (index == PAT && *t == 7))
}

/// One vCPU's registers of this kind: those that differ from their default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MsrFile(BTreeMap<u32, u64>);

impl MsrFile {
    pub fn read(&self, index: u32) -> Result<u64, MsrFault> {
        let default = default_msr(index).and_then(|register| register.value).ok_or(MsrFault)?;
        Ok(self.0.get(&index).copied().unwrap_or(default))
    }

    pub fn write(&mut self, index: u32, value: u64) -> Result<(), MsrFault> {
        let register = default_msr(index).ok_or(MsrFault)?;
        let reset = register.value.unwrap_or(0);
        match register.write {
            Write::Fault => return Err(MsrFault),
            Write::Ignore => return Ok(()),
            Write::Keep(bits) if (value ^ reset) & !bits != 0 => return Err(MsrFault),
            Write::MemoryTypes if !memory_types_exist(index, value) => return Err(MsrFault),
            Write::Keep(_) | Write::MemoryTypes => {}
        }
        match register.value {
            Some(reset) if reset != value => self.0.insert(index, value),
            _ => self.0.remove(&index),
        };
        Ok(())
    }

    /// All that differ from their default, sorted: for `CpuState::msrs`.
    pub fn iter(&self) -> impl Iterator<Item = (u32, u64)> + '_ {
        self.0.iter().map(|(index, value)| (*index, *value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted() {
        for pair in TABLE.windows(2) {
            assert!(pair[0].0 <= pair[0].1 && pair[0].1 < pair[1].0, "{:#x}", pair[1].0);
        }
    }

    #[test]
    fn reads_and_writes_follow_the_table() {
        let mut file = MsrFile::default();
        assert_eq!(file.read(0x277), Ok(PAT_RESET));
        assert_eq!(file.write(0x277, 0x0407_0106_0007_0106), Ok(()));
        assert_eq!(file.read(0x277), Ok(0x0407_0106_0007_0106));
        assert_eq!(file.write(0x277, 2), Err(MsrFault));
        assert_eq!(file.write(0x250, 7), Err(MsrFault), "UC- is no MTRR type");
        assert_eq!(file.write(0x48, 1), Ok(()));
        assert_eq!(file.write(0x48, 1 << 40), Err(MsrFault));
        assert_eq!(file.read(0x49), Err(MsrFault), "a command cannot be read");
        assert_eq!(file.write(0x49, 1), Ok(()));
        assert_eq!(file.write(ARCH_CAPABILITIES, 0), Err(MsrFault));
        assert_eq!(file.write(0x8b, 0), Ok(()));
        assert_eq!(file.read(0x8b), Ok(0x1_0000_0000));
        assert_eq!(file.read(0x1a0), Ok(0x1801));
        for nobody in [2, 0x33, 0xcf, 0x186, 0x3ff, 0x400, 0xc001_0000, 0xc000_0080, u32::MAX] {
            assert_eq!((file.read(nobody), file.write(nobody, 0)), (Err(MsrFault), Err(MsrFault)), "{nobody:#x}");
        }
        // only what differs is kept
        assert_eq!(file.iter().collect::<Vec<_>>(), [(0x48, 1), (0x277, 0x0407_0106_0007_0106)]);
        file.write(0x277, PAT_RESET).unwrap();
        assert_eq!(file.iter().count(), 1);
    }
}
