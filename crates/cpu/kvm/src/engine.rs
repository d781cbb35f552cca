use std::{
    io,
    os::fd::{BorrowedFd, FromRawFd, IntoRawFd},
    path::PathBuf,
    sync::Arc,
};

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS,
    kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VmFd};
use vireo_cpu::{CpuError, Engine, MAX_VCPUS, MsiLine, MsiMessage, Vcpu, VcpuConfig, cpuid::CpuidTable};
use vireo_memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

use crate::{
    capability::{self, Obstacle},
    cpuid, host,
    interrupt::{IOAPIC_PINS, Line, Routes, signal_msi},
    kick, msr,
    vcpu::KvmVcpu,
};

/// Three pages and one that KVM uses on processors which cannot run real mode by themselves (Intel before
/// unrestricted guests): in the firmware's address range, where we never put RAM or devices.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

#[derive(Clone, Debug)]
pub struct KvmOptions {
    pub device: PathBuf,
}

impl Default for KvmOptions {
    fn default() -> Self {
        Self { device: "/dev/kvm".into() }
    }
}

/// One VM of the kernel's.
pub struct KvmEngine(Arc<Vm>);

/// What the engine, its vCPUs and its interrupt lines share. The VM lives until the last of them is gone.
pub(crate) struct Vm {
    // Dropped first: the kernel lets go of guest memory before we unmap it.
    pub fd: VmFd,
    pub routes: Routes,
    pub supported: CpuidTable,
    pub saved_msrs: Vec<u32>,
    max_vcpus: u32,
    _memory: GuestMemory,
}

impl KvmEngine {
    /// A VM with this memory and no vCPUs yet.
    pub fn new(memory: &GuestMemory, options: KvmOptions) -> Result<Arc<Self>, CpuError> {
        let kvm = capability::open(&options.device).map_err(|Obstacle { why, remedy }| CpuError::Unavailable {
            engine: "KVM",
            why: format!("{why}; {remedy}"),
        })?;
        kick::install_signal_handler()?;
        let supported = cpuid::supported(&kvm)?;
        let saved_msrs = msr::saved_list(&kvm)?;
        let fd = create_vm(&kvm)?;
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(host("placing KVM's identity map"))?;
        fd.set_tss_address(TSS_ADDRESS).map_err(host("placing KVM's task state segment"))?;
        let enable = |cap, arg: u32| {
            fd.enable_cap(&kvm_enable_cap { cap, args: [u64::from(arg), 0, 0, 0], ..Default::default() })
        };
        enable(KVM_CAP_SPLIT_IRQCHIP, IOAPIC_PINS).map_err(host("putting the local APICs into the kernel"))?;
        enable(KVM_CAP_X2APIC_API, KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK)
            .map_err(host("switching KVM to x2APIC ids"))?;
        map_memory(&fd, memory)?;
        let max_vcpus = MAX_VCPUS.min(kvm.get_max_vcpus() as u32);
        let routes = Routes::new(fd.check_extension_int(Cap::IrqRouting));
        Ok(Arc::new(Self(Arc::new(Vm { fd, routes, supported, saved_msrs, max_vcpus, _memory: memory.clone() }))))
    }
}

/// KVM_CREATE_VM is cut short by signals, on hosts with many VMs for some time; asking again is the cure.
fn create_vm(kvm: &Kvm) -> Result<VmFd, CpuError> {
    for _ in 0..100 {
        match kvm.create_vm() {
            Err(e) if e.errno() == libc::EINTR => continue,
            result => return result.map_err(host("creating a KVM virtual machine")),
        }
    }
    Err(host("creating a KVM virtual machine")(kvm_ioctls::Error::new(libc::EINTR)))
}

fn map_memory(fd: &VmFd, memory: &GuestMemory) -> Result<(), CpuError> {
    for (slot, (gpa, address, bytes)) in memory.ranges().into_iter().enumerate() {
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            guest_phys_addr: gpa,
            memory_size: bytes,
            userspace_addr: address as u64,
            flags: 0,
        };
        // SAFETY: the range is a mapping of GuestMemory, of which `Vm` keeps a clone for as long as its `fd`.
        unsafe { fd.set_user_memory_region(region) }.map_err(host("giving guest memory to KVM"))?;
    }
    Ok(())
}

impl Engine for KvmEngine {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn create_vcpu(&self, config: &VcpuConfig) -> Result<Box<dyn Vcpu>, CpuError> {
        let most = self.0.max_vcpus;
        if config.count > most || config.id >= config.count {
            return Err(CpuError::TooManyVcpus { engine: "KVM", asked: config.count.max(config.id + 1), most });
        }
        Ok(Box::new(KvmVcpu::new(self.0.clone(), config)?))
    }

    fn msi_line(&self) -> Result<Arc<dyn MsiLine>, CpuError> {
        Ok(Arc::new(Line::new(self.0.clone())?))
    }

    fn send_msi(&self, message: MsiMessage) {
        signal_msi(&self.0.fd, message);
    }

    /// Writes of any length signal the eventfd: that is the kernel's fast path (KVM_CAP_IOEVENTFD_ANY_LENGTH),
    /// and a device's notification register does not care about the length.
    fn ioeventfd(&self, gpa: u64, _len: u32, fd: BorrowedFd<'_>) -> bool {
        duplicate(fd).is_ok_and(|fd| self.0.fd.register_ioevent(&fd, &IoEventAddress::Mmio(gpa), NoDatamatch).is_ok())
    }

    fn remove_ioeventfd(&self, gpa: u64, _len: u32, fd: BorrowedFd<'_>) {
        // The kernel knows the eventfd by its file, so a duplicate names it as well.
        if let Ok(fd) = duplicate(fd) {
            let _ = self.0.fd.unregister_ioevent(&fd, &IoEventAddress::Mmio(gpa), NoDatamatch);
        }
    }

    fn supported_cpuid(&self) -> Result<CpuidTable, CpuError> {
        Ok(self.0.supported.clone())
    }
}

fn duplicate(fd: BorrowedFd<'_>) -> io::Result<EventFd> {
    let fd = fd.try_clone_to_owned()?.into_raw_fd();
    // SAFETY: `fd` was just made and is owned by no one else.
    Ok(unsafe { EventFd::from_raw_fd(fd) })
}
