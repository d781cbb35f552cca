//! Opening `/dev/kvm` and finding out whether it can do what we build on.

use std::{ffi::CString, io, os::unix::ffi::OsStrExt, path::Path};

use kvm_bindings as kvm;
use kvm_ioctls::Kvm;

/// Why KVM cannot be used here, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Obstacle {
    pub why: String,
    pub remedy: String,
}

/// The only version of the KVM API there is (Linux `Documentation/virt/kvm/api.rst`, 4.1).
const API_VERSION: i32 = 12;

/// What the engine cannot do without. All are in Linux 4.13 and later.
#[rustfmt::skip]
const NEEDED: &[(u32, &str)] = &[
    (kvm::KVM_CAP_USER_MEMORY,        "KVM_CAP_USER_MEMORY"),
    (kvm::KVM_CAP_EXT_CPUID,          "KVM_CAP_EXT_CPUID"),
    (kvm::KVM_CAP_MP_STATE,           "KVM_CAP_MP_STATE"),
    (kvm::KVM_CAP_IRQ_ROUTING,        "KVM_CAP_IRQ_ROUTING"),
    (kvm::KVM_CAP_IRQFD,              "KVM_CAP_IRQFD"),
    (kvm::KVM_CAP_IOEVENTFD,          "KVM_CAP_IOEVENTFD"),
    (kvm::KVM_CAP_VCPU_EVENTS,        "KVM_CAP_VCPU_EVENTS"),
    (kvm::KVM_CAP_DEBUGREGS,          "KVM_CAP_DEBUGREGS"),
    (kvm::KVM_CAP_XSAVE,              "KVM_CAP_XSAVE"),
    (kvm::KVM_CAP_XCRS,               "KVM_CAP_XCRS"),
    (kvm::KVM_CAP_TSC_DEADLINE_TIMER, "KVM_CAP_TSC_DEADLINE_TIMER"),
    (kvm::KVM_CAP_SIGNAL_MSI,         "KVM_CAP_SIGNAL_MSI"),
    (kvm::KVM_CAP_SPLIT_IRQCHIP,      "KVM_CAP_SPLIT_IRQCHIP"),
    (kvm::KVM_CAP_X2APIC_API,         "KVM_CAP_X2APIC_API"),
    (kvm::KVM_CAP_IMMEDIATE_EXIT,     "KVM_CAP_IMMEDIATE_EXIT"),
];

pub(crate) fn open(device: &Path) -> Result<Kvm, Obstacle> {
    let path = CString::new(device.as_os_str().as_bytes()).unwrap_or_default();
    let kvm = Kvm::new_with_path(path).map_err(|e| cannot_open(device, e.errno()))?;
    let version = kvm.get_api_version();
    if version != API_VERSION {
        return Err(Obstacle {
            why: format!("{} answers with API version {version}, not {API_VERSION}", device.display()),
            remedy: "check that the path is the KVM device of a current Linux kernel".into(),
        });
    }
    let missing: Vec<&str> =
        NEEDED.iter().filter(|(cap, _)| kvm.check_extension_raw((*cap).into()) <= 0).map(|(_, name)| *name).collect();
    if !missing.is_empty() {
        return Err(Obstacle {
            why: format!("this kernel's KVM lacks {}", missing.join(", ")),
            remedy: "use Linux 4.13 or later, or --accel soft".into(),
        });
    }
    Ok(kvm)
}

fn cannot_open(device: &Path, errno: i32) -> Obstacle {
    let device = device.display();
    let why = format!("cannot open {device}: {}", io::Error::from_raw_os_error(errno));
    let remedy = match errno {
        libc::ENOENT => "load the module (modprobe kvm_intel or kvm_amd), switch on VT-x/AMD-V in the firmware, \
             or nested virtualization where this host is itself a VM"
            .into(),
        libc::EACCES | libc::EPERM => {
            format!("add yourself to the group that owns {device} (usermod -aG kvm $USER, then log in again)")
        }
        libc::ENODEV | libc::ENXIO => {
            "switch on VT-x/AMD-V in the firmware, or nested virtualization where this host is itself a VM".into()
        }
        libc::EBUSY => "stop the other hypervisor that holds the processor's virtualization".into(),
        _ => "use --accel soft".into(),
    };
    Obstacle { why, remedy }
}
