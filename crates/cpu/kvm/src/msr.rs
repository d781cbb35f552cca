//! Model-specific registers in and out of a vCPU.

use std::ops::RangeInclusive;

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use vireo_cpu::CpuError;

use crate::host;

pub(crate) const TSC: u32 = 0x10;
pub(crate) const TSC_DEADLINE: u32 = 0x6e0;

/// MSRs that KVM lists but a saved state does not carry: named fields of their own, or of features that
/// guests are not shown.
#[rustfmt::skip]
const NOT_SAVED: &[RangeInclusive<u32>] = &[
    TSC..=TSC,
    0x11..=0x12,               // the first kvmclock MSRs: other names for 0x4b564d00 and 0x4b564d01
    0x1b..=0x1b,               // APIC base
    0x34..=0x34,               // SMI count
    0x3a..=0x3a,               // feature control: VMX, SGX
    0x9e..=0x9e,               // SMBASE
    0xc1..=0xc8,               // PMU: counters,
    0x186..=0x18d,             // event selectors,
    0x309..=0x30c,             // fixed counters,
    0x345..=0x345,             // capabilities,
    0x38d..=0x391,             // control,
    0x3f1..=0x3f2, 0x4c1..=0x4c8, 0x600..=0x600, // PEBS
    0x480..=0x4a0,             // VMX
    0x560..=0x58f,             // processor trace
    0x6a0..=0x6a8,             // CET
    TSC_DEADLINE..=TSC_DEADLINE,
    0x800..=0x8ff,             // x2APIC
    0x4000_0000..=0x4000_01ff, // Hyper-V
    0x4b56_4df0..=0x4b56_4dff, // PVM
    0xc000_0080..=0xc000_0080, // EFER
    0xc000_0300..=0xc000_0303, // PMU, AMD
    0xc001_0000..=0xc001_0007, 0xc001_0200..=0xc001_020f, // PMU, AMD
    0xc001_0114..=0xc001_0117, // SVM
    0xc001_0130..=0xc001_0132, // SEV
];

/// MSRs that KVM serves but does not list: the memory type range registers.
const NOT_LISTED: &[RangeInclusive<u32>] = &[0x200..=0x20f, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26f, 0x2ff..=0x2ff];

/// The MSRs that KVM lists, and those of [`NOT_LISTED`], as far as they make up a saved state, sorted.
pub(crate) fn saved_list(kvm: &Kvm) -> Result<Vec<u32>, CpuError> {
    let list = kvm.get_msr_index_list().map_err(host("asking KVM for its MSRs"))?;
    let mut saved: Vec<u32> =
        list.as_slice().iter().copied().filter(|msr| !NOT_SAVED.iter().any(|range| range.contains(msr))).collect();
    saved.extend(NOT_LISTED.iter().cloned().flatten());
    saved.sort_unstable();
    saved.dedup();
    Ok(saved)
}

fn batch(entries: &[(u32, u64)]) -> Result<Msrs, CpuError> {
    let entries: Vec<_> =
        entries.iter().map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
    Msrs::from_entries(&entries).map_err(|_| CpuError::Other(format!("{} MSRs at once are too many", entries.len())))
}

/// Those of `indices` that this vCPU has: KVM lists some that depend on CPUID.
pub(crate) fn read(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, CpuError> {
    let mut found = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let asked: Vec<_> = rest.iter().take(KVM_MAX_MSR_ENTRIES).map(|index| (*index, 0)).collect();
        let mut msrs = batch(&asked)?;
        let read = fd.get_msrs(&mut msrs).map_err(host("reading a vCPU's MSRs"))?;
        found.extend(msrs.as_slice()[..read].iter().map(|e| (e.index, e.data)));
        // KVM stops at the first that it cannot read; that one is skipped.
        rest = &rest[if read < asked.len() { read + 1 } else { read }..];
    }
    Ok(found)
}

/// Writes in the given order. An MSR that cannot be written is an error unless it has the value already or
/// the value is 0, which stands for "not used".
pub(crate) fn write(fd: &VcpuFd, values: &[(u32, u64)]) -> Result<(), CpuError> {
    let mut rest = values;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        let written = fd.set_msrs(&batch(chunk)?).map_err(host("writing a vCPU's MSRs"))?;
        rest = &rest[written..];
        if let Some(&(index, value)) = chunk.get(written) {
            if value != 0 && read(fd, &[index])? != [(index, value)] {
                return Err(CpuError::BadState(format!("KVM does not take {value:#x} for MSR {index:#x}")));
            }
            rest = &rest[1..];
        }
    }
    Ok(())
}
